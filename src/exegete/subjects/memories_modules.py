"""Families with a way of their own: RecurrentGemma, whose modules hold the state, and xLSTM with a cache class.

A model of RecurrentGemma can only be in one place at a time, so its state is put in before every call and taken out
again after it; between calls the modules hold nothing.

xLSTM keeps a matrix C and a normaliser n relative to exp(m), with m the greatest exponent so far; C · exp(m) and
n · exp(m) are linear in what was read, so these are what is read and written, in float64, as ``kv`` and ``den``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.subjects.memories import Memory, Parts, called, kept
from exegete.subjects.names import layers
from exegete.subjects.subject import Subject


@final
class ModuleMemory(Memory):
    """RecurrentGemma: ``conv`` [rows, d, window − 1] and ``lru`` [rows, width] of its recurrent blocks.

    Its attention layers keep keys and values in a cache that the model takes, but does not return.
    """

    def __init__(self, subject: Subject) -> None:
        from transformers import DynamicCache

        self._subject = subject
        self._cache = DynamicCache(config=subject.model.config)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._length = 0

    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """See ``Memory``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)[None] + self._length
        blocks = self._modules()
        try:
            for i, module in blocks.items():
                module.conv1d_state, module.rg_lru.recurrent_states = self._held.get(i, (None, None))
            output = called(
                self._subject.model,
                tokens,
                last=last,
                use_cache=True,
                position_ids=places,
                past_key_values=self._cache,
            )
            self._held = {i: (module.conv1d_state, module.rg_lru.recurrent_states) for i, module in blocks.items()}
        finally:
            for module in blocks.values():
                module.conv1d_state = module.rg_lru.recurrent_states = None
        self._length += tokens.shape[1]
        logits: torch.Tensor = output["logits"]
        return logits

    def _modules(self) -> dict[int, Any]:
        base = self._subject.model.base_model
        blocks = [base.get_submodule(name).temporal_block for name in layers(self._subject.hookpoints())]
        return {i: block for i, block in enumerate(blocks) if "rg_lru" in dict(block.named_children())}

    def copied(self, rows: torch.Tensor | None = None) -> ModuleMemory:
        """See ``Memory``."""
        other = ModuleMemory(self._subject)
        other._length, other._cache = self._length, copy.deepcopy(self._cache)
        if rows is not None and self._length:
            other._cache.reorder_cache(rows)
        for i, (conv, lru) in self._held.items():
            parts = (conv, lru) if rows is None else (conv[rows.to(conv.device)], lru[rows.to(lru.device)])
            other._held[i] = (parts[0].clone(), parts[1].clone())
        return other

    def names(self) -> dict[int, tuple[str, ...]]:
        """See ``Memory``."""
        return dict.fromkeys(self._held, ("conv", "lru"))

    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """See ``Memory``."""
        return {
            i: {"conv": conv.float().clone(), "lru": lru.float().clone()}
            for i, (conv, lru) in self._held.items()
            if blocks is None or i in blocks
        }

    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """See ``Memory``."""
        for name, raw in zip(("conv", "lru"), self._held[block], strict=True):
            if name in parts:
                raw.copy_(kept(raw, raw.float(), parts[name].to(raw.device)))
        return 0


@final
class XLSTMMemory(Memory):
    """xLSTM: ``kv`` [rows, heads, dk, dv] and its normaliser ``den`` [rows, heads, dk], float64."""

    def __init__(self, subject: Subject, cache: Any = None) -> None:
        self._subject, self._cache = subject, cache

    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """See ``Memory``."""
        options = {} if self._cache is None else {"cache_params": self._cache}
        output = called(self._subject.model, tokens, last=last, use_cache=True, **options)
        self._cache = output["cache_params"]
        logits: torch.Tensor = output["logits"]
        return logits

    def copied(self, rows: torch.Tensor | None = None) -> XLSTMMemory:
        """See ``Memory``."""
        cache = copy.copy(self._cache)
        if cache is not None:
            cache.seqlen_offset = cache.seqlen_offset.clone()
            cache.rnn_state = {
                block: tuple(part.clone() if rows is None else part[rows.to(part.device)] for part in parts)
                for block, parts in cache.rnn_state.items()
            }
        return XLSTMMemory(self._subject, cache)

    def names(self) -> dict[int, tuple[str, ...]]:
        """See ``Memory``."""
        return {} if self._cache is None else dict.fromkeys(self._cache.rnn_state, ("kv", "den"))

    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """See ``Memory``. Raises InputError for exponents beyond what float64 holds."""
        return {block: self._block(block) for block in self.names() if blocks is None or block in blocks}

    def _block(self, block: int) -> dict[str, torch.Tensor]:
        matrix, normaliser, greatest = self._cache.rnn_state[block]
        scale = greatest.double().exp()  # [rows, heads, 1]
        found = {"kv": matrix.double() * scale[..., None], "den": normaliser.double() * scale}
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise InputError(f"the state of block {block} has exponents up to {float(greatest.max()):.0f}, beyond 700")
        return found

    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """See ``Memory``. The greatest exponent stays as it is; what is written is relative to it."""
        matrix, normaliser, greatest = self._cache.rnn_state[block]
        old, scale = self._block(block), greatest.double().neg().exp()
        for name, raw, by in (("kv", matrix, scale[..., None]), ("den", normaliser, scale)):
            if name in parts:
                new = parts[name].to(old[name])
                raw.copy_(torch.where(new == old[name], raw, (new * by).to(raw.dtype)))
        return 0
