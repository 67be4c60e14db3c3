"""Metrics against hand-computed values, against scikit-learn and scipy, and the coverage of their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from exegete import metrics
from exegete.errors import InputError
from exegete.metrics import Interval

Z = 1.959963984540054
BINARY: list[Callable[..., Interval]] = [
    metrics.sensitivity,
    metrics.specificity,
    metrics.precision,
    metrics.balanced_accuracy,
    metrics.f1,
]


def undefined(interval: Interval) -> bool:
    return interval.n == 0 and all(math.isnan(x) for x in (interval.value, interval.low, interval.high))


def confusion(tp: int, fn: int, fp: int, tn: int) -> tuple[list[bool], list[bool]]:
    truth = [True] * (tp + fn) + [False] * (fp + tn)
    return truth, [True] * tp + [False] * fn + [True] * fp + [False] * tn


# -- proportions ------------------------------------------------------------------------------------------------------


def test_wilson_gives_the_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = metrics.wilson(k, n)
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
        assert (interval.value, interval.n, interval.method) == (k / n, n, "wilson")


@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_wilson_is_scipys(kn: tuple[int, int], level: float) -> None:
    k, n = kn
    interval = metrics.wilson(k, n, level=level)
    theirs = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert interval.low == pytest.approx(theirs.low, abs=1e-12)
    assert interval.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0


def test_wilson_ends_are_exact_and_what_is_no_proportion_is_refused() -> None:
    assert metrics.wilson(0, 7).low == 0.0
    assert metrics.wilson(7, 7).high == 1.0
    assert undefined(metrics.wilson(0, 0))
    for k, n in [(-1, 5), (6, 5), (1, 0)]:
        with pytest.raises(InputError, match=f"got {k} of {n}"):
            metrics.wilson(k, n)
    for level in (0.0, 1.0):
        with pytest.raises(InputError, match="confidence level"):
            metrics.wilson(1, 2, level=level)


def test_counts_of_a_known_confusion() -> None:
    truth, said = confusion(tp=8, fn=2, fp=3, tn=12)
    assert metrics.sensitivity(truth, said) == metrics.wilson(8, 10)
    assert metrics.specificity(truth, said) == metrics.wilson(12, 15)
    assert metrics.precision(truth, said) == metrics.wilson(8, 11)
    assert metrics.balanced_accuracy(truth, said).value == pytest.approx(0.8)
    assert metrics.f1(truth, said).value == pytest.approx(16 / 21)


def test_balanced_accuracy_interval_by_hand() -> None:
    truth, said = confusion(tp=8, fn=2, fp=3, tn=17)
    # MOVER: half the root of the summed squared distances to the two Wilson bounds.
    a, b = (stats.binomtest(k, n).proportion_ci(method="wilson") for k, n in ((8, 10), (17, 20)))
    interval = metrics.balanced_accuracy(truth, said)
    assert interval.value == pytest.approx(0.825)
    assert interval.low == pytest.approx(0.825 - math.sqrt((0.8 - a.low) ** 2 + (0.85 - b.low) ** 2) / 2, abs=1e-12)
    assert interval.high == pytest.approx(0.825 + math.sqrt((a.high - 0.8) ** 2 + (b.high - 0.85) ** 2) / 2, abs=1e-12)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.6377, 0.9117)
    assert (interval.method, interval.n) == ("mover-wilson", 30)


def test_balanced_accuracy_of_perfect_answers_is_not_certain() -> None:
    interval = metrics.balanced_accuracy(*confusion(10, 0, 0, 10))
    assert (interval.value, interval.high) == (1.0, 1.0)
    # Both Wilson bounds are n / (n + z²); their distances d add to d √2 / 2.
    assert interval.low == pytest.approx(1.0 - (1.0 - 10 / (10 + Z * Z)) * math.sqrt(2) / 2)


def test_f1_interval_is_wilsons_of_the_jaccard_index() -> None:
    truth, said = confusion(tp=6, fn=1, fp=3, tn=90)
    wilson = stats.binomtest(6, 10).proportion_ci(method="wilson")
    interval = metrics.f1(truth, said)
    assert interval.value == pytest.approx(12 / 16)
    assert interval.low == pytest.approx(2 * wilson.low / (1 + wilson.low))
    assert interval.high == pytest.approx(2 * wilson.high / (1 + wilson.high))
    assert (interval.method, interval.n) == ("wilson-jaccard", 100)
    assert metrics.f1(*confusion(0, 3, 0, 4)).value == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_binary_metrics_are_sklearns(cases: list[tuple[bool, bool]]) -> None:
    truth, said = [t for t, _ in cases], [p for _, p in cases]
    pairs: dict[Callable[..., Interval], Callable[[], Any]] = {
        metrics.sensitivity: lambda: oracle.recall_score(truth, said) if any(truth) else None,
        metrics.specificity: lambda: oracle.recall_score(truth, said, pos_label=False) if not all(truth) else None,
        metrics.precision: lambda: oracle.precision_score(truth, said) if any(said) else None,
        metrics.f1: lambda: oracle.f1_score(truth, said) if any(truth) or any(said) else None,
        metrics.balanced_accuracy: lambda: oracle.balanced_accuracy_score(truth, said) if len(set(truth)) > 1 else None,
    }
    for ours, theirs in pairs.items():
        interval, value = ours(np.array(truth), np.array(said)), theirs()
        if value is None:
            assert undefined(interval)
        else:
            assert interval.value == pytest.approx(value)
            assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0


def test_more_level_is_a_wider_interval_everywhere() -> None:
    rng = np.random.default_rng(0)
    truth, x, y = rng.random(60) < 0.5, rng.normal(size=60), rng.normal(size=60)
    x += truth
    everything: list[Callable[..., Interval]] = [
        *(partial(f, truth, x > 0.3) for f in BINARY),
        *(partial(f, truth, x) for f in (metrics.auroc, metrics.average_precision)),
        lambda level: metrics.pearson(x, y, level=level),
        lambda level: metrics.median_interval(x, level=level),
        lambda level: metrics.mean_interval(x, level=level),
        lambda level: metrics.difference_of_medians(x, y, level=level),
        lambda level: metrics.paired_lift(x, y, level=level).median,
        lambda level: metrics.paired_lift(x, y, level=level).mean,
        lambda level: metrics.share_of_ties(np.where(truth, 0.5, x), level=level),
    ]
    for metric in everything:
        narrow, default, wide = metric(level=0.5), metric(level=0.95), metric(level=0.999)
        assert narrow.value == default.value == wide.value
        assert wide.low < default.low < narrow.low <= narrow.value <= narrow.high < default.high < wide.high


@pytest.mark.parametrize("metric", [*BINARY, metrics.auroc, metrics.average_precision])
def test_nothing_in_is_undefined_not_zero(metric: Callable[..., Interval]) -> None:
    assert undefined(metric([], []))
    with pytest.raises(InputError, match="one truth"):
        metric([True, False], [True])
    with pytest.raises(InputError, match="flat"):
        metric([[True, False]], [[True, False]])
    with pytest.raises(InputError, match="true or false"):
        metric([0.5, 1.0], [1, 0])


def test_a_failed_judgement_is_not_taken_for_an_answer() -> None:
    """Peer's defect: −1 for an unparsed answer is counted as a wrong one; NaN is true to bool()."""
    for failed in (-1, math.nan):
        with pytest.raises(InputError, match="leave out what has failed"):
            metrics.balanced_accuracy([True, False], [1, failed])  # type: ignore[list-item]


def test_one_class_has_no_balanced_accuracy_and_no_ranking() -> None:
    assert undefined(metrics.balanced_accuracy([True, True], [True, False]))
    assert undefined(metrics.balanced_accuracy([False, False], [True, False]))
    assert undefined(metrics.auroc([True, True], [0.1, 0.2]))
    assert undefined(metrics.auroc([False, False], [0.1, 0.2]))
    assert undefined(metrics.average_precision([False, False], [0.1, 0.2]))


def test_an_undefined_interval_still_names_its_method() -> None:
    for interval, method in [
        (metrics.wilson(0, 0), "wilson"),
        (metrics.balanced_accuracy([], []), "mover-wilson"),
        (metrics.f1([], []), "wilson-jaccard"),
        (metrics.share_of_ties([]), "wilson"),
        (metrics.auroc([], []), "logit-delong"),
        (metrics.average_precision([], []), "logit"),
        (metrics.pearson([], []), "fisher-z"),
        (metrics.median_interval([]), "order-statistics"),
        (metrics.mean_interval([]), "t"),
        (metrics.difference_of_medians([], []), "bootstrap"),
    ]:
        assert undefined(interval)
        assert interval.method == method


def test_zeros_and_ones_are_truths_as_booleans_are() -> None:
    truth, said = confusion(tp=3, fn=1, fp=2, tn=4)
    numbers, floats = np.array(truth).astype(int), np.array(said).astype(float)
    for metric in BINARY:
        assert metric(numbers, floats) == metric(truth, said)
    assert metrics.auroc(numbers, floats) == metrics.auroc(truth, floats)


def test_an_interval_holds_its_value() -> None:
    with pytest.raises(InputError, match="leaves out"):
        Interval(value=0.5, low=0.6, high=0.7, method="m", n=1)


# -- rankings ---------------------------------------------------------------------------------------------------------

RANKED = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=50)


@given(RANKED)
def test_auroc_and_average_precision_are_sklearns(cases: list[tuple[bool, int]]) -> None:
    truth, scores = [t for t, _ in cases], [s / 4 for _, s in cases]
    if 0 < sum(truth) < len(truth):
        interval = metrics.auroc(truth, scores)
        assert interval.value == pytest.approx(oracle.roc_auc_score(truth, scores))
        assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
        assert interval.n == len(cases)
    if any(truth):
        interval = metrics.average_precision(truth, scores)
        assert interval.value == pytest.approx(oracle.average_precision_score(truth, scores))
        assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
        assert interval.n == len(cases)


def slow_delong(truth: list[bool], scores: list[float]) -> tuple[float, float]:
    """Return AUROC and DeLong's variance by counting all pairs."""
    over = [s for t, s in zip(truth, scores, strict=True) if t]
    under = [s for t, s in zip(truth, scores, strict=True) if not t]
    psi = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in under] for a in over])
    return float(psi.mean()), float(
        psi.mean(axis=1).var(ddof=1) / len(over) + psi.mean(axis=0).var(ddof=1) / len(under)
    )


@settings(max_examples=50)
@given(RANKED)
def test_auroc_interval_is_slow_delong_on_the_logit_scale(cases: list[tuple[bool, int]]) -> None:
    truth, scores = [t for t, _ in cases], [float(s) for _, s in cases]
    if not 2 <= sum(truth) <= len(truth) - 2:
        return
    value, variance = slow_delong(truth, scores)
    if variance < 1e-12 or value in (0.0, 1.0):
        return
    interval = metrics.auroc(truth, scores)
    half = Z * math.sqrt(variance) / (value * (1 - value))
    assert interval.method == "logit-delong"
    assert interval.low == pytest.approx(1 / (1 + math.exp(-math.log(value / (1 - value)) + half)))
    assert interval.high == pytest.approx(1 / (1 + math.exp(-math.log(value / (1 - value)) - half)))


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): 3>2, 3>1, 1<2, 1=1 → (1 + 1 + 0 + ½) / 4.
    assert metrics.auroc([True, False, True, False], [3, 2, 1, 1]).value == 0.625


@pytest.mark.parametrize(("scores", "value"), [([1, 2, 3, 4, 5], 1.0), ([5, 4, 3, 2, 1], 0.0), ([7, 7, 7, 7, 7], 0.5)])
def test_auroc_without_variance_still_has_a_width(scores: list[float], value: float) -> None:
    interval = metrics.auroc([False, False, False, True, True], scores)
    wilson = metrics.wilson(2 * value, 2)
    assert (interval.value, interval.method, interval.n) == (value, "wilson-smaller-class", 5)
    assert (interval.low, interval.high) == (wilson.low, wilson.high)


def test_auroc_of_a_single_positive_case() -> None:
    interval = metrics.auroc([True, False, False, False], [2.0, 1.0, 3.0, 0.0])
    assert interval.value == pytest.approx(2 / 3)
    assert interval.method == "wilson-smaller-class"
    assert interval.low < 0.2 < 0.9 < interval.high


def test_average_precision_takes_equal_scores_as_one_block() -> None:
    # Sorted by luck the first of a tie would give 1.0 or 0.33; as one block precision is 1/3 at full recall.
    for order in ([True, False, False], [False, False, True]):
        assert metrics.average_precision(order, [0.5, 0.5, 0.5]).value == pytest.approx(1 / 3)
    # Blocks: {T} → P 1, R ½; {T, F} → P 2/3, R 1.
    assert metrics.average_precision([True, True, False], [2, 1, 1]).value == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_average_precision_interval_by_hand() -> None:
    interval = metrics.average_precision([True, True, False], [2, 1, 1])
    value, eta = 5 / 6, math.log(5)
    half = Z / math.sqrt(2 * value * (1 - value))
    assert interval.low == pytest.approx(1 / (1 + math.exp(-(eta - half))))
    assert interval.high == pytest.approx(1 / (1 + math.exp(-(eta + half))))
    assert interval.method == "logit"
    perfect = metrics.average_precision([True, True, True, False], [2, 2, 2, 1])
    assert (perfect.value, perfect.high, perfect.method) == (1.0, 1.0, "wilson")
    assert perfect.low == pytest.approx(3 / (3 + Z * Z))
    assert metrics.average_precision([True, False], [2, 1], level=0.5).low == metrics.wilson(1, 1, level=0.5).low


def test_a_score_that_is_no_number_makes_the_ranking_undefined() -> None:
    assert undefined(metrics.auroc([True, False, True], [0.1, math.nan, 0.3]))
    assert undefined(metrics.average_precision([True, False, True], [0.1, math.nan, 0.3]))
    assert metrics.auroc([True, False], [0.0, -math.inf]).value == 1.0


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=4, max_size=40))
def test_pearson_is_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    interval = metrics.pearson(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert undefined(interval)
        return
    theirs = stats.pearsonr(x, y)
    assert interval.value == pytest.approx(theirs.statistic, abs=1e-12)
    if abs(theirs.statistic) < 1 - 1e-12:
        assert (interval.low, interval.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=1e-9)


def test_pearson_at_its_edges() -> None:
    line = metrics.pearson([1, 2, 3, 4], [2, 4, 6, 8])
    assert line.value == pytest.approx(1.0)
    assert line.low > 0.999
    three = metrics.pearson([1, 2, 3], [1, 3, 2])
    assert (three.low, three.high, three.n) == (-1.0, 1.0, 3)
    assert three.value == pytest.approx(0.5)
    assert metrics.pearson([1, 2, 3, 4], [1, 3, 2, 4]).low > -1.0
    for x in ([], [0.1] * 9, [1.0, math.nan], [1.0, math.inf]):
        assert undefined(metrics.pearson(x, list(range(len(x)))))
        assert undefined(metrics.pearson(list(range(len(x))), x))
    with pytest.raises(InputError, match="got 1 and 2"):
        metrics.pearson([1.0], [1.0, 2.0])


# -- over latents -----------------------------------------------------------------------------------------------------


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


def test_share_of_ties() -> None:
    interval = metrics.share_of_ties([0.5, 0.1 + 0.4, 0.50001, 0.7, 1 - 0.5 - 1e-12])
    assert interval == metrics.wilson(3, 5)
    assert metrics.share_of_ties([1.0, 0.0], at=1.0).value == 0.5
    assert undefined(metrics.share_of_ties([]))
    assert undefined(metrics.share_of_ties([0.5, math.nan]))
    assert metrics.share_of_ties([0.5]) == metrics.wilson(1, 1)  # one value is a value


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

    monkeypatch.setattr(metrics.basic, "_AT_ONCE", 35)
    drawn = metrics._resampled(np.arange(10.0), keep, 8, np.random.default_rng(0))
    assert seen == [(3, 10), (3, 10), (2, 10)]
    assert drawn.shape == (8,)
    metrics._resampled(np.arange(50.0), keep, 2, np.random.default_rng(0))
    assert seen[3:] == [(1, 50), (1, 50)]


@pytest.mark.parametrize(("hit", "false", "n"), [(0.8, 0.2, 100), (0.95, 0.05, 100), (0.7, 0.4, 25)])
def test_intervals_of_judgements_cover(hit: float, false: float, n: int) -> None:
    """Promise 3: an interval that says 95 % holds the truth about that often, per latent."""
    rng = np.random.default_rng(1)
    truth = np.repeat([True, False], n)
    exact = {"balanced_accuracy": (hit + 1 - false) / 2, "f1": 2 * hit / (1 + hit + false)}
    held = dict.fromkeys(exact, 0)
    for _ in range(400):
        said = rng.random(2 * n) < np.where(truth, hit, false)
        for name, value in exact.items():
            interval = getattr(metrics, name)(truth, said)
            held[name] += interval.low <= value <= interval.high
    assert 0.92 <= held["balanced_accuracy"] / 400 <= 0.98
    assert held["f1"] / 400 >= 0.93  # a little wide by design: it takes the number of cases as random
