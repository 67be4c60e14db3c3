"""Fuzzing: are exactly the right tokens marked? (arXiv 2410.13928, section 3.3.2).

Firing windows carry their true marks; silent windows carry the whole mark pattern of a firing one, so that neither the
number of marks nor their places tell the two apart. (The released code marked random places, the same ones in every
window of a latent.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from exegete.errors import ConfigError
from exegete.examples.render import marks, transplant_marks
from exegete.llm.protocol import Kind
from exegete.scorers.judge import Item
from exegete.scorers.judged import JudgeChoice, JudgedScorer
from exegete.streams import stream
from exegete.types import Example
from exegete.views import LatentView

LLM_THRESHOLD = 0.3
RULE_THRESHOLD = 0.0


@final
class FuzzingScorer(JudgedScorer):
    """Shows test windows with marks; positives are marked where the latent fires.

    ``threshold`` is the one threshold of this scorer: true marks and transplanted ones stand where an activation
    exceeds that share of its window's maximum. Left open, it is the paper's 0.3 for a language model, which is shown
    explanations written from such marks, and 0 (wherever the latent fires) for the executed rule, whose target that is.
    """

    def __init__(self, *, threshold: float | None = None, judge: JudgeChoice = "auto", per_request: int = 5) -> None:
        super().__init__(judge=judge, per_request=per_request)
        if threshold is not None and not 0.0 <= threshold < 1.0:
            raise ConfigError(f"threshold is a share of a window's maximum, at least 0 and below 1, got {threshold}")
        self._threshold = threshold

    @property
    def kind(self) -> Kind:
        """``fuzzing``."""
        return "fuzzing"

    def _args(self) -> dict[str, Any]:
        return {"threshold": self._threshold, **super()._args()}

    def items(self, view: LatentView, examples: Sequence[Example]) -> list[Item]:
        """Return firing windows with their marks, silent ones with marks taken from firing ones."""
        firing = [e for e in examples if e.fires]
        silent = [e for e in examples if not e.fires]
        rng = stream(view.examples.seed, view.latent, "fuzzing", "marks")
        threshold = self._threshold
        if threshold is None:
            threshold = RULE_THRESHOLD if self.executes(view) else LLM_THRESHOLD
        moved = iter(transplant_marks(silent, firing, rng, threshold) if silent else ())
        return [Item(tokens=e.tokens, marks=marks(e, threshold) if e.fires else next(moved)) for e in examples]
