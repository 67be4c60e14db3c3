"""Every type that crosses a boundary between parts: frozen, slotted, checked on construction, numpy arrays.

Shapes are given in brackets. None of these types refers to torch, so that selecting, explaining, scoring and
reporting start without it.
"""

from exegete.types.calls import LLMReply, LLMRequest, TokenLogprob
from exegete.types.common import SPLITS, STRATA, Array, ExplanationStatus, JudgementStatus, Side, Split
from exegete.types.examples import Example, ExampleSet, Windows
from exegete.types.firings import Firings, LatentId, LatentStats, Rows, SparseCode
from exegete.types.scoring import FLAGS, Explanation, Judgement, Score, Skipped

__all__ = [
    "FLAGS",
    "SPLITS",
    "STRATA",
    "Array",
    "Example",
    "ExampleSet",
    "Explanation",
    "ExplanationStatus",
    "Firings",
    "Judgement",
    "JudgementStatus",
    "LLMReply",
    "LLMRequest",
    "LatentId",
    "LatentStats",
    "Rows",
    "Score",
    "Side",
    "Skipped",
    "SparseCode",
    "Split",
    "TokenLogprob",
    "Windows",
]
