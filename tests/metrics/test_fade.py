"""Clarity, responsiveness and purity against scikit-learn with the weights of the frame."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as oracle

from exegete import metrics
from exegete.metrics import FrameCounts, Observed
from exegete.metrics.reweighting import NONE_SEEN, drawn_from
from exegete.types import STRATA, Array

FRAME = FrameCounts(windows=4000, firing=200, silent={"same_token": 300, "silent": 3500})


def drawn(seed: int, *, alarms: float = 0.2) -> Observed:
    """40 firing windows of which the strong ones are mostly judged yes, and 60 silent ones of two kinds."""
    rng = np.random.default_rng(seed)
    activation = np.concatenate([rng.integers(1, 12, 40) / 2.0, np.zeros(60)])
    yes = np.concatenate([rng.random(40) < activation[:40] / 6.0, rng.random(60) < alarms])
    if alarms:
        yes[[40, 80]] = True
    kinds = np.array([STRATA.index("same_token")] * 20 + [STRATA.index("silent")] * 40)
    return Observed(
        truth=np.arange(100) < 40,
        prediction=yes.astype(np.int8),
        score=np.full(100, np.nan),
        stratum=np.concatenate([np.arange(40) % 10, kinds]).astype(np.int8),
        document=np.arange(100),
        probability=np.concatenate([np.full(40, 40 / 200), np.full(20, 20 / 300), np.full(40, 40 / 3500)]),
        multiplicity=np.ones(100, np.int64),
        activation=activation,
    )


def weights(observed: Observed) -> Array:
    silent = np.where(observed.stratum == STRATA.index("silent"), 3500 / 40, 300 / 20)
    return np.where(observed.truth, 200 / 40, silent)


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_scikit_learn(seed: int) -> None:
    observed = drawn(seed)
    yes, weight = observed.prediction == 1, weights(observed)
    area = oracle.roc_auc_score(yes, observed.activation, sample_weight=weight)
    assert metrics.responsiveness(observed, FRAME).value == pytest.approx(2 * area - 1)
    precision = oracle.average_precision_score(yes, observed.activation, sample_weight=weight)
    assert metrics.purity(observed, FRAME).value == pytest.approx(precision)


def test_without_a_frame_the_draw_says_what_it_was() -> None:
    observed = drawn(1)
    assert drawn_from(observed) == FRAME
    assert metrics.purity(observed) == metrics.purity(observed, FRAME)
    assert metrics.responsiveness(observed) == metrics.responsiveness(observed, FRAME)


def test_unseen_alarms_keep_the_interval_open() -> None:
    observed = drawn(2, alarms=0.0)
    found = metrics.responsiveness(observed, FRAME)
    assert found.low < 0.5 * found.value
    assert found.high > found.value
    firing = 200 * (observed.prediction[:40] == 1).mean()
    rates = [NONE_SEEN / n * size / 3800 for n, size in ((20, 300), (40, 3500))]
    alarms = 300 * rates[0] + 3500 * rates[1]
    a = observed.activation[:40]
    yes, no = (observed.prediction[:40] == v for v in (1, 0))
    above = sum((a[no] < x).sum() + (a[no] == x).sum() / 2 for x in a[yes]) * 25  # each stands for 5
    wins = above + firing * (3800 - alarms) + alarms * (3800 - alarms) / 2
    area = wins / ((firing + alarms) * (200 - firing + 3800 - alarms))
    assert found.value == pytest.approx(2 * area - 1)


def test_failures_bound_what_might_have_been() -> None:
    whole = drawn(3)
    failed = np.array([3, 5, 50, 70])
    some = replace(whole, prediction=whole.prediction.copy())
    some.prediction[failed] = -1
    for metric in (metrics.responsiveness, metrics.purity):
        found = metric(some, FRAME)
        worst = replace(whole, prediction=whole.prediction.copy())
        worst.prediction[failed] = [0, 0, 1, 1]
        assert found.floor == min(metric(worst, FRAME).low, found.low)
        assert (found.n, found.n_documents) == (96, 96)


def test_a_judge_that_says_one_thing_only_leaves_them_undefined() -> None:
    for verdict in (0, 1):
        observed = replace(drawn(0), prediction=np.full(100, verdict, np.int8))
        for metric in (metrics.responsiveness, metrics.purity):
            found = metric(observed, FRAME)
            assert (found.n, math.isnan(found.value)) == (0, True)


def test_clarity_is_two_aurocs_less_one() -> None:
    written, natural = [3.0, 0.0, 2.0, 5.0], [0.0, 0.0, 1.0, 2.0, 0.0]
    found = metrics.clarity(written, natural)
    area = oracle.roc_auc_score([1] * 4 + [0] * 5, written + natural)
    assert found.value == pytest.approx(2 * area - 1)
    plain = metrics.auroc([True] * 4 + [False] * 5, written + natural)
    assert (found.low, found.high) == pytest.approx((2 * plain.low - 1, 2 * plain.high - 1))
    assert math.isnan(metrics.clarity([], natural).value)
