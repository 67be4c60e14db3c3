"""What simulated activations amount to: correlations and explained deviation over tokens, clustered by document.

The formulas are those of Bills et al. (2023, "Language models can explain neurons in language models") and its code:
with x what was predicted at a token and y the activation there, over all tokens of all windows at once,

- ``pearson``: the correlation of x and y;
- ``rsquared``: 1 − Σ(y − x)² / Σy², which takes the activation 0, not the mean, for knowing nothing;
- ``absolute_dev_explained``: 1 − Σ|y − x| / Σ|y|.

Where the prediction is the same at every token the reference divides by zero; here its correlation is 0, since such an
explanation tells nothing, and leaving it out would flatter nulls that predict silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exegete import metrics
from exegete.metrics import Interval, Observed
from exegete.metrics.correlations import widened
from exegete.metrics.failures import rests_on
from exegete.metrics.inputs import clamped, undefined
from exegete.types import Array

CONSTANT: Final = "constant prediction"
_JACKKNIFE: Final = "jackknife-t"
_FISHER: Final = "jackknife-fisher-z"


def correlation(observed: Observed) -> Interval:
    """Return Pearson's correlation of the predictions with the activations, by ``metrics.correlation``.

    A prediction that never changes correlates 0, with Fisher's interval for one pair per document.
    """
    known = _known(observed)
    if len(known) and not np.ptp(known.score) and np.ptp(known.activation):
        return _nothing(known)
    return metrics.correlation(observed)


def population_correlation(observed: Observed) -> Interval:
    """Return the correlation over all tokens of the test frame: each token counts with its window's weight.

    The interval is a jackknife over documents on Fisher's scale with Student's quantile. ``floor`` and ``ceiling`` are
    those of ``metrics.correlation``.
    """
    return widened(_population(_known(observed)), observed, _population)


def _population(known: Observed) -> Interval:
    if not len(known) or not np.ptp(known.activation):
        return undefined(_FISHER)
    if not np.ptp(known.score):
        return _nothing(known)
    sums = _sums(known.score, known.activation, known.weight, known.document)
    whole, left = _of_sums(sums.sum(axis=1)), _of_sums(sums.sum(axis=1, keepdims=True) - sums)
    if len(left) < 2 or not np.isfinite(left).all() or max(abs(whole), np.abs(left).max()) >= 1.0:
        bounds = -1.0, 1.0
    else:
        half = _half(np.arctanh(left))
        bounds = math.tanh(math.atanh(float(whole)) - half), math.tanh(math.atanh(float(whole)) + half)
    found = _interval(float(whole), *bounds, known, limits=(-1.0, 1.0))
    return replace(found, method=_FISHER)


def correlation_lift(own: Observed, others: Sequence[Observed]) -> Interval:
    """Return the correlation of ``own`` minus the mean of the others', on the tokens that all predict.

    All are of the same tokens in the same order; another that predicts no token is left out. The interval is a
    jackknife over documents of the difference itself, with Student's quantile; ``floor`` and ``ceiling`` set the
    failures of one side against those of the other.
    """
    others = [other for other in others if not np.isnan(other.score).all()]
    panel = (own, *others)
    both: Array = ~np.isnan(np.stack([observed.score for observed in panel])).any(axis=0)
    kept = [observed.take(both) for observed in panel]
    if not others or not both.any() or not np.ptp(kept[0].activation):
        return undefined(_JACKKNIFE)
    wholes, lefts = [], []
    for observed in kept:
        sums = _sums(observed.score, observed.activation, np.ones(len(observed)), observed.document)
        total = sums.sum(axis=1, keepdims=True)
        wholes.append(float(_of_sums(total)[0]))
        lefts.append(_of_sums(total - sums))
    value = wholes[0] - float(np.mean(wholes[1:]))
    left = lefts[0] - np.mean(lefts[1:], axis=0)
    half = _half(left) if len(left) > 1 else math.inf
    found = _interval(value, value - half, value + half, kept[0], limits=(-2.0, 2.0))
    if both.all():
        return found
    ours, theirs = correlation(own), [correlation(other) for other in others]
    floor = ours.floor - float(np.mean([i.ceiling for i in theirs]))
    ceiling = ours.ceiling - float(np.mean([i.floor for i in theirs]))
    return replace(found, floor=floor, ceiling=ceiling)


def explained(observed: Observed) -> dict[str, Interval]:
    """Return ``rsquared`` and ``absolute_dev_explained`` of predictions in the activation's own units.

    The intervals are jackknives over documents with Student's quantile. Undefined where no token fires. Missing
    predictions may be off by any amount: with them ``floor`` is −∞, and ``ceiling`` takes them for right.
    """
    found, missing = _both_explained(_known(observed)), np.isnan(observed.score)
    if not missing.any():
        return found
    best = _both_explained(replace(observed, score=np.where(missing, observed.activation, observed.score)))
    return {name: replace(one, floor=-math.inf, ceiling=best[name].high) for name, one in found.items()}


def _both_explained(known: Observed) -> dict[str, Interval]:
    error = known.activation - known.score
    shares = {
        "rsquared": (error * error, known.activation * known.activation),
        "absolute_dev_explained": (np.abs(error), np.abs(known.activation)),
    }
    return {name: _explained(wrong, whole, known) for name, (wrong, whole) in shares.items()}


def calibrate(predicted: Array, activation: Array) -> tuple[float, float]:
    """Return the intercept and slope of the least-squares line from predictions to activations.

    The slope is not negative: a prediction of the opposite is not to count as one. Of constant predictions the line is
    the mean. Raises ValueError without any token.
    """
    if not len(predicted):
        raise ValueError("a line needs at least one token")
    x = predicted - predicted.mean()
    spread = float(x @ x)
    slope = max(0.0, float(x @ activation) / spread) if spread > 0 else 0.0
    return float(activation.mean() - slope * predicted.mean()), slope


def _explained(wrong: Array, whole: Array, known: Observed) -> Interval:
    total = float(whole.sum())
    if not total > 0:
        return undefined(_JACKKNIFE)
    _, place = np.unique(known.document, return_inverse=True)
    n = int(place.max()) + 1
    sums = [np.bincount(place, weights=w, minlength=n) for w in (wrong, whole)]
    with np.errstate(divide="ignore", invalid="ignore"):
        left = 1.0 - (sums[0].sum() - sums[0]) / (sums[1].sum() - sums[1])
    value = 1.0 - float(wrong.sum()) / total
    half = _half(left) if n > 1 and np.isfinite(left).all() else math.inf
    return _interval(value, value - half, value + half, known, limits=(-math.inf, 1.0))


def _known(observed: Observed) -> Observed:
    return observed.take(~np.isnan(observed.score))


def _sums(x: Array, y: Array, weight: Array, document: Array) -> Array:
    """Return the weighted sums [6, documents] of 1, x, y, x², y² and xy, of centred x and y so that no digits go."""
    _, place = np.unique(document, return_inverse=True)
    x, y = x - x.mean(), y - y.mean()
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    return np.stack([np.bincount(place, weights=weight * term) for term in terms])


def _of_sums(sums: Array) -> Array:
    """Return the correlations that sums [6, …] amount to, 0 where either side is constant."""
    count, sx, sy, sxx, syy, sxy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(np.maximum(sxx - sx * sx / count, 0.0) * np.maximum(syy - sy * sy / count, 0.0))
        found = np.where(spread > 1e-12 * np.maximum(sxx * syy, 1e-300) ** 0.5, (sxy - sx * sy / count) / spread, 0.0)
    return np.clip(found, -1.0, 1.0)


def _half(left: Array) -> float:
    """Return the half-width of the jackknife's interval from the values without each document."""
    from scipy import special

    n = len(left)
    error = math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    return float(special.stdtrit(n - 1, 0.975)) * error


def _nothing(known: Observed) -> Interval:
    n = len(np.unique(known.document))
    half = math.tanh(1.959964 / math.sqrt(n - 3)) if n > 3 else 1.0
    return replace(_interval(0.0, -half, half, known, limits=(-1.0, 1.0)), method=CONSTANT)


def _interval(value: float, low: float, high: float, known: Observed, *, limits: tuple[float, float]) -> Interval:
    """Return an interval over tokens, marked with the documents of those where the latent fires, and of the others."""
    found = clamped(value, low, high, _JACKKNIFE, len(known), lowest=limits[0], highest=limits[1])
    return rests_on(found, known.truth, known.document)
