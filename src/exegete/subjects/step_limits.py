"""Single steps of Mamba-2 layers with the limits that their whole passes have.

Whole passes clamp the step size, ``dt = clamp(softplus(dt + bias), limits)``; in transformers 5.23 the single steps of
every family of this kind leave the clamp out. Where a configuration sets limits that are ever met (those of Zamba 2 and
Nemotron-H do, from below), what a model says then depends on how it is fed.
"""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from exegete.subjects.replaced import Replaced

Limits = tuple[float, float]
_LIMITS: weakref.WeakKeyDictionary[torch.nn.Module, Limits | None] = weakref.WeakKeyDictionary()


def step_limits(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Have Mamba-2 layers clamp step sizes in single steps too, within the block and this thread.

    Models whose layers name no limits, several, or none that can be met are left as they are.
    """
    if model not in _LIMITS:
        _LIMITS[model] = _limits(model)
    found = _LIMITS[model]
    return nullcontext() if found is None else _STEP.taken(model, found)


def _limits(model: torch.nn.Module) -> Limits | None:
    named = {tuple(vars(module)["time_step_limit"]) for module in model.modules() if "time_step_limit" in vars(module)}
    if len(named) != 1:
        return None
    low, high = named.pop()
    return (low, high) if low > 0 or high < math.inf else None  # softplus is positive


def _clamped(
    stock: Any,
    limits: Limits,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    *args: Any,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> Any:
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    return stock(state, hidden_states, dt.clamp(*limits), *args, **kwargs)


_STEP = Replaced("mamba2_selective_state_update", _clamped)
