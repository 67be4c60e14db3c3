"""A small store in memory: documents of random length cut into rows as a corpus does, and planted latents."""

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
    row_documents: Array
    tokens: Array
    owners: Array
    mask: Array
    table: TokenTable

    def rows(self, rows: Array, /) -> Rows:
        return Rows(tokens=self.tokens[rows], documents=self.owners[rows], mask=self.mask[rows])


@dataclass(frozen=True)
class ToyStore:
    name: str
    corpus: ToyCorpus
    found: tuple[Firings, ...]

    def firings(self, index: int, /) -> Firings:
        return self.found[index]

    def block(self, start: int, stop: int, /) -> list[Firings]:
        return list(self.found[start:stop])


def build_store(
    *,
    lengths: Sequence[int],
    rates: Sequence[float],
    row: int = 64,
    bos: bool = True,
    fixed: Sequence[Split | None] = (),
    seed: int = 0,
) -> ToyStore:
    """Return a store of ``len(rates)`` latents over documents of ``lengths`` tokens."""
    rng = np.random.default_rng(seed)
    vocabulary = TokenTable([b"", *(f"t{i} ".encode() for i in range(1, 50))], special=[0])
    body = row - bos
    tokens, owners = [], []
    for number, length in enumerate(lengths):
        for start in range(0, length, body):
            real = min(body, length - start)
            line, owner = np.zeros(row, np.uint32), np.full(row, -1, np.int32)
            line[bos : bos + real] = rng.integers(1, 50, real)
            owner[: bos + real] = number
            tokens.append(line)
            owners.append(owner)
    held = np.stack(owners)
    mask = held >= 0
    if bos:
        mask[:, 0] = False
    corpus = ToyCorpus(
        documents=tuple(ToyDocument(f"doc{i}", fixed[i] if i < len(fixed) else None) for i in range(len(lengths))),
        row_documents=held.max(axis=1),
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
