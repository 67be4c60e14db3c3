"""Latents that are near each other: which fire at the same places, by sparse counts, and a file for any such table.

Never is there a table of all pairs: what is in memory at once is bounded in firings and in pairs that do fire together.
"""

from __future__ import annotations

import itertools
import struct
import typing
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

import numpy as np

from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import atomic_file
from exegete.store.reading import latents_at_once, runs
from exegete.streams import mix, stream
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.store.store import Store

Kind = Literal["cofiring", "decoder", "encoder"]
"""What makes latents neighbours: firing at the same places, or like decoder or encoder directions."""
FORMAT: Final = 1

_RUN: Final = 1 << 19  # firings read at once
_FIRINGS: Final = 1 << 24  # firings at the positions looked at, 128 MB
_PAIRS: Final = 1 << 22  # pairs of latents compared at once
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,  # NotImplementedError: a compression or an encryption that is none of ours
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The nearest latents of some latents of one coder.

    ``indices`` int64 [m], no two alike; ``neighbours`` int64 [m, k], nearest first, −1 where there are fewer;
    ``similarity`` float32 [m, k], 0 where there are fewer: the Jaccard index of the sets of positions at which two
    latents fire, or the cosine of their directions. Raises InputError when shapes, types or values are others.
    """

    kind: Kind
    indices: Array
    neighbours: Array
    similarity: Array

    def __post_init__(self) -> None:
        shape = self.neighbours.shape
        if self.kind not in typing.get_args(Kind):
            raise InputError(f"neighbours are of the kinds {', '.join(typing.get_args(Kind))}, got {self.kind!r}")
        if len(shape) != 2 or self.similarity.shape != shape or self.indices.shape != shape[:1]:
            raise InputError(
                f"neighbours are [m], [m, k] and [m, k], got {self.indices.shape}, {shape}, {self.similarity.shape}"
            )
        kinds = [str(array.dtype) for array in (self.indices, self.neighbours, self.similarity)]
        if kinds != ["int64", "int64", "float32"]:
            raise InputError(f"neighbours are int64, int64 and float32, got {', '.join(kinds)}")
        bounds = (self.indices.min(initial=0) >= 0, self.neighbours.min(initial=-1) >= -1)
        if not all(bounds) or not np.isfinite(self.similarity).all() or len(np.unique(self.indices)) < len(self):
            raise InputError("neighbours name a latent twice or below 0, or have a similarity that is no number")

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, indices: Sequence[int] | Array) -> Array:
        """Return the neighbours of these latents, int64 [len(indices), k]. Raises NotFoundError for others."""
        asked = np.asarray(indices, np.int64)
        order = np.argsort(self.indices)
        at = np.searchsorted(self.indices, asked, sorter=order)
        place = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
        missing = asked[self.indices[place] != asked] if len(order) else asked
        if len(missing):
            raise NotFoundError(f"nobody looked for neighbours of latent {missing[0]}; find them for all that are used")
        found: Array = self.neighbours[place] if len(order) else self.neighbours
        return found

    def with_others(self, others: Neighbours) -> Neighbours:
        """Return these and those of other latents as one. Raises InputError for another kind or k."""
        if (self.kind, self.neighbours.shape[1]) != (others.kind, others.neighbours.shape[1]):
            raise InputError(f"{self.kind} neighbours cannot be joined with {others.kind} ones, or others than as many")
        return Neighbours(
            kind=self.kind,
            indices=np.concatenate([self.indices, others.indices]),
            neighbours=np.concatenate([self.neighbours, others.neighbours]),
            similarity=np.concatenate([self.similarity, others.similarity]),
        )


def cofiring_neighbours(
    store: Store, indices: Sequence[int] | Array, *, k: int = 10, positions: int = 200_000, seed: int = 0
) -> Neighbours:
    """Return the latents of the whole coder that most often fire where each of the given latents fires.

    The similarity is the Jaccard index |A ∩ B| / |A ∪ B| of the positions at which two latents fire; of equally near
    ones the lower index comes first. It is exact in a store of at most ``positions`` counted positions. In a larger
    one about so many are drawn: |A| and |B| stay exact, and |A ∩ B| is counted at those positions of A whose hash
    (of seed and position) lies below a threshold, and divided by it. A latent with few firings has the threshold 1, so
    that a rare latent's neighbours are exact as long as few latents are asked for. The answer for a latent depends on
    the seed and on how many latents are asked for, not on which, nor on how the store is cut into shards. Where very
    many latents fire at once, fewer positions are drawn.

    Raises InputError for a latent outside the coder or named twice, and for k or positions below 1.
    """
    wanted = _checked(store, indices, k, positions)
    counts = store.counts
    rates = _rates(store, counts, wanted, positions)
    hits, drawn = _looked_at(store, counts, wanted, rates, seed)
    others = _firing_at(store, counts, drawn)
    # As many multiplications make up a row of the product, and no more entries.
    cost = np.minimum(hits @ np.diff(others.indptr).astype(np.float32), float(store.width)).astype(np.int64) + 1
    found: Array = np.full((len(wanted), k), -1, np.int64)
    similarity: Array = np.zeros((len(wanted), k), np.float32)
    for start, stop in runs(cost, _PAIRS, len(wanted)):
        shared = hits[start:stop] @ others
        keys = _keys(shared, wanted[start:stop], rates[start:stop], counts)
        for row, (begin, end) in enumerate(itertools.pairwise(shared.indptr.tolist()), start=start):
            best = keys[begin:end] if end - begin <= k else np.partition(keys[begin:end], end - begin - k)[-k:]
            best = np.sort(best[best > 0])[::-1]
            found[row, : len(best)] = 0xFFFFFFFF - (best & np.uint64(0xFFFFFFFF)).astype(np.int64)
            similarity[row, : len(best)] = (best >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return Neighbours(kind="cofiring", indices=wanted, neighbours=found, similarity=similarity)


def save_neighbours(folder: Path, neighbours: Neighbours, key: str) -> None:
    """Write neighbours into a folder, atomically, over older ones of their kind; ``key`` says what they rest on."""
    with atomic_file(_path(folder, neighbours.kind)) as file:
        np.savez(
            file,
            allow_pickle=False,
            format=np.int64(FORMAT),
            key=np.array(key),
            indices=neighbours.indices,
            neighbours=neighbours.neighbours,
            similarity=neighbours.similarity,
        )


def load_neighbours(folder: Path, kind: Kind, key: str) -> Neighbours | None:
    """Return the neighbours of a kind that were saved with this key, None where there are none or others.

    Raises CorruptError naming a file that is damaged.
    """
    path = _path(folder, kind)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            if any(item.file_size != item.compress_size for item in data.zip.infolist()):
                raise ValueError("it is compressed, which it never was")  # what is not cannot be larger than the file
            if data["format"].tolist() != FORMAT or data["key"].tolist() != key:
                return None
            fields = {name: data[name] for name in ("indices", "neighbours", "similarity")}
        return Neighbours(kind=kind, **fields)
    except FileNotFoundError:
        return None
    except (*_DAMAGE, InputError) as error:
        raise CorruptError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; delete it") from error


def _path(folder: Path, kind: Kind) -> Path:
    return folder / f"neighbours-{kind}.npz"


def _checked(store: Store, indices: Sequence[int] | Array, k: int, positions: int) -> Array:
    if k < 1 or positions < 1:
        raise InputError(f"neighbours need k and positions of at least 1, got {k} and {positions}")
    wanted = np.array(indices, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= store.width)]
    if len(outside):
        raise InputError(f"latents of {store.name} lie in 0 … {store.width - 1}, got {outside[0]}")
    if len(np.unique(wanted)) < len(wanted):
        raise InputError("a latent is named twice; ask for the neighbours of each once")
    return wanted


def _rates(store: Store, counts: Array, wanted: Array, positions: int) -> Array:
    """Return the share of each latent's firings that is looked at, float64 [m].

    Half of the positions are drawn uniformly; the other half is shared among the latents, so that each is looked at
    where it fires, however rarely.
    """
    n = store.manifest.n_positions
    most = min(positions, max(1, _FIRINGS * n // max(1, int(counts.sum()))))
    if n <= most:
        return np.ones(len(wanted))
    share = most / 2 / max(1, len(wanted))
    rates: Array = np.minimum(np.maximum(most / 2 / n, share / np.maximum(counts[wanted], 1)), 1.0)
    return rates


def _looked_at(store: Store, counts: Array, wanted: Array, rates: Array, seed: int) -> tuple[Any, Array]:
    """Return where the latents are looked at, sparse [m, drawn] of ones, and those flat positions, ascending."""
    from scipy import sparse

    key = stream(seed, "cofiring").integers(2**64, dtype=np.uint64)
    order = np.argsort(wanted)
    owners, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    begun = 0
    for sizes, place in _places(store, counts, wanted[order]):
        owner = np.repeat(order[begun : begun + len(sizes)], sizes)
        begun += len(sizes)
        kept = _uniform(key, place) < rates[owner]
        owners.append(owner[kept])
        places.append(place[kept])
    drawn, column = np.unique(np.concatenate(places), return_inverse=True)
    owner = np.concatenate(owners)
    ones = np.ones(len(owner), np.float32)
    return sparse.csr_matrix((ones, (owner, column)), shape=(len(wanted), len(drawn))), drawn


def _firing_at(store: Store, counts: Array, drawn: Array) -> Any:
    """Return what fires at these flat positions, sparse [drawn, width] of ones."""
    from scipy import sparse

    looked_at = np.zeros(store.manifest.row_stop * store.row_length, bool)
    looked_at[drawn] = True
    columns: list[Array] = [np.zeros(0, np.int32)]
    firing = [np.zeros(1, np.int64)]
    for sizes, place in _places(store, counts, np.arange(store.width)):
        kept = looked_at[place]
        columns.append(np.searchsorted(drawn, place[kept]).astype(np.int32))
        firing.append(np.bincount(np.repeat(np.arange(len(sizes)), sizes)[kept], minlength=len(sizes)))
    rows, starts = np.concatenate(columns), np.cumsum(np.concatenate(firing))
    ones = np.ones(len(rows), np.float32)
    return sparse.csc_matrix((ones, rows, starts), shape=(len(drawn), store.width)).tocsr()


def _places(store: Store, counts: Array, latents: Array) -> Iterator[tuple[Array, Array]]:
    """Yield how often each of some latents fires and their flat positions, int64, for ascending latents in turn."""
    most = latents_at_once(store.manifest)
    ends = [*(np.flatnonzero(np.diff(latents) > 1) + 1).tolist(), len(latents)]
    for begin, end in itertools.pairwise([0, *ends]):
        for low, high in runs(counts[latents[begin:end]], _RUN, most):
            start, stop = int(latents[begin + low]), int(latents[begin + high - 1]) + 1
            found = store.block(start, stop)
            place = [f.rows * store.row_length + f.positions for f in found]
            yield np.array([len(f) for f in found], np.int64), np.concatenate(place)


def _keys(shared: Any, wanted: Array, rates: Array, counts: Array) -> Array:
    """Return keys uint64 [pairs] that order a latent's neighbours: similarity, then the lower index; 0 for itself.

    ``shared`` [m, width] counts the positions at which both were seen to fire.
    """
    row = np.repeat(np.arange(len(wanted)), np.diff(shared.indptr))
    other = shared.indices.astype(np.int64)
    own, theirs = counts[wanted][row], counts[other]
    both = np.minimum(shared.data / rates[row], np.minimum(own, theirs))
    similarity = (both / (own + theirs - both)).astype(np.float32)
    keys: Array = similarity.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= (0xFFFFFFFF - other).astype(np.uint64)
    keys[other == wanted[row]] = 0
    return keys


def _uniform(key: np.uint64, places: Array) -> Array:
    """Return a number in [0, 1) for every flat position, a hash of it and the key (splitmix64)."""
    bits = mix(places.astype(np.uint64) ^ key)
    uniform: Array = (bits >> np.uint64(11)) * 2.0**-53
    return uniform
