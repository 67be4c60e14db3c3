"""What scorers share that put a number on every test window (nats, a cosine) and ask how well it ranks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from exegete import metrics
from exegete.metrics import FrameCounts, Observed
from exegete.scorers.asked import judgements_of
from exegete.scorers.controls import control_score, lift_score, score_of
from exegete.scorers.judge import Verdict
from exegete.types import STRATA, Array, Judgement, LatentId, Score, Windows
from exegete.views import LatentView

HEADLINE: Final = "auroc"


def observed_values(windows: Windows, values: Array) -> Observed:
    """Return windows with a number each, float64 [n], as columns; NaN stands for a missing one."""
    return Observed.of_windows(windows, score=values)


def value_judgements(windows: Windows, values: Array) -> tuple[Judgement, ...]:
    """Return one judgement per window with its number; one without has failed."""
    return judgements_of(windows, [_said(value) for value in values.tolist()])


def value_scores(
    scorer: str, view: LatentView, windows: Windows, own: Array, controls: Mapping[str, Sequence[Array]]
) -> tuple[Score, ...]:
    """Return the scores of windows by their numbers [n], and those of the same windows under each control.

    In order: the AUROC over the windows as they were drawn; the correlation of number and activation; the area under
    the precision-recall curve and the correlation over the whole test frame, at the latent's true firing rate; the
    AUROC of each stratum of firing windows against all silent ones, and of all firing ones against each kind of silent
    ones; then, for each control, its AUROC and the lift over it.
    """
    latent, observed = view.latent, observed_values(windows, own)
    found = {**metrics.ranked(observed), "pearson": metrics.correlation(observed)}
    found |= metrics.population(observed, FrameCounts.of(view.examples), seed=view.examples.seed)
    scores = [score_of(latent, scorer, metric, i, *_counts(observed)) for metric, i in found.items()]
    scores += _by_stratum(scorer, latent, observed)
    for control, values in controls.items():
        scores += _control_scores(scorer, latent, control, observed, [observed_values(windows, v) for v in values])
    return tuple(scores)


def _said(value: float) -> Verdict:
    if math.isnan(value):
        return Verdict(prediction=None, status="failed")
    return Verdict(prediction=None, value=value)


def _counts(observed: Observed) -> tuple[int, int]:
    return len(observed), int((~np.isnan(observed.score)).sum())


def _by_stratum(scorer: str, latent: LatentId, observed: Observed) -> list[Score]:
    scores = []
    for fires in (True, False):
        strata = np.unique(observed.stratum[observed.truth == fires]).tolist()
        for stratum in strata if len(strata) > 1 else ():
            part = observed.take((observed.truth != fires) | (observed.stratum == stratum))
            figure = metrics.ranked(part)[HEADLINE]
            scores.append(score_of(latent, scorer, f"{HEADLINE}_{STRATA[stratum]}", figure, *_counts(part)))
    return scores


def _control_scores(
    scorer: str, latent: LatentId, control: str, own: Observed, others: Sequence[Observed]
) -> list[Score]:
    counts = [_counts(observed) for observed in others]
    beside = control_score(
        latent,
        scorer,
        HEADLINE,
        control,
        [metrics.ranked(observed)[HEADLINE] for observed in others],
        n_total=sum(n for n, _ in counts),
        n_scored=sum(n for _, n in counts),
    )
    return [beside, lift_score(latent, scorer, HEADLINE, control, own, others)]
