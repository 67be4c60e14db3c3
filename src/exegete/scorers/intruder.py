"""Intruder: can the windows of a latent be told from one that does not belong? (arXiv 2507.08473).

No explanation is needed: the score is the latent's own, and says how much its windows have in common that a reader can
see. It is stored with the explanation that it was asked for beside.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, final

import numpy as np

from exegete import metrics
from exegete.errors import ConfigError
from exegete.examples.render import marked_texts, plain_texts
from exegete.examples.similar import DEFAULT_MODEL
from exegete.llm.client import gather_all, run_closing
from exegete.llm.protocol import PROMPTS, intruder_messages, intruder_schema
from exegete.metrics import Interval, failures
from exegete.prompts import prompt_hash
from exegete.scorers.controls import LIFT, score_of
from exegete.scorers.embedders import Embedder, embedder_of
from exegete.scorers.intruder_trials import KINDS, Kind, Trial, deal, marked
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.simulators import unread
from exegete.types import (
    STRATA,
    Explanation,
    Judgement,
    JudgementStatus,
    LatentId,
    LLMReply,
    LLMRequest,
    Score,
    Windows,
)
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

HEADLINE: Final = "accuracy"
CHANCE: Final = "chance"
MAX_TOKENS: Final = 500
_REPAIR: Final = (
    'That names no excerpt. Answer again with one JSON object and nothing else: {{"intruder": NUMBER}}, a number from '
    "1 to {n}."
)

Answer = int | JudgementStatus
"""Which of the windows shown was named, from 0, or why none was."""


@final
class IntruderScorer(Scorer):
    """Shows ``n`` windows at a time, one of them an intruder, and asks which it is.

    The others are firing windows of one decile. ``kind`` says what the intruder is: ``default``, a silent test window,
    marked like a firing one; ``internal``, a window of another decile of the same latent, drawn at random; ``decile``,
    one of the decile five away, so that strong and weak firings are always as far apart. The last two need windows
    drawn by decile or bin. A window is in one trial at most, so that trials are independent (the released code uses
    windows again); 100 windows in 10 deciles make 20 trials of five.

    ``judge`` is ``llm``, which is shown the firing tokens marked (those above ``threshold`` of a window's maximum), or
    ``embedding``, which names the window that is least like the others, by the mean cosine of ``embedder``'s vectors of
    their plain text; ``auto`` is the language model where there is one.

    Scores: ``accuracy``, with ``chance`` (1 / n) as its control, and the lift over that; all three are NaN for a latent
    that has too few windows for a trial.
    """

    def __init__(
        self,
        *,
        kind: Kind = "default",
        n: int = 5,
        judge: Literal["auto", "llm", "embedding"] = "auto",
        embedder: str | Embedder = DEFAULT_MODEL,
        threshold: float = 0.3,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
        if judge not in ("auto", "llm", "embedding"):
            raise ConfigError(f"judge is one of auto, llm, embedding, got {judge!r}")
        if n < 3 or max_tokens < 1:
            raise ConfigError(f"n is at least 3 and max_tokens at least 1, got {n} and {max_tokens}")
        if not 0.0 <= threshold < 1.0:
            raise ConfigError(f"threshold is a share of a window's maximum, at least 0 and below 1, got {threshold}")
        self._kind, self._n, self._judge, self._embedder = kind, n, judge, embedder_of(embedder)
        self._threshold, self._max_tokens = threshold, max_tokens

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {
            "kind": self._kind,
            "n": self._n,
            "judge": self._judge,
            "embedder": self._embedder.name,
            "threshold": self._threshold,
            "max_tokens": self._max_tokens,
        }
        return {"name": "intruder", "args": args}

    @property
    def label(self) -> str:
        """``intruder``, or ``intruder_internal`` and ``intruder_decile``: each measures something else."""
        return "intruder" if self._kind == "default" else f"intruder_{self._kind}"

    @property
    def prompt_hash(self) -> str:
        """That of the question to a language model."""
        return prompt_hash(PROMPTS["intruder"])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, and a language model when only that may judge."""
        return frozenset({"examples", "llm"}) if self._judge == "llm" else frozenset({"examples"})

    def check(self) -> None:
        """Load the embedder where only it may judge. Raises MissingExtraError or NotFoundError where there is none."""
        if self._judge == "embedding":
            self._embedder.check()

    def judged_by(self, llm: LLMClient | None) -> str:
        """The language model or the embedder, as ``judge`` says."""
        return self._embedder.name if llm is None or self._judge == "embedding" else llm.name

    def asks(self, view: LatentView) -> bool:
        """Whether the judge is the view's language model."""
        return view.llm is not None and self._judge != "embedding"

    def plumbing(self, view: LatentView) -> bool:
        """Whether a judge that is simulated or knows no language named the intruders, or such vectors did."""
        if self.asks(view):
            return view.llm is not None and not view.llm.natural
        return not self._embedder.natural

    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready, whether or not there is an explanation.

        Raises LLMError when the language model cannot be used at all, MissingExtraError when nothing can embed text.
        """
        gate = asyncio.Semaphore(concurrency)

        async def work(item: tuple[Explanation, LatentView]) -> Scoring:
            explanation, view = item
            if self._judge == "llm":
                view.require_llm()
            windows = view.examples.part("test")
            trials = deal(view, windows, self._kind, self._n)
            answers = await self._answers(view, windows, trials, gate)
            judgements = tuple(_judgement(windows, t, a) for t, a in zip(trials, answers, strict=True))
            documents = len({int(windows.document[i]) for t in trials for i in t.places})
            scores = trial_scores(self.label, view.latent, judgements, self._n, documents)
            return Scoring(explanation=explanation, scores=scores, judgements={"none": judgements})

        yield from run_closing(items, work, concurrency, (view.llm for _, view in items))

    async def _answers(
        self, view: LatentView, windows: Windows, trials: Sequence[Trial], gate: asyncio.Semaphore
    ) -> Sequence[Answer]:
        if not trials:
            return []
        if not self.asks(view):
            return odd_ones(self._embedder, view, windows, trials)
        texts = marked_texts(windows.tokens, marked(view, windows, self._threshold), view.tokens)
        return await gather_all(self._ask(view, [texts[i] for i in trial.places], gate) for trial in trials)

    async def _ask(self, view: LatentView, texts: Sequence[str], gate: asyncio.Semaphore) -> Answer:
        llm, n = view.require_llm(), len(texts)

        async def send(request: LLMRequest) -> tuple[LLMReply, int | None]:
            async with gate:
                reply = await llm.reply(request)
            return reply, None if reply.text is None else parse_intruder(reply.text, n)

        request = LLMRequest(
            messages=intruder_messages(texts),
            temperature=llm.temperature,
            max_tokens=self._max_tokens,
            schema=intruder_schema(n),
            stage="intruder",
        )
        reply, named = await send(request)
        if named is None and reply.finish in ("stop", "length"):
            said = {"role": "assistant", "content": reply.text or "(no answer)"}
            again = {"role": "user", "content": _REPAIR.format(n=n)}
            reply, named = await send(replace(request, messages=(*request.messages, said, again)))
        if named is not None:
            return named - 1
        return unread(reply)


def parse_intruder(text: str, n: int) -> int | None:
    """Return the number that an answer names, from 1 to ``n``; None when it names none.

    The last object with ``intruder`` counts, since a model may think aloud before it answers; so does a lone number.
    """
    found = re.findall(r'\{\s*"intruder"\s*:\s*"?(\d{1,6})"?\s*\}', text) or re.findall(r"^\W*(\d{1,6})\W*$", text)
    return int(found[-1]) if found and 1 <= int(found[-1]) <= n else None


def odd_ones(embedder: Embedder, view: LatentView, windows: Windows, trials: Sequence[Trial]) -> list[Answer]:
    """Return which window of each trial is least like the others: of the smallest mean cosine, the first of equals."""
    vectors = embedder.embed(plain_texts(windows.tokens, view.tokens))  # all, as the embedding scorers do: they share
    answers: list[Answer] = []
    for trial in trials:
        rows = vectors[list(trial.places)].astype(np.float64)
        likeness = rows @ rows.T
        np.fill_diagonal(likeness, 0.0)
        answers.append(int(likeness.sum(axis=1).argmin()))
    return answers


def trial_scores(
    scorer: str, latent: LatentId, judgements: Sequence[Judgement], n: int, n_documents: int
) -> tuple[Score, ...]:
    """Return the share of intruders that were named, what chance would name, and how far the one is above the other.

    The interval is Wilson's over the trials that were answered; ``floor`` and ``ceiling`` take those that were not as
    wrong and as right.
    """
    right = sum(j.prediction is True for j in judgements)
    answered, total = sum(j.prediction is not None for j in judgements), len(judgements)
    found = replace(
        metrics.wilson(right, answered),
        floor=metrics.wilson(right, total).low,
        ceiling=metrics.wilson(right + total - answered, total).high,
    )
    found = failures.marked(found, n_documents) if n_documents else found
    by_chance = 1 / n if total else math.nan  # of no trials
    chance = Interval(value=by_chance, low=by_chance, high=by_chance, method="exact", n=total)
    above = replace(
        found,
        value=found.value - 1 / n,
        low=found.low - 1 / n,
        high=found.high - 1 / n,
        floor=found.floor - 1 / n,
        ceiling=found.ceiling - 1 / n,
    )
    return (
        score_of(latent, scorer, HEADLINE, found, total, answered),
        score_of(latent, scorer, HEADLINE, chance, total, total, CHANCE),
        score_of(latent, scorer, HEADLINE + LIFT, above, total, answered, CHANCE),
    )


def _judgement(windows: Windows, trial: Trial, answer: Answer) -> Judgement:
    """Return a trial as a judgement on its intruder: whether it was named. ``stratum`` is that of the others."""
    at = trial.intruder
    return Judgement(
        row=int(windows.row[at]),
        start=int(windows.start[at]),
        document=int(windows.document[at]),
        stratum=STRATA[trial.stratum],
        truth=True,
        prediction=answer == trial.answer if isinstance(answer, int) else None,
        status="ok" if isinstance(answer, int) else answer,
        activation=float(windows.activations[at].max()),
    )
