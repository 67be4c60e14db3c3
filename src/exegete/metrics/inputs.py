"""What goes into metrics, checked, and the few steps that their intervals share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from exegete.errors import InputError
from exegete.metrics.interval import Interval
from exegete.types import Array

Truths = Sequence[bool] | npt.NDArray[np.bool_]
Numbers = Sequence[float] | npt.NDArray[np.floating]


def undefined(method: str, *, n: int = 0, flags: tuple[str, ...] = ()) -> Interval:
    """Return the interval of what the data leave undefined: no number at all, of ``n`` that are too few for one."""
    return Interval(value=math.nan, low=math.nan, high=math.nan, method=method, n=n, flags=flags)


def clamped(
    value: float, low: float, high: float, method: str, n: int, *, lowest: float = 0.0, highest: float = 1.0
) -> Interval:
    """Return an interval that holds its value in spite of rounding, and lies in its range."""
    low, high = max(low, lowest), min(high, highest)
    return Interval(value=value, low=min(low, value), high=max(high, value), method=method, n=n)


def z_of(level: float) -> float:
    """Return the normal quantile of a two-sided level. Raises InputError unless 0 < level < 1."""
    if not 0.0 < level < 1.0:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2.0)


def on_logit(value: float, error: float, level: float) -> tuple[float, float]:
    """Return the bounds of value whose logit has this standard error."""
    centre, half = math.log(value / (1.0 - value)), z_of(level) * error
    return expit(centre - half), expit(centre + half)


def expit(x: float) -> float:
    """Return 1 / (1 + exp(−x)), for any x."""
    return 0.5 * (1.0 + math.tanh(x / 2.0))


def numbers(values: Numbers) -> Array:
    """Return values as float64 [n]. Raises InputError for another shape."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"values are one flat array, got shape {array.shape}")
    return array


def truths(values: Truths) -> Array:
    """Return truths or predictions as bool [n]. Raises InputError for anything but true and false."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"truths and predictions are flat arrays, got shape {array.shape}")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError("truths and predictions are true or false; leave out what has failed and count it")
    return array.astype(bool)


def pairs(truth: Truths, prediction: Truths) -> tuple[Array, Array]:
    """Return truths and predictions as bool [n]. Raises InputError when their lengths differ."""
    true, said = truths(truth), truths(prediction)
    if len(true) != len(said):
        raise InputError(f"every prediction has one truth, got {len(said)} and {len(true)}")
    return true, said


def scored(truth: Truths, scores: Numbers) -> tuple[Array, Array]:
    """Return truths as bool [n] and scores as float64 [n]. Raises InputError when their lengths differ."""
    true, ranked = truths(truth), numbers(scores)
    if len(true) != len(ranked):
        raise InputError(f"every score has one truth, got {len(ranked)} and {len(true)}")
    return true, ranked


def sound(values: Array) -> bool:
    """Return whether there are values and all are numbers."""
    return len(values) > 0 and not bool(np.isnan(values).any())


def finite(values: Array) -> bool:
    """Return whether there are values and all are finite: what sums are made of."""
    return len(values) > 0 and bool(np.isfinite(values).all())


def midranks(values: Array) -> Array:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2.0)[which]
    return ranks
