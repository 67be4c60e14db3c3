"""Translators: what a tuned lens does to a residual stream before the model's own readout.

A translator is h ↦ h + W h + b, with W and b zero at the start, so that it begins as the identity and weight decay
pulls it back there (arXiv 2303.08112, in the form of the tuned-lens package). A state-aware one adds a linear map of
the block's recurrent state, zero at the start as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch

from exegete.errors import InputError, MismatchError

FULL_ENTRIES = 1 << 22
"""Most entries of a state's own full matrix [d, n]; a larger state goes through a low rank."""


@final
class StateMap(torch.nn.Module):
    """A linear map of a standardised state [n] into the residual stream [d], zero at the start.

    The state is standardised by ``mean`` and ``scale`` [n], which are measured once and then kept. With a ``rank`` the
    map is up · down: ``down`` [rank, n] starts as seeded noise and ``up`` [d, rank] as zero; without, ``full`` [d, n].
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, n: int, d: int, *, rank: int | None, seed: int = 0) -> None:
        super().__init__()
        self.n, self.rank = n, rank
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("scale", torch.ones(n))
        if rank is None:
            self.full = torch.nn.Parameter(torch.zeros(d, n))
        else:
            noise = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed))
            self.down = torch.nn.Parameter(noise / n**0.5)
            self.up = torch.nn.Parameter(torch.zeros(d, rank))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Return what the state [..., n] adds to the stream [..., d]."""
        if state.shape[-1] != self.n:
            raise MismatchError(f"the lens reads states of {self.n} numbers, got {state.shape[-1]}")
        x = (state.to(self.mean) - self.mean) * self.scale
        if self.rank is None:
            return x @ self.full.T
        return (x @ self.down.T) @ self.up.T

    @torch.no_grad()
    def standardise(self, seen: Moments) -> None:
        """Take mean and scale from the states seen; numbers that never change count for nothing."""
        self.mean.copy_(seen.mean)
        moving = seen.spread > 1e-6 * seen.largest.clamp_min(1e-30)
        self.scale.copy_(torch.where(moving, 1.0 / seen.spread.clamp_min(1e-30), torch.zeros_like(seen.spread)))


@final
class Moments:
    """Mean and spread of numbers that are seen some rows at a time (merged as in Chan, Golub and LeVeque 1979).

    Attributes:
        n: Rows seen.
        mean: Of each number [numbers] float64.
        largest: Size of the largest of each [numbers] float64.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.largest = self._squares = torch.zeros(1, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """See some more rows [m, numbers], m ≥ 1."""
        m = len(rows)
        mean, spread = rows.mean(dim=0).double(), rows.std(dim=0, correction=0).double()
        largest = torch.maximum(rows.amax(dim=0), -rows.amin(dim=0)).double()
        squares = spread.square() * m
        if self.n:
            moved = mean - self.mean
            squares = self._squares + squares + moved.square() * (self.n * m / (self.n + m))
            mean = self.mean + moved * (m / (self.n + m))
            largest = torch.maximum(self.largest, largest)
        self.n, self.mean, self.largest, self._squares = self.n + m, mean, largest, squares

    @property
    def spread(self) -> torch.Tensor:
        """The standard deviation of each number over the rows seen [numbers] float64."""
        return (self._squares / max(1, self.n)).sqrt()


@final
class Translator(torch.nn.Module):
    """The translator of one site: h [..., d] ↦ h + W h + b, plus a map of the state where it has one."""

    def __init__(self, d: int, *, bias: bool = True, state: StateMap | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(d, d))
        self.bias = torch.nn.Parameter(torch.zeros(d)) if bias else None
        self.state = state

    def forward(self, h: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """Return the translated stream [..., d] float32."""
        h = h.to(self.weight)
        moved: torch.Tensor = h + torch.nn.functional.linear(h, self.weight, self.bias)
        if self.state is None:
            return moved
        if state is None:
            raise InputError("this lens reads the recurrent state as well; give it the state beside the stream")
        seen: torch.Tensor = self.state(state)
        return moved + seen

    def linear(self, v: torch.Tensor) -> torch.Tensor:
        """Return v + W v [..., d]: how a direction, rather than a point, is translated."""
        return v.to(self.weight) + v.to(self.weight) @ self.weight.T

    @torch.no_grad()
    def take_plain(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the weight and bias of a plain translator, and nothing of the state."""
        self.weight.copy_(weights["weight"])
        if self.bias is not None:
            self.bias.copy_(weights["bias"])
        if self.state is not None:
            (self.state.full if self.state.rank is None else self.state.up).zero_()

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        ends = [self.weight] if self.bias is None else [self.weight, self.bias]
        if self.state is not None:
            ends.append(self.state.full if self.state.rank is None else self.state.up)
        return not any(bool(end.any()) for end in ends)
