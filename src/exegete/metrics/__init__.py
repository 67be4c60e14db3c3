"""Metrics with their intervals: pure functions of arrays."""

from exegete.metrics.basic import (
    Lift,
    auroc,
    average_precision,
    balanced_accuracy,
    difference_of_medians,
    f1,
    mean_interval,
    median_interval,
    paired_lift,
    pearson,
    precision,
    sensitivity,
    share_of_ties,
    specificity,
    wilson,
)
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FrameCounts, Observed

__all__ = [
    "FrameCounts",
    "Interval",
    "Lift",
    "Observed",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "difference_of_medians",
    "f1",
    "mean_interval",
    "median_interval",
    "paired_lift",
    "pearson",
    "precision",
    "sensitivity",
    "share_of_ties",
    "specificity",
    "wilson",
]
