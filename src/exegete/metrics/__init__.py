"""Metrics with their intervals: pure functions of arrays.

Every function returns an ``Interval``, or several by name. Where the data leave the metric undefined — no observation,
a value that is not a number, one class only — the result is NaN with ``n`` 0, never a number that looks like a score.
Where the data do not suffice for an interval of the asked level, it is the whole range.
"""

from exegete.metrics.calibration import calibration
from exegete.metrics.centres import Lift, difference_of_medians, mean_interval, median_interval, paired_lift
from exegete.metrics.correlations import correlation, pearson
from exegete.metrics.deciles import decile_curve, stratum_curve
from exegete.metrics.fade import clarity, purity, responsiveness
from exegete.metrics.interval import Interval
from exegete.metrics.judging import judged
from exegete.metrics.observed import FrameCounts, Observed
from exegete.metrics.pairing import paired
from exegete.metrics.placing import ranked
from exegete.metrics.population import population
from exegete.metrics.proportions import (
    balanced_accuracy,
    f1,
    precision,
    sensitivity,
    share_of_ties,
    specificity,
    wilson,
)
from exegete.metrics.ranking import auroc, average_precision

__all__ = [
    "FrameCounts",
    "Interval",
    "Lift",
    "Observed",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "calibration",
    "clarity",
    "correlation",
    "decile_curve",
    "difference_of_medians",
    "f1",
    "judged",
    "mean_interval",
    "median_interval",
    "paired",
    "paired_lift",
    "pearson",
    "population",
    "precision",
    "purity",
    "ranked",
    "responsiveness",
    "sensitivity",
    "share_of_ties",
    "specificity",
    "stratum_curve",
    "wilson",
]
