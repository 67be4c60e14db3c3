"""Batches of prompts through a Hugging Face model: every row with its own limits, draws, stops and log probabilities.

Rows of one batch know nothing of each other. Prompts of several lengths are padded on the left, but only for models
that were seen not to mind (``pads``); with others a batch holds prompts of one length, or, where even that changes
replies (``batches``), one prompt.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, final

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from exegete.llm.tokenised import draw_seed
from exegete.subjects.memories import going_on
from exegete.tokens import TokenTable
from exegete.types import LLMReply, LLMRequest, TokenLogprob

_FORWARD_ENTRIES = 1 << 28
"""Most logits of one forward pass over whole prompts (1 GiB in float32)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request with the token ids of its prompt; ``added`` of them, at its start, are the tokenizer's own."""

    request: LLMRequest
    ids: tuple[int, ...]
    added: int = 0


@final
@dataclass(slots=True)
class _Row:
    """One reply under way."""

    asked: Asked
    limit: int
    draws: np.random.Generator | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str | None = None
    finish: Literal["stop", "length"] | None = None


@final
class BatchedModel:
    """A causal model with its tokenizer's pieces, answering batches of tokenised requests."""

    def __init__(self, model: Any, table: TokenTable, ends: Sequence[int], *, device: torch.device) -> None:
        self._model, self._table, self._ends, self._device = model, table, frozenset(ends), device
        found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.positions: int | None = found if isinstance(found, int) and found > 0 else None
        """Most tokens of prompt and reply together, None where the architecture sets no limit."""
        self._size = int(model.config.get_text_config().vocab_size)
        self._exact = model.dtype == torch.float32
        self._masks = "attention_mask" in inspect.signature(model.forward).parameters
        # Settings that came with the model (penalties, cut-offs) would lie over what a request asks for.
        model.generation_config = GenerationConfig()

    @cached_property
    def batches(self) -> bool:
        """Whether two prompts of one length get the replies that each gets alone, as they do not with RWKV."""
        prompts = self._samples(5, 5)
        alone = torch.cat([self._probe([prompt], 0) for prompt in prompts], dim=1)
        try:
            return self._near(self._probe(prompts, 0), alone)
        except (RuntimeError, ValueError):
            return False

    @cached_property
    def pads(self) -> bool:
        """Whether replies stay the same, too, when prompts are padded on the left to one length.

        What stands in the padding must not matter, and the replies must be those to each prompt alone.
        """
        if not self._masks or not self.batches:
            return False
        prompts = self._samples(4, 9)
        padded, other = (self._probe(prompts, pad) for pad in (0, self._size // 2))
        alone = torch.cat([self._probe([prompt], 0) for prompt in prompts], dim=1)
        return torch.allclose(padded, other, atol=1e-4 if self._exact else 1e-2) and self._near(padded, alone)

    def _samples(self, *lengths: int) -> list[list[int]]:
        return [[(37 * i + 11 * n + 5) % self._size for i in range(length)] for n, length in enumerate(lengths)]

    def _near(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Compare log probabilities with room for the rounding of half floats; other text makes them differ by more."""
        return torch.allclose(found, wanted, rtol=0, atol=1e-3 if self._exact else 0.3)

    def replies(self, asked: Sequence[Asked], stopped: threading.Event) -> list[LLMReply]:
        """Answer a batch; where memory runs out, in halves. Ends early, with what there is, when ``stopped`` is set."""
        try:
            return self._answer(asked, stopped)
        except torch.OutOfMemoryError:
            if len(asked) == 1:
                longest = len(asked[0].ids)
                return [LLMReply(text=None, finish="error", error=f"no memory for a prompt of {longest} tokens")]
        torch.cuda.empty_cache()
        half = len(asked) // 2
        return [*self.replies(asked[:half], stopped), *self.replies(asked[half:], stopped)]

    @torch.inference_mode()
    def _answer(self, asked: Sequence[Asked], stopped: threading.Event) -> list[LLMReply]:
        rows = [self._row(a) for a in asked]
        prompts = self._prompt_logprobs([a for a in asked if a.request.prompt_logprobs])
        most = max(row.limit for row in rows)
        choose, finished = _Choose(rows, self._table, self._ends), _Finished(rows, stopped)
        self._generate([a.ids for a in asked], most, choose, finished)
        return [self._reply(row, next(prompts) if row.asked.request.prompt_logprobs else None) for row in rows]

    def _row(self, asked: Asked) -> _Row:
        request = asked.request
        room = request.max_tokens if self.positions is None else self.positions - len(asked.ids)
        draws = np.random.default_rng(draw_seed(request)) if request.temperature > 0 else None
        return _Row(asked, min(request.max_tokens, room), draws)

    def _reply(self, row: _Row, prompt: tuple[TokenLogprob, ...] | None) -> LLMReply:
        return LLMReply(
            text=row.text if row.text is not None else reply_text(self._table, row.tokens),
            finish=row.finish or "length",
            prompt_tokens=len(row.asked.ids),
            completion_tokens=len(row.tokens),
            cost=0.0,
            logprobs=tuple(row.logprobs) if row.asked.request.logprobs else None,
            prompt_logprobs=prompt,
        )

    def _generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, choose: Any, finished: Any, pad: int = 0
    ) -> None:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        # A model that keeps its state in itself takes a single token for the next one of the text before.
        cached = longest > 1
        with going_on(self._model):
            self._model.generate(
                ids.to(self._device),
                generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=False, pad_token_id=pad, use_cache=cached
                ),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([finished]),
                **({"attention_mask": mask.to(self._device)} if self._masks else {}),
            )

    @torch.inference_mode()
    def _probe(self, prompts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """Return the log probabilities [3, prompts, vocabulary] of three given tokens' predecessors."""
        record = _Record()
        self._generate(prompts, 3, record, _Never(), pad)
        return torch.stack(record.steps)

    def _prompt_logprobs(self, asked: Sequence[Asked]) -> Iterator[tuple[TokenLogprob, ...]]:
        """Yield those of each prompt, in order; padded on the right, where no causal model looks."""
        start = 0
        while start < len(asked):
            longest, stop = len(asked[start].ids), start + 1
            while stop < len(asked):
                longest = max(longest, len(asked[stop].ids))
                if longest * self._size * (stop + 1 - start) > _FORWARD_ENTRIES:
                    break
                stop += 1
            part = asked[start:stop]
            ids = torch.zeros((len(part), max(len(a.ids) for a in part)), dtype=torch.long)
            for i, a in enumerate(part):
                ids[i, : len(a.ids)] = torch.tensor(a.ids)
            with going_on(self._model):
                logits = self._model(input_ids=ids.to(self._device), use_cache=False).logits
            yield from (self._scored(a, logits[i, : len(a.ids) - 1]) for i, a in enumerate(part))
            start = stop

    def _scored(self, asked: Asked, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """Return the tokens of a prompt with what was said of them before; the very first has none."""
        before = torch.log_softmax(logits.float(), dim=-1)
        chosen = before.gather(1, torch.tensor(asked.ids[1:], device=before.device)[:, None])[:, 0].tolist()
        best = _best(before, asked.request.logprobs, self._table)
        scored = [TokenLogprob(token=piece_text(self._table, asked.ids[0]), logprob=None)]
        for token, logprob, alternatives in zip(asked.ids[1:], chosen, best, strict=True):
            text = piece_text(self._table, token)
            scored.append(TokenLogprob(token=text, logprob=logprob, alternatives=alternatives))
        return tuple(scored[asked.added :])


def piece_text(table: TokenTable, token: int) -> str:
    r"""Return a token's text by itself; bytes that are no whole character stand as ``\xNN``, so that tokens differ."""
    piece = table.pieces[token] if token < len(table.pieces) else b""
    return piece.decode("utf-8", "backslashreplace")


def reply_text(table: TokenTable, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens, special ones left out."""
    pieces = (table.pieces[t] for t in tokens if t < len(table.pieces) and t not in table.special)
    return b"".join(pieces).decode("utf-8", "replace")


def _best(logprobs: torch.Tensor, count: int, table: TokenTable) -> list[Mapping[str, float]]:
    """Return the likeliest ``count`` tokens of every row of [rows, vocabulary], with their log probabilities."""
    if not count:
        return [{} for _ in range(len(logprobs))]
    values, tokens = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    return [
        {piece_text(table, t): v for t, v in zip(ts, vs, strict=True)}
        for ts, vs in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


@final
class _Choose:
    """Chooses the next token of every row, writes it down, and leaves generation no other."""

    def __init__(self, rows: Sequence[_Row], table: TokenTable, ends: frozenset[int]) -> None:
        self._rows, self._table, self._ends = rows, table, ends
        self._alternatives = max(row.asked.request.logprobs for row in rows)
        self._drawn = [i for i, row in enumerate(rows) if row.draws is not None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        tokens = logprobs.argmax(dim=-1)
        if self._drawn:
            tokens[self._drawn] = self._draw(logprobs[self._drawn].cpu()).to(tokens.device)
        chosen = logprobs.gather(1, tokens[:, None])
        best = _best(logprobs, self._alternatives, self._table)
        for row, token, logprob, likely in zip(self._rows, tokens.tolist(), chosen[:, 0].tolist(), best, strict=True):
            if row.finish is None:
                self._note(row, token, logprob, likely)
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, tokens[:, None], 0.0)

    def _draw(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Draw by one uniform number a row, from sums in float64: rounding in a batch hardly ever changes a token."""
        rows = [self._rows[i] for i in self._drawn]
        heat = torch.tensor([row.asked.request.temperature for row in rows], dtype=torch.float64)
        sums = torch.softmax(logprobs.double() / heat[:, None], dim=-1).cumsum(dim=-1)
        luck = torch.tensor([row.draws.random() if row.draws else 0.0 for row in rows], dtype=torch.float64)
        places = torch.searchsorted(sums, (sums[:, -1] * luck)[:, None], right=True)[:, 0]
        return places.clamp(max=sums.shape[1] - 1)

    def _note(self, row: _Row, token: int, logprob: float, likely: Mapping[str, float]) -> None:
        row.tokens.append(token)
        if token in self._ends:
            row.text, row.finish = reply_text(self._table, row.tokens[:-1]), "stop"
            return
        if row.asked.request.logprobs:
            shown = dict(list(likely.items())[: row.asked.request.logprobs])
            row.logprobs.append(TokenLogprob(token=piece_text(self._table, token), logprob=logprob, alternatives=shown))
        stops = row.asked.request.stop
        text = reply_text(self._table, row.tokens) if stops else ""
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        if ends:
            row.text, row.finish = text[: min(ends)], "stop"
        elif len(row.tokens) >= row.limit:
            row.finish = "length"


@final
class _Finished:
    """Tells generation which rows have ended."""

    def __init__(self, rows: Sequence[_Row], stopped: threading.Event) -> None:
        self._rows, self._stopped = rows, stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stopped = self._stopped.is_set()
        return torch.tensor([stopped or row.finish is not None for row in self._rows], device=input_ids.device)


@final
class _Never:
    """Lets every row go on."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@final
class _Record:
    """Keeps the log probabilities of every step, and goes on with the same tokens whatever they are."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(torch.log_softmax(scores.float(), dim=-1).cpu())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, (7 * len(self.steps)) % scores.shape[1]] = 0.0
        return forced
