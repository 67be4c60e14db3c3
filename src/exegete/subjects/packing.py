"""Rows that hold several documents: attention within each document only.

A forward hook on every layer narrows the mask that the model made itself (causal, or causal in a sliding window) to
pairs of positions of one document. So it does not matter how a model makes its masks, nor whether its layers share
one; and since the hook sits on the layer, not on the attention, it also works on compiled layers. Positions are
counted anew in each document.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch

from exegete.errors import InputError

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that take a mask [rows, 1, positions, positions]."""


def runs(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which run each position belongs to, and its place in that run, both [rows, positions].

    A run is what lies side by side of one document, or of padding (−1).
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begun = torch.where(starts, places, 0).cummax(dim=1).values
    return starts.long().cumsum(dim=1) - 1, places - begun


def is_packed(documents: torch.Tensor) -> bool:
    """Tell whether any row is more than one document from its first position on, then padding."""
    run, _ = runs(documents)
    return bool(((run > 0) & (documents >= 0)).any())


@contextlib.contextmanager
def within_documents(blocks: Sequence[torch.nn.Module], run: torch.Tensor, implementation: str) -> Iterator[None]:
    """Let every layer attend within the runs [rows, positions] only, for as long as the context lasts.

    Raises InputError for an attention implementation that takes no mask by pairs of positions.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention {implementation!r} cannot be kept within documents; allowed: {', '.join(IMPLEMENTATIONS)} "
            f"(load the subject with one of them, or set packing: false)"
        )
    narrowed = _Narrowed(run, implementation)
    handles = [block.register_forward_pre_hook(_hook(block, narrowed), with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@final
class _Narrowed:
    """Masks narrowed to documents; a mask that layers share is narrowed once."""

    def __init__(self, run: torch.Tensor, implementation: str) -> None:
        self._same = (run[:, None, :, None] == run[:, None, None, :]).contiguous()
        self._eager = implementation == "eager"
        self._seen: dict[tuple[int, torch.device], tuple[Any, torch.Tensor]] = {}

    def __call__(self, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        key = id(mask), hidden.device
        if key not in self._seen:  # holding the mask keeps its id from being given again
            self._seen[key] = mask, self._narrow(mask, hidden)
        return self._seen[key][1]

    def _narrow(self, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        same = self._same.to(hidden.device)
        if mask is None:  # plain causal attention, left to the kernel
            both = same.tril()
            if not self._eager:
                return both
            return torch.zeros_like(both, dtype=hidden.dtype).masked_fill(~both, torch.finfo(hidden.dtype).min)
        if not torch.is_tensor(mask) or mask.ndim != 4 or mask.shape[-2:] != same.shape[-2:]:
            raise InputError("this model's attention mask cannot be kept within documents; set packing: false")
        given: torch.Tensor = mask.to(hidden.device)
        return given.masked_fill(~same, torch.finfo(given.dtype).min) if given.is_floating_point() else given & same


def _hook(block: torch.nn.Module, narrowed: _Narrowed) -> Any:
    # From the class, because accelerate and torch.compile put their own forward on the instance.
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    place = names.index("attention_mask") if "attention_mask" in names else None
    takes = place is not None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        if place is not None and place < len(args):
            return (*args[:place], narrowed(args[place], hidden), *args[place + 1 :]), kwargs
        if takes:
            kwargs = kwargs | {"attention_mask": narrowed(kwargs.get("attention_mask"), hidden)}
        return args, kwargs

    return hook
