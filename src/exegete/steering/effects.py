"""What a sweep says in numbers, with intervals over questions: means, effects, slopes, rank correlations. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from exegete.streams import stream

Floats = npt.NDArray[np.float64]
RESAMPLES: Final = 2000
LEVEL: Final = 0.95
WITHIN: Final = 1.5
"""Slopes and rank correlations are of multipliers up to here: beyond, what a model says tends to fall apart."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval: percentiles over resamples of the questions."""

    value: float
    low: float
    high: float


@final
class Bootstrap:
    """Resamples of n questions, the same for all numbers of one sweep."""

    def __init__(self, n: int, seed: int) -> None:
        draw = stream(seed, "steering", "bootstrap", n)
        self._weights = draw.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n

    def mean(self, values: Floats) -> Estimate:
        """Return the mean of values [questions]."""
        return _estimate(float(values.mean()), self._weights @ values)

    def effect(self, values: Floats, multipliers: Sequence[float]) -> Estimate:
        """Return the mean of values [multipliers, questions] at the largest multiplier minus that at the smallest."""
        high, low = int(np.argmax(multipliers)), int(np.argmin(multipliers))
        return self.mean(values[high] - values[low])

    def slope(self, values: Floats, multipliers: Sequence[float]) -> Estimate:
        """Return the least-squares slope of the mean over multipliers up to ``WITHIN``; NaN for fewer than two."""
        x, curves = self._near(values, multipliers)
        if len(x) < 2:
            return Estimate(value=np.nan, low=np.nan, high=np.nan)
        centred = (x - x.mean()) / np.square(x - x.mean()).sum()
        found = curves @ centred
        return _estimate(float(found[0]), found[1:])

    def spearman(self, values: Floats, multipliers: Sequence[float]) -> Estimate:
        """Return Spearman's correlation of multiplier and mean, up to ``WITHIN``; NaN for fewer than three."""
        x, curves = self._near(values, multipliers)
        if len(x) < 3:
            return Estimate(value=np.nan, low=np.nan, high=np.nan)
        found = _spearman(x, curves)
        return _estimate(float(found[0]), found[1:])

    def _near(self, values: Floats, multipliers: Sequence[float]) -> tuple[Floats, Floats]:
        """Return the multipliers that count, and curves [1 + resamples, multipliers]: of all questions first."""
        x = np.asarray(multipliers, np.float64)
        kept = np.abs(x) <= WITHIN + 1e-9
        near = values[kept]
        return x[kept], np.concatenate([near.mean(axis=1)[None], self._weights @ near.T])


def halves(n: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the questions of two halves, drawn by the seed: one to choose on, the other to report on."""
    order = stream(seed, "steering", "halves", n).permutation(n)
    return np.sort(order[: (n + 1) // 2]), np.sort(order[(n + 1) // 2 :])


def _estimate(value: float, drawn: Floats) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def _spearman(x: Floats, curves: Floats) -> Floats:
    """Return each curve's correlation of ranks with x, ties at their mean rank; 0 for a curve that does not vary."""
    a, b = _ranks(x[None]), _ranks(curves)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    size = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    return np.asarray((a * b).sum(axis=1) / np.where(size > 0, size, 1.0), np.float64)


def _ranks(curves: Floats) -> Floats:
    below = (curves[:, :, None] > curves[:, None, :]).sum(axis=2)
    level = (curves[:, :, None] == curves[:, None, :]).sum(axis=2)
    return np.asarray(below + (level + 1) / 2, np.float64)
