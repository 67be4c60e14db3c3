"""How often a judge is right about one latent: sensitivity, specificity, balanced accuracy and F1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.metrics import failures
from exegete.metrics.clustered import FIRING, SILENT, Documents, t_of
from exegete.metrics.inputs import clamped, undefined, z_of
from exegete.metrics.interval import Interval
from exegete.metrics.observed import Observed
from exegete.metrics.proportions import score_bounds, wilson
from exegete.types import Array

JUDGED: Final = ("balanced_accuracy", "sensitivity", "specificity", "f1")
_MOVER: Final = "mover-cr2-wilson"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    """A share of right answers [0, 1] with its bounds, and the distances from it to these."""

    value: float
    low: float
    high: float

    @property
    def down(self) -> float:
        return self.value - self.low

    @property
    def up(self) -> float:
        return self.high - self.value


def judged(observed: Observed, *, level: float = 0.95) -> dict[str, Interval]:
    """Return balanced accuracy, sensitivity, specificity and F1 of a judge's answers about one latent.

    Values are over the windows that were answered, each once, whatever near-duplicates it stands for. The target of
    each interval is the judge's expected score on the test frame, the strata mixed as they were drawn (F1 at the drawn
    numbers of firing and silent windows); what the judge makes of one document rather than another is part of its
    noise.

    A rate has Wilson's interval. Where some document holds several of the windows, it is that of an effective number
    of windows: n divided by CR2's variance over the binomial one and by (t / z)², with Student's t at Satterthwaite's
    degrees of freedom; never more than n (Korn and Graubard 1998 for Clopper and Pearson's interval). Balanced accuracy
    and F1 are put together from two such intervals by MOVER (Zou and Donner 2008; Donner and Zou 2012 for the ratio
    that F1 is), with the correlation of the two rates over documents. There the effective number is taken where no
    document repeats, too: MOVER of two plain Wilson intervals covers too little with few windows.

    ``floor`` and ``ceiling`` hold the interval with everything that failed wrong, and right. Where fewer than 20
    documents hold firing windows, or silent ones, what needs that class is flagged ``few_documents``; of a single
    document the interval is the whole range. A class without answers leaves what needs it undefined: NaN, n 0.
    """
    found = _intervals(failures.answered(observed), level)
    if not (observed.prediction < 0).any():
        return found
    worst, best = (_intervals(failures.all_answered(observed, right=right), level) for right in (False, True))
    return failures.widened(found, worst, best)


def _intervals(known: Observed, level: float) -> dict[str, Interval]:
    documents = Documents.of(known.truth, known.document, known.stratum)
    right = (known.truth == (known.prediction == 1)).astype(np.float64)
    shares = documents.shares(right)
    values = documents.means(right)
    rates = {klass: _clustered(documents, values, shares, klass, level) for klass in (SILENT, FIRING)}
    found = {
        "sensitivity": _rate(documents, values, rates[FIRING], FIRING, level),
        "specificity": _rate(documents, values, rates[SILENT], SILENT, level),
        "balanced_accuracy": undefined(_MOVER),
        "f1": undefined(_MOVER),
    }
    if documents.totals.all():
        firing, silent, together = rates[FIRING], rates[SILENT], _correlation(shares)
        ratio = float(documents.totals[SILENT] / documents.totals[FIRING])
        mean, f1 = _mean(firing, silent, together), _f1(firing, silent, together, ratio)
        if documents.n == 1:
            mean, f1 = (mean[0], 0.0, 1.0), (f1[0], 0.0, 1.0)
        for name, bounds in (("balanced_accuracy", mean), ("f1", f1)):
            found[name] = failures.marked(clamped(*bounds, _MOVER, len(known)), documents.n, documents.fewest)
    return {name: found[name] for name in JUDGED}


def _clustered(documents: Documents, values: Array, shares: Array, klass: int, level: float) -> _Rate:
    """Return the share of right answers in a class with Wilson's interval of the effective number of windows."""
    n, value = int(documents.totals[klass]), float(values[klass])
    widening = (t_of(level, documents.freedom(np.eye(2)[klass])) / z_of(level)) ** 2
    if math.isinf(widening):
        return _Rate(value=value, low=0.0, high=1.0)
    binomial = value * (1.0 - value) / n
    inflation = float(shares[:, klass] @ shares[:, klass]) / binomial if binomial > 0 else n / (n - 1)
    low, high = score_bounds(value, n / max(inflation * widening, 1.0), z_of(level))
    return _Rate(value=value, low=low, high=high)


def _rate(documents: Documents, values: Array, clustered: _Rate, klass: int, level: float) -> Interval:
    """Return a class's rate with Wilson's own interval where no document repeats, else with the clustered one."""
    n, held = int(documents.totals[klass]), int(documents.held[klass])
    if documents.repeat and n:
        return failures.marked(clamped(clustered.value, clustered.low, clustered.high, "cr2-wilson", n), held)
    plain = wilson(round(float(values[klass]) * n) if n else 0, n, level=level)
    return failures.marked(plain, held) if n else plain


def _correlation(shares: Array) -> float:
    """Return the correlation of the errors of the two classes."""
    (a, c), (_, b) = shares.T @ shares
    return float(np.clip(c / math.sqrt(a * b), -1.0, 1.0)) if a * b > 0 else 0.0


def _mean(firing: _Rate, silent: _Rate, together: float) -> tuple[float, float, float]:
    """Return the mean of two rates with its bounds by MOVER."""
    value = (firing.value + silent.value) / 2.0
    down, up = (
        math.sqrt(max(a * a + b * b + 2.0 * together * a * b, 0.0)) / 2.0
        for a, b in ((firing.down, silent.down), (firing.up, silent.up))
    )
    return value, value - down, value + up


def _f1(firing: _Rate, silent: _Rate, together: float, ratio: float) -> tuple[float, float, float]:
    """Return F1 = 2s / (1 + s + r(1 − c)) of sensitivity s, specificity c and r silent windows a firing one.

    F1 is at least q where 2s − q(1 + s + r(1 − c)) ≥ 0: MOVER's bound of that difference is 0 at the bounds of F1.
    """
    s, below = firing.value, 1.0 + firing.value + ratio * (1.0 - silent.value)

    def equation(a: float, b: float) -> tuple[float, float, float, float]:
        """Return square, half and rest of the quadratic equation in q, and the root of its discriminant."""
        square = below * below - a * a - b * b + 2.0 * together * a * b
        half = 2.0 * s * below - 2.0 * a * a + 2.0 * together * a * b
        rest = 4.0 * (s * s - a * a)
        return square, half, rest, math.sqrt(max(half * half - square * rest, 0.0))

    _, half, rest, root = equation(firing.down, ratio * silent.down)
    low = rest / (half + root) if half + root > 0.0 else 0.0
    square, half, _, root = equation(firing.up, ratio * silent.up)
    high = (half + root) / square if square > 0.0 else 1.0
    return 2.0 * s / below, low, high
