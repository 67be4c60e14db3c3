"""Correlations with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from exegete.errors import InputError
from exegete.metrics import failures
from exegete.metrics.clustered import t_of
from exegete.metrics.inputs import Numbers, clamped, finite, numbers, undefined, z_of
from exegete.metrics.interval import Interval
from exegete.metrics.observed import Observed

_JACKKNIFE: Final = "jackknife-fisher-z"


def pearson(x: Numbers, y: Numbers, *, level: float = 0.95) -> Interval:
    """Return Pearson's correlation with Fisher's z interval; undefined when either side is constant.

    With fewer than four pairs the interval is the whole range −1…1. Raises InputError when the lengths differ.
    """
    left, right = numbers(x), numbers(y)
    if left.shape != right.shape:
        raise InputError(f"a correlation needs pairs, got {len(left)} and {len(right)} values")
    if not (finite(left) and finite(right) and np.ptp(left) and np.ptp(right)):
        return undefined("fisher-z")
    left, right = left - left.mean(), right - right.mean()
    spread = math.sqrt(float(left @ left)) * math.sqrt(float(right @ right))
    n, value = len(left), min(max(float(left @ right) / spread, -1.0), 1.0)
    if n < 4:
        return Interval(value=value, low=-1.0, high=1.0, method="fisher-z", n=n)
    if abs(value) == 1.0:
        return Interval(value=value, low=value, high=value, method="fisher-z", n=n)
    centre, half = math.atanh(value), z_of(level) / math.sqrt(n - 3)
    return clamped(value, math.tanh(centre - half), math.tanh(centre + half), "fisher-z", n, lowest=-1.0)


def correlation(observed: Observed, *, level: float = 0.95) -> Interval:
    """Return Pearson's correlation of ``score`` with the activation, clustered by document.

    Judgements without a score are left out. The interval is a jackknife over documents on Fisher's scale, with
    Student's quantile: no normal distribution is assumed, and activations have none. Undefined where either side is
    constant; of one document, or where leaving out one leaves either side constant, it is the whole range −1…1.
    ``floor`` and ``ceiling`` are the bounds with missing scores as ``widened`` fills them in. Fewer than 20 documents
    with judgements where the latent fires, or with others, are flagged ``few_documents``.
    """

    def of(these: Observed) -> Interval:
        return _clustered(these, level)

    return widened(of(failures.scored(observed)), observed, of)


def widened(found: Interval, observed: Observed, find: Callable[[Observed], Interval]) -> Interval:
    """Return a correlation with the bounds that it has with missing scores against their activations, and with them.

    Missing scores are filled in twice each way, and the wider bounds count: with the lowest or highest of the scores
    given, whichever speaks against an activation above the mean (or for it); and on the line of correlation −1 (or 1)
    through the means of what is known, cut to the range of the scores given.
    """
    missing = np.isnan(observed.score)
    if not missing.any() or missing.all() or not found.n:
        return found
    known, strength = observed.score[~missing], observed.activation[~missing]
    off = (observed.activation - strength.mean()) / strength.std()
    lows: list[Interval] = []
    highs: list[Interval] = []
    for sign, bounds in ((-1.0, lows), (1.0, highs)):
        steps = np.where(sign * off > 0.0, known.max(), known.min())
        line = np.clip(known.mean() + sign * known.std() * off, known.min(), known.max())
        bounds += [find(replace(observed, score=np.where(missing, fill, observed.score))) for fill in (steps, line)]
    return replace(found, floor=min(i.low for i in lows), ceiling=max(i.high for i in highs))


def _clustered(known: Observed, level: float) -> Interval:
    x, y = known.score, known.activation
    whole = pearson(x, y, level=level)
    if not whole.n:
        return undefined(_JACKKNIFE)
    _, place = np.unique(known.document, return_inverse=True)
    n = int(place.max()) + 1
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()  # centred, so that the sums lose no digits
    sums = np.stack([np.bincount(place, weights=w, minlength=n) for w in (np.ones_like(x), x, y, x * x, y * y, x * y)])
    count, sx, sy, sxx, syy, sxy = sums.sum(axis=1, keepdims=True) - sums
    with np.errstate(divide="ignore", invalid="ignore"):
        left = (sxy - sx * sy / count) / np.sqrt((sxx - sx * sx / count) * (syy - sy * sy / count))
    low, high = -1.0, 1.0
    if n > 1 and np.isfinite(left).all() and np.abs(left).max() < 1.0 and abs(whole.value) < 1.0:
        kept = np.arctanh(left)
        error = math.sqrt((n - 1) / n * float(((kept - kept.mean()) ** 2).sum()))
        centre, half = math.atanh(whole.value), t_of(level, n - 1) * error
        low, high = math.tanh(centre - half), math.tanh(centre + half)
    found = clamped(whole.value, low, high, _JACKKNIFE, len(x), lowest=-1.0)
    return failures.rests_on(found, known.truth, known.document)
