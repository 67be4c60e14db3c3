"""Whose explanations a latent's own is held against: those of its null, and those of the nearest latents.

A null's are of other latents that fire about as often, and of no near one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exegete.types import Array, Explanation, LatentId
from exegete.views import Donor, Near

if TYPE_CHECKING:
    from exegete.store.store import Store

_TOGETHER = 256  # latents whose overlaps with all others are in memory at once
NEAR = 0.2  # two latents are near neighbours when this share of the rarer one's firings coincide with the other's


def choose_donors(
    store: Store, explanations: Sequence[Explanation], *, count: int, near: float = NEAR
) -> dict[LatentId, tuple[Donor, ...]]:
    """Return up to ``count`` donors for each explained latent: the nearest in firing rate that are no near neighbours.

    Co-firing is counted at the same position of the same row over the whole store.
    """
    indices = np.array([e.latent.index for e in explanations], dtype=np.int64)
    if len(indices) == 0:
        return {}
    length = store.corpus.row_length
    places: list[Array] = []
    for index in indices:
        firings = store.firings(int(index))
        places.append(firings.rows.astype(np.int64) * length + firings.positions)
    rates = np.log(np.array([max(1, len(p)) for p in places], dtype=np.float64))
    chosen: dict[LatentId, tuple[Donor, ...]] = {}
    for i, explanation in enumerate(explanations):
        donors: list[Donor] = []
        for j in np.argsort(np.abs(rates - rates[i]), kind="stable"):
            if len(donors) == count:
                break
            if j == i or _overlap(places[i], places[j]) > near:
                continue
            donors.append(Donor(explanation=explanations[j], rank=len(donors)))
        chosen[explanation.latent] = tuple(donors)
    return chosen


def choose_near(store: Store, explanations: Sequence[Explanation], *, count: int) -> dict[LatentId, tuple[Near, ...]]:
    """Return up to ``count`` nearest explained latents of each, those that fire most at the same positions first.

    The similarity is the Jaccard index of the positions at which two latents fire, over the whole store; latents that
    never fire together are not near.
    """
    from scipy import sparse

    indices = [e.latent.index for e in explanations]
    length = store.corpus.row_length
    places = [f.rows.astype(np.int64) * length + f.positions for f in map(store.firings, indices)]
    sizes = np.array([len(p) for p in places], dtype=np.int64)
    if not sizes.any():
        return {e.latent: () for e in explanations}
    _, columns = np.unique(np.concatenate(places), return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    fires = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, offsets))
    transposed, chosen = fires.T.tocsc(), {}
    for start in range(0, len(indices), _TOGETHER):
        both = (fires[start : start + _TOGETHER] @ transposed).toarray()
        for i, shared in enumerate(both, start=start):
            shared[i] = 0
            alike = shared / np.maximum(sizes[i] + sizes - shared, 1)
            order = np.lexsort((np.arange(len(alike)), -alike))[:count]
            chosen[explanations[i].latent] = tuple(
                Near(explanation=explanations[j], similarity=float(alike[j])) for j in order if alike[j] > 0
            )
    return chosen


def _overlap(a: Array, b: Array) -> float:
    fewer = min(len(a), len(b))
    return len(np.intersect1d(a, b, assume_unique=True)) / fewer if fewer else 0.0
