"""What every sparse coder is: activations in, sparse latents out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from exegete.types import Side, SparseCode

if TYPE_CHECKING:
    import torch


class SparseCoder(ABC):
    """A map between a hookpoint's activations and sparse latents.

    ``name`` is what its store and latents are called; the default is its hookpoint.
    """

    name: str
    hookpoint: str
    side: Side
    d_in: int
    d_out: int
    width: int
    k: int | None

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of the weights and settings, 16 hex digits."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> SparseCode:
        """Encode ``x`` [n, d_in] straight to (indices, values), never through a dense [n, width] result."""

    @abstractmethod
    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reconstruction [n, d_out]; ``x`` is the coder's input, which only skip connections need."""

    @abstractmethod
    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the decoder directions [len(indices), d_out] of the given latents."""

    @abstractmethod
    def to(self, device: str, dtype: torch.dtype | None = None) -> SparseCoder:
        """Return this coder on a device, in a data type."""
