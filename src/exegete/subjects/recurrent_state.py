"""The state that a recurrent model carries: values by block and component, vectors of them, and edits.

Blocks are numbered as sites are: block j is the one whose output is site j. Components, each [rows, ...]:

- ``conv`` the last inputs of a short convolution, ``ssm`` the state of Mamba and Mamba-2;
- ``kv`` a matrix memory (gated delta nets, RWKV-5 and later, xLSTM, whose normaliser is ``den``);
- ``num``, ``den`` the numerator and denominator of RWKV-4 in the real domain, ``att_shift`` and ``ffn_shift`` what it
  keeps of the token before;
- ``lru`` the recurrence of RecurrentGemma.

Values are float32, and float64 where the model keeps them relative to an exponential (num, den, xLSTM).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, final

import torch

from exegete.errors import InputError, MismatchError, NotFoundError

if TYPE_CHECKING:
    import numpy as np

_T = TypeVar("_T")
Layers = Collection[int] | None
"""Blocks that something is about; None stands for all."""
Components = Collection[str] | None
"""Components that something is about; None stands for all."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class StateVector:
    """A vector in the space of states: ``parts[layer][component]`` without rows."""

    parts: Mapping[int, Mapping[str, torch.Tensor]]

    def __add__(self, other: StateVector) -> StateVector:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: StateVector) -> StateVector:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> StateVector:
        return self._each(lambda value: value * factor)

    __rmul__ = __mul__

    def __neg__(self) -> StateVector:
        return self._each(lambda value: -value)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that it has parts of, in order."""
        return tuple(sorted(self.parts))

    def components(self, layer: int) -> tuple[str, ...]:
        """Return the components of one block. Raises NotFoundError for a block without parts."""
        return _components(self.parts, layer)

    def only(self, *, layers: Layers = None, components: Components = None) -> StateVector:
        """Return the parts of some blocks and components. Raises NotFoundError for names that it has nowhere."""
        return StateVector(_only(self.parts, layers, components))

    def norm(self, layer: int | None = None, component: str | None = None) -> float:
        """Return the Euclidean norm, of all or of one block or component."""
        layers = None if layer is None else (layer,)
        chosen = _only(self.parts, layers, None if component is None else (component,))
        return float(sum(value.double().square().sum() for part in chosen.values() for value in part.values()) ** 0.5)

    def random_like(self, rng: np.random.Generator) -> StateVector:
        """Return a vector in a random direction (Gaussian) whose every part has the norm that it has here."""

        def drawn(value: torch.Tensor) -> torch.Tensor:
            new = torch.from_numpy(rng.standard_normal(tuple(value.shape))).to(value.device)
            scaled: torch.Tensor = new * (value.double().norm() / new.norm().clamp_min(1e-300))
            return scaled.to(value.dtype)

        return StateVector({i: {n: drawn(self.parts[i][n]) for n in sorted(self.parts[i])} for i in self.layers})

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StateVector:
        return StateVector({i: {n: change(value) for n, value in part.items()} for i, part in self.parts.items()})

    def _with(self, other: StateVector, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> StateVector:
        shapes = [
            {(i, n): v.shape for i, part in each.parts.items() for n, v in part.items()} for each in (self, other)
        ]
        if shapes[0] != shapes[1]:
            raise MismatchError("these state vectors have other blocks, components or sizes; are they of one model?")
        return StateVector({i: {n: join(v, other.parts[i][n]) for n, v in p.items()} for i, p in self.parts.items()})


@final
@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The recurrent state of some rows: ``state[layer][component]`` [rows, ...], copies that nothing else holds."""

    parts: Mapping[int, Mapping[str, torch.Tensor]]

    def __getitem__(self, layer: int) -> Mapping[str, torch.Tensor]:
        _components(self.parts, layer)
        return self.parts[layer]

    def __len__(self) -> int:
        """Return the number of rows."""
        return next((len(value) for part in self.parts.values() for value in part.values()), 0)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that carry a state, in order; none for a model of nothing but attention."""
        return tuple(sorted(self.parts))

    def components(self, layer: int) -> tuple[str, ...]:
        """Return the components of one block. Raises NotFoundError for a block that carries no state."""
        return _components(self.parts, layer)

    def mean(self) -> StateVector:
        """Return the mean over rows."""
        return StateVector({i: {n: value.mean(dim=0) for n, value in p.items()} for i, p in self.parts.items()})

    def flat(self, layer: int, components: Components = None) -> torch.Tensor:
        """Return the state of one block [rows, n], components one after another in their order; float64 with num, den.

        Raises NotFoundError for blocks and components that carry no state.
        """
        chosen = _only(self.parts, (layer,), components).get(layer)
        if chosen is None:
            missing, have = ", ".join(sorted(components or ())), ", ".join(self.components(layer))
            raise NotFoundError(f"block {layer} carries no state {missing}; it has: {have}")
        return torch.cat([value.flatten(1) for value in chosen.values()], dim=1)

    def rows(self, rows: torch.Tensor | Sequence[int]) -> State:
        """Return the state of some rows, in this order."""
        at = torch.as_tensor(rows, dtype=torch.long)
        return State({i: {n: v[at.to(v.device)] for n, v in part.items()} for i, part in self.parts.items()})

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """Return the rows of several states of one model one after another. Raises MismatchError for others."""
        kinds = [{(i, n): v.shape[1:] for i, part in s.parts.items() for n, v in part.items()} for s in states]
        if any(kind != kinds[0] for kind in kinds):
            raise MismatchError("these states have other blocks, components or sizes; are they of one model?")
        first = states[0].parts if states else {}
        return State({i: {n: torch.cat([s.parts[i][n] for s in states]) for n in part} for i, part in first.items()})


@dataclass(frozen=True, eq=False)
class StateEdit(ABC):
    """A change of a state: of chosen blocks and components, or of all that it is about."""

    layers: Layers = field(default=None, kw_only=True)
    components: Components = field(default=None, kw_only=True)

    def reach(self, have: Mapping[int, Collection[str]]) -> dict[int, tuple[str, ...]]:
        """Return the blocks and components that are changed, of those that the model has.

        Raises NotFoundError for blocks or components that were named and are not there.
        """
        about = {i: dict.fromkeys(names) for i, names in self._about(have).items()}
        chosen = _only(about, self.layers, self.components)
        for i, names in chosen.items():
            missing = sorted(set(names) - set(have.get(i, ())))
            if missing:
                allowed = f"{', '.join(have[i])}" if i in have else "none"
                raise NotFoundError(f"block {i} carries no state {', '.join(missing)}; it has: {allowed}")
        return {i: tuple(names) for i, names in chosen.items()}

    def _about(self, have: Mapping[int, Collection[str]]) -> Mapping[int, Collection[str]]:
        return have

    @abstractmethod
    def changed(self, layer: int, component: str, value: torch.Tensor) -> torch.Tensor:
        """Return what becomes of a component [rows, ...] of one block. Raises MismatchError for other sizes."""


@final
@dataclass(frozen=True, eq=False)
class AddState(StateEdit):
    """Add a vector times ``multiplier``, a number or one for each row [rows]; 0 changes no bit."""

    vector: StateVector
    multiplier: float | torch.Tensor = 1.0

    def _about(self, have: Mapping[int, Collection[str]]) -> Mapping[int, Collection[str]]:
        return self.vector.parts

    def changed(self, layer: int, component: str, value: torch.Tensor) -> torch.Tensor:
        """Return the component with the vector's added to every row."""
        added = _fitting(self.vector.parts[layer][component], value, layer, component)
        by = torch.as_tensor(self.multiplier, dtype=value.dtype, device=value.device)
        if by.ndim:
            if by.shape != value.shape[:1]:
                raise MismatchError(f"there are {len(value)} rows, and multipliers of shape {tuple(by.shape)}")
            by = by.reshape(-1, *(1 for _ in added.shape))
        return torch.where(by == 0, value, value + by * added)


@final
@dataclass(frozen=True, eq=False)
class ReplaceState(StateEdit):
    """Put a vector in the place of every row's state, or the rows of a state in the place of the rows."""

    vector: StateVector | State

    def _about(self, have: Mapping[int, Collection[str]]) -> Mapping[int, Collection[str]]:
        return self.vector.parts

    def changed(self, layer: int, component: str, value: torch.Tensor) -> torch.Tensor:
        """Return what takes the component's place."""
        new = self.vector.parts[layer][component]
        if isinstance(self.vector, State):
            if new.shape != value.shape:
                raise _other_size(new.shape, value.shape, layer, component)
            return new.to(value).clone()
        return _fitting(new, value, layer, component).expand_as(value).clone()


@final
@dataclass(frozen=True, eq=False)
class ClampState(StateEdit):
    """Hold every entry between ``low`` and ``high``, and the norm of each row's component at ``max_norm`` or less."""

    low: float | None = None
    high: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None and self.max_norm is None:
            raise InputError("a clamp of the state needs low, high or max_norm")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"a clamp's low is at most its high, got {self.low} and {self.high}")

    def changed(self, layer: int, component: str, value: torch.Tensor) -> torch.Tensor:
        """Return the component within the bounds."""
        if self.low is not None or self.high is not None:
            value = value.clamp(self.low, self.high)
        if self.max_norm is not None:
            norm = value.flatten(1).norm(dim=1).clamp_min(torch.finfo(value.dtype).tiny)
            by = torch.where(norm > self.max_norm, self.max_norm / norm, 1.0)
            value = value * by.reshape(-1, *(1 for _ in value.shape[1:]))
        return value


def _fitting(vector: torch.Tensor, value: torch.Tensor, layer: int, component: str) -> torch.Tensor:
    if vector.shape != value.shape[1:]:
        raise _other_size(vector.shape, value.shape[1:], layer, component)
    return vector.to(value)


def _other_size(have: torch.Size, want: torch.Size, layer: int, component: str) -> MismatchError:
    return MismatchError(
        f"{component} of block {layer} has the sizes {tuple(want)} in this model, not {tuple(have)}; "
        f"was it taken from another one?"
    )


def _components(parts: Mapping[int, Mapping[str, torch.Tensor]], layer: int) -> tuple[str, ...]:
    if layer not in parts:
        raise NotFoundError(f"block {layer} carries no state; these do: {', '.join(map(str, sorted(parts))) or 'none'}")
    return tuple(parts[layer])


def _only(parts: Mapping[int, Mapping[str, _T]], layers: Layers, components: Components) -> dict[int, dict[str, _T]]:
    """Return the parts of some blocks and components, in their order; blocks without any of them are left out."""
    absent = sorted(set(layers or ()) - set(parts))
    if absent:
        known = ", ".join(map(str, sorted(parts))) or "none"
        raise NotFoundError(f"there is no state of block {absent[0]}; blocks with one: {known}")
    names = {name for part in parts.values() for name in part}
    strange = sorted(set(components or ()) - names)
    if strange:
        raise NotFoundError(f"unknown state component {strange[0]!r}; known: {', '.join(sorted(names)) or 'none'}")
    chosen = {
        i: {n: value for n, value in parts[i].items() if components is None or n in components}
        for i in sorted(parts)
        if layers is None or i in layers
    }
    return {i: part for i, part in chosen.items() if part}
