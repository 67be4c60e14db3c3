"""Pre-activations → the few latents that fire. Exact, and never through a second dense array.

Every function takes dense pre-activations [n, width] and returns a ``Part``. The obvious forms they are tested against
are one line each: ``pre.topk(k)``, and ``(pre > threshold).nonzero()``. Ties at the k-th place are broken as the
library does, differently on different devices; the values are the same either way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_BLOCK = 32
_WIDE = 8192
_CUDA_ELEMENTS = 1 << 28
_CPU_ROWS, _CPU_LEAST, _CPU_MOST = 512, 1 << 20, 1 << 26


class Part(NamedTuple):
    """Sparse activations of n inputs: rectangular [n, k] with ``counts`` None, else flat with ``counts`` [n]."""

    indices: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor | None = None


def largest(pre: torch.Tensor, k: int) -> Part:
    """Return the k largest of every row, strongest first.

    Wide rows on a CPU are cut into blocks: the k blocks with the largest maxima hold the k largest values, so that only
    those blocks are sorted. On a GPU the library's own ``topk`` is taken at any width: it selects by radix, in a few
    passes over the row whatever k is, and finding the maxima and gathering their blocks would be passes more.
    """
    n, width = pre.shape
    blocks, rest = divmod(width, _BLOCK)
    if pre.device.type != "cpu" or width < _WIDE or rest or k * 8 > blocks:
        found = pre.topk(k, dim=-1)
        return Part(found.indices, found.values)
    grid = pre.view(n, blocks, _BLOCK)
    best = grid.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    inside = grid.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1).topk(k, dim=-1)
    block = best.gather(1, inside.indices // _BLOCK)
    return Part(block * _BLOCK + inside.indices % _BLOCK, inside.values)


def largest_of_groups(pre: torch.Tensor, k: int) -> Part:
    """Return the largest of each of k equal groups of neighbouring latents, in group order."""
    size = pre.shape[1] // k
    best = pre.view(-1, k, size).max(dim=-1)
    starts = torch.arange(0, pre.shape[1], size, device=pre.device)
    return Part(best.indices + starts, best.values)


def positive(part: Part) -> Part:
    """Return the part with 0 for values that are not positive: a ReLU after selecting is one before it, and cheaper."""
    return part._replace(values=part.values.clamp_min(0))


def where(keep: torch.Tensor, values: torch.Tensor) -> Part:
    """Return the values [n, width] at the true places of ``keep`` [n, width], row by row."""
    n, width = keep.shape
    if keep.device.type == "cpu":
        flat = torch.from_numpy(np.flatnonzero(keep.contiguous().numpy().reshape(-1)))
        row = flat.div(width, rounding_mode="floor")
        return Part(flat - row * width, values.reshape(-1)[flat], torch.bincount(row, minlength=n))
    row, column = keep.nonzero(as_tuple=True)
    return Part(column, values[row, column], torch.bincount(row, minlength=n))


def above(pre: torch.Tensor, threshold: torch.Tensor | float) -> Part:
    """Return every pre-activation that is positive and above its latent's threshold ([width] or one number), or NaN."""
    bound = threshold.clamp_min(0) if isinstance(threshold, torch.Tensor) else max(threshold, 0.0)
    return where(exceeds(pre, bound), pre)


def exceeds(values: torch.Tensor, bound: torch.Tensor | float) -> torch.Tensor:
    """Return where values are above their bound; NaN, which only an overflow makes, counts, so that it is noticed."""
    return (values <= bound).logical_not_()


def finite(values: torch.Tensor) -> bool:
    """Tell whether no value is NaN or infinite, in one quick pass.

    A sum is finite only when every term is; where it overflows, a second look decides.
    """
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def rows_at_once(width: int, device: torch.device) -> int:
    """Return how many inputs of a ``width`` to treat at a time, at least 1.

    On a CPU 512, so that what the product leaves is still in the cache when the largest are looked for; more where a
    coder is narrow, fewer where their dense array would have over 2^26 elements. On a CUDA device as many as make 2^28
    (2,048 inputs to 131,072 latents: 1 GiB in float32), since a GPU is idle for most of a small product.
    """
    if device.type == "cuda":
        return max(1, _CUDA_ELEMENTS // width)
    return max(1, min(max(_CPU_ROWS, _CPU_LEAST // width), _CPU_MOST // width))


def has_float64(device: torch.device) -> bool:
    """Tell whether a device computes in float64, which Apple's GPUs (MPS) do not."""
    return device.type != "mps"


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on its own device or, where that has no float64, on the CPU."""
    return (x if has_float64(x.device) else x.cpu()).double()


def joined(parts: list[Part]) -> Part:
    """Return the parts of consecutive inputs as one."""
    if len(parts) == 1:
        return parts[0]
    counts = None if parts[0].counts is None else torch.cat([p.counts for p in parts if p.counts is not None])
    return Part(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]), counts)
