"""Capture activations at hookpoints, stopping the forward pass as soon as the last one is in hand."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from exegete.errors import InputError

if TYPE_CHECKING:
    from exegete.subjects.names import Point


@final
class _Captured(Exception):  # noqa: N818 (no error: it ends a forward pass whose work is done)
    """Everything asked for is captured."""


@final
class _Catcher:
    """The hooks of one forward pass and what they caught."""

    def __init__(self, wanted: Sequence[Point], rows: int, length: int) -> None:
        self._missing = set(wanted)
        self._rows, self._length = rows, length
        self.caught: dict[Point, torch.Tensor] = {}

    def before(self, point: Point) -> Any:
        """Return a hook that catches the module's input."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("hidden_states", kwargs.get("x"))
            self._take(point, next((a for a in (*args, given, *kwargs.values()) if torch.is_tensor(a)), None))

        return hook

    def after(self, point: Point) -> Any:
        """Return a hook that catches the module's output, the first part of it where there are several."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._take(point, output if torch.is_tensor(output) else _first_tensor(output))

        return hook

    def _take(self, point: Point, value: torch.Tensor | None) -> None:
        if point not in self._missing:  # a module shared between layers runs again
            return
        self._missing.discard(point)
        name, side = point
        if value is None or not value.is_floating_point():
            raise InputError(f"the {side} of hookpoint {name!r} holds no activations; choose another hookpoint")
        value = value.detach()
        if value.ndim == 2 and value.shape[0] == self._rows * self._length:
            value = value.reshape(self._rows, self._length, -1)
        if value.ndim < 3 or tuple(value.shape[:2]) != (self._rows, self._length):
            raise InputError(
                f"the {side} of hookpoint {name!r} has shape {tuple(value.shape)}, not [rows, positions, …] = "
                f"[{self._rows}, {self._length}, …]; choose another hookpoint"
            )
        value = value.flatten(2)
        # What runs on may write into the tensor in place; after the last point nothing runs.
        self.caught[point] = value.clone() if self._missing else value
        if not self._missing:
            raise _Captured

    @property
    def missing(self) -> list[str]:
        """Hookpoints that the forward pass did not reach."""
        return sorted({name for name, _ in self._missing})


def capture(
    base: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    points: Sequence[Point],
    position_ids: torch.Tensor | None = None,
) -> dict[Point, torch.Tensor]:
    """Run the base model until every point is caught; later modules and the LM head are never computed.

    Args:
        base: The model without its head.
        modules: Modules by canonical name.
        tokens: [rows, positions] ids on the model's device.
        attention_mask: [rows, positions], 0 at padding, or None where there is none.
        points: Canonical hookpoint names, each with a side.
        position_ids: [rows, positions], where a token stands in its text; None counts from the row's start.

    Returns:
        Activations [rows, positions, d] by point. A module that runs several times is caught the first time; a module
        that returns a tuple gives its first tensor; heads are flattened.

    Raises:
        InputError: When a point holds no activations per position, or is not part of the forward pass.
    """
    rows, length = tokens.shape
    catcher = _Catcher(points, rows, length)
    handles: list[Any] = []
    try:
        for point in dict.fromkeys(points):
            name, side = point
            if side == "input":
                handles.append(modules[name].register_forward_pre_hook(catcher.before(point), with_kwargs=True))
            else:
                handles.append(modules[name].register_forward_hook(catcher.after(point)))
        if handles:
            _run(base, tokens, attention_mask, position_ids)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if catcher.missing:
        raise InputError(
            f"the forward pass never runs {', '.join(map(repr, catcher.missing))}; choose another hookpoint"
        )
    return {point: catcher.caught[point] for point in points}


def _run(
    base: torch.nn.Module,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    options: dict[str, Any] = {
        "use_cache": False,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    known = inspect.signature(base.forward).parameters
    with torch.no_grad():
        base(input_ids=tokens, **{k: v for k, v in options.items() if k in known and v is not None})


def _first_tensor(output: Any) -> torch.Tensor | None:
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return next((part for part in parts if torch.is_tensor(part)), None)
