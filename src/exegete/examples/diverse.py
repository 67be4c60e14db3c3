"""Windows that are unlike one another: farthest-first over hashed token profiles. Arrays in, arrays out."""

from __future__ import annotations

from typing import Final

import numpy as np

from exegete.examples.keys import mixed
from exegete.types import Array

CANDIDATES: Final = 512
"""Most windows of a latent that are compared; of more, evenly many of all ranks."""

_BUCKETS: Final = 256


def candidates(sizes: Array) -> tuple[Array, Array]:
    """Return latent and rank of the windows to compare, of latents with so many windows each; the first is rank 0."""
    counts = np.minimum(sizes, CANDIDATES)
    latent = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(latent)) - (np.cumsum(counts) - counts)[latent]
    return latent, place * sizes[latent] // np.maximum(counts[latent], 1)


def farthest_first(tokens: Array, n: int) -> Array:
    """Return n of the windows with these ``tokens`` [windows, window]: the first, then the least like those taken.

    How alike two windows are is the cosine of their token counts, tokens being hashed into 256 buckets; a window is as
    like those taken as it is like the one of them that it is most like. Of equal ones the first is taken (Gonzalez
    1985).
    """
    profiles = _profiles(tokens)
    norms = np.sqrt((profiles * profiles).sum(axis=1))  # whole numbers, so that no order of adding matters
    likeness: Array = np.zeros(len(tokens))
    taken: list[int] = []
    for _ in range(min(n, len(tokens))):
        taken.append(int(likeness.argmin()))
        cosine = (profiles @ profiles[taken[-1]]) / (norms * norms[taken[-1]])
        likeness = np.maximum(likeness, cosine)
        likeness[taken[-1]] = np.inf
    return np.array(taken, np.int64)


def _profiles(tokens: Array) -> Array:
    """Return how often each bucket's tokens stand in each window, float32 [windows, buckets], whole numbers."""
    buckets = (mixed(tokens.astype(np.uint64)) % np.uint64(_BUCKETS)).astype(np.int64)
    flat = (np.arange(len(tokens))[:, None] * _BUCKETS + buckets).reshape(-1)
    return np.bincount(flat, minlength=len(tokens) * _BUCKETS).reshape(-1, _BUCKETS).astype(np.float32)
