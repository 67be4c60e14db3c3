"""A store whose text is split by document: what selecting, proxies and rules read of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol, final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from exegete.errors import MismatchError
from exegete.examples.clusters import Clusters, clusters
from exegete.examples.draws import starts_of
from exegete.examples.fired import Block, Recorded, gathered
from exegete.examples.split import CODES, GAP, CorpusLike
from exegete.examples.windows import Frame, Lookup, frame, joined, lookup
from exegete.store.store import Store
from exegete.tokens import TokenTable
from exegete.types import Array, Firings, Rows, Split
from exegete.views import SplitData

_CHUNK: Final = 1 << 20  # tokens tiled at once
_Key = tuple[int, int, bool]


class RowSource(CorpusLike, Protocol):
    """What selecting needs of a corpus."""

    @property
    @abstractmethod
    def table(self) -> TokenTable:
        """The token-bytes table."""

    @property
    @abstractmethod
    def tokens(self) -> Array:
        """The token ids of all rows [n_rows, length]; they may be mapped from a file."""


class FiringSource(Protocol):
    """What selecting needs of a store."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the coder."""

    @property
    @abstractmethod
    def corpus(self) -> RowSource:
        """The documents and segments of the rows that the firings lie in."""

    @abstractmethod
    def rows(self, numbers: Array, /) -> Rows:
        """Return the rows of these numbers; the mask leaves out all positions at which this store has no firings."""

    @abstractmethod
    def firings(self, index: int, /) -> Firings:
        """Return all firings of one latent."""

    @abstractmethod
    def block(self, start: int, stop: int, /) -> list[Firings]:
        """Return all firings of latents ``start`` to ``stop`` (exclusive)."""


@final
class StoreData(SplitData):
    """A store whose text is split by document.

    A row that holds documents of several splits belongs to each of them, with the text of the others taken out of its
    documents and its mask. A document that a cut divides (``split_segments`` cuts only when there are few documents)
    counts as one document per segment from here on, numbered after all others: no two splits share a document.
    Rows that a store has not come to yet are of no split.
    ``store`` and ``segment_split`` are what it was made from, ``folder`` where the store lies on disk, None when it
    does not.
    """

    def __init__(self, store: FiringSource, segment_split: Array) -> None:
        """Take a store and what ``split_segments`` returned. Raises MismatchError when they do not fit."""
        segments = np.asarray(store.corpus.segments)
        if segment_split.shape != segments.shape[:1]:
            raise MismatchError(
                f"a split of shape {segment_split.shape} does not fit a corpus of {len(segments)} segments"
            )
        if isinstance(store, Store):  # of rows still to be collected it knows nothing, silence least of all
            segment_split = np.where(segments[:, 0] < store.manifest.row_stop, segment_split, np.int8(GAP))
        self.store: Final = store
        self.segment_split: Final = segment_split
        self.folder: Final = store.folder.resolve() if isinstance(store, Store) else None
        n_rows = int(segments[-1, 0]) + 1 if len(segments) else 0
        self._n_rows = n_rows
        self._segments = segments
        self._cut = _divided(segments[:, 3], segment_split)
        self._numbers = {split: np.unique(segments[segment_split == code, 0]) for split, code in CODES.items()}
        self._shared = {split: self._shares(split, n_rows) for split in CODES}
        self._places = {split: _inverse(numbers, n_rows) for split, numbers in self._numbers.items()}
        self._rows: dict[Split, Rows] = {}
        self._frames: dict[_Key, Frame] = {}
        self._lookups: dict[_Key, Lookup] = {}
        self._clusters: dict[tuple[_Key, Split, float], Clusters] = {}
        self._held: tuple[tuple[int, ...], list[Firings]] = ((), [])

    @property
    def name(self) -> str:
        """The name of the coder."""
        return self.store.name

    @property
    def tokens(self) -> TokenTable:
        """The token-bytes table."""
        return self.store.corpus.table

    def numbers(self, split: Split) -> Array:
        """Return the number in the corpus of each row that holds text of a split, int64, ascending."""
        return self._numbers[split]

    def rows(self, split: Split) -> Rows:
        """Return the rows that hold text of a split, in corpus order. Made once and kept (9 bytes per token).

        Text of other splits keeps its tokens but has document −1 and does not count.
        """
        if split not in self._rows:
            numbers = self._numbers[split]
            rows = self.store.rows(numbers)
            mine = self.segment_split == CODES[split]
            named = np.isin(numbers, self._segments[mine & self._cut, 0]) | self._shared[split][numbers]
            if named.any():
                documents, mask = rows.documents.copy(), rows.mask.copy()
                documents[named] = self._owners(split, numbers[named], rows.length)
                mask[named] &= documents[named] >= 0
                rows = Rows(tokens=rows.tokens, documents=documents, mask=mask)
            self._rows[split] = rows
        return self._rows[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        """Return the firings of each latent in the split's text; ``Firings.rows`` index into ``rows(split)``."""
        places = self._places[split]
        owners = self.rows(split).documents if self._shared[split].any() else None
        parts = []
        for whole in self._fetch(tuple(int(i) for i in indices)):
            rows = places[whole.rows]
            here = np.flatnonzero(rows >= 0)
            if owners is not None:
                here = here[owners[rows[here], np.asarray(whole.positions)[here]] >= 0]
            parts.append(
                Firings(
                    latent=whole.latent,
                    rows=rows[here],
                    positions=np.asarray(whole.positions)[here],
                    values=np.asarray(whole.values)[here],
                )
            )
        return parts

    def frame(self, window: int, seed: int, *, keep_bos: bool = False) -> Frame:
        """Return the frame of all rows. Made once and kept (25 bytes a window)."""
        key = (window, seed, keep_bos)
        if key not in self._frames:
            special = sorted(self.tokens.special) if keep_bos else None
            length = self.store.corpus.tokens.shape[1]
            step = max(1, _CHUNK // length)
            numbers = [np.arange(i, min(i + step, self._n_rows)) for i in range(0, max(self._n_rows, 1), step)]
            made = joined([frame(self.store.rows(n), window, seed=seed, numbers=n, special=special) for n in numbers])
            own = self.segment_of(made.places(np.arange(len(made))))
            documents = self._named(own).astype(np.int32)
            self._frames[key] = replace(made, split=self.segment_split[own].astype(np.int8), document=documents)
        return self._frames[key]

    def lookup(self, made: Frame) -> Lookup:
        """Return which window of a frame each position is in. Made once and kept (1 or 2 bytes a token)."""
        key = (made.window, made.seed, made.keep_bos)
        if key not in self._lookups:
            self._lookups[key] = lookup(made, self._segments, self.segment_split)
        return self._lookups[key]

    def clusters(self, split: Split, made: Frame, threshold: float) -> Clusters:
        """Return which windows of a split are near-duplicates. Made once and kept (20 bytes a window)."""
        key = ((made.window, made.seed, made.keep_bos), split, threshold)
        if key not in self._clusters:
            own = made.numbers(CODES[split])
            self._clusters[key] = clusters(own, len(made), lambda some: self.window_tokens(made, some), threshold)
        return self._clusters[key]

    def window_tokens(self, made: Frame, windows: Array) -> Array:
        """Return the tokens of some windows of a frame [n, window] uint32, read from the corpus."""
        return self.tokens_at(made.places(windows), made.window)

    def tokens_at(self, places: Array, window: int) -> Array:
        """Return the ``window`` tokens from each flat place (row * length + position) on [n, window] uint32."""
        flat = self.store.corpus.tokens.reshape(-1)
        if len(flat) < window:
            return np.empty((0, window), np.uint32)
        return sliding_window_view(flat, window)[places].astype(np.uint32)

    def segment_of(self, places: Array) -> Array:
        """Return the segment that holds each of these flat places (row * length + position)."""
        begins = self._segments[:, 0] * self.store.corpus.tokens.shape[1] + self._segments[:, 1]
        return np.searchsorted(begins, places, side="right") - 1

    def documents_at(self, places: Array) -> Array:
        """Return the document of each of these flat places (row * length + position)."""
        return self._named(self.segment_of(places))

    def counts(self, indices: Sequence[int]) -> Array:
        """Return how often each of some latents fires, as far as it is known without reading them (else 0)."""
        at = np.array([int(i) for i in indices], np.int64)
        if not isinstance(self.store, Store) or not ((at >= 0) & (at < self.store.width)).all():
            return np.zeros(len(at), np.int64)  # latents that are not there are refused when they are read
        found: Array = self.store.counts[at]
        return found

    def recorded(self, indices: Sequence[int]) -> Recorded:
        """Return all firings of some latents; runs of neighbours are read at once."""
        found = self._read(tuple(int(i) for i in indices))
        rows = np.concatenate([np.asarray(f.rows, np.int64) for f in found] or [np.zeros(0, np.int64)])
        positions = np.concatenate([f.positions for f in found] or [rows])
        values = np.concatenate([np.asarray(f.values, np.float32) for f in found] or [np.zeros(0, np.float32)])
        offsets = starts_of([len(f) for f in found])
        places = rows * self.store.corpus.tokens.shape[1]
        places += positions
        back = np.flatnonzero(places[1:] < places[:-1]) + 1
        if not np.isin(back, offsets).all():
            latent = np.repeat(np.arange(len(found)), np.diff(offsets))
            order = np.lexsort((places, latent))
            rows, places, values = rows[order], places[order], values[order]
        return Recorded(rows=rows, places=places, values=values, offsets=offsets)

    def block(self, indices: Sequence[int], made: Frame) -> Block:
        """Return where some latents fire in the windows of a frame."""
        found = gathered(self.recorded(indices), made.split, self.lookup(made))
        return Block(indices=np.array(indices, np.int64), data=self, frame=made, train=found.train, test=found.test)

    def _named(self, segments: Array) -> Array:
        """Return the document of some segments; one that a cut divides is one document per segment."""
        own = self._segments[segments, 3]
        return np.where(self._cut[segments], len(self.store.corpus.documents) + segments, own)

    def _shares(self, split: Split, n_rows: int) -> Array:
        """Return which rows hold text of other splits, or of none, beside that of a split, bool [n_rows]."""
        mine = self.segment_split == CODES[split]
        found = np.zeros((2, n_rows), dtype=bool)
        for side, chosen in enumerate((mine, ~mine)):
            found[side, self._segments[chosen, 0]] = True
        shared: Array = found[0] & found[1]
        return shared

    def _owners(self, split: Split, numbers: Array, length: int) -> Array:
        """Return the document of every position of some rows as a split sees it, int32 [rows, length]."""
        which = np.flatnonzero(np.isin(self._segments[:, 0], numbers))
        row, start, stop = self._segments[which, :3].T
        document = self._named(which)
        # Each segment adds its document where it starts and takes it back where it stops.
        change = np.where(self.segment_split[which] == CODES[split], document + 1, 0).astype(np.int32)
        place = np.searchsorted(numbers, row)
        steps = np.zeros((len(numbers), length + 1), dtype=np.int32)
        steps[place, start] += change
        steps[place, stop] -= change
        np.cumsum(steps, axis=1, out=steps)
        owners: Array = steps[:, :length]
        owners -= 1
        return owners

    def _fetch(self, indices: tuple[int, ...]) -> list[Firings]:
        """Read whole latents; the last answer is kept, as every split asks for it."""
        if self._held[0] != indices:
            self._held = (indices, self._read(indices))
        return self._held[1]

    def _read(self, indices: tuple[int, ...]) -> list[Firings]:
        found: list[Firings] = []
        for start, stop in _runs(indices):
            found.extend([self.store.firings(start)] if stop == start + 1 else self.store.block(start, stop))
        return found


def _divided(owners: Array, split: Array) -> Array:
    """Return which segments are of documents that lie in more than one split, bool [n_segments]."""
    found = np.zeros((len(CODES), int(owners.max(initial=-1)) + 1), dtype=bool)
    for code in CODES.values():
        found[code, owners[split == code]] = True
    divided: Array = (found.sum(axis=0) > 1)[owners]
    return divided


def _inverse(numbers: Array, n: int) -> Array:
    """Return the place of each of n rows among ``numbers``, −1 where it is not there."""
    places = np.full(n, -1, dtype=np.int64)
    places[numbers] = np.arange(len(numbers))
    return places


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield maximal runs of consecutive indices as (start, stop)."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], indices[i - 1] + 1
            start = i
