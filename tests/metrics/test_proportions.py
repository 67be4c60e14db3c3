"""Shares of cases against hand-computed values and scikit-learn; what all plain metrics do alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
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


def test_share_of_ties() -> None:
    interval = metrics.share_of_ties([0.5, 0.1 + 0.4, 0.50001, 0.7, 1 - 0.5 - 1e-12])
    assert interval == metrics.wilson(3, 5)
    assert metrics.share_of_ties([1.0, 0.0], at=1.0).value == 0.5
    assert undefined(metrics.share_of_ties([]))
    assert undefined(metrics.share_of_ties([0.5, math.nan]))
    assert metrics.share_of_ties([0.5]) == metrics.wilson(1, 1)  # one value is a value


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
