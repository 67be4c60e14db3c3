"""A small store in memory: documents of random length cut into rows or packed as a corpus does, and planted latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from exegete.tokens import TokenTable
from exegete.types import Array, Firings, LatentId, Rows, Split


@dataclass(frozen=True)
class ToyDocument:
    key: str
    split: Split | None = None


@dataclass(frozen=True)
class ToyCorpus:
    documents: tuple[ToyDocument, ...]
    segments: Array
    tokens: Array
    owners: Array
    mask: Array
    table: TokenTable

    def rows(self, index: slice, /) -> Rows:
        return Rows(tokens=self.tokens[index], documents=self.owners[index], mask=self.mask[index])


@dataclass(frozen=True)
class ToyStore:
    name: str
    corpus: ToyCorpus
    found: tuple[Firings, ...]

    def rows(self, numbers: Array, /) -> Rows:
        corpus = self.corpus
        return Rows(tokens=corpus.tokens[numbers], documents=corpus.owners[numbers], mask=corpus.mask[numbers])

    def firings(self, index: int, /) -> Firings:
        return self.found[index]

    def block(self, start: int, stop: int, /) -> list[Firings]:
        return list(self.found[start:stop])


def cut(lengths: Sequence[int], body: int, *, packed: bool) -> list[list[tuple[int, int]]]:
    """Return the (document, tokens) of every row; packed rows are filled to the end, with several documents."""
    rows: list[list[tuple[int, int]]] = []
    room = 0
    for number, length in enumerate(lengths):
        room = room if packed else 0
        left = length
        while left:
            if not room:
                rows.append([])
                room = body
            taken = min(room, left)
            rows[-1].append((number, taken))
            room, left = room - taken, left - taken
    return rows


def build_store(
    *,
    lengths: Sequence[int],
    rates: Sequence[float],
    row: int = 64,
    bos: bool = True,
    fixed: Sequence[Split | None] = (),
    seed: int = 0,
    packed: bool = False,
    excluded: float = 0.0,
) -> ToyStore:
    """Return a store of ``len(rates)`` latents over documents of ``lengths`` tokens.

    Nothing fires at BOS, nor at a share ``excluded`` of the other positions, which the mask leaves out as well.
    """
    rng = np.random.default_rng(seed)
    vocabulary = TokenTable([b"", *(f"t{i} ".encode() for i in range(1, 50))], special=[0])
    body = row - bos
    tokens: list[Array] = []
    owners: list[Array] = []
    segments: list[tuple[int, int, int, int]] = []
    for parts in cut(lengths, body, packed=packed):
        line, owner = np.zeros(row, np.uint32), np.full(row, -1, np.int32)
        real = sum(n for _, n in parts)
        line[bos : bos + real] = rng.integers(1, 50, real)
        start, stop = 0, int(bos)
        for number, n in parts:
            stop += n
            owner[start:stop] = number
            segments.append((len(tokens), start, stop, number))
            start = stop
        tokens.append(line)
        owners.append(owner)
    held = np.stack(owners)
    mask = held >= 0
    if bos:
        mask[:, 0] = False
    if excluded:
        mask &= rng.random(mask.shape) >= excluded
    corpus = ToyCorpus(
        documents=tuple(ToyDocument(f"doc{i}", fixed[i] if i < len(fixed) else None) for i in range(len(lengths))),
        segments=np.array(segments, np.int64),
        tokens=np.stack(tokens),
        owners=held,
        mask=mask,
        table=vocabulary,
    )
    found = []
    for index, rate in enumerate(rates):
        rows, positions = np.nonzero(mask & (rng.random(mask.shape) < rate))
        values = rng.gamma(2.0, 1.0, len(rows)).astype(np.float16).astype(np.float32)
        found.append(
            Firings(
                latent=LatentId(coder="toy", index=index),
                rows=rows.astype(np.int64),
                positions=positions.astype(np.int32),
                values=values,
            )
        )
    return ToyStore("toy", corpus, tuple(found))


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Any]:
    return build_store
