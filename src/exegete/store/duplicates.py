"""Near-duplicates: documents that must lie on one side of a split, and windows of which one stands for all.

Two texts are as similar as the Jaccard similarity of their sets of token n-grams: what both hold over what either
holds. So a short text within a long one is no near-duplicate of it, nor are two that share a licence header and little
else. Clusters are chains of similar pairs; ``cluster_counts`` tells how far they reached.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final

import numpy as np

from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import hash_file, read_array, write_array
from exegete.store.checks import read_manifest, verify_once, write_manifest
from exegete.store.minhash import EMPTY, Scheme, band_keys, clusters, crowded, minima, shingles
from exegete.store.token_rows import Corpus
from exegete.types import Array, Rows

DOCUMENT_SHINGLE: Final = 5
"""Tokens in an n-gram of documents."""

WINDOW_SHINGLE: Final = 3
"""Tokens in an n-gram of windows."""

FORMAT: Final = 1
ARRAY: Final = "duplicates.npy"
MANIFEST: Final = "duplicates.json"

_BINS: Final = 64  # that buckets are made of
_ESTIMATE_BINS: Final = 256
_CHUNK: Final = 1 << 18
_SETS: Final = 1 << 12
_NONE: Final = np.uint16(0xFFFF)

WindowTokens = Callable[[int, int], Array]


class TextRows(Protocol):
    """What finding near-duplicate documents needs of a corpus."""

    @property
    @abstractmethod
    def documents(self) -> Sequence[Any]:
        """All documents."""

    @property
    @abstractmethod
    def segments(self) -> Array:
        """Row, start, stop and document of every run of one document's tokens in a row, int64 [n_segments, 4]."""

    @abstractmethod
    def rows(self, index: slice, /) -> Rows:
        """Return rows with the document of every token and which count; those of a document follow one another."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCounts:
    """How many ``items`` there are, how many of them are ``clustered`` with others, and in how many ``clusters``.

    ``largest`` is the number of items of the largest cluster: 1 when no two are near-duplicates, 0 without any item.
    """

    items: int
    clustered: int
    clusters: int
    largest: int


def cluster_counts(members: Array) -> ClusterCounts:
    """Return the counts of what ``document_clusters`` or ``window_clusters`` gave."""
    sizes = np.bincount(members, minlength=1)
    several = sizes[sizes > 1]
    return ClusterCounts(
        items=len(members), clustered=int(several.sum()), clusters=len(several), largest=int(sizes.max())
    )


def document_clusters(corpus: TextRows, threshold: float) -> Array:
    """Return the cluster of every document, named by its smallest member, int64 [n_documents].

    Documents are near-duplicates when their sets of 5-grams of tokens that count have an estimated Jaccard similarity
    of at least ``threshold``; the estimate's standard error is at most 0.032 (0.025 at 0.8) and far less for documents
    of few tokens. How documents lie in rows makes no difference. Documents of fewer than 5 tokens that count are
    near-duplicates when they are equal, and one without any has none. A threshold of 0 keeps all apart. The tokens are
    read once; some 600 bytes a document are held. The result is kept in the folder of a corpus on disk, where that can
    be written.

    Raises InputError when ``threshold`` is neither 0 nor between 0.5 and 1.
    """
    _check(threshold)
    n = len(corpus.documents)
    if threshold == 0 or n < 2:
        return np.arange(n, dtype=np.int64)
    if not isinstance(corpus, Corpus):
        return _document_clusters(corpus, n, threshold)
    key = {"format": FORMAT, "corpus": corpus.hash, "threshold": float(threshold), "documents": n}
    kept = _load(corpus.folder, key)
    if kept is None:
        kept = _document_clusters(corpus, n, threshold)
        with contextlib.suppress(OSError):  # somebody else's corpus may be read-only
            write_array(corpus.folder / ARRAY, kept)
            write_manifest(corpus.folder / MANIFEST, {**key, "sha256": hash_file(corpus.folder / ARRAY)})
    return kept


def window_clusters(tokens_of: WindowTokens, n: int, threshold: float) -> Array:
    """Return the cluster of every one of ``n`` windows, named by its smallest member, int64 [n].

    ``tokens_of(start, stop)`` gives the tokens of windows ``start`` to ``stop`` (exclusive), integers
    [stop − start, window]; it is called for all windows in order, then again for those that may have near-duplicates.
    Windows are near-duplicates when their sets of 3-grams have a Jaccard similarity of at least ``threshold``; it is
    exact, but of the pairs just at 0.8 one in some thousands is never looked at. Windows shorter than 3 tokens are
    near-duplicates when they are equal. A threshold of 0 keeps all apart. At 0.8 some 72 bytes a window are held, more
    at lower thresholds, and the tokens of those that may have near-duplicates.

    Raises InputError when ``threshold`` is neither 0 nor between 0.5 and 1.
    """
    _check(threshold)
    members: Array = np.arange(n, dtype=np.int64)
    if threshold == 0 or n < 2:
        return members
    scheme = Scheme.of(_BINS, threshold)
    keys = np.empty((n, scheme.bands), np.uint32)
    content = np.empty(n, np.uint64)
    for start in range(0, n, _SETS):
        tokens = tokens_of(start, min(start + _SETS, n))
        content[start : start + _SETS] = shingles(tokens, tokens.shape[1])[:, 0]
        hashes = shingles(tokens, min(WINDOW_SHINGLE, tokens.shape[1]))
        held = np.full((scheme.bins, len(tokens)), EMPTY, np.uint64)
        minima(hashes.reshape(-1), np.repeat(np.arange(len(tokens)), hashes.shape[1]), held)
        keys[start : start + _SETS] = band_keys(held, scheme)
    _, first, which = np.unique(content, return_index=True, return_inverse=True)
    unlike = first[crowded(keys[first])]  # a first one of equal windows, which may be like others
    unlike.sort()
    tokens = _gathered(tokens_of, unlike, n)

    def same(left: Array, right: Array) -> Array:
        return _jaccard(tokens[left], tokens[right]) >= threshold

    members[unlike] = unlike[clusters(keys[unlike], content[unlike], same)]
    return members[first[which]]


def _check(threshold: float) -> None:
    if not (threshold == 0 or 0.5 <= threshold <= 1):
        raise InputError(f"duplicates lies between 0.5 and 1, or is 0 for none, got {threshold}")


# -- documents --------------------------------------------------------------------------------------------------------


def _document_clusters(corpus: TextRows, n: int, threshold: float) -> Array:
    sketches = _Sketches(n, Scheme.of(_BINS, threshold))
    for tokens, owners, last in _texts(corpus):
        sketches.add(tokens, owners, last=last)
    # Equal sketches are of one cluster without a comparison, however many there are; documents without text have none.
    content = shingles(sketches.bins, _ESTIMATE_BINS)[:, 0]
    texts = np.flatnonzero((sketches.bins != _NONE).any(axis=1))
    _, first, which = np.unique(content[texts], return_index=True, return_inverse=True)
    unlike = np.sort(texts[first])

    def same(left: Array, right: Array) -> Array:
        return _estimate(sketches.bins[unlike[left]], sketches.bins[unlike[right]]) >= threshold

    members: Array = np.arange(n, dtype=np.int64)
    members[unlike] = unlike[clusters(sketches.keys[unlike], content[unlike], same)]
    members[texts] = members[texts[first[which]]]
    return members


def _texts(corpus: TextRows) -> Iterator[tuple[Array, Array, bool]]:
    """Yield the tokens that count and the document of each, some rows at a time, and whether these are the last."""
    segments = corpus.segments
    n_rows = int(segments[-1, 0]) + 1 if len(segments) else 0
    step = max(_CHUNK // corpus.rows(slice(0, 1)).length, 1) if n_rows else 1
    for start in range(0, n_rows, step):
        rows = corpus.rows(slice(start, start + step))
        yield rows.tokens[rows.mask], rows.documents[rows.mask], start + step >= n_rows


@final
class _Sketches:
    """The sketches of documents whose tokens come one after another, in pieces of any size.

    ``bins`` [documents, bins] uint16: 16 bits of each bin's smallest hash, 0xFFFF where it holds none; ``keys``: the
    buckets [documents, bands] uint32.
    """

    def __init__(self, n: int, scheme: Scheme) -> None:
        self.bins: Array = np.full((n, _ESTIMATE_BINS), _NONE, np.uint16)
        self.keys: Array = np.zeros((n, scheme.bands), np.uint32)
        self._scheme = scheme
        # The document that may go on: its last tokens, how many it had in all, and its smallest hashes.
        self._tail: tuple[Array, Array] = (np.zeros(0, np.uint32), np.zeros(0, np.int64))
        self._seen = 0
        self._open: Array = np.full(_ESTIMATE_BINS, EMPTY, np.uint64)

    def add(self, tokens: Array, owners: Array, *, last: bool) -> None:
        """Take the next tokens [n] and the document of each [n], ascending; with ``last`` nothing follows."""
        kept = len(self._tail[0])
        tokens = np.concatenate([self._tail[0], tokens])
        owners = np.concatenate([self._tail[1], owners])
        if not len(tokens):
            return
        begins = np.flatnonzero(np.append(True, owners[1:] != owners[:-1]))
        lengths = np.diff(np.append(begins, len(owners)))
        totals = lengths.copy()
        totals[0] += self._seen - kept
        many = DOCUMENT_SHINGLE - 1
        within = np.flatnonzero(owners[many:] == owners[: max(len(owners) - many, 0)])
        hashes = shingles(tokens, DOCUMENT_SHINGLE)[within] if len(within) else np.zeros(0, np.uint64)
        short = np.flatnonzero(totals < DOCUMENT_SHINGLE)
        if not last:
            short = short[short < len(begins) - 1]
        whole = _whole(tokens, begins[short], lengths[short])
        self._sketch([(hashes, owners[within]), (whole, owners[begins[short]])], int(owners[0]), int(owners[-1]) + 1)
        tail = min(many, int(lengths[-1]))
        self._tail, self._seen = (tokens[len(tokens) - tail :], owners[len(owners) - tail :]), int(totals[-1])

    def _sketch(self, parts: list[tuple[Array, Array]], start: int, stop: int) -> None:
        """Sketch documents ``start`` to ``stop`` (exclusive), the first of which may be the open one."""
        opened = self._open if len(self._tail[0]) else np.full_like(self._open, EMPTY)
        for begin in range(start, stop, _SETS):
            end = min(begin + _SETS, stop)
            held = np.full((_ESTIMATE_BINS, end - begin), EMPTY, np.uint64)
            if begin == start:
                held[:, 0] = opened
            for hashes, owners in parts:
                low, high = np.searchsorted(owners, [begin, end])
                minima(hashes[low:high], owners[low:high] - begin, held)
            bits = np.minimum(held.astype(np.uint16), _NONE - np.uint16(1))
            self.bins[begin:end] = np.where(held == EMPTY, _NONE, bits).T
            self.keys[begin:end] = band_keys(held, self._scheme)
            self._open = held[:, -1]


def _whole(tokens: Array, begins: Array, lengths: Array) -> Array:
    """Return one hash of each whole run of fewer tokens than an n-gram, uint64 [runs]."""
    hashes: Array = np.zeros(len(begins), np.uint64)
    for length in range(1, DOCUMENT_SHINGLE):
        runs = np.flatnonzero(lengths == length)
        if len(runs):
            hashes[runs] = shingles(tokens[begins[runs, None] + np.arange(length)], length)[:, 0]
    return hashes


def _estimate(left: Array, right: Array) -> Array:
    """Return the estimated Jaccard similarity of sketches [pairs, bins], float64 [pairs].

    Of the bins that either set has an element in, the share in which both have the same smallest (Li, Owen & Zhang
    2012, equation 6; unbiased).
    """
    both_empty = np.count_nonzero((left == _NONE) & (right == _NONE), axis=1)
    matched = np.count_nonzero(left == right, axis=1) - both_empty
    estimate: Array = matched / (left.shape[1] - both_empty)
    return estimate


def _load(folder: Path, key: dict[str, Any]) -> Array | None:
    """Return the clusters kept in a corpus folder, None when there are none, of other settings, or damaged."""
    try:
        data = read_manifest(folder / MANIFEST, number=FORMAT)
        digest = str(data.pop("sha256", ""))
        if data != key:
            return None
        verify_once(folder / ARRAY, digest)
        kept = read_array(folder / ARRAY, mapped=False)
    except (CorruptError, InputError, NotFoundError, OSError):
        return None
    return kept if kept.shape == (key["documents"],) and kept.dtype == np.int64 else None


# -- windows ----------------------------------------------------------------------------------------------------------


def _gathered(tokens_of: WindowTokens, places: Array, n: int) -> Array:
    """Return the tokens of some windows, ascending, [windows, window]."""
    parts = [tokens_of(0, 0)]
    for start in range(0, n, _SETS):
        low, high = np.searchsorted(places, [start, start + _SETS])
        if high > low:
            parts.append(tokens_of(start, min(start + _SETS, n))[places[low:high] - start])
    return np.concatenate(parts)


def _jaccard(left: Array, right: Array) -> Array:
    """Return the Jaccard similarity of the 3-grams of windows [pairs, window], float64 [pairs]."""
    size = min(WINDOW_SHINGLE, left.shape[1])
    merged = np.concatenate([shingles(left, size) & ~np.uint64(1), shingles(right, size) | np.uint64(1)], axis=1)
    merged.sort(axis=1)
    # Equal n-grams now stand together, those of the left window (even) before those of the right (odd).
    step = merged[:, 1:] ^ merged[:, :-1]
    similarity: Array = np.count_nonzero(step == 1, axis=1) / (1 + np.count_nonzero(step > 1, axis=1))
    return similarity
