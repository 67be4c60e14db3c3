"""Means of values that are known by document only as sums, with the intervals that the metrics give single values.

With one stratum the variance by CR2 and its degrees of freedom (Bell and McCaffrey 2002; ``metrics.clustered``) need
nothing but the sum and the number of values of each document, so that measuring a lens takes no memory per token.
"""

from __future__ import annotations

import math

import numpy as np

from exegete.metrics import Interval
from exegete.metrics.clustered import t_of
from exegete.types import Array


def clustered_mean(sums: Array, sizes: Array, *, level: float = 0.95, least: float = -math.inf) -> Interval:
    """Return the mean of all values, of which document g holds ``sizes[g]`` > 0 that sum to ``sums[g]``.

    NaN without values; an infinite interval where one document holds them all. ``least`` is the least that a value can
    be, below which no interval reaches.
    """
    total = float(sizes.sum())
    if not total:
        return Interval(value=math.nan, low=math.nan, high=math.nan, method="cr2-t", n=0)
    mean = float(sums.sum()) / total
    left = 1.0 - sizes / total
    scale = np.divide(1.0, np.sqrt(left), out=np.zeros(len(sizes)), where=left > 0) / total
    shares = (sums - sizes * mean) * scale
    quantile = t_of(level, _freedom(scale, sizes, total))
    half = quantile * math.sqrt(float(shares @ shares)) if math.isfinite(quantile) else math.inf
    low = min(mean, max(least, mean - half))
    return Interval(value=mean, low=low, high=mean + half, method="cr2-t", n=int(total), n_documents=len(sizes))


def _freedom(scale: Array, sizes: Array, total: float) -> float:
    """Return Satterthwaite's degrees of freedom of the variance, 0 where there are none."""
    own = scale * scale * sizes
    joint = scale * sizes / math.sqrt(total)
    lost = joint * joint
    trace = float((own - lost).sum())
    square = float(own @ own - 2.0 * (own @ lost) + lost.sum() ** 2)
    return trace * trace / square if square > 0 else 0.0
