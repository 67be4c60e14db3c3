"""TopK coders: at most k latents fire on an input (Gao et al., arXiv 2406.04093), as EleutherAI's sparsify has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, final, get_args

import torch
from torch.nn.functional import embedding_bag, linear

from exegete.coders.coder import SparseCoder
from exegete.errors import InputError, MismatchError
from exegete.files import hash_json
from exegete.subjects.identity import tensor_hash
from exegete.types import SparseCode

Activation = Literal["topk", "groupmax"]
_CHUNK_ELEMENTS = 1 << 24


@final
class TopKCoder(SparseCoder):
    """Linear encoder, ReLU, then the k largest latents (or the largest of each of k groups), linear decoder.

    A transcoder reads a module's input and predicts its output; only other coders subtract the decoder bias from
    what they read.

    Args:
        name: What its store and latents are called.
        hookpoint: Canonical module name.
        encoder: [width, d_in].
        encoder_bias: [width].
        decoder: [width, d_out].
        decoder_bias: [d_out].
        k: Latents that may fire on one input.
        activation: ``topk``, or ``groupmax``: the strongest latent of each of k equal groups.
        transcode: Read the module's input, predict its output.
        skip: [d_out, d_in] linear map added to the reconstruction, or None.
        base_model: The model it was trained on, where its files say so.
        content: Content hash when it is known already.

    Raises:
        InputError: When shapes, k and width do not fit together.
    """

    def __init__(
        self,
        *,
        name: str,
        hookpoint: str,
        encoder: torch.Tensor,
        encoder_bias: torch.Tensor,
        decoder: torch.Tensor,
        decoder_bias: torch.Tensor,
        k: int,
        activation: Activation = "topk",
        transcode: bool = False,
        skip: torch.Tensor | None = None,
        base_model: str | None = None,
        content: str | None = None,
    ) -> None:
        self.name = name
        self.hookpoint = hookpoint
        self.side = "input" if transcode else "output"
        self.width, self.d_in = encoder.shape
        self.d_out = int(decoder.shape[-1])
        self.k = k
        self.top = k
        self.activation = activation
        self.transcode = transcode
        self.encoder, self.encoder_bias = encoder, encoder_bias
        self.decoder, self.decoder_bias = decoder, decoder_bias
        self.skip = skip
        self.base_model = base_model
        self._content = content
        self._check()

    def _check(self) -> None:
        expected = {
            "encoder_bias": (self.encoder_bias.shape, (self.width,)),
            "decoder": (self.decoder.shape, (self.width, self.d_out)),
            "decoder_bias": (self.decoder_bias.shape, (self.d_out,)),
            "skip": ((self.d_out, self.d_in) if self.skip is None else self.skip.shape, (self.d_out, self.d_in)),
        }
        for part, (have, want) in expected.items():
            if tuple(have) != want:
                raise InputError(f"coder {self.name!r}: {part} has shape {tuple(have)}, expected {want}")
        if not self.transcode and self.d_in != self.d_out:
            raise InputError(
                f"coder {self.name!r} reads {self.d_in} dimensions and writes {self.d_out}; only a "
                "transcoder may do that"
            )
        check_settings(f"coder {self.name!r}", self.width, self.top, self.activation)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the values."""
        return self.encoder.dtype

    @cached_property
    def hash(self) -> str:
        """Content hash of weights, settings and hookpoint, 16 hex digits; a wider data type does not change it."""
        if self._content is not None:
            return self._content
        settings = {
            "hookpoint": self.hookpoint,
            "k": self.top,
            "activation": self.activation,
            "transcode": self.transcode,
        }
        return hash_json({"kind": "topk", **settings, "weights": {n: tensor_hash(t) for n, t in self._tensors()}})

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "skip"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> SparseCode:
        """Encode ``x`` [n, d_in]: indices and values [n, k] on the coder's device, strongest first under ``topk``.

        Slots that no latent earned hold the value 0. The dense activations of a bounded number of inputs exist at a
        time. Raises MismatchError for another d_in, InputError when an input or a value is not finite.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise MismatchError(
                f"coder {self.name!r} at {self.hookpoint!r} reads [n, {self.d_in}], got {list(x.shape)}"
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(
                f"the {self.side} of {self.hookpoint!r} holds NaN or infinity; load the subject in float32"
            )
        x = x.to(self.device, self.dtype)
        chunk = max(1, _CHUNK_ELEMENTS // self.width)
        parts = [self._encode(part) for part in torch.split(x, chunk)]
        indices, values = parts[0] if len(parts) == 1 else tuple(torch.cat(p) for p in zip(*parts, strict=True))
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"coder {self.name!r} at {self.hookpoint!r} overflows {self.dtype}; load it in float32")
        return SparseCode(indices=indices, values=values, width=self.width)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dense = linear(x if self.transcode else x - self.decoder_bias, self.encoder, self.encoder_bias).relu_()
        if self.activation == "topk":
            top = dense.topk(self.top, dim=-1)
            return top.indices, top.values
        size = self.width // self.top
        best = dense.view(-1, self.top, size).max(dim=-1)
        starts = torch.arange(0, self.width, size, device=dense.device)
        return best.indices + starts, best.values

    @torch.no_grad()
    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reconstruction [n, d_out] of a code, rectangular or ragged.

        ``x`` [n, d_in] is the coder's input; InputError when a skip connection needs it and it is missing.
        """
        if code.width != self.width:
            raise MismatchError(f"coder {self.name!r} has {self.width} latents, the code {code.width}")
        indices = torch.as_tensor(code.indices, device=self.device).long()
        values = torch.as_tensor(code.values, device=self.device).to(self.dtype)
        offsets = None
        if code.offsets is not None:
            offsets = torch.as_tensor(code.offsets, device=self.device).long()[:-1]
        y = embedding_bag(indices, self.decoder, offsets, mode="sum", per_sample_weights=values) + self.decoder_bias
        if self.skip is None:
            return y
        if x is None:
            raise InputError(f"coder {self.name!r} has a skip connection; decoding needs its input as well")
        return y + linear(x.to(self.device, self.dtype), self.skip)

    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the decoder directions [len(indices), d_out] of the given latents."""
        return self.decoder[indices.to(self.device)]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> TopKCoder:
        """Return this coder on a device, in a data type; its hash stays that of the original weights."""
        kind = self.dtype if dtype is None else dtype
        exact = torch.promote_types(self.dtype, kind) == kind
        moved = {n: t.to(device=device, dtype=kind) for n, t in self._tensors()}
        return self._replace(content=self._content if exact else self.hash, **moved)

    def renamed(self, name: str) -> TopKCoder:
        """Return this coder under another name."""
        return self._replace(name=name)

    def _replace(self, **changes: Any) -> TopKCoder:
        fields: dict[str, Any] = {
            "name": self.name,
            "hookpoint": self.hookpoint,
            "k": self.top,
            "activation": self.activation,
            "transcode": self.transcode,
            "base_model": self.base_model,
            "content": self._content,
            **dict(self._tensors()),
        }
        return TopKCoder(**{**fields, **changes})


def check_settings(what: str, width: int, k: int, activation: str) -> None:
    """Raise InputError unless k and activation suit a coder of this width."""
    if activation not in get_args(Activation):
        raise InputError(f"{what} has the activation {activation!r}; allowed: {', '.join(get_args(Activation))}")
    if not 1 <= k <= width:
        raise InputError(f"{what} has k = {k}; it must lie between 1 and its width {width}")
    if activation == "groupmax" and width % k:
        raise InputError(f"{what} has groupmax with k = {k}, which does not divide its width {width}")
