"""Where along a latent's activations, and on which kind of silent windows, a judge is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from exegete.metrics import failures
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, Observed
from exegete.metrics.proportions import wilson
from exegete.types import STRATA, Array


def decile_curve(observed: Observed, *, level: float = 0.95) -> dict[str, Interval]:
    """Return the share of firing windows judged yes in each stratum they were drawn from, with Wilson's interval.

    The names are ``sensitivity_decile_0`` (the strongest tenth by rank) to ``sensitivity_decile_9``, or
    ``sensitivity_bin_0`` to ``_9`` where windows were drawn from bins of value; strata without windows are left out.
    ``floor`` and ``ceiling`` hold the interval with what failed judged no, and yes.
    """
    return _curve(observed, observed.truth, "sensitivity", level)


def stratum_curve(observed: Observed, *, level: float = 0.95) -> dict[str, Interval]:
    """Return the share of silent windows not judged yes, of each kind: ``specificity_same_token`` and so on.

    As ``decile_curve`` otherwise; random silent windows are ``specificity_silent``.
    """
    return _curve(observed, ~observed.truth, "specificity", level)


def _curve(observed: Observed, asked: Array, name: str, level: float) -> dict[str, Interval]:
    found = {}
    right = (observed.prediction == 1) == observed.truth
    known = observed.prediction != FAILED
    for stratum in np.unique(observed.stratum[asked]).tolist():
        label = STRATA[stratum]
        if name == "sensitivity" and not label.startswith(("decile_", "bin_")):
            continue
        which = asked & (observed.stratum == stratum)
        total, n = int(which.sum()), int((which & known).sum())
        k = int((which & known & right).sum())
        documents = len(np.unique(observed.document[which & known]))
        interval = replace(
            wilson(k, n, level=level),
            floor=wilson(k, total, level=level).low,
            ceiling=wilson(k + total - n, total, level=level).high,
        )
        found[f"{name}_{label}"] = failures.marked(interval, documents) if n else interval
    return found
