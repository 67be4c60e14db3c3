"""What every scorer is: an explanation and its latent's view in, judgements and scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.registry import Registry
from exegete.types import Explanation, Judgement, LLMRequest, Score
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a scorer made of one explanation: scores (its nulls' among them), and judgements by control.

    ``detail`` is whatever else it found, as JSON data (strengths, generated texts, tokens). ``reason`` says why an
    explanation that could have had a score has none.
    """

    explanation: Explanation
    scores: tuple[Score, ...]
    judgements: Mapping[str, tuple[Judgement, ...]]
    detail: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class Scorer(ABC):
    """Measures how good an explanation is. What fails is counted in the score, never filled in."""

    @property
    @abstractmethod
    def spec(self) -> Mapping[str, Any]:
        """``{"name": …, "args": {…}}``, from which the registry re-creates this scorer."""

    @property
    def label(self) -> str:
        """Under which name its scores stand: its own, or that of a variant that measures something else."""
        return str(self.spec["name"])

    @property
    def prompt_hash(self) -> str:
        """Identity of the prompt it puts to a language model, empty without one: scores rest on it."""
        return ""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Which parts of a view it uses; what is missing is refused before work starts."""

    def check(self) -> None:  # noqa: B027 - most are made from nothing that could be missing
        """Raise InputError where what it is made from cannot be had: an extra that is not installed, a model."""

    def asks(self, view: LatentView) -> bool:
        """Whether scoring an explanation of this view would send requests to its language model."""
        return view.llm is not None and "llm" in self.needs

    def judged_by(self, llm: LLMClient | None) -> str:
        """Who judges where this language model is there: it, ``rule``, ``reader``, ``subject``, or an embedder."""
        return llm.name if llm is not None and "llm" in self.needs else "rule"

    def planned(self, explanation: Explanation, view: LatentView) -> Sequence[LLMRequest] | None:
        """Return the requests that scoring would send; None where scoring with a client that counts tells.

        For scorers that run a subject, which no plan loads.
        """
        return None

    def plumbing(self, view: LatentView) -> bool:
        """Whether what it finds only checks that the pipeline works: a simulated judge, or one that knows no language.

        So it is of a reader too. It is asked of every view, so it takes no time.
        """
        judged = view.llm is not None and not view.llm.natural and self.asks(view)
        return judged or ("reader" in self.needs and view.reader is not None and not view.reader.natural)

    @abstractmethod
    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, in any order, as each is ready."""


scorers: Registry[Scorer] = Registry(
    "scorer",
    {
        "detection": "exegete.scorers.detection:DetectionScorer",
        "fuzzing": "exegete.scorers.fuzzing:FuzzingScorer",
        "execution": "exegete.scorers.execution:ExecutionScorer",
        "discrimination": "exegete.scorers.discrimination:DiscriminationScorer",
        "surprisal": "exegete.scorers.surprisal:SurprisalScorer",
        "embedding": "exegete.scorers.embedding:EmbeddingScorer",
        "example_embedding": "exegete.scorers.example_embedding:ExampleEmbeddingScorer",
        "simulation": "exegete.scorers.simulation:SimulationScorer",
        "intruder": "exegete.scorers.intruder:IntruderScorer",
        "generation": "exegete.scorers.generation:GenerationScorer",
        "intervention": "exegete.scorers.intervention:InterventionScorer",
    },
)


def make_scorer(text: str, config: RunConfig) -> Scorer:
    """Return the scorer that a configuration names, with its settings where the name says nothing else."""
    wanted = {f.name: getattr(config.scoring, f.name) for f in fields(config.scoring)}
    return scorers.from_text(text, wanted)
