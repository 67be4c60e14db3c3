"""Calibration of P(yes) against scikit-learn, hand computations and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from exegete import metrics
from exegete.errors import InputError
from exegete.metrics import Observed
from exegete.types import STRATA, Array


def judged(truth: Sequence[bool] | Array, score: Sequence[float] | Array, document: Array | None = None) -> Observed:
    n = len(truth)
    return Observed(
        truth=np.array(truth, bool),
        prediction=np.ones(n, np.int8),
        score=np.array(score, np.float64),
        stratum=np.full(n, STRATA.index("silent"), np.int8),
        document=np.arange(n) if document is None else document,
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64),
        activation=np.zeros(n),
    )


def test_brier_is_scikit_learns_and_its_interval_students() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(60)
    truth = rng.random(60) < score
    found = metrics.calibration(judged(truth, score))["brier"]
    assert found.value == pytest.approx(oracle.brier_score_loss(truth, score))
    low, high = stats.t.interval(0.95, 59, loc=found.value, scale=stats.sem((score - truth) ** 2))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_brier_is_clustered_by_document() -> None:
    score, truth = [0.9, 0.9, 0.2, 0.2, 0.6, 0.6], [True, True, True, True, False, False]
    found = metrics.calibration(judged(truth, score, np.array([0, 0, 1, 1, 2, 2])))["brier"]
    errors = np.array([0.01, 0.64, 0.36])  # of the documents, whose windows are equal
    low, high = stats.t.interval(0.95, 2, loc=errors.mean(), scale=stats.sem(errors))
    assert (found.low, found.high) == pytest.approx((max(low, 0.0), min(high, 1.0)))
    assert (found.n, found.n_documents) == (6, 3)


def test_expected_calibration_error_by_hand() -> None:
    # Bin 0.1…0.2: mean 0.15, 1 of 2 fires. Bin 0.9…1: mean 0.975, 3 of 4 fire. A missing P(yes) is left out.
    score = [0.12, 0.18, 0.95, 0.95, 1.0, 1.0, math.nan]
    truth = [True, False, True, True, True, False, True]
    found = metrics.calibration(judged(truth, score))["ece"]
    assert found.value == pytest.approx((2 * 0.35 + 4 * 0.225) / 6)
    assert found.low <= found.value <= found.high
    assert found.n == 6


def test_without_probabilities_there_is_nothing_and_other_numbers_are_refused() -> None:
    for one in metrics.calibration(judged([True], [math.nan])).values():
        assert (one.n, math.isnan(one.value)) == (0, True)
    with pytest.raises(InputError, match=r"got -3…2; leave it out for scores of another kind"):
        metrics.calibration(judged([True, False], [2.0, -3.0]))


@pytest.mark.parametrize("bent", [1.0, 2.0])
def test_intervals_cover_what_would_be_without_noise(bent: float) -> None:
    # P(yes) is p, and windows fire with chance p to the power of ``bent``: calibrated, or too sure of itself.
    rng, grid = np.random.default_rng(5), np.linspace(0.0, 1.0, 100_001)
    bins = np.minimum((grid * 10).astype(int), 9)
    off = np.array([abs((grid - grid**bent)[bins == b].mean()) for b in range(10)])
    brier = float((grid**2 - 2 * grid ** (1 + bent) + grid**bent).mean())
    held = {"ece": 0, "brier": 0}
    for _ in range(400):
        score = rng.random(200)
        found = metrics.calibration(judged(rng.random(200) < score**bent, score), draws=300)
        for name, target in (("ece", off.mean()), ("brier", brier)):
            held[name] += found[name].low - 1e-9 <= target <= found[name].high
    assert held["brier"] / 400 > 0.92
    assert held["ece"] / 400 > 0.9
