from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from exegete.errors import InputError, NotFoundError
from exegete.steering.estimate import direction_of, discriminant, logistic, mean_difference, principal


def drawn(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn((d, d), generator=draw)
    own = [torch.randn((n, d), generator=draw) @ mix for _ in range(2)]
    return own[0] + torch.linspace(-1, 1, d), own[1]


@pytest.mark.parametrize(("n", "d"), [(60, 8), (12, 40)])
@pytest.mark.parametrize("shrinkage", ["auto", 0.3, 1.0])
def test_the_discriminant_is_scikit_learns(n: int, d: int, shrinkage: Any) -> None:
    positive, negative = drawn(n, d)
    x, y = torch.cat([negative, positive]).numpy(), np.repeat([0, 1], n)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.astype(np.float64), y).coef_[0]
    np.testing.assert_allclose(discriminant(positive, negative, shrinkage).numpy(), theirs, rtol=1e-6, atol=1e-9)


def test_without_shrinkage_it_is_the_pseudo_inverse() -> None:
    positive, negative = drawn(60, 8)
    x, y = torch.cat([negative, positive]).double().numpy(), np.repeat([0, 1], 60)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).coef_[0]
    np.testing.assert_allclose(discriminant(positive, negative, 0.0).numpy(), theirs, rtol=1e-6)
    few, others = drawn(5, 40)
    within = sum(torch.cov(rows.double().T, correction=0) for rows in (few, others)) / 2
    expected = torch.linalg.pinv(torch.as_tensor(within), rtol=1e-10) @ mean_difference(few, others)
    torch.testing.assert_close(discriminant(few, others, 0.0), expected, rtol=1e-6, atol=1e-9)


def test_a_column_that_does_not_vary_is_no_division_by_zero() -> None:
    positive, negative = drawn(20, 6)
    for rows in (positive, negative):
        rows[:, 2] = 1.0
    x, y = torch.cat([negative, positive]).double().numpy(), np.repeat([0, 1], 20)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y).coef_[0]
    np.testing.assert_allclose(discriminant(positive, negative).numpy(), theirs, rtol=1e-6, atol=1e-9)


def test_the_mean_difference_is_just_that() -> None:
    positive, negative = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert mean_difference(positive, negative).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("d", [6, 50])
def test_principal_components_of_differences_are_scikit_learns(d: int) -> None:
    positive, negative = drawn(20, d)
    differences = (positive - negative).double().numpy()
    halves = np.concatenate([differences / 2, -differences / 2])
    for centred, rows in ((True, differences), (False, halves)):
        theirs = PCA(n_components=1).fit(rows).components_[0]
        ours = principal(positive, negative, centred=centred)
        assert abs(float(ours @ torch.from_numpy(theirs))) == pytest.approx(1.0, abs=1e-9)
        assert int(((positive - negative).double() @ ours > 0).sum()) >= 10


def test_what_cannot_be_estimated_is_refused() -> None:
    positive, negative = drawn(4, 3)
    with pytest.raises(InputError, match="auto or a number from 0 to 1"):
        discriminant(positive, negative, 1.5)
    with pytest.raises(InputError, match="two pairs"):
        discriminant(positive[:1], negative[:1])
    with pytest.raises(InputError, match="do not vary"):
        principal(negative + 1, negative, centred=True)
    assert principal(negative + 1, negative, centred=False).tolist() == pytest.approx([3**-0.5] * 3)
    with pytest.raises(NotFoundError, match="unknown method 'median'"):
        direction_of(positive, negative, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "d"), [(60, 8), (12, 40)])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_logistic_regression_is_scikit_learns(n: int, d: int, penalty: float) -> None:
    positive, negative = drawn(n, d)
    x, y = torch.cat([negative, positive]).double().numpy() + 3, np.repeat([0, 1], n)
    theirs = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y).coef_[0]
    np.testing.assert_allclose(logistic(positive + 3, negative + 3, penalty).numpy(), theirs, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        direction_of(positive, negative, "logistic", penalty=penalty), theirs, rtol=1e-5, atol=1e-7
    )


def test_a_logistic_regression_needs_a_penalty_and_rows_that_differ() -> None:
    positive, negative = drawn(4, 3)
    for penalty in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="a number above 0"):
            logistic(positive, negative, penalty)
    with pytest.raises(InputError, match="read alike"):
        logistic(torch.full((4, 3), 0.1), torch.full((4, 3), 0.1))
    one = logistic(positive[:1], negative[:1])  # of one pair it is the difference, to a length
    difference = mean_difference(positive[:1], negative[:1])
    assert float(one @ difference / one.norm() / difference.norm()) == pytest.approx(1, abs=1e-9)
