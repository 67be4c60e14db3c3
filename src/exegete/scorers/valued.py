"""What scorers share that put a number on every test window (nats, a cosine) and ask how well it ranks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from exegete import metrics
from exegete.metrics import FrameCounts, Observed
from exegete.metrics.observed import FAILED
from exegete.scorers.controls import control_score, lift_score, score_of
from exegete.types import STRATA, Array, Judgement, LatentId, Score, Windows
from exegete.views import LatentView

HEADLINE: Final = "auroc"


def observed_values(windows: Windows, values: Array) -> Observed:
    """Return windows with a number each, float64 [n], as columns; NaN stands for a missing one."""
    return Observed(
        truth=windows.fires,
        prediction=np.full(len(windows), FAILED, np.int8),
        score=values.astype(np.float64),
        stratum=windows.stratum,
        document=windows.document,
        probability=windows.probability,
        multiplicity=windows.multiplicity,
        activation=_strongest(windows),
    )


def value_judgements(windows: Windows, values: Array) -> tuple[Judgement, ...]:
    """Return one judgement per window with its number; one without has failed."""
    columns = (
        windows.row, windows.start, windows.document, windows.stratum, windows.fires, _strongest(windows),
        windows.probability, windows.multiplicity,
    )  # fmt: skip
    return tuple(
        Judgement(
            row=row,
            start=start,
            document=document,
            stratum=STRATA[stratum],
            truth=truth,
            value=None if value != value else value,
            status="failed" if value != value else "ok",
            activation=activation,
            inclusion_probability=inclusion,
            multiplicity=multiplicity,
        )
        for row, start, document, stratum, truth, activation, inclusion, multiplicity, value in zip(
            *(c.tolist() for c in columns), values.tolist(), strict=True
        )
    )


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


def _strongest(windows: Windows) -> Array:
    strongest: Array = windows.activations.max(axis=1, initial=0.0).astype(np.float64)
    return strongest


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
