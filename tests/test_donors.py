"""Donors fire about as often and are no near neighbours; the nearest fire together. Against the plainest way."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from exegete.donors import NEAR, choose_donors, choose_near
from exegete.types import Array, Explanation, Firings, LatentId


class FakeStore:
    """Latents given by their flat positions in rows of 100; ``read`` says which were asked for, in order."""

    row_length = 100
    corpus = SimpleNamespace(row_length=100)

    def __init__(self, places: dict[int, list[int]]) -> None:
        self.places = places
        self.counts = np.zeros(max(places, default=0) + 1, np.int64)
        self.counts[list(places)] = [len(flat) for flat in places.values()]
        self.read: list[int] = []

    def firings(self, index: int) -> Firings:
        self.read.append(index)
        flat = np.array(self.places[index], dtype=np.int64)
        return Firings(
            latent=LatentId(coder="c", index=index),
            rows=flat // 100,
            positions=(flat % 100).astype(np.int32),
            values=np.ones(len(flat), dtype=np.float32),
        )


def explanation(index: int) -> Explanation:
    return Explanation(latent=LatentId(coder="c", index=index), text=f"e{index}", status="ok", explainer={})


def donors_of(places: dict[int, list[int]], count: int, **options: Any) -> dict[int, list[int]]:
    store: Any = FakeStore(places)
    found = choose_donors(store, [explanation(i) for i in places], count=count, **options)
    return {latent.index: [d.explanation.latent.index for d in donors] for latent, donors in found.items()}


def near_of(places: dict[int, list[int]], count: int, **options: Any) -> dict[int, list[tuple[int, float]]]:
    store: Any = FakeStore(places)
    found = choose_near(store, [explanation(i) for i in places], count=count, **options)
    return {latent.index: [(n.explanation.latent.index, n.similarity) for n in near] for latent, near in found.items()}


def plain_donors(places: dict[int, list[int]], count: int) -> dict[int, list[int]]:
    """Every latent against every other, in the order of the difference of logarithms."""
    indices, sets = list(places), [set(flat) for flat in places.values()]
    rates = np.log(np.array([max(1, len(s)) for s in sets], dtype=np.float64))
    chosen = {}
    for i, index in enumerate(indices):
        donors: list[int] = []
        for j in np.argsort(np.abs(rates - rates[i]), kind="stable"):
            fewer = min(len(sets[i]), len(sets[j]))
            shares = len(sets[i] & sets[j]) / fewer if fewer else 0.0
            if len(donors) < count and j != i and shares <= NEAR:
                donors.append(indices[j])
        chosen[index] = donors
    return chosen


def plain_near(places: dict[int, list[int]], count: int) -> dict[int, list[tuple[int, float]]]:
    """The whole table of overlaps at once."""
    indices, sizes = list(places), np.array([len(p) for p in places.values()], np.int64)
    columns = np.array([at for flat in places.values() for at in flat], np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ones = np.ones(len(columns), np.int64)
    fires = sparse.csr_matrix((ones, columns, offsets), shape=(len(indices), int(columns.max(initial=0)) + 1))
    shared: Array = (fires @ fires.T).toarray()
    np.fill_diagonal(shared, 0)
    chosen = {}
    for i, index in enumerate(indices):
        alike = shared[i] / np.maximum(sizes[i] + sizes - shared[i], 1)
        order = np.lexsort((np.arange(len(alike)), -alike))[:count]
        chosen[index] = [(indices[j], float(alike[j])) for j in order if alike[j] > 0]
    return chosen


def latents() -> st.SearchStrategy[dict[int, list[int]]]:
    """A few latents, some dead, some alike, in any order."""
    flat = st.lists(st.integers(0, 40), unique=True, max_size=25).map(sorted)
    return st.dictionaries(st.integers(0, 30), flat, max_size=14)


def test_the_nearest_rates_come_first() -> None:
    places = {0: list(range(0, 100)), 1: list(range(200, 310)), 2: list(range(400, 410)), 3: list(range(500, 690))}
    found = donors_of(places, 2)
    assert found[0] == [1, 3]
    assert found[2] == [0, 1]
    assert all(latent not in donors for latent, donors in found.items())


def test_near_neighbours_are_passed_over() -> None:
    places = {0: list(range(0, 100)), 1: list(range(79, 180)), 2: list(range(81, 180)), 3: list(range(900, 905))}
    found = donors_of(places, 3)
    assert found[0] == [2, 3]  # 21 of 100 shared with 1, 19 of 99 with 2


def test_ranks_count_from_zero_and_no_latents_give_no_donors() -> None:
    store: Any = FakeStore({0: [1], 1: [5], 2: [9]})
    found = choose_donors(store, [explanation(i) for i in range(3)], count=5)
    assert [d.rank for d in found[LatentId(coder="c", index=0)]] == [0, 1]
    assert choose_donors(store, [], count=5) == {}


def test_the_nearest_fire_together_and_who_never_does_is_not_near() -> None:
    places = {0: [1, 2, 3, 4], 1: [3, 4, 5, 6], 2: [1, 2, 3], 3: [50], 4: []}
    found = near_of(places, 2)
    assert found[0] == [(2, 3 / 4), (1, 2 / 6)]
    assert found[3] == found[4] == []
    assert near_of({}, 2) == {}


@settings(max_examples=60, deadline=None)
@given(places=latents(), count=st.integers(1, 6), kept=st.sampled_from((0, 10, 1 << 20)))
def test_donors_are_those_of_the_plainest_way_however_little_is_kept(
    places: dict[int, list[int]], count: int, kept: int
) -> None:
    assert donors_of(places, count, kept=kept) == plain_donors(places, count)


@settings(max_examples=60, deadline=None)
@given(places=latents(), count=st.integers(1, 6), together=st.sampled_from((1, 20, 1 << 20)), pairs=st.integers(1, 50))
def test_the_nearest_are_those_of_the_whole_table_however_it_is_cut(
    places: dict[int, list[int]], count: int, together: int, pairs: int
) -> None:
    assert near_of(places, count, together=together, pairs=pairs) == plain_near(places, count)


def many(n: int, each: int) -> dict[int, list[int]]:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 2 * each, n)
    return {i: np.unique(rng.integers(0, 40 * each, int(c))).tolist() for i, c in enumerate(counts)}


def test_a_few_hundred_latents_give_what_the_plainest_way_gives() -> None:
    places = many(300, 40)
    assert donors_of(places, 5) == plain_donors(places, 5)
    assert near_of(places, 4, together=2000, pairs=4000) == plain_near(places, 4)


def test_the_search_for_donors_reads_latents_of_like_rate_once() -> None:
    places = many(400, 30)
    store: Any = FakeStore(places)
    choose_donors(store, [explanation(i) for i in places], count=3, kept=4000)
    assert sum(map(len, places.values())) > 2 * 4000  # not all of them at once
    assert len(store.read) < 1.5 * len(places)


@pytest.mark.parametrize("count", [2, 4])
def test_memory_does_not_grow_with_the_square_of_the_latents(count: int) -> None:
    places = many(3000, 30)
    store: Any = FakeStore(places)
    those = [explanation(i) for i in places]
    tracemalloc.start()
    choose_near(store, those, count=count, together=10_000, pairs=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000  # a byte for each pair of latents
