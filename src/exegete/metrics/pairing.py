"""What one explanation has over others, on the same windows of one latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.errors import InputError, unknown
from exegete.metrics import failures
from exegete.metrics.clustered import FIRING, SILENT, Documents, t_of
from exegete.metrics.inputs import clamped, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, Observed
from exegete.metrics.placing import components
from exegete.types import Array

_METHOD: Final = "cr2-t"


def paired(own: Observed, others: Sequence[Observed], metric: str, *, level: float = 0.95) -> Interval:
    """Return a metric of ``own`` minus the mean of ``others``, all judged on the same windows in the same order.

    ``metric`` is balanced_accuracy, sensitivity, specificity, f1 or auroc. Against each other explanation only windows
    count that both have answered; one without such windows in a class that is needed is left out. The interval is of
    the difference itself: it is to first order a sum of class means of what windows contribute, whose variance is CR2's
    by document, with Student's quantile and Satterthwaite's degrees of freedom. In each class and against each other
    half a window is added that speaks for ``own`` and half a one that speaks against it (Agresti and Min 2005), so that
    equal answers are no proof of equality. Where one document holds all windows of a class, it is the whole range;
    fewer than 20 with windows of a class that counts are flagged ``few_documents``.

    ``floor`` and ``ceiling`` hold the interval with own failures wrong and the others' right, and the reverse. Raises
    InputError when the windows differ, NotFoundError for another metric.
    """
    if metric not in _PARTS:
        raise unknown("paired metric", metric, tuple(_PARTS))
    for other in others:
        same = len(other) == len(own) and np.array_equal(other.truth, own.truth)
        if not (same and np.array_equal(other.document, own.document)):
            raise InputError(f"a paired {metric} needs the same windows in the same order for all explanations")
    found = _difference(own, others, metric, level)
    if not any(_failed(judged, metric).any() for judged in (own, *others)):
        return found
    low, high = (
        _difference(
            _filled(own, metric, right=right), [_filled(o, metric, right=not right) for o in others], metric, level
        )
        for right in (False, True)
    )
    return replace(found, floor=low.low, ceiling=high.high)


def _failed(judged: Observed, metric: str) -> Array:
    return np.isnan(judged.score) if metric == "auroc" else judged.prediction == FAILED


def _filled(judged: Observed, metric: str, *, right: bool) -> Observed:
    fill = failures.all_scored if metric == "auroc" else failures.all_answered
    return fill(judged, right=right)


def _difference(own: Observed, others: Sequence[Observed], metric: str, level: float) -> Interval:
    differences, weights = [], []
    influence = np.zeros(len(own))
    kept = np.zeros(len(own), bool)
    for other in others:
        both = ~(_failed(own, metric) | _failed(other, metric))
        ours, theirs = (_PARTS[metric](judged.take(both)) for judged in (own, other))
        if ours is None or theirs is None:
            continue
        influence[both] += _centred(ours.values - theirs.values, own.truth[both])
        kept |= both
        differences.append(ours.estimate - theirs.estimate)
        weights.append(np.maximum(ours.weights, theirs.weights))
    if not differences:
        return undefined(_METHOD)
    documents = Documents.of(own.truth[kept], own.document[kept], own.stratum[kept])
    mean = influence[kept] / len(differences) * documents.totals[documents.klass]
    added = np.mean(weights, axis=0) / math.sqrt(len(differences))
    return _interval(float(np.mean(differences)), documents, mean, added, level)


def _centred(values: Array, truth: Array) -> Array:
    """Return by how much each window moves the sum of the class means of values [n]."""
    klass = truth.astype(np.int64)
    sums, totals = np.bincount(klass, weights=values, minlength=2), np.maximum(np.bincount(klass, minlength=2), 1)
    moved: Array = (values - (sums / totals)[klass]) / totals[klass]
    return moved


def _interval(value: float, documents: Documents, values: Array, weights: Array, level: float) -> Interval:
    """Return the interval of a sum of class means of values [n], whose classes count where weights [2] are not 0."""
    shares = documents.shares(values).sum(axis=1)
    added = np.divide(weights, documents.totals, out=np.zeros(2), where=weights > 0)
    fewest = int(documents.held[weights > 0].min())
    quantile = t_of(level, documents.freedom(weights)) if fewest > 1 else math.inf
    half = quantile * math.sqrt(float(shares @ shares + added @ added))
    counted = documents.of_class @ (weights > 0)
    n, held = int(documents.sizes.sum(axis=0) @ counted), int(np.count_nonzero(documents.sizes @ counted))
    return failures.marked(clamped(value, value - half, value + half, _METHOD, n, lowest=-1.0), held, fewest)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """An estimate as a sum of class means: of ``values`` [n] (up to a constant of each class).

    ``weights`` [2] say by how much a value can change with the answer to one window, 0 for a class that does not count.
    """

    estimate: float
    values: Array
    weights: Array


def _linear(judged: Observed, silent: float, firing: float) -> _Parts | None:
    """Return the sum of the two rates of right answers with these weights."""
    weights = np.zeros(2)
    weights[SILENT], weights[FIRING] = silent, firing
    right = (judged.truth == (judged.prediction == 1)).astype(np.float64)
    values = right * weights[judged.truth.astype(np.int64)]
    counts = np.bincount(judged.truth.astype(np.int64), minlength=2)
    if not counts[weights > 0].all():
        return None
    sums = np.bincount(judged.truth.astype(np.int64), weights=values, minlength=2)
    return _Parts(estimate=float((sums / np.maximum(counts, 1)).sum()), values=values, weights=weights)


def _f1(judged: Observed) -> _Parts | None:
    """Return F1 = 2s / (1 + s + rf), with its slopes in sensitivity s and in the share f of false alarms."""
    said = judged.prediction == 1
    firing = int(judged.truth.sum())
    silent = len(said) - firing
    if not firing or not silent:
        return None
    s, f, r = said[judged.truth].mean(), said[~judged.truth].mean(), silent / firing
    below = 1.0 + s + r * f
    slopes = np.zeros(2)
    slopes[SILENT], slopes[FIRING] = -2.0 * s * r / below**2, 2.0 * (1.0 + r * f) / below**2
    values = said * slopes[judged.truth.astype(np.int64)]
    return _Parts(estimate=float(2.0 * s / below), values=values, weights=np.abs(slopes))


def _auroc(judged: Observed) -> _Parts | None:
    if judged.truth.all() or not judged.truth.any():
        return None
    values = components(judged.truth, judged.score)
    return _Parts(estimate=float(values[judged.truth].mean()), values=values, weights=np.full(2, 0.5))


_PARTS: Final[dict[str, Callable[[Observed], _Parts | None]]] = {
    "balanced_accuracy": lambda judged: _linear(judged, 0.5, 0.5),
    "sensitivity": lambda judged: _linear(judged, 0.0, 1.0),
    "specificity": lambda judged: _linear(judged, 1.0, 0.0),
    "f1": _f1,
    "auroc": _auroc,
}
