"""Probes against scikit-learn, hand-worked cases and planted truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from exegete.elk.leace import fit_eraser, pair_eraser
from exegete.elk.named_probes import KINDS, Making, make_probe
from exegete.elk.probes import Discriminant, Logistic, MeanDifference, RandomDirections, column_aurocs, ledoit_wolf
from exegete.elk.probes_pair import (
    ContrastConsistent,
    ContrastPrincipal,
    PairProbe,
    VarianceInvariance,
    _ccs,
    platt,
)
from exegete.elk.whitening import fit_whitening
from exegete.errors import InputError, NotFoundError
from exegete.types import Array


@pytest.fixture(scope="module")
def data() -> tuple[Array, Array]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 7)) @ draw.standard_normal((7, 7))
    return x, x[:, 0] + draw.standard_normal(200) > 0.3


def pairs(n: int = 300, d: int = 10, *, seed: int = 0) -> tuple[Array, Array]:
    """The truth lies along one direction in opposite ways for the two answers; which answer it is along another."""
    draw = np.random.default_rng(seed)
    truth = draw.random(n) < 0.4
    u, v = np.eye(d)[0], draw.standard_normal(d)
    x = draw.standard_normal((n, 2, d))
    sign = np.where(truth, 1.0, -1.0)[:, None]
    x[:, 0] += -2.5 * sign * u - 3 * v
    x[:, 1] += 2.5 * sign * u + 3 * v
    return x, truth


def test_logistic_regression_is_scikit_learns(data: tuple[Array, Array]) -> None:
    x, y = data
    probe = Logistic()
    probe.fit(x, y)
    other = LogisticRegression(C=1 / (2 * 1e-3 * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(probe.weight, other.coef_[0], atol=1e-5)
    np.testing.assert_allclose(probe.log_odds(x), other.decision_function(x), atol=1e-4)
    assert np.linalg.norm(probe.direction) == pytest.approx(1)


def test_discriminants_are_scikit_learns(data: tuple[Array, Array]) -> None:
    x, y = data
    plain, shrunk = Discriminant(), Discriminant(shrinkage=0.3)
    for probe, shrinkage in ((plain, None), (shrunk, 0.3)):
        probe.fit(x, y)
        other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
        if shrinkage is None:
            np.testing.assert_allclose(probe.log_odds(x), other.decision_function(x), rtol=1e-8)
    means = np.stack([x[~y].mean(axis=0), x[y].mean(axis=0)])
    centred = x - means[y.astype(int)]
    covariance = centred.T @ centred / len(x)
    covariance = 0.7 * covariance + 0.3 * np.trace(covariance) / 7 * np.eye(7)
    np.testing.assert_allclose(shrunk.weight, np.linalg.solve(covariance, means[1] - means[0]), rtol=1e-8)
    assert ledoit_wolf(centred) == pytest.approx(ledoit_wolf_shrinkage(centred, assume_centered=True))


def test_the_mean_difference_is_of_unit_length() -> None:
    x = np.array([[0.0, 0.0], [0.0, 2.0], [3.0, 1.0], [3.0, 9.0]])
    probe = MeanDifference()
    probe.fit(x, np.array([False, False, True, True]))
    np.testing.assert_allclose(probe.weight, np.array([3.0, 4.0]) / 5)
    assert probe.bias == 0


def test_a_probe_on_pairs_reads_both_answers_side_by_side(data: tuple[Array, Array]) -> None:
    x, y = data
    one, two = Logistic(on_pair=True), Logistic()
    one.fit(x[:, :6].reshape(-1, 2, 3), y)
    two.fit(x[:, :6], y)
    np.testing.assert_allclose(one.weight, two.weight, atol=1e-9)
    with pytest.raises(InputError, match=r"\[n, 2, d\]"):
        one.fit(x, y)
    with pytest.raises(InputError, match="no single direction"):
        _ = one.direction


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("vinc", "ccs", "crc")])
def test_labels_of_one_kind_are_refused(name: str, data: tuple[Array, Array]) -> None:
    x = data[0][:40].reshape(20, 2, 7) if "pair" in KINDS[name].features else data[0]
    probe = make_probe(name)
    y = np.ones(len(x), bool)
    if name == "random" or name.startswith("ccs"):
        probe.fit(x, y)
        with pytest.raises(InputError, match="both labels"):
            probe.resolve_sign(x, y)
    else:
        with pytest.raises(InputError, match="both labels"):
            probe.fit(x, y)


@pytest.mark.parametrize("wide", [5, 40])
def test_whitening_is_scikit_learns_whichever_way_round(wide: int) -> None:
    x = np.random.default_rng(1).standard_normal((20, wide)) * np.arange(1, wide + 1)
    made = fit_whitening(x, 4)
    other = PCA(n_components=4, whiten=True, svd_solver="full").fit_transform(x)
    np.testing.assert_allclose(np.abs(made(x)), np.abs(other) * np.sqrt(20 / 19), atol=1e-8)


def test_components_that_nothing_lies_along_are_left_out() -> None:
    x = np.outer(np.arange(6.0), np.ones(9))
    assert fit_whitening(x, 4)(x).shape == (6, 1)


def test_a_wide_probe_is_fitted_on_whitened_components_and_still_has_a_direction() -> None:
    draw = np.random.default_rng(2)
    y = draw.random(60) < 0.5
    x = draw.standard_normal((60, 100)) * 0.1
    x[:, 3] += np.where(y, 1.0, -1.0)
    probe = Logistic(rank=10)
    probe.fit(x, y)
    assert np.argmax(np.abs(probe.direction)) == 3
    small = Logistic()
    small.fit(fit_whitening(x, 10)(x), y)
    np.testing.assert_allclose(probe.log_odds(x), small.log_odds(fit_whitening(x, 10)(x)), rtol=1e-8)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_vectors_that_are_all_the_same_say_nothing_and_harm_nothing(name: str) -> None:
    """As the embedding of a last token that every statement ends with, in a wide model."""
    x, y = np.full((40, 30), 0.3), np.arange(40) % 4 == 0
    probe = make_probe(name, Making(rank=5))
    x = np.stack([x, x + 1], axis=1) if "pair" in KINDS[name].features else x
    probe.fit(x, y)
    probe.resolve_sign(x, y)
    np.testing.assert_allclose(np.ptp(probe.log_odds(x), axis=0), 0, atol=1e-9)


def test_the_eraser_is_that_of_concept_erasure() -> None:
    torch = pytest.importorskip("torch")
    concept_erasure: Any = pytest.importorskip("concept_erasure")
    draw = np.random.default_rng(3)
    x = draw.standard_normal((150, 6)) @ draw.standard_normal((6, 6))
    z = (x[:, 1] > 0.2).astype(float)
    fitter = concept_erasure.LeaceFitter(
        6, 1, dtype=torch.float64, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-12
    )
    fitter.update(torch.tensor(x), torch.tensor(z)[:, None])
    np.testing.assert_allclose(fit_eraser(x, z)(x), fitter.eraser(torch.tensor(x)).numpy(), atol=1e-10)


def test_erased_vectors_say_nothing_and_the_eraser_is_the_least_move() -> None:
    draw = np.random.default_rng(4)
    x = draw.standard_normal((200, 5)) * np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    z = (x[:, 0] + 0.2 * x[:, 1] > 0).astype(float)
    eraser = fit_eraser(x, z)
    clean = eraser(x)
    np.testing.assert_allclose((clean - clean.mean(axis=0)).T @ (z - z.mean()), 0, atol=1e-9)
    np.testing.assert_allclose(clean.mean(axis=0), x.mean(axis=0))
    np.testing.assert_allclose(eraser.projection @ eraser.projection, eraser.projection, atol=1e-9)
    # By hand in two dimensions with covariance I: z along the first axis alone, so that axis goes.
    square = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    np.testing.assert_allclose(fit_eraser(square, square[:, 0])(square), square * [0.0, 1.0], atol=1e-12)
    assert fit_eraser(square, np.ones(4))(square) == pytest.approx(square)


def unsupervised() -> list[PairProbe]:
    return [
        ContrastConsistent(restarts=3),
        ContrastConsistent(norm="mean", restarts=3),
        ContrastConsistent(norm="mean-scale", restarts=3),
        ContrastPrincipal(),
        VarianceInvariance(),
        ContrastPrincipal(rank=4),
    ]


@pytest.mark.parametrize("probe", unsupervised(), ids=lambda p: type(p).__name__)
def test_probes_without_labels_find_the_planted_truth_up_to_its_sign(probe: PairProbe) -> None:
    x, y = pairs()
    probe.fit(x[:200], np.zeros(200, bool))  # labels are never looked at
    raw = roc_auc_score(y[200:], probe.raw(x[200:]))
    assert max(raw, 1 - raw) > 0.97
    probe.resolve_sign(x[:200], y[:200])
    odds = probe.log_odds(x[200:])
    assert roc_auc_score(y[200:], odds) > 0.97
    assert ((odds > 0) == y[200:]).mean() > 0.93


def test_ccs_is_the_same_for_one_seed_and_keeps_the_least_loss() -> None:
    x, y = pairs(80)
    found = [ContrastConsistent(restarts=n, seed=5) for n in (1, 4, 4)]
    for probe in found:
        probe.fit(x, y)
    assert found[1].loss <= found[0].loss
    np.testing.assert_array_equal(found[1].raw(x), found[2].raw(x))
    with pytest.raises(NotFoundError, match="norm"):
        ContrastConsistent(norm="none")  # type: ignore[arg-type]


def test_the_loss_of_ccs_by_hand_and_its_gradient() -> None:
    negative, positive = np.array([[0.0], [1.0]]), np.array([[0.0], [-2.0]])
    theta = np.array([0.7, 0.1])
    p0, p1 = (1 / (1 + np.exp(-(v[:, 0] * 0.7 + 0.1))) for v in (negative, positive))
    value, gradient = _ccs(theta, negative, positive)
    assert value == pytest.approx(((p0 - (1 - p1)) ** 2 + np.minimum(p0, p1) ** 2).mean())
    for i, step in enumerate(np.eye(2) * 1e-6):
        slope = (_ccs(theta + step, negative, positive)[0] - _ccs(theta - step, negative, positive)[0]) / 2e-6
        assert gradient[i] == pytest.approx(slope, abs=1e-8)


def test_vinc_is_the_eigenvector_of_its_objective() -> None:
    draw = np.random.default_rng(6)
    x = draw.standard_normal((60, 2, 4))
    probe = VarianceInvariance(variance=0.3, covariance=0.8)
    probe.fit(x, np.zeros(60, bool))
    negative, positive = x[:, 0] - x[:, 0].mean(axis=0), x[:, 1] - x[:, 1].mean(axis=0)
    cross = negative.T @ positive / 60
    between = (np.cov(x[:, 0].T, bias=True) + np.cov(x[:, 1].T, bias=True)) / 2
    p = pair_eraser(x).projection
    objective = p @ (0.3 * between - 0.8 * (cross + cross.T) / 2) @ p.T
    values, vectors = np.linalg.eigh(objective)
    assert abs(float(vectors[:, -1] @ probe._axis)) == pytest.approx(1)
    assert values[-1] == pytest.approx(probe._axis @ objective @ probe._axis)


def test_vinc_avoids_what_changes_with_the_wording() -> None:
    draw = np.random.default_rng(7)
    groups = np.repeat(np.arange(60), 3)
    x = 0.1 * draw.standard_normal((180, 2, 4))
    truth = np.repeat(np.where(draw.random(60) < 0.5, 1.0, -1.0), 3)
    wording = draw.standard_normal(180) * 2
    for which, sign in ((0, -1.0), (1, 1.0)):
        x[:, which, 0] += sign * truth
        x[:, which, 1] += sign * wording  # varies against itself as the truth does, but with the wording
        x[:, which, 2] += 3 * sign  # which answer it is
    with_groups, without = VarianceInvariance(groups=groups), VarianceInvariance()
    for probe in (with_groups, without):
        probe.fit(x, truth > 0)
    assert abs(with_groups._axis[0]) > 0.9
    assert abs(without._axis[1]) > 0.9
    with pytest.raises(InputError, match="numbers of claims"):
        VarianceInvariance(groups=groups[:5]).fit(x, truth > 0)


def test_random_directions_get_their_signs_from_labels() -> None:
    draw = np.random.default_rng(8)
    y = draw.random(80) < 0.5
    x = draw.standard_normal((80, 5)) + 0.8 * y[:, None]
    probe = RandomDirections(count=50, seed=1)
    probe.fit(x, y)
    probe.resolve_sign(x, y)
    aurocs = column_aurocs(y, probe.log_odds(x))
    assert aurocs.shape == (50,)
    assert aurocs.min() >= 0.5
    assert aurocs[7] == pytest.approx(roc_auc_score(y, probe.log_odds(x)[:, 7]))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=30))
def test_columns_aurocs_with_ties_are_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    y, scores = np.array([a for a, _ in rows]), np.array([[float(b), -float(b)] for _, b in rows])
    found = column_aurocs(y, scores)
    if y.all() or not y.any():
        assert np.isnan(found).all()
    else:
        assert found[0] == pytest.approx(roc_auc_score(y, scores[:, 0]))
        assert found.sum() == pytest.approx(1)


def test_platts_scaling_is_logistic_regression_of_the_score() -> None:
    draw = np.random.default_rng(9)
    y = draw.random(300) < 0.3
    scores = 5 + 2 * draw.standard_normal(300) - 1.5 * y
    scale, bias = platt(scores, y)
    other = LogisticRegression(C=1e6, tol=1e-9).fit(scores[:, None], y)
    assert scale == pytest.approx(other.coef_[0, 0], rel=0.01)
    assert bias == pytest.approx(other.intercept_[0], rel=0.02)
    assert platt(np.ones(4), np.array([True, False, True, False])) == (1.0, 0.0)
    separated = platt(np.array([-1.0, -2.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert np.isfinite(separated).all()


def test_unknown_probes_are_named() -> None:
    with pytest.raises(NotFoundError, match="mean-diff"):
        make_probe("mean-dif")
    assert make_probe("lr", Making(rank=3)) is not make_probe("lr")


@pytest.mark.parametrize("name", ["ccs", "ccs-mean", "ccs-mean-scale", "crc", "vinc"])
def test_a_pair_probe_on_components_is_the_same_in_the_space_of_the_vectors(name: str) -> None:
    """Its score is that of the same probe fitted on the components themselves, whoever found them."""
    draw = np.random.default_rng(5)
    y = draw.random(80) < 0.5
    x = draw.standard_normal((80, 2, 30))
    x[:, 0, 0] -= np.where(y, 3.0, -3.0)
    x[:, 1, 0] += np.where(y, 3.0, -3.0) + 1
    whitening = fit_whitening(x.reshape(160, 30), 6)
    small, own, shared = (
        make_probe(name, Making(rank=rank, shared=given)) for rank, given in ((None, None), (6, None), (6, whitening))
    )
    small.fit(whitening(x), y)
    small.resolve_sign(whitening(x), y)
    for wide in (own, shared):
        wide.fit(x, y)
        wide.resolve_sign(x, y)
        np.testing.assert_allclose(wide.log_odds(x), small.log_odds(whitening(x)), rtol=1e-5, atol=1e-6)


def test_random_directions_are_the_same_however_many_dimensions_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import exegete.elk.probes as probes

    x = np.random.default_rng(0).standard_normal((6, 23))
    whole = x @ np.random.default_rng(3).standard_normal((23, 7))
    monkeypatch.setattr(probes, "_DIMENSIONS", 5)
    np.testing.assert_allclose(RandomDirections(count=7, seed=3).log_odds(x), whole, rtol=1e-12)
