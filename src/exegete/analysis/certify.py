"""Which latents are certified: a list in which at most a stated share is wrong, whatever their judgements share."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from exegete.analysis.shapes import HEADLINE, Certified
from exegete.errors import InputError, NotFoundError
from exegete.metrics import Observed
from exegete.metrics.certified import certified, e_value, p_value
from exegete.results import Results
from exegete.results_packing import JudgementColumns
from exegete.types import STRATA

LEVEL, RATE = 0.7, 0.05
Correction = Literal["e-bh", "by", "bh"]


def certify(
    results: Results,
    coder: str,
    *,
    scorer: str = "detection",
    explainer: str | None = None,
    level: float = LEVEL,
    rate: float = RATE,
    correction: Correction = "e-bh",
    worst: bool = False,
) -> Certified:
    """Return the latents of a coder whose balanced accuracy is certified to be above ``level``, strongest first.

    At most a share ``rate`` of the list is expected to be wrong: by e-BH whatever the latents share (they share
    documents) and whenever judging stopped, as by Benjamini and Yekutieli's ``by`` where the number of judgements was
    fixed; ``bh`` asks for independence too. ``explainer`` is the key of an explaining stage, by default the newest with
    measured judgements. What failed is left out, or counted as wrong with ``worst``. Plumbing checks certify nothing.

    Raises NotFoundError when a scorer has no judgements of the coder, InputError for one without balanced accuracy, a
    level, rate or correction that is none, and p-values of latents that were judged in rounds.
    """
    if correction not in ("e-bh", "by", "bh"):
        raise InputError(f"the correction is e-bh, by or bh, got {correction!r}")
    key = explainer or _newest(results, coder, scorer)
    observed = {
        latent: _observed(columns)
        for latent, columns in results.judgement_columns(coder, scorer, explainer=key, plumbing=False)
    }
    if key is None or not observed:
        raise NotFoundError(f"{scorer} has measured nothing of {coder}; measure it with exegete score")
    column = results.score_column(coder, scorer, HEADLINE, explainer=key, plumbing=False)
    if not len(column):
        raise InputError(f"{scorer} has no balanced accuracy to be certified; take detection or fuzzing")
    latents = list(observed)
    if correction == "e-bh":
        evidence = [e_value(observed[latent], level, worst=worst) for latent in latents]
        listed = certified(latents, q=rate, e_values=evidence)
    elif _in_rounds(results, coder, scorer, key):
        raise InputError("latents that were judged in rounds have e-values and no p-values; use e-bh")
    else:
        evidence = [p_value(observed[latent], level, worst=worst) for latent in latents]
        listed = certified(latents, q=rate, p_values=evidence, correction=correction)
    values = dict(zip(latents, evidence, strict=True))
    scores = dict(zip(column.index.tolist(), column.value.tolist(), strict=True))
    return Certified(
        coder=coder,
        scorer=scorer,
        level=level,
        rate=rate,
        correction=correction,
        n=len(latents),
        latents=tuple((latent.index, scores.get(latent.index, math.nan), values[latent]) for latent in listed),
    )


def _newest(results: Results, coder: str, scorer: str) -> str | None:
    """Return the newest explaining stage that a scorer has measured judgements of."""
    for key, _ in reversed(results.explainers(coder)):
        if next(results.judgement_columns(coder, scorer, explainer=key, plumbing=False), None) is not None:
            return key
    return None


def _in_rounds(results: Results, coder: str, scorer: str, explainer: str) -> bool:
    """Return whether explanations of a stage were judged until their answers decided that it was enough."""
    spec = results.scored_with(coder, scorer, explainer, plumbing=False)
    args = (spec.get("scorer") or {}).get("args") or {}
    return any(args.get(name) is not None for name in ("certify", "stop_when"))


def _observed(columns: JudgementColumns) -> Observed:
    known = {name: place for place, name in enumerate(STRATA)}
    places = np.array([known.get(name, 0) for name in columns.strata] or [0], np.int8)  # no evidence rests on them
    return Observed(
        truth=columns.truth,
        prediction=columns.prediction,
        score=columns.probability,
        stratum=places[columns.stratum],
        document=columns.document.astype(np.int64),
        probability=columns.inclusion,
        multiplicity=columns.multiplicity,
        activation=columns.activation.astype(np.float64),
    )
