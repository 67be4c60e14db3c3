"""What every sparse coder is: activations in, sparse latents out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from exegete.errors import InputError, MismatchError
from exegete.types import Side, SparseCode

if TYPE_CHECKING:
    import torch

    from exegete.coders.kernels import Part

Point = tuple[str, Side]
"""A hookpoint and the side of its module."""


class SparseCoder(ABC):
    """A map between a hookpoint's activations and sparse latents.

    ``name`` is what its store and latents are called; the default is its hookpoint. It reads ``side`` of
    ``hookpoint`` and reconstructs ``target``: the same for an autoencoder, another point for a transcoder.
    ``base_model`` is the model it was made for, None when its files do not say. ``k`` is the most latents that fire
    on one input, None where there is no such number.
    """

    name: str
    hookpoint: str
    side: Side
    target: Point
    d_in: int
    d_out: int
    width: int
    k: int | None
    base_model: str | None

    @property
    def point(self) -> Point:
        """Where it reads."""
        return self.hookpoint, self.side

    @property
    @abstractmethod
    def architecture(self) -> str:
        """What kind it is, such as ``topk`` or ``jumprelu transcoder``."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of weights and settings, 16 hex digits; neither name nor hookpoint change it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the values."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> SparseCode:
        """Encode ``x`` [n, d_in] straight to (indices, values), never through a dense [n, width] result."""

    @abstractmethod
    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reconstruction [n, d_out]; skip connections and per-input norms need the input ``x`` as well."""

    @abstractmethod
    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the decoder directions [len(indices), d_out] of the given latents."""

    @abstractmethod
    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Return this coder on a device, in a data type; its hash stays that of the original weights."""

    @abstractmethod
    def placed(self, *, name: str | None = None, point: Point | None = None, target: Point | None = None) -> Self:
        """Return this coder under another name, or reading and reconstructing at other points."""

    def _encoded(self, x: torch.Tensor, across: int, encode: Callable[[torch.Tensor], Part]) -> SparseCode:
        """Encode ``x`` [n, d_in] part by part and check it and what comes of it; ``across`` sizes the parts."""
        import torch

        from exegete.coders import kernels

        self._require_input(x)
        x = x.to(self.device, self.dtype)
        rows = kernels.rows_at_once(across, self.device)
        found = kernels.joined([encode(part) for part in torch.split(x, rows)])
        if not kernels.finite(found.values):
            raise InputError(f"coder {self.name!r} at {self.hookpoint!r} overflows {self.dtype}; load it in float32")
        offsets = None
        if found.counts is not None:
            offsets = torch.nn.functional.pad(found.counts.cumsum(0), (1, 0))
        return SparseCode(indices=found.indices, values=found.values, width=self.width, offsets=offsets)

    def _require_input(self, x: torch.Tensor) -> None:
        from exegete.coders.kernels import finite

        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise MismatchError(
                f"coder {self.name!r} at {self.hookpoint!r} reads [n, {self.d_in}], got {list(x.shape)}"
            )
        if not finite(x):
            raise InputError(
                f"the {self.side} of {self.hookpoint!r} holds NaN or infinity; load the subject in float32"
            )
