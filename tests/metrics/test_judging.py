"""What judgements of one latent are worth: values against scikit-learn, bounds against their definitions by search."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn import metrics as oracle

from exegete import metrics
from exegete.metrics import Observed
from exegete.metrics.judging import JUDGED
from exegete.types import Array

Z = 1.959963984540054


def observed(truth: Array, prediction: Array, document: Array | None = None, stratum: Array | None = None) -> Observed:
    n = len(truth)
    return Observed(
        truth=np.asarray(truth, bool), prediction=np.asarray(prediction, np.int8), score=np.full(n, np.nan),
        stratum=np.zeros(n, np.int8) if stratum is None else stratum.astype(np.int8),
        document=np.arange(n) if document is None else document, probability=np.ones(n),
        multiplicity=np.ones(n, np.int64), activation=np.zeros(n),
    )  # fmt: skip


def drawn(seed: int, n: int = 60, documents: int = 12, failing: float = 0.0) -> Observed:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    prediction = np.where(rng.random(n) < 0.8, truth, ~truth).astype(np.int8)
    prediction[rng.random(n) < failing] = -1
    return observed(truth, prediction, rng.integers(documents, size=n))


def confusion(tp: int, fn: int, fp: int, tn: int) -> Observed:
    return observed(np.repeat([True, False], [tp + fn, fp + tn]), np.repeat([1, 0, 1, 0], [tp, fn, fp, tn]))


def score_interval(k: int, n: int, effective: float) -> tuple[float, float]:
    """Return all shares p for which k of n is no further off than z standard errors of ``effective`` cases."""
    p = k / n

    def off(q: float) -> float:
        return abs(p - q) - Z * math.sqrt(q * (1 - q) / effective)

    low = optimize.brentq(off, 1e-12, p) if p > 1e-9 else 0.0
    high = optimize.brentq(off, p, 1 - 1e-12) if p < 1 - 1e-9 else 1.0
    return low, high


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([4, 12, 400]))
def test_values_are_sklearns_over_what_was_answered(seed: int, documents: int) -> None:
    judged = drawn(seed, documents=documents, failing=0.1)
    known = judged.prediction >= 0
    truth, said = judged.truth[known], judged.prediction[known] == 1
    if truth.all() or not truth.any():
        return
    found = metrics.judged(judged)
    assert tuple(found) == JUDGED
    assert found["balanced_accuracy"].value == pytest.approx(oracle.balanced_accuracy_score(truth, said))
    assert found["sensitivity"].value == pytest.approx(oracle.recall_score(truth, said))
    assert found["specificity"].value == pytest.approx(oracle.recall_score(truth, said, pos_label=False))
    assert found["f1"].value == pytest.approx(oracle.f1_score(truth, said))
    assert (found["sensitivity"].n, found["specificity"].n) == (truth.sum(), (~truth).sum())
    assert found["balanced_accuracy"].n == found["f1"].n == len(truth)
    for interval in found.values():
        assert 0 <= interval.floor <= interval.low <= interval.value <= interval.high <= interval.ceiling <= 1


def test_rates_without_repeating_documents_have_wilsons_interval() -> None:
    found = metrics.judged(confusion(tp=8, fn=2, fp=3, tn=17))
    for metric, k, n in (("sensitivity", 8, 10), ("specificity", 17, 20)):
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert (found[metric].low, found[metric].high) == pytest.approx((theirs.low, theirs.high))
        assert (found[metric].method, found[metric].n_documents) == ("wilson", n)
    assert found["sensitivity"].flags == found["balanced_accuracy"].flags == found["f1"].flags == ("few_documents",)
    assert found["specificity"].flags == ()
    assert found["balanced_accuracy"].n_documents == 30  # the 10 of its firing windows are too few
    assert metrics.judged(confusion(tp=18, fn=2, fp=3, tn=17))["balanced_accuracy"].flags == ()


def test_balanced_accuracy_and_f1_by_hand() -> None:
    # Single windows: CR2's variance is p(1 − p) / (n − 1), with n − 1 degrees of freedom.
    found = metrics.judged(confusion(tp=8, fn=2, fp=3, tn=17))
    (a, b), (c, d) = (
        score_interval(k, n, (n - 1) * (Z / stats.t.ppf(0.975, n - 1)) ** 2) for k, n in ((8, 10), (17, 20))
    )
    both = found["balanced_accuracy"]
    assert both.low == pytest.approx(0.825 - math.hypot(0.8 - a, 0.85 - c) / 2)
    assert both.high == pytest.approx(0.825 + math.hypot(b - 0.8, d - 0.85) / 2)
    assert both.method == found["f1"].method == "mover-cr2-wilson"

    def lower(q: float) -> float:  # MOVER's lower bound of 2s − q(1 + s + 2f), whose sign says whether F1 ≥ q
        return (2 - q) * 0.8 - q - 2 * q * 0.15 - math.hypot((2 - q) * (0.8 - a), 2 * q * (0.85 - c))

    def upper(q: float) -> float:
        return (2 - q) * 0.8 - q - 2 * q * 0.15 + math.hypot((2 - q) * (b - 0.8), 2 * q * (d - 0.85))

    assert found["f1"].value == pytest.approx(16 / 21)
    assert found["f1"].low == pytest.approx(optimize.brentq(lower, 0.01, 16 / 21))
    assert found["f1"].high == pytest.approx(optimize.brentq(upper, 16 / 21, 0.999))


def test_clustered_rate_by_hand() -> None:
    # Four documents of three firing windows: right 3, 3, 0, 2; CR2 of equal documents is the variance of their means.
    judged = observed(np.ones(12, bool), np.array([1] * 6 + [0] * 3 + [1, 1, 0]), np.repeat(np.arange(4), 3))
    found = metrics.judged(judged)["sensitivity"]
    variance = np.var([1, 1, 0, 2 / 3], ddof=1) / 4
    share = 2 / 3
    effective = share * (1 - share) / variance * (Z / stats.t.ppf(0.975, 3)) ** 2
    assert effective < 12
    low, high = score_interval(8, 12, effective)
    assert (found.value, found.low, found.high) == pytest.approx((share, low, high))
    assert (found.method, found.n, found.n_documents) == ("cr2-wilson", 12, 4)


def test_documents_that_agree_by_luck_make_no_interval_narrower_than_wilsons() -> None:
    judged = observed(np.ones(40, bool), np.tile([1, 0], 20), np.repeat(np.arange(20), 2))
    found, plain = metrics.judged(judged)["sensitivity"], metrics.wilson(20, 40)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_rates_that_fall_together_widen_balanced_accuracy_and_opposite_ones_narrow_it() -> None:
    rng = np.random.default_rng(2)
    document = np.tile(np.repeat(np.arange(20), 5), 2)
    truth = np.repeat([True, False], 100)
    good = rng.random(20) < 0.7
    able = np.where(good[document], truth, ~truth)  # right on some documents
    says = np.where(good[document], True, False)  # yes to some documents
    widths = [
        interval.high - interval.low
        for said in (able, says)
        for interval in [metrics.judged(observed(truth, said.astype(np.int8), document))["balanced_accuracy"]]
    ]
    assert widths[1] < 0.5 * widths[0]


def test_what_failed_widens_to_everything_it_might_have_said() -> None:
    judged = drawn(3, n=80, documents=40, failing=0.15)
    failed = judged.prediction < 0
    assert failed.any()
    worst = metrics.judged(replace(judged, prediction=np.where(failed, ~judged.truth, judged.prediction)))
    best = metrics.judged(replace(judged, prediction=np.where(failed, judged.truth, judged.prediction)))
    known = metrics.judged(judged.take(~failed))
    for metric, found in metrics.judged(judged).items():
        assert (found.value, found.low, found.high) == (
            known[metric].value,
            known[metric].low,
            known[metric].high,
        )
        assert found.floor == min(worst[metric].low, found.low) < found.low
        assert found.ceiling == max(best[metric].high, found.high)
    whole = metrics.judged(judged.take(~failed))["f1"]
    assert (whole.floor, whole.ceiling) == (whole.low, whole.high)


def test_a_class_without_answers_leaves_what_needs_it_undefined_but_bounded() -> None:
    judged = confusion(tp=5, fn=1, fp=2, tn=6)
    prediction = np.where(judged.truth, judged.prediction, -1).astype(np.int8)
    found = metrics.judged(replace(judged, prediction=prediction))
    assert found["sensitivity"].value == pytest.approx(5 / 6)
    for metric in ("balanced_accuracy", "specificity", "f1"):
        assert found[metric].n == 0
        assert math.isnan(found[metric].value)
    assert found["specificity"].floor == 0.0
    assert found["specificity"].ceiling == 1.0
    assert all(math.isnan(i.value) for i in metrics.judged(judged.take(slice(0, 0))).values())


def test_of_a_single_document_nothing_is_known() -> None:
    judged = replace(confusion(8, 2, 3, 17), document=np.zeros(30, np.int64))
    for interval in metrics.judged(judged).values():
        assert (interval.low, interval.high, interval.n_documents) == (0.0, 1.0, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 1), st.integers(0, 4), st.integers(0, 2)), max_size=40))
def test_bounds_hold_whatever_is_judged(cases: list[tuple[bool, int, int, int]]) -> None:
    truth, prediction, document, stratum = np.array(cases, int).reshape(-1, 4).T
    judged = observed(truth == 1, prediction, document, stratum)
    judged = replace(judged, score=np.where(prediction < 0, np.nan, prediction * 0.3 + stratum))
    for interval in {**metrics.judged(judged), **metrics.ranked(judged)}.values():
        if interval.n:
            assert 0 <= interval.floor <= interval.low <= interval.value <= interval.high <= interval.ceiling <= 1
        else:
            assert math.isnan(interval.value)
            assert math.isnan(interval.low)
    flipped = replace(judged, prediction=np.where(prediction < 0, -1, 1 - prediction).astype(np.int8))
    for metric in JUDGED:
        found = metrics.paired(judged, [flipped], metric)
        assert not found.n or -1 <= found.floor <= found.low <= found.value <= found.high <= found.ceiling <= 1


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_neither_order_nor_names_of_documents_matter(seed: int) -> None:
    judged = drawn(seed)
    order = np.random.default_rng(seed).permutation(len(judged))
    shuffled = Observed(**{f.name: getattr(judged, f.name)[order] for f in fields(judged)})
    renamed = replace(shuffled, document=1000 - 3 * shuffled.document)
    for metric, interval in metrics.judged(judged).items():
        other = metrics.judged(renamed)[metric]
        assert (other.low, other.high) == pytest.approx((interval.low, interval.high), nan_ok=True)


def test_more_level_is_wider() -> None:
    judged = drawn(5)
    for metric, interval in metrics.judged(judged, level=0.99).items():
        narrower = metrics.judged(judged)[metric]
        assert interval.low < narrower.low < narrower.high < interval.high
