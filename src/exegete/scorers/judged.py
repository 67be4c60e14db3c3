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
from exegete.llm.protocol import PROMPTS, Kind
from exegete.prompts import prompt_hash
from exegete.scorers.judge import (
    MAX_TOKENS,
    Item,
    Items,
    Judge,
    LLMJudge,
    RuleJudge,
    Verdict,
    judge_request,
    write_batches,
)
from exegete.scorers.scorer import Scorer, Scoring
from exegete.streams import stream
from exegete.types import STRATA, Array, Example, Explanation, Judgement, LatentId, LLMRequest, Score, Windows
from exegete.views import LatentView, Need

JudgeChoice = Literal["auto", "rule", "llm"]
CONTROL = "other_latent"
MIN_DONORS = 2
METRICS = ("balanced_accuracy", "sensitivity", "specificity", "f1")
RANKED = "auroc"
OUTSIDE = "outside_mass"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An item and the example behind it, whose label the judge does not see."""

    example: Example
    item: Item


class JudgedScorer(Scorer, ABC):
    """Asks a judge about every test window, firing or silent.

    ``judge`` is ``rule`` (the explanation's program, executed), ``llm``, or ``auto``: the language model where there is
    one, else the rule. ``per_request`` examples go into one request to a language model. ``probabilities`` asks it for
    log probabilities too: P(yes) of every window, the AUROC of these, and the mean probability mass on neither yes nor
    no (``outside_mass``); only a language model can judge then. A reply may take ``max_tokens``: a model that reasons
    before it answers needs more.
    """

    def __init__(
        self,
        *,
        judge: JudgeChoice = "auto",
        per_request: int = 5,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if judge not in ("auto", "rule", "llm"):
            raise ConfigError(f"judge is one of auto, rule, llm, got {judge!r}")
        if per_request < 1 or max_tokens < 1:
            raise ConfigError(f"per_request and max_tokens are at least 1, got {per_request} and {max_tokens}")
        if probabilities and judge == "rule":
            raise ConfigError("an executed rule gives no probabilities; leave out probabilities, or judge with llm")
        self._judge: JudgeChoice = "llm" if probabilities else judge
        self._per_request, self._probabilities, self._max_tokens = per_request, probabilities, max_tokens

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which question the judge is asked."""

    @abstractmethod
    def items(self, view: LatentView, examples: Windows) -> Items:
        """Return what the judge is shown of each example."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        return {"name": self.kind, "args": self._args()}

    def _args(self) -> dict[str, Any]:
        return {
            "judge": self._judge,
            "per_request": self._per_request,
            "probabilities": self._probabilities,
            "max_tokens": self._max_tokens,
        }

    @property
    def prompt_hash(self) -> str:
        """That of the question to a language model."""
        return prompt_hash(PROMPTS[self.kind])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples and donors, a language model when only that may judge, and its log probabilities for P(yes)."""
        needed: set[Need] = {"examples", "donors"}
        if self._judge == "llm":
            needed.add("llm")
        if self._probabilities:
            needed.add("logprobs")
        return frozenset(needed)

    def questions(self, view: LatentView) -> list[Question]:
        """Return the test windows of a latent in a seeded random order."""
        examples, items = self._asked(view)
        return [Question(example=example, item=item) for example, item in zip(examples, items, strict=True)]

    def requests(self, explanation: Explanation, view: LatentView) -> list[LLMRequest]:
        """Return the requests to a language model that judge an explanation with a text, unless one has to be repaired.

        Nothing is sent, and the view needs no language model; donors' explanations are asked about in the same way.
        """
        _, items = self._asked(view)
        temperature = 0.0 if view.llm is None else view.llm.temperature
        return [
            judge_request(
                self.kind,
                str(explanation.text),
                batch,
                temperature=temperature,
                probabilities=self._probabilities,
                max_tokens=self._max_tokens,
            )
            for batch in write_batches(items, view.tokens, self._per_request)
        ]

    def _asked(self, view: LatentView) -> tuple[Windows, Items]:
        """Return the test windows in the order in which they are asked about, and what is shown of each."""
        examples = view.examples.part("test")
        order = stream(view.examples.seed, view.latent, self.kind, "order").permutation(len(examples))
        return examples.take(order), self.items(view, examples).take(order)

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

    def asks(self, view: LatentView) -> bool:
        """Whether the judge is the view's language model."""
        return view.llm is not None and not self.executes(view)

    def _choose(self, explanation: Explanation, view: LatentView, gate: asyncio.Semaphore) -> Judge:
        if not self.executes(view):
            return LLMJudge(
                view.require_llm(),
                self.kind,
                view.tokens,
                per_request=self._per_request,
                gate=gate,
                probabilities=self._probabilities,
                max_tokens=self._max_tokens,
            )
        if explanation.program is None:
            raise InputError(
                f"{view.latent}: an explanation in free text is judged by a language model; give one with --llm "
                "URL#MODEL, or explain with rules"
            )
        return RuleJudge(self.kind, view.tokens)

    async def _scoring(self, explanation: Explanation, view: LatentView, judge: Judge) -> Scoring:
        examples, items = self._asked(view)
        ranked = sorted(view.donors, key=lambda d: d.rank)
        donors = [d.explanation for d in ranked if d.explanation.status == "ok" and judge.takes(d.explanation)]
        own, *others = await judge.panel([explanation, *donors], items)
        judged = _judgements(examples, own)
        controls = [_judgements(examples, verdicts) for verdicts in others]
        scores = [
            *own_scores(self.kind, view.latent, judged, probabilities=self._probabilities),
            *control_scores(self.kind, view.latent, controls, probabilities=self._probabilities),
        ]
        if self._probabilities:
            scores.append(outside_score(self.kind, view.latent, [v.outside for v in own]))
        return Scoring(
            explanation=explanation,
            scores=tuple(scores),
            judgements={"none": judged, CONTROL: tuple(j for control in controls for j in control)},
        )


def _judgements(examples: Windows, verdicts: Sequence[Verdict]) -> tuple[Judgement, ...]:
    columns = (examples.row, examples.start, examples.document, examples.stratum, examples.fires)
    return tuple(
        Judgement(
            row=row,
            start=start,
            document=document,
            stratum=STRATA[stratum],
            truth=truth,
            prediction=v.prediction,
            probability=v.probability,
            status=v.status,
        )
        for row, start, document, stratum, truth, v in zip(*(c.tolist() for c in columns), verdicts, strict=True)
    )


def _answered(judged: Sequence[Judgement]) -> tuple[Array, Array]:
    """Return truth and prediction [n] of the judgements that hold one."""
    pairs = [(j.truth, j.prediction) for j in judged if j.prediction is not None]
    both = np.array(pairs, dtype=bool).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _ranked(judged: Sequence[Judgement]) -> tuple[Array, Array]:
    """Return truth and P(yes) [n] of the judgements that hold one; a missing one is left out, never 0."""
    pairs = [(j.truth, j.probability) for j in judged if j.probability is not None]
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0] > 0, both[:, 1]


def _intervals(judged: Sequence[Judgement], probabilities: bool) -> dict[str, tuple[metrics.Interval, int]]:
    """Return every metric with the number of judgements it could use."""
    truth, prediction = _answered(judged)
    found = {
        "balanced_accuracy": metrics.balanced_accuracy(truth, prediction),
        "sensitivity": metrics.sensitivity(truth, prediction),
        "specificity": metrics.specificity(truth, prediction),
        "f1": metrics.f1(truth, prediction),
    }
    counted = {metric: (interval, len(truth)) for metric, interval in found.items()}
    if probabilities:
        truth, yes = _ranked(judged)
        counted[RANKED] = metrics.auroc(truth, yes), len(truth)
    return counted


def own_scores(
    scorer: str, latent: LatentId, judged: Sequence[Judgement], *, probabilities: bool = False
) -> tuple[Score, ...]:
    """Return the scores of an explanation from its judgements; what failed is counted and left out of the values.

    With ``probabilities`` the AUROC of P(yes) is among them, over the judgements that have one.
    """
    return tuple(
        _score(scorer, latent, metric, (i.value, i.low, i.high, i.method), len(judged), n_scored)
        for metric, (i, n_scored) in _intervals(judged, probabilities).items()
    )


def outside_score(scorer: str, latent: LatentId, outside: Sequence[float | None]) -> Score:
    """Return the mean probability mass that a judge put on neither yes nor no, with Student's t interval in [0, 1]."""
    known = [mass for mass in outside if mass is not None]
    return _score(scorer, latent, OUTSIDE, _mean(known, "t"), len(outside), len(known))


def control_scores(
    scorer: str, latent: LatentId, controls: Sequence[Sequence[Judgement]], *, probabilities: bool = False
) -> tuple[Score, ...]:
    """Return the null beside the scores: the mean over donors, with Student's t interval over them, within [0, 1].

    A donor whose metric is undefined (nothing answered) is left out. With fewer than two donors left there is no
    interval, so the value is NaN and the method says how many there were. Counts are over all donors' judgements.
    """
    n_total = sum(len(judged) for judged in controls)
    per_donor = [_intervals(judged, probabilities) for judged in controls]
    scores = []
    for metric in (*METRICS, RANKED) if probabilities else METRICS:
        found = [donor[metric] for donor in per_donor]
        values = [i.value for i, _ in found if not math.isnan(i.value)]
        n_scored = sum(n for _, n in found)
        scores.append(_score(scorer, latent, metric, _over_donors(values), n_total, n_scored, CONTROL))
    return tuple(scores)


Figure = tuple[float, float, float, str]
"""A value, its low and high bound, and the method of these."""


def _score(
    scorer: str, latent: LatentId, metric: str, figure: Figure, n_total: int, n_scored: int, control: str = "none"
) -> Score:
    value, low, high, method = figure
    return Score(
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
        control=control,
    )


def _over_donors(values: Sequence[float]) -> Figure:
    n = len(values)
    if n < MIN_DONORS:
        return math.nan, math.nan, math.nan, f"too few donors: {n} of at least {MIN_DONORS}"
    return _mean(values, f"t over {n} donors")


def _mean(values: Sequence[float], method: str) -> Figure:
    mean = metrics.mean_interval(values)
    return mean.value, max(0.0, mean.low), min(1.0, mean.high), method
