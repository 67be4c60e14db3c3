"""AUROC with intervals clustered by base example, and resampling of base examples for what is made of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from exegete.metrics import Interval, Observed
from exegete.metrics.clustered import Documents
from exegete.metrics.inputs import undefined
from exegete.metrics.placing import components, of_placements, ranked
from exegete.streams import stream
from exegete.types import Array

DRAWS: Final = 1000
_AT_ONCE: Final = 1 << 22


def clustered_auroc(truth: Array, score: Array, place: Array, *, level: float = 0.95) -> Interval:
    """Return the AUROC of scores [n] with its interval, rows of one base example (``place`` [n]) taken as related.

    NaN where the rows are all true or all false.
    """
    n = len(truth)
    observed = Observed(
        truth=truth.astype(bool),
        prediction=np.full(n, -1, np.int8),
        score=score.astype(np.float64),
        stratum=np.zeros(n, np.int8),
        document=place.astype(np.int64),
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64),
        activation=np.zeros(n),
    )
    return ranked(observed, level=level)["auroc"]


def column_placements(truth: Array, scores: Array) -> Array:
    """Return each row's placement among those of the other class, in each column of scores [n, k]: as many numbers.

    That of a true row is the share of false rows below it, that of a false one the share of true rows above it, ties
    counting half; a column's AUROC is the mean of either.
    """
    order = np.argsort(scores, axis=0)
    true = truth[order]
    above = true.sum(axis=0) - np.cumsum(true, axis=0)
    below = np.cumsum(~true, axis=0)
    found: Array = np.empty(scores.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.put_along_axis(found, order, np.where(true, below / (~truth).sum(), above / truth.sum()), axis=0)
    in_order = np.take_along_axis(scores, order, axis=0)
    for column in np.flatnonzero((in_order[1:] == in_order[:-1]).any(axis=0)).tolist():
        if truth.any() and not truth.all():
            found[:, column] = components(truth, scores[:, column])
    return found


def clustered_mean_auroc(truth: Array, placed: Array, place: Array, *, level: float = 0.95) -> Interval:
    """Return the mean AUROC of several scores, given their ``column_placements`` [n, k], with its interval.

    The placements of a row are averaged over the scores: to first order the error of the mean AUROC is that of these,
    clustered by base example as in ``clustered_auroc``. How the scores differ from one another is no part of it.
    """
    documents = Documents.of(truth, place)
    if not documents.totals.all():
        return undefined("cr2-logit-delong")
    return of_placements(placed.mean(axis=1), documents, level=level)


def resampled(place: Array, draws: int, seed: int) -> Array:
    """Return how often each row counts [draws, n] when its base examples are drawn anew with replacement."""
    known, at = np.unique(place, return_inverse=True)
    draw = stream(seed, "bootstrap", len(known))
    counts = draw.multinomial(len(known), np.full(len(known), 1.0 / max(1, len(known))), size=draws)
    weights: Array = counts[:, at]
    return weights


def weighted_aurocs(truth: Array, score: Array, weights: Array) -> Array:
    """Return the AUROC of scores [n] under each row of weights [draws, n]; NaN where a class has none."""
    order = np.argsort(score, kind="stable")
    truth, score = truth[order], score[order]
    starts = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
    found = np.empty(len(weights))
    step = max(1, _AT_ONCE // max(1, len(truth)))
    for at in range(0, len(weights), step):
        part = weights[at : at + step][:, order].astype(np.float64)
        positive = np.add.reduceat(part * truth, starts, axis=1)
        negative = np.add.reduceat(part * ~truth, starts, axis=1)
        below = np.cumsum(negative, axis=1) - 0.5 * negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        wins = (positive * below).sum(axis=1)
        found[at : at + step] = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return found


def bootstrap(value: float, drawn: Array, n: int, n_bases: int, *, level: float = 0.95) -> Interval:
    """Return a value between the quantiles of what resampling gave, NaN where it is undefined itself.

    A draw that leaves it undefined could have given anything, so it counts at both ends: where more of them are than
    lie beyond a quantile, that end is infinite. Leaving them out would make a share of a gap that may well be none
    look sure.
    """
    low = high = np.nan
    if not np.isnan(value):
        known, ends = np.isfinite(drawn), (0.5 - level / 2, 0.5 + level / 2)
        if known.all():
            low, high = np.quantile(drawn, ends)
        else:
            low = np.quantile(np.where(known, drawn, -np.inf), ends[0], method="lower")
            high = np.quantile(np.where(known, drawn, np.inf), ends[1], method="higher")
        low, high = min(low, value), max(high, value)
    return Interval(value=value, low=float(low), high=float(high), method="bootstrap", n=n, n_documents=n_bases)


def resampled_statistic(
    statistic: Callable[[Array], Array], place: Array, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return a statistic of weighted rows with its interval; it maps weights [draws, n] to values [draws]."""
    value = float(statistic(np.ones((1, len(place))))[0])
    drawn = statistic(resampled(place, draws, seed))
    return bootstrap(value, drawn, len(place), len(np.unique(place)), level=level)
