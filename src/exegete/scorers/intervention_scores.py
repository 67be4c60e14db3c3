"""The scores of an intervention: means over prompts, beside what chance would give, with intervals by document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.metrics import Interval
from exegete.metrics.clustered import Mean
from exegete.metrics.inputs import undefined
from exegete.scorers.controls import LIFT, of_donors, score_of
from exegete.scorers.intervention_prompts import Prompt
from exegete.types import Array, Judgement, LatentId, Score

METHOD: Final = "CR2 t by document"
MIN_PROMPTS: Final = 5
"""Fewer prompts than these give no score."""

Values = Mapping[str, Mapping[int, Array]]
"""Values of every prompt [prompts], by control and place of the condition."""
Unmet = Mapping[tuple[str, int], str]
"""Why there are no values, by control and place of the condition."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one latent after its scoring prompts.

    ``values`` are those of every prompt [prompts] float64, by control (``none`` for the explanation itself) and place
    of the condition, NaN where nothing was read; ``unmet`` says by control and condition why there are none at all;
    what is in neither was not asked for. ``names`` are those of the conditions, ``bounds`` the least and the greatest
    value there can be, ``donors`` how many latents lent explanations.
    """

    metric: str
    names: tuple[str, ...]
    values: Values
    unmet: Unmet
    prompts: Sequence[Prompt]
    bounds: tuple[float, float]
    donors: int = 0

    def scores(self, latent: LatentId, scorer: str, first: int) -> tuple[Score, ...]:
        """Return the scores of all conditions, those of ``first`` first: own, controls, and own − control."""
        order = [first, *(i for i in range(len(self.names)) if i != first)]
        found: list[Score] = []
        for at in order:
            metric, own = f"{self.metric}_{self.names[at]}", self._of("none", at)
            found.append(self._score(latent, scorer, metric, "none", own))
            for control in dict.fromkeys([*self.values, *(name for name, _ in self.unmet)]):
                beside = self._of(control, at)
                if control == "none" or beside is None:
                    continue
                found.append(self._score(latent, scorer, metric, control, beside))
                found.append(self._score(latent, scorer, metric + LIFT, control, _less(own, beside), paired=True))
        return tuple(found)

    def _of(self, control: str, at: int) -> Array | str | None:
        """Return the values of a control in a condition, why there are none, or None where it was not asked for."""
        few = f"too few prompts: {len(self.prompts)} of at least {MIN_PROMPTS}"
        if len(self.prompts) < MIN_PROMPTS:
            return few if control == "none" else None
        if (control, at) in self.unmet:
            return self.unmet[control, at]
        return self.values.get(control, {}).get(at)

    def _score(
        self,
        latent: LatentId,
        scorer: str,
        metric: str,
        control: str,
        found: Array | str | None,
        *,
        paired: bool = False,
    ) -> Score:
        n = len(self.prompts)
        if found is None or isinstance(found, str):
            return score_of(latent, scorer, metric, undefined(found or "not measured"), n, 0, control)
        low, high = self.bounds
        bounds = (low - high, high - low) if paired else (low, high)
        interval = mean_by_document(found, np.array([p.document for p in self.prompts]), bounds)
        return score_of(latent, scorer, metric, of_donors(interval, control, self.donors), n, interval.n, control)

    def judgements(self, at: int) -> dict[str, tuple[Judgement, ...]]:
        """Return the values of one condition as judgements by control; the unit is the last token of a prompt."""
        return {
            control: tuple(_judgement(p, v) for p, v in zip(self.prompts, by_place[at].tolist(), strict=True))
            for control, by_place in self.values.items()
            if at in by_place
        }


def _less(own: Array | str | None, beside: Array | str) -> Array | str | None:
    """Return own − beside, prompt by prompt, or why there is no difference."""
    if own is None or isinstance(own, str):
        return own
    return beside if isinstance(beside, str) else own - beside


def mean_by_document(values: Array, documents: Array, bounds: tuple[float, float], *, level: float = 0.95) -> Interval:
    """Return the mean of values [n], one a prompt, with a t interval clustered by document (CR2, Satterthwaite).

    NaN values are left out; ``floor`` and ``ceiling`` are the interval had they been the least, or the greatest, there
    can be. Where no document repeats this is Student's t interval.
    """
    known = np.isfinite(values)
    inner = _mean(values[known], documents[known], bounds, level)
    if known.all() or not known.any():
        return inner
    least, most = (
        _mean(np.where(known, values, end), documents, bounds, level) if math.isfinite(end) else None for end in bounds
    )
    return replace(
        inner,
        floor=-math.inf if least is None else min(inner.low, least.low),
        ceiling=math.inf if most is None else max(inner.high, most.high),
    )


def _mean(values: Array, documents: Array, bounds: tuple[float, float], level: float) -> Interval:
    found = Mean.of(values, documents, level=level)
    if found is None:
        return undefined(METHOD)
    low, high = bounds
    return found.interval(max(low, found.value - found.half), min(high, found.value + found.half), METHOD)


def _judgement(prompt: Prompt, value: float) -> Judgement:
    read = math.isfinite(value)
    return Judgement(
        row=prompt.row,
        start=prompt.position,
        document=prompt.document,
        stratum="random",
        truth=True,
        value=value if read else None,
        status="ok" if read else "failed",
        activation=prompt.activation,
    )
