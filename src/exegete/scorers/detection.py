"""Detection: does the explanation fit the window at all? (arXiv 2410.13928, section 3.3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from exegete.llm.protocol import Kind
from exegete.scorers.judge import Item
from exegete.scorers.judged import JudgedScorer
from exegete.types import Example
from exegete.views import LatentView


@final
class DetectionScorer(JudgedScorer):
    """Shows test windows without marks; positives are those in which the latent fires anywhere."""

    @property
    def kind(self) -> Kind:
        """``detection``."""
        return "detection"

    def items(self, view: LatentView, examples: Sequence[Example]) -> list[Item]:
        """Return the windows as they are."""
        return [Item(tokens=example.tokens) for example in examples]
