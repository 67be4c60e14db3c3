from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from exegete import metrics
from exegete.errors import InputError
from exegete.llm.scripted import Evidence
from exegete.testing.intruding import named_chance
from exegete.testing.ranked import weighted_auroc
from exegete.testing.responses import (
    Cells,
    cells_of,
    drawn_accuracy,
    drawn_auroc,
    expected_accuracy,
    expected_auroc,
    fitting,
    inclusion,
    order_power,
)

EVIDENCE = Evidence(true_positive_rate=0.9, false_positive_rate=0.2)


def toy_cells() -> list[Cells]:
    fits = np.array([[1, 1, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1, 0, 0]], bool)
    stratum = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    firing = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    return cells_of(fits, stratum, firing, np.arange(8), [(0, True, 1), (1, True, 2), (2, False, 3)])


def test_expected_accuracy_by_hand() -> None:
    cells = toy_cells()
    # firing: stratum 0 (1 of 3 drawn) is fitted to 1 and 1/2, stratum 1 (2 of 3) to 1/2 and 0
    assert fitting(cells, True) == pytest.approx([1 / 3 + 2 / 3 / 2, 1 / 3 / 2])
    assert fitting(cells, False) == pytest.approx([1 / 4, 1 / 2])
    hit, alarm = 0.2 + 0.7 * np.array([2 / 3, 1 / 6]), 0.2 + 0.7 * np.array([1 / 4, 1 / 2])
    assert expected_accuracy(cells, EVIDENCE) == pytest.approx((hit + 1 - alarm) / 2)


def test_simulated_draws_have_the_expected_mean_and_the_spread_of_drawing_without_replacement() -> None:
    cells = toy_cells()
    rng = np.random.default_rng(0)
    drawn = drawn_accuracy(cells, EVIDENCE, 40_000, rng)
    assert drawn.mean(axis=0) == pytest.approx(expected_accuracy(cells, EVIDENCE), abs=0.006)
    sure = Evidence(true_positive_rate=1.0, false_positive_rate=0.0)
    values = {
        ((a + 1 * b) / 3 + 1 - c / 3) / 2  # the second stratum is drawn whole, the silent one 3 of 4
        for a, b, c in itertools.product([1], [1], [0, 1])
    }
    assert set(np.round(np.unique(drawn_accuracy(cells, sure, 400, rng)[:, 0]), 9)) == {round(v, 9) for v in values}


def test_expected_auroc_is_that_of_the_mixtures() -> None:
    cells = toy_cells()
    rng = np.random.default_rng(1)
    hit, alarm = stats.norm.ppf(0.9), stats.norm.ppf(0.2)
    p, q = fitting(cells, True)[0], fitting(cells, False)[0]
    n = 400_000
    positive = rng.standard_normal(n) + np.where(rng.random(n) < p, hit, alarm)
    negative = rng.standard_normal(n) + np.where(rng.random(n) < q, hit, alarm)
    assert expected_auroc(cells, EVIDENCE)[0] == pytest.approx((positive > negative).mean(), abs=0.004)
    assert drawn_auroc(cells, EVIDENCE, 20_000, rng).mean(axis=0) == pytest.approx(
        expected_auroc(cells, EVIDENCE), abs=0.01
    )


def test_drawn_auroc_counts_pairs() -> None:
    sure = Evidence(true_positive_rate=1.0, false_positive_rate=0.0)  # six deviations either way: no pair is wrong
    cells = cells_of(
        np.array([[1, 1, 0, 0, 0]], bool), np.zeros(5, int), np.array([1, 1, 1, 0, 0], bool),
        np.arange(5), [(0, True, 3), (0, False, 2)],
    )  # fmt: skip
    drawn = drawn_auroc(cells, sure, 300, np.random.default_rng(2))[:, 0]
    # of six pairs four are certain, and the window that is missed lies anywhere among the silent ones
    assert set(np.round(np.unique(drawn), 9)) == {round(v / 6, 9) for v in (4, 5, 6)}


def test_weighted_auroc_equals_that_of_repeated_windows() -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 6, 40).astype(float)
    fires = rng.random(40) < 0.4
    weight = rng.integers(1, 4, 40)
    repeated = metrics.auroc(np.repeat(fires, weight), np.repeat(values, weight)).value
    assert weighted_auroc(values, fires, weight.astype(float)) == pytest.approx(repeated)


def test_order_power_counts_ties_half() -> None:
    power = order_power(np.array([[0.5, 0.5, 0.1], [0.9, 0.5, 0.6]]))
    assert power[0].tolist() == [0.5, 0.75, 1.0]
    assert power[2].tolist() == [0.0, 0.5, 0.5]


def test_more_windows_than_a_stratum_has_are_refused() -> None:
    with pytest.raises(InputError, match="from a stratum of 1"):
        cells_of(np.ones((1, 1), bool), np.zeros(1, int), np.ones(1, bool), np.zeros(1, int), [(0, True, 2)])


def test_windows_of_a_document_with_many_are_less_likely() -> None:
    document = np.array([7] * 12 + [8, 9])
    likely, pool = inclusion(document, 5)  # three of the first document and one of either other: five in all
    assert pool == 5
    assert likely.tolist() == pytest.approx([3 / 12] * 12 + [1, 1])
    likely, pool = inclusion(document, 9)  # seven of the first have to be let in
    assert (pool, likely.sum()) == (9, pytest.approx(9))
    assert likely[0] == pytest.approx(7 / 12)
    # A rung that fits the long document alone fits three fifths of what is drawn, not twelve of fourteen.
    cells = cells_of((document == 7)[None], np.zeros(14, int), np.ones(14, bool), document, [(0, True, 5)])
    assert fitting(cells, True).tolist() == pytest.approx([3 / 5])
    assert cells[0].counts.sum() == 5


def test_an_intruder_who_fits_as_others_do_is_named_by_chance() -> None:
    assert named_chance(EVIDENCE, True, np.ones(4, bool)) == pytest.approx(0.2, abs=1e-3)
    assert named_chance(EVIDENCE, False, np.zeros(4, bool)) == pytest.approx(0.2, abs=1e-3)
    gap = stats.norm.ppf(0.9) - stats.norm.ppf(0.2)
    assert named_chance(EVIDENCE, False, np.ones(1, bool)) == pytest.approx(
        stats.norm.cdf(gap / math.sqrt(2)), abs=1e-3
    )
