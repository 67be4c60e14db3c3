"""A vector at work round any pass of the subject's model, ``generate`` of transformers among them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.steering.operators import POSITIVE, Operator, steer_edits
from exegete.steering.places import Places, places
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject
from exegete.subjects.edits import Edit, Strength, edited, read_by

_CACHES = ("past_key_values", "cache_params", "state")


@contextlib.contextmanager
def steered(
    subject: Subject,
    vector: SteeringVector,
    multiplier: Strength = 1.0,
    *,
    operator: Operator = "add",
    positions: str = "onward",
    sites: Sequence[int] | None = None,
    at: float = POSITIVE,
) -> Iterator[None]:
    """Let passes of the subject's model in this thread be steered in the residual stream, while the context lasts.

    A pass without a cache, or with one that this context has not seen, begins a sequence, and what it reads is the
    prompt; passes that go on with the cache read generated tokens. So ``subject.model.generate`` is steered where
    ``positions`` say, with a cache or without. Padding is never edited; a prompt's positions count from its first token
    that the attention mask keeps. With the multiplier 0 nothing is hooked. (Where ``use_cache=False`` is said, a pass
    over the tokens of the one before and one more goes on with it, as generating without a cache does.)

    Args:
        subject: The model.
        vector: What to steer with.
        multiplier: A number, or one for each row [rows].
        operator: ``add``, ``project-out``, ``reflect`` or ``clamp``.
        positions: As ``places`` reads them.
        sites: Which of the vector's, None for all.
        at: Where ``clamp`` puts activations, in lengths of the vector from the middle.

    Raises:
        InputError: For a vector without a residual part (a state is edited between tokens: use ``generate``), or
            without one at a site; MismatchError for a vector of another model.
    """
    where = places(positions)
    if not vector.residual:
        raise InputError(
            "the vector has no residual part; a state is edited between tokens, which exegete.steering.generate does"
        )
    edits = steer_edits(subject, vector, multiplier, operator=operator, sites=sites, at=at)
    if not isinstance(multiplier, torch.Tensor) and float(multiplier) == 0:
        yield
        return
    passes = _Passes(where)
    with passes.watched(subject.model), edited(subject, [_Placed(edit, passes) for edit in edits]):
        yield


@final
class _Placed(Edit):
    """An edit at the positions that the pass under way calls for."""

    def __init__(self, edit: Edit, passes: _Passes) -> None:
        self.target, self.source = edit.target, None
        self._edit, self._passes = edit, passes

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        mask = self._passes.mask.to(y.device).reshape(-1)
        change = torch.zeros_like(y)
        if bool(mask.any()):
            change[mask] = self._edit.change(y[mask], None, rows[mask]).to(y)
        return change


@final
@dataclass(slots=True)
class _Sequence:
    """Rows under way: what was read of each so far, and the length of its prompt."""

    seen: torch.Tensor
    prompt: torch.Tensor
    ids: torch.Tensor | None


@final
class _Passes:
    """Follows the passes of a model: which of their positions are prompt, which come after it."""

    def __init__(self, where: Places) -> None:
        self._where = where
        self._thread = threading.get_ident()
        self._known: weakref.WeakKeyDictionary[Any, _Sequence] = weakref.WeakKeyDictionary()
        self._last: _Sequence | None = None
        self._listed: tuple[Any, _Sequence | None] = (None, None)
        self._within = False
        self.mask = torch.zeros((0, 0), dtype=torch.bool)

    @contextlib.contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Follow the passes of a model with its head, or of its body alone."""
        base: torch.nn.Module = model.base_model
        handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if base is not model:
            handles.append(base.register_forward_pre_hook(self._body, with_kwargs=True, prepend=True))
            handles.append(base.register_forward_hook(self._handed_out))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._within = True
            self._begin(args, kwargs)

    def _leave(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._within = False
            self._handed_out(module, args, output)

    def _handed_out(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take note of the cache that a pass hands out: a pass that brings it along goes on with the sequence."""
        if threading.get_ident() != self._thread or self._last is None:
            return
        named = output if isinstance(output, Mapping) else {}
        held = list(output) if isinstance(output, tuple) else [named.get(name) for name in _CACHES]
        for cache in held:
            if isinstance(cache, list):  # RWKV hands its state round as a list
                self._listed = cache, self._last
            elif cache is not None and not isinstance(cache, tuple | torch.Tensor):
                self._known[cache] = self._last

    def _body(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread and not self._within:
            self._begin(args, kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = read_by(args, kwargs)
        rows, length = int(given.shape[0]), int(given.shape[1])
        kept = kwargs.get("attention_mask")
        kept = kept[:, -length:].to(torch.long) if torch.is_tensor(kept) and kept.ndim == 2 else None
        kept = torch.ones((rows, length), dtype=torch.long) if kept is None else kept.cpu()
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        going = self._going_on(cache, given, kwargs)
        counts = kept.cumsum(dim=1)
        if going is None:
            going = _Sequence(seen=torch.zeros(rows, dtype=torch.long), prompt=counts[:, -1], ids=None)
        whole = going.ids is not None and cache is None
        at = counts - 1 + (0 if whole else going.seen[:, None])
        self.mask = self._where.mask(torch.where(kept > 0, at, -1), going.prompt) & (kept > 0)
        going.seen = at.max(dim=1).values + 1
        going.ids = given.detach() if given.ndim == 2 else None
        self._last = going
        if cache is not None and not isinstance(cache, list | tuple):
            self._known[cache] = going

    def _going_on(self, cache: Any, given: torch.Tensor, kwargs: dict[str, Any]) -> _Sequence | None:
        """Return the sequence that a pass goes on with, None where it begins one."""
        last = self._last
        if isinstance(cache, list | tuple):
            return self._listed[1] if cache is self._listed[0] else None
        if cache is not None:
            return self._known.get(cache)
        if last is None or len(last.seen) != len(given):
            return None
        at = next(
            (kwargs[name] for name in ("cache_position", "position_ids") if torch.is_tensor(kwargs.get(name))), None
        )
        if at is not None and int(at.min()) > 0:  # a state kept in the modules
            return last
        ids = last.ids
        if kwargs.get("use_cache") is False and ids is not None and given.ndim == 2:
            longer = given.shape[1] == ids.shape[1] + 1
            return last if longer and torch.equal(given[:, :-1], ids.to(given.device)) else None
        return None
