"""A latent that fires on the word " cat", with windows of known strengths, and rows for the rule search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from exegete.tokens import TokenTable
from exegete.types import Array, Example, ExampleSet, Firings, LatentId, Rows, Split
from exegete.views import LatentView, SplitData

TABLE = TokenTable([b"<bos>", *(f" w{i}".encode() for i in range(1, 30)), b" cat", b"\n"], [0])
CAT = 30


def example(split: Split, tokens: Sequence[int], activations: Sequence[float], place: int) -> Example:
    values = np.array(activations, dtype=np.float32)
    return Example(
        split=split,
        fires=bool((values > 0).any()),
        stratum="random" if (values > 0).any() else "silent",
        row=place,
        start=4,
        tokens=np.array(tokens, dtype=np.uint32),
        activations=values,
        document=place,
        inclusion_probability=1.0,
    )


def view(n_train: int = 3, llm: Any = None, data: SplitData | None = None, index: int = CAT) -> LatentView:
    train = [example("train", [1, CAT, 2, CAT], [0, 4.0 - i % 3, 0, 1.0], i) for i in range(n_train)]
    test = [example("test", [5, CAT, 6, 7], [0, 1, 0, 0], 100), example("test", [7, 8, 9, 5], [0, 0, 0, 0], 101)]
    examples = ExampleSet(
        latent=LatentId(coder="c", index=index),
        examples=(*train, *test),
        maximum=4.0,
        firing_rate=0.1,
        frame=100,
        seed=0,
    )
    return LatentView(latent=examples.latent, tokens=TABLE, examples=examples, data=data, llm=llm)


@dataclass
class Rowed(SplitData):
    """Rows of random words; latent ``t`` fires on word ``t``. Latent 1000 never fires."""

    made: dict[Split, Rows] = field(default_factory=dict)

    @property
    def tokens(self) -> TokenTable:
        return TABLE

    def rows(self, split: Split) -> Rows:
        if split not in self.made:
            rng = np.random.default_rng(len(split))
            tokens = rng.integers(1, len(TABLE), (30, 40)).astype(np.uint32)
            documents = np.repeat(np.arange(30, dtype=np.int32)[:, None], 40, axis=1)
            self.made[split] = Rows(tokens=tokens, documents=documents, mask=np.ones(tokens.shape, bool))
        return self.made[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            rows, positions = np.nonzero(self.rows(split).tokens == index)
            values: Array = np.ones(len(rows), dtype=np.float32)
            found.append(
                Firings(
                    latent=LatentId(coder="c", index=index),
                    rows=rows.astype(np.int64),
                    positions=positions.astype(np.int32),
                    values=values,
                )
            )
        return found


@pytest.fixture
def make_view() -> Callable[..., LatentView]:
    return view


@pytest.fixture
def rowed() -> Rowed:
    return Rowed()
