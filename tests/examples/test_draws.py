"""Hash keys, sharing and drawing without replacement, against slow and obvious ones."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.examples.draws import PER_DOCUMENT, allocate, draw_places, draw_spread, spread, starts_of
from exegete.examples.keys import latent_keys, mixed, nth
from exegete.types import Array, LatentId

MASK = 2**64 - 1
STRATA = st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 60), st.integers(0, 70)), max_size=6)


def splitmix(bits: int) -> int:
    bits = (bits + 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def slow_draw(key: int, size: int, wanted: int) -> list[int]:
    def bits(number: int) -> int:
        return splitmix((key + number * 0x9E3779B97F4A7C15) & MASK)

    wanted = min(size, wanted)
    if size <= 4 * wanted:
        return sorted(sorted(range(size), key=bits)[:wanted])
    found: list[int] = []
    number = 0
    while len(found) < wanted:
        place = bits(number) % size
        number += 1
        if place not in found:
            found.append(place)
    return sorted(found)


def test_splitmix_is_the_published_one() -> None:
    # The first outputs of the reference implementation for the seed 1234567.
    state, out = 1234567, []
    for _ in range(5):
        out.append(int(mixed(np.array([state], np.uint64))[0]))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert out == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert nth(np.array([1234567], np.uint64), np.arange(5)).tolist() == out
    assert [splitmix((1234567 + i * 0x9E3779B97F4A7C15) & MASK) for i in range(5)] == out


def test_keys_belong_to_seed_and_name() -> None:
    latents = [LatentId(coder="a", index=1), LatentId(coder="a", index=11), LatentId(coder="b", index=1)]
    keys = latent_keys(3, latents)
    assert keys.shape == (3, 4)
    assert len(set(keys.reshape(-1).tolist())) == 12
    assert latent_keys(3, latents[1:2]).tolist() == keys[1:2].tolist()
    assert latent_keys(4, latents[1:2]).tolist() != keys[1:2].tolist()
    assert latent_keys(3, []).shape == (0, 4)


@given(st.lists(st.integers(0, 9), max_size=8))
def test_spreading_by_hand(sizes: list[int]) -> None:
    which, place = spread(np.array(sizes, np.int64))
    assert list(zip(which.tolist(), place.tolist(), strict=True)) == [
        (i, j) for i, n in enumerate(sizes) for j in range(n)
    ]
    assert starts_of(sizes).tolist() == [sum(sizes[:i]) for i in range(len(sizes) + 1)]


@given(STRATA)
def test_drawing_is_the_slow_obvious_one(strata: list[tuple[int, int, int]]) -> None:
    keys = np.array([s[0] for s in strata], np.uint64)
    sizes, wanted = (np.array([s[i] for s in strata], np.int64) for i in (1, 2))
    which, place = draw_places(keys, sizes, wanted)
    expected = [(i, p) for i, (key, size, n) in enumerate(strata) for p in slow_draw(key, size, n)]
    assert list(zip(which.tolist(), place.tolist(), strict=True)) == expected


@given(st.integers(0, MASK), st.integers(1, 2**45), st.integers(1, 20))
def test_huge_strata_are_drawn_from(key: int, size: int, wanted: int) -> None:
    place = draw_places(np.array([key], np.uint64), np.array([size]), np.array([wanted]))[1]
    assert place.tolist() == slow_draw(key, size, wanted)
    assert len(set(place.tolist())) == min(wanted, size)


@pytest.mark.parametrize(("size", "wanted"), [(12, 3), (13, 3), (40, 4), (9, 7), (5, 1)])
def test_every_member_has_the_same_chance_and_every_pair(size: int, wanted: int) -> None:
    n = 20_000
    keys = nth(np.full(n, 5, np.uint64), np.arange(n))
    which, place = draw_places(keys, np.full(n, size), np.full(n, wanted))
    assert (np.bincount(which) == wanted).all()
    share = np.bincount(place, minlength=size) / n
    chance = wanted / size
    assert (abs(share - chance) < 4.5 * (chance * (1 - chance) / n) ** 0.5).all()
    both = np.zeros((n, size))
    both[which, place] = 1
    pairs = (both.T @ both / n)[np.triu_indices(size, 1)]
    chance *= (wanted - 1) / (size - 1)
    assert (abs(pairs - chance) < 4.8 * (max(chance, 1e-9) * (1 - chance) / n) ** 0.5 + 1e-9).all()


def test_allocation_by_hand() -> None:
    def given_(n: int, sizes: list[int]) -> list[int]:
        return [int(share) for share in allocate(np.array([n]), np.array([sizes], np.int64))[0]]

    assert given_(40, [100] * 10) == [4] * 10
    assert given_(43, [100] * 10) == [5, 5, 5, *[4] * 7]
    assert given_(12, [1, 9, 9, 9]) == [1, 4, 4, 3]  # what the first lacks the others make up for
    assert given_(12, [0, 2, 3, 50]) == [0, 2, 3, 7]
    assert given_(99, [1, 2, 3]) == [1, 2, 3]
    assert given_(2, [5, 5, 5]) == [1, 1, 0]
    assert given_(0, [5, 5]) == [0, 0]
    assert given_(3, [0, 0]) == [0, 0]


@given(st.lists(st.tuples(st.lists(st.integers(0, 12), min_size=4, max_size=4), st.integers(0, 60)), max_size=5))
def test_allocation_gives_what_is_there_and_no_stratum_two_more_than_another_with_room(
    cases: list[tuple[list[int], int]],
) -> None:
    sizes = np.array([c[0] for c in cases], np.int64).reshape(-1, 4)
    shares = allocate(np.array([c[1] for c in cases], np.int64), sizes)
    assert (shares <= sizes).all()
    for share, (size, n) in zip(shares, cases, strict=True):
        assert share.sum() == min(n, sum(size))
        room = [s for s, most in zip(share.tolist(), size, strict=True) if s < most]
        if room:
            assert share.max() <= min(room) + 1
        alone = allocate(np.array([n]), np.array([size], np.int64))
        assert alone[0].tolist() == share.tolist()


# -- spread over documents --------------------------------------------------------------------------------------------

HELD = st.lists(
    st.tuples(st.lists(st.integers(0, 12) | st.integers(0, 400), max_size=7), st.integers(0, 60)), max_size=5
)


def least_cap(sizes: list[int], n: int) -> int:
    cap = PER_DOCUMENT
    while sum(min(size, cap) for size in sizes) < n:
        cap += 1
    return cap


def drawn_spread(keys: Array, cases: list[tuple[list[int], int]]) -> list[list[tuple[int, int, float]]]:
    """Return document, place and probability of all that are drawn of each stratum."""
    starts = starts_of([len(sizes) for sizes, _ in cases])
    whole = np.array([size for sizes, _ in cases for size in sizes], np.int64)
    document, place, chance = draw_spread(keys, whole, starts, np.array([n for _, n in cases], np.int64))
    found: list[list[tuple[int, int, float]]] = [[] for _ in cases]
    for d, p, c in zip(document.tolist(), place.tolist(), chance.tolist(), strict=True):
        stratum = int(np.searchsorted(starts, d, side="right")) - 1
        found[stratum].append((d - int(starts[stratum]), p, c))
    return found


@given(HELD, st.integers(0, MASK))
def test_no_document_gives_more_than_the_least_cap_and_chances_add_up(
    cases: list[tuple[list[int], int]], seed: int
) -> None:
    cases = [(sizes, min(n, sum(sizes))) for sizes, n in cases]
    keys = nth(np.full(len(cases), seed, np.uint64), np.arange(len(cases)))
    found = drawn_spread(keys, cases)
    for number, ((sizes, n), drawn) in enumerate(zip(cases, found, strict=True)):
        assert len(drawn) == n == len({(d, p) for d, p, _ in drawn})
        assert drawn == sorted(drawn)
        assert all(0 <= p < sizes[d] for d, p, _ in drawn)
        cap = least_cap(sizes, n)
        chances = [min(m, cap) / m * (n / sum(min(k, cap) for k in sizes)) if m else 0.0 for m in sizes]
        assert [c for _, _, c in drawn] == [chances[d] for d, _, _ in drawn]
        assert all(0 < c <= 1 for _, _, c in drawn)
        assert sum(m * c for m, c in zip(sizes, chances, strict=True)) == pytest.approx(n)
        if n == sum(sizes):
            assert all(c == 1 for _, _, c in drawn)  # to the last bit
        counts = Counter(d for d, _, _ in drawn)
        assert max(counts.values(), default=0) <= cap
        if cap > PER_DOCUMENT:  # it rises evenly: all but the last of what the others lack is given by each
            assert sum(min(m, cap - 1) for m in sizes) < n
            assert all(chances[d] >= (cap - 1) / m * (n / (n + len(sizes))) for d, m in enumerate(sizes) if m >= cap)
        assert drawn_spread(keys[number : number + 1], [(sizes, n)]) == [drawn]  # alone as among others


@pytest.mark.parametrize(
    ("sizes", "n", "cap"), [([5, 2, 1], 3, 3), ([6, 4], 2, 3), ([6, 3, 1], 8, 4), ([2, 1, 2], 3, 3), ([5, 0, 4], 6, 3)]
)
def test_sets_are_as_likely_as_by_enumeration(sizes: list[int], n: int, cap: int) -> None:
    """Every document keeps a random set, and of all kept a random set is drawn: all outcomes, one by one."""
    assert least_cap(sizes, n) == cap
    kept: list[tuple[tuple[int, int], ...]] = [()]
    for document, size in enumerate(sizes):
        own = [tuple((document, i) for i in some) for some in combinations(range(size), min(size, cap))]
        kept = [(*others, *some) for others in kept for some in own]
    exact: Counter[tuple[tuple[int, int], ...]] = Counter()
    for units in kept:
        for some in combinations(units, n):
            exact[some] += 1 / len(kept) / comb(len(units), n)  # type: ignore[assignment]
    m = 30_000
    keys = nth(np.full(m, 7, np.uint64), np.arange(m))
    found = drawn_spread(keys, [(sizes, n)] * m)
    seen = Counter(tuple((d, p) for d, p, _ in drawn) for drawn in found)
    assert set(seen) <= set(exact)
    misfit = sum((seen[some] - m * share) ** 2 / (m * share) for some, share in exact.items())
    freedom = len(exact) - 1
    assert misfit < freedom + 5 * (2 * freedom) ** 0.5 + 12  # chi-squared
    chances = {(d, p): c for drawn in found for d, p, c in drawn}
    for unit, chance in chances.items():
        assert chance == pytest.approx(sum(share for some, share in exact.items() if unit in some))
    assert len(chances) == sum(sizes)
