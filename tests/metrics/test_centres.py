"""Means and medians over latents against tables and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exegete import metrics
from exegete.errors import InputError
from exegete.metrics import Interval, centres


def undefined(interval: Interval) -> bool:
    return interval.n == 0 and all(math.isnan(x) for x in (interval.value, interval.low, interval.high))


def test_median_interval_by_the_binomial_table() -> None:
    # Ranks of the 95 % interval of a median (Conover, table A3): n=6: 1–6, 9: 2–8, 10: 2–9, 25: 8–18, 50: 18–33.
    for n, low, high in [(6, 1, 6), (9, 2, 8), (10, 2, 9), (25, 8, 18), (50, 18, 33)]:
        interval = metrics.median_interval(np.random.default_rng(n).permutation(n) + 1.0)
        assert (interval.low, interval.value, interval.high) == (low, (n + 1) / 2, high)
        assert (interval.n, interval.method) == (n, "order-statistics")


def test_five_values_bound_no_median() -> None:
    interval = metrics.median_interval([3, 1, 2, 5, 4])
    assert (interval.low, interval.value, interval.high) == (-math.inf, 3, math.inf)
    assert undefined(metrics.median_interval([]))
    assert undefined(metrics.median_interval([0.5, math.nan]))
    assert metrics.median_interval([0.5]) == Interval(
        value=0.5, low=-math.inf, high=math.inf, method="order-statistics", n=1
    )


def test_a_bound_that_just_reaches_its_level_counts() -> None:
    # Four values: the range misses the median with chance 2 · ½⁴, exactly what a level of 7/8 allows.
    assert metrics.median_interval([4, 1, 3, 2], level=0.875) == Interval(
        value=2.5, low=1, high=4, method="order-statistics", n=4
    )
    assert metrics.median_interval([4, 1, 3, 2], level=0.876).high == math.inf


def test_median_interval_covers_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(
        (i := metrics.median_interval(rng.exponential(size=21))).low <= math.log(2) <= i.high for _ in range(600)
    )
    exact = 1 - 2 * stats.binom.cdf(5, 21, 0.5)  # between the 6th smallest and the 6th largest
    assert abs(hits / 600 - exact) < 4 * math.sqrt(exact * (1 - exact) / 600)


def test_mean_interval_is_scipys_t() -> None:
    values = [0.2, 0.9, 0.4, 0.7]
    interval = metrics.mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.55, low, high))
    assert (interval.n, interval.method) == (4, "t")
    one = metrics.mean_interval([0.3])
    assert one == Interval(value=0.3, low=-math.inf, high=math.inf, method="t", n=1)
    assert undefined(metrics.mean_interval([]))
    assert undefined(metrics.mean_interval([1.0, math.inf]))
    with pytest.raises(InputError, match="flat"):
        metrics.mean_interval([[1.0]])  # type: ignore[list-item]


def test_lift_is_of_pairs_not_of_groups() -> None:
    scores, nulls = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.9, 1.7, 2.9, 3.6, 4.9, 5.8, 6.5]
    lift = metrics.paired_lift(scores, nulls)
    # Differences .1 .3 .1 .4 .1 .2 .5: median .2 (the medians differ by .4), range for n = 7.
    assert lift.median.value == pytest.approx(0.2)
    assert (lift.median.low, lift.median.high) == pytest.approx((0.1, 0.5))
    assert lift.mean.value == pytest.approx(1.7 / 7)
    assert lift.mean.low == pytest.approx(stats.ttest_rel(scores, nulls).confidence_interval(0.95).low)
    assert lift.median.n == lift.mean.n == 7
    with pytest.raises(InputError, match="2 scores and 1 nulls"):
        metrics.paired_lift([1, 2], [1])
    assert undefined(metrics.paired_lift([0.5, math.nan], [0.5, 0.5]).median)
    assert undefined(metrics.paired_lift([], []).mean)


def test_difference_of_medians() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(2.0, 1.0, 80), rng.normal(0.0, 1.0, 50)
    interval = metrics.difference_of_medians(a, b, seed=3)
    assert interval.value == pytest.approx(np.median(a) - np.median(b))
    assert interval == metrics.difference_of_medians(a, b, seed=3)
    assert interval != metrics.difference_of_medians(a, b, seed=4)
    # scipy's own bootstrap of two independent groups, the same statistic and method.
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: np.median(x, axis=axis) - np.median(y, axis=axis),
        method="percentile", n_resamples=2000, random_state=np.random.default_rng(0), vectorized=True,
    ).confidence_interval  # fmt: skip
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.12)
    assert (interval.n, interval.method) == (130, "bootstrap")
    assert undefined(metrics.difference_of_medians([], b))
    assert undefined(metrics.difference_of_medians(a, [math.nan]))


def test_the_bootstrap_in_pieces_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def keep(values: Any, axis: int) -> Any:
        seen.append(values.shape)
        return np.median(values, axis=axis)

    monkeypatch.setattr(centres, "_AT_ONCE", 35)
    drawn = centres._resampled(np.arange(10.0), keep, 8, np.random.default_rng(0))
    assert seen == [(3, 10), (3, 10), (2, 10)]
    assert drawn.shape == (8,)
    centres._resampled(np.arange(50.0), keep, 2, np.random.default_rng(0))
    assert seen[3:] == [(1, 50), (1, 50)]
