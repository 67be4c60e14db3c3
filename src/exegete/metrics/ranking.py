"""How well scores rank true cases above false ones, with intervals."""

from __future__ import annotations

import math

import numpy as np

from exegete.metrics.inputs import Numbers, Truths, clamped, midranks, on_logit, scored, sound, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.proportions import wilson
from exegete.types import Array


def auroc(truth: Truths, scores: Numbers, *, level: float = 0.95) -> Interval:
    """Return the chance that a true case scores above a false one, ties counting half; it needs both classes.

    The interval is DeLong's (1988) on the logit scale. Where DeLong's variance is 0 or undefined (perfect separation,
    constant scores, one case in a class) it is Wilson's for as many trials as the smaller class has cases.
    """
    true, ranked = scored(truth, scores)
    m = int(true.sum())
    n = len(true) - m
    if not (m and n and sound(ranked)):
        return undefined("logit-delong")
    above, below = placements(true, ranked)
    value = float(np.rint(2.0 * n * above).sum() / (2 * m * n))  # of exact halves, so that chance is exactly ½
    variance = float(above.var(ddof=1) / m + below.var(ddof=1) / n) if min(m, n) > 1 else 0.0
    if variance <= 1e-15 or not 0.0 < value < 1.0:
        fallback = wilson(value * min(m, n), min(m, n), level=level)
        return clamped(value, fallback.low, fallback.high, "wilson-smaller-class", m + n)
    low, high = on_logit(value, math.sqrt(variance) / (value * (1.0 - value)), level)
    return clamped(value, low, high, "logit-delong", m + n)


def placements(true: Array, ranked: Array) -> tuple[Array, Array]:
    """Return for each true case the share of false ones below it, and for each false one that of true ones above it.

    Ties count half; the mean of either is the AUROC, and they are the components of DeLong's variance.
    """
    positive, negative = ranked[true], ranked[~true]
    m, n = len(positive), len(negative)
    together = midranks(np.concatenate([positive, negative]))
    wins = together[:m] - midranks(positive)  # of each true case, over all false ones; exact halves
    return wins / n, 1.0 - (together[m:] - midranks(negative)) / m


def average_precision(truth: Truths, scores: Numbers, *, level: float = 0.95) -> Interval:
    """Return the area under the precision-recall curve as a step sum, equal scores taken as one block.

    The interval is that of Boyd, Eng and Page (2013) on the logit scale, with one trial per true case; Wilson's where
    the value is 1. Undefined without a true case.
    """
    true, ranked = scored(truth, scores)
    positives = int(true.sum())
    if not (positives and sound(ranked)):
        return undefined("logit")
    order = np.argsort(-ranked, kind="stable")
    hits, values = np.cumsum(true[order]), ranked[order]
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    hits = hits[ends]
    gained = np.diff(hits, prepend=0)
    value = min(float((gained * hits / (ends + 1)).sum() / positives), 1.0)
    if value > 1.0 - 1e-12:
        return clamped(value, wilson(positives, positives, level=level).low, 1.0, "wilson", len(true))
    low, high = on_logit(value, 1.0 / math.sqrt(positives * value * (1.0 - value)), level)
    return clamped(value, low, high, "logit", len(true))
