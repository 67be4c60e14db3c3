from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import NotFoundError
from exegete.examples.diverse import CANDIDATES, candidates, farthest_first
from exegete.examples.draws import PER_DOCUMENT, allocate, starts_of
from exegete.examples.keys import nth
from exegete.examples.select import PARTS, Draw, deciles, draw, inclusion, rank, systematic
from exegete.types import STRATA, Array

STRATEGIES = ["top", "random", "quantiles", "bins", "mix", "importance"]
PROBABILITY = ["random", "quantiles", "bins", "importance"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def keys(n: int, seed: int = 0) -> Array:
    return nth(np.full(n, seed, np.uint64), np.arange(n))


def draws(values: list[Array], n: int, strategy: Any, own: Array) -> list[Draw]:
    """Draw from the windows of several latents, and return each one's draw with indices into its own windows."""
    offsets = starts_of([len(v) for v in values])
    whole = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)
    numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(v)) for v in values)])
    made = draw(rank(whole, numbers, offsets, own), n, strategy)
    assert (np.diff(made.latent) >= 0).all()
    found = []
    for latent in range(len(values)):
        mine = made.latent == latent
        found.append(
            Draw(
                latent=made.latent[mine],
                chosen=made.chosen[mine] - offsets[latent],
                stratum=made.stratum[mine],
                probability=made.probability[mine],
            )
        )
    return found


def one(values: Array, n: int, strategy: Any, seed: int = 0) -> Draw:
    return draws([values], n, strategy, keys(1, seed))[0]


def maxima(n: int, seed: int = 0) -> Any:
    return rng(seed).permutation(n).astype(np.float32) + 1


def names(stratum: Any) -> Counter[str]:
    return Counter(STRATA[s] for s in stratum.tolist())


def rank_deciles(n: int) -> Array:
    return deciles(np.arange(n), np.full(n, n))


@given(st.sampled_from(STRATEGIES), st.lists(st.integers(0, 80), max_size=5), st.integers(0, 80), st.integers(0, 99))
def test_sizes_are_as_asked_and_nothing_comes_twice(strategy: Any, totals: list[int], n: int, seed: int) -> None:
    values = [
        np.round(rng(seed + i).gamma(1, 1, t).astype(np.float32), 1) + np.float32(0.1) for i, t in enumerate(totals)
    ]
    for total, drawn in zip(totals, draws(values, n, strategy, keys(len(totals), seed)), strict=True):
        assert len(drawn) == min(n, total) == len(drawn.stratum) == len(drawn.probability)
        assert len(set(drawn.chosen.tolist())) == len(drawn)
        assert ((drawn.chosen >= 0) & (drawn.chosen < max(total, 1))).all()
        assert ((drawn.probability > 0) & (drawn.probability <= 1)).all()
        if n >= total:
            assert (drawn.probability == 1).all()


@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.integers(1, 30),
    st.integers(0, 99),
)
def test_a_latent_is_drawn_alone_as_among_others(strategy: Any, totals: list[int], n: int, seed: int) -> None:
    values = [
        np.round(rng(seed + i).gamma(1, 1, t).astype(np.float32), 1) + np.float32(0.1) for i, t in enumerate(totals)
    ]
    own = keys(len(totals), seed)
    together = draws(values, n, strategy, own)
    order = rng(seed).permutation(len(totals))
    mixed_up = draws([values[i] for i in order], n, strategy, own[order])
    for place, i in enumerate(order.tolist()):
        (alone,) = draws([values[i]], n, strategy, own[i : i + 1])
        for other in (together[i], mixed_up[place]):
            assert alone.chosen.tolist() == other.chosen.tolist()
            assert alone.stratum.tolist() == other.stratum.tolist()
            assert alone.probability.tolist() == other.probability.tolist()  # to the last bit


def test_top_takes_the_strongest_in_order() -> None:
    values = maxima(50)
    drawn = one(values, 7, "top")
    assert values[drawn.chosen].tolist() == [50, 49, 48, 47, 46, 45, 44]
    assert names(drawn.stratum) == {"top": 7}
    assert set(drawn.probability) == {1.0}


def test_random_takes_any_with_equal_chance() -> None:
    values = maxima(20)
    counts = np.zeros(20)
    for drawn in draws([values] * 2000, 5, "random", keys(2000)):
        counts[drawn.chosen] += 1
        assert set(drawn.probability) == {0.25}
        assert (np.diff(values[drawn.chosen]) < 0).all()
    assert names(drawn.stratum) == {"random": 5}
    assert (abs(counts / 2000 - 0.25) < 4.5 * (0.25 * 0.75 / 2000) ** 0.5).all()


def test_quantiles_take_equal_parts_of_ten_deciles() -> None:
    values = maxima(1003)
    drawn = one(values, 40, "quantiles")
    assert names(drawn.stratum) == {f"decile_{i}": 4 for i in range(10)}
    assert (np.diff(values[drawn.chosen]) < 0).all()
    ranks = np.argsort(np.argsort(-values))
    assert (rank_deciles(1003)[ranks[drawn.chosen]] == drawn.stratum).all()
    sizes = np.bincount(rank_deciles(1003))
    assert drawn.probability.tolist() == (4 / sizes[drawn.stratum]).tolist()
    assert values[drawn.chosen[drawn.stratum == 0]].min() > 1003 - 101  # decile 0 is the strongest tenth
    assert values[drawn.chosen[drawn.stratum == 9]].max() <= 101


def test_bins_take_equal_parts_of_ten_equally_wide_bins() -> None:
    values = np.concatenate([np.linspace(0.01, 1, 500), [9.5, 9.6, 10.0, 5.5]]).astype(np.float32)
    drawn = one(values, 40, "bins")
    # 0.01 … 1 is all bin 9 but for 1.0 itself, which is no more than a tenth of the strongest either.
    assert names(drawn.stratum) == {"bin_0": 3, "bin_4": 1, "bin_9": 36}
    label = STRATA.index("bin_9")
    assert drawn.probability[drawn.stratum == label].tolist() == [36 / 500] * 36
    assert (drawn.probability[drawn.stratum != label] == 1).all()
    few = one(values, 2, "bins")  # two halves of the range
    assert names(few.stratum) == {"bin_0": 1, "bin_9": 1} or names(few.stratum) == {"bin_4": 1, "bin_9": 1}
    assert few.probability.tolist() == [1 / 4, 1 / 500]
    edge = np.array([10, 9, 8, 1, 0.1], np.float32)
    assert [STRATA[s] for s in one(edge, 5, "bins").stratum] == ["bin_0", "bin_1", "bin_2", "bin_9", "bin_9"]


def test_every_part_of_a_decile_can_be_drawn() -> None:
    seen: Counter[int] = Counter()
    for drawn in draws([np.arange(1, 31, dtype=np.float32)] * 600, 10, "quantiles", keys(600)):
        seen.update(drawn.chosen.tolist())
    assert sorted(seen) == list(range(30))
    assert all(abs(count / 600 - 1 / 3) < 0.09 for count in seen.values())


def test_mix_is_half_top_and_half_quantiles_of_the_rest() -> None:
    values = maxima(200)
    drawn = one(values, 21, "mix", 3)
    assert names(drawn.stratum) == {"top": 11, **{f"decile_{i}": 1 for i in range(10)}}
    assert values[drawn.chosen[:11]].tolist() == list(range(200, 189, -1))
    assert (drawn.probability[:11] == 1).all()
    assert (1 / drawn.probability[11:]).tolist() == pytest.approx(np.bincount(rank_deciles(189)).tolist())
    assert values[drawn.chosen[11:]].max() < 190
    assert names(one(values, 1, "mix").stratum) == {"top": 1}


def test_importance_is_proportional_to_the_maximum() -> None:
    values = np.array([1, 2, 3, 4, 90], np.float32)
    chances = inclusion(np.sort(values)[::-1].astype(np.float64), 3)
    assert chances.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert inclusion(np.array([5.0, 5.0, 1.0]), 2).tolist() == pytest.approx([10 / 11, 10 / 11, 2 / 11])
    assert inclusion(np.array([5.0, 5.0]), 2).tolist() == [1, 1]
    assert inclusion(np.array([1e30, 1e-30, 1e-31, 1e-31]), 1)[0] == 1
    assert inclusion(np.zeros(0), 4).tolist() == []
    drawn = one(values, 3, "importance")
    assert names(drawn.stratum) == {"importance": 3}
    assert drawn.chosen[0] == 4
    expected = dict(zip([4, 3, 2, 1, 0], chances.tolist(), strict=True))
    assert drawn.probability.tolist() == [expected[c] for c in drawn.chosen.tolist()]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(1, 45), st.floats(0, 1, exclude_max=True))
def test_systematic_draws_have_their_size_and_come_once(sizes: list[float], n: int, start: float) -> None:
    chances = inclusion(np.sort(np.array(sizes))[::-1], n)
    assert chances.sum() == pytest.approx(min(n, len(sizes)))
    assert ((chances > 0) & (chances <= 1)).all()
    hit = systematic(chances, start)
    assert len(hit) == min(n, len(sizes)) == len(set(hit.tolist()))


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"unknown strategy 'quantile'.*quantiles"):
        one(maxima(5), 2, "quantile")
    with pytest.raises(NotFoundError, match=r"known: bins, importance, mix, quantiles, random, top$"):
        one(maxima(5), 2, "?")


def test_equal_maxima_are_in_random_order() -> None:
    firsts = Counter(int(d.chosen[0]) for d in draws([np.ones(4, np.float32)] * 400, 1, "top", keys(400)))
    assert sorted(firsts) == [0, 1, 2, 3]
    assert min(firsts.values()) > 60
    for drawn in draws([np.array([1, 3, 3, 2], np.float32)] * 20, 4, "top", keys(20)):
        order = drawn.chosen.tolist()
        assert set(order[:2]) == {1, 2}
        assert order[2:] == [3, 0]


def test_ranks_hold_over_the_whole_range_of_floats() -> None:
    values = np.array([1e-45, 1e-40, 6e-8, 0.1, 1.0, 65504.0, 3e38, np.inf], np.float32)  # from the smallest of all
    assert one(values, 8, "top").chosen.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@given(st.integers(0, 300))
def test_deciles_are_equal_parts_strongest_first(n: int) -> None:
    made = rank_deciles(n)
    assert len(made) == n
    assert (np.diff(made) >= 0).all()
    if n:
        sizes = np.bincount(made, minlength=PARTS)
        assert len(sizes) == 10
        assert sizes.max() - sizes.min() <= 1
    if n >= 10:
        assert (made[0], made[-1]) == (0, 9)


@given(st.lists(st.floats(0.125, 9, width=32), min_size=1, max_size=60), st.integers(1, 30), st.booleans())
def test_parts_are_those_told_slowly(values: list[float], n: int, by_value: bool) -> None:
    """Which strata windows are drawn from, how many of each and with what chance, told window by window."""
    ordered = np.sort(np.array(values, np.float32))[::-1].astype(np.float64)
    total, wanted = len(ordered), min(n, len(ordered))
    parts = min(wanted, 10)
    if by_value:
        part = [parts - math.ceil(v * parts / ordered[0]) for v in ordered]
        label = [f"bin_{10 - math.ceil(v * 10 / ordered[0])}" for v in ordered]
    else:
        part = [i * parts // total for i in range(total)]
        label = [f"decile_{i * 10 // total}" for i in range(total)]
    sizes = [part.count(p) for p in range(parts)]
    given_ = allocate(np.array([wanted]), np.array([sizes]))[0].tolist()
    drawn = one(np.array(values, np.float32), n, "bins" if by_value else "quantiles")
    shares: Counter[int] = Counter()
    for chosen, stratum, probability in zip(drawn.chosen, drawn.stratum, drawn.probability, strict=True):
        # Of equal values any may be at any of their ranks.
        ranks = np.flatnonzero(ordered == np.float32(values[chosen]))
        fitting = [r for r in ranks if label[r] == STRATA[stratum] and given_[part[r]] / sizes[part[r]] == probability]
        assert fitting
        shares[part[fitting[0]]] += 1
    if len(set(values)) == total:
        assert [shares[p] for p in range(parts)] == given_


@pytest.mark.parametrize("strategy", PROBABILITY)
@pytest.mark.parametrize(("total", "n"), [(37, 23), (37, 4), (9, 4), (64, 10), (25, 24)])
def test_inclusion_probabilities_are_exact(strategy: Any, total: int, n: int) -> None:
    """Reweighted by the inclusion probabilities, the sum of any function is unbiased over many seeds."""
    values = maxima(total, seed=1)
    drawn = draws([values] * 3000, n, strategy, keys(3000, seed=n))
    for function in (values, values**2, (np.arange(total) % 3 == 0).astype(float), np.ones(total)):
        sums = [float((function[d.chosen] / d.probability).sum()) for d in drawn]
        error = max(float(np.std(sums)) / len(sums) ** 0.5, 1e-9 * total**3)
        assert abs(np.mean(sums) - function.sum()) < 4.5 * error


def test_mix_reweights_too() -> None:
    values = maxima(60, seed=2)
    sums = [
        float((np.sqrt(values[d.chosen]) / d.probability).sum()) for d in draws([values] * 2000, 25, "mix", keys(2000))
    ]
    assert abs(np.mean(sums) - np.sqrt(values).sum()) < 4.5 * np.std(sums) / 2000**0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_window_is_taken_for_certain(strategy: Any) -> None:
    drawn = one(maxima(1), 5, strategy)
    assert (drawn.chosen.tolist(), drawn.probability.tolist()) == ([0], [1.0])
    assert rank_deciles(1).tolist() == [0]


# -- spread over documents --------------------------------------------------------------------------------------------


@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.integers(0, 80), min_size=1, max_size=4),
    st.integers(0, 80),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_what_is_drawn_of_a_part_is_spread_over_documents(
    strategy: Any, totals: list[int], n: int, documents: int, ascending: bool, seed: int
) -> None:
    offsets, own = starts_of(totals), keys(len(totals), seed)
    values = rng(seed).permutation(offsets[-1]).astype(np.float32) + 1
    held = (rng(seed).random(offsets[-1]) ** 3 * documents).astype(np.int32)
    if ascending:
        held = np.concatenate([np.sort(held[a:b]) for a, b in pairwise(offsets)])
    ranked = rank(values, np.arange(offsets[-1]), offsets, own)
    drawn, bare = draw(ranked, n, strategy, held), draw(ranked, n, strategy)
    assert drawn.latent.tolist() == bare.latent.tolist()
    assert (drawn.stratum == bare.stratum).all() or strategy in ("quantiles", "bins")
    if strategy in ("top", "mix", "importance"):
        assert drawn.chosen.tolist() == bare.chosen.tolist()
        assert drawn.probability.tolist() == bare.probability.tolist()
        return
    for latent, total in enumerate(totals):
        mine = np.flatnonzero(drawn.latent == latent)
        chosen, wanted = drawn.chosen[mine], min(n, total)
        assert len(set(chosen.tolist())) == len(chosen) == wanted
        places = np.argsort(np.argsort(-values[offsets[latent] : offsets[latent + 1]]))
        parts = 1 if strategy == "random" else max(min(wanted, PARTS), 1)
        strongest = values[offsets[latent] : offsets[latent + 1]].max(initial=1)
        part = np.array(
            [
                parts - math.ceil(values[offsets[latent] + i] * parts / strongest) if strategy == "bins"
                else places[i] * parts // total
                for i in range(total)
            ],
            np.int64,
        )  # fmt: skip
        sizes = np.bincount(part, minlength=PARTS)[None, :]
        given_ = allocate(np.array([wanted]), sizes)[0]
        documents_of = held[offsets[latent] : offsets[latent + 1]]
        for h in range(parts):
            inside = chosen[part[chosen - offsets[latent]] == h]
            assert len(inside) == given_[h]
            counts = np.bincount(documents_of[part == h], minlength=documents)
            cap = PER_DOCUMENT
            while np.minimum(counts, cap).sum() < given_[h]:
                cap += 1
            kept = np.minimum(counts, cap)
            assert np.bincount(held[inside], minlength=1).max() <= cap
            for unit in inside.tolist():
                chance = drawn.probability[mine[chosen == unit]][0]
                m = counts[held[unit]]
                assert chance == pytest.approx(min(m, cap) / m * given_[h] / kept.sum())
                assert 0 < chance <= 1
        order = part[chosen - offsets[latent]] * total + places[chosen - offsets[latent]]
        assert (np.diff(order) > 0).all()  # strongest first within each part


@pytest.mark.parametrize("strategy", ["random", "quantiles", "bins"])
@pytest.mark.parametrize(("n", "documents"), [(12, 12), (24, 12), (24, 3), (7, 5)])
def test_inclusion_probabilities_are_exact_where_documents_are_large(strategy: Any, n: int, documents: int) -> None:
    """One document holds two thirds of all; taken frequencies are the probabilities, and sums are unbiased."""
    total, m = 60, 3000
    held = np.where(np.arange(total) % 3 == 0, np.arange(total) // 3 % documents, 0)
    values = maxima(total, seed=1)
    ranked = rank(np.tile(values, m), np.tile(np.arange(total), m), np.arange(m + 1) * total, keys(m, n))
    drawn = draw(ranked, n, strategy, np.tile(held, m))
    unit = drawn.chosen % total
    chance = np.zeros(total)
    chance[unit] = drawn.probability
    assert (chance > 0).all()
    assert chance.sum() == pytest.approx(n)
    taken = np.bincount(unit, minlength=total) / m
    assert (abs(taken - chance) < 4.5 * np.sqrt(chance * (1 - chance) / m) + 1e-9).all()
    if strategy == "random":
        assert chance[held == 0].sum() < n * (held == 0).mean()  # fewer of the large document than its share
    for function in (values, held * 1.0 + 1, np.ones(total)):
        sums = np.bincount(drawn.latent, function[unit] / drawn.probability, minlength=m)
        assert abs(sums.mean() - function.sum()) < 4.5 * sums.std() / m**0.5 + 1e-6


# -- diverse ----------------------------------------------------------------------------------------------------------


def test_diverse_windows_are_told_slowly() -> None:
    tokens = rng(4).integers(0, 10, (40, 6)).astype(np.uint32) * 3  # no two of them in one bucket
    counts = [Counter(map(int, line)) for line in tokens]

    def cosine(a: int, b: int) -> float:
        both = sum(counts[a][t] * counts[b][t] for t in counts[a])
        return float(both / (sum(c * c for c in counts[a].values()) * sum(c * c for c in counts[b].values())) ** 0.5)

    taken = farthest_first(tokens, 15).tolist()
    assert taken[0] == 0
    for place in range(1, 15):
        like = [max(cosine(i, j) for j in taken[:place]) for i in range(40) if i not in taken[:place]]
        chosen = max(cosine(taken[place], j) for j in taken[:place])
        assert chosen == pytest.approx(min(like), abs=1e-6)
    assert sorted(farthest_first(tokens, 99).tolist()) == list(range(40))


def test_near_copies_come_last() -> None:
    tokens = np.array([[1, 2, 3]] * 5 + [[4, 5, 6]] * 5 + [[1, 2, 9]], np.uint32)
    assert farthest_first(tokens, 3).tolist() == [0, 5, 10]


@given(st.lists(st.integers(0, 3 * CANDIDATES), max_size=6))
def test_at_most_so_many_windows_are_compared(sizes: list[int]) -> None:
    latent, place = candidates(np.array(sizes, np.int64))
    for number, size in enumerate(sizes):
        mine = place[latent == number]
        assert len(mine) == min(size, CANDIDATES) == len(set(mine.tolist()))
        if size:
            assert mine[0] == 0
            assert 0 <= size - 1 - mine[-1] <= size // CANDIDATES
