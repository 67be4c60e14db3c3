"""Pearson's correlation against scipy, and the jackknife over documents against a slow one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from exegete import metrics
from exegete.errors import InputError
from exegete.metrics import Interval, Observed


def undefined(interval: Interval) -> bool:
    return interval.n == 0 and all(math.isnan(x) for x in (interval.value, interval.low, interval.high))


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


# -- clustered by document --------------------------------------------------------------------------------------------


def observed(score: list[float], activation: list[float], document: list[int]) -> Observed:
    n = len(score)
    return Observed(
        truth=np.array(activation) > 0, prediction=np.full(n, -1, np.int8), score=np.array(score, float),
        stratum=np.zeros(n, np.int8), document=np.array(document), probability=np.ones(n),
        multiplicity=np.ones(n, np.int64), activation=np.array(activation, float),
    )  # fmt: skip


def some(n: int, documents: int, seed: int = 0) -> Observed:
    rng = np.random.default_rng(seed)
    activation = np.maximum(rng.normal(size=n), 0)
    score = activation + rng.normal(size=n)
    return observed(score.tolist(), activation.tolist(), rng.integers(documents, size=n).tolist())


def test_correlation_is_a_jackknife_over_documents_on_fishers_scale() -> None:
    judged = some(60, 9)
    left = []
    for document in np.unique(judged.document):
        kept = judged.document != document
        left.append(math.atanh(stats.pearsonr(judged.score[kept], judged.activation[kept]).statistic))
    value = stats.pearsonr(judged.score, judged.activation).statistic
    error = math.sqrt(8 / 9 * float(((np.array(left) - np.mean(left)) ** 2).sum()))
    half = stats.t.ppf(0.975, 8) * error
    found = metrics.correlation(judged)
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(math.tanh(math.atanh(value) - half))
    assert found.high == pytest.approx(math.tanh(math.atanh(value) + half))
    assert (found.method, found.n, found.n_documents) == ("jackknife-fisher-z", 60, 9)
    assert found.flags == ("few_documents",)
    assert (found.floor, found.ceiling) == (found.low, found.high)


def test_correlation_of_one_document_or_of_two_points_is_not_known() -> None:
    one = metrics.correlation(observed([1, 2, 4, 3], [0, 1, 2, 3], [7, 7, 7, 7]))
    assert (one.low, one.high, one.n_documents) == (-1.0, 1.0, 1)
    line = metrics.correlation(observed([1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3]))
    assert line.value == pytest.approx(1.0)
    assert line.low == -1.0
    assert undefined(metrics.correlation(observed([1, 1, 1], [0, 1, 2], [0, 1, 2])))
    assert undefined(metrics.correlation(observed([math.nan] * 3, [0, 1, 2], [0, 1, 2])))


def test_missing_scores_widen_a_correlation_and_leave_its_value() -> None:
    judged = some(60, 30)
    score = judged.score.copy()
    score[::6] = math.nan
    found = metrics.correlation(replace(judged, score=score))
    known = metrics.correlation(judged.take(~np.isnan(score)))
    assert (found.value, found.low, found.high, found.n) == (known.value, known.low, known.high, 50)
    strong = judged.activation > judged.activation[~np.isnan(score)].mean()
    lowest, highest = np.nanmin(score), np.nanmax(score)
    against = np.where(np.isnan(score), np.where(strong, lowest, highest), score)
    assert found.floor == metrics.correlation(replace(judged, score=against)).low < found.low
    assert found.ceiling > found.high


def test_correlations_interval_covers_heavy_tails_and_dependent_documents() -> None:
    """Activations that are mostly 0, and scores with a document's own shift: what Fisher's own interval misses."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        document = np.repeat(np.arange(30), 6)
        activation = np.where(rng.random(180) < 0.4, rng.exponential(size=180), 0.0)
        score = activation + (rng.normal(size=30)[document] + rng.normal(size=180)) * (0.2 + activation)
        found = metrics.correlation(observed(score.tolist(), activation.tolist(), document.tolist()))
        held += found.low <= 0.4939 <= found.high
    assert held / 400 >= 0.9
