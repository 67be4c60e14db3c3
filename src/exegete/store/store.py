"""A store: all firings of one coder over a corpus, read latent by latent from its shards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np

from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import hash_json
from exegete.store.ahead import ahead
from exegete.store.compaction import runs
from exegete.store.manifest import StoreManifest, load_manifest
from exegete.store.shards import OpenShards, Shard, gather
from exegete.store.stats import SUMMARY, Summary, joined, latent_stats, load_summary, summarise
from exegete.store.token_rows import Corpus, open_corpus
from exegete.store.values import decode_values
from exegete.types import Array, Firings, LatentId, LatentStats, Rows

_BLOCK = 1 << 20
"""Firings read at once when the whole store is scanned."""
_ROWS = 4096


@final
class Store:
    """The firings of one coder; open it with ``Store.open``. Reading a latent costs its own firings.

    A store still being collected can be read: it then holds the rows of its manifest's shards.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, corpus: Corpus | None = None) -> None:
        if corpus is not None:
            _require_corpus(manifest, corpus)
        self.folder = folder
        self.manifest = manifest
        self._corpus = corpus
        self._shards = OpenShards(folder)

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
        summary = load_summary(self.folder)
        if len(summary.counts) != self.width or int(summary.counts.sum()) != self.manifest.n_firings:
            raise CorruptError(f"{self.folder / SUMMARY} is not that of this store; delete the store and collect again")
        return summary

    @cached_property
    def counts(self) -> Array:
        """Firings of every latent [width], int64."""
        return self.summary.counts if self.manifest.complete else self._live_counts()

    def firings(self, index: int) -> Firings:
        """Return all firings of a latent in row order. Raises InputError for an index outside the width."""
        return self.block(index, index + 1)[0]

    def block(self, start: int, stop: int) -> list[Firings]:
        """Return the firings of latents ``start`` to ``stop``, read shard by shard in storage order."""
        if not 0 <= start <= stop <= self.width:
            raise InputError(f"latents of {self.name} lie in 0 … {self.width - 1}, got {start} … {stop - 1}")
        counts, positions, codes = self._gather(start, stop)
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

        A complete store has them at hand; of another one, one latent's firings are in memory at a time.
        """
        known = self.summary if self.manifest.complete else None
        found = []
        for index in range(self.width) if indices is None else indices:
            self._require(index)
            latent = LatentId(coder=self.name, index=int(index))
            if known is None:
                with self._ends() as ends:
                    part, row = self._summarised(index, index + 1, ends)[0], 0
            else:
                part, row = known, int(index)
            found.append(latent_stats(part, row, latent, n_positions=self.manifest.n_positions))
        return found

    @cached_property
    def excluded(self) -> Array:
        """Flat positions (row · row_length + position) at which this store counts no firings, ascending, int64.

        These are the norm outliers of its mask policy, besides what the corpus itself does not count.
        """
        parts = [shard.excluded.astype(np.int64) + base for base, shard in self._opened(0, 1)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def rows(self, index: slice | Sequence[int] | Array) -> Rows:
        """Return rows of the corpus; the mask is that of this store."""
        rows = self.corpus.rows(index)
        if not len(self.excluded):
            return rows
        numbers = np.arange(self.corpus.n_rows)[index] if isinstance(index, slice) else np.asarray(index)
        flat = numbers[:, None] * self.row_length + np.arange(self.row_length)
        at = np.searchsorted(self.excluded, flat)
        hit = self.excluded[np.minimum(at, len(self.excluded) - 1)] == flat
        return dataclasses.replace(rows, mask=rows.mask & ~hit)

    def content_hash(self) -> str:
        """Return the identity of the firings, read anew: it does not depend on how rows are cut into shards."""
        return self.scan()[1]

    def scan(self, threads: int = 1) -> tuple[Summary, str]:
        """Read every firing once, in bounded memory, and return the summary of the latents and the content hash."""
        streams = [hashlib.sha256() for _ in range(3)]
        parts = []
        ranges = runs(self._live_counts(), _BLOCK // threads)
        with ThreadPoolExecutor(threads) as pool, self._ends() as ends:
            for part, arrays in ahead(pool, lambda bounds: self._summarised(*bounds, ends), ranges, threads):
                for stream, array in zip(streams, arrays, strict=True):
                    stream.update(array.tobytes())
                parts.append(part)
        excluded = hashlib.sha256(self.excluded.astype("<i8").tobytes()).hexdigest()
        digests = [*(stream.hexdigest() for stream in streams), excluded]
        return joined(parts), hash_json([digests, self.width, self.row_length, self.manifest.values])

    def _summarised(self, start: int, stop: int, ends: Array) -> tuple[Summary, tuple[Array, Array, Array]]:
        """Return the summary of a range of latents, and the arrays that its firings are."""
        counts, positions, codes = self._gather(start, stop)
        offsets: Array = np.concatenate([[0], np.cumsum(counts)])
        tokens = self.corpus.tokens.reshape(-1)[positions].astype(np.int64)
        return summarise(offsets, codes, tokens, ends[positions]), (counts, positions, codes.astype("<u2"))

    @contextlib.contextmanager
    def _ends(self) -> Iterator[Array]:
        """1 at the first counted position of every document in its row, 2 at the last, 3 at both, 0 elsewhere; flat.

        It lies in a temporary file, since it grows with the corpus.
        """
        with tempfile.TemporaryFile(dir=self.folder if os.access(self.folder, os.W_OK) else None) as file:
            shape = (self.corpus.n_rows, self.row_length)
            marks: Array = np.memmap(file, np.uint8, mode="w+", shape=shape)
            for start in range(0, self.corpus.n_rows, _ROWS):
                rows = self.rows(slice(start, start + _ROWS))
                joins = rows.mask[:, 1:] & rows.mask[:, :-1] & (rows.documents[:, 1:] == rows.documents[:, :-1])
                part = rows.mask * np.uint8(3)
                part[:, 1:][joins] &= 2
                part[:, :-1][joins] &= 1
                marks[start : start + _ROWS] = part
            yield marks.reshape(-1)

    def _require(self, index: int) -> None:
        if not 0 <= index < self.width:
            raise InputError(f"latents of {self.name} lie in 0 … {self.width - 1}, got {index}")

    def _opened(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Shard]]:
        """Yield every shard with any of the latents, and the position over all rows at which it begins."""
        for entry in self.manifest.shards:
            if entry.latent_stop > start and (stop is None or entry.latent_start < stop):
                yield entry.row_start * self.row_length, self._shards.get(entry.file, entry.sha256)

    def _live_counts(self) -> Array:
        counts: Array = np.zeros(self.width, np.int64)
        for _, shard in self._opened():
            counts[shard.shape.latent_start : shard.shape.latent_start + shard.shape.n_latents] += shard.counts()
        return counts

    def _gather(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return counts, absolute positions int64 and codes of a range of latents, latent by latent."""
        pieces = []
        for base, shard in self._opened(start, stop):
            counts, positions, codes = shard.piece(start, stop)
            positions += base
            pieces.append((counts, positions, codes))
        if not pieces:
            return np.zeros(stop - start, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint16)
        return gather(pieces)


def _require_corpus(manifest: StoreManifest, corpus: Corpus) -> None:
    if corpus.hash != manifest.corpus_hash:
        raise MismatchError(
            f"store {manifest.name} was collected over corpus {manifest.corpus_hash}, this one is {corpus.hash}; "
            "give the corpus of its run"
        )
