"""Coders that learnt nothing, for the nulls beside every score."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from exegete.coders.activations import Activation, Gated, JumpReLU, ReLU, TopK
from exegete.coders.coder import Point, SparseCoder
from exegete.coders.linear import LinearCoder
from exegete.errors import InputError
from exegete.streams import stream
from exegete.types import Side

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "relu", "gated")
"""What ``untrained_coder`` makes."""
_JUMP = 0.001
_CHUNK_ELEMENTS = 1 << 24
_DRAWN_ELEMENTS = 1 << 20


def random_coder(like: SparseCoder, seed: int, k: int | None = None, *, name: str | None = None) -> LinearCoder:
    """Return an untrained TopK coder with the hookpoint, width and k of another (arXiv 2410.13928, section 4).

    Encoder rows are uniform on the unit sphere, the decoder is their transpose (drawn on its own where the sizes
    differ), encoder biases are zero. The decoder bias of a linear coder, the mean it learnt, is kept, and subtracted by
    an autoencoder whether or not the original subtracts it: without that every random latent that points along the
    mean would fire everywhere, and the null would be too easy to beat. What is done to the input before encoding is
    kept as well; a skip connection is left out. The draw depends on ``seed`` and on the hookpoint, side, width and k
    alone.

    Args:
        like: The coder beside which it stands.
        seed: Of the draw.
        k: Latents that fire on one input, by default those of ``like``; for a coder without a fixed k, its measured L0
            rounded.
        name: What to call it, by default the other's name and ``@random-coder``.

    Raises:
        InputError: When neither ``like`` has a fixed k nor one is given, or it does not lie within the width.
    """
    fires = like.k if k is None else k
    if fires is None:
        raise InputError(
            f"coder {like.name!r} has no fixed k; give k, such as its measured L0 rounded, for a random coder like it"
        )
    draw = stream(seed, like.hookpoint, like.side, like.width, fires, "random_coder")
    encoder = _directions(draw, like.width, like.d_in)
    decoder = encoder.clone() if like.d_in == like.d_out else _directions(draw, like.width, like.d_out)
    linear = like if isinstance(like, LinearCoder) else None
    coder = LinearCoder(
        name=name or f"{like.name}@random-coder",
        hookpoint=like.hookpoint,
        side=like.side,
        target=like.target,
        encoder=encoder,
        encoder_bias=torch.zeros(like.width),
        decoder=decoder,
        decoder_bias=torch.zeros(like.d_out) if linear is None else linear.decoder_bias.float().cpu(),
        activation=TopK(fires),
        subtract_decoder_bias=linear is not None and like.target == like.point,
        input_norm="none" if linear is None else linear.input_norm,
        norm_epsilon=1e-6 if linear is None else linear.norm_epsilon,
    )
    return coder.to(like.device, like.dtype)


def untrained_coder(
    architecture: str,
    *,
    d_in: int,
    width: int,
    seed: int,
    hookpoint: str,
    name: str,
    side: Side = "output",
    target: Point | None = None,
    d_out: int | None = None,
    k: int | None = None,
    l0: float | None = None,
    sample: torch.Tensor | None = None,
    base_model: str | None = None,
) -> LinearCoder:
    """Return a coder as it is before its training: what the architecture alone finds.

    Initialised as dictionary_learning does: decoder rows uniform on the unit sphere (of length 0.1 under ``relu``),
    the encoder their transpose (drawn on its own where the sizes differ), all biases zero, gated magnitudes unscaled.

    Args:
        architecture: One of ``ARCHITECTURES``.
        d_in: Size of what it reads.
        width: Number of latents.
        seed: Of the draw, which depends on it, hookpoint, side, architecture and width.
        hookpoint: Where it reads.
        name: What its store and latents are called.
        side: The side of the module that it reads.
        target: What it reconstructs, by default what it reads.
        d_out: Size of what it reconstructs, by default ``d_in``.
        k: Of ``topk``: latents that fire on one input; of ``batchtopk``: on average.
        l0: Of ``jumprelu``: latents that fire on average; None for its initial thresholds, 0.001.
        sample: [n, d_in] activations on which one threshold is chosen so that the average is as asked; some hundred
            suffice. ``batchtopk`` needs it, ``jumprelu`` where l0 is given.
        base_model: The model whose activations it is to read.

    Raises:
        InputError: For an unknown architecture, a setting that it lacks or does not have, or an average that the
            sample does not reach.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"there is no untrained {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    average = _average(architecture, k, l0)
    if width < 1 or d_in < 1:
        raise InputError(f"an untrained coder has a width and a d_in of at least 1, got {width} and {d_in}")
    draw = stream(seed, hookpoint, side, architecture, width, "untrained_coder")
    out = d_in if d_out is None else d_out
    encoder = _directions(draw, width, d_in)
    decoder = encoder.clone() if out == d_in else _directions(draw, width, out)
    if architecture == "relu":
        encoder, decoder = encoder * 0.1, decoder * 0.1
    threshold = _JUMP if average is None else threshold_for(encoder, sample, average, name)
    zeros = torch.zeros(width)
    activations: dict[str, Callable[[], Activation]] = {
        "topk": lambda: TopK(k or 0),
        "batchtopk": lambda: JumpReLU(torch.full((width,), threshold)),
        "jumprelu": lambda: JumpReLU(torch.full((width,), threshold)),
        "relu": ReLU,
        "gated": lambda: Gated(zeros.clone(), torch.ones(width), zeros.clone()),
    }
    return LinearCoder(
        name=name,
        hookpoint=hookpoint,
        side=side,
        target=target,
        encoder=encoder,
        encoder_bias=zeros,
        decoder=decoder,
        decoder_bias=torch.zeros(out),
        activation=activations[architecture](),
        base_model=base_model,
    )


def _average(architecture: str, k: int | None, l0: float | None) -> float | None:
    """Return how many latents are to fire on average through a threshold; None where no threshold is chosen."""
    needs = {"topk": "k", "batchtopk": "k", "jumprelu": "l0"}.get(architecture)
    for setting, given in (("k", k), ("l0", l0)):
        if given is not None and setting != needs:
            raise InputError(f"an untrained {architecture} coder has no {setting}" + (f"; give {needs}" * bool(needs)))
    if needs == "k" and k is None:
        raise InputError(f"an untrained {architecture} coder needs k, the latents that fire on one input")
    return None if architecture == "topk" else l0 if k is None else float(k)


def threshold_for(encoder: torch.Tensor, sample: torch.Tensor | None, l0: float, what: str) -> float:
    """Return the threshold that lets ``l0`` latents fire on average over a sample.

    Halfway between the last value that fires and the first that does not. ``encoder`` is [width, d_in], ``sample``
    [n, d_in]; ``what`` names the coder in errors. Raises InputError when there is no sample, or fewer are positive.
    """
    if sample is None or len(sample) == 0:
        raise InputError(f"coder {what!r} needs a sample of activations, on which its threshold is chosen")
    wanted = round(l0 * len(sample)) if math.isfinite(l0) else 0
    if wanted < 1:
        raise InputError(f"coder {what!r} cannot have an average of {l0} firing latents over {len(sample)} activations")
    best = torch.zeros(0)
    for part in torch.split(sample.float().cpu(), max(1, _CHUNK_ELEMENTS // len(encoder))):
        pre = (part @ encoder.T).relu_().flatten()
        best = (
            torch.cat([best, pre]) if len(pre) + len(best) <= wanted + 1 else torch.cat([best, pre]).topk(wanted + 1)[0]
        )
    best = best.sort(descending=True).values
    positive = int((best > 0).sum())
    if positive < wanted:
        raise InputError(
            f"coder {what!r} cannot have an average of {l0:g} firing latents: {positive / len(sample):.1f} are positive"
        )
    following = float(best[wanted]) if len(best) > wanted else 0.0
    return (float(best[wanted - 1]) + following) / 2


def _directions(draw: np.random.Generator, n: int, size: int) -> torch.Tensor:
    """Return rows [n, size] uniform on the unit sphere, float32.

    Drawn and normed in float64 a few rows at a time, which gives the same numbers as all at once: a wide coder's rows
    take gigabytes in float32 already.
    """
    found = np.empty((n, size), np.float32)
    step = max(1, _DRAWN_ELEMENTS // size)
    for start in range(0, n, step):
        rows = draw.standard_normal((min(step, n - start), size))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found[start : start + step] = rows
    return torch.from_numpy(found)
