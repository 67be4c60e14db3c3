"""How well a judge's numbers rank the windows of one latent: AUROC, clustered by document."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from exegete.metrics import failures
from exegete.metrics.clustered import FIRING, Documents, t_of
from exegete.metrics.inputs import clamped, expit, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.observed import Observed
from exegete.metrics.proportions import score_bounds
from exegete.metrics.ranking import auroc, placements
from exegete.types import Array

_METHOD: Final = "cr2-logit-delong"


def ranked(observed: Observed, *, level: float = 0.95) -> dict[str, Interval]:
    """Return the AUROC of ``score``: the chance that a firing window scores above a silent one, ties counting half.

    Windows without a score are left out. The target is that of the judge's expected scores on the test frame, the
    strata mixed as they were drawn. Where no document holds several of the windows the interval is DeLong's on the
    logit scale, as in ``auroc``; otherwise DeLong's components are summed by document (Obuchowski 1997), with the
    variance of CR2 and Student's quantile with Satterthwaite's degrees of freedom, on the logit scale too; where they
    have no variance it is Wilson's for as many windows as the smaller class has. Where one document holds all windows
    of a class it is the whole range.

    ``floor`` and ``ceiling`` hold the interval with firing windows without a score ranked last and silent ones first,
    and the reverse. Fewer than 20 documents with firing windows, or with silent ones, are flagged ``few_documents``.
    """
    found = _interval(failures.scored(observed), level)
    if not np.isnan(observed.score).any():
        return {"auroc": found}
    worst, best = (_interval(failures.all_scored(observed, right=right), level) for right in (False, True))
    return failures.widened({"auroc": found}, {"auroc": worst}, {"auroc": best})


def components(truth: Array, score: Array) -> Array:
    """Return each window's placement among those of the other class [n]: their means in both classes are the AUROC."""
    values = np.empty(len(truth))
    values[truth], values[~truth] = placements(truth, score)
    return values


def _interval(known: Observed, level: float) -> Interval:
    documents = Documents.of(known.truth, known.document, known.stratum)
    if not documents.totals.all():
        return undefined(_METHOD)
    if not documents.repeat:
        return failures.marked(auroc(known.truth, known.score, level=level), documents.n, documents.fewest)
    return of_placements(components(known.truth, known.score), documents, level=level)


def of_placements(placed: Array, documents: Documents, *, level: float = 0.95) -> Interval:
    """Return the AUROC of placements [n] among the other class, or the mean one of their mean over several scores.

    The interval is as in ``ranked``. To first order the error of a mean AUROC is that of the mean placements.
    """
    value = float(documents.means(placed)[FIRING])
    shares = documents.shares(placed).sum(axis=1)
    quantile = t_of(level, documents.freedom(np.ones(2)))
    variance, method = float(shares @ shares), _METHOD
    if documents.held.min() < 2:
        low, high = 0.0, 1.0
    elif variance <= 1e-15 or not 0.0 < value < 1.0:
        low, high = score_bounds(value, float(documents.totals.min()), quantile)
        method = "wilson-smaller-class"
    else:
        centre, half = math.log(value / (1.0 - value)), quantile * math.sqrt(variance) / (value * (1.0 - value))
        low, high = expit(centre - half), expit(centre + half)
    return failures.marked(clamped(value, low, high, method, len(placed)), documents.n, documents.fewest)
