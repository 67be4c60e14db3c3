"""Detection: does the explanation fit the window at all? (arXiv 2410.13928, section 3.3.1).

The released code's prompt asks of detection what fuzzing asks; ours asks whether the window fits.
"""

from __future__ import annotations

from typing import final

from exegete.llm.protocol import Kind
from exegete.scorers.asked import Asked
from exegete.scorers.judge import Items
from exegete.scorers.judged import JudgedScorer
from exegete.views import LatentView


@final
class DetectionScorer(JudgedScorer):
    """Shows test windows without marks; positives are those in which the latent fires anywhere."""

    @property
    def kind(self) -> Kind:
        """``detection``."""
        return "detection"

    def units(self, view: LatentView) -> Asked:
        """Return the windows as they are."""
        examples = view.examples.part("test")
        return Asked.whole(examples, Items(tokens=examples.tokens))
