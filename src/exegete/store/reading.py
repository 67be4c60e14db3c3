"""Reading firings in bounded memory: latents in runs, and a latent with very many firings in chunks of its own.

What is in memory at once is bounded in firings and in cells (a count for each latent of each block of each shard), so
that neither a latent that fires everywhere nor a coder with very many latents costs more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.store.manifest import StoreManifest
from exegete.store.shards import Piece, Shard
from exegete.types import Array

CELLS = 1 << 21
"""Counts of one latent in one block of one shard that a run has at most."""
_BLOCK_BITS = 16


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What is read at once: all firings of latents ``start`` to ``stop``, or some of a single latent.

    With ``end`` it is the firings ``begin`` to ``end`` of latent ``start`` in row order, and ``more`` says whether it
    has others after them.
    """

    start: int
    stop: int
    begin: int = 0
    end: int | None = None
    more: bool = False


def runs(counts: Array, firings: int, latents: int) -> Iterator[tuple[int, int]]:
    """Cut latents [n] with ``counts`` firings into consecutive ranges of at most ``latents`` latents.

    A range has at most ``firings`` firings, unless it is a single latent.
    """
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + firings, side="right")), start + 1)
        stop = min(stop, start + latents)
        yield start, stop
        start = stop


def spans(counts: Array, *, firings: int, latents: int, chunk: int, first: int = 0) -> Iterator[Span]:
    """Cut latents from ``first`` on with ``counts`` firings into spans, in order.

    A latent of more than ``chunk`` firings is cut into chunks of exactly that many, so that what is summed together
    depends on the latent alone; the others go together as ``runs`` has it.
    """
    start = 0
    for dense in [*np.flatnonzero(counts > chunk).tolist(), len(counts)]:
        for low, high in runs(counts[start:dense], firings, latents):
            yield Span(start=first + start + low, stop=first + start + high)
        total = int(counts[dense]) if dense < len(counts) else 0
        for begin in range(0, total, chunk):
            end = min(begin + chunk, total)
            yield Span(start=first + dense, stop=first + dense + 1, begin=begin, end=end, more=end < total)
        start = dense + 1


def latents_at_once(manifest: StoreManifest) -> int:
    """Return how many latents can be read from all their shards at once without passing the bound on cells."""
    blocks = [-(-(e.row_stop - e.row_start) * manifest.row_length >> _BLOCK_BITS) for e in manifest.shards]
    cells = max(blocks, default=1) if manifest.by_latent else sum(blocks)
    return max(1, CELLS // max(1, cells))


def read(shards: Iterable[Shard], span: Span, row: int = 0) -> Piece:
    """Return counts, positions and codes of a span, latent by latent in row order; positions from row ``row`` on.

    ``shards`` follow each other in rows; each is asked for once, and let go before the next.
    """
    pieces: list[Piece] = []
    seen = 0
    for shard in shards:
        if span.end is None:
            counts, positions, codes = shard.piece(span.start, span.stop)
        else:
            counts, positions, codes = shard.part(span.start, span.begin - seen, span.end - seen)
            seen += shard.count(span.start)
        positions += (shard.shape.row_start - row) * shard.shape.row_length
        pieces.append((counts, positions, codes))
        if span.end is not None and seen >= span.end:
            break
    return gather(pieces, span.stop - span.start)


def gather(pieces: list[Piece], latents: int) -> Piece:
    """Join the firings of the same latents from consecutive rows: counts, positions and codes, latent by latent.

    ``pieces`` are what ``Shard.piece`` gives, positions already counted from a common row.
    """
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        return np.zeros(latents, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint16)
    counts: Array = np.add.reduce([piece[0] for piece in pieces], axis=0, dtype=np.int64)
    total = int(counts.sum())
    positions, codes = np.empty(total, np.int64), np.empty(total, np.uint16)
    free: Array = np.cumsum(counts) - counts
    for own, at, values in pieces:
        begins = np.cumsum(own) - own
        target = np.repeat(free - begins, own) + np.arange(len(at))
        positions[target], codes[target] = at, values
        free += own
    return counts, positions, codes
