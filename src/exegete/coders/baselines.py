"""Coders that learnt nothing, for the nulls beside every score."""

from __future__ import annotations

import numpy as np
import torch

from exegete.coders.coder import SparseCoder
from exegete.coders.topk import TopKCoder
from exegete.errors import InputError
from exegete.streams import stream


def random_coder(like: SparseCoder, seed: int, name: str | None = None) -> TopKCoder:
    """Return an untrained TopK coder with the hookpoint, width and k of another (arXiv 2410.13928, section 4).

    Encoder rows are uniform on the unit sphere, the decoder is their transpose (drawn on its own where the sizes
    differ), encoder biases are zero. A TopK coder's decoder bias, the mean it learnt, is kept: without it every
    random latent that points along the mean would fire everywhere, and the null would be too easy to beat. A skip
    connection is left out. The draw depends on ``seed`` and on the hookpoint, side, width and k alone.

    Raises InputError when ``like`` has no fixed k.
    """
    if like.k is None:
        raise InputError(f"coder {like.name!r} has no fixed k; a random TopK coder cannot be made like it")
    draw = stream(seed, like.hookpoint, like.side, like.width, like.k, "random_coder")

    def directions(size: int) -> torch.Tensor:
        rows = draw.standard_normal((like.width, size))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return torch.from_numpy(rows.astype(np.float32))

    encoder = directions(like.d_in)
    kept = like.decoder_bias.float().cpu() if isinstance(like, TopKCoder) else torch.zeros(like.d_out)
    coder = TopKCoder(
        name=name or f"{like.name}@random-coder",
        hookpoint=like.hookpoint,
        encoder=encoder,
        encoder_bias=torch.zeros(like.width),
        decoder=encoder.clone() if like.d_in == like.d_out else directions(like.d_out),
        decoder_bias=kept,
        k=like.k,
        transcode=like.side == "input",
    )
    return coder.to(like.device, like.dtype) if isinstance(like, TopKCoder) else coder
