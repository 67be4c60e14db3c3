"""A store: all firings of one coder over a corpus, read latent by latent from its shards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar, final

import numpy as np

from exegete.errors import BusyError, CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import hash_json
from exegete.store.ahead import ahead
from exegete.store.manifest import StoreManifest, load_manifest
from exegete.store.reading import Span, latents_at_once, read, spans
from exegete.store.shards import AbsentShardError, OpenShards, Piece, Shard
from exegete.store.stats import (
    SUMMARY,
    Summary,
    Tally,
    joined,
    latent_stats,
    load_counts,
    load_summary,
    summarise,
    tally,
)
from exegete.store.token_rows import Corpus, open_corpus
from exegete.store.values import decode_values
from exegete.types import Array, Firings, LatentId, LatentStats, Rows

_RUN = 1 << 19
"""Firings that a thread reads at once when the whole store is scanned."""
_CHUNK = 1 << 19
"""Firings of one latent that are summed up at once; sums depend on it, and on nothing else of how they are read."""
_LATENTS = 1 << 16
_MOST_THREADS = 16
_KEPT = 64  # runs whose pages stay mapped, about 130 MB
_MARKED = 1 << 20  # positions whose documents are looked at at once

Found = TypeVar("Found")
Read = tuple[Span, Summary | Tally, Array, Array]


@final
class Store:
    """The firings of one coder; open it with ``Store.open``. Reading a latent costs its own firings.

    A store still being collected can be read: it then holds the rows of its manifest's shards. Where its shards are
    merged or compacted meanwhile, reading goes on with the new ones; when rows were added as well, it raises BusyError.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, corpus: Corpus | None = None) -> None:
        if corpus is not None:
            _require_corpus(manifest, corpus)
        self.folder = folder
        self.manifest = manifest
        self._corpus = corpus
        self._shards = OpenShards(folder, manifest.row_length)
        self._reloading = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], corpus: Corpus | None = None) -> Store:
        """Open a store; ``corpus`` is found by the manifest's relative path unless given.

        Raises NotFoundError where there is no store, CorruptError when its manifest is damaged.
        """
        return cls(Path(folder), load_manifest(Path(folder)), corpus)

    @property
    def name(self) -> str:
        """Name of the coder."""
        return self.manifest.name

    @property
    def width(self) -> int:
        """Latents of the coder."""
        return self.manifest.width

    @property
    def corpus(self) -> Corpus:
        """The corpus behind the store. Raises NotFoundError when it has moved, MismatchError when it is another."""
        if self._corpus is None:
            path = self.folder / self.manifest.corpus
            try:
                corpus = open_corpus(path)
            except NotFoundError:
                raise NotFoundError(f"the corpus of {self.folder} is not in {path}; give it to Store.open") from None
            _require_corpus(self.manifest, corpus)
            self._corpus = corpus
        return self._corpus

    @cached_property
    def summary(self) -> Summary:
        """Counts, maxima and sums of every latent: read when the store is complete, else computed."""
        if not self.manifest.complete:
            return self.scan()[0]
        summary = load_summary(self.folder, self.manifest.summary_sha256, self.width)
        self._require_own(summary.counts)
        return summary

    @cached_property
    def counts(self) -> Array:
        """Firings of every latent [width], int64."""
        if not self.manifest.complete:
            return self._live_counts()
        counts = load_counts(self.folder, self.manifest.summary_sha256, self.width)
        self._require_own(counts)
        return counts

    def firings(self, index: int) -> Firings:
        """Return all firings of a latent in row order. Raises InputError for an index outside the width."""
        return self.block(index, index + 1)[0]

    def block(self, start: int, stop: int) -> list[Firings]:
        """Return the firings of latents ``start`` to ``stop``, read shard by shard in storage order."""
        if not 0 <= start <= stop <= self.width:
            raise InputError(f"latents of {self.name} lie in 0 … {self.width - 1}, got {start} … {stop - 1}")
        counts, positions, codes = self._read(Span(start=start, stop=stop))
        offsets: Array = np.concatenate([[0], np.cumsum(counts)])
        rows, columns = np.divmod(positions, self.row_length)
        columns = columns.astype(np.int32)
        values = decode_values(codes)
        return [
            Firings(
                latent=LatentId(coder=self.name, index=start + i),
                rows=rows[begin:end].copy(),
                positions=columns[begin:end].copy(),
                values=values[begin:end].copy(),
            )
            for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist()))
        ]

    @property
    def row_length(self) -> int:
        """Positions in a row."""
        return int(self.manifest.batch_plan["row_length"])

    def stats(self, indices: Sequence[int] | None = None) -> list[LatentStats]:
        """Return exact statistics of the given latents, or of all.

        A complete store has them at hand; of another one, the latents are read one by one, in bounded memory.
        """
        wanted = list(range(self.width) if indices is None else map(int, indices))
        for index in wanted:
            self._require(index)
        if self.manifest.complete:
            rows = [(self.summary, index) for index in wanted]
        else:
            rows = [(summary, 0) for summary in self._summaries(wanted)]
        total = self.manifest.n_positions
        names = [LatentId(coder=self.name, index=index) for index in wanted]
        return [latent_stats(part, row, name, n_positions=total) for (part, row), name in zip(rows, names, strict=True)]

    @cached_property
    def excluded(self) -> Array:
        """Flat positions (row · row_length + position) at which this store counts no firings, ascending, int64.

        These are the norm outliers of its mask policy, besides what the corpus itself does not count.
        """

        def found(shards: Iterable[Shard]) -> Array:
            parts = [s.excluded.astype(np.int64) + s.shape.row_start * self.row_length for s in shards]
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)

        return self._reading(found, 0, 1)

    def rows(self, index: slice | Sequence[int] | Array) -> Rows:
        """Return rows of the corpus by a slice or by their indices; the mask is that of this store.

        Negative indices count from the end. Raises InputError for others than whole numbers and outside the rows.
        """
        numbers = _row_numbers(index, self.corpus.n_rows)
        rows = self.corpus.rows(index if isinstance(index, slice) else numbers)
        if not len(self.excluded):
            return rows
        owners, columns = np.divmod(self.excluded, self.row_length)
        low, high = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")
        count = high - low
        which = np.repeat(np.arange(len(numbers)), count)
        at = np.arange(len(which)) + np.repeat(low - (np.cumsum(count) - count), count)
        mask = rows.mask.copy()
        mask[which, columns[at]] = False
        return dataclasses.replace(rows, mask=mask)

    def content_hash(self) -> str:
        """Return the identity of the firings, read anew: it does not depend on how rows are cut into shards."""
        return self.scan()[1]

    def scan(self, threads: int = 1) -> tuple[Summary, str]:
        """Read every firing once, in bounded memory, and return the summary of the latents and the content hash.

        More than 16 threads are not used: what they read is hashed by one.
        """
        threads = max(1, min(threads, _MOST_THREADS))
        counts = self._live_counts()
        streams = [hashlib.sha256() for _ in range(2)]
        with ThreadPoolExecutor(threads) as pool, self._ends() as ends:
            spans = self._spans(counts, 0)
            results = self._released(ahead(pool, lambda span: self._counted(span, ends), spans, threads))
            parts = list(_whole(_hashed(results, streams)))
        summary = joined(parts)
        parts.clear()
        excluded = hashlib.sha256(self.excluded.astype("<i8").tobytes()).hexdigest()
        digests = [hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()]
        digests += [*(stream.hexdigest() for stream in streams), excluded]
        return summary, hash_json([digests, self.width, self.row_length, self.manifest.values])

    def _released(self, results: Iterator[Read]) -> Iterator[Read]:
        """Pass results on, and let go of the mapped pages behind them: bulk reading must not fill the memory."""
        for number, result in enumerate(results, start=1):
            if number % _KEPT == 0:
                self._shards.release()
            yield result
        self._shards.release()

    def _summaries(self, indices: Sequence[int]) -> Iterator[Summary]:
        """Yield the summary of each of these latents, read one by one."""
        counts = self._live_counts()
        with self._ends() as ends:
            for index in indices:
                own = self._spans(counts[index : index + 1], index)
                yield from _whole(self._counted(span, ends) for span in own)

    def _spans(self, counts: Array, first: int) -> Iterator[Span]:
        latents = min(_LATENTS, latents_at_once(self.manifest))
        return spans(counts, firings=_RUN, latents=latents, chunk=_CHUNK, first=first)

    def _counted(self, span: Span, ends: Array) -> Read:
        """Return what is known of the latents from this span, and the positions and codes that its firings are."""
        counts, positions, codes = self._read(span)
        tokens = self.corpus.tokens.reshape(-1)[positions].astype(np.int64)
        if span.end is not None:
            return span, tally(codes, tokens, ends[positions]), positions, codes
        offsets: Array = np.concatenate([[0], np.cumsum(counts)])
        return span, summarise(offsets, codes, tokens, ends[positions]), positions, codes

    @contextlib.contextmanager
    def _ends(self) -> Iterator[Array]:
        """1 at the first counted position of every document in its row, 2 at the last, 3 at both, 0 elsewhere; flat.

        It lies in a temporary file, since it grows with the corpus.
        """
        with tempfile.TemporaryFile(dir=self.folder if os.access(self.folder, os.W_OK) else None) as file:
            shape = (self.corpus.n_rows, self.row_length)
            marks: Array = np.memmap(file, np.uint8, mode="w+", shape=shape)
            step = max(1, _MARKED // self.row_length)
            for start in range(0, self.corpus.n_rows, step):
                marks[start : start + step] = _marks(self.rows(slice(start, start + step)))
            yield marks.reshape(-1)

    def _require(self, index: int) -> None:
        if not 0 <= index < self.width:
            raise InputError(f"latents of {self.name} lie in 0 … {self.width - 1}, got {index}")

    def _require_own(self, counts: Array) -> None:
        if counts.shape != (self.width,) or counts.dtype.kind != "i" or int(counts.sum()) != self.manifest.n_firings:
            raise CorruptError(f"{self.folder / SUMMARY} is not that of this store; delete the store and collect again")

    def _live_counts(self) -> Array:
        def found(shards: Iterable[Shard]) -> Array:
            counts: Array = np.zeros(self.width, np.int64)
            for shard in shards:
                counts[shard.shape.latent_start : shard.shape.latent_start + shard.shape.n_latents] += shard.counts()
            return counts

        return self._reading(found, 0, self.width)

    def _read(self, span: Span) -> Piece:
        """Return counts, absolute positions int64 and codes of a span, latent by latent."""
        return self._reading(lambda shards: read(shards, span), span.start, span.stop)

    def _reading(self, read_from: Callable[[Iterable[Shard]], Found], start: int, stop: int) -> Found:
        """Return what is read from the shards with any of the latents ``start`` to ``stop``, opened one by one.

        When one of them is gone, it is read anew from those of the newest manifest, as long as there is a newer one.
        """
        while True:
            manifest = self.manifest
            listed = (s for s in manifest.shards if s.latent_stop > start and s.latent_start < stop)
            try:
                return read_from(map(self._shards.get, listed))
            except AbsentShardError:
                if not self._reloaded(manifest):
                    raise

    def _reloaded(self, known: StoreManifest) -> bool:
        """Take the newest manifest in place of the one known, and return whether it lists other shards.

        Raises BusyError when it is that of other firings.
        """
        with self._reloading:
            if self.manifest is known:
                newest = load_manifest(self.folder)
                if _firings_of(newest) != _firings_of(known) or newest.content_hash != known.content_hash != "":
                    raise BusyError(f"the store {self.folder} was changed while it was read; open it again")
                if newest.shards == known.shards:
                    return False
                self.manifest = newest
            return True


def _firings_of(manifest: StoreManifest) -> tuple[object, ...]:
    """Return what stays the same when shards are merged or compacted, and changes when rows are added."""
    return manifest.key, manifest.row_stop, manifest.n_positions, manifest.n_firings


def _hashed(results: Iterable[Read], streams: Sequence[hashlib._Hash]) -> Iterator[Read]:
    """Pass on what was read, and hash its positions and codes."""
    for result in results:
        for stream, array, kind in zip(streams, result[2:], ("<i8", "<u2"), strict=True):
            stream.update(np.ascontiguousarray(array, kind).data)
        yield result


def _whole(results: Iterable[Read]) -> Iterator[Summary]:
    """Yield the summaries of spans in order, those of one latent's chunks added up to one."""
    sum_so_far: Tally | None = None
    for span, part, *_ in results:
        if isinstance(part, Summary):
            yield part
            continue
        sum_so_far = part if sum_so_far is None else sum_so_far.plus(part)
        if not span.more:
            yield sum_so_far.summary()
            sum_so_far = None


def _marks(rows: Rows) -> Array:
    """Return 1 at the first counted position of each document in its row, 2 at the last, 3 at both, 0 elsewhere."""
    begins = np.ones(rows.mask.shape, bool)
    begins[:, 1:] = rows.documents[:, 1:] != rows.documents[:, :-1]
    counted = np.flatnonzero(rows.mask)
    stretch = np.cumsum(begins)[counted]
    differ = stretch[1:] != stretch[:-1]
    marks: Array = np.zeros(rows.mask.size, np.uint8)
    marks[counted] = np.concatenate([[True], differ])[: len(counted)]
    marks[counted] |= np.concatenate([differ, [True]])[: len(counted)].astype(np.uint8) << 1
    return marks.reshape(rows.mask.shape)


def _row_numbers(index: slice | Sequence[int] | Array, n_rows: int) -> Array:
    """Return the rows that an index means, int64 and none negative. Raises InputError for what is no row."""
    if isinstance(index, slice):
        return np.arange(*index.indices(n_rows))
    given = np.asarray(index)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise InputError(f"rows are asked for by a slice or a list of whole numbers, got {given.dtype} {given.shape}")
    numbers = given.astype(np.int64)
    numbers = np.where(numbers < 0, numbers + n_rows, numbers)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n_rows:
        raise InputError(f"rows lie in {-n_rows} … {n_rows - 1}, got {int(given.min())} … {int(given.max())}")
    return numbers


def _require_corpus(manifest: StoreManifest, corpus: Corpus) -> None:
    if corpus.hash != manifest.corpus_hash:
        raise MismatchError(
            f"store {manifest.name} was collected over corpus {manifest.corpus_hash}, this one is {corpus.hash}; "
            "give the corpus of its run"
        )
    if manifest.row_length != corpus.row_length or manifest.row_stop > corpus.n_rows:
        raise MismatchError(f"the rows of store {manifest.name} are not those of its corpus; collect again")
