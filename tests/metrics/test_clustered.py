"""CR2 and its degrees of freedom against the matrices they are defined by, and against statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exegete.metrics.clustered import FIRING, SILENT, Documents, t_of
from exegete.types import Array


def slow(group: Array, document: Array, values: Array, contrast: Array) -> tuple[float, float]:
    """Return Bell and McCaffrey's variance and degrees of freedom of contrast · group means, by whole matrices."""
    design = (group[:, None] == np.unique(group)).astype(float)
    bread = np.linalg.inv(design.T @ design)
    hat = design @ bread @ design.T
    left = np.eye(len(values)) - hat
    residuals = left @ values
    columns = []
    for one in np.unique(document):
        of_it = np.flatnonzero(document == one)
        roots, vectors = np.linalg.eigh(left[np.ix_(of_it, of_it)])
        inverse = np.where(roots > 1e-9, 1.0 / np.sqrt(np.maximum(roots, 1e-12)), 0.0)
        adjusted = vectors @ np.diag(inverse) @ vectors.T
        columns.append(left[:, of_it] @ adjusted @ design[of_it] @ bread @ contrast)
    each = np.stack(columns)
    variance = float(((each @ residuals) ** 2).sum())
    gram = each @ each.T
    square = float((gram**2).sum())
    return variance, float(np.trace(gram)) ** 2 / square if square > 1e-20 else 0.0


CASES = st.integers(0, 10_000)


@settings(max_examples=40)
@given(CASES)
def test_two_class_means_have_cr2s_variance_and_satterthwaites_freedom(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 40))
    truth = rng.random(n) < 0.5
    truth[:2], truth[2:4] = True, False
    document, values = rng.integers(int(rng.integers(2, 12)), size=n), rng.normal(size=n)
    weights = rng.random(2)
    documents = Documents.of(truth, document)
    variance, freedom = slow(truth.astype(int), document, values, weights)
    shares = documents.shares(values) @ weights
    assert shares @ shares == pytest.approx(variance, abs=1e-12)
    assert documents.freedom(weights) == pytest.approx(freedom, rel=1e-6, abs=1e-6)
    assert documents.means(values) == pytest.approx([values[~truth].mean(), values[truth].mean()])


def test_strata_with_shares_fixed_by_the_draw_are_one_indicator_each() -> None:
    rng = np.random.default_rng(4)
    stratum = np.repeat([0, 1, 2, 28, 27], [12, 9, 15, 10, 20])
    truth = stratum < 20
    document, values = rng.integers(11, size=66), rng.normal(size=66) + stratum
    groups = np.repeat([3, 4, 5, 1, 0], [12, 9, 15, 10, 20])
    contrast = np.array([0.5 * 20 / 30, 0.5 * 10 / 30, 12 / 36, 9 / 36, 15 / 36])
    variance, freedom = slow(groups, document, values, contrast)
    documents = Documents.of(truth, document, stratum)
    weights = np.array([0.5, 1.0])
    shares = documents.shares(values) @ weights
    assert shares @ shares == pytest.approx(variance)
    assert documents.freedom(weights) == pytest.approx(freedom)
    plain = Documents.of(truth, document).shares(values) @ weights
    assert shares @ shares < plain @ plain  # what strata differ by is no error


@pytest.mark.parametrize(
    ("sizes", "merged"),
    [
        ([10, 10, 3, 4], [10, 10, 7]),  # 7 together are few still: they join the largest, below
        ([3, 3, 3], [9]),
        ([8, 9], [8, 9]),
        ([20, 1], [21]),
        ([2], [2]),
        ([9, 5, 5], [9, 10]),
    ],
)
def test_small_strata_are_taken_together(sizes: list[int], merged: list[int]) -> None:
    stratum = np.repeat(np.arange(len(sizes)), sizes)
    n = len(stratum)
    expected = [10, 17] if merged == [10, 10, 7] else merged
    for truth in (np.ones(n, bool), np.zeros(n, bool)):
        documents = Documents.of(truth, np.arange(n), stratum)
        assert sorted(documents.sizes.sum(axis=0).tolist()) == sorted(expected)


def test_a_stratum_of_one_document_is_no_stratum() -> None:
    for sizes, documents, merged in (
        ([10, 12], [0] * 10 + list(range(12)), [22]),
        ([9, 6, 12], [0] * 9 + list(range(18)), [12, 15]),
        ([9, 9, 12], [0] * 9 + [1] * 9 + list(range(12)), [12, 18]),
    ):
        stratum = np.repeat(np.arange(len(sizes)), sizes)
        within = Documents.of(np.ones(len(stratum), bool), np.array(documents), stratum)
        assert sorted(within.sizes.sum(axis=0).tolist()) == merged


def test_documents_of_one_window_each_are_hc2() -> None:
    regression = pytest.importorskip("statsmodels.regression.linear_model")
    rng = np.random.default_rng(1)
    truth, values = np.repeat([True, False], [7, 12]), rng.normal(size=19)
    design = np.stack([~truth, truth], axis=1).astype(float)
    fitted = regression.OLS(values, design).fit(cov_type="HC2")
    shares = Documents.of(truth, np.arange(19)).shares(values)
    assert np.sqrt((shares**2).sum(axis=0)) == pytest.approx(fitted.bse)


def test_one_class_of_single_windows_is_students() -> None:
    values = np.array([0.3, 1.2, 0.7, 0.9, 2.0])
    documents = Documents.of(np.ones(5, bool), np.array([4, 1, 9, 2, 7]))
    only = np.array([0.0, 1.0])
    assert documents.freedom(only) == pytest.approx(4.0)
    assert np.sqrt((documents.shares(values)[:, FIRING] ** 2).sum()) == pytest.approx(stats.sem(values))
    assert not documents.repeat
    assert np.isnan(documents.means(values)[SILENT])
    assert documents.totals.tolist() == documents.held.tolist() == [0, 5]


def test_equal_documents_have_one_less_degree_of_freedom() -> None:
    documents = Documents.of(np.ones(12, bool), np.repeat(np.arange(4), 3))
    assert documents.freedom(np.array([0.0, 1.0])) == pytest.approx(3.0)
    assert documents.repeat


def test_one_document_says_nothing_of_its_error() -> None:
    documents = Documents.of(np.array([True, True, False]), np.array([5, 5, 5]))
    assert documents.freedom(np.ones(2)) == 0.0
    assert t_of(0.95, 0.0) == np.inf
    assert t_of(0.95, 7) == pytest.approx(stats.t.ppf(0.975, 7))
