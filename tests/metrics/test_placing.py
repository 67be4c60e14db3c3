"""AUROC clustered by document: against scikit-learn, slow counting, and the variance that simulation shows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from exegete import metrics
from exegete.metrics import FrameCounts, Observed
from exegete.metrics.clustered import Documents
from exegete.metrics.placing import components
from exegete.types import STRATA, Array


def observed(truth: Array, score: Array, document: Array) -> Observed:
    n = len(truth)
    return Observed(
        truth=truth, prediction=np.full(n, -1, np.int8), score=score, stratum=np.zeros(n, np.int8),
        document=document, probability=np.ones(n), multiplicity=np.ones(n, np.int64), activation=np.zeros(n),
    )  # fmt: skip


def drawn(rng: np.random.Generator, n: int, documents: int, shift: float, *, within: float = 0.3) -> Observed:
    """Return n windows of each class whose scores share a document's own shift."""
    truth, document = np.repeat([True, False], n), rng.integers(documents, size=2 * n)
    own = rng.normal(size=documents)[document]
    score = shift * truth + math.sqrt(within) * own + math.sqrt(1.0 - within) * rng.normal(size=2 * n)
    return observed(truth, score, document)


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_value_is_sklearns_and_the_bounds_hold_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    judged = drawn(rng, 12, int(rng.integers(2, 30)), 1.0)
    judged = replace(judged, score=np.round(judged.score, int(rng.integers(3))))
    found = metrics.ranked(judged)["auroc"]
    assert found.value == pytest.approx(roc_auc_score(judged.truth, judged.score))
    assert 0 <= found.floor == found.low <= found.value <= found.high == found.ceiling <= 1
    assert (found.n, found.n_documents) == (24, len(np.unique(judged.document)))


def test_interval_is_obuchowskis_with_cr2_on_the_logit_scale() -> None:
    judged = drawn(np.random.default_rng(1), 15, 6, 1.0)
    above = [[(a > b) + (a == b) / 2 for b in judged.score[15:]] for a in judged.score[:15]]
    over, under = np.mean(above, axis=1), np.mean(above, axis=0)
    value = float(np.mean(above))
    variance = 0.0
    for document in range(6):
        parts = []
        for placed, held in ((over, judged.document[:15]), (under, judged.document[15:])):
            of_it = held == document
            parts.append((placed[of_it] - value).sum() / math.sqrt(1 - of_it.mean()) / 15)
        variance += sum(parts) ** 2
    freedom = Documents.of(judged.truth, judged.document).freedom(np.ones(2))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    found = metrics.ranked(judged)["auroc"]
    assert found.method == "cr2-logit-delong"
    assert found.low == pytest.approx(1 / (1 + math.exp(half - centre)))
    assert found.high == pytest.approx(1 / (1 + math.exp(-half - centre)))
    assert found.flags == ("few_documents",)


@pytest.mark.parametrize(("firing", "silent"), [(19, 60), (60, 19), (20, 60)])
@pytest.mark.parametrize("each", [1, 2])
def test_few_documents_of_either_class_are_flagged(firing: int, silent: int, each: int) -> None:
    """All metrics of both classes, and those of one where it is that one; with documents that repeat and without."""
    counts = np.array([firing, silent])
    truth = np.repeat([True, False], counts * each)
    rng = np.random.default_rng(3)
    judged = Observed(
        truth=truth, prediction=np.where(rng.random(len(truth)) < 0.8, truth, ~truth).astype(np.int8),
        score=rng.random(len(truth)) * 0.5 + 0.4 * truth, stratum=np.where(truth, 0, STRATA.index("silent")),
        document=np.repeat(np.arange(counts.sum()), each), probability=np.full(len(truth), 0.5),
        multiplicity=np.ones(len(truth), np.int64), activation=truth * (1.0 + rng.random(len(truth))),
    )  # fmt: skip
    frame = FrameCounts(windows=1000, firing=200, silent={"silent": 800})
    found = {**metrics.judged(judged), **metrics.ranked(judged), **metrics.calibration(judged)}
    found |= {**metrics.population(judged, frame), "pearson": metrics.correlation(judged)}
    found |= {"responsiveness": metrics.responsiveness(judged, frame), "purity": metrics.purity(judged, frame)}
    for name in ("balanced_accuracy", "sensitivity", "specificity", "f1", "auroc"):
        found[f"{name}_lift"] = metrics.paired(judged, [judged], name)
    for name, interval in found.items():
        counted = (firing, silent)
        if "sensitivity" in name or "recall" in name:
            counted = (firing, firing)
        elif "specificity" in name:
            counted = (silent, silent)
        assert ("few_documents" in interval.flags) == (min(counted) < 20), name
        one_class = name.removesuffix("_lift") in ("sensitivity", "specificity")
        assert interval.n_documents == (counted[0] if one_class else firing + silent), name


def test_without_repeating_documents_it_is_delongs() -> None:
    judged = replace(drawn(np.random.default_rng(2), 30, 5, 1.0), document=np.arange(60))
    found, plain = metrics.ranked(judged)["auroc"], metrics.auroc(judged.truth, judged.score)
    assert found == replace(plain, n_documents=60)


@pytest.mark.parametrize(("n", "documents", "shift", "within"), [(40, 2000, 1.2, 0.0), (60, 30, 1.0, 0.2)])
def test_the_variance_is_what_simulation_shows(n: int, documents: int, shift: float, within: float) -> None:
    rng = np.random.default_rng(7)
    values, variances = [], []
    for _ in range(1500):
        judged = drawn(rng, n, documents, shift, within=within)
        placed = components(judged.truth, judged.score)
        values.append(placed[:n].mean())
        shares = Documents.of(judged.truth, judged.document).shares(placed).sum(axis=1)
        variances.append(float(shares @ shares))
    # The variance of 1,500 values is known to 3.7 %.
    assert np.mean(variances) == pytest.approx(np.var(values, ddof=1), rel=0.12)


def test_perfect_and_constant_scores_still_have_a_width() -> None:
    judged = drawn(np.random.default_rng(3), 20, 10, 1.0)
    for score, value in ((judged.truth * 1.0, 1.0), (np.zeros(40), 0.5), (1.0 - judged.truth, 0.0)):
        found = metrics.ranked(replace(judged, score=score))["auroc"]
        assert found.value == value
        assert found.high - found.low > 0.1
        assert found.method == "wilson-smaller-class"


def test_missing_scores_are_last_or_first_at_worst() -> None:
    judged = drawn(np.random.default_rng(4), 30, 25, 1.0)
    missing = np.zeros(60, bool)
    missing[[0, 5, 33, 40]] = True
    found = metrics.ranked(replace(judged, score=np.where(missing, np.nan, judged.score)))["auroc"]
    known = metrics.ranked(judged.take(~missing))["auroc"]
    assert (found.value, found.low, found.high, found.n) == (known.value, known.low, known.high, 56)
    ends = {
        right: metrics.ranked(
            replace(judged, score=np.where(missing, np.where(judged.truth == right, 99.0, -99.0), judged.score))
        )["auroc"]
        for right in (False, True)
    }
    assert found.floor == ends[False].low < found.low
    assert found.ceiling == ends[True].high > found.high


def test_one_class_has_no_ranking_and_one_document_no_interval() -> None:
    judged = drawn(np.random.default_rng(5), 10, 4, 1.0)
    assert metrics.ranked(judged.take(judged.truth))["auroc"].n == 0
    for document in (np.zeros(20, np.int64), np.repeat([0, 1, 2, 3], [10, 4, 3, 3])):  # firing windows of one only
        one = metrics.ranked(replace(judged, document=document))["auroc"]
        assert (one.low, one.high) == (0.0, 1.0)
