"""Fuzzing: are exactly the right tokens marked? (arXiv 2410.13928, section 3.3.2).

Firing windows carry their true marks; silent windows carry the whole mark pattern of a firing one that begins at much
the same place in its row, so that neither the number of marks nor their places tell the two apart. (The released code
marked random places, the same ones in every window of a latent.)
"""

from __future__ import annotations

from typing import Any, final

from exegete.errors import ConfigError
from exegete.examples.render import active_tokens, transplant_marks
from exegete.llm.protocol import Kind
from exegete.scorers.judge import MAX_TOKENS, Items
from exegete.scorers.judged import JudgeChoice, JudgedScorer
from exegete.streams import stream
from exegete.types import Windows
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

    def __init__(
        self,
        *,
        threshold: float | None = None,
        judge: JudgeChoice = "auto",
        per_request: int = 5,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        super().__init__(judge=judge, per_request=per_request, probabilities=probabilities, max_tokens=max_tokens)
        if threshold is not None and not 0.0 <= threshold < 1.0:
            raise ConfigError(f"threshold is a share of a window's maximum, at least 0 and below 1, got {threshold}")
        self._threshold = threshold

    @property
    def kind(self) -> Kind:
        """``fuzzing``."""
        return "fuzzing"

    def _args(self) -> dict[str, Any]:
        return {"threshold": self._threshold, **super()._args()}

    def items(self, view: LatentView, examples: Windows) -> Items:
        """Return firing windows with their marks, silent ones with marks taken from firing ones."""
        threshold = self._threshold
        if threshold is None:
            threshold = RULE_THRESHOLD if self.executes(view) else LLM_THRESHOLD
        shown, fires = active_tokens(examples.activations, threshold), examples.fires
        if not fires.all():
            rng = stream(view.examples.seed, view.latent, "fuzzing", "marks")
            hidden = view.tokens.is_special[examples.tokens[~fires]]
            starts = examples.start
            shown[~fires] = transplant_marks(shown[fires], starts[fires], starts[~fires], rng, hidden)
        return Items(tokens=examples.tokens, marks=shown)
