"""Curves over deciles and kinds of silent windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exegete import metrics
from exegete.metrics import Observed
from exegete.types import STRATA


def judgements(rows: list[tuple[str, bool, int]]) -> Observed:
    """One judgement for each (stratum, truth, prediction)."""
    n = len(rows)
    return Observed(
        truth=np.array([truth for _, truth, _ in rows]),
        prediction=np.array([said for _, _, said in rows], np.int8),
        score=np.full(n, np.nan),
        stratum=np.array([STRATA.index(stratum) for stratum, _, _ in rows], np.int8),
        document=np.arange(n) // 2,
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64),
        activation=np.array([float(truth) for _, truth, _ in rows]),
    )


def test_each_decile_has_its_own_sensitivity() -> None:
    rows = [("decile_0", True, 1)] * 4 + [("decile_9", True, 1)] * 1 + [("decile_9", True, 0)] * 3
    found = metrics.decile_curve(judgements([*rows, ("silent", False, 1)]))
    assert list(found) == ["sensitivity_decile_0", "sensitivity_decile_9"]
    for name, k in (("sensitivity_decile_0", 4), ("sensitivity_decile_9", 1)):
        plain = metrics.wilson(k, 4)
        assert (found[name].value, found[name].low, found[name].high) == (plain.value, plain.low, plain.high)
        assert (found[name].n, found[name].n_documents, found[name].flags) == (4, 2, ("few_documents",))


def test_bins_are_named_bins_and_other_draws_have_no_curve() -> None:
    found = metrics.decile_curve(judgements([("bin_0", True, 1), ("bin_3", True, 0), ("random", True, 1)]))
    assert {name: one.value for name, one in found.items()} == {"sensitivity_bin_0": 1.0, "sensitivity_bin_3": 0.0}


def test_each_kind_of_silent_window_has_its_own_specificity() -> None:
    rows = [("same_token", False, 1), ("same_token", False, 0), ("silent", False, 0), ("decile_0", True, 1)]
    found = metrics.stratum_curve(judgements(rows))
    values = {name: one.value for name, one in found.items()}
    assert values == {"specificity_same_token": 0.5, "specificity_silent": 1.0}


@pytest.mark.parametrize("firing", [True, False])
def test_failures_are_counted_wrong_and_right_in_the_bounds(firing: bool) -> None:
    right = int(firing)
    stratum, curve = ("decile_4", metrics.decile_curve) if firing else ("silent", metrics.stratum_curve)
    rows = [(stratum, firing, right)] * 3 + [(stratum, firing, 1 - right)] + [(stratum, firing, -1)] * 2
    (found,) = curve(judgements(rows)).values()
    assert (found.value, found.n) == (0.75, 4)
    assert found.floor == metrics.wilson(3, 6).low
    assert found.ceiling == metrics.wilson(5, 6).high


def test_a_stratum_where_all_failed_has_no_value() -> None:
    (found,) = metrics.decile_curve(judgements([("decile_1", True, -1)] * 3)).values()
    assert (found.n, math.isnan(found.value)) == (0, True)
    assert (found.floor, found.ceiling) == (metrics.wilson(0, 3).low, metrics.wilson(3, 3).high)
