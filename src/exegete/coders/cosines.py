"""Latents with like directions: nearest decoder or encoder rows by cosine, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch

from exegete.coders.coder import SparseCoder
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder
from exegete.errors import InputError
from exegete.types import Array

Which = Literal["decoder", "encoder"]
LEAST: Final = 0.01
"""Directions whose cosine is no larger are no neighbours: rounding alone makes orthogonal ones that alike."""

_ENTRIES: Final = 1 << 22  # of the directions and of the products that exist at once


@torch.no_grad()
def cosine_neighbours(
    coder: SparseCoder, indices: Sequence[int] | Array, *, which: Which, k: int = 10
) -> tuple[Array, Array]:
    """Return the latents whose directions are most like those of the given latents.

    Two arrays [len(indices), k], nearest first: the latents, int64, −1 where there are fewer, and the cosines, float32,
    0 there. Of equally near ones the lower index comes first, as long as they are among the k nearest. The axes of a
    ``NeuronCoder`` are orthogonal, and so are principal components: they have no neighbours. A direction of length 0
    has none either. Products are in float32 on the coder's device, for a bounded number of pairs at a time.

    Args:
        coder: Whose latents. Every coder has decoder directions; encoder directions have those of published formats,
            probes and principal components (``LinearCoder``), and neurons.
        indices: Latents whose neighbours are wanted.
        which: ``decoder`` or ``encoder``.
        k: How many.

    Raises:
        InputError: For a latent outside the coder, a k below 1, another ``which``, and encoder directions of a coder
            without.
    """
    wanted = _checked(coder, indices, which, k)
    found = np.full((len(wanted), k), -1, np.int64)
    cosines = np.zeros((len(wanted), k), np.float32)
    dimensions = coder.d_out if which == "decoder" else coder.d_in
    rows = max(1, min(_ENTRIES // dimensions, 1 << 10))
    for start in range(0, len(wanted), rows):
        own = wanted[start : start + rows]
        best, latents = _nearest(coder, own, which, k, columns=max(1, _ENTRIES // max(dimensions, len(own))))
        order = np.lexsort((latents, -best))
        best, latents = np.take_along_axis(best, order, 1), np.take_along_axis(latents, order, 1)
        near = best > LEAST
        at = slice(start, start + len(own)), slice(0, best.shape[1])
        found[at], cosines[at] = np.where(near, latents, -1), np.where(near, best, 0)
    return found, cosines


def _nearest(coder: SparseCoder, own: Array, which: Which, k: int, *, columns: int) -> tuple[Array, Array]:
    """Return the largest cosines of some latents and whose they are [len(own), ≤ k], going through the whole coder."""
    mine = torch.from_numpy(own).to(coder.device)
    query = _directions(coder, mine, which)
    best = query.new_zeros((len(own), 0))
    latents = mine.new_zeros((len(own), 0))
    for start in range(0, coder.width, columns):
        others = torch.arange(start, min(start + columns, coder.width), device=coder.device)
        cosine = query @ _directions(coder, others, which).T
        cosine[mine[:, None] == others] = -1.0
        best = torch.cat([best, cosine], dim=1)
        latents = torch.cat([latents, others.expand(len(own), -1)], dim=1)
        best, at = best.topk(min(k, best.shape[1]), dim=1)
        latents = latents.gather(1, at)
    return best.cpu().numpy(), latents.cpu().numpy()


def _directions(coder: SparseCoder, latents: torch.Tensor, which: Which) -> torch.Tensor:
    """Return the directions of some latents, of length 1 or 0, float32."""
    rows = coder.decoder_rows(latents) if which == "decoder" else _encoder_rows(coder, latents)
    rows = rows.float()
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 0, rows / length.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)


def _encoder_rows(coder: SparseCoder, latents: torch.Tensor) -> torch.Tensor:
    match coder:
        case LinearCoder():
            return coder.encoder[latents]
        case NeuronCoder():
            return coder.decoder_rows(latents)
        case _:
            raise InputError(
                f"coder {coder.name!r} ({coder.architecture}) has no encoder directions; set examples.neighbours to "
                "decoder or cofiring"
            )


def _checked(coder: SparseCoder, indices: Sequence[int] | Array, which: str, k: int) -> Array:
    if which not in ("decoder", "encoder"):
        raise InputError(f"a coder has directions of its decoder and its encoder, got {which!r}")
    if k < 1:
        raise InputError(f"k is at least 1, got {k}")
    wanted = np.array(indices, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= coder.width)]
    if len(outside):
        raise InputError(f"latents of {coder.name} lie in 0 … {coder.width - 1}, got {outside[0]}")
    return wanted
