"""AUROC and average precision against scikit-learn, and their intervals against slow counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from exegete import metrics
from exegete.metrics import Interval

Z = 1.959963984540054


def undefined(interval: Interval) -> bool:
    return interval.n == 0 and all(math.isnan(x) for x in (interval.value, interval.low, interval.high))


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
