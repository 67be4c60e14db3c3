"""Which of a latent's firing windows are taken, and with what probability. Arrays in, arrays out.

Windows are ranked by their maximum, strongest first; equal maxima are ordered at random. ``decile_0`` is the strongest
tenth of the ranks and ``decile_9`` the weakest (arXiv 2410.13928, section 3.2 and Tab. A5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.config import Strategy
from exegete.errors import unknown
from exegete.types import Array

N_DECILES: Final = 10
STRATA: Final = (*(f"decile_{i}" for i in range(N_DECILES)), "top", "random", "silent")
"""Names of the strata; a stratum is stored as its place here."""
_TOP, _RANDOM = STRATA.index("top"), STRATA.index("random")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What was drawn, strongest first within each part of the strategy.

    ``chosen`` [n] are indices into the given windows, no two alike; ``stratum`` [n] are places in STRATA;
    ``probability`` [n] is the chance that the draw takes the window.
    """

    chosen: Array
    stratum: Array
    probability: Array

    def __len__(self) -> int:
        return len(self.chosen)


def draw(maxima: Array, n: int, strategy: Strategy, rng: np.random.Generator) -> Draw:
    """Draw ``n`` of the windows with these maxima (positive float32), or all when there are no more.

    ``top`` takes the strongest, with probability 1: it is no draw, and says nothing about the other windows.
    ``random`` takes each window with probability n / N. ``quantiles`` takes equal parts of the ten rank deciles; a
    window of decile h has probability n_h / N_h. ``mix`` takes the strongest half of n (rounded up) as ``top`` does
    and the rest by ``quantiles`` among the windows that are left; its deciles are those of the windows left. Raises
    NotFoundError for another strategy.
    """
    ranked = _rank(maxima, rng)
    n = min(n, len(ranked))
    if strategy == "top":
        return _constant(ranked[:n], _TOP, 1.0)
    if strategy == "random":
        chosen = np.sort(rng.choice(len(ranked), n, replace=False)) if n else np.empty(0, np.int64)
        return _constant(ranked[chosen], _RANDOM, n / max(len(ranked), 1))
    if strategy == "quantiles":
        return _quantiles(ranked, n, rng)
    if strategy == "mix":
        half = (n + 1) // 2
        top, rest = _constant(ranked[:half], _TOP, 1.0), _quantiles(ranked[half:], n - half, rng)
        return Draw(
            chosen=np.concatenate([top.chosen, rest.chosen]),
            stratum=np.concatenate([top.stratum, rest.stratum]),
            probability=np.concatenate([top.probability, rest.probability]),
        )
    raise unknown("strategy", strategy, ("top", "random", "quantiles", "mix"))


def deciles(n: int) -> Array:
    """Return the decile of each of n ranks, strongest first: ten parts whose sizes differ by one at most."""
    return np.arange(n) * N_DECILES // max(n, 1)


def allocate(n: int, sizes: Array) -> Array:
    """Share n among strata of these sizes as equally as they allow; what remains goes to the strongest first.

    A stratum gives no more than it has; what it lacks the others make up for. Gives everything when n exceeds the sum.
    """
    given = np.zeros(len(sizes), dtype=np.int64)
    left = min(n, int(np.sum(sizes)))
    while left:
        room = np.flatnonzero(given < sizes)
        share = left // len(room)
        added = np.minimum(sizes[room] - given[room], share) if share else np.arange(len(room)) < left
        given[room] += added
        left -= int(added.sum())
    return given


def _rank(maxima: Array, rng: np.random.Generator) -> Array:
    """Return window indices, strongest first, equal ones in random order."""
    # Bits of positive floats are ordered as the floats are; a random lower half orders ties the same on any platform.
    bits = np.asarray(maxima, dtype=np.float32).view(np.uint32).astype(np.uint64)
    ties = rng.integers(2**32, size=len(bits), dtype=np.uint64)
    return np.argsort(((np.uint64(2**32 - 1) - bits) << np.uint64(32)) | ties)


def _quantiles(ranked: Array, n: int, rng: np.random.Generator) -> Draw:
    """Draw equal parts of the deciles; with n below ten, equal parts of n strata, so that no window has no chance."""
    total = len(ranked)
    n = min(n, total)
    parts = min(N_DECILES, n)
    part = np.arange(total) * parts // max(total, 1)
    sizes = np.bincount(part, minlength=parts)
    given = allocate(n, sizes)
    # The given[h] smallest random keys of each part: a draw without replacement in all parts at once.
    order = np.argsort(part + rng.random(total))
    place = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.sort(order[place < given[part]])
    return Draw(
        chosen=ranked[chosen],
        stratum=deciles(total)[chosen],
        probability=(given / np.maximum(sizes, 1))[part[chosen]],
    )


def _constant(chosen: Array, stratum: int, probability: float) -> Draw:
    n = len(chosen)
    return Draw(chosen=chosen, stratum=np.full(n, stratum), probability=np.full(n, probability))
