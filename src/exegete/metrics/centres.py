"""The middle of values, one of each latent, with intervals; and of their differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.errors import InputError
from exegete.metrics.inputs import Numbers, clamped, finite, numbers, sound, undefined
from exegete.metrics.interval import Interval
from exegete.types import Array

_DRAWS: Final = 2000
_AT_ONCE: Final = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lift:
    """What scores have over their nulls, pair by pair: the median and the mean of the differences."""

    median: Interval
    mean: Interval


def median_interval(values: Numbers, *, level: float = 0.95) -> Interval:
    """Return the median with its distribution-free interval between two order statistics.

    The bounds are the k-th smallest and k-th largest values for the greatest k with P(Binomial(n, ½) < k) ≤
    (1 − level) / 2. Fewer than six values bound no median at 95 %.
    """
    from scipy import special

    array = np.sort(numbers(values))
    if not sound(array):
        return undefined("order-statistics")
    n, value = len(array), float(np.median(array))
    below = special.bdtr(np.arange(n // 2 + 1, dtype=float), n, 0.5)  # P(at most 0, 1, … of n)
    k = int(np.searchsorted(below, (1.0 - level) / 2.0, side="right"))
    low, high = (float(array[k - 1]), float(array[n - k])) if k else (-math.inf, math.inf)
    return clamped(value, low, high, "order-statistics", n, lowest=-math.inf, highest=math.inf)


def mean_interval(values: Numbers, *, level: float = 0.95) -> Interval:
    """Return the mean with Student's t interval; of one value the interval is infinite."""
    from scipy import special

    array = numbers(values)
    if not finite(array):
        return undefined("t")
    n, value = len(array), float(array.mean())
    if n == 1:
        return Interval(value=value, low=-math.inf, high=math.inf, method="t", n=1)
    half = float(special.stdtrit(n - 1, 0.5 + level / 2.0)) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(value=value, low=value - half, high=value + half, method="t", n=n)


def paired_lift(scores: Numbers, nulls: Numbers, *, level: float = 0.95) -> Lift:
    """Return the median and mean of score − null over pairs. Raises InputError when the lengths differ."""
    over, under = numbers(scores), numbers(nulls)
    if over.shape != under.shape:
        raise InputError(f"every score has one null, got {len(over)} scores and {len(under)} nulls")
    lifts = over - under
    return Lift(median=median_interval(lifts, level=level), mean=mean_interval(lifts, level=level))


def difference_of_medians(
    a: Numbers, b: Numbers, *, seed: int = 0, level: float = 0.95, draws: int = _DRAWS
) -> Interval:
    """Return median(a) − median(b) of independent groups with a seeded percentile bootstrap interval."""
    left, right = numbers(a), numbers(b)
    if not (finite(left) and finite(right)):
        return undefined("bootstrap")
    rng = np.random.default_rng(seed)
    value = float(np.median(left) - np.median(right))
    drawn = _resampled(left, np.median, draws, rng) - _resampled(right, np.median, draws, rng)
    tail = (1.0 - level) / 2.0
    low, high = (float(q) for q in np.quantile(drawn, [tail, 1.0 - tail]))
    return clamped(value, low, high, "bootstrap", len(left) + len(right), lowest=-math.inf, highest=math.inf)


def _resampled(values: Array, statistic: Callable[..., Array], draws: int, rng: np.random.Generator) -> Array:
    """Return the statistic of ``draws`` resamples, in pieces that bound memory."""
    step = max(_AT_ONCE // len(values), 1)
    pieces = [
        statistic(values[rng.integers(len(values), size=(min(step, draws - at), len(values)))], axis=1)
        for at in range(0, draws, step)
    ]
    return np.concatenate(pieces)
