"""What judged windows stand for in the test frame: weights, effective counts, and draws of how the frame may look.

The drawn windows are a stratified sample of the frame. A firing window stands for ``multiplicity / probability``
windows, and all of them together for the windows that fire; a silent one for its part of its stratum, whose size the
frame knows. Where judgements failed, those of the same stratum that were answered stand in for them.

How the frame may look is simulated from a posterior for each part of it. With k yes among n answered in a silent
stratum its share of yes is drawn from Beta(k + 1, n − k) on the side that speaks against the judge and from
Beta(k, n − k + 1) on the other: their 97.5 % and 2.5 % quantiles are the one-sided bounds of Clopper and Pearson
(1934), so that none of n is never taken for none of all. Combining such draws and taking a quantile is the melding of
Fay, Proschan and Brittain (2015). Of many small strata that would be needlessly wide, so firing windows are one part,
whose weights and strata enter through the effective number of windows (Korn and Graubard 1998). Their share of yes is
drawn from Beta(k + ¼, n − k + ¾) and Beta(k + ¾, n − k + ¼), half way between Clopper and Pearson and Jeffreys: of a
rate of 95 % with 50 windows Jeffreys' interval covers but 88.5 %, this one at least 93.8 % of rates from 55 % to 95 %
with 25, 50 or 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol, final

import numpy as np

from exegete.errors import InputError
from exegete.metrics import failures
from exegete.metrics.clustered import t_of
from exegete.metrics.inputs import expit, z_of
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FrameCounts, Observed
from exegete.types import STRATA, Array

ICC: Final = 0.1
"""How alike verdicts on windows of one document are taken to be where all verdicts agree, and none could tell."""
NONE_SEEN: Final = 0.2275
"""Median of Jeffreys' posterior of a rate after none of n, times n: half the median of chi-squared with one degree."""

_EDGE: Final = 1e-9  # from 0 and 1, where a logit is taken
_OF_CLASS: Final = {"population_recall": (True,), "population_specificity": (False,)}
"""Metrics of firing windows alone, and of silent ones."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How intervals are simulated: by so many draws, from a seed, to a level."""

    draws: int
    seed: int
    level: float

    @property
    def low(self) -> float:
        """The share of draws below an interval."""
        return (1.0 - self.level) / 2.0

    @property
    def high(self) -> float:
        """The share of draws up to its end."""
        return (1.0 + self.level) / 2.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the frame: ``size`` windows, of which those at ``places`` of the judgements were answered.

    They lie by document: ``starts`` [documents] says where in ``places`` each document begins. ``weight`` [n] says how
    many of the ``size`` each stands for.
    """

    size: float
    places: Array
    weight: Array
    starts: Array

    def __len__(self) -> int:
        return len(self.places)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts)

    def mean(self, values: Array) -> float:
        """Return the weighted mean of values (one for each judgement); NaN where none was answered."""
        own = values[self.places]
        if not len(own):
            return math.nan
        # Rounding must not take a share above 1.
        return min(max(float(self.weight @ own) / self.size, float(own.min())), float(own.max()))

    def by_document(self, columns: Array) -> Array:
        """Return weighted sums of columns [m, n] (one for each place) over the windows of a document [m, documents]."""
        weighted = columns * self.weight
        if self.documents == len(self):
            return weighted
        sums: Array = np.add.reduceat(weighted, self.starts, axis=1)
        return sums

    def effective(self, values: Array, level: float) -> float:
        """Return how many windows drawn singly at random would tell the mean of values as well as these.

        That is the weighted variance of the values over the variance of their weighted mean, which is summed over
        documents; no more than Kish's count (Σw)² / Σw². Where documents repeat it is lowered as ``stretch`` says.
        """
        if self.documents < 2:
            return float(min(len(self), 1))
        off = values[self.places] - self.mean(values)
        kish = self.size**2 / float(self.weight @ self.weight)
        sums = self.by_document(off[None])[0]
        variance, spread = float(sums @ sums) / self.size**2, float(self.weight @ (off * off)) / self.size
        if self.documents == len(self):
            return min(spread / variance, kish) if variance > 1e-15 else kish
        if variance > 1e-15:
            found = min(spread * (self.documents - 1) / (variance * self.documents), kish)
        else:
            counts = np.diff(self.starts, append=len(self)).astype(np.float64)
            found = kish / (1.0 + ICC * (float(counts @ counts) / len(self) - 1.0))
        return found / self.stretch(level) ** 2

    def stretch(self, level: float) -> float:
        """Return how much wider than the normal's Student's t is, with as many degrees as documents but one; or 1.

        It is 1 where no document holds several of the windows.
        """
        if self.documents == len(self) or self.documents < 2:
            return 1.0
        return t_of(level, self.documents - 1) / z_of(level)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The frame in parts: the firing windows, the silent strata, and ``unknown`` silent windows nothing was told of."""

    firing: Part
    silent: tuple[Part, ...]
    unknown: float

    @property
    def all(self) -> tuple[Part, ...]:
        """The firing windows and the silent strata."""
        return (self.firing, *self.silent)

    @property
    def answered(self) -> int:
        """How many judgements were answered."""
        return sum(len(part) for part in self.all)

    @property
    def quiet(self) -> float:
        """How many windows are silent."""
        return sum(part.size for part in self.silent) + self.unknown

    def stretch(self, level: float) -> float:
        """Return the greatest stretch of a part."""
        return max(part.stretch(level) for part in self.all)

    @property
    def whole(self) -> bool:
        """Whether some window of either class was answered, and neither class is empty."""
        return bool(len(self.firing) and self.silent and self.firing.size and self.quiet)


def parts(observed: Observed, frame: FrameCounts, answered: Array) -> Parts:
    """Return the frame in parts, told by the judgements that were ``answered`` (bool [n]).

    Raises InputError when the frame has not the stratum of a silent window.
    """
    silent, names = ~observed.truth, list(frame.silent)
    codes = np.array([STRATA.index(name) for name in names], np.int8)
    stray = np.flatnonzero(silent & ~np.isin(observed.stratum, codes))
    if len(stray):
        raise InputError(
            f"a silent window is of stratum {STRATA[observed.stratum[stray[0]]]}, the frame has {', '.join(names)}; "
            "give the frame that the windows were drawn from"
        )
    drawn = [silent & (observed.stratum == code) for code in codes]
    everywhere = _copies(observed, silent, 1.0)
    # Strata are counted with near-duplicates once, the frame counts windows.
    sizes = [
        frame.silent[name] * _copies(observed, which, everywhere) for name, which in zip(names, drawn, strict=True)
    ]
    unused = frame.unused * everywhere
    total = sum(sizes) + unused
    scale = (frame.windows - frame.firing) / total if total else 0.0
    told: list[Part] = []
    unknown = unused * scale
    for size, which in zip(sizes, drawn, strict=True):
        places = np.flatnonzero(which & answered)
        if len(places):
            told.append(_part(observed, places, observed.weight[places], size * scale))
        else:
            unknown += size * scale
    return Parts(firing=_firing(observed, frame, answered), silent=tuple(told), unknown=unknown)


def drawn_from(observed: Observed) -> FrameCounts:
    """Return the frame as the inclusion probabilities of its drawn windows tell it: exact on average over draws."""
    silent = ~observed.truth
    units = np.bincount(observed.stratum[silent], weights=1.0 / observed.probability[silent], minlength=len(STRATA))
    return FrameCounts(
        windows=round(float(observed.weight.sum())),
        firing=round(float(observed.weight[observed.truth].sum())),
        silent={STRATA[stratum]: round(float(units[stratum])) for stratum in np.flatnonzero(units)},
    )


def _firing(observed: Observed, frame: FrameCounts, answered: Array) -> Part:
    """Return the firing windows; what was answered in a stratum stands for what failed in it."""
    weight = np.where(observed.truth, observed.weight, 0.0)
    drawn = np.bincount(observed.stratum, weights=weight, minlength=len(STRATA))
    kept = np.bincount(observed.stratum, weights=np.where(answered, weight, 0.0), minlength=len(STRATA))
    factor = np.divide(drawn, kept, out=np.zeros(len(STRATA)), where=kept > 0.0)
    places = np.flatnonzero(observed.truth & answered)
    return _part(observed, places, weight[places] * factor[observed.stratum[places]], float(frame.firing))


def _part(observed: Observed, places: Array, weight: Array, size: float) -> Part:
    total = float(weight.sum())
    document = observed.document[places]
    order = np.argsort(document, kind="stable")
    return Part(
        size=size,
        places=places[order],
        weight=weight[order] * (size / total) if total else weight,
        starts=np.flatnonzero(np.diff(document[order], prepend=document.min(initial=0) - 1)),
    )


def rate_unseen(part: Part, quiet: float, effective: float) -> float:
    """Return the rate that a silent stratum is taken to have where none was seen, of so many windows of the frame.

    Jeffreys' prior is shared out among the strata by size: a frame cut into more of them has no more of it.
    """
    return NONE_SEEN / max(effective, 1.0) * part.size / quiet


def alarms(cut: Parts, yes: Array, level: float) -> tuple[float, float]:
    """Return how many silent windows are judged yes (0/1 for each judgement): as estimated, and with what is unseen.

    Windows nothing was told of are taken to be as the rest.
    """
    plain = seen = 0.0
    for part in cut.silent:
        rate = part.mean(yes)
        plain += part.size * rate
        seen += part.size * (rate or rate_unseen(part, cut.quiet, part.effective(yes, level)))
    told = cut.quiet / (cut.quiet - cut.unknown)
    return told * plain, told * seen


def _copies(observed: Observed, which: Array, otherwise: float) -> float:
    """Return how many windows a unit of the frame stands for on average, told by those drawn; else ``otherwise``."""
    units = float((1.0 / observed.probability[which]).sum())
    return float(observed.weight[which].sum()) / units if units else otherwise


class Complete(Protocol):
    """Fills in what failed: all right, or all wrong."""

    def __call__(self, observed: Observed, *, right: bool) -> Observed:
        """Return the judgements without failures."""


@final
class Sampled:
    """The judgements of one explanation and the frame that they were drawn from."""

    def __init__(self, observed: Observed, frame: FrameCounts) -> None:
        self._observed, self._frame = observed, frame
        self._parts: dict[bytes, Parts] = {}

    def metrics(
        self, answered: Array, complete: Complete, find: Callable[[Observed, Parts], dict[str, Interval]]
    ) -> dict[str, Interval]:
        """Return the metrics of what was ``answered`` (bool [n]), with the bounds of what failed and the documents."""
        found = find(self._observed, self._cut(answered))
        if not answered.all():
            whole = self._cut(np.ones(len(answered), bool))
            worst, best = (find(complete(self._observed, right=right), whole) for right in (False, True))
            found = failures.widened(found, worst, best)
        told = self._observed.take(answered)
        return {metric: _marked(metric, one, told) if one.n else one for metric, one in found.items()}

    def _cut(self, answered: Array) -> Parts:
        key = answered.tobytes()
        if key not in self._parts:
            self._parts[key] = parts(self._observed, self._frame, answered)
        return self._parts[key]


def _marked(metric: str, interval: Interval, told: Observed) -> Interval:
    """Return an interval marked with the documents of what was told, beside the flags it has."""
    classes = _OF_CLASS.get(metric, (True, False))
    marked = failures.rests_on(interval, told.truth, told.document, classes=classes)
    return replace(marked, flags=(*marked.flags, *interval.flags))


# -- draws ------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Draws of what the answered windows of a part stand for: all windows of a document share one number.

    ``numbers`` [documents, draws], and ``scale`` [draws] by which they are multiplied; ``unseen`` [draws] is the number
    of windows that are like none of those answered.
    """

    part: Part
    numbers: Array
    scale: Array
    unseen: Array

    def sums(self, columns: Array) -> Array:
        """Return the sums of columns [m, n] (one for each place of the part) over the part's windows [m, draws]."""
        sums: Array = (self.part.by_document(columns).astype(np.float32) @ self.numbers) * self.scale
        return sums


def frames(cut: Parts, values: Array, options: Options) -> tuple[Drawn, tuple[Drawn, ...]]:
    """Return draws of the firing windows and of the silent strata, from the Dirichlet posterior of each part.

    Beside its windows every silent stratum has one window like none of them, which weighs as much as one at random,
    and more where ``values`` (one for each judgement) are alike within documents: put at the one end of a ranking or at
    the other, it makes every share above a threshold the Betas of the module's docstring.
    """
    rows = cut.firing.documents + sum(part.documents + 1 for part in cut.silent)
    numbers = _exponentials(options.seed, -(-rows // 64) * 64, options.draws)
    found, at = [], 0
    for part in cut.all:
        own = numbers[at : at + part.documents]
        at += part.documents
        total = part.by_document(np.ones((1, len(part)))).astype(np.float32)[0] @ own
        other = np.zeros(1, np.float32)
        if part is not cut.firing:
            other = numbers[at] * np.float32(part.size / part.effective(values, options.level))
            at += 1
        scale = np.float32(part.size) / (total + other)
        found.append(Drawn(part=part, numbers=own, scale=scale, unseen=other * scale))
    return found[0], tuple(found[1:])


@lru_cache(maxsize=4)
def _exponentials(seed: int, rows: int, draws: int) -> Array:
    """Return standard exponentials [rows, draws]; latents share them, as their intervals are apart."""
    drawn: Array = np.random.default_rng(seed).standard_exponential((rows, draws), np.float32)
    drawn.flags.writeable = False
    return drawn


def quantile(drawn: Array, share: float) -> float:
    """Return a quantile of draws [n], between two of them by linear interpolation."""
    ordered = np.sort(drawn)
    at = share * (len(ordered) - 1)
    below = int(at)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (at - below) * (high - low)


def half_width(interval: Interval) -> float:
    """Return half the interval's width over its value, or over its geometric centre where that is less."""
    centre = min(interval.value, math.sqrt(max(interval.low, 0.0) * interval.high))
    half = (interval.high - interval.low) / 2.0
    return half / centre if centre > 0.0 else math.inf


def stretched(cut: Parts, value: float, low: float, high: float, lowest: float, level: float) -> tuple[float, float]:
    """Return the bounds of a value in ``lowest`` … 1 from draws, moved away from it as ``Parts.stretch`` says.

    They are the whole range where one document holds all firing windows: its draws move together, and say nothing.
    """
    if cut.firing.documents < 2:
        return lowest, 1.0
    stretch = cut.stretch(level)
    return further(value, low, stretch, lowest), further(value, high, stretch, lowest)


def further(value: float, bound: float, stretch: float, lowest: float) -> float:
    """Return the bound of a value in ``lowest`` … 1 moved away from it, to ``stretch`` times as many logits."""
    if stretch == 1.0:
        return bound
    span = 1.0 - lowest
    here, there = (min(max((x - lowest) / span, _EDGE), 1.0 - _EDGE) for x in (value, bound))
    centre = math.log(here / (1.0 - here))
    return lowest + span * expit(centre + stretch * (math.log(there / (1.0 - there)) - centre))
