from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from exegete.errors import InputError
from exegete.metrics.over_latents import compare, macro_mean


def test_macro_mean_is_student_s() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 40)
    found = macro_mean(values)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (found.low, found.value, found.high) == pytest.approx((low, values.mean(), high))
    assert (found.n, found.method) == (40, "t")
    even = macro_mean(values, weights=np.full(40, 0.3))
    assert (even.low, even.value, even.high) == pytest.approx((low, values.mean(), high))
    assert even.method == "weighted-t"


def test_weighted_mean_by_hand() -> None:
    found = macro_mean([0.5, 0.7, 0.9], weights=[1.0, 2.0, 1.0])
    spread = math.sqrt((0.2**2 + 0.0 + 0.2**2) * 3 / 2) / 4
    half = stats.t.ppf(0.975, 16 / 6 - 1) * spread
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.7 - half, 0.7 + half))
    alone = macro_mean([0.5, 0.9], weights=[0.0, 1.0])  # a latent without weight is none
    assert (alone.value, alone.low, alone.n) == (0.9, -math.inf, 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_over_latents_cover(weighted: bool) -> None:
    rng = np.random.default_rng(3)
    held = {"t": 0, "bootstrap": 0}
    for trial in range(300):
        rates = rng.gamma(2.0, size=60) if weighted else None
        values = rng.beta(6, 2.2, 60)
        for method in held:
            found = macro_mean(values, weights=rates, method=method, draws=300, seed=trial)  # type: ignore[arg-type]
            held[method] += found.low <= 6 / 8.2 <= found.high
    assert 0.92 <= held["t"] / 300 <= 0.98
    assert 0.89 <= held["bootstrap"] / 300 <= 0.98


def test_bootstrap_over_latents() -> None:
    values = np.random.default_rng(1).beta(6, 2.2, 200)
    found = macro_mean(values, method="bootstrap", seed=5)
    assert found == macro_mean(values, method="bootstrap", seed=5)
    assert found != macro_mean(values, method="bootstrap", seed=6)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", random_state=np.random.default_rng(0), n_resamples=4000
    )
    assert (found.low, found.high) == pytest.approx(theirs.confidence_interval, abs=0.004)
    assert found.method == "bootstrap over latents"


def test_missing_scores_are_counted_and_bounded() -> None:
    values = [0.6, math.nan, 0.8, 0.7, math.nan, 0.7]
    found = macro_mean(values)
    assert found.n == 4
    assert found.value == pytest.approx(0.7)
    assert (found.floor, found.ceiling) == (found.low, found.high)
    bounded = macro_mean(values, within=(0.0, 1.0))
    assert bounded.floor == pytest.approx(macro_mean([0.6, 0.0, 0.8, 0.7, 0.0, 0.7]).low)
    assert bounded.ceiling == pytest.approx(macro_mean([0.6, 1.0, 0.8, 0.7, 1.0, 0.7]).high)
    assert (bounded.low, bounded.high) == (found.low, found.high)
    nothing = macro_mean([math.nan, math.nan])
    assert math.isnan(nothing.value)
    assert nothing.n == 0


def test_means_that_cannot_be_taken() -> None:
    with pytest.raises(InputError, match="got 1 for 2 latents"):
        macro_mean([0.5, 0.6], weights=[1.0])
    with pytest.raises(InputError, match="at least 0"):
        macro_mean([0.5, 0.6], weights=[1.0, math.nan])
    with pytest.raises(InputError, match="t or bootstrap"):
        macro_mean([0.5, 0.6], method="jackknife")  # type: ignore[arg-type]


def test_comparison_is_paired() -> None:
    rng = np.random.default_rng(2)
    b = rng.beta(6, 2.2, 30)
    a = np.clip(b + rng.normal(0.03, 0.05, 30), 0, 1)
    found = compare(a, b)
    test = stats.ttest_rel(a, b)
    assert found.mean.value == pytest.approx((a - b).mean())
    assert (found.mean.low, found.mean.high) == pytest.approx(tuple(test.confidence_interval()))
    assert found.median.value == pytest.approx(np.median(a - b))
    assert found.p_median == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert found.p_mean == pytest.approx(test.pvalue, abs=0.01)
    assert found.higher == pytest.approx((a > b).mean())
    swapped = compare(b, a)
    assert swapped.mean.value == pytest.approx(-found.mean.value)
    assert swapped.p_mean == pytest.approx(found.p_mean, abs=0.01)


def test_few_latents_are_exchanged_in_all_ways() -> None:
    gaps = np.array([0.1, 0.25, -0.05, 0.3, 0.12, 0.02])
    found = compare(gaps, np.zeros(6))
    means = [np.mean(gaps * np.array(signs)) for signs in itertools.product((-1, 1), repeat=6)]
    assert found.p_mean == pytest.approx(np.mean(np.abs(means) >= abs(gaps.mean()) - 1e-12))


def test_comparison_leaves_out_what_lacks_a_score() -> None:
    found = compare([0.5, math.nan, 0.7, 0.6], [0.4, 0.5, math.nan, 0.6])
    assert (found.n, found.n_missing) == (2, 2)
    assert found.higher == pytest.approx(0.75)  # one higher, one tied
    same = compare([0.5, 0.6], [0.5, 0.6])
    assert (same.p_mean, same.p_median, same.mean.value, same.higher) == (1.0, 1.0, 0.0, 0.5)
    nothing = compare([math.nan], [0.5])
    assert math.isnan(nothing.p_mean)
    assert math.isnan(nothing.mean.value)
    with pytest.raises(InputError, match="got 2 and 1"):
        compare([0.5, 0.6], [0.5])
