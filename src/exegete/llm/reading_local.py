"""A causal model of this process that reads: shared beginnings once, what follows them in batches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch

from exegete.errors import LLMError
from exegete.llm.prefixes import Held, Prefixes
from exegete.llm.reader import Reader
from exegete.llm.spelling import Spelled, Spelling
from exegete.subjects.pieces import token_table
from exegete.tokens import TokenTable

_WORTH = 512
"""Tokens that reading a beginning first has to save, to pay for a pass of its own."""
_IGNORED = -100
_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
"""What a model raises that cannot be run, or a device that is gone; out of memory is dealt with before."""


@final
class LocalReader(Reader):
    """Reads with a causal language model of transformers.

    Beginning and continuation are one text to the tokenizer, so that a token across their border counts. Before the
    text stands what the tokenizer puts there by itself, or BOS where it puts nothing and the model has one; so a first
    token counts too. Without any of these a continuation that nothing precedes gives None, as does a text longer than
    the model reads.

    What all texts of a call begin with is run once, and so is a beginning with enough continuations; the model then
    goes on from copies (``Prefixes``). A batch holds at most ``rows`` texts and ``tokens`` tokens, beginnings included.
    The model is run by the thread that awaits, and by no other: it may be the subject, on which others set hooks,
    which they must not leave in place while they await a reading.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        natural: bool,
        table: TokenTable | None = None,
        rows: int | None = None,
        tokens: int = 1 << 16,
    ) -> None:
        """Take a model in evaluation mode; ``rows`` is by default 32 on a processor, 256 on a GPU."""
        device = model.get_input_embeddings().weight.device
        on_processor = device.type == "cpu"
        self._name, self._natural = name, natural
        self._spelling = Spelling(tokenizer, table or token_table(tokenizer))
        self._prefixes = Prefixes(model, device)
        self._rows, self._tokens = rows or (32 if on_processor else 256), tokens
        self._entries = 1 << (24 if on_processor else 28)  # of the logits of one batch; few stay near the processor
        found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int | float = found if isinstance(found, int) and found > 0 else math.inf

    @property
    def name(self) -> str:
        """The model as named on the command line."""
        return self._name

    @property
    def natural(self) -> bool:
        """As the one who made the reader said."""
        return self._natural

    @property
    def final(self) -> bool:
        """True: no call can fail, but a text may be too long."""
        return True

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return log p(continuation | beginning) in nats of each pair; the same pair is read once.

        Raises LLMError when the model cannot be run.
        """
        spelled = self._spelling.spell(pairs)
        groups: dict[str, dict[Spelled, None]] = {}
        found: dict[Spelled, float] = {}
        for (beginning, _), pair in zip(pairs, spelled, strict=True):
            if pair is None or pair.first == 0 or len(pair.ids) > self._positions:
                continue
            if pair.first == len(pair.ids):
                found[pair] = 0.0
            else:
                groups.setdefault(beginning, {})[pair] = None
        try:
            for held, batch in self._batches([list(group) for group in groups.values()]):
                found.update(zip(batch, self._nats(held, batch), strict=True))
                await asyncio.sleep(0)
        except _BROKEN as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise LLMError(f"{self._name} cannot read text: {text}") from error
        read = (None if pair is None else found.get(pair) for pair in spelled)
        return [None if nats is None or not math.isfinite(nats) else nats for nats in read]

    async def close(self) -> None:
        """Keep everything: the model is loaded, and no connection is open."""

    def _batches(self, groups: Sequence[Sequence[Spelled]]) -> Iterator[tuple[Held, list[Spelled]]]:
        """Yield batches with what the model holds before them: after what all texts share, or after what a group does.

        Both depend on these texts alone, so that reading them again gives the same to the last bit.
        """
        stem = self._prefixes.read(shared([pair for group in groups for pair in group]))
        alone: list[Spelled] = []
        for group in groups:
            own = shared(group)
            if (len(group) - 1) * (len(own) - len(stem.ids)) < _WORTH or self._prefixes.way == "whole texts":
                alone += group
                continue
            held = self._prefixes.read(own, stem)
            yield from ((held, batch) for batch in self._cut(group, len(own)))
        yield from ((stem, batch) for batch in self._cut(alone, len(stem.ids)))

    def _cut(self, pairs: Sequence[Spelled], begun: int) -> Iterator[list[Spelled]]:
        """Yield batches of texts of like length, ``begun`` tokens of which are read already."""
        batch: list[Spelled] = []
        for pair in sorted(pairs, key=lambda pair: (len(pair.ids), pair.ids)):
            rows, longest = len(batch) + 1, len(pair.ids)
            logits = rows * (longest - begun) * self._prefixes.size
            if batch and (rows > self._rows or rows * longest > self._tokens or logits > self._entries):
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    def _nats(self, held: Held, batch: Sequence[Spelled]) -> list[float]:
        """Return the sums of a batch; where memory runs out, in halves; NaN for a text that does not fit alone."""
        try:
            return self._sums(held, batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                return [math.nan]
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [*self._nats(held, batch[:half]), *self._nats(held, batch[half:])]

    @torch.inference_mode()
    def _sums(self, held: Held, batch: Sequence[Spelled]) -> list[float]:
        """Return log p of every text's counted tokens; padded on the right, where no causal model looks."""
        begun, longest = len(held.ids), max(len(pair.ids) for pair in batch)
        ids = torch.zeros((len(batch), longest - begun), dtype=torch.long)
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        for row, pair in enumerate(batch):
            ids[row, : len(pair.ids) - begun] = torch.tensor(pair.ids[begun:])
            counted[row, pair.first - begun : len(pair.ids) - begun] = True
        before = min(pair.first for pair in batch) - begun - 1  # the logits of a token stand one place before it
        logits = self._prefixes.logits(held, ids[:, :-1], first=before).float()
        said = ids.masked_fill(~counted, _IGNORED)[:, before + 1 :].to(logits.device)
        lost = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), said.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        sums: list[float] = (-lost.double().view(said.shape).sum(dim=1)).tolist()
        return sums


def shared(pairs: Sequence[Spelled]) -> tuple[int, ...]:
    """Return the ids that all texts begin with, short of the token that says what to expect of the first counted."""
    if len(pairs) < 2:
        return ()
    low, high = min(pair.ids for pair in pairs), max(pair.ids for pair in pairs)
    least = min(pair.first for pair in pairs) - 1
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b or i >= least), least)
    return low[: max(0, min(length, least))]
