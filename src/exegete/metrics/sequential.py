"""Judging until a question is settled: evidence that holds whenever one stops.

The unit of evidence is a *pair*: one firing and one silent window, drawn at random from the strata in their
proportions. Its mean d (0, ½ or 1) is how often the judge was right, and the mean of d over the frame is the balanced
accuracy θ. Two things are made of pairs. Both are products of factors of mean at most 1 under their null, so that by
Ville's inequality (1939) the chance of ever passing 1/α is at most α, at whatever time and for whatever reason one
stops:

- the likelihood ratio of θ = τ against θ = τ − δ (Wald 1945) as if both classes had one rate. For a pair of rates s and
  c a factor has mean (1 + κ(s − θ₀))(1 + κ(c − θ₀)) ≤ (1 + κ(θ − θ₀))² by the inequality of means: at most 1 for every
  θ ≤ θ₀, however the errors divide between the classes, and largest where they divide evenly;
- the capital of bets on d against a mean m, ∏(1 + λ(dᵢ − m)), averaged over bets λ (Waudby-Smith and Ramdas 2024,
  section 4). The means that no bet has refuted are a confidence sequence.

Draws that keep to the strata's proportions only lower those means, by the same inequality. Drawing without replacement
lowers them at any fixed time (Hoeffding 1963, theorem 4); that crossings become no likelier is shown by exact counts in
the tests and by simulation in ``benchmarks/sequential.py``. Nothing here knows of documents: over a frame given once
and for all the draw makes windows independent, over new documents it does not; the benchmark has the error rates of
both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, final

import numpy as np
import numpy.typing as npt

from exegete.errors import ConfigError, InputError
from exegete.metrics.inputs import undefined
from exegete.metrics.interval import Interval
from exegete.types import Array

Verdicts = Sequence[bool] | npt.NDArray[np.bool_]
BETS: Final = 32
"""Bets that capital is divided among."""
SHARES: Final = (np.arange(BETS) + 0.5) / BETS
"""Their sizes, as shares of the largest bet that cannot lose more than there is, evenly spaced."""
METHOD: Final = "betting confidence sequence"
_PIECES: Final = 16  # that the range of a bound is cut into at a time
_CUTS: Final = 6
_MOST_PAIRS: Final = 100_000
_SLACK: Final = 1e-9  # of a log ratio that only rounding keeps from its bound


# -- the test that certifies -------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RatioTest:
    """Is the balanced accuracy at least ``level`` or at most ``level`` − ``margin``?

    At most ``alpha`` of latents at or below ``level`` − ``margin`` are certified, and at most ``beta`` of those at or
    above ``level`` turned down, whenever the test stops. Raises ConfigError unless 0 < level − margin < level < 1 and
    both errors are above 0 and below ½.
    """

    level: float
    margin: float = 0.15
    alpha: float = 0.05
    beta: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.level - self.margin < self.level < 1.0:
            raise ConfigError(
                f"certify and margin ask for 0 < certify − margin < certify < 1, got {self.level} and {self.margin}"
            )
        if not (0.0 < self.alpha < 0.5 and 0.0 < self.beta < 0.5):
            raise ConfigError(f"error rates lie above 0 and below 0.5, got {self.alpha} and {self.beta}")

    @property
    def null(self) -> float:
        """The highest balanced accuracy that must not be certified."""
        return self.level - self.margin

    def log_ratios(self, pairs: Array) -> Array:
        """Return the log likelihood ratio after each of the pairs, given as means 0, ½, 1 [n]."""
        hit, miss = math.log(self.level / self.null), math.log((1.0 - self.level) / (1.0 - self.null))
        return np.cumsum(2.0 * (pairs * hit + (1.0 - pairs) * miss))

    def bounds(self) -> tuple[float, float]:
        """Return the log ratios at which a latent is turned down and certified."""
        return math.log(self.beta), -math.log(self.alpha)

    def decide(self, pairs: Array) -> tuple[bool | None, float]:
        """Return the decision after these pairs in order, None without one, and the log ratio it was made at.

        The first pair whose ratio passes a bound decides, whatever came after it. The ratio itself, at that pair or at
        the last one, is an e-value of the null that the balanced accuracy is at most ``null``.
        """
        ratios = self.log_ratios(pairs)
        down, up = self.bounds()
        passed = np.flatnonzero((ratios >= up - _SLACK) | (ratios <= down + _SLACK))
        if len(passed):
            ratio = float(ratios[passed[0]])
            return ratio > 0.0, ratio
        return None, float(ratios[-1]) if len(ratios) else 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Operating:
    """How a test does on latents of one kind: the chance of either decision, and the mean number of judgements."""

    certified: float
    rejected: float
    judgements: float


def operating(test: RatioTest, sensitivity: float, specificity: float, rounds: Sequence[int]) -> Operating:
    """Return the exact behaviour of a test on independent pairs of given rates.

    ``rounds`` are the numbers of pairs judged after each round, ascending; whole rounds are paid for, and the test
    ends after the last. The chance of each number of right answers without a decision is carried from pair to pair.
    """
    if not rounds or list(rounds) != sorted(set(rounds)) or rounds[0] < 1:
        raise InputError(f"rounds are ascending numbers of pairs, got {list(rounds)[:5]}")
    s, c = sensitivity, specificity
    step = np.array([(1.0 - s) * (1.0 - c), s * (1.0 - c) + c * (1.0 - s), s * c])
    down, up = test.bounds()
    hit, miss = math.log(test.level / test.null), math.log((1.0 - test.level) / (1.0 - test.null))
    undecided, certified, rejected, judgements, done = np.ones(1), 0.0, 0.0, 0.0, 0
    for upto in rounds:
        judgements += 2.0 * (upto - done) * (1.0 - certified - rejected)
        for n in range(done + 1, upto + 1):
            undecided = np.convolve(undecided, step)
            right = np.arange(2 * n + 1)
            ratio = right * hit + (2 * n - right) * miss
            over, under = ratio >= up - _SLACK, ratio <= down + _SLACK
            certified += float(undecided[over].sum())
            rejected += float(undecided[under].sum())
            undecided[over | under] = 0.0
        done = upto
    return Operating(certified=certified, rejected=rejected, judgements=judgements)


@lru_cache(maxsize=64)
def fixed_pairs(test: RatioTest) -> int:
    """Return how many pairs the fixed test of the same errors takes, both classes having one rate.

    That is the smallest number for which some number of right answers is reached with a chance of at most alpha at
    ``null`` and of at least 1 − beta at ``level`` (exact binomial). Raises ConfigError beyond 100,000 pairs.
    """
    from scipy import stats

    n = 1
    while n <= _MOST_PAIRS:
        block = np.arange(n, n + 64 + n // 4)
        critical = stats.binom.isf(test.alpha, 2 * block, test.null) + 1
        enough = np.flatnonzero(stats.binom.sf(critical - 1, 2 * block, test.level) >= 1.0 - test.beta)
        if len(enough):
            return int(block[enough[0]])
        n = int(block[-1]) + 1
    raise ConfigError(f"a margin of {test.margin} takes more than {_MOST_PAIRS} judgements a class; give a larger one")


# -- bets --------------------------------------------------------------------------------------------------------------


def pair_means(firing: Verdicts, silent: Verdicts) -> Array:
    """Return the mean of each pair [pairs]: the k-th answer of either class, given as right or wrong, in order.

    Answers without a partner wait, so that pairs never change once they are made.
    """
    a, b = np.asarray(firing, np.float64), np.asarray(silent, np.float64)
    n = min(len(a), len(b))
    means: Array = (a[:n] + b[:n]) / 2.0
    return means


def log_capital(values: Array, mean: float) -> float:
    """Return the log of what bets on values in 0…1 [n] being above a mean have made of 1.

    Capital is divided evenly among BETS bets λ = x / mean with x evenly spaced in (0, 1). It is an e-value of the null
    that the mean is at most this, at whatever number of values one stops. Every bet's factor, 1 − x + x·value / mean,
    falls as the mean rises, and so does the capital. Raises InputError unless 0 < mean < 1.
    """
    if not 0.0 < mean < 1.0:
        raise InputError(f"bets are made against a mean between 0 and 1, got {mean}")
    return float(_log_capitals(*np.unique(values, return_counts=True), np.array([mean]))[0])


def _log_capitals(values: Array, counts: Array, means: Array) -> Array:
    """Return the log capital against each of the means [m] after these values, each so many times."""
    gains = values / means[:, None] - 1.0
    logs = np.log1p(SHARES[:, None] * gains[:, None, :]) @ counts
    top = logs.max(axis=1)
    found: Array = top + np.log(np.exp(logs - top[:, None]).mean(axis=1))
    return found


def mean_sequence(values: Array, *, level: float = 0.95) -> Interval:
    """Return the mean of values in 0…1 [n] with an interval that holds whenever one stops.

    Its bounds are where the capital of bets on more, and of bets on less, reaches 2 / (1 − level). ``n`` counts values.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    array = np.asarray(values, np.float64)
    if not len(array) or not bool(((array >= 0.0) & (array <= 1.0)).all()):
        return undefined(METHOD)
    against = math.log(2.0 / (1.0 - level))
    low, high = _least(array, against), 1.0 - _least(1.0 - array, against)
    value = float(array.mean())
    return Interval(value=value, low=min(low, value), high=max(high, value), method=METHOD, n=len(array))


def _least(values: Array, against: float) -> float:
    """Return a mean up to which every mean is refuted, within 2^-24 of the last one; 0 where none is."""
    known, counts = np.unique(values, return_counts=True)
    low, high = 0.0, float(values.mean())
    if high == 0.0:
        return 0.0
    for _ in range(_CUTS):
        means = np.linspace(low, high, _PIECES + 1)
        refuted = int((_log_capitals(known, counts, means[1:]) >= against).sum())
        low, high = float(means[refuted]), float(means[min(refuted + 1, _PIECES)])
    return low


def balanced_accuracy_sequence(firing: Verdicts, silent: Verdicts, *, level: float = 0.95) -> Interval:
    """Return the balanced accuracy over pairs with an interval that holds whenever one stops.

    ``n`` counts the judgements in pairs; the value is their mean.
    """
    found = mean_sequence(pair_means(firing, silent), level=level)
    return Interval(value=found.value, low=found.low, high=found.high, method=METHOD, n=2 * found.n)


def f1_sequence(firing: Verdicts, silent: Verdicts, *, share: float, level: float = 0.95) -> Interval:
    """Return F1 at a given share of firing windows, with an interval that holds whenever one stops.

    F1 rises with both rates, sensitivity s and specificity c: 2πs / (π(1 + s) + (1 − π)(1 − c)) at the share π. Its
    bounds are those of the rates, each held at half the error, put together. Raises InputError unless 0 < share < 1.
    """
    each = (1.0 + level) / 2.0
    hit = mean_sequence(np.asarray(firing, np.float64), level=each)
    rejected = mean_sequence(np.asarray(silent, np.float64), level=each)
    if not (hit.n and rejected.n):
        return undefined(METHOD)
    if not 0.0 < share < 1.0:
        raise InputError(f"F1 needs both classes, got a share of {share} firing windows")

    def f1(s: float, c: float) -> float:
        return 2.0 * share * s / (share * (1.0 + s) + (1.0 - share) * (1.0 - c))

    low, value, high = f1(hit.low, rejected.low), f1(hit.value, rejected.value), f1(hit.high, rejected.high)
    return Interval(value=value, low=low, high=high, method=METHOD, n=hit.n + rejected.n)
