"""Scorers with simulated judges, and what each of them must say of a latent: its true score, and how that scatters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.llm.scripted import Evidence, SimulatedJudge
from exegete.scorers.asked import Asked
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.scorers.judged import JudgedScorer
from exegete.scorers.scorer import Scorer
from exegete.testing.responses import (
    Cells,
    cells_of,
    drawn_accuracy,
    drawn_auroc,
    expected_accuracy,
    expected_auroc,
)
from exegete.testing.settings import Round, Setting
from exegete.types import Array, Explanation, Score
from exegete.views import LatentView

Scores = dict[str, Score]
GAP: Final = 0.08


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a headline score beforehand: its expectation for each rung [rungs], and simulated draws of it.

    ``drawn`` is [draws, rungs].
    """

    expected: Array
    drawn: Array


class Instrument(ABC):
    """A scorer whose judge's errors are known, so that its true scores are."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    @property
    @abstractmethod
    def name(self) -> str:
        """Under which name its scores stand."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """Its first metric, which ladders are ordered by."""

    @property
    def gap(self) -> float:
        """How far apart two true scores are that have to be told apart: 0.08, as the acceptance of scorers says."""
        return GAP

    @property
    def explained(self) -> bool:
        """Whether its scores depend on the explanation, so that there is a ladder to order."""
        return True

    @property
    def every(self) -> int:
        """Of how many latents one is examined: more than one for what takes long."""
        return 1

    @property
    def blind(self) -> Mapping[str, str]:
        """Why its headline score need not fall, by what is done to an explanation; nothing where it must."""
        return {}

    def wanted(self, setting: Setting) -> int:
        """Return how many windows of each class are drawn of a latent, so that n of each class are judged."""
        return setting.round.n

    @abstractmethod
    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the true headline score of each rung over the frame, and simulated estimates of it."""

    @abstractmethod
    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer over all latents and rungs; return the scores without nulls by metric."""


class OnWindows(Instrument, ABC):
    """An instrument to which an explanation is the windows that it fits."""

    @abstractmethod
    def cells(self, setting: Setting, rungs: Sequence[str]) -> list[Cells]:
        """Return the strata of what it asks about."""

    @abstractmethod
    def expected(self, cells: Sequence[Cells]) -> Array:
        """Return the true score of each rung."""

    @abstractmethod
    def drawn(self, cells: Sequence[Cells], draws: int, rng: np.random.Generator) -> Array:
        """Return simulated estimates [draws, rungs]."""

    def known(self, setting: Setting, rungs: Sequence[str], draws: int, rng: np.random.Generator) -> Known:
        """Return the true score of each rung over the frame, and simulated estimates."""
        cells = self.cells(setting, rungs)
        return Known(expected=self.expected(cells), drawn=self.drawn(cells, draws, rng))


@final
class Judged(OnWindows):
    """Detection and fuzzing by a simulated judge: balanced accuracy, or the AUROC of its P(yes).

    ``halved`` is for the scorer that makes both classes of the firing windows.
    """

    def __init__(
        self, scorer: JudgedScorer, evidence: Evidence, *, probabilities: bool = False, halved: bool = False
    ) -> None:
        super().__init__(evidence)
        self._scorer, self._probabilities, self._halved = scorer, probabilities, halved

    @property
    def name(self) -> str:
        """The scorer's, with what is read where it is P(yes)."""
        return f"{self._scorer.label} P(yes)" if self._probabilities else self._scorer.label

    @property
    def headline(self) -> str:
        """Balanced accuracy, or AUROC."""
        return "auroc" if self._probabilities else "balanced_accuracy"

    @property
    def blind(self) -> Mapping[str, str]:
        """Of windows that fire nothing is to be seen of what is wrong elsewhere."""
        return {"extra": _FIRING_ALONE} if self._halved else {}

    def wanted(self, setting: Setting) -> int:
        """Return n, or twice as many where windows are halved."""
        return setting.round.n * (2 if self._halved else 1)

    def cells(self, setting: Setting, rungs: Sequence[str]) -> list[Cells]:
        """Return the strata of the questions that could be asked, and how many were drawn of each."""
        judge = SimulatedJudge()  # never asked: fuzzing marks for it other tokens than for an executed rule
        drawn, whole = (self._scorer.units(replace(setting.view(whole=w), llm=judge)) for w in (False, True))
        return asked_cells(setting, drawn, whole, rungs)

    def expected(self, cells: Sequence[Cells]) -> Array:
        """Return the true score of each rung."""
        return (expected_auroc if self._probabilities else expected_accuracy)(cells, self.evidence)

    def drawn(self, cells: Sequence[Cells], draws: int, rng: np.random.Generator) -> Array:
        """Return simulated estimates."""
        return (drawn_auroc if self._probabilities else drawn_accuracy)(cells, self.evidence, draws, rng)

    def measured(self, made: Round, rungs: Sequence[str], seed: int) -> dict[tuple[int, str], Scores]:
        """Run the scorer with a simulated judge."""
        judge = simulated_judge(made, rungs, self.evidence, seed)
        items = [(s.explanation(rung), replace(s.view(), llm=judge)) for s in made.settings for rung in rungs]
        return scored(self._scorer, items)


def simulated_judge(made: Round, rungs: Sequence[str], evidence: Evidence, seed: int) -> SimulatedJudge:
    """Return a judge with these errors that understands these rungs of all latents."""
    return SimulatedJudge(
        true_positive_rate=evidence.true_positive_rate,
        false_positive_rate=evidence.false_positive_rate,
        calibration=evidence.calibration,
        seed=seed,
        predicates=made.predicates(rungs),
    )


def scored(scorer: Scorer, items: Sequence[tuple[Explanation, LatentView]]) -> dict[tuple[int, str], Scores]:
    """Return the scores without nulls of explanations, by latent and rung, then by metric."""
    return {
        (found.explanation.latent.index, str(found.explanation.explainer["args"]["rung"])): {
            score.metric: score for score in found.scores if score.control == "none"
        }
        for found in scorer.score(items)
    }


def asked_cells(setting: Setting, drawn: Asked, whole: Asked, rungs: Sequence[str]) -> list[Cells]:
    """Return the strata of all that could be asked, of which so many questions were drawn as were asked."""
    kinds, counts = np.unique(np.stack([drawn.examples.stratum, drawn.truth]), axis=1, return_counts=True)
    named = []
    for stratum, truth, n in zip(*kinds.tolist(), counts.tolist(), strict=True):
        # Where a coin decides which questions are true, a small frame may hold fewer such than were drawn.
        most = int(((whole.examples.stratum == stratum) & (whole.truth == bool(truth))).sum())
        named.append((stratum, bool(truth), min(n, most)))
    fits = setting.fits(whole.examples, whole.items, rungs)
    windows = whole.examples
    return cells_of(fits, windows.stratum, whole.truth, windows.document, [cell for cell in named if cell[2]])


def detection(evidence: Evidence) -> list[Instrument]:
    """Return detection by verdicts and by P(yes)."""
    plain, asking = DetectionScorer(controls="none"), DetectionScorer(controls="none", probabilities=True)
    return [Judged(plain, evidence), Judged(asking, evidence, probabilities=True)]


def fuzzing(evidence: Evidence) -> list[Instrument]:
    """Return fuzzing of both kinds."""
    plain, active = FuzzingScorer(controls="none"), FuzzingScorer(controls="none", kind="active")
    return [Judged(plain, evidence), Judged(active, evidence, halved=True)]


_FIRING_ALONE = "it shows firing windows alone, and what was added lies elsewhere"
