"""A causal model that goes on from beginnings it has read: what it holds after them is copied, never changed.

Whether a family can go on is seen, not assumed: from a short beginning, two continuations are run and held against
plain passes over the whole text. A family that keeps its state where it cannot be copied reads whole texts.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch

from exegete.subjects.memories import going_on

Way = Literal["at once", "whole texts"]
FIELDS = ("past_key_values", "cache_params", "state")
"""Under which names families of transformers give what they hold, and take it back."""
_GROWN = ("keys", "values")
"""What attention lengthens by making new tensors, so that rows may share the old ones."""
_TRIMMED = 0.8
"""Share of positions below which the LM head, a large part of a small model, skips the others; above, it is as fast."""
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """What a model holds after one row of ``ids``: ``state``, which it takes back as ``field``; nothing without ids.

    ``passes`` are the places at which the passes ended that read them: rounding depends on these.
    """

    ids: tuple[int, ...] = ()
    passes: tuple[int, ...] = ()
    field: str = ""
    state: Any = None


NOTHING = Held()


@final
class Prefixes:
    """Runs a model on from beginnings, of which the last ``keep`` are kept. Calls come from one thread at a time."""

    def __init__(self, model: Any, device: torch.device, *, keep: int = 4) -> None:
        self._model, self._device, self._keep = model, device, keep
        self._kept: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Held] = OrderedDict()
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.size = int(model.config.get_text_config().vocab_size)
        """Entries in the logits of one position."""

    @cached_property
    @torch.inference_mode()
    def way(self) -> Way:
        """How this model goes on from what it holds, as a trial shows."""
        beginning = tuple((37 * i + 5) % self.size for i in range(7))
        tails = torch.tensor([[(11 * i + 29 * row + 3) % self.size for i in range(5)] for row in range(2)])
        head = torch.tensor([beginning])
        plain = torch.cat([self._plain(torch.cat([head, tail[None]], dim=1), len(beginning)) for tail in tails])
        try:
            held = self._read(self._read(NOTHING, beginning[:4]), beginning)
            seen = [self._advance(held, tails, 0)[0] for _ in range(2)]  # the first may have changed it
        except _REFUSALS:
            return "whole texts"
        return "at once" if all(self._near(found, plain) for found in seen) else "whole texts"

    @torch.inference_mode()
    def read(self, ids: Sequence[int], start: Held = NOTHING) -> Held:
        """Return what the model holds after ``ids``, read on from ``start``, which begins them.

        It is the same to the last bit whatever was read before.
        """
        wanted, passes = tuple(ids), (*start.passes, len(ids))
        if len(wanted) == len(start.ids):
            return start
        if self.way == "whole texts":
            return Held(ids=wanted)
        if (start.ids, start.passes) in self._kept:  # what others go on from stays longest
            self._kept.move_to_end((start.ids, start.passes))
        if (wanted, passes) not in self._kept:
            self._kept[wanted, passes] = self._read(start, wanted)
        self._kept.move_to_end((wanted, passes))
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        return self._kept[wanted, passes]

    @torch.inference_mode()
    def logits(self, held: Held, tails: torch.Tensor, *, first: int = 0) -> torch.Tensor:
        """Return the logits [rows, positions − first, vocabulary] of ``tails`` [rows, positions] after ``held``.

        Those of the first ``first`` positions of every row are left out.
        """
        if not held.ids:
            return self._plain(tails, first)
        if self.way == "whole texts":
            head = torch.tensor([held.ids]).expand(len(tails), -1)
            return self._plain(torch.cat([head, tails], dim=1), first + len(held.ids))
        return self._advance(held, tails, first)[0]

    def _plain(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        return self._run(rows, first, use_cache=False)[0]

    def _read(self, start: Held, ids: tuple[int, ...]) -> Held:
        """Return what the model holds after ``ids``, which ``start`` begins."""
        rest = torch.tensor([ids[len(start.ids) :]])
        output = self._advance(start, rest, rest.shape[1] - 1)[1]
        for field in FIELDS:
            if output.get(field) is not None:
                return Held(ids=ids, passes=(*start.passes, len(ids)), field=field, state=output[field])
        raise LookupError("the model gives nothing to go on from")

    def _advance(self, held: Held, tails: torch.Tensor, first: int) -> tuple[torch.Tensor, Any]:
        """Return the logits of tails after ``held``, and the model's last output with what it holds then."""
        if not held.ids:
            return self._run(tails, first, use_cache=True)
        state = widened(held.state, len(tails))
        return self._run(tails, first, use_cache=True, **{held.field: state})

    def _run(self, rows: torch.Tensor, first: int, **options: Any) -> tuple[torch.Tensor, Any]:
        kept = rows.shape[1] - first
        trims = self._trims and kept < _TRIMMED * rows.shape[1]
        if trims:
            options["logits_to_keep"] = kept
        held = next((options[name] for name in FIELDS if name in options), None)
        with going_on(self._model, held):
            output = self._model(input_ids=rows.to(self._device), **options)
        logits: torch.Tensor = output.logits
        return (logits if trims else logits[:, first:]), output

    def _near(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        room = 1e-4 if self._model.dtype == torch.float32 else 0.3  # half floats round; another text differs by more
        one, other = (torch.log_softmax(part.float(), dim=-1) for part in (found, wanted))
        return torch.allclose(one, other, rtol=0, atol=room)


def widened(state: Any, rows: int) -> Any:
    """Return a copy of what a model holds for one row, for many rows; nothing done to the copy reaches the original.

    Every tensor in it is taken to have its rows first, as in all families of transformers.
    """
    return _widen(copy.deepcopy(state), rows, "", set())


def _widen(value: Any, rows: int, name: str, seen: set[int]) -> Any:
    if torch.is_tensor(value):
        if value.ndim < 2 or value.shape[0] != 1:
            return value
        wide = value.expand(rows, *value.shape[1:])
        return wide if name in _GROWN else wide.clone()
    if isinstance(value, dict):
        return {key: _widen(part, rows, name, seen) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_widen(part, rows, name, seen) for part in value)
    if type(value).__module__.startswith("transformers.") and id(value) not in seen:
        seen.add(id(value))
        for key, part in list(vars(value).items()):
            setattr(value, key, _widen(part, rows, key, seen))
    return value
