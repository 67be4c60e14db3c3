"""A world in which each latent fires on one word: what every judge should say is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from exegete.rules.language import Clause, Rule, TokenAt
from exegete.tokens import TokenTable
from exegete.types import Array, Example, ExampleSet, Explanation, Firings, LatentId, Rows, Split
from exegete.views import Donor, LatentView, SplitData

WORDS = 40
WINDOW = 12
TABLE = TokenTable([b"<bos>", *(f" w{i:02d}".encode() for i in range(1, WORDS)), b"\n", b" <<", b"\xc3", b"\xa9"], [0])


def word_rule(*tokens: int, precision: float = 0.9) -> Rule:
    return Rule((Clause((TokenAt(0, tokens),), precision, 1.0),))


@dataclass(frozen=True)
class World:
    table: TokenTable = TABLE
    window: int = WINDOW

    def example(
        self,
        split: Split,
        tokens: Sequence[int],
        activations: Sequence[float],
        place: int,
    ) -> Example:
        values = np.array(activations, dtype=np.float32)
        return Example(
            split=split,
            fires=bool((values > 0).any()),
            stratum="random" if (values > 0).any() else "silent",
            row=place,
            start=0,
            tokens=np.array(tokens, dtype=np.uint32),
            activations=values,
            document=place,
            inclusion_probability=0.5,
        )

    def examples(self, word: int, *, n_fire: int = 30, n_silent: int = 30, seed: int = 0) -> ExampleSet:
        """Windows of random words; the latent fires on ``word``, strongly on some and weakly on others."""
        rng = np.random.default_rng([seed, word])
        others = [t for t in range(1, len(TABLE)) if t not in (word, 0)]
        made = []
        for place in range(10 + n_fire + n_silent):
            tokens = rng.choice(others, self.window)
            values = np.zeros(self.window)
            if place < 10 + n_fire:
                at = rng.choice(self.window, rng.integers(1, 4), replace=False)
                tokens[at] = word
                values[at] = rng.uniform(0.1, 5.0, len(at))
            made.append(self.example("train" if place < 10 else "test", tokens.tolist(), values.tolist(), place))
        return ExampleSet(
            latent=LatentId(coder="c", index=word),
            examples=tuple(made),
            maximum=5.0,
            firing_rate=0.1,
            frame=1000,
            seed=seed,
        )

    def explanation(self, word: int, *, text: str | None = None, program: bool = True) -> Explanation:
        return Explanation(
            latent=LatentId(coder="c", index=word),
            text=text or f'the text " w{word:02d}"',
            status="ok",
            explainer={"name": "rule", "args": {}},
            program=word_rule(word).to_json() if program else None,
        )

    def view(self, word: int, *, donors: Sequence[int] = (), **options: int) -> LatentView:
        examples = self.examples(word, **options)
        given = tuple(Donor(explanation=self.explanation(w), rank=i) for i, w in enumerate(donors))
        return LatentView(latent=examples.latent, tokens=TABLE, examples=examples, donors=given)


@dataclass
class WordData(SplitData):
    """Rows of random words; latent ``t`` fires on word ``t`` with one exception per hundred."""

    seed: int = 0
    made: dict[Split, Rows] = field(default_factory=dict)

    @property
    def tokens(self) -> TokenTable:
        return TABLE

    def rows(self, split: Split) -> Rows:
        if split not in self.made:
            rng = np.random.default_rng([self.seed, len(split)])
            tokens = rng.integers(1, len(TABLE), (40, 50)).astype(np.uint32)
            tokens[:, 0] = 0
            documents = np.repeat(np.arange(40, dtype=np.int32)[:, None], 50, axis=1)
            self.made[split] = Rows(tokens=tokens, documents=documents, mask=tokens != 0)
        return self.made[split]

    def activations(self, word: int, split: Split) -> Array:
        rng = np.random.default_rng([self.seed, word, len(split)])
        tokens = self.rows(split).tokens
        fires = (tokens == word) ^ ((rng.random(tokens.shape) < 0.01) & (tokens != 0))
        dense: Array = np.where(fires, rng.uniform(0.5, 2.0, tokens.shape), 0).astype(np.float32)
        return dense

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            dense = self.activations(index, split)
            rows, positions = np.nonzero(dense)
            found.append(
                Firings(
                    latent=LatentId(coder="c", index=index),
                    rows=rows.astype(np.int64),
                    positions=positions.astype(np.int32),
                    values=dense[rows, positions],
                )
            )
        return found


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def word_data() -> Callable[..., WordData]:
    return WordData
