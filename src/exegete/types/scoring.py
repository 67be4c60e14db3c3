"""What explainers and scorers give: explanations, judgements, scores, and what dropped out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from exegete.types.common import ExplanationStatus, JudgementStatus, require
from exegete.types.firings import LatentId


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What an explainer said of a latent.

    ``text`` is None unless ``status`` is ``ok``; ``explainer`` is the spec ``{"name", "args"}`` that re-creates it;
    ``program`` is a rule's executable form as JSON data, absent for free text; ``examples`` names the train windows
    shown as (row, start); ``detail`` holds whatever else the explainer measured.
    """

    latent: LatentId
    text: str | None
    status: ExplanationStatus
    explainer: Mapping[str, Any]
    prompt_hash: str = ""
    examples: tuple[tuple[int, int], ...] = ()
    program: Any | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            (self.text is not None) == (self.status == "ok"),
            f"{self.latent}: an explanation has a text exactly when its status is ok, got {self.status}",
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One verdict on one unit: a window, a token of one, a continuation, a generated text; its scorer says which.

    ``row`` and ``start`` name the unit and ``document`` the text it is of; ``stratum`` is what it was drawn from.
    ``truth`` is what the model did; ``prediction`` what the judge said, ``probability`` its P(yes) where it gave one,
    and ``value`` a verdict that is a number (a cosine, nats, an expected activation). A prediction or a value there is
    exactly when ``status`` is ``ok``. ``activation`` is the latent's strongest in the unit; the draw took the unit
    with ``inclusion_probability``, and it stands for ``multiplicity`` units, its near-duplicates and itself.
    """

    row: int
    start: int
    document: int
    stratum: str
    truth: bool
    prediction: bool | None = None
    probability: float | None = None
    value: float | None = None
    status: JudgementStatus = "ok"
    activation: float = 0.0
    inclusion_probability: float = 1.0
    multiplicity: int = 1

    def __post_init__(self) -> None:
        said = self.prediction is not None or self.value is not None
        require(said == (self.status == "ok"), f"a judgement says something exactly when ok, got {self.status}")

    @property
    def weight(self) -> float:
        """How many units of the frame it stands for, the draw included."""
        return self.multiplicity / self.inclusion_probability


FLAGS: tuple[str, ...] = ("few_documents", "few_donors", "not_identified", "plumbing")
"""What a score may be marked with: its firing windows, or its silent ones, are of fewer than 20 documents (only a
class that the metric is of counts); too few donors for an interval; the judgements do not pin it down (``low`` is still
a bound); it comes from a simulated judge or a reader that was not trained on natural language, and is a check that the
pipeline works, no measurement."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over judgements or over held-out tokens, with its 95 % interval and counts.

    ``value``, ``low`` and ``high`` are NaN when nothing could be scored. ``floor`` and ``ceiling`` hold the interval
    whatever had failed might have said, at its worst and at its best (``low`` and ``high`` where nothing failed).
    ``control`` is ``none`` or the name of the null (``other_latent``: the same judge given other latents'
    explanations). ``value`` of a control is the mean over its donors. ``explanation`` is the database id, None before
    it is stored. ``n_documents`` is the number of documents behind it, 0 where that was not counted; ``flags`` are of
    FLAGS; ``n_needed`` judgements would pin down what is not identified.
    """

    latent: LatentId
    scorer: str
    metric: str
    value: float
    low: float
    high: float
    method: str
    n_total: int
    n_scored: int
    n_failed: int
    control: str = "none"
    explanation: int | None = None
    floor: float = math.nan
    ceiling: float = math.nan
    n_documents: int = 0
    flags: tuple[str, ...] = ()
    n_needed: int | None = None

    def __post_init__(self) -> None:
        require(self.n_scored + self.n_failed == self.n_total, "n_scored and n_failed must add up to n_total")
        require(set(self.flags) <= set(FLAGS), f"flags are of {', '.join(FLAGS)}, got {self.flags}")
        object.__setattr__(self, "floor", self.low if math.isnan(self.floor) else min(self.floor, self.low))
        object.__setattr__(self, "ceiling", self.high if math.isnan(self.ceiling) else max(self.ceiling, self.high))
        if not math.isnan(self.value):
            require(self.low <= self.value <= self.high, f"interval {self.low}…{self.high} leaves out {self.value}")

    @property
    def plumbing(self) -> bool:
        """Whether it only checks that the pipeline works."""
        return "plumbing" in self.flags


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A latent that dropped out of a stage: why, what it had and what it would have needed."""

    latent: LatentId
    stage: str
    reason: str
    have: int
    need: int
