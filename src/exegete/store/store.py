"""A store: all firings of one coder over a corpus, read latent by latent from its shards."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np

from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import hash_json
from exegete.store.manifest import StoreManifest, load_manifest
from exegete.store.shards import OpenShards, Shard
from exegete.store.stats import SUMMARY, Summary, latent_stats, load_summary, summarise
from exegete.store.token_rows import Corpus, open_corpus
from exegete.store.values import decode_values
from exegete.types import Array, Firings, LatentId, LatentStats

_BLOCK = 1 << 22
"""Firings read at once when the whole store is scanned."""


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
        offsets, positions, codes = self._gather(start, stop)
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
        """Return exact statistics of the given latents, or of all; one latent's firings are in memory at a time."""
        flat = self.corpus.tokens.reshape(-1)
        found = []
        for index in range(self.width) if indices is None else indices:
            if not 0 <= index < self.width:
                raise InputError(f"latents of {self.name} lie in 0 … {self.width - 1}, got {index}")
            _, positions, codes = self._gather(index, index + 1)
            latent = LatentId(coder=self.name, index=int(index))
            found.append(latent_stats(latent, codes, flat[positions], n_positions=self.manifest.n_positions))
        return found

    def content_hash(self) -> str:
        """Return the identity of the firings, read anew: it does not depend on how rows are cut into shards."""
        return self.scan()[1]

    def scan(self) -> tuple[Summary, str]:
        """Read every firing once, in bounded memory, and return the summary of the latents and the content hash."""
        streams = [hashlib.sha256() for _ in range(3)]
        parts = []
        for start, stop in self._ranges():
            offsets, positions, codes = self._gather(start, stop)
            for stream, part in zip(streams, (np.diff(offsets), positions, codes.astype("<u2")), strict=True):
                stream.update(part.tobytes())
            parts.append(summarise(offsets, codes))
        summary = Summary(
            counts=np.concatenate([part.counts for part in parts]),
            maxima=np.concatenate([part.maxima for part in parts]),
            totals=np.concatenate([part.totals for part in parts]),
            sum_squares=np.concatenate([part.sum_squares for part in parts]),
        )
        digests = [stream.hexdigest() for stream in streams]
        return summary, hash_json([digests, self.width, self.row_length, self.manifest.values])

    def _opened(self) -> Iterator[tuple[int, Shard]]:
        """Yield every shard with the position, counted over all rows, at which it begins."""
        for entry in self.manifest.shards:
            yield entry.row_start * self.row_length, self._shards.get(entry.file, entry.sha256)

    def _live_counts(self) -> Array:
        counts: Array = np.zeros(self.width, np.int64)
        for _, shard in self._opened():
            counts += np.diff(shard.offsets.astype(np.int64))
        return counts

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Cut the latents into ranges of about ``_BLOCK`` firings."""
        ends = np.cumsum(self._live_counts())
        start = 0
        while start < self.width:
            before = int(ends[start - 1]) if start else 0
            stop = max(int(np.searchsorted(ends, before + _BLOCK, side="right")), start + 1)
            yield start, stop
            start = stop

    def _gather(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return offsets [n + 1], absolute positions int64 and codes of a range of latents, latent by latent."""
        pieces = []
        counts: Array = np.zeros(stop - start, np.int64)
        for base, shard in self._opened():
            ends = shard.offsets[start : stop + 1].astype(np.int64)
            inside = slice(int(ends[0]), int(ends[-1]))
            pieces.append((ends - ends[0], shard.positions[inside].astype(np.int64) + base, shard.codes[inside].copy()))
            counts += np.diff(ends)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions, codes = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.uint16)
        free: Array = offsets[:-1].copy()
        for ends, at, values in pieces:
            length: Array = np.diff(ends)
            target = np.repeat(free - ends[:-1], length) + np.arange(len(at))
            positions[target], codes[target] = at, values
            free += length
        return offsets, positions, codes


def _require_corpus(manifest: StoreManifest, corpus: Corpus) -> None:
    if corpus.hash != manifest.corpus_hash:
        raise MismatchError(
            f"store {manifest.name} was collected over corpus {manifest.corpus_hash}, this one is {corpus.hash}; "
            "give the corpus of its run"
        )
