"""Shares of cases, and what is made of two of them, with their intervals."""

from __future__ import annotations

import math

import numpy as np

from exegete.errors import InputError
from exegete.metrics.inputs import Numbers, Truths, clamped, numbers, pairs, sound, undefined, z_of
from exegete.metrics.interval import Interval


def wilson(k: float, n: float, *, level: float = 0.95) -> Interval:
    """Return k of n with Wilson's score interval (Wilson 1927). Raises InputError unless 0 ≤ k ≤ n."""
    if not 0 <= k <= n:
        raise InputError(f"a proportion is k of n with 0 ≤ k ≤ n, got {k} of {n}")
    if n == 0:
        return undefined("wilson")
    p = k / n
    low, high = score_bounds(p, n, z_of(level))
    return clamped(p, low, high, "wilson", round(n))


def score_bounds(p: float, n: float, quantile: float) -> tuple[float, float]:
    """Return the score interval of a share p of n independent cases: all shares whose own error makes p plausible."""
    square = quantile * quantile
    scale = 1.0 + square / n
    centre = (p + square / (2.0 * n)) / scale
    half = quantile / scale * math.sqrt(p * (1.0 - p) / n + square / (4.0 * n * n))
    return centre - half, centre + half


def sensitivity(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of true cases that are predicted (recall), with Wilson's interval."""
    true, said = pairs(truth, prediction)
    return wilson(int((true & said).sum()), int(true.sum()), level=level)


def specificity(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of false cases that are not predicted, with Wilson's interval."""
    true, said = pairs(truth, prediction)
    return wilson(int((~true & ~said).sum()), int((~true).sum()), level=level)


def precision(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the share of predicted cases that are true, with Wilson's interval."""
    true, said = pairs(truth, prediction)
    return wilson(int((true & said).sum()), int(said.sum()), level=level)


def balanced_accuracy(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return the mean of sensitivity and specificity; it needs both classes.

    The interval is Newcombe's hybrid (MOVER: Zou and Donner 2008): the distances from the two Wilson intervals' bounds
    are squared and added.
    """
    hit, rejected = sensitivity(truth, prediction, level=level), specificity(truth, prediction, level=level)
    if not (hit.n and rejected.n):
        return undefined("mover-wilson")
    value = (hit.value + rejected.value) / 2.0
    low = value - math.hypot(hit.value - hit.low, rejected.value - rejected.low) / 2.0
    high = value + math.hypot(hit.high - hit.value, rejected.high - rejected.value) / 2.0
    return clamped(value, low, high, "mover-wilson", hit.n + rejected.n)


def f1(truth: Truths, prediction: Truths, *, level: float = 0.95) -> Interval:
    """Return 2 TP / (2 TP + FP + FN), undefined when nothing is true or predicted.

    F1 = 2J / (1 + J) for the Jaccard index J = TP / (TP + FP + FN), a proportion of the cases that are true or
    predicted; the interval is Wilson's for J, carried through that rising function.
    """
    true, said = pairs(truth, prediction)
    jaccard = wilson(int((true & said).sum()), int((true | said).sum()), level=level)
    if not jaccard.n:
        return undefined("wilson-jaccard")
    value, low, high = (2.0 * j / (1.0 + j) for j in (jaccard.value, jaccard.low, jaccard.high))
    return clamped(value, low, high, "wilson-jaccard", len(true))


def share_of_ties(values: Numbers, at: float = 0.5, *, level: float = 0.95) -> Interval:
    """Return the share of values equal to ``at`` (to nine decimals), with Wilson's interval."""
    array = numbers(values)
    if not sound(array):
        return undefined("wilson")
    return wilson(int((np.abs(array - at) < 1e-9).sum()), len(array), level=level)
