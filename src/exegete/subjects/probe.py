"""What a pass over a few tokens shows of a model: whether it carries a state, and whether packed documents mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from exegete.subjects.names import Point

_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")


def carries_state(base: torch.nn.Module, device: torch.device) -> bool:
    """Tell whether any layer carries a state from token to token, as Mamba, RWKV and every hybrid with them does.

    One token is run with a cache. Families differ in what they return: nothing (RecurrentGemma keeps its state in its
    modules), a list of tensors (RWKV), a class of their own (xLSTM), or a common cache whose layers say what they hold.
    Only the last, with keys and values or nothing in every layer, counts as no state; so an unknown family is taken
    for recurrent.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            output = base(input_ids=ids, use_cache=True)
    except (RuntimeError, ValueError, TypeError):
        return True
    cache: Any = output.get("past_key_values") if isinstance(output, Mapping) else None
    layers = cache.layers if type(cache).__name__ == "DynamicCache" else ()
    return not layers or any(type(layer).__name__ not in _KEYS_AND_VALUES for layer in layers)


def keeps_apart(capture: Callable[..., dict[Point, torch.Tensor]], point: Point, vocabulary: int) -> bool:
    """Tell whether two documents in one row give what each gives alone, at a point behind every layer.

    ``capture`` takes tokens, mask, points and documents. The tolerance is wide, for half floats: documents that see
    each other differ by far more.
    """
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
    tokens = (torch.arange(10)[None] * 37 + 11) % vocabulary
    values = capture(tokens, None, (point,), documents)[point]
    alone = torch.cat(
        [capture(tokens[:, part], None, (point,), None)[point].float() for part in (slice(0, 4), slice(4, 9))], dim=1
    )
    error = (values.float()[:, :9] - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-6)
    return bool((error < (1e-3 if values.dtype == torch.float32 else 0.05)).all())
