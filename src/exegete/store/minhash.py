"""Sets of token n-grams that overlap: hashed, sketched, and joined to clusters. Arrays in, arrays out.

A set's sketch is one-permutation MinHash: one hash of every n-gram, the smallest in each of ``bins`` equal ranges (Li,
Owen & Zhang, "One Permutation Hashing", NIPS 2012). Two sets agree in a bin with the probability of their Jaccard
similarity. For the search, empty bins borrow from others (Shrivastava, "Optimal Densification for Fast and Accurate
Minwise Hashing", ICML 2017), and sets that agree in all bins of some band are compared (Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", chapter 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.streams import mix
from exegete.types import Array

EMPTY: Final = np.uint64(2**64 - 1)
"""The smallest hash of a bin that holds none."""

LOOKS: Final = 16
"""With so many that follow it in its bucket is a set compared, so that no crowded bucket is compared in full."""

_EMPTY: Final = np.uint32(2**32 - 1)
_FACTOR: Final = np.uint64(0x5851F42D4C957F2D)
_PROBES: Final = 8
_PAIRS: Final = 1 << 14

Same = Callable[[Array, Array], Array]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How buckets are made: from ``bins``, a power of two, of which ``rows`` are in each of ``bands`` bands."""

    bins: int
    bands: int
    rows: int

    @classmethod
    def of(cls, bins: int, threshold: float, *, missed: float = 1e-3) -> Scheme:
        """Return the most selective bands in which two sets of Jaccard similarity ``threshold`` meet.

        ``missed`` is the most that the chance of meeting in none may be, were all bins independent.
        """
        fitting = [r for r in range(1, 17) if (1.0 - threshold**r) ** (bins // r) <= missed]
        rows = max(fitting, default=1)
        return cls(bins=bins, bands=bins // rows, rows=rows)


def shingles(tokens: Array, size: int) -> Array:
    """Return a hash of every ``size`` neighbours along the last axis, uint64 [..., n − size + 1]; ``size`` ≤ n."""
    count = tokens.shape[-1] - size + 1
    hashes: Array = tokens[..., :count].astype(np.uint64)
    hashes += np.uint64(size << 48)  # so that runs of different sizes differ
    for shift in range(1, size):
        hashes *= _FACTOR
        hashes += tokens[..., shift : shift + count].astype(np.uint64, copy=False)
    return mix(hashes)


def minima(hashes: Array, owners: Array, held: Array) -> None:
    """Lower the smallest hash of each bin in ``held`` [bins, sets] uint64 by hashes [m] of the sets ``owners`` [m]."""
    bins, sets = held.shape
    place = _bin_of(hashes, bins)
    place *= sets
    place += owners
    np.minimum.at(held.reshape(-1), place, hashes)


def band_keys(held: Array, scheme: Scheme) -> Array:
    """Return the bucket of every set in every band, uint32 [sets, bands], from ``minima`` [bins, sets].

    ``held`` has as many bins as the scheme or a multiple; neighbouring ones become one. The keys of sets without any
    element mean nothing.
    """
    folded = held.reshape(scheme.bins, -1, held.shape[1]).min(axis=1)
    dense = _densified(folded.astype(np.uint32))
    # Bins are dealt out at random: neighbouring ones may have borrowed from the same bin.
    dealt = np.argsort(mix(np.arange(scheme.bins, dtype=np.uint64)), kind="stable")
    keys: Array = np.zeros((scheme.bands, held.shape[1]), np.uint64)
    for row in range(scheme.rows):
        keys *= _FACTOR
        keys += dense[dealt[row * scheme.bands : (row + 1) * scheme.bands]]
    return np.ascontiguousarray((mix(keys) >> np.uint64(32)).astype(np.uint32).T)


def crowded(keys: Array) -> Array:
    """Return which sets share a bucket with another in any band, bool [sets]; ``keys`` are what ``band_keys`` gave."""
    found = np.zeros(len(keys), dtype=bool)
    for band in keys.T:
        order = np.argsort(band)
        same = band[order[1:]] == band[order[:-1]]
        found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def clusters(keys: Array, content: Array, same: Same) -> Array:
    """Return the smallest member of the cluster of every set, int64 [sets].

    Sets are of one cluster when ``same`` (places [pairs], places [pairs] → bool [pairs]) holds of them, or of a chain
    between them; asked of are pairs that share a bucket (``keys`` [sets, bands]). ``content`` uint64 [sets] tells sets
    apart and orders them, so that the clusters do not depend on the order in which the sets come.
    """
    union = Union(len(keys))
    for number, band in enumerate(keys.T):
        # In a crowded bucket the likelier pairs, which share the next band too, stand side by side.
        order = np.lexsort((content, keys[:, (number + 1) % keys.shape[1]], band))
        ends = np.searchsorted(band[order], band[order], side="right")
        _join_buckets(union, order, ends, same)
    return union.roots(np.arange(len(keys)))


@final
class Union:
    """Disjoint sets of numbers; each is known by its smallest."""

    def __init__(self, n: int) -> None:
        self._parents: Array = np.arange(n, dtype=np.int64)

    def roots(self, places: Array) -> Array:
        """Return the smallest member of the set of each number, int64."""
        roots: Array = self._parents[places]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[places] = roots
        return roots

    def join(self, left: Array, right: Array) -> None:
        """Make one set of the sets of ``left`` [n] and ``right`` [n], pair by pair."""
        while len(left):
            one, other = self.roots(left), self.roots(right)
            apart = one != other
            left, right, one, other = left[apart], right[apart], one[apart], other[apart]
            np.minimum.at(self._parents, np.maximum(one, other), np.minimum(one, other))
            self._shorten(np.unique(np.concatenate([one, other])))

    def _shorten(self, places: Array) -> None:
        """Let numbers whose ways up lead through one another point at their roots; a way halves at each step."""
        while not np.array_equal(above := self._parents[self._parents[places]], self._parents[places]):
            self._parents[places] = above


def _join_buckets(union: Union, order: Array, ends: Array, same: Same) -> None:
    """Compare every member of a bucket with the next, then the one after it …; ``ends``: where its bucket ends."""
    places = np.arange(len(order))
    for look in range(1, LOOKS + 1):
        places = places[places + look < ends[places]]
        left, right = order[places], order[places + look]
        apart = np.flatnonzero(union.roots(left) != union.roots(right))
        for start in range(0, len(apart), _PAIRS):
            some = apart[start : start + _PAIRS]
            some = some[union.roots(left[some]) != union.roots(right[some])]
            hit = some[same(left[some], right[some])]
            union.join(left[hit], right[hit])


def _densified(held: Array) -> Array:
    """Return minima [bins, sets] uint32 in which empty bins have those of bins that hold one, the same for equal sets.

    A bin asks some others in an order of its own, and after them its next neighbours.
    """
    sparse = np.flatnonzero((held == _EMPTY).any(axis=0))
    if not len(sparse):
        return held
    bins = len(held)
    own = np.ascontiguousarray(held[:, sparse])
    dense = own.copy()
    asked = _bin_of(mix(np.arange(_PROBES * bins, dtype=np.uint64)), bins).reshape(bins, _PROBES).tolist()
    for line, others in zip(dense, asked, strict=True):
        for other in others:
            np.copyto(line, own[other], where=line == _EMPTY)
    following = np.full(len(sparse), _EMPTY, np.uint32)
    for line in own[::-1]:
        np.copyto(following, line, where=line != _EMPTY)  # in the end the first, which follows the last
    for line, filled in zip(own[::-1], dense[::-1], strict=True):
        np.copyto(following, line, where=line != _EMPTY)
        np.copyto(filled, following, where=filled == _EMPTY)
    whole: Array = held.copy()
    whole[:, sparse] = dense
    return whole


def _bin_of(hashes: Array, bins: int) -> Array:
    shift = np.uint64(64 - (bins.bit_length() - 1))
    return (hashes >> shift).astype(np.int64)
