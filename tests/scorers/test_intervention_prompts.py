from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.scorers.intervention_prompts import beginnings, draw_prompts, length_of
from exegete.tokens import TokenTable
from exegete.types import Array, ExampleSet, Firings, LatentId, Rows, Split
from exegete.views import LatentView, SplitData

LATENT = LatentId(coder="c", index=3)


class Data(SplitData):
    """Rows of several documents with random firings; another draw for every split."""

    def __init__(self, rate: float = 0.05, bos: int | None = 0, n: int = 60, length: int = 80) -> None:
        rng = np.random.default_rng(1)
        self._made: dict[Split, tuple[Rows, Array]] = {}
        for number, split in enumerate(("train", "validation", "test")):
            tokens = rng.integers(1, 90, (n, length)).astype(np.uint32)
            documents = np.sort(rng.integers(0, 3, (n, length)), axis=1) + 3 * np.arange(n)[:, None] + 1000 * number
            if bos is not None:
                tokens[:, 0] = bos
            documents[rng.random(n) < 0.3, 60:] = -1  # another split's, or padding
            fires = (rng.random((n, length)) < rate) & (documents >= 0)
            fires[:, 0] = False
            values = np.where(fires, rng.uniform(0.1, 9, fires.shape), 0).astype(np.float32)
            made = Rows(tokens=tokens, documents=documents.astype(np.int32), mask=documents >= 0)
            self._made[split] = made, values  # type: ignore[index]

    @property
    def tokens(self) -> TokenTable:
        return TokenTable([b"<bos>", *(f" {i}".encode() for i in range(1, 90))], [0])

    def rows(self, split: Split) -> Rows:
        return self._made[split][0]

    def firings(self, indices: object, split: Split) -> list[Firings]:
        values = self._made[split][1]
        rows, positions = np.nonzero(values)
        found = Firings(latent=LATENT, rows=rows, positions=positions.astype(np.int32), values=values[rows, positions])
        return [found]


def view(data: SplitData, seed: int = 0) -> LatentView:
    examples = ExampleSet(latent=LATENT, examples=(), maximum=9.0, firing_rate=0.1, frame=100, seed=seed)
    return LatentView(latent=LATENT, tokens=data.tokens, examples=examples, data=data)


def alone(data: Data, split: Split, context: int) -> dict[tuple[int, int], int]:
    """By brute force: (row, position) of the firings with no other before them, and where their prompt begins."""
    rows, firings = data.rows(split), data.firings([3], split)[0]
    fires = set(zip(firings.rows.tolist(), firings.positions.tolist(), strict=True))
    found = {}
    for row, position in fires:
        begin = position
        while (
            begin > 0
            and position - begin + 1 < context
            and rows.documents[row, begin - 1] == rows.documents[row, position]
        ):
            begin -= 1
        if not any((row, at) in fires for at in range(begin, position)):
            found[row, position] = begin
    return found


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.4])
@pytest.mark.parametrize("context", [1, 7, 16, 64])
def test_a_prompt_begins_after_every_other_firing_in_its_document(rate: float, context: int) -> None:
    data = Data(rate)
    firings = data.firings([3], "test")[0]
    found = beginnings(data.rows("test"), firings, context)
    places = zip(firings.rows.tolist(), firings.positions.tolist(), found.tolist(), strict=True)
    assert {(row, position): begin for row, position, begin in places if begin >= 0} == alone(data, "test", context)


@given(st.integers(1, 500), st.integers(1, 500))
def test_lengths_are_few_and_keep_most_of_a_prompt(length: int, context: int) -> None:
    found = length_of(length, context)
    assert found <= min(length, context)
    assert found in (context, length) or found * 3 > length * 2
    assert found == context or found & (found - 1) == 0 or (found % 3 == 0 and (found // 3) & (found // 3 - 1) == 0)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("rate", [0.01, 0.08])
def test_prompts_end_in_their_first_firing(bos: int | None, rate: float) -> None:
    data = Data(rate, bos=bos)
    known = alone(data, "test", 16)
    drawn = draw_prompts(view(data), "test", 25, context=16, bos=0)
    assert len(drawn) == 25 == len({(p.row, p.position) for p in drawn})
    rows = data.rows("test")
    for prompt in drawn:
        begin = known[prompt.row, prompt.position]
        text = prompt.tokens if bos is None else prompt.tokens[1:]
        assert bos is None or prompt.tokens[0] == bos
        assert list(text) == rows.tokens[prompt.row, prompt.position + 1 - len(text) : prompt.position + 1].tolist()
        room = prompt.position + 1 - begin - (bos is not None and begin == 0)
        assert len(text) == length_of(room, 16)
        assert prompt.document == rows.documents[prompt.row, prompt.position]
        assert prompt.activation == data._made["test"][1][prompt.row, prompt.position]


def test_prompts_are_whole_and_of_many_documents_where_there_are_enough() -> None:
    drawn = draw_prompts(view(Data(0.02)), "test", 25, context=8, bos=None)
    assert {len(p.tokens) for p in drawn} == {8}
    assert max(Counter(p.document for p in drawn).values()) <= 3
    few = Data(0.4, n=3)
    assert len(draw_prompts(view(few), "test", 100, context=16, bos=None)) == len(alone(few, "test", 16))


def test_prompts_are_as_strong_and_as_weak_as_firings_are() -> None:
    data = Data(0.01, n=400)
    firings = data.firings([3], "test")[0]
    drawn = np.array([p.activation for p in draw_prompts(view(data), "test", 50, context=4, bos=None)])
    edges = np.quantile(firings.values, [0.2, 0.4, 0.6, 0.8])
    assert np.bincount(np.digitize(drawn, edges), minlength=5).tolist() == pytest.approx([10] * 5, abs=3)


def test_draws_depend_on_seed_latent_and_split_alone() -> None:
    data = Data()
    first = draw_prompts(view(data), "test", 20, context=16, bos=0)
    assert first == draw_prompts(view(Data()), "test", 20, context=16, bos=0)
    assert first != draw_prompts(view(data, seed=1), "test", 20, context=16, bos=0)
    assert not {p.document for p in first} & {
        p.document for p in draw_prompts(view(data), "train", 20, context=16, bos=0)
    }


def test_a_latent_that_never_fires_has_no_prompts() -> None:
    assert draw_prompts(view(Data(0.0)), "test", 20, context=16, bos=0) == []
