"""Activation functions of sparse coders: which latents of a dense pre-activation fire, and how strongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch

from exegete.coders import kernels
from exegete.coders.kernels import Part
from exegete.errors import InputError


class Activation(ABC):
    """A rule that turns pre-activations [n, width] into the latents that fire."""

    name: str

    @property
    def k(self) -> int | None:
        """Most latents that fire on one input, None where there is no such number."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """Name and numbers, without tensors: part of the coder's identity."""
        return {"activation": self.name}

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Learnt parameters, each [width]."""
        return {}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return the same rule with other parameters, such as moved ones."""
        return self

    def check(self, what: str, width: int) -> None:
        """Raise InputError unless the rule suits a coder of this width; ``what`` names it."""
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != (width,):
                raise InputError(f"{what}: {name} has shape {tuple(tensor.shape)}, expected {(width,)}")

    @abstractmethod
    def sparse(self, pre: torch.Tensor) -> Part:
        """Return what fires; entries that are not positive do not. ``pre`` may be overwritten."""


@dataclass(frozen=True, slots=True)
class _FixedK(Activation, ABC):
    """A rule under which at most ``count`` latents fire on one input."""

    count: int

    @property
    def k(self) -> int:
        """Most latents that fire on one input."""
        return self.count

    @property
    def settings(self) -> dict[str, Any]:
        """Name and k."""
        return {"activation": self.name, "k": self.count}

    def check(self, what: str, width: int) -> None:
        """Raise InputError unless 1 ≤ k ≤ width."""
        if not 1 <= self.count <= width:
            raise InputError(f"{what} has k = {self.count}; it must lie between 1 and its width {width}")


@final
@dataclass(frozen=True, slots=True)
class TopK(_FixedK):
    """The k largest positive pre-activations (Gao et al., arXiv 2406.04093)."""

    name = "topk"

    def sparse(self, pre: torch.Tensor) -> Part:
        """Return the k largest, strongest first; zeros fill up where fewer are positive."""
        return kernels.positive(kernels.largest(pre, self.count))


@final
@dataclass(frozen=True, slots=True)
class GroupMax(_FixedK):
    """The largest of each of k equal groups of neighbouring latents, where positive (sparsify's ``groupmax``)."""

    name = "groupmax"

    def check(self, what: str, width: int) -> None:
        """Raise InputError unless k divides the width."""
        _FixedK.check(self, what, width)
        if width % self.count:
            raise InputError(f"{what} has groupmax with k = {self.count}, which does not divide its width {width}")

    def sparse(self, pre: torch.Tensor) -> Part:
        """Return the largest of each group, zero where none is positive."""
        return kernels.positive(kernels.largest_of_groups(pre, self.count))


@final
@dataclass(frozen=True, slots=True)
class ReLU(Activation):
    """Every positive pre-activation."""

    name = "relu"

    def sparse(self, pre: torch.Tensor) -> Part:
        """Return all positive ones, ragged."""
        return kernels.above(pre, 0.0)


@final
@dataclass(frozen=True, slots=True, eq=False)
class JumpReLU(Activation):
    """Every positive pre-activation above its latent's threshold [width] (Rajamanoharan et al., arXiv 2407.14435).

    BatchTopK coders fire so outside training: their thresholds are all the same.
    """

    threshold: torch.Tensor
    name = "jumprelu"

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The thresholds."""
        return {"threshold": self.threshold}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return the same rule with other thresholds."""
        return replace(self, **tensors)

    def sparse(self, pre: torch.Tensor) -> Part:
        """Return those above their thresholds, ragged, unchanged in value."""
        return kernels.above(pre, self.threshold)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gated(Activation):
    """A gate decides whether a latent fires, a magnitude how strongly (Rajamanoharan et al., arXiv 2404.16014).

    Of the product u of encoder and input: fires where u + ``gate_bias`` > 0, with the value
    relu(u · ``scale`` + ``magnitude_bias``); ``scale`` is exp(r_mag). All three are [width].
    """

    gate_bias: torch.Tensor
    scale: torch.Tensor
    magnitude_bias: torch.Tensor
    name = "gated"

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Gate bias, scale and magnitude bias."""
        return {"gate_bias": self.gate_bias, "scale": self.scale, "magnitude_bias": self.magnitude_bias}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return the same rule with other parameters."""
        return replace(self, **tensors)

    def sparse(self, pre: torch.Tensor) -> Part:
        """Return what passes its gate with a positive magnitude, ragged."""
        magnitude = torch.addcmul(self.magnitude_bias, pre, self.scale)
        return kernels.where(kernels.exceeds(pre + self.gate_bias, 0.0) & kernels.exceeds(magnitude, 0.0), magnitude)
