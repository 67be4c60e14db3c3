"""Whether P(yes) means what it says: Brier score and expected calibration error."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from exegete.errors import InputError
from exegete.metrics import failures
from exegete.metrics.clustered import t_of
from exegete.metrics.inputs import clamped, undefined, z_of
from exegete.metrics.interval import Interval
from exegete.metrics.observed import Observed
from exegete.types import Array

BINS: Final = 10


def calibration(
    observed: Observed, *, bins: int = BINS, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Return the Brier score and the expected calibration error of P(yes), over the windows as they were drawn.

    ``brier`` is the mean of (P(yes) − fires)² (Brier 1950), with Student's t interval clustered by document. ``ece`` is
    the mean over ``bins`` equally wide bins of |mean P(yes) − share that fires|, weighted by their windows (Naeini et
    al. 2015). Noise in the shares raises it above its target: by no more than the weighted mean of what each is off,
    whose 97.5 % quantile over ``draws`` from Jeffreys' posteriors lies between ``low`` and the value; and it can fall
    below its target only as a sum of signed gaps does, so that ``high`` is the normal's quantile of that sum above it.
    Windows without P(yes) are left out. Both are NaN without any. Fewer than 20 documents with firing windows, or with
    silent ones, are flagged ``few_documents``. Raises InputError for numbers that are no probabilities.
    """
    score, truth, document = _known(observed)
    n = len(score)
    if not n:
        return {"brier": undefined("cr-t"), "ece": undefined("triangle-beta")}
    found = {"brier": _brier(score, truth, document, level), "ece": _ece(score, truth, bins, draws, seed, level)}
    return {name: failures.rests_on(interval, truth, document) for name, interval in found.items()}


def _known(observed: Observed) -> tuple[Array, Array, Array]:
    """Return P(yes), truth and document of the windows that have one."""
    known = observed.take(~np.isnan(observed.score))
    if len(known) and not 0.0 <= known.score.min() <= known.score.max() <= 1.0:
        raise InputError(
            f"calibration is of probabilities, got {known.score.min():.3g}…{known.score.max():.3g}; "
            "leave it out for scores of another kind"
        )
    return known.score, known.truth, known.document


def _binned(score: Array, truth: Array, bins: int) -> tuple[Array, Array, Array]:
    """Return how many windows lie in each bin that holds any, their mean P(yes), and how many of them fire."""
    which = np.minimum((score * bins).astype(np.int64), bins - 1)
    counts = np.bincount(which, minlength=bins)
    place = np.flatnonzero(counts)
    means = np.bincount(which, weights=score, minlength=bins)[place] / counts[place]
    return counts[place], means, np.bincount(which[truth], minlength=bins)[place]


def _brier(score: Array, truth: Array, document: Array, level: float) -> Interval:
    n, errors = len(score), (score - truth) ** 2
    value = float(errors.mean())
    _, which = np.unique(document, return_inverse=True)
    sums = np.bincount(which, weights=errors - value)
    degrees = len(sums) - 1
    if not degrees:
        return clamped(value, 0.0, 1.0, "cr-t", n)
    half = t_of(level, degrees) * math.sqrt(float(sums @ sums) * (degrees + 1) / degrees) / n
    return clamped(value, value - half, value + half, "cr-t", n)


def _ece(score: Array, truth: Array, bins: int, draws: int, seed: int, level: float) -> Interval:
    counts, means, firing = _binned(score, truth, bins)
    share = counts / len(score)
    value = float(share @ np.abs(means - firing / counts))
    hits, misses = firing + 0.5, counts - firing + 0.5
    centre = hits / (hits + misses)
    variance = centre * (1.0 - centre) / (hits + misses + 1.0)
    drawn = np.random.default_rng(seed).beta(hits[:, None], misses[:, None], size=(len(counts), draws))
    most = float(np.quantile(share @ np.abs(drawn - centre[:, None]), (1.0 + level) / 2.0))
    half = z_of(level) * math.sqrt(float(share**2 @ variance))
    return clamped(value, value - most, value + half, "triangle-beta", len(score))
