"""What detection and fuzzing share: items in an order that carries no label, a judge, and scores beside their null.

The null of a score is the same judge on the same items in the same order, given the explanations of other latents that
fire about as often. Its value is the mean over these donors, its interval Student's t over them.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from exegete import metrics
from exegete.errors import ConfigError, InputError
from exegete.llm.client import run_limited
from exegete.llm.protocol import Kind
from exegete.scorers.judge import Item, Judge, LLMJudge, RuleJudge, Verdict
from exegete.scorers.scorer import Scorer, Scoring
from exegete.streams import stream
from exegete.types import Array, Example, Explanation, Judgement, LatentId, Score
from exegete.views import LatentView, Need

JudgeChoice = Literal["auto", "rule", "llm"]
CONTROL = "other_latent"
MIN_DONORS = 2
METRICS = ("balanced_accuracy", "sensitivity", "specificity", "f1")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An item and the example behind it, whose label the judge does not see."""

    example: Example
    item: Item


class JudgedScorer(Scorer, ABC):
    """Asks a judge about every test window, firing or silent.

    ``judge`` is ``rule`` (the explanation's program, executed), ``llm``, or ``auto``: the language model where there is
    one, else the rule. ``per_request`` examples go into one request to a language model.
    """

    def __init__(self, *, judge: JudgeChoice = "auto", per_request: int = 5) -> None:
        if judge not in ("auto", "rule", "llm"):
            raise ConfigError(f"judge is one of auto, rule, llm, got {judge!r}")
        if per_request < 1:
            raise ConfigError(f"per_request is at least 1, got {per_request}")
        self._judge: JudgeChoice = judge
        self._per_request = per_request

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which question the judge is asked."""

    @abstractmethod
    def items(self, view: LatentView, examples: Sequence[Example]) -> list[Item]:
        """Return what the judge is shown of each example."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        return {"name": self.kind, "args": self._args()}

    def _args(self) -> dict[str, Any]:
        return {"judge": self._judge, "per_request": self._per_request}

    @property
    def needs(self) -> frozenset[Need]:
        """Examples and donors, and a language model when only that may judge."""
        needed: set[Need] = {"examples", "donors"}
        return frozenset(needed | {"llm"} if self._judge == "llm" else needed)

    def questions(self, view: LatentView) -> list[Question]:
        """Return the test windows of a latent in a seeded random order."""
        examples = view.examples.part("test")
        items = self.items(view, examples)
        order = stream(view.examples.seed, view.latent, self.kind, "order").permutation(len(examples))
        return [Question(example=examples[i], item=items[i]) for i in order]

    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready; no scores where there is no explanation to judge.

        Raises InputError when an explanation without a program is to be judged without a language model, LLMError when
        the language model cannot be used at all.
        """
        gate = asyncio.Semaphore(concurrency)
        clients = {id(view.llm): view.llm for _, view in items if view.llm is not None}

        async def work(item: tuple[Explanation, LatentView]) -> Scoring:
            explanation, view = item
            if explanation.status != "ok":
                return Scoring(explanation=explanation, scores=(), judgements={})
            return await self._scoring(explanation, view, self._choose(explanation, view, gate))

        async def finish() -> None:
            for client in clients.values():
                await client.close()

        for _, scoring in run_limited(items, work, concurrency, finish):
            yield scoring

    def executes(self, view: LatentView) -> bool:
        """Say whether the judge of a view's explanation is its own program, executed."""
        return self._judge == "rule" or (self._judge == "auto" and view.llm is None)

    def _choose(self, explanation: Explanation, view: LatentView, gate: asyncio.Semaphore) -> Judge:
        if not self.executes(view):
            return LLMJudge(view.require_llm(), self.kind, view.tokens, per_request=self._per_request, gate=gate)
        if explanation.program is None:
            raise InputError(
                f"{view.latent}: an explanation in free text is judged by a language model; give one with --llm "
                "URL#MODEL, or explain with rules"
            )
        return RuleJudge(self.kind, view.tokens)

    async def _scoring(self, explanation: Explanation, view: LatentView, judge: Judge) -> Scoring:
        questions = self.questions(view)
        ranked = sorted(view.donors, key=lambda d: d.rank)
        donors = [d.explanation for d in ranked if d.explanation.status == "ok" and judge.takes(d.explanation)]
        own, *others = await judge.panel([explanation, *donors], [q.item for q in questions])
        judged = _judgements(questions, own)
        controls = [_judgements(questions, verdicts) for verdicts in others]
        return Scoring(
            explanation=explanation,
            scores=(*own_scores(self.kind, view.latent, judged), *control_scores(self.kind, view.latent, controls)),
            judgements={"none": judged, CONTROL: tuple(j for control in controls for j in control)},
        )


def _judgements(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> tuple[Judgement, ...]:
    return tuple(
        Judgement(
            row=q.example.row,
            start=q.example.start,
            document=q.example.document,
            stratum=q.example.stratum,
            truth=q.example.fires,
            prediction=v.prediction,
            probability=v.probability,
            status=v.status,
        )
        for q, v in zip(questions, verdicts, strict=True)
    )


def _answered(judged: Sequence[Judgement]) -> tuple[Array, Array]:
    """Return truth and prediction [n] of the judgements that hold one."""
    pairs = [(j.truth, j.prediction) for j in judged if j.prediction is not None]
    both = np.array(pairs, dtype=bool).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _intervals(judged: Sequence[Judgement]) -> dict[str, metrics.Interval]:
    truth, prediction = _answered(judged)
    return {
        "balanced_accuracy": metrics.balanced_accuracy(truth, prediction),
        "sensitivity": metrics.sensitivity(truth, prediction),
        "specificity": metrics.specificity(truth, prediction),
        "f1": metrics.f1(truth, prediction),
    }


def own_scores(scorer: str, latent: LatentId, judged: Sequence[Judgement]) -> tuple[Score, ...]:
    """Return the scores of an explanation from its judgements; what failed is counted and left out of the values."""
    n_total = len(judged)
    n_scored = sum(j.prediction is not None for j in judged)
    return tuple(
        Score(
            latent=latent,
            scorer=scorer,
            metric=metric,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            method=interval.method,
            n_total=n_total,
            n_scored=n_scored,
            n_failed=n_total - n_scored,
        )
        for metric, interval in _intervals(judged).items()
    )


def control_scores(scorer: str, latent: LatentId, controls: Sequence[Sequence[Judgement]]) -> tuple[Score, ...]:
    """Return the null beside the scores: the mean over donors, with Student's t interval over them, within [0, 1].

    A donor whose metric is undefined (nothing answered) is left out. With fewer than two donors left there is no
    interval, so the value is NaN and the method says how many there were. Counts are over all donors' judgements.
    """
    n_total = sum(len(judged) for judged in controls)
    n_scored = sum(j.prediction is not None for judged in controls for j in judged)
    per_donor = [_intervals(judged) for judged in controls]
    scores = []
    for metric in METRICS:
        values = [v for v in (found[metric].value for found in per_donor) if not math.isnan(v)]
        value, low, high, method = _over_donors(values)
        scores.append(
            Score(
                latent=latent,
                scorer=scorer,
                metric=metric,
                value=value,
                low=low,
                high=high,
                method=method,
                n_total=n_total,
                n_scored=n_scored,
                n_failed=n_total - n_scored,
                control=CONTROL,
            )
        )
    return tuple(scores)


def _over_donors(values: Sequence[float]) -> tuple[float, float, float, str]:
    n = len(values)
    if n < MIN_DONORS:
        return math.nan, math.nan, math.nan, f"too few donors: {n} of at least {MIN_DONORS}"
    mean = metrics.mean_interval(values)
    return mean.value, max(0.0, mean.low), min(1.0, mean.high), f"t over {n} donors"
