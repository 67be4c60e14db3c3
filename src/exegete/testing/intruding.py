"""The intruder test with a simulated judge who knows what each latent fires on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, final

import numpy as np

from exegete.llm.scripted import Evidence, SimulatedJudge
from exegete.scorers.intruder import IntruderScorer
from exegete.scorers.intruder_trials import Kind, deal, marked
from exegete.scorers.judge import Items
from exegete.testing.instruments import Instrument, Known, Scores, scored
from exegete.testing.settings import Round, Setting, predicate_of
from exegete.types import Array

_GRID: Final = 4001
_THRESHOLD: Final = 0.3
_SHOWN: Final = 5


@final
class Intruding(Instrument):
    """One kind of intruder: accuracy. What is expected is so of the trials as they were dealt."""

    def __init__(self, evidence: Evidence, kind: Kind) -> None:
        super().__init__(evidence)
        self._kind: Kind = kind
        self._scorer = IntruderScorer(kind=kind, n=_SHOWN, judge="llm", threshold=_THRESHOLD)

    @property
    def name(self) -> str:
        """The scorer's label."""
        return self._scorer.label

    @property
    def headline(self) -> str:
        """Accuracy."""
        return "accuracy"

    @property
    def explained(self) -> bool:
        """It reads no explanation."""
        return False

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the mean chance, over the trials, that the intruder has the least evidence of belonging."""
        view = setting.view()
        windows = view.examples.part("test")
        marks = marked(view, windows, _THRESHOLD)
        fits = setting.fits(windows, Items(tokens=windows.tokens, marks=marks), ("exact",))[0]
        trials = deal(view, windows, self._kind, _SHOWN)
        chances = [
            named_chance(self.evidence, bool(fits[t.intruder]), fits[[p for p in t.places if p != t.intruder]])
            for t in trials
        ]
        expected = np.array([np.mean(chances) if chances else np.nan])
        return Known(expected=expected, drawn=expected[None])

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer, each latent before a judge who looks for what it fires on."""
        items = []
        for setting in made.settings:
            judge = SimulatedJudge(
                true_positive_rate=self.evidence.true_positive_rate,
                false_positive_rate=self.evidence.false_positive_rate,
                seed=seed,
                concept=predicate_of(setting.claim("exact"), made.frame),
            )
            items.append((setting.explanation(rungs[0]), replace(setting.view(), llm=judge)))
        return scored(self._scorer, items)


def named_chance(evidence: Evidence, intruder: bool, others: Array) -> float:
    """Return the chance that the intruder's evidence is the least, given whether it fits, and whether each other does.

    It is the integral over the intruder's evidence of the chances that every other's exceeds it.
    """
    from scipy.special import ndtr

    points = np.linspace(-8.0, 8.0, _GRID)
    density = np.exp(-points * points / 2.0)
    at = points + evidence.mean(intruder)
    above = np.ones_like(points)
    for fits in others.tolist():
        above *= ndtr(evidence.mean(fits) - at)
    return float(density @ above / density.sum())
