"""Metrics of a judge's numbers over the whole test frame: area under the precision-recall curve, Pearson's correlation.

Both are simulated from draws of what every judged window stands for (``reweighting.frames``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np

from exegete.metrics.inputs import clamped, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.observed import Observed
from exegete.metrics.reweighting import Options, Part, Parts, frames, half_width, quantile, rate_unseen, stretched
from exegete.types import Array

METHOD: Final = "post-stratified-dirichlet"


def auprc(observed: Observed, cut: Parts, options: Options) -> Interval:
    """Return the area under the precision-recall curve of ``score`` over the frame, as a step sum; ties are one block.

    Above the highest score of a silent stratum its rate is on the straight line from no window of either class to the
    firing ones that rank above that score and the rate that ``population`` takes for none of n. At the low side of the
    interval the unseen window of every stratum ranks first, at the high side last.
    """
    if not cut.whole:
        return undefined(METHOD)
    thresholds = np.unique(observed.score[cut.firing.places])[::-1]
    # The first threshold that lets a window in; the last place is for those below all, which no firing one is.
    block = np.searchsorted(-thresholds, -observed.score)
    value = _value(cut, block, len(thresholds), options.level)
    firing, silent = frames(cut, block.astype(np.float64), options)
    let_in = block <= np.arange(len(thresholds))[:, None]
    hits = firing.sums(let_in[:, firing.part.places])
    alarms = sum((one.sums(let_in[:, one.part.places]) for one in silent), np.zeros_like(hits))
    unseen = sum((one.unseen for one in silent), np.full(options.draws, cut.unknown, np.float32))
    low = quantile(_area(hits, alarms + unseen), options.low)
    high = quantile(_area(hits, alarms), options.high)
    low, high = stretched(cut, value, low, high, 0.0, options.level)
    found = clamped(value, low, high, METHOD, cut.answered)
    wide = half_width(found)
    if wide <= 1.0:
        return found
    # Widths fall with the root of n.
    needed = None if cut.unknown or math.isinf(wide) else math.ceil(cut.answered * wide * wide)
    return replace(found, flags=("not_identified",), n_needed=needed)


def pearson(observed: Observed, cut: Parts, values: Array, options: Options) -> Interval:
    """Return Pearson's correlation of values (one for each judgement) with the activation, over the frame.

    At the low side of the interval the unseen window of every stratum has the greatest of the values, at the high side
    the least. Undefined where the values or the activations are all equal.
    """
    places = np.concatenate([part.places for part in cut.all])
    known, activation = values[places], observed.activation[places]
    if not (cut.whole and np.isfinite(known).all() and np.ptp(known) > 0 and np.ptp(activation) > 0):
        return undefined(METHOD)
    # A correlation does not mind where 0 is or what 1 is; rounding does.
    x, y = (values - known.min()) / np.ptp(known), observed.activation / np.abs(activation).max()
    powers = np.stack([np.ones(len(x)), x, x * x, y, y * y, x * y])
    value = float(_correlation(sum((powers[:, part.places] @ part.weight for part in cut.all), np.zeros(6))))
    firing, silent = frames(cut, x, options)
    sums = firing.sums(powers[:, firing.part.places]).astype(np.float64)
    for one in silent:
        sums += one.sums(powers[:, one.part.places])
        sums[0] += one.unseen
    unseen = sum((one.unseen for one in silent), np.zeros(options.draws)) + cut.unknown
    sums[0] += cut.unknown
    high = quantile(_correlation(sums), options.high)
    sums[1:3] += unseen
    low = quantile(_correlation(sums), options.low)
    low, high = stretched(cut, value, low, high, -1.0, options.level)
    return clamped(value, low, high, METHOD, cut.answered, lowest=-1.0)


def _value(cut: Parts, block: Array, blocks: int, level: float) -> float:
    """Return the area as estimated, where ``block`` is the first of so many thresholds that lets a window in."""
    hits = _passing(cut.firing, block, blocks)
    alarms = np.zeros(blocks)
    for part in cut.silent:
        passing = _passing(part, block, blocks)
        never = rate_unseen(part, cut.quiet, part.effective(block, level)) * part.size
        above = hits[min(int(np.searchsorted(passing, 0.0, side="right")), blocks - 1)]
        alarms += np.where(passing > 0.0, passing, never * hits / above)
    return min(float(_area(hits, alarms * cut.quiet / (cut.quiet - cut.unknown))), 1.0)


def _passing(part: Part, block: Array, blocks: int) -> Array:
    """Return how many windows of a part are let in at each threshold [blocks]."""
    return np.bincount(block[part.places], weights=part.weight, minlength=blocks + 1)[:blocks].cumsum()


def _area(hits: Array, alarms: Array) -> Array:
    return np.asarray(stepped(hits, alarms) / hits[-1])


def stepped(hits: Array, others: Array) -> Array:
    """Return the sum over thresholds of what they newly let in of ``hits``, times these' share of all let in by then.

    Both are what each threshold lets in [thresholds, …], not 0 together.
    """
    share = hits / (hits + others)
    summed: Array = np.einsum("b...,b...->...", hits[:-1], share[:-1] - share[1:])  # by parts
    return np.asarray(summed + hits[-1] * share[-1])


def _correlation(sums: Array) -> Array:
    """Return the correlation from sums of weights times 1, x, x², y, y² and xy [6, …]; 0 where one does not vary."""
    x, xx, y, yy, xy = sums[1:] / sums[0]
    spread = np.sqrt(np.maximum(xx - x * x, 0.0) * np.maximum(yy - y * y, 0.0))
    correlation = np.divide(xy - x * y, spread, out=np.zeros_like(spread), where=spread > 0.0)
    return np.asarray(np.clip(correlation, -1.0, 1.0))
