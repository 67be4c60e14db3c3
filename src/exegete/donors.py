"""Whose explanations stand in for a latent's own in its null: other latents that fire about as often, no near one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exegete.types import Array, Explanation, LatentId
from exegete.views import Donor

if TYPE_CHECKING:
    from exegete.store.store import Store

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


def _overlap(a: Array, b: Array) -> float:
    fewer = min(len(a), len(b))
    return len(np.intersect1d(a, b, assume_unique=True)) / fewer if fewer else 0.0
