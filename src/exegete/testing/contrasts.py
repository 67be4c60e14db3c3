"""Discrimination with a simulated judge: what it must say when every latent wears the same rung of its ladder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np

from exegete.llm.scripted import Evidence
from exegete.scorers.contrast import Contrast
from exegete.scorers.discrimination import DiscriminationScorer, shared
from exegete.testing.instruments import Instrument, Known, Scores, scored, simulated_judge
from exegete.testing.settings import Round, Setting
from exegete.types import Array, LatentId

K = 4
_TIMES = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
_ENOUGH = 1e-12


@final
class Discriminating(Instrument):
    """Discrimination among the nearest latents, each explained by the same rung of its own ladder.

    So the rung *broad* asks what happens where an explainer is too broad about all latents alike: siblings then share
    a description, and the judge gives it the same answer both times.
    """

    def __init__(self, evidence: Evidence, *, smoothing: float = 0.1) -> None:
        super().__init__(evidence)
        self._smoothing = smoothing
        self._scorer = DiscriminationScorer(near=K, smoothing=smoothing, controls="none")

    @property
    def name(self) -> str:
        """``discrimination``."""
        return "discrimination"

    @property
    def headline(self) -> str:
        """Bits."""
        return "bits"

    @property
    def gap(self) -> float:
        """As far on the way from 0 to all bits as 0.08 of balanced accuracy is from ½ to 1."""
        return 0.16 * math.log2(K + 1)

    def wanted(self, setting: Setting) -> int:
        """Return so many that n of the firing ones are left on which no neighbour fires, at most 5 n."""
        own, made = setting.whole.part("test", fires=True), setting.round
        left = ~shared(own, made.world.data, [LatentId(coder=made.world.store.name, index=i) for i in _near(setting)])
        times = next((times for times in _TIMES if times * left.mean() >= 1.0), _TIMES[-1])
        return round(times * made.n)

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the true bits of each rung over the frame, and simulated estimates."""
        frame = _Alone(setting, rungs)
        odds = math.log(1.0 / self._smoothing - 1.0)
        expected = [_expected(frame, rung, self.evidence, odds) for rung in range(len(rungs))]
        chosen = frame.draw(draws, rng)
        drawn = [_drawn(frame, rung, self.evidence, odds, chosen, rng) for rung in range(len(rungs))]
        return Known(expected=np.array(expected), drawn=np.array(drawn).T)

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated judge."""
        judge = simulated_judge(made, rungs, self.evidence, seed)
        items = [
            (s.explanation(rung), replace(s.view(), llm=judge, near=s.near(rung, K)))
            for s in made.settings
            for rung in rungs
        ]
        return scored(self._scorer, items)


def _near(setting: Setting) -> list[int]:
    return [index for index, _ in setting.round.neighbours[setting.latent][:K]]


@final
class _Alone:
    """The firing windows of a latent on which none of its neighbours fires, and which explanations fit them.

    Windows that the same explanations fit are one pattern: ``fits`` [rungs][explanations, patterns]; the same text is
    one explanation, and ``worn`` [rungs][1 + k] says whose it is, the latent's own first.
    """

    def __init__(self, setting: Setting, rungs: Sequence[str]) -> None:
        world, made = setting.round.world, setting.round
        near = _near(setting)
        self.k = len(near)
        fired = setting.whole.part("test", fires=True)
        drawn = setting.drawn.part("test", fires=True)
        latents = [LatentId(coder=world.store.name, index=index) for index in near]
        alone = ~shared(fired, world.data, latents)
        at = made.frame.windows(fired.row, fired.start)
        self.worn: list[list[int]] = []
        columns, starts = [], [0]
        for rung in rungs:
            claims = [made.claim(index, rung) for index in (setting.latent, *near)]
            texts = list(dict.fromkeys(claim.text for claim in claims))
            self.worn.append([texts.index(claim.text) for claim in claims])
            first = {claim.text: claim for claim in reversed(claims)}
            columns += [first[text].anywhere[at] for text in texts]
            starts.append(starts[-1] + len(texts))
        patterns, which = np.unique(np.array([alone, *columns]), axis=1, return_inverse=True)
        self.alone = patterns[0]
        self.fits = [patterns[1 + a : 1 + b] for a, b in itertools.pairwise(starts)]
        self._strata = []
        for stratum in np.unique(drawn.stratum):
            counts = np.bincount(which[fired.stratum == stratum], minlength=patterns.shape[1])
            self._strata.append((int((drawn.stratum == stratum).sum()), counts))

    @property
    def weights(self) -> Array:
        """The expected number of each pattern among the windows drawn [patterns]; those not alone count for nothing."""
        found: Array = np.sum([n * counts / counts.sum() for n, counts in self._strata], axis=0) * self.alone
        return found

    def draw(self, draws: int, rng: np.random.Generator) -> Array:
        """Draw windows without replacement; return their patterns [draws, windows]."""
        parts = []
        for n, counts in self._strata:
            taken = rng.multivariate_hypergeometric(counts, n, size=draws)
            parts.append(np.repeat(np.tile(np.arange(len(counts)), draws), taken.reshape(-1)).reshape(draws, n))
        return np.concatenate(parts, axis=1)


def _rates(fits: Array, evidence: Evidence) -> Array:
    found: Array = np.where(fits, evidence.true_positive_rate, evidence.false_positive_rate)
    return found


def _bits(yes: Array, worn: Sequence[int], odds: float) -> Array:
    """Return the bits of verdicts, bool [explanations, n], when the first of those worn is right [n]."""
    signed = np.where(yes, odds, -odds)[list(worn)]
    return Contrast(own=signed[0], others=signed[1:]).bits


def _expected(frame: _Alone, rung: int, evidence: Evidence, odds: float) -> float:
    """Return the expected bits: over all windows, and all answers to the explanations worn."""
    fits, worn = frame.fits[rung], frame.worn[rung]
    m = len(fits)
    answers = (np.arange(1 << m)[None] >> np.arange(m)[:, None] & 1).astype(bool)
    bits = _bits(answers, worn, odds)
    rates = _rates(fits, evidence)
    chances = np.where(answers[:, :, None], rates[:, None], 1.0 - rates[:, None]).prod(axis=0)
    weights = frame.weights
    return float((bits @ chances) @ weights / max(weights.sum(), _ENOUGH)) if weights.sum() else math.nan


def _drawn(frame: _Alone, rung: int, evidence: Evidence, odds: float, chosen: Array, rng: np.random.Generator) -> Array:
    """Return mean bits in simulated draws [draws]."""
    rates = _rates(frame.fits[rung], evidence)[:, chosen]
    yes = rng.random(rates.shape) < rates
    bits = _bits(yes.reshape(len(yes), -1), frame.worn[rung], odds).reshape(chosen.shape)
    alone = frame.alone[chosen]
    found: Array = np.where(alone, bits, 0.0).sum(axis=1) / np.maximum(alone.sum(axis=1), 1)
    return found
