from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from exegete.errors import ConfigError, InputError
from exegete.metrics import sequential
from exegete.metrics.sequential import (
    RatioTest,
    balanced_accuracy_sequence,
    f1_sequence,
    fixed_pairs,
    log_capital,
    mean_sequence,
    operating,
    pair_means,
)
from exegete.types import Array

TEST = RatioTest(level=0.8)
ROUNDS = list(range(5, 101, 5))


def test_log_ratio_by_hand() -> None:
    pairs = np.array([1.0, 0.5, 0.0])
    right, wrong = math.log(0.8 / 0.65), math.log(0.2 / 0.35)
    assert TEST.log_ratios(pairs) == pytest.approx([2 * right, 3 * right + wrong, 3 * right + 3 * wrong])
    assert TEST.null == pytest.approx(0.65)


def test_the_first_pair_past_a_bound_decides() -> None:
    # 14.43 right answers in a row carry the ratio past 20, and 5.36 wrong ones past 1/20.
    for pairs, expected, ratio in (
        (np.ones(7), None, 14 * math.log(0.8 / 0.65)),
        (np.ones(8), True, 16 * math.log(0.8 / 0.65)),
        (np.zeros(2), None, 4 * math.log(0.2 / 0.35)),
        (np.zeros(3), False, 6 * math.log(0.2 / 0.35)),
    ):
        decision, at = TEST.decide(pairs)
        assert decision is expected
        assert at == pytest.approx(ratio)
    turned = np.concatenate([np.zeros(3), np.ones(60)])
    assert TEST.decide(turned) == TEST.decide(np.zeros(3))  # what came later changes nothing
    assert TEST.decide(np.zeros(0)) == (None, 0.0)


def test_a_ratio_exactly_at_its_bound_decides() -> None:
    test = RatioTest(level=0.8, margin=0.4, alpha=1 / 16, beta=1 / 9)  # each right answer doubles it, each wrong thirds
    assert test.decide(np.ones(2))[0] is True
    assert test.decide(np.zeros(1))[0] is False


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"level": 1.0}, "certify − margin < certify < 1"),
        ({"level": 0.1}, "0 < certify − margin"),
        ({"level": 0.8, "margin": 0.0}, "got 0.8 and 0.0"),
        ({"level": math.nan}, "got nan"),
        ({"level": 0.8, "alpha": 0.5}, "error rates lie above 0 and below 0.5"),
        ({"level": 0.8, "beta": 0.0}, "error rates"),
    ],
)
def test_values_that_make_no_test(given: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RatioTest(**given)


def test_operating_equals_enumeration() -> None:
    test, s, c = RatioTest(level=0.9, margin=0.4, alpha=0.3, beta=0.3), 0.7, 0.8
    rounds = [2, 3, 5]
    certified = rejected = judgements = 0.0
    for answers in itertools.product((0, 1), repeat=10):
        firing, silent = np.array(answers[:5]), np.array(answers[5:])
        chance = float(np.prod(np.where(firing, s, 1 - s)) * np.prod(np.where(silent, c, 1 - c)))
        means = (firing + silent) / 2
        decided = [test.decide(means[:n])[0] for n in rounds]
        certified += chance * (decided[-1] is True)
        rejected += chance * (decided[-1] is False)
        judgements += chance * next((2 * n for n, d in zip(rounds, decided, strict=True) if d is not None), 10)
    found = operating(test, s, c, rounds)
    assert (found.certified, found.rejected, found.judgements) == pytest.approx((certified, rejected, judgements))


@pytest.mark.parametrize("rounds", [[], [5, 5], [3, 2], [0, 1]])
def test_rounds_that_are_none(rounds: list[int]) -> None:
    with pytest.raises(InputError, match="ascending"):
        operating(TEST, 0.8, 0.8, rounds)


@pytest.mark.parametrize(("level", "margin"), [(0.8, 0.15), (0.7, 0.1), (0.95, 0.15)])
def test_errors_are_as_designed_however_they_divide(level: float, margin: float) -> None:
    test = RatioTest(level=level, margin=margin)
    for apart in (0.0, 0.1, 0.2, 0.4):
        for centre in (test.null, test.level):
            s, c = centre - apart / 2, centre + apart / 2
            if c <= 1.0:
                found = operating(test, s, c, ROUNDS)
                assert (found.certified if centre == test.null else found.rejected) <= 0.05
    even = operating(test, test.null, test.null, ROUNDS)
    assert even.certified > 0.03  # not bought by waiting: the design's .05, less what passing the bound costs
    assert operating(test, test.null - 0.1, test.null - 0.1, ROUNDS).certified < 0.01  # the composite null's inside


def crossing(test: RatioTest, size: int, firing: int, silent: int, pairs: int) -> tuple[float, float]:
    """Chances of either decision where pairs come without replacement from ``size`` windows a class, so many right."""
    hit, miss = math.log(test.level / test.null), math.log((1 - test.level) / (1 - test.null))
    down, up = test.bounds()
    mass = np.zeros((pairs + 2, pairs + 2))
    mass[0, 0] = 1.0
    certified = rejected = 0.0
    h = np.arange(pairs + 2)
    for n in range(pairs):
        a = np.clip((firing - h) / (size - n), 0, 1)[:, None]
        b = np.clip((silent - h) / (size - n), 0, 1)[None, :]
        new = mass * (1 - a) * (1 - b)
        new[1:, :] += (mass * a * (1 - b))[:-1, :]
        new[:, 1:] += (mass * (1 - a) * b)[:, :-1]
        new[1:, 1:] += (mass * a * b)[:-1, :-1]
        right = h[:, None] + h[None, :]
        ratio = right * hit + (2 * (n + 1) - right) * miss
        over, under = ratio >= up - 1e-9, ratio <= down + 1e-9
        certified += float(new[over].sum())
        rejected += float(new[under].sum())
        mass = np.where(over | under, 0.0, new)
    return certified, rejected


@pytest.mark.parametrize("size", [20, 40, 100, 400])
def test_draws_without_replacement_cross_no_more_often(size: int) -> None:
    pairs = min(size, 60)
    for apart in (0.0, 0.2):
        firing, silent = round(size * (0.65 - apart / 2)), round(size * (0.65 + apart / 2))
        certified, _ = crossing(TEST, size, firing, silent, pairs)
        assert certified <= operating(TEST, firing / size, silent / size, [pairs]).certified + 1e-12
        firing, silent = round(size * (0.8 - apart / 2)), round(size * (0.8 + apart / 2))
        _, rejected = crossing(TEST, size, firing, silent, pairs)
        assert rejected <= operating(TEST, firing / size, silent / size, [pairs]).rejected + 1e-12


def test_strata_in_turn_cross_no_more_often() -> None:
    """Ten deciles that come round in turn, their order drawn anew each time, with sensitivity falling over them."""
    rng = np.random.default_rng(0)
    falling = np.linspace(0.9, 0.4, 10)
    n = 8000
    order = np.argsort(rng.random((n, 6, 10)), axis=2).reshape(n, 60)
    means = ((rng.random((n, 60)) < falling[order]).astype(float) + (rng.random((n, 60)) < 0.65)) / 2
    certified = np.mean([TEST.decide(row)[0] is True for row in means])
    assert certified < operating(TEST, 0.65, 0.65, [60]).certified + 0.005


def test_the_fixed_test_of_equal_errors() -> None:
    def enough(n: int) -> bool:
        need = np.arange(2 * n + 1)
        sized = stats.binom.sf(need - 1, 2 * n, 0.65) <= 0.05
        return bool((sized & (stats.binom.sf(need - 1, 2 * n, 0.8) >= 0.95)).any())

    assert fixed_pairs(TEST) == next(n for n in range(1, 100) if enough(n)) == 49
    assert fixed_pairs(RatioTest(level=0.8, margin=0.3)) < 20
    with pytest.raises(ConfigError, match="give a larger one"):
        fixed_pairs(RatioTest(level=0.8, margin=0.001))


def test_pairs_wait_for_their_partner() -> None:
    assert pair_means([True, False, True], [True]).tolist() == [1.0]
    assert pair_means([True, False, True], [True, True]).tolist() == [1.0, 0.5]
    assert pair_means([], [True]).tolist() == []


def slow_capital(values: Array, mean: float) -> float:
    bets = [(k + 0.5) / sequential.BETS / mean for k in range(sequential.BETS)]
    return float(np.mean([math.prod(1 + bet * (v - mean) for v in values.tolist()) for bet in bets]))


VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30).map(np.array)


@given(values=VALUES, mean=st.floats(0.05, 0.95))
def test_capital_is_the_mean_over_bets(values: Array, mean: float) -> None:
    assert math.exp(log_capital(values, mean)) == pytest.approx(slow_capital(values, mean), rel=1e-9)
    assert log_capital(values, mean * 0.9) >= log_capital(values, mean) - 1e-12


def test_capital_needs_a_mean() -> None:
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        log_capital(np.ones(3), 1.0)


def mean_capital(rates: list[tuple[float, float]], level: float) -> float:
    """The expectation of capital over pairs of these sensitivities and specificities: every outcome in turn."""
    total = 0.0
    for outcome in itertools.product((0.0, 0.5, 1.0), repeat=len(rates)):
        chance = 1.0
        for d, (s, c) in zip(outcome, rates, strict=True):
            chance *= {0.0: (1 - s) * (1 - c), 0.5: s * (1 - c) + c * (1 - s), 1.0: s * c}[d]
        total += chance * math.exp(log_capital(np.array(outcome), level))
    return total


def test_capital_is_worth_one_under_every_null() -> None:
    """The mean of the e-value, exactly: 1 on the boundary, below it inside, and with strata that differ."""
    for s, c in ((0.8, 0.8), (0.65, 0.95), (0.6, 1.0)):
        assert mean_capital([(s, c)] * 6, 0.8) == pytest.approx(1.0, abs=1e-9)
    assert mean_capital([(0.7, 0.7)] * 6, 0.8) < 0.9
    assert mean_capital([(0.5, 0.9)] * 6, 0.8) < 0.9
    strata = [(0.95, 0.8), (0.85, 0.9), (0.75, 0.7), (0.9, 0.8), (0.6, 0.7), (0.75, 0.9)]
    assert np.mean(strata) == pytest.approx(0.8)
    assert mean_capital(strata, 0.8) < 1.0


def test_bounds_are_where_capital_reaches_forty() -> None:
    values = np.array([1.0] * 60 + [0.5] * 30 + [0.0] * 10)
    found = mean_sequence(values)
    low = optimize.brentq(lambda m: slow_capital(values, m) - 40.0, 0.3, 0.75)
    high = 1 - optimize.brentq(lambda m: slow_capital(1 - values, m) - 40.0, 0.1, 0.25)
    assert (found.low, found.value, found.high) == pytest.approx((low, 0.75, high), abs=1e-6)
    assert (found.n, found.method) == (100, "betting confidence sequence")
    narrower = mean_sequence(values, level=0.8)
    assert found.low < narrower.low < narrower.high < found.high


@given(values=VALUES)
def test_intervals_hold_their_value_and_mirror(values: Array) -> None:
    found, mirrored = mean_sequence(values), mean_sequence(1 - values)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-6)


def test_nothing_is_known_of_nothing() -> None:
    for values in (np.zeros(0), np.array([0.5, math.nan]), np.array([1.5])):
        found = mean_sequence(values)
        assert math.isnan(found.value)
        assert found.n == 0
    assert mean_sequence(np.zeros(5)).low == 0.0
    with pytest.raises(InputError, match="confidence level"):
        mean_sequence(np.ones(3), level=1.0)


@pytest.mark.parametrize(("s", "c"), [(0.8, 0.8), (0.65, 0.95), (0.9, 0.9)])
def test_intervals_hold_at_every_time_at_once(s: float, c: float) -> None:
    """The exact chance that any interval up to 60 pairs leaves out the truth: carried over counts of 0 and of 1."""
    mean, pairs = (s + c) / 2, 60
    both, neither = s * c, (1 - s) * (1 - c)
    mass = {(0, 0): 1.0}
    missed = 0.0
    for n in range(1, pairs + 1):
        new: dict[tuple[int, int], float] = {}
        for (zeros, ones), chance in mass.items():
            for step, p in (((1, 0), neither), ((0, 1), both), ((0, 0), 1 - both - neither)):
                key = (zeros + step[0], ones + step[1])
                new[key] = new.get(key, 0.0) + chance * p
        mass = {}
        for (zeros, ones), chance in new.items():
            counts = np.array([zeros, n - zeros - ones, ones])
            over = sequential._log_capitals(np.array([0.0, 0.5, 1.0]), counts, np.array([mean]))[0]
            under = sequential._log_capitals(np.array([1.0, 0.5, 0.0]), counts, np.array([1 - mean]))[0]
            if max(over, under) >= math.log(40.0):
                missed += chance
            else:
                mass[zeros, ones] = chance
    assert 0.001 < missed <= 0.05


def test_balanced_accuracy_over_pairs() -> None:
    found = balanced_accuracy_sequence([True, True, False, True], [True, False, True])
    assert found.value == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.n == 6
    assert math.isnan(balanced_accuracy_sequence([], [True]).value)


def test_f1_from_both_rates() -> None:
    firing, silent = [True] * 40 + [False] * 10, [True] * 45 + [False] * 5
    found = f1_sequence(firing, silent, share=0.5)
    assert found.value == pytest.approx(2 * 40 / (2 * 40 + 5 + 10))
    assert 0.5 < found.low < found.value < found.high < 1.0
    third = f1_sequence(firing, silent, share=1 / 3)  # as with 50 firing and 100 silent windows
    assert third.value == pytest.approx(2 * 40 / (2 * 40 + 10 + 10))
    assert math.isnan(f1_sequence([], silent, share=0.0).value)
    with pytest.raises(InputError, match="both classes"):
        f1_sequence(firing, silent, share=1.0)
