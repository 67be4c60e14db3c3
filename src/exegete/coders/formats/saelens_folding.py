"""The weights of SAELens's coders, changed so that what surrounds the linear maps is part of them.

With u the pre-activations, E [width, d_in] the encoder, D [width, d_out] the decoder and b its bias:

- an input scale s: E·s, D/s, b/s (Anthropic's April 2024 update; SAELens's ``norm_scaling_factor``);
- pre-activations times decoder norms n, values divided by them: rows of E and encoder bias times n, rows of D over n;
- learnt factors f on the values: rows of D times f;
- whitening z = (x − m)M: E Mᵀ, D M⁻¹, b M⁻¹ + m (arXiv 2511.13981);
- a centred stream x − mean(x): every row of E minus its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from exegete.coders.activations import Activation, Gated, JumpReLU, ReLU, TopK
from exegete.coders.formats.saelens_settings import Settings
from exegete.errors import CorruptError

Tensors = Mapping[str, torch.Tensor]
_SMALLEST_NORM = 1e-8


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a linear coder is built of: ``encoder`` [width, d_in], ``decoder`` [width, d_out], biases, ``skip``."""

    encoder: torch.Tensor
    encoder_bias: torch.Tensor
    decoder: torch.Tensor
    decoder_bias: torch.Tensor
    activation: Activation
    skip: torch.Tensor | None


def notes(settings: Settings) -> tuple[str, ...]:
    """Say what is folded into the weights."""
    found = []
    if settings.scale is not None:
        found.append(f"its input scale {settings.scale:g} is folded into the weights")
    if settings.rescale:
        found.append("its decoder norms are folded into the encoder")
    if settings.tuned:
        found.append("its finetuning factors are folded into the decoder")
    if settings.norm == "covariance_whitening":
        found.append("the whitening of its inputs is folded into the weights")
    if settings.centred:
        found.append("made on a centred stream: the mean of each input is ignored, and reconstructed as zero")
    return tuple(found)


def fold(settings: Settings, tensors: Tensors, whitening: Tensors | None, where: str) -> Parts:
    """Return the parts of a coder from the tensors of its file, named as there, in float32 or better.

    ``whitening`` holds ``mean`` [d_in], ``matrix`` and ``inverse_matrix`` [d_in, d_in]. Raises CorruptError where the
    folded weights are not finite, or where factors are there that the settings do not speak of.
    """
    held = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    encoder, decoder, decoder_bias = held["W_enc"].T.contiguous(), held["W_dec"], held["b_dec"]
    bias, skip = held.get("b_enc", torch.zeros_like(encoder[:, 0])), held.get("W_skip")
    scale = 1.0 if settings.scale is None else settings.scale
    if settings.scale is not None:
        encoder, decoder, decoder_bias = encoder * scale, decoder / scale, decoder_bias / scale
    if settings.rescale:
        norms = decoder.norm(dim=-1).clamp_min(_SMALLEST_NORM)
        encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms[:, None]
    factors = _factors(settings, held, where)
    if factors is not None:
        decoder = decoder * factors[:, None]
    if whitening is not None:
        kind = torch.promote_types(encoder.dtype, torch.float64)
        mean, matrix, inverse = (whitening[name].to(kind) for name in ("mean", "matrix", "inverse_matrix"))
        own = encoder.dtype
        whitened = encoder.to(kind) @ matrix.T
        if not settings.subtract:
            bias = (bias.to(kind) - whitened @ mean).to(own)
        encoder, decoder = whitened.to(own), (decoder.to(kind) @ inverse).to(own)
        decoder_bias = (decoder_bias.to(kind) @ inverse + mean).to(own)
    if settings.centred:
        means = encoder.mean(dim=-1, keepdim=True)
        if settings.subtract:
            # The decoder bias is subtracted from the input before the centring, and should be after it.
            bias = bias - means[:, 0] * decoder_bias.sum()
        encoder = encoder - means
        skip = None if skip is None else skip - skip.mean(dim=-1, keepdim=True)
    activation = _activation(settings, held, scale if settings.rescale else 1.0)
    _require_finite(where, encoder, bias, decoder, decoder_bias, *activation.tensors.values())
    return Parts(
        encoder=encoder,
        encoder_bias=bias,
        decoder=decoder,
        decoder_bias=decoder_bias,
        activation=activation,
        skip=skip,
    )


def _factors(settings: Settings, held: Tensors, where: str) -> torch.Tensor | None:
    factors = held.get("finetuning_scaling_factor", held.get("scaling_factor"))
    if factors is None or torch.allclose(factors, torch.ones_like(factors)):
        return None
    if not settings.tuned:
        raise CorruptError(
            f"{where} holds finetuning factors that its settings deny; finetuning_scaling_factor is false"
        )
    return factors


def _activation(settings: Settings, held: Tensors, scale: float) -> Activation:
    """Return the rule by which latents fire; ``scale`` is what its pre-activations were divided by."""
    kind = settings.architecture.activation
    if kind == "topk":
        return TopK(settings.k or 0)
    if kind == "gated":
        return Gated(gate_bias=held["b_gate"], scale=held["r_mag"].exp(), magnitude_bias=held["b_mag"])
    if kind == "jumprelu":
        return JumpReLU(held["threshold"] if "threshold" in held else held["log_threshold"].exp())
    if kind == "batchtopk":
        return JumpReLU((held["topk_threshold"] / scale).to(held["b_enc"].dtype).expand_as(held["b_enc"]).contiguous())
    return ReLU()


def _require_finite(where: str, *tensors: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CorruptError(f"{where} holds numbers that overflow when its scales are folded into the weights")
