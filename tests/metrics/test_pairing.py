"""What one explanation has over others: by hand, against scipy's paired t, and its coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exegete import metrics
from exegete.errors import InputError, NotFoundError
from exegete.metrics import Observed
from exegete.types import Array

ALL = ("balanced_accuracy", "sensitivity", "specificity", "f1", "auroc")


def drawn(seed: int, right: float, *, n: int = 40, documents: int = 15, failing: float = 0.0) -> Observed:
    """Return judgements of n windows of each class, which are the same for every seed."""
    document = np.random.default_rng(99).integers(documents, size=2 * n)
    rng = np.random.default_rng(seed)
    truth = np.repeat([True, False], n)
    prediction = np.where(rng.random(2 * n) < right, truth, ~truth).astype(np.int8)
    score = truth * right + rng.normal(size=2 * n)
    failed = rng.random(2 * n) < failing
    return Observed(
        truth=truth, prediction=np.where(failed, -1, prediction).astype(np.int8),
        score=np.where(failed, np.nan, score), stratum=np.zeros(2 * n, np.int8), document=document,
        probability=np.ones(2 * n), multiplicity=np.ones(2 * n, np.int64), activation=truth * 1.0,
    )  # fmt: skip


def value(judged: Observed, metric: str) -> float:
    return (metrics.ranked if metric == "auroc" else metrics.judged)(judged)[metric].value


@pytest.mark.parametrize("metric", ALL)
def test_the_difference_is_own_minus_the_mean_of_the_others(metric: str) -> None:
    own, others = drawn(0, 0.9), [drawn(seed, 0.6) for seed in (1, 2, 3)]
    found = metrics.paired(own, others, metric)
    assert found.value == pytest.approx(value(own, metric) - np.mean([value(o, metric) for o in others]))
    assert -1 <= found.low < found.value < found.high <= 1
    assert found.low > 0 or metric == "auroc"
    counted = own.take(own.truth == (metric == "sensitivity")) if metric in ("sensitivity", "specificity") else own
    assert (found.method, found.n_documents) == ("cr2-t", len(np.unique(counted.document)))
    assert found.n == {"sensitivity": 40, "specificity": 40}.get(metric, 80)
    assert (found.floor, found.ceiling, found.flags) == (found.low, found.high, ("few_documents",))


def test_single_windows_are_a_paired_t_test_with_half_a_window_added_either_way() -> None:
    own, other = (replace(drawn(seed, right), document=np.arange(80)) for seed, right in ((0, 0.8), (1, 0.6)))
    difference = (own.prediction - other.prediction)[:40].astype(float)
    half = stats.t.ppf(0.975, 39) * math.sqrt(stats.sem(difference) ** 2 + 1 / 40**2)
    found = metrics.paired(own, [other], "sensitivity")
    assert (found.low, found.high) == pytest.approx((difference.mean() - half, difference.mean() + half))


def test_balanced_accuracy_by_documents() -> None:
    own, other = drawn(0, 0.8), drawn(1, 0.6)
    gained = (own.prediction == own.truth).astype(float) - (other.prediction == other.truth)
    shares = np.zeros(15)
    for document in range(15):
        for fires in (True, False):
            of_class = own.truth == fires
            of_it = of_class & (own.document == document)
            left = 1 - of_it.sum() / 40
            shares[document] += (gained[of_it] - gained[of_class].mean()).sum() / math.sqrt(left) / 80
    error = math.sqrt(float(shares @ shares) + 2 * (0.5 / 40) ** 2)
    found = metrics.paired(own, [other], "balanced_accuracy")
    quantile = (found.high - found.value) / error
    assert stats.t.ppf(0.975, 14) < quantile < stats.t.ppf(0.975, 8)  # Satterthwaite: unequal documents count as fewer


@pytest.mark.parametrize("metric", ["f1", "auroc"])
def test_errors_of_what_is_no_mean_are_those_of_a_jackknife(metric: str) -> None:
    own, other = drawn(0, 1.0, n=200, documents=80), drawn(1, 0.6, n=200, documents=80)
    left = []
    for document in range(80):
        kept = own.document != document
        left.append(value(own.take(kept), metric) - value(other.take(kept), metric))
    error = math.sqrt(79 / 80 * float(((np.array(left) - np.mean(left)) ** 2).sum()))
    found = metrics.paired(own, [other], metric)
    # The jackknife takes the numbers of firing and silent windows as random, too; they are the draw's.
    assert (found.high - found.low) / 2 / stats.t.ppf(0.975, 75) == pytest.approx(error, rel=0.1)


def test_equal_answers_are_no_proof_of_equality() -> None:
    own = drawn(0, 0.8)
    for metric in ALL:
        found = metrics.paired(own, [own], metric)
        assert found.value == 0.0
        assert 0.005 < found.high == -found.low < 0.1


def test_pairing_narrows_what_is_correlated() -> None:
    own = drawn(0, 0.8)
    flipped = own.prediction.copy()
    flipped[::10] = 1 - flipped[::10]
    near = metrics.paired(own, [replace(own, prediction=flipped)], "balanced_accuracy")
    far = metrics.paired(own, [drawn(5, 0.8)], "balanced_accuracy")
    assert near.high - near.low < 0.7 * (far.high - far.low)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(ALL))
def test_failures_leave_the_others_and_widen_the_bounds(seed: int, metric: str) -> None:
    own = drawn(seed, 0.9, failing=0.1)
    others = [drawn(seed + k, 0.6, failing=0.1) for k in (1, 2)]
    found = metrics.paired(own, others, metric)
    both = [(own.prediction >= 0) & (other.prediction >= 0) for other in others]
    each = [value(own.take(b), metric) - value(o.take(b), metric) for b, o in zip(both, others, strict=True)]
    assert found.value == pytest.approx(np.mean(each))
    assert found.floor <= found.low
    assert found.ceiling >= found.high
    assert found.floor < found.low or found.ceiling > found.high


def test_what_cannot_be_compared() -> None:
    own = drawn(0, 0.8)
    with pytest.raises(InputError, match="same windows"):
        metrics.paired(own, [own.take(slice(0, 10))], "f1")
    with pytest.raises(InputError, match="same windows"):
        metrics.paired(own, [replace(own, document=own.document[::-1])], "f1")
    with pytest.raises(NotFoundError, match="balanced_accuracy"):
        metrics.paired(own, [own], "recall")
    silent: Array = np.where(own.truth, -1, own.prediction).astype(np.int8)
    assert metrics.paired(own, [], "f1").n == 0
    gone = metrics.paired(own, [replace(own, prediction=silent)], "balanced_accuracy")
    assert math.isnan(gone.value)
    assert gone.floor < 0 < gone.ceiling
    assert metrics.paired(own, [replace(own, prediction=silent)], "specificity").value == 0.0
