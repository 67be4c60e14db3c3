"""Donors fire about as often, and are no near neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from exegete.donors import choose_donors
from exegete.types import Explanation, Firings, LatentId


class FakeStore:
    """Latents given by their flat positions in rows of 100."""

    corpus = SimpleNamespace(row_length=100)

    def __init__(self, places: dict[int, list[int]]) -> None:
        self.places = places

    def firings(self, index: int) -> Firings:
        flat = np.array(self.places[index], dtype=np.int64)
        return Firings(
            latent=LatentId(coder="c", index=index),
            rows=flat // 100,
            positions=(flat % 100).astype(np.int32),
            values=np.ones(len(flat), dtype=np.float32),
        )


def explanation(index: int) -> Explanation:
    return Explanation(latent=LatentId(coder="c", index=index), text=f"e{index}", status="ok", explainer={})


def donors_of(places: dict[int, list[int]], count: int) -> dict[int, list[int]]:
    store: Any = FakeStore(places)
    found = choose_donors(store, [explanation(i) for i in places], count=count)
    return {latent.index: [d.explanation.latent.index for d in donors] for latent, donors in found.items()}


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
