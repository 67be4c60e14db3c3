"""Simulation with a simulated judge: the correlation that its predictions must have with activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, final

import numpy as np

from exegete.llm.scripted import Evidence, SimulatedJudge
from exegete.llm.scripted.answers import HIGHEST
from exegete.scorers.simulation import SimulationScorer
from exegete.testing.instruments import Instrument, Known, Scores, scored
from exegete.testing.responses import inclusion
from exegete.testing.settings import Round, Setting
from exegete.types import Array

Form = Literal["all_at_once", "whole_window"]
_REPEATS: Final = 4
"""Answers drawn for every window, of which simulated draws take one each."""
_GRID: Final = 4001


@final
class Simulating(Instrument):
    """Simulation all at once, or whole windows with JSON: Pearson's correlation over the tokens of firing windows."""

    def __init__(self, evidence: Evidence, how: Form) -> None:
        super().__init__(evidence)
        self._how = how
        self._scorer = SimulationScorer(how=how, controls="none")

    @property
    def name(self) -> str:
        """The scorer and its form."""
        return f"simulation {self._how.replace('_', ' ')}"

    @property
    def headline(self) -> str:
        """Pearson's correlation."""
        return "pearson"

    @property
    def every(self) -> int:
        """One latent of three: there is a level to simulate for every token."""
        return 3

    @property
    def blind(self) -> Mapping[str, str]:
        """Of windows that fire nothing is to be seen of what is wrong elsewhere."""
        return {"extra": "it simulates firing windows alone, and what was added lies elsewhere"}

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the correlation over the frame's firing windows, strata mixed as drawn, and simulated estimates."""
        whole, drawn = (setting.view(whole=w).examples.part("test", fires=True) for w in (True, False))
        at = setting.round.frame.windows(whole.row, whole.start)
        strength = whole.activations.astype(np.float64)
        counts = [(stratum, int((drawn.stratum == stratum).sum())) for stratum in np.unique(drawn.stratum)]
        weight = np.zeros(len(whole))
        for stratum, n in counts:
            weight[whole.stratum == stratum] = inclusion(whole.document[whole.stratum == stratum], n)[0]
        chosen = _draw(whole.stratum, counts, draws, rng)
        picked = rng.integers(_REPEATS, size=chosen.shape)
        expected, estimates = [], []
        for rung in rungs:
            fits = setting.claim(rung).fits[at]
            expected.append(float(_pearson(weight @ self._moments(fits, strength))))
            felt = self._said(self.evidence.means(fits) + rng.standard_normal((_REPEATS, *fits.shape)))
            sums = _sums(felt, np.broadcast_to(strength, felt.shape))
            estimates.append(_pearson(sums[picked, chosen].sum(axis=1)))
        return Known(expected=np.array(expected), drawn=np.array(estimates).T)

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated judge."""
        judge = SimulatedJudge(
            true_positive_rate=self.evidence.true_positive_rate,
            false_positive_rate=self.evidence.false_positive_rate,
            calibration=self.evidence.calibration,
            seed=seed,
            predicates=made.predicates(rungs),
            prompt_logprobs=self._how == "all_at_once",
        )
        items = [(s.explanation(rung), replace(s.view(), llm=judge)) for s in made.settings for rung in rungs]
        return scored(self._scorer, items)

    def _said(self, evidence: Array) -> Array:
        """Return the levels that a judge with this evidence gives tokens."""
        active = 1.0 / (1.0 + np.exp(-self.evidence.calibration * self.evidence.steepness * evidence))
        levels: Array = HIGHEST * active
        return np.rint(levels) if self._how == "whole_window" else levels

    def _moments(self, fits: Array, strength: Array) -> Array:
        """Return the expected sums of every window [windows, 6] (as ``_sums``), over the judge's errors."""
        points = (np.arange(_GRID) + 0.5) / _GRID * 16.0 - 8.0
        density = np.exp(-points * points / 2.0)
        density /= density.sum()
        means = {fit: self._said(points + self.evidence.mean(fit)) for fit in (True, False)}
        first = np.where(fits, density @ means[True], density @ means[False])
        second = np.where(fits, density @ means[True] ** 2, density @ means[False] ** 2)
        ones = np.ones_like(strength)
        parts = (ones, first, strength, second, strength * strength, first * strength)
        return np.stack([part.sum(axis=-1) for part in parts], axis=-1)


def _draw(stratum: Array, counts: Sequence[tuple[int, int]], draws: int, rng: np.random.Generator) -> Array:
    """Draw windows without replacement from each stratum; return their places [draws, windows]."""
    parts = []
    for name, n in counts:
        own = np.flatnonzero(stratum == name)
        parts.append(own[rng.random((draws, len(own))).argpartition(n - 1, axis=1)[:, :n]])
    return np.concatenate(parts, axis=1)


def _sums(x: Array, y: Array) -> Array:
    """Return the sums over tokens [..., 6] of 1, x, y, x², y² and xy, of arrays [..., tokens]."""
    parts = (np.ones_like(x), x, y, x * x, y * y, x * y)
    return np.stack([part.sum(axis=-1) for part in parts], axis=-1)


def _pearson(sums: Array) -> Array:
    """Return the correlations that sums [..., 6] amount to."""
    n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
    found: Array = (sxy - sx * sy / n) / np.sqrt((sxx - sx * sx / n) * (syy - sy * sy / n))
    return found
