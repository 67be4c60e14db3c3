"""Judging in rounds: a latent is judged until its question is settled, and what it leaves goes to those unsettled.

How a judged scorer uses it, for all latents of a block together, so that a round is one batch of requests::

    rounds = Rounds(stopping, [Tested(seed=view.examples.seed, latent=view.latent, windows=examples), ...],
                    per_request=5)
    while drawn := rounds.draw():                       # [(place in the list above, indices into its windows)]
        for place, which in drawn:
            verdicts = await judge.verdicts(explanation, items.take(which))
            rounds.tell(place, [verdict.prediction for verdict in verdicts])   # None where it failed
    outcome = rounds.outcome(place)                     # .asked: what was judged, in order; .figures; .detail

Windows come without replacement, in an order that is a function of the seed, the latent's name and the window: both
classes in step, every stratum in proportion to its share at any time. The k-th answered firing and the k-th answered
silent window make one *pair*, the step in which evidence is counted; what has no partner yet waits. So a failed
judgement is left out, not guessed, and the next round makes up for it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from exegete.errors import ConfigError, InputError
from exegete.examples.keys import nth
from exegete.metrics.failures import marked, widened
from exegete.metrics.interval import Interval
from exegete.metrics.proportions import wilson
from exegete.metrics.sequential import (
    RatioTest,
    balanced_accuracy_sequence,
    f1_sequence,
    fixed_pairs,
    mean_sequence,
    pair_means,
)
from exegete.types import Array, LatentId, Windows

MARGIN: Final = 0.15
"""How far below the level to be certified a latent lies that must not be certified."""
ERROR: Final = 0.05
"""Of latents on either border, how many may be decided wrongly."""
FIRST: Final = 8
"""Pairs of the first round at least: with the standard margin no latent is certified before."""
LATER: Final = 4
"""Pairs of every other round at least."""
GROWTH: Final = 8
"""A round holds about one pair for so many pairs already judged, so that long tests take few rounds."""
_MOST: Final = 700.0  # of a logarithm whose exponential is still a number


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a latent has been judged enough.

    ``certify`` τ: once it is decided whether its balanced accuracy is at least τ or at most τ − ``margin`` (a
    likelihood ratio test: of latents at τ − margin at most a share ``error`` is certified, of those at τ at most so
    many are turned down). ``stop_when`` h: once the 95 % interval of its balanced accuracy, valid at whatever time one
    stops, is at most 2h wide. With both, once both hold. Raises ConfigError for values that make no test.
    """

    certify: float | None = None
    margin: float = MARGIN
    stop_when: float | None = None
    error: float = ERROR

    def __post_init__(self) -> None:
        if self.certify is not None:
            _ = self.test
        if self.stop_when is not None and not 0.0 < self.stop_when < 0.5:
            raise ConfigError(
                f"stop_when is the half-width of an interval, above 0 and below 0.5, got {self.stop_when}"
            )

    @property
    def active(self) -> bool:
        """Whether there is anything to stop for; where not, every window is judged at once."""
        return self.certify is not None or self.stop_when is not None

    @property
    def test(self) -> RatioTest | None:
        """The test that certifies. Raises ConfigError unless 0 < τ − margin < τ < 1 and 0 < error < 0.5."""
        if self.certify is None:
            return None
        return RatioTest(level=self.certify, margin=self.margin, alpha=self.error, beta=self.error)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """One latent to be judged in rounds: its test windows, and the seed of their draw."""

    seed: int
    latent: LatentId
    windows: Windows


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one latent.

    ``asked`` are the windows that were judged, in the order of judging, as indices into the latent's windows.
    ``certified`` is True, False, or None where it stayed undecided or nothing was to be certified. ``figures`` are
    balanced_accuracy, sensitivity, specificity and f1 with intervals that hold at the time of stopping, and with a
    level to certify also ``certified`` (1, 0, or NaN while undecided) and ``certify_e``, the e-value of the null that
    the balanced accuracy is at most τ − margin; floors take what failed as wrong, ceilings as right. ``detail`` says,
    as JSON data, what it cost beside a fixed number.
    """

    asked: Array
    certified: bool | None
    figures: Mapping[str, Interval]
    detail: Mapping[str, Any]


@final
class Rounds:
    """The rounds of a block of latents.

    ``budget`` is how many judgements a latent may take on average; left open, as many as the fixed test of the same
    errors takes or, with ``stop_when``, all windows. Each latent has so many of its own, and what the settled ones
    leave goes to those that are not, nearest to a decision first where it does not suffice for all; where it does, what
    is asked of a latent does not hang on the others. Rounds hold whole requests of ``per_request`` windows. Raises
    InputError where there is nothing to stop for.
    """

    def __init__(
        self, stopping: Stopping, tested: Sequence[Tested], *, per_request: int = 5, budget: int | None = None
    ) -> None:
        if not stopping.active:
            raise InputError("judging in rounds needs something to stop for; give certify or stop_when")
        if per_request < 1 or (budget is not None and budget < 2):
            raise InputError(f"a request holds at least 1 window, a budget 2; got {per_request} and {budget}")
        self._stopping, self._test, self._per_request = stopping, stopping.test, per_request
        self._courses = [_Course(t) for t in tested]
        if budget is None and self._test is not None and stopping.stop_when is None:
            budget = 2 * fixed_pairs(self._test)
        self._own = math.inf if budget is None else float(budget)
        self._open: dict[int, Array] = {}

    def draw(self) -> list[tuple[int, Array]]:
        """Return what to judge next: places of unsettled latents, and indices into the windows of each.

        Empty once every latent is settled, out of windows, or out of budget. Raises InputError while verdicts of the
        round before are missing.
        """
        if self._open:
            raise InputError(f"the verdicts of {len(self._open)} latents are still to be told")
        sizes = {}
        for place, course in enumerate(self._courses):
            size = 0 if self._settled(course) else course.cost(self._next(course))
            if size:
                sizes[place] = size
        going = {place: self._courses[place] for place in self._paid(sizes)}
        self._open = {place: course.take(self._next(course)) for place, course in going.items()}
        return list(self._open.items())

    def tell(self, place: int, predictions: Sequence[bool | None]) -> None:
        """Take the judge's answers to what was last drawn of a latent, in that order; None where there is none.

        Raises InputError when that many were not drawn.
        """
        which = self._open.get(place)
        if which is None or len(which) != len(predictions):
            asked = 0 if which is None else len(which)
            raise InputError(f"latent {place} of the block was asked {asked} windows, got {len(predictions)} answers")
        del self._open[place]
        self._courses[place].tell(which, predictions)

    def outcome(self, place: int) -> Outcome:
        """Return what is known of a latent by now."""
        course = self._courses[place]
        figures = self._figures(course, course.right)
        if course.failed:
            worst, best = (self._figures(course, course.filled(right=right)) for right in (False, True))
            figures = widened(figures, worst, best)
        detail: dict[str, Any] = {"judgements": len(course.asked), "pairs": len(course.means), "rounds": course.rounds}
        decision: bool | None = None
        if self._test is not None:
            decision, _ = self._test.decide(course.means)
            detail |= {"certified": decision, "fixed_test": 2 * fixed_pairs(self._test)}
        if self._stopping.stop_when is not None:
            detail |= _beside_fixed(figures)
        asked = np.array(course.asked, np.int64)
        return Outcome(asked=asked, certified=decision, figures=figures, detail=detail)

    def _figures(self, course: _Course, right: Mapping[bool, Sequence[bool]]) -> dict[str, Interval]:
        hits, rejected = right[True], right[False]
        figures = {
            "balanced_accuracy": balanced_accuracy_sequence(hits, rejected),
            "sensitivity": mean_sequence(np.array(hits, np.float64)),
            "specificity": mean_sequence(np.array(rejected, np.float64)),
            "f1": f1_sequence(hits, rejected, share=course.share),
        }
        if self._test is not None:
            means = pair_means(hits, rejected)
            figures |= _certificate(self._test, *self._test.decide(means), n=2 * len(means))
        return {name: _rests_on(course, name, found) for name, found in figures.items()}

    def _settled(self, course: _Course) -> bool:
        if self._test is not None and self._test.decide(course.means)[0] is None:
            return False
        if self._stopping.stop_when is None:
            return True
        found = balanced_accuracy_sequence(course.right[True], course.right[False])
        return found.n > 0 and half_width(found) <= self._stopping.stop_when

    def _next(self, course: _Course) -> int:
        return round_pairs(len(course.means), self._per_request)

    def _paid(self, sizes: Mapping[int, int]) -> list[int]:
        """Return which latents of these have their next round: all within their own budget, more while others leave."""
        if math.isinf(self._own):
            return list(sizes)
        spent = {place: len(course.asked) for place, course in enumerate(self._courses)}
        paid = {place for place, size in sizes.items() if spent[place] + size <= self._own}
        # A latent that may still need its own keeps it; any other leaves what it has not used.
        kept = sum(self._own if place in paid else spent[place] for place in spent)
        left = self._own * len(spent) - kept
        for place in sorted(sizes.keys() - paid, key=lambda place: (self._distance(place), place)):
            if sizes[place] <= left:
                left -= sizes[place]
                paid.add(place)
        return sorted(paid)

    def _distance(self, place: int) -> float:
        """Return how far a latent's evidence is from the nearer bound; 0 where nothing is to be certified."""
        if self._test is None:
            return 0.0
        _, ratio = self._test.decide(self._courses[place].means)
        return min(abs(bound - ratio) for bound in self._test.bounds())


@final
class _Course:
    """How far one latent has come: its windows in order by class, what was asked, which answers were right."""

    def __init__(self, tested: Tested) -> None:
        self._fires, self._document = tested.windows.fires, tested.windows.document
        order = drawn_order(tested)
        self._left = {firing: order[self._fires[order] == firing].tolist() for firing in (True, False)}
        self._rank = _numbers(tested, b"mixed")
        self.asked: list[int] = []
        self.said: list[bool | None] = []
        self.right: dict[bool, list[bool]] = {True: [], False: []}
        self.rounds = 0
        self.means: Array = np.zeros(0)

    @property
    def share(self) -> float:
        """The share of firing windows among all that were drawn."""
        return float(self._fires.mean()) if len(self._fires) else 0.0

    def cost(self, pairs: int) -> int:
        """Return how many windows so many more pairs take; 0 where a class has no window left to make one."""
        return sum(self._wanted(pairs).values())

    def take(self, pairs: int) -> Array:
        """Return the next windows for so many more pairs, both classes mixed."""
        taken: list[int] = []
        for firing, count in self._wanted(pairs).items():
            taken += self._left[firing][:count]
            del self._left[firing][:count]
        chosen = np.array(taken, np.int64)
        mixed: Array = chosen[np.argsort(self._rank[chosen], kind="stable")]
        return mixed

    def tell(self, which: Array, predictions: Sequence[bool | None]) -> None:
        """Take the answers to windows: None is left out, and its partner waits for the next of its class."""
        self.asked += which.tolist()
        self.said += predictions
        self.rounds += 1
        for index, said in zip(which.tolist(), predictions, strict=True):
            firing = bool(self._fires[index])
            if said is not None:
                self.right[firing].append(said == firing)
        self.means = pair_means(self.right[True], self.right[False])

    @property
    def failed(self) -> int:
        """How many windows were asked about without an answer."""
        return self.said.count(None)

    def filled(self, *, right: bool) -> dict[bool, list[bool]]:
        """Return the answers of either class as if all that failed had been right, or wrong."""
        found: dict[bool, list[bool]] = {True: [], False: []}
        for index, said in zip(self.asked, self.said, strict=True):
            firing = bool(self._fires[index])
            found[firing].append(right if said is None else said == firing)
        return found

    def documents(self, classes: Sequence[bool]) -> int:
        """Return how many documents the answered windows of these classes are of."""
        answered = [i for i, said in zip(self.asked, self.said, strict=True) if said is not None]
        return len({int(self._document[i]) for i in answered if bool(self._fires[i]) in classes})

    def _wanted(self, pairs: int) -> dict[bool, int]:
        """Return how many windows of each class so many more pairs take, or as many as there can be."""
        done, answered = len(self.means), {firing: len(right) for firing, right in self.right.items()}
        goal = min(done + pairs, *(answered[firing] + len(left) for firing, left in self._left.items()))
        return {firing: max(0, goal - count) if goal > done else 0 for firing, count in answered.items()}


def round_pairs(done: int, per_request: int) -> int:
    """Return how many pairs the round after ``done`` pairs makes, in whole requests of ``per_request`` windows."""
    step = per_request // math.gcd(2, per_request)
    least = LATER if done else FIRST
    return max(-(-least // step), done // (GROWTH * step)) * step


def drawn_order(tested: Tested) -> Array:
    """Return the order in which a latent's windows are drawn, as indices [n].

    Within a class, the windows of a stratum come in random order, the j-th of n at a random time between j/n and
    (j + 1)/n: up to any time every stratum has had its share of the draw, to within one window, and what comes at a
    time is of a stratum with the chance of its share. A window's time depends on the seed, the latent's name, and the
    windows of its stratum alone, not on the order in which they are given.
    """
    windows = tested.windows
    first, second = _numbers(tested, b"place"), _numbers(tested, b"time")
    group = 2 * windows.stratum.astype(np.int64) + windows.fires
    by_group = np.lexsort((first, group))
    _, begins, sizes = np.unique(group[by_group], return_index=True, return_counts=True)
    times = np.empty(len(windows))
    places = np.arange(len(windows)) - np.repeat(begins, sizes)
    times[by_group] = (places + second[by_group]) / np.repeat(sizes, sizes)
    order: Array = np.lexsort((first, times))
    return order


def _numbers(tested: Tested, purpose: bytes) -> Array:
    """Return a random number in [0, 1) for each window: a hash of the seed, the latent's name, and the window."""
    name = f"{tested.seed}|{tested.latent}|rounds|".encode() + purpose
    key = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), "<u8").astype(np.uint64)
    windows = tested.windows
    mixed = nth(nth(nth(key, windows.row), windows.start), windows.fires)
    numbers: Array = (mixed >> np.uint64(11)) * 2.0**-53
    return numbers


_CLASSES: Final[Mapping[str, tuple[bool, ...]]] = {"sensitivity": (True,), "specificity": (False,)}


def _rests_on(course: _Course, name: str, figure: Interval) -> Interval:
    """Return a figure with the number of documents it rests on, and marked where those of a class are few."""
    if not figure.n:
        return figure
    classes = _CLASSES.get(name, (True, False))
    fewest = min(course.documents((firing,)) for firing in classes)
    return marked(figure, course.documents(classes), fewest)


def _certificate(test: RatioTest, decision: bool | None, ratio: float, *, n: int) -> dict[str, Interval]:
    method = f"likelihood ratio test of at least {test.level:g} against at most {test.null:g}"
    errors = f", errors {test.alpha:g} and {test.beta:g}" + ("" if decision is not None else "; undecided")
    value, low, high = (math.nan, 0.0, 1.0) if decision is None else (float(decision),) * 3
    evidence = math.exp(min(ratio, _MOST))
    return {
        "certified": Interval(value=value, low=low, high=high, method=method + errors, n=n),
        "certify_e": Interval(value=evidence, low=evidence, high=evidence, method=method, n=n),
    }


def _beside_fixed(figures: Mapping[str, Interval]) -> dict[str, Any]:
    """Return the half-width that was reached, and the judgements a fixed number would take for it; None without one."""
    reached = half_width(figures["balanced_accuracy"])
    if math.isnan(reached):
        return {"half_width": None, "fixed_width": None}
    fixed = fixed_judgements(figures["sensitivity"].value, figures["specificity"].value, reached)
    return {"half_width": reached, "fixed_width": fixed}


def half_width(interval: Interval) -> float:
    """Return half the width of an interval; NaN where there is none."""
    return (interval.high - interval.low) / 2.0


def fixed_judgements(sensitivity: float, specificity: float, width: float) -> int:
    """Return how many judgements, half of them of either class, a fixed number would take for an interval of ±width.

    The interval is that of balanced accuracy at these rates (MOVER of two Wilson intervals), computed for rising
    numbers a class. Raises InputError unless width is above 0.
    """
    if not width > 0.0:
        raise InputError(f"the half-width of an interval is above 0, got {width}")
    low, high = 0, 1
    while _mover_width(sensitivity, specificity, high) > width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _mover_width(sensitivity, specificity, middle) > width:
            low = middle
        else:
            high = middle
    return 2 * high


def _mover_width(sensitivity: float, specificity: float, n: int) -> float:
    """Return half the width of the interval of balanced accuracy after n judgements of either class."""
    rates = (sensitivity, specificity)
    found = [wilson(rate * n, n) for rate in rates]
    below = math.hypot(*(i.value - i.low for i in found)) / 2.0
    above = math.hypot(*(i.high - i.value for i in found)) / 2.0
    return (below + above) / 2.0
