"""Whose explanations a latent's own is held against: those of its null, and those of the nearest latents.

A null's are of other latents that fire about as often, and of no near one. Both are exact, and neither holds the
firings of all explained latents at once: 100,000 latents are as well served as a hundred.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import merge
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.store.reading import runs
from exegete.types import Array, Explanation, LatentId
from exegete.views import Donor, Near

if TYPE_CHECKING:
    from exegete.store.store import Store

NEAR: Final = 0.2
"""Two latents are near neighbours when this share of the rarer one's firings coincide with the other's."""
_KEPT: Final = 1 << 25
"""Firings, 8 bytes each, that the search for donors keeps; latents of like rate are looked at one after the other."""
_TOGETHER: Final = 1 << 24
"""Firings of a block of latents that are held against those of another such block."""
_PAIRS: Final = 1 << 23
"""Pairs of latents, at most, whose overlaps are in memory at once, unless one latent has more."""


def choose_donors(
    store: Store, explanations: Sequence[Explanation], *, count: int, near: float = NEAR, kept: int = _KEPT
) -> dict[LatentId, tuple[Donor, ...]]:
    """Return up to ``count`` donors for each explained latent: the nearest in firing rate that are no near neighbours.

    Nearness in rate is that of logarithms; of equally near ones the first explained comes first. Co-firing is counted
    at the same position of the same row over the whole store. At most ``kept`` firings stay in memory beside those of
    two latents.
    """
    if not explanations:
        return {}
    places = _Places(store, [e.latent.index for e in explanations], kept)
    rates = np.log(np.maximum(places.counts, 1).astype(np.float64))
    order = np.argsort(rates, kind="stable")
    levels, starts = np.unique(rates[order], return_index=True)
    groups = np.split(order, starts[1:])
    chosen: dict[int, tuple[Donor, ...]] = {}
    for own, i in ((own, int(i)) for own, group in enumerate(groups) for i in group):
        others = (j for j in _outward(groups, levels, own) if j != i and places.overlap(i, j) <= near)
        chosen[i] = tuple(
            Donor(explanation=explanations[j], rank=rank) for rank, j in enumerate(itertools.islice(others, count))
        )
    return {explanation.latent: chosen[i] for i, explanation in enumerate(explanations)}


def choose_near(
    store: Store,
    explanations: Sequence[Explanation],
    *,
    count: int,
    together: int = _TOGETHER,
    pairs: int = _PAIRS,
) -> dict[LatentId, tuple[Near, ...]]:
    """Return up to ``count`` nearest explained latents of each, those that fire most at the same positions first.

    The similarity is the Jaccard index of the positions at which two latents fire, over the whole store; latents that
    never fire together are not near, and of equally near ones the first explained comes first. Latents are compared
    block by block, of ``together`` firings each, and of their overlaps, counted ``pairs`` at a time, only the largest
    are kept.
    """
    counts = store.counts[[e.latent.index for e in explanations]] if explanations else np.zeros(0, np.int64)
    order = np.argsort([e.latent.index for e in explanations], kind="stable")  # as the store lies
    blocks = [order[start:stop] for start, stop in runs(counts[order], together, len(order))]
    best: dict[int, tuple[Array, Array]] = {}
    for block in blocks:
        fires, positions = _fires(store, explanations, block)
        for others in blocks:
            beside = fires if others is block else _fires(store, explanations, others, positions)[0]
            _keep_best(best, block, others, fires, beside.T.tocsr(), counts, count, pairs)
    return {
        e.latent: tuple(
            Near(explanation=explanations[j], similarity=alike)
            for j, alike in zip(*(found.tolist() for found in best[i]), strict=True)
        )
        for i, e in enumerate(explanations)
    }


@final
class _Places:
    """The flat positions at which latents fire, read when asked for; those used last are kept."""

    def __init__(self, store: Store, indices: Sequence[int], kept: int) -> None:
        self.counts: Array = store.counts[np.array(indices, np.int64)]
        self._store, self._indices, self._most = store, indices, kept
        self._held: OrderedDict[int, Array] = OrderedDict()
        self._n_held = 0

    def overlap(self, i: int, j: int) -> float:
        """Return the share of the rarer latent's firings that coincide with the other's; 0 where it never fires."""
        rarer, other = sorted((i, j), key=lambda k: int(self.counts[k]))
        if not self.counts[rarer]:
            return 0.0
        few, many = self._of(rarer), self._of(other)
        at = np.searchsorted(many, few)
        return int((many[np.minimum(at, len(many) - 1)] == few).sum()) / len(few)

    def _of(self, i: int) -> Array:
        """Return the positions of a latent, ascending."""
        found = self._held.get(i)
        if found is None:
            found = self._held[i] = _flat(self._store, self._indices[i])
            self._n_held += len(found)
            while self._n_held > self._most and len(self._held) > 1:
                self._n_held -= len(self._held.popitem(last=False)[1])
        self._held.move_to_end(i)
        return found


def _flat(store: Store, index: int) -> Array:
    firings = store.firings(index)
    found: Array = np.sort(firings.rows.astype(np.int64) * store.row_length + firings.positions)
    return found


def _outward(groups: Sequence[Array], levels: Array, own: int) -> Iterator[int]:
    """Yield latents by how far the level of their group is from that of the group ``own``, then in order."""

    def walk(numbers: range) -> Iterator[tuple[float, int]]:
        for number in numbers:
            far = abs(float(levels[number] - levels[own]))
            yield from ((far, j) for j in groups[number].tolist())

    return (j for _, j in merge(walk(range(own, -1, -1)), walk(range(own + 1, len(groups)))))


def _fires(
    store: Store, explanations: Sequence[Explanation], block: Array, positions: Array | None = None
) -> tuple[Any, Array]:
    """Return where some latents fire, sparse [latents, positions] of ones, and these flat positions, ascending.

    Given ``positions``, firings elsewhere are left out.
    """
    from scipy import sparse

    places = [_flat(store, explanations[i].latent.index) for i in block.tolist()]
    if positions is None:
        known, columns = np.unique(np.concatenate(places), return_inverse=True)
        sizes = [len(p) for p in places]
    else:
        known, found = positions, []
        for place in places:
            at = np.minimum(np.searchsorted(known, place), max(0, len(known) - 1))
            found.append(at[known[at] == place] if len(known) else at[:0])
        columns, sizes = np.concatenate(found), [len(f) for f in found]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ones = np.ones(len(columns), np.int32)
    return sparse.csr_matrix((ones, columns.astype(np.int32), offsets), shape=(len(block), len(known))), known


def _keep_best(
    best: dict[int, tuple[Array, Array]],
    block: Array,
    others: Array,
    fires: Any,
    beside: Any,
    counts: Array,
    count: int,
    pairs: int,
) -> None:
    """Lay the latents ``others``, which fire at ``beside`` [positions, others], beside what a block found so far."""
    # As many multiplications make up a row of the product, and no more entries.
    cost = np.minimum(fires @ np.diff(beside.indptr).astype(np.int64), len(others))
    for start, stop in runs(cost, pairs, len(block)):
        shared = fires[start:stop] @ beside
        for row, (begin, end) in enumerate(itertools.pairwise(shared.indptr.tolist()), start=start):
            i, j, n = int(block[row]), others[shared.indices[begin:end]], shared.data[begin:end].astype(np.int64)
            alike = n / np.maximum(counts[i] + counts[j] - n, 1)
            alike[j == i] = 0.0
            known, known_alike = best.get(i, (j[:0], alike[:0]))
            best[i] = _largest(np.concatenate([known, j]), np.concatenate([known_alike, alike]), count)


def _largest(j: Array, alike: Array, count: int) -> tuple[Array, Array]:
    """Return the latents that are most alike, at most ``count``, and how much; none that is not alike at all."""
    least = np.partition(alike, -count)[-count] if 0 < count < len(alike) else 0.0
    few = np.flatnonzero((alike >= least) & (alike > 0.0))  # the last of them may tie
    order = few[np.lexsort((j[few], -alike[few]))][:count]
    return j[order], alike[order]
