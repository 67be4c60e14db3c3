"""The scores that judged windows amount to: an explanation's own, those of its nulls, and its lift over each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from exegete import metrics
from exegete.metrics import FrameCounts, Interval, Observed
from exegete.metrics.inputs import clamped
from exegete.metrics.observed import FAILED
from exegete.scorers.controls import control_score, lift_score, score_of
from exegete.types import STRATA, LatentId, Score

HEADLINE: Final = "balanced_accuracy"
METRICS: Final = (HEADLINE, "sensitivity", "specificity", "f1")
RANKED: Final = "auroc"
OUTSIDE: Final = "outside_mass"
DRAWS: Final = 250
"""Simulations for responsiveness and purity, each of which sorts the whole frame: more would take most of the time."""
_RATES: Final = {"sensitivity": True, "specificity": False}
_OF_NUMBERS: Final = frozenset({RANKED, "pearson", "ece", "brier", "population_auprc"})
_OF_EITHER: Final = "population_pearson"
"""It is of P(yes), or of verdicts where there is none."""


def own_scores(
    scorer: str,
    latent: LatentId,
    observed: Observed,
    *,
    frame: FrameCounts | None = None,
    probabilities: bool = False,
    seed: int = 0,
) -> tuple[Score, ...]:
    """Return all scores of an explanation from its judgements; what failed is counted and left out of the values.

    In order: balanced accuracy, sensitivity, specificity and F1 over the windows as they were drawn; with
    ``probabilities`` the AUROC of P(yes), its correlation with the activation and its calibration; with a ``frame`` the
    ``population_*`` metrics, responsiveness and purity, all at the latent's true firing rate; sensitivity by decile and
    specificity by kind of silent window.
    """
    found: dict[str, Interval] = dict(_main(observed, probabilities))
    if probabilities:
        found |= {"pearson": metrics.correlation(observed), **metrics.calibration(observed, seed=seed)}
    if frame is not None:
        found |= metrics.population(observed, frame, seed=seed)
        found["responsiveness"] = metrics.responsiveness(observed, frame, draws=DRAWS, seed=seed)
        found["purity"] = metrics.purity(observed, frame, draws=DRAWS, seed=seed)
    found |= {**metrics.decile_curve(observed), **metrics.stratum_curve(observed)}
    return tuple(
        score_of(latent, scorer, metric, interval, *_counts(observed, metric)) for metric, interval in found.items()
    )


def stopped_scores(
    scorer: str, latent: LatentId, observed: Observed, figures: Mapping[str, Interval]
) -> tuple[Score, ...]:
    """Return scores of windows judged in rounds, from the figures of where it stopped, balanced accuracy first."""
    n_total, n_scored = _counts(observed, HEADLINE)
    return tuple(score_of(latent, scorer, metric, found, n_total, n_scored) for metric, found in figures.items())


def control_scores(
    scorer: str,
    latent: LatentId,
    control: str,
    own: Observed,
    others: Sequence[Observed],
    *,
    probabilities: bool = False,
) -> tuple[Score, ...]:
    """Return what stands beside the scores under one control, and the lift of the headline metric (of AUROC too).

    ``others`` are the judgements of the same windows by each of the control's explanations, all counted.
    """
    per_donor = [_main(observed, probabilities) for observed in others]
    scores = []
    for metric in (*METRICS, RANKED) if probabilities else METRICS:
        counts = [_counts(observed, metric) for observed in others]
        n_total, n_scored = sum(n for n, _ in counts), sum(n for _, n in counts)
        intervals = [donor[metric] for donor in per_donor]
        scores.append(control_score(latent, scorer, metric, control, intervals, n_total=n_total, n_scored=n_scored))
    lifted = (HEADLINE, RANKED) if probabilities else (HEADLINE,)
    return (*scores, *(lift_score(latent, scorer, metric, control, own, others) for metric in lifted))


def outside_score(scorer: str, latent: LatentId, outside: Sequence[float | None]) -> Score:
    """Return the mean probability mass that a judge put on neither yes nor no, with Student's t interval in [0, 1]."""
    known = [mass for mass in outside if mass is not None]
    mean = metrics.mean_interval(known)
    if known:
        mean = clamped(mean.value, mean.low, mean.high, mean.method, mean.n)
    return score_of(latent, scorer, OUTSIDE, mean, len(outside), len(known))


def _main(observed: Observed, probabilities: bool) -> Mapping[str, Interval]:
    found = dict(metrics.judged(observed))
    return {**found, **metrics.ranked(observed)} if probabilities else found


def _counts(observed: Observed, metric: str) -> tuple[int, int]:
    """Return how many judgements a metric is of, and how many of them it could use."""
    known = ~np.isnan(observed.score)
    numbers = metric in _OF_NUMBERS or (metric == _OF_EITHER and bool(known.any()))
    usable = known if numbers else observed.prediction != FAILED
    rate, _, stratum = metric.partition("_")
    if rate in _RATES and stratum in STRATA:
        usable = usable[(observed.stratum == STRATA.index(stratum)) & (observed.truth == _RATES[rate])]
    return len(usable), int(usable.sum())
