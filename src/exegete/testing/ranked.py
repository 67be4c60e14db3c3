"""Scorers that rank windows by a number, with simulated readers and embedders: surprisal, embedding."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, final

import numpy as np

from exegete.llm.scripted import Evidence
from exegete.scorers.asked import Asked
from exegete.scorers.embedding import EmbeddingScorer
from exegete.scorers.example_embedding import ExampleEmbeddingScorer
from exegete.scorers.judge import Items
from exegete.scorers.surprisal import SurprisalScorer
from exegete.testing.embedders import SimulatedEmbedder
from exegete.testing.instruments import Instrument, Known, OnWindows, Scores, asked_cells, scored
from exegete.testing.readers import SimulatedReader
from exegete.testing.responses import Cells, drawn_auroc, expected_auroc, inclusion
from exegete.testing.settings import Round, Setting
from exegete.testing.worlds import SHOWN
from exegete.types import Array

AUROC: Final = "auroc"


class Ranked(OnWindows, ABC):
    """An instrument that puts evidence on every test window: the AUROC of that."""

    @property
    def headline(self) -> str:
        """AUROC."""
        return AUROC

    def cells(self, setting: Setting, rungs: Sequence[str]) -> list[Cells]:
        """Return the strata of all windows."""
        drawn, whole = (setting.view(whole=w).examples.part("test") for w in (False, True))
        asked = [Asked.whole(windows, Items(tokens=windows.tokens)) for windows in (drawn, whole)]
        return asked_cells(setting, asked[0], asked[1], rungs)

    def expected(self, cells: Sequence[Cells]) -> Array:
        """Return the true AUROC of each rung."""
        return expected_auroc(cells, self.evidence)

    def drawn(self, cells: Sequence[Cells], draws: int, rng: np.random.Generator) -> Array:
        """Return simulated AUROCs."""
        return drawn_auroc(cells, self.evidence, draws, rng)


@final
class Surprised(Ranked):
    """Surprisal by a simulated reader."""

    @property
    def name(self) -> str:
        """``surprisal``."""
        return "surprisal"

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated reader."""
        reader = SimulatedReader(made.predicates(rungs), self.evidence, seed=seed)
        items = [(s.explanation(rung), replace(s.view(), reader=reader)) for s in made.settings for rung in rungs]
        return scored(SurprisalScorer(controls="none"), items)


@final
class Embedded(Ranked):
    """Embedding by a simulated embedder."""

    @property
    def name(self) -> str:
        """``embedding``."""
        return "embedding"

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated embedder."""
        claims = {c.text: c for s in made.settings for c in map(s.claim, rungs)}
        fits = np.array([claim.anywhere for claim in claims.values()]).T
        embedder = SimulatedEmbedder(list(claims), made.frame.texts, fits, self.evidence, seed=seed)
        items = [(s.explanation(rung), s.view()) for s in made.settings for rung in rungs]
        return scored(EmbeddingScorer(embedder=embedder, controls="none"), items)


@final
class ExampleEmbedded(Instrument):
    """Example embedding by a simulated embedder, which sees in texts what planted latents fire on.

    The embedder is the same in every draw, so the true score is that over all test windows.
    """

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self._made: tuple[Round, SimulatedEmbedder] | None = None

    @property
    def name(self) -> str:
        """``example_embedding``."""
        return "example_embedding"

    @property
    def headline(self) -> str:
        """AUROC."""
        return AUROC

    @property
    def explained(self) -> bool:
        """It reads no explanation."""
        return False

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the AUROC over the frame, strata mixed as they were drawn; nothing is predicted of its order."""
        embedder = self._embedder(setting.round)
        shown = setting.drawn.part("train", fires=True)[:SHOWN]
        mean = embedder.embed(setting.round.world.table.decode_rows(shown.tokens)).mean(axis=0, dtype=np.float64)
        drawn, whole = setting.drawn.part("test"), setting.whole.part("test")
        texts = setting.round.world.table.decode_rows(whole.tokens)
        near = embedder.embed(texts).astype(np.float64) @ mean
        weight = np.zeros(len(whole))
        for fires in (True, False):
            for stratum in np.unique(drawn.stratum[drawn.fires == fires]):
                here = (whole.stratum == stratum) & (whole.fires == fires)
                count = int(((drawn.stratum == stratum) & (drawn.fires == fires)).sum())
                weight[here] = inclusion(whole.document[here], count)[0]
        expected = np.array([weighted_auroc(near, whole.fires, weight)])
        return Known(expected=expected, drawn=expected[None])

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with the simulated embedder."""
        items = [(s.explanation(rungs[0]), s.view()) for s in made.settings]
        return scored(ExampleEmbeddingScorer(embedder=self._embedder(made), shown=SHOWN, donors=0), items)

    def _embedder(self, made: Round) -> SimulatedEmbedder:
        if self._made is None or self._made[0] is not made:
            texts, tokens = list(made.frame.places), made.frame.tokens[list(made.frame.places.values())]
            shown: dict[str, Array] = {}
            for setting in made.settings:
                windows = setting.drawn.part("train", fires=True)[:SHOWN]
                shown |= dict(zip(made.world.table.decode_rows(windows.tokens), windows.tokens, strict=True))
            fresh = [text for text in shown if text not in made.frame.places]
            every = np.concatenate([tokens, *(shown[text][None] for text in fresh)])
            programs = [latent.program for latent in made.world.latents]
            fits = made.world.fitting(programs, every)
            names = [str(latent.index) for latent in made.world.latents]
            embedder = SimulatedEmbedder(names, [*texts, *fresh], fits.T, self.evidence, seed=made.seed)
            self._made = made, embedder
        return self._made[1]


def weighted_auroc(values: Array, fires: Array, weight: Array) -> float:
    """Return the chance that a firing window's value exceeds a silent one's, each drawn by its weight; ties half."""
    order = np.argsort(values, kind="stable")
    ranked, firing, mass = values[order], fires[order], weight[order]
    silent = np.where(firing, 0.0, mass)
    upto = np.concatenate([[0.0], np.cumsum(silent)])
    below = upto[np.searchsorted(ranked, ranked, side="left")]
    through = upto[np.searchsorted(ranked, ranked, side="right")]
    own = np.where(firing, mass, 0.0)
    return float(own @ (below + through) / 2.0 / (own.sum() * silent.sum()))
