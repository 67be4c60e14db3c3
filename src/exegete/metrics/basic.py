"""Metrics with their intervals: pure functions of arrays.

Every function returns an ``Interval``. Where the data leave the metric undefined — no observation, a value that is not
a number, one class only — the result is NaN with ``n`` 0, never a number that looks like a score. Where the data do not
suffice for an interval of the asked level, it is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, final

import numpy as np
import numpy.typing as npt

from exegete.errors import InputError
from exegete.metrics.interval import Interval
from exegete.types import Array

Truths = Sequence[bool] | npt.NDArray[np.bool_]
Numbers = Sequence[float] | npt.NDArray[np.floating]
_DRAWS: Final = 2000
_AT_ONCE: Final = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lift:
    """What scores have over their nulls, pair by pair: the median and the mean of the differences."""

    median: Interval
    mean: Interval


# -- proportions ------------------------------------------------------------------------------------------------------


def wilson(k: float, n: float, *, level: float = 0.95) -> Interval:
    """Return k of n with Wilson's score interval (Wilson 1927). Raises InputError unless 0 ≤ k ≤ n."""
    if not 0 <= k <= n:
        raise InputError(f"a proportion is k of n with 0 ≤ k ≤ n, got {k} of {n}")
    if n == 0:
        return _undefined("wilson")
    z, p = _z(level), k / n
    scale = 1.0 + z * z / n
    centre = (p + z * z / (2.0 * n)) / scale
    half = z / scale * math.sqrt(p * (1.0 - p) / n + z * z / (4.0 * n * n))
    return _clamped(p, centre - half, centre + half, "wilson", round(n))


def sensitivity(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of true cases that are predicted (recall), with Wilson's interval."""
    true, said = _pairs(truth, prediction)
    return wilson(int((true & said).sum()), int(true.sum()), level=level)


def specificity(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of false cases that are not predicted, with Wilson's interval."""
    true, said = _pairs(truth, prediction)
    return wilson(int((~true & ~said).sum()), int((~true).sum()), level=level)


def precision(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of predicted cases that are true, with Wilson's interval."""
    true, said = _pairs(truth, prediction)
    return wilson(int((true & said).sum()), int(said.sum()), level=level)


def balanced_accuracy(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the mean of sensitivity and specificity; it needs both classes.

    The interval is Newcombe's hybrid (MOVER: Zou and Donner 2008): the distances from the two Wilson intervals' bounds
    are squared and added.
    """
    hit, rejected = sensitivity(truth, prediction, level=level), specificity(truth, prediction, level=level)
    if not (hit.n and rejected.n):
        return _undefined("mover-wilson")
    value = (hit.value + rejected.value) / 2.0
    low = value - math.hypot(hit.value - hit.low, rejected.value - rejected.low) / 2.0
    high = value + math.hypot(hit.high - hit.value, rejected.high - rejected.value) / 2.0
    return _clamped(value, low, high, "mover-wilson", hit.n + rejected.n)


def f1(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return 2 TP / (2 TP + FP + FN), undefined when nothing is true or predicted.

    F1 = 2J / (1 + J) for the Jaccard index J = TP / (TP + FP + FN), a proportion of the cases that are true or
    predicted; the interval is Wilson's for J, carried through that rising function.
    """
    true, said = _pairs(truth, prediction)
    jaccard = wilson(int((true & said).sum()), int((true | said).sum()), level=level)
    if not jaccard.n:
        return _undefined("wilson-jaccard")
    value, low, high = (2.0 * j / (1.0 + j) for j in (jaccard.value, jaccard.low, jaccard.high))
    return _clamped(value, low, high, "wilson-jaccard", len(true))


def share_of_ties(values: Numbers, at: float = 0.5, *, level: float = 0.95) -> Interval:
    """Return the share of values equal to ``at`` (to nine decimals), with Wilson's interval."""
    array = _numbers(values)
    if not _sound(array):
        return _undefined("wilson")
    return wilson(int((np.abs(array - at) < 1e-9).sum()), len(array), level=level)


# -- rankings ---------------------------------------------------------------------------------------------------------


def auroc(truth: Truths, scores: Numbers, *, level: float = 0.95) -> Interval:
    """Return the chance that a true case scores above a false one, ties counting half; it needs both classes.

    The interval is DeLong's (1988) on the logit scale. Where DeLong's variance is 0 or undefined (perfect separation,
    constant scores, one case in a class) it is Wilson's for as many trials as the smaller class has cases.
    """
    true, ranked = _scored(truth, scores)
    positive, negative = ranked[true], ranked[~true]
    m, n = len(positive), len(negative)
    if not (m and n and _sound(ranked)):
        return _undefined("logit-delong")
    together = _midranks(np.concatenate([positive, negative]))
    wins = together[:m] - _midranks(positive)  # of each true case, over all false ones; exact halves
    above = wins / n
    below = 1.0 - (together[m:] - _midranks(negative)) / m
    value = float(wins.sum() / (m * n))
    variance = float(above.var(ddof=1) / m + below.var(ddof=1) / n) if min(m, n) > 1 else 0.0
    if variance <= 1e-15 or not 0.0 < value < 1.0:
        fallback = wilson(value * min(m, n), min(m, n), level=level)
        return _clamped(value, fallback.low, fallback.high, "wilson-smaller-class", m + n)
    low, high = _on_logit(value, math.sqrt(variance) / (value * (1.0 - value)), level)
    return _clamped(value, low, high, "logit-delong", m + n)


def average_precision(truth: Truths, scores: Numbers, *, level: float = 0.95) -> Interval:
    """Return the area under the precision-recall curve as a step sum, equal scores taken as one block.

    The interval is that of Boyd, Eng and Page (2013) on the logit scale, with one trial per true case; Wilson's where
    the value is 1. Undefined without a true case.
    """
    true, ranked = _scored(truth, scores)
    positives = int(true.sum())
    if not (positives and _sound(ranked)):
        return _undefined("logit")
    order = np.argsort(-ranked, kind="stable")
    hits, values = np.cumsum(true[order]), ranked[order]
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    hits = hits[ends]
    gained = np.diff(hits, prepend=0)
    value = min(float((gained * hits / (ends + 1)).sum() / positives), 1.0)
    if value > 1.0 - 1e-12:
        return _clamped(value, wilson(positives, positives, level=level).low, 1.0, "wilson", len(true))
    low, high = _on_logit(value, 1.0 / math.sqrt(positives * value * (1.0 - value)), level)
    return _clamped(value, low, high, "logit", len(true))


def pearson(x: Numbers, y: Numbers, *, level: float = 0.95) -> Interval:
    """Return Pearson's correlation with Fisher's z interval; undefined when either side is constant.

    With fewer than four pairs the interval is the whole range −1…1. Raises InputError when the lengths differ.
    """
    left, right = _numbers(x), _numbers(y)
    if left.shape != right.shape:
        raise InputError(f"a correlation needs pairs, got {len(left)} and {len(right)} values")
    if not (_finite(left) and _finite(right) and np.ptp(left) and np.ptp(right)):
        return _undefined("fisher-z")
    left, right = left - left.mean(), right - right.mean()
    spread = math.sqrt(float(left @ left)) * math.sqrt(float(right @ right))
    n, value = len(left), min(max(float(left @ right) / spread, -1.0), 1.0)
    if n < 4:
        return Interval(value=value, low=-1.0, high=1.0, method="fisher-z", n=n)
    if abs(value) == 1.0:
        return Interval(value=value, low=value, high=value, method="fisher-z", n=n)
    centre, half = math.atanh(value), _z(level) / math.sqrt(n - 3)
    return _clamped(value, math.tanh(centre - half), math.tanh(centre + half), "fisher-z", n)


# -- over latents -----------------------------------------------------------------------------------------------------


def median_interval(values: Numbers, *, level: float = 0.95) -> Interval:
    """Return the median with its distribution-free interval between two order statistics.

    The bounds are the k-th smallest and k-th largest values for the greatest k with P(Binomial(n, ½) < k) ≤
    (1 − level) / 2. Fewer than six values bound no median at 95 %.
    """
    from scipy import special

    array = np.sort(_numbers(values))
    if not _sound(array):
        return _undefined("order-statistics")
    n, value = len(array), float(np.median(array))
    below = special.bdtr(np.arange(n // 2 + 1, dtype=float), n, 0.5)  # P(at most 0, 1, … of n)
    k = int(np.searchsorted(below, (1.0 - level) / 2.0, side="right"))
    low, high = (float(array[k - 1]), float(array[n - k])) if k else (-math.inf, math.inf)
    return _clamped(value, low, high, "order-statistics", n, whole=True)


def mean_interval(values: Numbers, *, level: float = 0.95) -> Interval:
    """Return the mean with Student's t interval; of one value the interval is infinite."""
    from scipy import special

    array = _numbers(values)
    if not _finite(array):
        return _undefined("t")
    n, value = len(array), float(array.mean())
    if n == 1:
        return Interval(value=value, low=-math.inf, high=math.inf, method="t", n=1)
    half = float(special.stdtrit(n - 1, 0.5 + level / 2.0)) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(value=value, low=value - half, high=value + half, method="t", n=n)


def paired_lift(scores: Numbers, nulls: Numbers, *, level: float = 0.95) -> Lift:
    """Return the median and mean of score − null over pairs. Raises InputError when the lengths differ."""
    over, under = _numbers(scores), _numbers(nulls)
    if over.shape != under.shape:
        raise InputError(f"every score has one null, got {len(over)} scores and {len(under)} nulls")
    lifts = over - under
    return Lift(median=median_interval(lifts, level=level), mean=mean_interval(lifts, level=level))


def difference_of_medians(
    a: Numbers, b: Numbers, *, seed: int = 0, level: float = 0.95, draws: int = _DRAWS
) -> Interval:
    """Return median(a) − median(b) of independent groups with a seeded percentile bootstrap interval."""
    left, right = _numbers(a), _numbers(b)
    if not (_finite(left) and _finite(right)):
        return _undefined("bootstrap")
    rng = np.random.default_rng(seed)
    value = float(np.median(left) - np.median(right))
    drawn = _resampled(left, np.median, draws, rng) - _resampled(right, np.median, draws, rng)
    tail = (1.0 - level) / 2.0
    low, high = (float(q) for q in np.quantile(drawn, [tail, 1.0 - tail]))
    return _clamped(value, low, high, "bootstrap", len(left) + len(right), whole=True)


def _resampled(values: Array, statistic: Callable[..., Array], draws: int, rng: np.random.Generator) -> Array:
    """Return the statistic of ``draws`` resamples, in pieces that bound memory."""
    step = max(_AT_ONCE // len(values), 1)
    pieces = [
        statistic(values[rng.integers(len(values), size=(min(step, draws - at), len(values)))], axis=1)
        for at in range(0, draws, step)
    ]
    return np.concatenate(pieces)


# -- shared -----------------------------------------------------------------------------------------------------------


def _undefined(method: str) -> Interval:
    return Interval(value=math.nan, low=math.nan, high=math.nan, method=method, n=0)


def _clamped(value: float, low: float, high: float, method: str, n: int, *, whole: bool = False) -> Interval:
    """Return an interval that holds its value in spite of rounding, and lies in 0…1 or −1…1 unless ``whole``."""
    if not whole:
        low, high = max(low, -1.0 if method == "fisher-z" else 0.0), min(high, 1.0)
    return Interval(value=value, low=min(low, value), high=max(high, value), method=method, n=n)


def _z(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2.0)


def _on_logit(value: float, error: float, level: float) -> tuple[float, float]:
    """Return the bounds of value whose logit has this standard error."""
    centre, half = math.log(value / (1.0 - value)), _z(level) * error
    return _expit(centre - half), _expit(centre + half)


def _expit(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(x / 2.0))


def _numbers(values: Numbers) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"values are one flat array, got shape {array.shape}")
    return array


def _truths(values: Truths) -> Array:
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"truths and predictions are flat arrays, got shape {array.shape}")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError("truths and predictions are true or false; leave out what has failed and count it")
    return array.astype(bool)


def _pairs(truth: Truths, prediction: Truths) -> tuple[Array, Array]:
    true, said = _truths(truth), _truths(prediction)
    if len(true) != len(said):
        raise InputError(f"every prediction has one truth, got {len(said)} and {len(true)}")
    return true, said


def _scored(truth: Truths, scores: Numbers) -> tuple[Array, Array]:
    true, ranked = _truths(truth), _numbers(scores)
    if len(true) != len(ranked):
        raise InputError(f"every score has one truth, got {len(ranked)} and {len(true)}")
    return true, ranked


def _sound(values: Array) -> bool:
    """Return whether there are values and all are numbers."""
    return len(values) > 0 and not bool(np.isnan(values).any())


def _finite(values: Array) -> bool:
    """Return whether there are values and all are finite: what sums are made of."""
    return len(values) > 0 and bool(np.isfinite(values).all())


def _midranks(values: Array) -> Array:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2.0)[which]
    return ranks
