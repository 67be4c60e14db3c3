"""Generation: does the latent fire on texts that a language model writes from its explanation?

The other scorers ask whether an explanation picks out the text the latent fires on; this one asks whether what the
explanation describes makes it fire (sensitivity), on text that no corpus holds. ``clarity`` is that of FADE
(arXiv 2502.16994): how far the written texts' activations stand above those of natural text.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete import metrics
from exegete.errors import ConfigError
from exegete.llm.client import gather_all, run_closing
from exegete.llm.protocol import PROMPTS, generate_messages, generate_schema
from exegete.metrics import FrameCounts, Interval
from exegete.metrics.fade import clarity
from exegete.metrics.failures import marked, rests_on
from exegete.prompts import prompt_hash
from exegete.scorers.controls import (
    LIFT,
    OTHER_LATENT,
    by_control,
    control_score,
    named_controls,
    needs_of,
    of_donors,
    panel,
    score_of,
)
from exegete.scorers.scorer import Scorer, Scoring
from exegete.scorers.simulators import unread
from exegete.types import Array, Explanation, Judgement, JudgementStatus, LatentId, LLMRequest, Score
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.subjects import Subject

NAME: Final = "generation"
HEADLINE: Final = "share_firing"
FITTING: Final = "random"
OTHER: Final = "silent"
MAX_TOKENS: Final = 2000
_ROWS: Final = 64
_REPAIR: Final = (
    'That cannot be read. Answer again with one JSON object and nothing else: {{"fitting": [...], "other": [...]}}, '
    "with {fitting} texts in the first list and {other} in the second."
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Texts written from an explanation: ``texts`` that fit, then those that do not, ``fits`` [n] telling which.

    None stands for a text that was asked for and is not there, for the reason that ``status`` gives; so does a text
    that the subject cannot read.
    """

    texts: tuple[str | None, ...]
    fits: tuple[bool, ...]
    status: JudgementStatus = "ok"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a latent did on a text: its strongest activation, 0 where silent, and the token it was at."""

    activation: float
    token: str


@final
class GenerationScorer(Scorer):
    """Lets a language model write ``fitting`` texts that should fire the latent and ``other`` that should not.

    The subject reads each, after BOS where it has one, and the coder says whether the latent fires at any token.
    Scores: ``share_firing`` of the fitting texts, ``specificity`` (the share of the others that stay silent), the mean
    of both as ``balanced_accuracy``, and ``clarity``, 2 AUROC − 1 of the fitting texts' strongest activations against
    those of the test windows at their weights in the frame. Controls are the fitting texts of up to ``donors`` other
    explanations; the lift over them is between independent samples.

    In its judgements ``prediction`` is whether a text was written to fit and ``truth`` whether the latent fired;
    ``row`` and ``document`` number the texts, the stratum is ``random`` for fitting ones, else ``silent``. A text given
    twice counts once.
    """

    def __init__(
        self,
        *,
        fitting: int = 10,
        other: int = 10,
        controls: str | Sequence[str] = (OTHER_LATENT,),
        donors: int = 2,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if fitting < 1 or other < 0 or donors < 0 or max_tokens < 1:
            raise ConfigError(
                "fitting and max_tokens are at least 1, other and donors at least 0, "
                f"got {fitting}, {max_tokens}, {other}, {donors}"
            )
        self._fitting, self._other, self._controls = fitting, other, named_controls(controls)
        self._donors, self._max_tokens = donors, max_tokens

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {
            "fitting": self._fitting,
            "other": self._other,
            "controls": list(self._controls),
            "donors": self._donors,
            "max_tokens": self._max_tokens,
        }
        return {"name": NAME, "args": args}

    @property
    def prompt_hash(self) -> str:
        """That of the request to write."""
        return prompt_hash(PROMPTS["generate"])

    @property
    def needs(self) -> frozenset[Need]:
        """Examples, a language model that writes, the subject and the coder that read; donors for their null."""
        needed: set[Need] = {"examples", "llm", "subject", "coder"}
        return frozenset(needed | needs_of(self._controls, self._donors))

    def planned(self, explanation: Explanation, view: LatentView) -> Sequence[LLMRequest]:
        """Return the requests that write the texts, an explanation's own and its controls'."""
        return [self._request(e, view) for e in (explanation, *(e for _, e in self._panel(explanation, view)))]

    def score(self, items: Sequence[tuple[Explanation, LatentView]], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item, as each is ready; no scores where there is no explanation to write from.

        Raises InputError for a view without language model, subject or coder, LLMError when the model cannot be used.
        """
        gate = asyncio.Semaphore(concurrency)

        async def work(item: tuple[Explanation, LatentView]) -> Scoring:
            explanation, view = item
            if explanation.status != "ok":
                return Scoring(explanation=explanation, scores=(), judgements={})
            return await self._scoring(explanation, view, gate)

        yield from run_closing(items, work, concurrency, (view.llm for _, view in items))

    async def _scoring(self, explanation: Explanation, view: LatentView, gate: asyncio.Semaphore) -> Scoring:
        subject, coder = view.require_subject()
        asked = self._panel(explanation, view)
        written = await gather_all(self._write(view, e, gate) for e in (explanation, *(e for _, e in asked)))
        flat = [text for w in written for text in w.texts if text is not None]
        found = dict(zip(flat, measure(subject, coder, view.latent.index, flat), strict=True))
        judged = [_judgements(w, found) for w in written]
        scores = own_scores(view, judged[0])
        judgements = {"none": judged[0]}
        for control, said in by_control(self._controls, asked, judged[1:]).items():
            scores += control_scores(view.latent, control, judged[0], said)
            judgements[control] = tuple(j for one in said for j in one)
        return Scoring(explanation=explanation, scores=scores, judgements=judgements, detail=_detail(written[0], found))

    def _panel(self, explanation: Explanation, view: LatentView) -> list[tuple[str, Explanation]]:
        asked = panel(explanation, view, self._controls)
        donors = [one for one in asked if one[0] == OTHER_LATENT][: self._donors]
        return [*donors, *(one for one in asked if one[0] != OTHER_LATENT)]

    def _request(self, explanation: Explanation, view: LatentView) -> LLMRequest:
        return LLMRequest(
            messages=generate_messages(str(explanation.text), self._fitting, self._other),
            temperature=0.0 if view.llm is None else view.llm.temperature,
            max_tokens=self._max_tokens,
            schema=generate_schema(self._fitting, self._other),
            stage=NAME,
        )

    async def _write(self, view: LatentView, explanation: Explanation, gate: asyncio.Semaphore) -> Written:
        llm, wanted = view.require_llm(), (self._fitting, self._other)
        request = self._request(explanation, view)
        async with gate:
            reply = await llm.reply(request)
        found = None if reply.text is None else parse_texts(reply.text, *wanted)
        if found is None and reply.finish in ("stop", "length"):
            said = {"role": "assistant", "content": reply.text or "(no answer)"}
            again = {"role": "user", "content": _REPAIR.format(fitting=wanted[0], other=wanted[1])}
            async with gate:
                reply = await llm.reply(replace(request, messages=(*request.messages, said, again)))
            found = None if reply.text is None else parse_texts(reply.text, *wanted)
        fits = (True,) * wanted[0] + (False,) * wanted[1]
        if found is not None:
            return Written(texts=found, fits=fits, status="unparsed")
        return Written(texts=(None,) * len(fits), fits=fits, status=unread(reply))


def parse_texts(text: str, fitting: int, other: int) -> tuple[str | None, ...] | None:
    """Return the texts of an answer, first those that fit; None where it holds none, and in place of missing ones.

    The last object that holds both lists counts. Texts beyond those asked for are left out, and so are repeated ones.
    """
    decoder = json.JSONDecoder(strict=False)
    for at in reversed([i for i, c in enumerate(text) if c == "{"]):
        try:
            data, _ = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("fitting", "other")):
            seen: set[str] = set()
            found = (*_listed(data["fitting"], fitting, seen), *_listed(data["other"], other, seen))
            return found if seen else None
    return None


def _listed(given: Sequence[Any], n: int, seen: set[str]) -> list[str | None]:
    found: list[str | None] = []
    for text in given:
        if isinstance(text, str) and text.strip() and text not in seen and len(found) < n:
            seen.add(text)
            found.append(text)
    return found + [None] * (n - len(found))


def measure(subject: Subject, coder: SparseCoder, index: int, texts: Sequence[str]) -> list[Measured | None]:
    """Return what a latent does on each text, read by itself after BOS where the subject has one.

    Special tokens do not count, as they do not in a corpus. A text without tokens is silent; one with more tokens than
    the subject has positions is not read: None.
    """
    import torch

    from exegete.store.encoding import TextEncoder
    from exegete.subjects.edits import latent_values

    table = subject.token_table()
    begin = [] if subject.bos is None else [subject.bos]
    rows = [[*begin, *ids] for ids in TextEncoder(subject.tokenizer).encode(list(texts))]
    positions = subject.context or math.inf
    read = [place for place, row in enumerate(rows) if len(row) <= positions]
    found: list[Measured | None] = [None] * len(rows)
    for start in range(0, len(read), _ROWS):
        part = [rows[place] for place in read[start : start + _ROWS]]
        tokens = torch.zeros((len(part), max(1, *map(len, part))), dtype=torch.long)
        there = torch.zeros_like(tokens)
        for i, ids in enumerate(part):
            tokens[i, : len(ids)], there[i, : len(ids)] = torch.tensor(ids, dtype=torch.long), 1
        activations = subject.capture(tokens, there, [coder.point])[coder.point]
        special = torch.from_numpy(table.is_special)
        counted = (there > 0) & ~special[tokens.clamp(max=len(special) - 1)]
        values = torch.zeros(tokens.shape, dtype=torch.float32)
        if bool(counted.any()):
            given = activations[counted.to(activations.device)]
            values[counted] = latent_values(coder, index, given).float().cpu()
        strongest = values.max(dim=1)
        for i, (value, at) in enumerate(zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True)):
            token = table.texts[int(tokens[i, at])] if value > 0 else ""
            found[read[start + i]] = Measured(activation=max(0.0, value), token=token)
    return found


# -- scores -----------------------------------------------------------------------------------------------------------


def own_scores(view: LatentView, judged: Sequence[Judgement]) -> tuple[Score, ...]:
    """Return the scores of an explanation from what the latent did on its texts."""
    latent, known = view.latent, sum(j.prediction is not None for j in judged)
    fitting = [j for j in judged if j.stratum == FITTING]
    written = sum(j.prediction is not None for j in fitting)
    return (
        _share(latent, HEADLINE, judged, fits=True),
        _share(latent, "specificity", judged, fits=False),
        score_of(latent, NAME, "balanced_accuracy", _both(judged), len(judged), known),
        score_of(latent, NAME, "clarity", _flagged(_clarity(fitting, natural(view)), written), len(fitting), written),
    )


def _both(judged: Sequence[Judgement]) -> Interval:
    """Return the balanced accuracy: a text that should fire is a true case, and the latent says which it takes for one.

    ``floor`` and ``ceiling`` take what is missing for texts that do as they should not, or as they should.
    """
    fits = np.array([j.stratum == FITTING for j in judged], bool)
    fired = np.array([j.truth for j in judged], bool)
    known = np.array([j.prediction is not None for j in judged], bool)
    worst, best = (metrics.balanced_accuracy(fits, np.where(known, fired, fits == right)) for right in (False, True))
    found = replace(metrics.balanced_accuracy(fits[known], fired[known]), floor=worst.low, ceiling=best.high)
    return rests_on(found, fits[known], np.flatnonzero(known)) if known.any() else found


def _clarity(fitting: Sequence[Judgement], beside: Array) -> Interval:
    """Return the clarity of texts; ``floor`` and ``ceiling`` take missing ones for silent, or for the strongest."""
    written = np.array([j.activation for j in fitting if j.prediction is not None], np.float64)
    missing = len(fitting) - len(written)
    found = clarity(written, beside)
    if not missing:
        return found
    worst, best = (clarity(np.append(written, [end] * missing), beside) for end in (0.0, math.inf))
    return replace(found, floor=worst.low, ceiling=best.high)


def control_scores(
    latent: LatentId, control: str, own: Sequence[Judgement], others: Sequence[Sequence[Judgement]]
) -> tuple[Score, ...]:
    """Return how many of the texts written from other explanations fire the latent, and the own share's lift over it.

    The texts differ, so the samples are independent: the lift's interval is Newcombe's, from Wilson's of both shares,
    those of all donors taken together.
    """
    shares = [_share(latent, HEADLINE, one, fits=True) for one in others]
    n_total, n_scored = sum(s.n_total for s in shares), sum(s.n_scored for s in shares)
    intervals = [_wilson(one, fits=True) for one in others]
    beside = control_score(latent, NAME, HEADLINE, control, intervals, n_total=n_total, n_scored=n_scored)
    mine, theirs = _wilson(own, fits=True), _wilson([j for one in others for j in one], fits=True)
    lift = of_donors(_difference(mine, theirs), control, len(others))
    total = _share(latent, HEADLINE, own, fits=True).n_total if others else 0
    return beside, score_of(latent, NAME, HEADLINE + LIFT, lift, total, min(mine.n, total), control)


def natural(view: LatentView) -> Array:
    """Return strongest activations as test windows of the whole frame have them, as many as there are test windows.

    Windows are repeated or left out, by systematic sampling in the order of their activation, so that firing ones have
    their share of the frame and each stands for what it was drawn from.
    """
    windows, frame = view.examples.part("test"), FrameCounts.of(view.examples)
    weight: Array = windows.weight.copy()
    for fires, total in ((True, frame.firing), (False, frame.windows - frame.firing)):
        which = windows.fires == fires
        if which.any():
            weight[which] *= total / weight[which].sum()
    strongest = windows.strongest
    if not weight.sum() > 0:
        return strongest[:0]
    order = np.argsort(-strongest, kind="stable")
    ends = np.cumsum(weight[order])
    points = (np.arange(len(order)) + 0.5) / len(order) * ends[-1]
    found: Array = strongest[order][np.searchsorted(ends, points)]
    return found


def _share(latent: LatentId, metric: str, judged: Sequence[Judgement], *, fits: bool) -> Score:
    """Return the share of fitting texts that fire, or of the others that do not."""
    found = _wilson(judged, fits=fits)
    total = found.n + sum(j.prediction is None and (j.stratum == FITTING) == fits for j in judged)
    return score_of(latent, NAME, metric, found, total, found.n)


def _wilson(judged: Sequence[Judgement], *, fits: bool) -> Interval:
    known = [j.truth == fits for j in judged if j.prediction is fits]
    missing = sum(j.prediction is None and (j.stratum == FITTING) == fits for j in judged)
    right, n = sum(known), len(known)
    return _flagged(
        replace(
            metrics.wilson(right, n),
            floor=metrics.wilson(right, n + missing).low,
            ceiling=metrics.wilson(right + missing, n + missing).high,
        ),
        n,
    )


def _difference(own: Interval, other: Interval) -> Interval:
    """Return own − other of independent samples (Newcombe 1998, method 10)."""
    value = own.value - other.value
    low = value - math.hypot(own.value - own.low, other.high - other.value)
    high = value + math.hypot(own.high - own.value, other.value - other.low)
    return replace(
        own,
        value=value,
        low=max(low, -1.0),
        high=min(high, 1.0),
        floor=own.floor - other.ceiling,
        ceiling=own.ceiling - other.floor,
        method="mover-wilson",
    )


def _flagged(interval: Interval, n: int) -> Interval:
    """Return an interval with its number of texts as documents: each is one of its own."""
    return marked(interval, n) if n else interval


def _judgements(written: Written, found: Mapping[str, Measured | None]) -> tuple[Judgement, ...]:
    judged = []
    for i, (text, fits) in enumerate(zip(written.texts, written.fits, strict=True)):
        measured = None if text is None else found[text]
        judged.append(
            Judgement(
                row=i,
                start=0,
                document=i,
                stratum=FITTING if fits else OTHER,
                truth=measured is not None and measured.activation > 0,
                prediction=None if measured is None else fits,
                status=written.status if measured is None else "ok",
                activation=0.0 if measured is None else measured.activation,
            )
        )
    return tuple(judged)


def _detail(written: Written, found: Mapping[str, Measured | None]) -> dict[str, Any]:
    texts = []
    for text, fits in zip(written.texts, written.fits, strict=True):
        measured = None if text is None else found[text]
        if measured is not None:
            texts.append({"text": text, "fits": fits, "activation": measured.activation, "token": measured.token})
    return {"texts": texts}
