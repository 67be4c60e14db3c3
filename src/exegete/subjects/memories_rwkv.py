"""The states of RWKV: version 4 of transformers, and the matrix states of versions 5 and later from remote code.

Version 4 keeps a weighted mean as numerator and denominator relative to exp(max), with max the greatest exponent so
far. Adding to each of the three says nothing; numerator and denominator in the real domain, num = n · exp(max) and
den = d · exp(max), are linear in what was read (the recurrence is num ← exp(w) num + exp(k) v, den ← exp(w) den +
exp(k)), so these are what is read and written, in float64. A denominator is a sum of exponentials, hence never
negative: what an edit would take below ``DENOMINATOR_FLOOR`` of what it was is held there.

Single steps of both add the shifted input of the token before as [rows, d] to one of [rows, 1, d], which mixes up the
rows where there are several. They are given the shift as [rows, 1, d] instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.subjects.memories import Memory, Parts, called, entries, kept
from exegete.subjects.sites import n_blocks
from exegete.subjects.subject import Subject

DENOMINATOR_FLOOR = 0.01
"""What an edit may leave of a denominator: with less, the mean that it divides would be that much larger."""
_NEVER = -1e38
"""The greatest exponent of nothing."""


@final
class _Shift:
    """A tensor [rows, d, blocks] whose columns read as [rows, 1, d]; writing is as ever."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __getitem__(self, at: Any) -> torch.Tensor:
        return self.held[at].unsqueeze(1)

    def __setitem__(self, at: Any, value: torch.Tensor) -> None:
        self.held[at] = value


def _fed(
    subject: Subject, state: list[torch.Tensor] | None, tokens: torch.Tensor, shifts: Collection[int], last: bool
) -> tuple[torch.Tensor, list[Any]]:
    """Run the model over tokens from a state and return the logits with the new state."""
    options: dict[str, Any] = {}
    if state is not None:
        options["state"] = [_Shift(part) if i in shifts else part for i, part in enumerate(state)]
    output = called(subject.model, tokens, last=last, use_cache=True, return_dict=True, **options)
    logits: torch.Tensor = output["logits"]
    return logits, [part.held if isinstance(part, _Shift) else part for part in output["state"]]


def _picked(state: list[torch.Tensor], rows: torch.Tensor | None) -> list[torch.Tensor]:
    return [part.clone() if rows is None else part.index_select(0, rows.to(part.device)) for part in state]


@final
class RwkvMemory(Memory):
    """RWKV-4: ``att_shift`` and ``ffn_shift`` float32, ``num`` and ``den`` float64, each [rows, d]."""

    def __init__(
        self, subject: Subject, rows: int, *, mended: bool = True, state: list[torch.Tensor] | None = None
    ) -> None:
        self._subject, self._mended = subject, mended
        self._state = state if state is not None else _fresh(subject, rows)

    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """See ``Memory``."""
        shifts = (0, 1) if self._mended and tokens.shape[1] == 1 else ()
        logits, state = _fed(self._subject, self._state, tokens, shifts, last)
        self._state = entries(state, 5)
        return logits

    def copied(self, rows: torch.Tensor | None = None) -> RwkvMemory:
        """See ``Memory``."""
        return RwkvMemory(self._subject, 0, mended=self._mended, state=_picked(self._state, rows))

    def names(self) -> dict[int, tuple[str, ...]]:
        """See ``Memory``."""
        return dict.fromkeys(range(n_blocks(self._subject)), ("att_shift", "num", "den", "ffn_shift"))

    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """See ``Memory``. Raises InputError for exponents beyond what float64 holds."""
        return {block: self._block(block) for block in self.names() if blocks is None or block in blocks}

    def _block(self, block: int) -> dict[str, torch.Tensor]:
        ffn, att, num, den, greatest = (part[:, :, block] for part in self._state)
        scale = greatest.double().exp()
        found = {
            "att_shift": att.float().clone(),
            "num": num.double() * scale,
            "den": den.double() * scale,
            "ffn_shift": ffn.float().clone(),
        }
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise InputError(f"the state of block {block} has exponents up to {float(greatest.max()):.0f}, beyond 700")
        return found

    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """See ``Memory``; denominators are held as the module says."""
        for name, at in (("ffn_shift", 0), ("att_shift", 1)):
            if name in parts:
                raw = self._state[at][:, :, block]
                self._state[at][:, :, block] = kept(raw, raw.float(), parts[name].to(raw.device))
        return self._write_mean(block, parts) if {"num", "den"} & set(parts) else 0

    def _write_mean(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        old = self._block(block)
        num, den = (parts.get(name, old[name]).to(old[name]) for name in ("num", "den"))
        floor = old["den"] * DENOMINATOR_FLOOR
        held = (den < floor) & (den != old["den"])
        den = torch.where(held, floor, den)
        same = (num == old["num"]) & (den == old["den"])
        size = torch.maximum(den, num.abs())  # both are at most 1 relative to the greater, whichever that is
        there = size > 0
        greatest = torch.where(there, size.clamp_min(torch.finfo(torch.float64).tiny).log(), _NEVER).float()
        scale = torch.where(there, greatest.double().neg().exp(), 0.0)
        for at, new in ((2, num * scale), (3, den * scale), (4, greatest)):
            raw = self._state[at][:, :, block]
            self._state[at][:, :, block] = torch.where(same, raw, new.to(raw.dtype))
        return int(held.sum())


def _fresh(subject: Subject, rows: int) -> list[torch.Tensor]:
    """Return the state of rows that have read nothing, as the model makes it."""
    config = subject.model.config
    shape = (rows, config.hidden_size, config.num_hidden_layers)
    dtypes = (subject.dtype, subject.dtype, torch.float32, torch.float32, torch.float32)
    state = [torch.zeros(shape, dtype=dtype, device=subject.device) for dtype in dtypes]
    state[4] += _NEVER
    return state


@final
class MatrixRwkvMemory(Memory):
    """RWKV-5 and later, from remote code: ``att_shift`` [rows, d], ``kv`` [rows, heads, dk, dv], ``ffn_shift``.

    The model takes and gives ``state``, a list of the three with the blocks last.
    """

    _NAMES = ("att_shift", "kv", "ffn_shift")

    def __init__(self, subject: Subject, *, mended: bool = True, state: list[torch.Tensor] | None = None) -> None:
        self._subject, self._mended, self._state = subject, mended, state

    def feed(self, tokens: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """See ``Memory``. Raises InputError for a state of another layout."""
        shifts = (0, 2) if self._mended and tokens.shape[1] == 1 else ()
        if self._state is None and shifts:
            self._state = self._zeros(len(tokens))
        logits, state = _fed(self._subject, self._state, tokens, shifts, last)
        self._state = entries(state, 3)
        return logits

    def _zeros(self, rows: int) -> list[torch.Tensor]:
        """Return the state of rows that have read nothing; its sizes are those after two tokens of one row."""
        two = torch.zeros((1, 2), dtype=torch.long, device=self._subject.device)
        _, state = _fed(self._subject, None, two, (), last=True)
        return [torch.zeros_like(part).expand(rows, *part.shape[1:]).clone() for part in entries(state, 3)]

    def copied(self, rows: torch.Tensor | None = None) -> MatrixRwkvMemory:
        """See ``Memory``."""
        state = None if self._state is None else _picked(self._state, rows)
        return MatrixRwkvMemory(self._subject, mended=self._mended, state=state)

    def names(self) -> dict[int, tuple[str, ...]]:
        """See ``Memory``."""
        return {} if self._state is None else dict.fromkeys(range(n_blocks(self._subject)), self._NAMES)

    def read(self, blocks: Collection[int] | None = None) -> Parts:
        """See ``Memory``."""
        chosen = [block for block in self.names() if blocks is None or block in blocks]
        pairs = list(zip(self._NAMES, self._state or (), strict=False))
        return {block: {name: part[..., block].float().clone() for name, part in pairs} for block in chosen}

    def write(self, block: int, parts: Mapping[str, torch.Tensor]) -> int:
        """See ``Memory``."""
        for name, part in zip(self._NAMES, self._state or (), strict=False):
            if name in parts:
                raw = part[..., block]
                part[..., block] = kept(raw, raw.float(), parts[name].to(raw.device))
        return 0
