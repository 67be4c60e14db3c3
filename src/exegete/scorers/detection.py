"""Detection: does the explanation fit the window at all? (arXiv 2410.13928, section 3.3.1)."""

from __future__ import annotations

from typing import final

from exegete.llm.protocol import Kind
from exegete.scorers.judge import Items
from exegete.scorers.judged import JudgedScorer
from exegete.types import Windows
from exegete.views import LatentView


@final
class DetectionScorer(JudgedScorer):
    """Shows test windows without marks; positives are those in which the latent fires anywhere."""

    @property
    def kind(self) -> Kind:
        """``detection``."""
        return "detection"

    def items(self, view: LatentView, examples: Windows) -> Items:
        """Return the windows as they are."""
        return Items(tokens=examples.tokens)
