from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import NotFoundError
from exegete.examples.negatives import draw_silent
from exegete.examples.select import N_DECILES, STRATA, allocate, deciles, draw

STRATEGIES = ["top", "random", "quantiles", "mix"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def maxima(n: int, seed: int = 0) -> Any:
    return rng(seed).permutation(n).astype(np.float32) + 1


def names(stratum: Any) -> Counter[str]:
    return Counter(STRATA[s] for s in stratum.tolist())


@given(st.sampled_from(STRATEGIES), st.integers(0, 80), st.integers(0, 80), st.integers(0, 99))
def test_sizes_are_as_asked_and_nothing_comes_twice(strategy: Any, total: int, n: int, seed: int) -> None:
    values = np.round(rng(seed).gamma(1, 1, total).astype(np.float32), 1) + np.float32(0.1)  # many ties
    drawn = draw(values, n, strategy, rng(seed))
    assert len(drawn) == min(n, total) == len(drawn.stratum) == len(drawn.probability)
    assert len(set(drawn.chosen.tolist())) == len(drawn)
    assert ((drawn.chosen >= 0) & (drawn.chosen < max(total, 1))).all()
    assert ((drawn.probability > 0) & (drawn.probability <= 1)).all()
    again = draw(values, n, strategy, rng(seed))
    assert again.chosen.tolist() == drawn.chosen.tolist()
    if n >= total:
        assert (drawn.probability == 1).all()


def test_top_takes_the_strongest_in_order() -> None:
    values = maxima(50)
    drawn = draw(values, 7, "top", rng())
    assert values[drawn.chosen].tolist() == [50, 49, 48, 47, 46, 45, 44]
    assert names(drawn.stratum) == {"top": 7}
    assert set(drawn.probability) == {1.0}


def test_random_takes_any_with_equal_chance() -> None:
    values = maxima(20)
    counts = np.zeros(20)
    for seed in range(2000):
        drawn = draw(values, 5, "random", rng(seed))
        counts[drawn.chosen] += 1
        assert set(drawn.probability) == {0.25}
        assert (np.diff(values[drawn.chosen]) < 0).all()
    assert names(drawn.stratum) == {"random": 5}
    assert (abs(counts / 2000 - 0.25) < 4.5 * (0.25 * 0.75 / 2000) ** 0.5).all()


def test_quantiles_take_equal_parts_of_ten_deciles() -> None:
    values = maxima(1003)
    drawn = draw(values, 40, "quantiles", rng())
    assert names(drawn.stratum) == {f"decile_{i}": 4 for i in range(10)}
    assert (np.diff(values[drawn.chosen]) < 0).all()
    ranks = np.argsort(np.argsort(-values))
    assert (deciles(1003)[ranks[drawn.chosen]] == drawn.stratum).all()
    sizes = np.bincount(deciles(1003))
    assert drawn.probability.tolist() == (4 / sizes[drawn.stratum]).tolist()
    assert values[drawn.chosen[drawn.stratum == 0]].min() > 1003 - 101  # decile 0 is the strongest tenth
    assert values[drawn.chosen[drawn.stratum == 9]].max() <= 101


def test_every_part_of_a_decile_can_be_drawn() -> None:
    seen: Counter[int] = Counter()
    for seed in range(600):
        seen.update(draw(np.arange(1, 31, dtype=np.float32), 10, "quantiles", rng(seed)).chosen.tolist())
    assert sorted(seen) == list(range(30))
    assert all(abs(count / 600 - 1 / 3) < 0.09 for count in seen.values())


def test_mix_is_half_top_and_half_quantiles_of_the_rest() -> None:
    values = maxima(200)
    drawn = draw(values, 21, "mix", rng(3))
    assert names(drawn.stratum) == {"top": 11, **{f"decile_{i}": 1 for i in range(10)}}
    assert values[drawn.chosen[:11]].tolist() == list(range(200, 189, -1))
    assert (drawn.probability[:11] == 1).all()
    assert (1 / drawn.probability[11:]).tolist() == pytest.approx(np.bincount(deciles(189)).tolist())
    assert values[drawn.chosen[11:]].max() < 190
    assert names(draw(values, 1, "mix", rng()).stratum) == {"top": 1}


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"unknown strategy 'quantile'.*quantiles"):
        draw(maxima(5), 2, "quantile", rng())  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match=r"known: mix, quantiles, random, top$"):
        draw(maxima(5), 2, "?", rng())  # type: ignore[arg-type]


def test_equal_maxima_are_in_random_order() -> None:
    firsts = {int(draw(np.ones(4, np.float32), 1, "top", rng(s)).chosen[0]) for s in range(60)}
    assert firsts == {0, 1, 2, 3}
    tied = np.array([1, 3, 3, 2], np.float32)
    for seed in range(20):
        order = draw(tied, 4, "top", rng(seed)).chosen.tolist()
        assert set(order[:2]) == {1, 2}
        assert order[2:] == [3, 0]


def test_ranks_hold_over_the_whole_range_of_floats() -> None:
    values = np.array([1e-45, 1e-40, 6e-8, 0.1, 1.0, 65504.0, 3e38, np.inf], np.float32)  # from the smallest of all
    assert draw(values, 8, "top", rng()).chosen.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@given(st.integers(0, 300))
def test_deciles_are_equal_parts_strongest_first(n: int) -> None:
    made = deciles(n)
    assert len(made) == n
    assert (np.diff(made) >= 0).all()
    if n:
        sizes = np.bincount(made, minlength=N_DECILES)
        assert len(sizes) == 10
        assert sizes.max() - sizes.min() <= 1
    if n >= 10:
        assert (made[0], made[-1]) == (0, 9)


def test_allocation_by_hand() -> None:
    def given_(n: int, sizes: list[int]) -> list[int]:
        return [int(share) for share in allocate(n, np.array(sizes))]

    assert given_(40, [100] * 10) == [4] * 10
    assert given_(43, [100] * 10) == [5, 5, 5, *[4] * 7]
    assert given_(12, [1, 9, 9, 9]) == [1, 4, 4, 3]  # what the first lacks the others make up for
    assert given_(12, [0, 2, 3, 50]) == [0, 2, 3, 7]
    assert given_(99, [1, 2, 3]) == [1, 2, 3]
    assert given_(2, [5, 5, 5]) == [1, 1, 0]
    assert given_(0, [5, 5]) == [0, 0]
    assert given_(3, []) == []


@given(st.lists(st.integers(0, 12), max_size=10), st.integers(0, 90))
def test_allocation_gives_what_is_there_and_no_stratum_two_more_than_another_with_room(
    sizes: list[int], n: int
) -> None:
    shares = allocate(n, np.array(sizes, dtype=np.int64))
    assert shares.sum() == min(n, sum(sizes))
    assert (shares <= sizes).all()
    room = [s for s, size in zip(shares.tolist(), sizes, strict=True) if s < size]
    if room:
        assert shares.max() <= min(room) + 1


@pytest.mark.parametrize("strategy", ["random", "quantiles"])
@pytest.mark.parametrize(("total", "n"), [(37, 23), (37, 4), (9, 4), (64, 10), (25, 24)])
def test_inclusion_probabilities_are_exact(strategy: Any, total: int, n: int) -> None:
    """Reweighted by the inclusion probabilities, the sum of any function is unbiased over many seeds."""
    values = maxima(total, seed=1)
    drawn = [draw(values, n, strategy, rng(seed)) for seed in range(3000)]
    for function in (values, values**2, (np.arange(total) % 3 == 0).astype(float), np.ones(total)):
        sums = [float((function[d.chosen] / d.probability).sum()) for d in drawn]
        error = max(float(np.std(sums)) / len(sums) ** 0.5, 1e-9 * total**3)
        assert abs(np.mean(sums) - function.sum()) < 4.5 * error


def test_mix_reweights_too() -> None:
    values = maxima(60, seed=2)
    sums = []
    for seed in range(2000):
        drawn = draw(values, 25, "mix", rng(seed))
        sums.append(float((np.sqrt(values[drawn.chosen]) / drawn.probability).sum()))
    assert abs(np.mean(sums) - np.sqrt(values).sum()) < 4.5 * np.std(sums) / 2000**0.5


# -- silent windows ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))),
    st.integers(0, 70),
    st.integers(0, 9),
)
def test_silent_windows_are_silent_and_come_once(case: tuple[int, set[int]], n: int, seed: int) -> None:
    """Peer's defect: random negatives are drawn with replacement."""
    frame, touched = case
    silent, probability = draw_silent(np.array(sorted(touched), dtype=np.int64), frame, n, rng(seed))
    there = frame - len(touched)
    assert len(silent) == min(n, there) == len(set(silent.tolist()))
    assert not set(silent.tolist()) & touched
    assert ((silent >= 0) & (silent < frame)).all()
    assert (np.diff(silent) > 0).all()
    assert probability == (min(n, there) / there if there and n else 0.0)


def test_every_silent_window_has_the_same_chance() -> None:
    touched = np.array([0, 3, 4, 9, 14])
    counts = np.zeros(15)
    for seed in range(3000):
        counts[draw_silent(touched, 15, 4, rng(seed))[0]] += 1
    assert not counts[touched].any()
    others = np.delete(counts, touched) / 3000
    assert (abs(others - 0.4) < 4.5 * (0.4 * 0.6 / 3000) ** 0.5).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_window_is_taken_for_certain(strategy: Any) -> None:
    drawn = draw(maxima(1), 5, strategy, rng())
    assert (drawn.chosen.tolist(), drawn.probability.tolist()) == ([0], [1.0])
    assert deciles(1).tolist() == [0]
