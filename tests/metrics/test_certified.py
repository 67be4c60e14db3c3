from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from exegete.errors import InputError
from exegete.metrics import Observed
from exegete.metrics.certified import certified, e_value, nearest_null, p_value
from exegete.metrics.sequential import BETS
from exegete.types import Array


def judged(hits: int, firing: int, rejected: int, silent: int, *, failed: Sequence[bool] = ()) -> Observed:
    """So many right answers in each class; ``failed`` are the truths of windows without an answer."""
    truth = np.array([True] * firing + [False] * silent + list(failed), bool)
    said = [True] * hits + [False] * (firing - hits) + [False] * rejected + [True] * (silent - rejected)
    n = len(truth)
    return Observed(
        truth=truth,
        prediction=np.array([*said, *[-1] * len(failed)], np.int8),
        score=np.full(n, np.nan),
        stratum=np.zeros(n, np.int8),
        document=np.arange(n),
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64),
        activation=np.zeros(n),
    )


def slow_e_value(hits: int, firing: int, rejected: int, silent: int, level: float) -> float:
    total, least = 0.0, min(firing, silent)
    for k in range(BETS):
        share = (k + 0.5) / BETS / level
        one, other = share * least / firing, share * least / silent
        gains = [1 + one * ((i < hits) - level) for i in range(firing)]
        gains += [1 + other * ((j < rejected) - level) for j in range(silent)]
        total += math.prod(gains)
    return total / BETS


@pytest.mark.parametrize("counts", [(9, 10, 8, 10), (5, 8, 4, 4), (2, 3, 20, 30), (0, 4, 4, 4)])
def test_e_value_is_the_mean_over_bets(counts: tuple[int, int, int, int]) -> None:
    assert e_value(judged(*counts), 0.7) == pytest.approx(slow_e_value(*counts, 0.7))


def test_e_value_tells_good_from_bad() -> None:
    assert e_value(judged(100, 100, 100, 100), 0.8) > 1e15
    assert e_value(judged(85, 100, 99, 100), 0.8) > 1e3
    assert e_value(judged(60, 100, 60, 100), 0.8) < 0.1
    assert math.isfinite(e_value(judged(9000, 9000, 9000, 9000), 0.5))


def mean_e_value(firing: Array, silent: Array, level: float) -> float:
    """The expectation of the e-value over counts of right answers with these chances."""
    n, m = len(firing) - 1, len(silent) - 1
    values = np.array([[e_value(judged(i, n, j, m), level) for j in range(m + 1)] for i in range(n + 1)])
    return float(firing @ values @ silent)


@pytest.mark.parametrize(("firing", "silent", "level"), [(12, 12, 0.8), (20, 7, 0.7), (5, 30, 0.9), (10, 10, 0.4)])
def test_e_value_is_worth_at_most_one_under_every_null(firing: int, silent: int, level: float) -> None:
    for mean in (level, level - 0.1):
        for s in np.linspace(max(0.0, 2 * mean - 1), min(1.0, 2 * mean), 41):
            c = min(max(2 * mean - s, 0.0), 1.0)
            right = stats.binom.pmf(np.arange(firing + 1), firing, s)
            rejected = stats.binom.pmf(np.arange(silent + 1), silent, c)
            assert mean_e_value(right, rejected, level) <= 1 + 1e-9
    right = stats.binom.pmf(np.arange(firing + 1), firing, level)
    rejected = stats.binom.pmf(np.arange(silent + 1), silent, level)
    assert mean_e_value(right, rejected, level) == pytest.approx(1.0)  # nothing is given away where classes are alike


def test_e_value_holds_for_strata_and_without_replacement() -> None:
    firing = poisson_binomial([0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.6, 0.55, 0.5, 0.45])
    silent = poisson_binomial([0.9] * 5 + [0.5] * 5)
    assert mean_e_value(firing, silent, 0.7) < 1.0
    drawn = stats.hypergeom.pmf(np.arange(11), 30, 21, 10)  # ten of a frame of 30, of which 21 are answered rightly
    assert mean_e_value(drawn, drawn, 0.7) < 1.0


def test_what_failed_is_left_out_or_wrong() -> None:
    plain, failing = judged(18, 20, 18, 20), judged(18, 20, 18, 20, failed=[True, True, False])
    for value in (e_value, p_value):
        assert value(failing, 0.7) == value(plain, 0.7)
        assert value(failing, 0.7, worst=True) == pytest.approx(value(judged(18, 22, 18, 21), 0.7))
    assert e_value(failing, 0.7, worst=True) < e_value(plain, 0.7)
    assert p_value(failing, 0.7, worst=True) > p_value(plain, 0.7)


def test_no_answer_is_no_evidence() -> None:
    for observed in (judged(0, 0, 5, 5), judged(5, 5, 0, 0), judged(0, 0, 0, 0, failed=[True, False])):
        assert e_value(observed, 0.7) == 1.0
        assert p_value(observed, 0.7) == 1.0


@pytest.mark.parametrize("level", [0.0, 1.0, math.nan])
def test_levels_that_are_none(level: float) -> None:
    for value in (e_value, p_value):
        with pytest.raises(InputError, match="lies between 0 and 1"):
            value(judged(5, 5, 5, 5), level)


def test_p_value_of_all_right_is_the_best_chance_of_that() -> None:
    # On s + c = 1.6 the chance s^n·c^m is greatest at s = 1.6·n / (n + m).
    assert p_value(judged(10, 10, 10, 10), 0.8) == pytest.approx(0.8**20)
    s = 1.6 * 14 / 24
    assert p_value(judged(14, 14, 10, 10), 0.8) == pytest.approx(s**14 * (1.6 - s) ** 10, rel=1e-4)
    assert p_value(judged(6, 10, 6, 10), 0.8) == 1.0


def outcomes(firing: int, silent: int, level: float) -> Array:
    return np.array(
        [[p_value(judged(i, firing, j, silent), level) for j in range(silent + 1)] for i in range(firing + 1)]
    )


@pytest.mark.parametrize(("firing", "silent", "level"), [(12, 12, 0.7), (8, 20, 0.6), (15, 10, 0.85), (6, 6, 0.3)])
def test_p_values_are_exact_over_the_whole_null(firing: int, silent: int, level: float) -> None:
    found = outcomes(firing, silent, level)
    assert bool((np.diff(found, axis=0) <= 1e-12).all())
    assert bool((np.diff(found, axis=1) <= 1e-12).all())
    for alpha in (0.01, 0.05, 0.2):
        for mean in (level, level - 0.1):
            for s in np.linspace(max(0.0, 2 * mean - 1), min(1.0, 2 * mean), 97):
                c = min(max(2 * mean - s, 0.0), 1.0)
                chance = stats.binom.pmf(np.arange(firing + 1), firing, s)[:, None]
                chance = chance * stats.binom.pmf(np.arange(silent + 1), silent, c)
                assert chance[found <= alpha].sum() <= alpha * (1 + 1e-3)


def poisson_binomial(rates: Sequence[float]) -> Array:
    found = np.ones(1)
    for rate in rates:
        found = np.convolve(found, [1 - rate, rate])
    return found


def test_p_values_hold_for_strata_that_differ() -> None:
    found = outcomes(10, 10, 0.7)
    firing = poisson_binomial([0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.6, 0.55, 0.5, 0.45])
    silent = poisson_binomial([0.9] * 5 + [0.5] * 5)
    for alpha in (0.01, 0.05, 0.1):
        assert (firing[:, None] * silent)[found <= alpha].sum() <= alpha


def test_p_value_follows_the_likelihood_ratio() -> None:
    """For many judgements: the upper tail of the normal at the signed root of twice the log likelihood ratio."""
    hits, rejected, n = 830, 910, 1000
    s, c = hits / n, rejected / n
    s0 = float(nearest_null(np.array(s), np.array(c), n, n, 0.85))
    c0 = 1.7 - s0
    assert n * (s - s0) / (s0 * (1 - s0)) == pytest.approx(n * (c - c0) / (c0 * (1 - c0)))
    ratio = hits * math.log(s / s0) + (n - hits) * math.log((1 - s) / (1 - s0))
    ratio += rejected * math.log(c / c0) + (n - rejected) * math.log((1 - c) / (1 - c0))
    expected = stats.norm.sf(math.sqrt(2 * ratio))
    assert p_value(judged(hits, n, rejected, n), 0.85) == pytest.approx(expected, rel=0.15)


def test_e_bh_by_hand() -> None:
    # n / (kq) for five latents at q = .1: 50, 25, 16.7, 12.5, 10.
    assert certified("abcde", q=0.1, e_values=[1.0, 60.0, 20.0, 18.0, 3.0]) == ["b", "c", "d"]
    assert certified("abcde", q=0.1, e_values=[11.0] * 5) == list("abcde")
    assert certified("abcde", q=0.1, e_values=[49.0, 24.0, 16.0, 12.0, 9.0]) == []
    assert certified("ab", q=0.1, e_values=[math.inf, 0.0]) == ["a"]
    assert certified("", q=0.1, e_values=[]) == []


@given(st.lists(st.floats(0.0, 1e4), max_size=30), st.floats(0.01, 0.5))
def test_e_bh_is_bh_of_reciprocals(values: list[float], q: float) -> None:
    """Wang and Ramdas: the same as Benjamini–Hochberg on 1/e, computed here step by step."""
    names = list(range(len(values)))
    ordered = sorted(values, reverse=True)
    k = max((i for i, e in enumerate(ordered, 1) if e * i * q >= len(values)), default=0)
    found = certified(names, q=q, e_values=values)
    assert len(found) == k
    assert sorted((values[i] for i in found), reverse=True) == ordered[:k]


def test_corrections_by_hand() -> None:
    p = [0.001, 0.012, 0.021, 0.039, 0.5]
    # BH at .05 holds them against .01, .02, .03, .04, .05; BY divides these by 1 + 1/2 + … + 1/5 = 2.283.
    assert certified("abcde", q=0.05, p_values=p, correction="bh") == list("abcd")
    assert certified("abcde", q=0.05, p_values=p) == ["a"]
    assert certified("abcde", q=0.05, p_values=p[::-1], correction="bh") == list("edcb")
    assert certified("", q=0.05, p_values=[]) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "one of them"),
        ({"e_values": [1.0, 2.0], "p_values": [0.1, 0.2]}, "one of them"),
        ({"e_values": [1.0]}, "got 1 for 2 latents"),
        ({"e_values": [1.0, math.nan]}, "at least 0"),
        ({"p_values": [0.5, 1.5]}, "between 0 and 1"),
        ({"p_values": [0.5, math.nan]}, "between 0 and 1"),
        ({"e_values": [1.0, 2.0], "q": 1.0}, "got 1.0"),
    ],
)
def test_lists_that_cannot_be_made(given: dict[str, list[float]], told: str) -> None:
    with pytest.raises(InputError, match=told):
        certified("ab", **{"q": 0.1, **given})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="by or bh"):
        certified("ab", q=0.1, p_values=[0.1, 0.1], correction="holm")  # type: ignore[arg-type]


def cut_of(level: float, easy: Array) -> float:
    """Where answers with a correlation of .1 in documents have to be cut to be right so often over these documents."""
    return float(optimize.brentq(lambda cut: right_in(cut, easy).mean() - level, -9, 9))


def right_in(cut: float, easy: Array) -> Array:
    found: Array = stats.norm.cdf((cut + math.sqrt(0.1) * easy) / math.sqrt(0.9))
    return found


def test_lists_keep_their_rate_when_latents_share_documents() -> None:
    """Half the latents at the level exactly, half well above; an easy document is easy for all of them."""
    rng = np.random.default_rng(0)
    lists, m, n = 60, 40, 60
    wrong, power, capital = np.zeros((3, lists)), np.zeros((3, lists)), []
    for number in range(lists):
        easy = rng.normal(size=20)
        chance = np.array([right_in(cut_of(level, easy), easy) for level in (0.8, 0.93)])[np.arange(m) % 2]
        document = rng.integers(20, size=(2, n))  # the same windows for all latents
        right = rng.random((2, m, n)) < chance[:, document].transpose(1, 0, 2)
        evidence = [judged(int(a.sum()), n, int(b.sum()), n) for a, b in zip(*right, strict=True)]
        e, p = [e_value(o, 0.8) for o in evidence], [p_value(o, 0.8) for o in evidence]
        capital += e[::2]
        made = (
            certified(range(m), q=0.1, e_values=e),
            certified(range(m), q=0.1, p_values=p),
            certified(range(m), q=0.1, p_values=p, correction="bh"),
        )
        for place, found in enumerate(made):
            false = sum(1 for i in found if i % 2 == 0)
            wrong[place, number] = false / max(len(found), 1)
            power[place, number] = (len(found) - false) / (m / 2)
    assert bool((wrong.mean(axis=1) <= 0.1).all())
    assert bool((power.mean(axis=1) > 0.6).all())
    assert power[0].mean() < power[2].mean()
    assert np.mean(capital) < 1.0 + 3 * np.std(capital) / math.sqrt(len(capital))
