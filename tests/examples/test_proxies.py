"""Every kind of negatives against a slow search, window by window; what is said of a latent rests on it alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from exegete.errors import NotFoundError
from exegete.examples import proxies
from exegete.examples.data import StoreData
from exegete.examples.fired import Block
from exegete.examples.proxies import NearMiss, Neighbour, SameToken, Similar, tokens_of
from exegete.examples.proxy import Proxy
from exegete.examples.similar import TfIdf
from exegete.rules.execute import execute
from exegete.rules.language import Clause, Condition, PositionIn, Rule, TokenAt, TokenOf, TokenWithin
from exegete.store.neighbours import Neighbours
from exegete.types import Array

WINDOW = 8
RATES = (0.3, 0.02, 0.1, 0.0, 0.005, 0.05, 0.02)
MakeStore = Callable[..., Any]


def data_of(store: Any, seed: int = 0) -> StoreData:
    """Split by document: a third for testing, some for validation."""
    split = np.random.default_rng(seed).choice(np.array([0, 0, 0, 1, 2, 2], np.int8), len(store.corpus.documents))
    return StoreData(store, split[store.corpus.segments[:, 3]])


@pytest.fixture(params=[False, True], ids=["rows", "packed"])
def data(request: pytest.FixtureRequest, make_store: MakeStore) -> StoreData:
    lengths = np.random.default_rng(5).integers(5, 150, 60).tolist()
    return data_of(make_store(lengths=lengths, rates=RATES, row=48, packed=request.param, excluded=0.02))


def block_of(data: StoreData, indices: Sequence[int] = range(len(RATES)), window: int = WINDOW) -> Block:
    return data.block(indices, data.frame(window, 0))


def windows_of(block: Block, split: int) -> list[tuple[int, int, int]]:
    """Return number, row and start of every window of a split."""
    frame = block.frame
    return [(n, int(frame.row[n]), int(frame.start[n])) for n in range(len(frame.row)) if int(frame.split[n]) == split]


def values_of(block: Block, latent: int) -> Array:
    """Return the dense values of a latent [rows, length]."""
    store: Any = block.data.store
    found = store.found[latent]
    dense = np.zeros(store.corpus.tokens.shape, np.float32)
    dense[found.rows, found.positions] = found.values
    return dense


def firing(block: Block, latent: int, split: int) -> list[tuple[int, int, int]]:
    """Return number, row and position of the first strongest firing of every firing window of a split."""
    dense = values_of(block, latent)
    found = []
    for number, row, start in windows_of(block, split):
        inside = dense[row, start : start + WINDOW]
        if inside.max() > 0:
            found.append((number, row, start + int(inside.argmax())))
    return found


def lists(proxy: Proxy, block: Block) -> list[list[int]]:
    """Return the windows of every latent, and check what every proxy promises."""
    offsets, windows = proxy.windows(block)
    assert offsets.dtype == windows.dtype == np.int64
    assert offsets.shape == (len(block) + 1,)
    assert offsets[0] == 0
    assert offsets[-1] == len(windows)
    assert (block.frame.split[windows] == 2).all()
    found = [windows[low:high].tolist() for low, high in itertools.pairwise(offsets)]
    assert all(own == sorted(set(own)) for own in found)
    return found


def known_tokens(block: Block, latent: int) -> list[int]:
    store: Any = block.data.store
    counts = Counter(int(store.corpus.tokens[row, at]) for _, row, at in firing(block, latent, 0))
    kept: list[int] = []
    covered = 0
    for token, often in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered < 0.9 * counts.total() and len(kept) < 10:
            kept.append(token)
            covered += often
    return kept


def slow_same_token(block: Block, latent: int) -> list[int]:
    store: Any = block.data.store
    tokens = set(known_tokens(block, latent))
    return [
        number
        for number, row, start in windows_of(block, 2)
        if tokens & set(store.corpus.tokens[row, start : start + WINDOW].tolist())
    ]


def test_same_token_is_a_search_for_the_latents_tokens(data: StoreData) -> None:
    block = block_of(data)
    found = lists(SameToken(), block)
    assert found == [slow_same_token(block, latent) for latent in range(len(RATES))]
    assert found[3] == []
    assert 0 < len(found[4]) < len(windows_of(block, 2))


def test_a_latent_is_known_by_few_tokens(make_store: MakeStore) -> None:
    """One that fires on one token nine times in ten is known by it alone."""
    store = make_store(lengths=[200] * 30, rates=(0.0, 0.0), row=64)
    tokens = store.corpus.tokens
    rows, positions = np.nonzero(store.corpus.mask & (tokens == 7))
    other = np.nonzero(store.corpus.mask & (tokens == 8))
    few = np.arange(len(other[0])) % 11 == 0
    rows, positions = np.concatenate([rows, other[0][few]]), np.concatenate([positions, other[1][few]])
    order = np.lexsort((positions, rows))
    first = store.found[0]
    fires = type(first)(
        latent=first.latent,
        rows=rows[order],
        positions=positions[order].astype(np.int32),
        values=np.ones(len(order), np.float32),
    )
    block = block_of(data_of(type(store)(store.name, store.corpus, (fires, store.found[1]))), [0, 1])
    latent, token = tokens_of(block)
    assert (latent.tolist(), token.tolist()) == ([0], [7])


def table(neighbours: list[list[int]]) -> Neighbours:
    found = np.array(neighbours, np.int64)
    return Neighbours(
        kind="cofiring",
        indices=np.arange(len(found)),
        neighbours=found,
        similarity=np.where(found >= 0, 0.5, 0).astype(np.float32),
    )


NEAR = [[1, 2], [4, -1], [-1, -1], [0, 1], [5, 3], [6, 2], [5, -1]]


def test_neighbour_windows_are_those_where_a_neighbour_fires(data: StoreData) -> None:
    block = block_of(data)
    expected = [
        sorted({number for other in near if other >= 0 for number, _, _ in firing(block, other, 2)}) for near in NEAR
    ]
    assert lists(Neighbour(table(NEAR)), block) == expected
    assert expected[2] == []
    with pytest.raises(NotFoundError, match="latent 6"):
        Neighbour(table(NEAR[:6])).windows(block)


def test_neighbours_are_read_anew_when_too_many_are_held(data: StoreData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lists(Neighbour(table(NEAR)), block_of(data))
    monkeypatch.setattr(proxies, "_HELD", 0)
    proxy = Neighbour(table(NEAR))
    assert [lists(proxy, block_of(data, [i]))[0] for i in range(len(RATES))] == whole


def slow_likeness(block: Block, latent: int) -> tuple[list[int], Array]:
    """Return the test windows and how like the mean of the firing train windows each is, by scikit-learn."""
    store: Any = block.data.store

    def text(row: int, start: int) -> str:
        return " ".join(f"t{t}" for t in store.corpus.tokens[row, start : start + WINDOW].tolist())

    shown = {number for number, _, _ in firing(block, latent, 0)}
    test = windows_of(block, 2)
    model = TfidfVectorizer(analyzer=str.split, vocabulary=[f"t{i}" for i in range(50)])
    held = model.fit_transform([text(row, start) for _, row, start in test]).toarray()
    train = model.transform([text(row, start) for number, row, start in windows_of(block, 0) if number in shown])
    mean = train.toarray().mean(axis=0)
    return [number for number, _, _ in test], held @ mean / np.linalg.norm(mean)


def test_similar_windows_are_the_most_like_of_those_that_do_not_fire(
    data: StoreData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TfIdf, "shown", 1000)
    block = block_of(data)
    found = lists(Similar(TfIdf(len(data.tokens))), block)
    for latent, own in enumerate(found):
        if not firing(block, latent, 0):
            assert own == []
            continue
        test, likeness = slow_likeness(block, latent)
        fires = {number for number, _, _ in firing(block, latent, 2)}
        silent = {n: like for n, like in zip(test, likeness, strict=True) if n not in fires}
        assert len(own) == len(test) // 10
        assert fires.isdisjoint(own)
        least = min(silent[number] for number in own)
        assert all(like <= least + 1e-5 for number, like in silent.items() if number not in own)


def test_many_windows_are_searched_and_shown_at_even_distances(
    data: StoreData, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = block_of(data, [0])
    monkeypatch.setattr(TfIdf, "most", 7 * WINDOW + 3)
    monkeypatch.setattr(TfIdf, "shown", 5)
    filled: list[Array] = []
    patterns: list[Array] = []
    fill, likeness = TfIdf.fill, TfIdf.likeness

    def noted_fill(index: TfIdf, tokens: Array) -> None:
        filled.append(tokens)
        fill(index, tokens)

    def noted_likeness(index: TfIdf, tokens: Array, offsets: Array) -> Iterator[Array]:
        patterns.append(tokens)
        return likeness(index, tokens, offsets)

    monkeypatch.setattr(TfIdf, "fill", noted_fill)
    monkeypatch.setattr(TfIdf, "likeness", noted_likeness)
    lists(Similar(TfIdf(len(data.tokens))), block)
    test = block.frame.numbers(2)
    shown = np.array([number for number, _, _ in firing(block, 0, 0)])
    np.testing.assert_array_equal(
        filled[0], block.data.window_tokens(block.frame, test[[i * len(test) // 7 for i in range(7)]])
    )
    np.testing.assert_array_equal(
        patterns[0], block.data.window_tokens(block.frame, shown[[i * len(shown) // 5 for i in range(5)]])
    )


def rule(*conditions: Condition) -> Rule:
    return Rule(tuple(Clause((condition,), 0.5, 1.0) for condition in conditions))


RULES = {
    0: rule(TokenAt(0, (3, 4))),
    1: rule(TokenAt(2, (5,)), TokenAt(0, (9,))),
    2: rule(TokenWithin(20, (11,))),
    4: rule(PositionIn(20, 22)),
    5: Rule((Clause((TokenAt(1, (6, 7, 8)), TokenWithin(8, (2, 3, 4, 12), negated=True)), 0.7, 1.0),)),
    6: rule(TokenOf("line", (1, 2, 3, 4))),
}


def test_near_misses_are_windows_in_which_the_rule_matches(data: StoreData) -> None:
    """The oracle reads one row at a time, as the corpus has it, whatever the split of the texts in it."""
    block = block_of(data)
    store: Any = data.store
    corpus = store.corpus
    rows = data.store.rows(np.arange(len(corpus.tokens)))
    found = lists(NearMiss(RULES), block)
    assert found[3] == []
    for latent, own in RULES.items():
        scores = [
            execute(
                [own], rows.tokens[i : i + 1], data.tokens, rows.mask[i : i + 1], documents=rows.documents[i : i + 1]
            )
            for i in range(len(rows))
        ]
        expected = [
            number
            for number, row, start in windows_of(block, 2)
            if (scores[row][0, 0, start : start + WINDOW] > 0).any()
        ]
        assert found[latent] == expected
        assert expected


def test_near_misses_of_rows_of_one_window_are_those_of_the_rule_on_single_windows(make_store: MakeStore) -> None:
    data = data_of(make_store(lengths=[WINDOW * 3] * 60, rates=RATES, row=WINDOW, bos=False))
    block = block_of(data)
    for latent, own in zip(range(len(RATES)), lists(NearMiss(RULES), block), strict=True):
        numbers = block.frame.numbers(2)
        tokens = data.window_tokens(block.frame, numbers)
        scores = [execute([RULES[latent]], window[None], data.tokens) for window in tokens] if latent in RULES else []
        assert own == [int(n) for n, score in zip(numbers, scores, strict=False) if (score > 0).any()]


def made() -> list[Proxy]:
    return [SameToken(), Neighbour(table(NEAR)), Similar(TfIdf(50)), NearMiss(RULES)]


@pytest.mark.parametrize("at", range(4))
def test_what_is_said_of_a_latent_rests_on_it_alone(data: StoreData, at: int) -> None:
    proxy = made()[at]
    whole = lists(proxy, block_of(data))
    assert [lists(proxy, block_of(data, [i]))[0] for i in (5, 2, 0)] == [whole[i] for i in (5, 2, 0)]
    assert lists(made()[at], block_of(data, [6, 1])) == [whole[6], whole[1]]


@pytest.mark.parametrize("at", range(4))
def test_another_frame_is_prepared_anew(data: StoreData, at: int) -> None:
    proxy = made()[at]
    short = lists(proxy, block_of(data, window=5))
    assert lists(proxy, block_of(data)) == lists(made()[at], block_of(data)) != short
    assert lists(proxy, block_of(data, window=5)) == short


def test_the_kinds_are_named_as_in_the_configuration() -> None:
    assert [proxy.kind for proxy in made()] == ["same_token", "neighbour", "similar", "near_miss"]
