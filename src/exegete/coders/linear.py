"""The coder that all published sparse autoencoders and transcoders are: linear, activation function, linear."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, final, get_args

import torch
from torch.nn.functional import embedding_bag, linear

from exegete.coders.activations import Activation
from exegete.coders.coder import Point, SparseCoder
from exegete.coders.kernels import Part
from exegete.errors import InputError, MismatchError
from exegete.files import hash_json
from exegete.subjects.identity import tensor_hash
from exegete.types import Side, SparseCode

InputNorm = Literal["none", "layer_norm", "constant_norm", "rms_norm"]
"""What is done to each input before encoding, and undone after decoding: nothing; subtract its mean and divide by its
standard deviation (unbiased, + 1e-5); scale it to length √d_in. ``rms_norm`` divides by √(mean square +
``norm_epsilon``) and is not undone: the model's own norm, without its gain, of what a transcoder reads."""
_EPSILON = 1e-5


@final
class LinearCoder(SparseCoder):
    """Linear encoder, an activation function, linear decoder; with optional input norm and skip connection.

    Args:
        name: What its store and latents are called.
        hookpoint: Where it reads, in any spelling.
        encoder: [width, d_in].
        encoder_bias: [width].
        decoder: [width, d_out].
        decoder_bias: [d_out].
        activation: Which pre-activations fire.
        side: The side of the module that it reads.
        target: What it reconstructs, by default what it reads; of a transcoder the point that it predicts.
        subtract_decoder_bias: Subtract the decoder bias from what it reads.
        input_norm: What is done to each input first.
        skip: [d_out, d_in] linear map of the (RMS-normed) input added to the reconstruction, or None.
        skip_undecided: Whether ``skip`` may be transposed: its file does not say, see ``orientation.oriented``.
        norm_epsilon: What ``rms_norm`` adds to the mean square.
        base_model: The model it was trained on, where its files say so.
        content: Content hash when it is known already.

    Raises:
        InputError: When shapes and settings do not fit together.
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
        activation: Activation,
        side: Side = "output",
        target: Point | None = None,
        subtract_decoder_bias: bool = False,
        input_norm: InputNorm = "none",
        skip: torch.Tensor | None = None,
        skip_undecided: bool = False,
        norm_epsilon: float = 1e-6,
        base_model: str | None = None,
        content: str | None = None,
    ) -> None:
        self.name = name
        self.hookpoint, self.side = hookpoint, side
        self.target = (hookpoint, side) if target is None else target
        if encoder.ndim != 2 or decoder.ndim != 2:
            have = f"{tuple(encoder.shape)} and {tuple(decoder.shape)}"
            raise InputError(f"coder {name!r}: encoder and decoder have shapes {have}, expected two dimensions each")
        self.width, self.d_in = encoder.shape
        self.d_out = int(decoder.shape[1])
        self.k = activation.k
        self.encoder, self.encoder_bias = encoder, encoder_bias
        self.decoder, self.decoder_bias = decoder, decoder_bias
        self.activation = activation
        self.subtract_decoder_bias = subtract_decoder_bias
        self.input_norm: InputNorm = input_norm
        self.skip = skip
        self.skip_undecided = skip_undecided
        self.norm_epsilon = norm_epsilon
        self.base_model = base_model
        self._content = content
        self._check()

    def _check(self) -> None:
        what = f"coder {self.name!r}"
        expected = {
            "encoder_bias": (self.encoder_bias.shape, (self.width,)),
            "decoder": (self.decoder.shape, (self.width, self.d_out)),
            "decoder_bias": (self.decoder_bias.shape, (self.d_out,)),
            "skip": ((self.d_out, self.d_in) if self.skip is None else self.skip.shape, (self.d_out, self.d_in)),
        }
        for part, (have, want) in expected.items():
            if tuple(have) != want:
                raise InputError(f"{what}: {part} has shape {tuple(have)}, expected {want}")
        if self.d_in != self.d_out and (self.target == self.point or self.subtract_decoder_bias):
            raise InputError(
                f"{what} reads {self.d_in} dimensions and writes {self.d_out}; only a transcoder may do that"
            )
        if self.input_norm not in get_args(InputNorm):
            allowed = ", ".join(get_args(InputNorm))
            raise InputError(f"{what} has the input norm {self.input_norm!r}; allowed: {allowed}")
        self.activation.check(what, self.width)

    @property
    def architecture(self) -> str:
        """The activation function, and whether it is a transcoder, with or without a skip connection."""
        kind = "" if self.target == self.point else " transcoder"
        return f"{self.activation.name}{' skip' if self.skip is not None else ''}{kind}"

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
        """Content hash of weights and settings, 16 hex digits; a wider data type does not change it."""
        if self._content is not None:
            return self._content
        settings = {
            **self.activation.settings,
            "subtract_decoder_bias": self.subtract_decoder_bias,
            "input_norm": self.input_norm,
            "transcoder": self.target != self.point,
            **({"norm_epsilon": self.norm_epsilon} if self.input_norm == "rms_norm" else {}),
        }
        weights = {n: tensor_hash(t) for n, t in (*self._tensors(), *self.activation.tensors.items())}
        return hash_json({"kind": "linear", **settings, "weights": weights})

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "skip"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> SparseCode:
        """Encode ``x`` [n, d_in] on the coder's device.

        Indices and values are [n, k] under ``topk`` (strongest first) and ``groupmax``, where slots that no latent
        earned hold the value 0; else ragged. The dense activations of a bounded number of inputs exist at a time.
        Raises MismatchError for another d_in, InputError when an input or a value is not finite.
        """
        return self._encoded(x, self.width, self._encode)

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Return the dense pre-activations [n, width] of ``x`` [n, d_in], for measuring near ties and thresholds."""
        x = self._normed(x.to(self.device, self.dtype))[0]
        return linear(x - self.decoder_bias if self.subtract_decoder_bias else x, self.encoder, self.encoder_bias)

    def _encode(self, x: torch.Tensor) -> Part:
        return self.activation.sparse(self.pre_activations(x))

    def _normed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """Return the normed input with the scale and shift [n, 1] that undo the norm."""
        if self.input_norm == "none":
            return x, 1.0, 0.0
        # In float32 at least: the length of a half-precision input may overflow. An input of zeros stays one.
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.input_norm == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True, dtype=wide) / self.d_in**0.5
            return (x / scale.clamp_min(torch.finfo(wide).tiny)).to(x.dtype), scale, 0.0
        if self.input_norm == "rms_norm":
            square = x.to(wide).square().mean(dim=-1, keepdim=True)
            return (x * torch.rsqrt(square + self.norm_epsilon)).to(x.dtype), 1.0, 0.0
        shift = x.mean(dim=-1, keepdim=True, dtype=wide)
        centred = x - shift
        scale = centred.norm(dim=-1, keepdim=True) / max(1, self.d_in - 1) ** 0.5
        return (centred / (scale + _EPSILON)).to(x.dtype), scale, shift

    @torch.no_grad()
    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reconstruction [n, d_out] of a code, rectangular or ragged.

        ``x`` [n, d_in] is the coder's input; InputError when a skip connection or the input norm needs it and it is
        missing, MismatchError for a code of another width or another number of inputs.
        """
        if code.width != self.width:
            raise MismatchError(f"coder {self.name!r} has {self.width} latents, the code {code.width}")
        if x is None and (self.skip is not None or self.input_norm not in ("none", "rms_norm")):
            reason = "a skip connection" if self.skip is not None else f"the input norm {self.input_norm}"
            raise InputError(f"coder {self.name!r} has {reason}; decoding needs its input as well")
        indices = torch.as_tensor(code.indices, device=self.device).long()
        values = torch.as_tensor(code.values, device=self.device).to(self.dtype)
        offsets = None
        if code.offsets is not None:
            offsets = torch.as_tensor(code.offsets, device=self.device).long()[:-1]
        y = embedding_bag(indices, self.decoder, offsets, mode="sum", per_sample_weights=values) + self.decoder_bias
        if x is None:
            return y
        if tuple(x.shape) != (len(y), self.d_in):
            raise MismatchError(f"coder {self.name!r} decodes {len(y)} codes, its input is {list(x.shape)}")
        x = x.to(self.device, self.dtype)
        normed, scale, shift = self._normed(x)
        if isinstance(scale, torch.Tensor):
            y = (y * scale + shift).to(self.dtype)
        return y if self.skip is None else y + linear(normed if self.input_norm == "rms_norm" else x, self.skip)

    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the decoder directions [len(indices), d_out] of the given latents."""
        return self.decoder[indices.to(self.device)]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LinearCoder:
        """Return this coder on a device, in a data type; its hash stays that of the original weights."""
        kind = self.dtype if dtype is None else dtype
        content = self._content if self._keeps_hash(kind) else self.hash
        moved = {n: t.to(device=device, dtype=kind) for n, t in self._tensors()}
        parameters = {n: t.to(device=device, dtype=kind) for n, t in self.activation.tensors.items()}
        return self._replace(content=content, activation=self.activation.replaced(parameters), **moved)

    def _keeps_hash(self, kind: torch.dtype) -> bool:
        """Tell whether the hash of this coder in another data type will come out the same without being handed on."""
        kinds = {t.dtype for t in (*dict(self._tensors()).values(), *self.activation.tensors.values())}
        # Values hash as float32, except those of float64, which need not fit.
        return kinds == {kind} or (kind == torch.float32 and torch.float64 not in kinds)

    def placed(
        self, *, name: str | None = None, point: Point | None = None, target: Point | None = None
    ) -> LinearCoder:
        """Return this coder under another name, or reading and reconstructing at other points."""
        own = self.point if point is None else point
        aim = target or (own if self.target == self.point else self.target)
        return self._replace(name=name or self.name, hookpoint=own[0], side=own[1], target=aim)

    def settled(self, *, transpose: bool) -> LinearCoder:
        """Return this coder with its skip connection as it is or transposed, and decided."""
        if self.skip is None or not transpose:
            return self._replace(skip_undecided=False)
        content = hash_json({"of": self.hash, "skip": "transposed"})
        return self._replace(skip=self.skip.T.contiguous(), skip_undecided=False, content=content)

    def _replace(self, **changes: Any) -> LinearCoder:
        fields: dict[str, Any] = {
            "name": self.name,
            "hookpoint": self.hookpoint,
            "side": self.side,
            "target": self.target,
            "activation": self.activation,
            "subtract_decoder_bias": self.subtract_decoder_bias,
            "input_norm": self.input_norm,
            "skip_undecided": self.skip_undecided,
            "norm_epsilon": self.norm_epsilon,
            "base_model": self.base_model,
            "content": self._content,
            **dict(self._tensors()),
        }
        return LinearCoder(**{**fields, **changes})
