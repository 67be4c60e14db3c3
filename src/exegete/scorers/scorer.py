"""What every scorer is: an explanation and its latent's view in, judgements and scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from exegete.registry import Registry
from exegete.types import Explanation, Judgement, Score
from exegete.views import LatentView, Need


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a scorer made of one explanation: scores (its null's among them), and judgements by control."""

    explanation: Explanation
    scores: tuple[Score, ...]
    judgements: Mapping[str, tuple[Judgement, ...]]


class Scorer(ABC):
    """Measures how good an explanation is. What fails is counted in the score, never filled in."""

    @property
    @abstractmethod
    def spec(self) -> Mapping[str, Any]:
        """``{"name": …, "args": {…}}``, from which the registry re-creates this scorer."""

    @property
    def prompt_hash(self) -> str:
        """Identity of the prompt it puts to a language model, empty without one: scores rest on it."""
        return ""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Which parts of a view it uses; what is missing is refused before work starts."""

    def asks(self, view: LatentView) -> bool:
        """Whether scoring an explanation of this view would send requests to its language model."""
        return view.llm is not None and "llm" in self.needs

    @abstractmethod
    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, in any order, as each is ready."""


scorers: Registry[Scorer] = Registry(
    "scorer",
    {
        "detection": "exegete.scorers.detection:DetectionScorer",
        "fuzzing": "exegete.scorers.fuzzing:FuzzingScorer",
        "execution": "exegete.scorers.execution:ExecutionScorer",
    },
)
