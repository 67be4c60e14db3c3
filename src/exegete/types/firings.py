"""Latents, tokens, and where latents fire in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from exegete.types.common import Array, require


@final
@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class LatentId:
    """One latent: the name of its coder and its index. Text form ``CODER/index``."""

    coder: str
    index: int

    def __post_init__(self) -> None:
        require(self.index >= 0, f"a latent index is not negative, got {self.index}")
        require(bool(self.coder), "a latent needs the name of its coder")

    def __str__(self) -> str:
        return f"{self.coder}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> LatentId:
        """Read the text form. Raises InputError on anything else."""
        coder, slash, index = text.rpartition("/")
        require(bool(slash and coder and index.isdecimal()), f"a latent is written CODER/index, got {text!r}")
        return cls(coder=coder, index=int(index))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Token rows.

    ``tokens`` [rows, length] uint32; ``documents`` [rows, length] int32, the document of every position, −1 for
    padding; ``mask`` [rows, length] bool, the positions at which firings count (not BOS, special tokens or padding).
    """

    tokens: Array
    documents: Array
    mask: Array

    def __post_init__(self) -> None:
        require(self.tokens.ndim == 2, f"row tokens are [rows, length], got shape {self.tokens.shape}")
        require(
            self.tokens.shape == self.documents.shape == self.mask.shape,
            f"tokens, documents and mask differ in shape: {self.tokens.shape} {self.documents.shape} {self.mask.shape}",
        )

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """Positions in a row."""
        return int(self.tokens.shape[1])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCode:
    """Latent activations of n inputs, never dense.

    ``indices`` and ``values`` [n, k]; a value of 0 marks an unused slot. Or ragged: flat arrays, with ``offsets``
    [n + 1]. ``width`` is the number of latents of the coder. The arrays are torch tensors on the coder's device
    straight from ``encode``, numpy after ``numpy()``.
    """

    indices: Any
    values: Any
    width: int
    offsets: Any | None = None

    def __post_init__(self) -> None:
        require(
            tuple(self.indices.shape) == tuple(self.values.shape),
            f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)} differ in shape",
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Firings:
    """All firings of one latent in row order: ``rows`` [n] int64, ``positions`` [n] int32, ``values`` [n] float32."""

    latent: LatentId
    rows: Array
    positions: Array
    values: Array

    def __post_init__(self) -> None:
        require(
            self.rows.shape == self.positions.shape == self.values.shape and self.rows.ndim == 1,
            "firings are three flat arrays of one length",
        )

    def __len__(self) -> int:
        return int(self.rows.shape[0])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStats:
    """Exact counts of one latent over the whole store.

    ``rate`` is firings over counted positions; ``histogram`` [bins] counts firings in log2 bins of the value, with
    ``edges`` [bins + 1]; ``top_tokens`` are (token, firings) pairs, most first; ``token_entropy`` is the entropy in
    bits of the distribution of firings over tokens; ``first_share`` and ``last_share`` are the shares of firings at the
    first and at the last counted position of a document in its row.
    """

    latent: LatentId
    count: int
    rate: float
    maximum: float
    mean: float
    sum_squares: float
    histogram: Array
    edges: Array
    top_tokens: tuple[tuple[int, int], ...]
    token_entropy: float
    first_share: float = 0.0
    last_share: float = 0.0
