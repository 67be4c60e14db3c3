"""Embedding: is the explanation nearer to firing windows than to silent ones? (arXiv 2410.13928, 3.3.4, App. D.4).

The explanation is the query, windows are the documents; the score is the AUROC of their cosine. Windows carry no marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exegete.examples.render import plain_texts
from exegete.examples.similar import DEFAULT_MODEL
from exegete.scorers.controls import OTHER_LATENT, by_control, named_controls, needs_of, panel
from exegete.scorers.embedders import Embedder, embedder_of
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.valued import value_judgements, value_scores
from exegete.types import Array, Explanation, Windows
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

Item = tuple[Explanation, LatentView]


def cosines(embedder: Embedder, query: Array, windows: Windows, view: LatentView) -> Array:
    """Return the cosine of every window's text to a unit vector [d], float64 [n]."""
    documents = embedder.embed(plain_texts(windows.tokens, view.tokens))
    found: Array = documents.astype(np.float64) @ query.astype(np.float64)
    return found


@final
class EmbeddingScorer(Scorer):
    """Compares the explanation with every test window, and so each control; judgements hold cosines.

    ``embedder`` names a sentence-transformers model (extra ``embed``); ``instruction`` is what stands before the
    explanation: by default the paper's for models that take instructions, nothing for others, such as all-MiniLM.
    """

    def __init__(
        self,
        *,
        embedder: str | Embedder = DEFAULT_MODEL,
        instruction: str | None = None,
        controls: str | Sequence[str] = (OTHER_LATENT,),
    ) -> None:
        self._embedder, self._instruction = embedder_of(embedder, instruction), instruction
        self._controls = named_controls(controls)

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {
            "embedder": self._embedder.name,
            "instruction": self._instruction,
            "controls": list(self._controls),
        }
        return {"name": "embedding", "args": args}

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, and donors for their null."""
        needed: set[Need] = {"examples"}
        return frozenset(needed | needs_of(self._controls))

    def check(self) -> None:
        """Load the embedder. Raises MissingExtraError or NotFoundError where it cannot be had."""
        self._embedder.check()

    def judged_by(self, llm: LLMClient | None) -> str:
        """The embedder."""
        return self._embedder.name

    def plumbing(self, view: LatentView) -> bool:
        """Whether the embedder knows no language."""
        return not self._embedder.natural

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item; no scores where there is no explanation."""
        for explanation, view in items:
            if explanation.status != "ok":
                yield Scoring(explanation=explanation, scores=(), judgements={})
            else:
                yield self._scoring(explanation, view)

    def _scoring(self, explanation: Explanation, view: LatentView) -> Scoring:
        windows = view.examples.part("test")
        others = panel(explanation, view, self._controls)
        own, *rest = (self._cosines(e, windows, view) for e in (explanation, *(e for _, e in others)))
        controls = by_control(self._controls, others, rest)
        judged = {
            name: tuple(j for v in values for j in value_judgements(windows, v)) for name, values in controls.items()
        }
        return Scoring(
            explanation=explanation,
            scores=value_scores(self.label, view, windows, own, controls),
            judgements={"none": value_judgements(windows, own), **judged},
            detail={"embedder": self._embedder.name},
        )

    def _cosines(self, explanation: Explanation, windows: Windows, view: LatentView) -> Array:
        (query,) = self._embedder.embed([str(explanation.text)], query=True)
        return cosines(self._embedder, query, windows, view)
