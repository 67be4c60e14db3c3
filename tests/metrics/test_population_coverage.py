"""Population metrics over simulated latents, drawn by exegete's own draws; the benchmark runs more and larger cells."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as oracle

from exegete.metrics import Interval, population
from exegete.types import Array

LATENTS = 150


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("benchmarks.population_setting")


def measured(setting: Any, **cell: Any) -> Mapping[str, tuple[list[Interval], Array]]:
    """Return the intervals and the targets of each metric over the latents of a cell."""
    found: dict[str, tuple[list[Interval], list[float]]] = {}
    for latent in setting.simulate(setting.Cell(**cell), LATENTS, 11):
        for metric, interval in population(latent.observed, latent.frame, draws=400).items():
            intervals, targets = found.setdefault(metric, ([], []))
            if interval.n:
                intervals.append(interval)
                targets.append(latent.targets[metric])
    return {metric: (intervals, np.array(targets)) for metric, (intervals, targets) in found.items()}


def held(intervals: list[Interval], targets: Array, low: str = "low", high: str = "high") -> float:
    bounds = np.array([[getattr(one, low), getattr(one, high)] for one in intervals])
    return float(np.mean((bounds[:, 0] <= targets) & (targets <= bounds[:, 1])))


def in_errors(intervals: list[Interval], targets: Array) -> float:
    """Return how many standard errors of the simulation the values are off on average."""
    off = np.array([one.value for one in intervals]) - targets
    return float(off.mean() / (off.std(ddof=1) / np.sqrt(len(off))))


@pytest.mark.parametrize("copies", [1, 4])
def test_values_are_unbiased_and_intervals_cover(setting: Any, copies: int) -> None:
    found = measured(setting, n=50, rate=0.05, alarms=(0.3, 0.2, 0.1), slope=0.15, copies=copies)
    for metric in ("population_recall", "population_specificity"):
        assert abs(in_errors(*found[metric])) < 3.5
    assert len(found) == 6
    for intervals, targets in found.values():
        assert held(intervals, targets) > 0.9


def test_lower_bounds_of_what_is_not_identified_hold(setting: Any) -> None:
    found = measured(setting, n=50, rate=0.002)
    intervals, targets = found["population_precision"]
    assert all("not_identified" in one.flags and one.n_needed for one in intervals)
    assert np.mean([one.low <= target for one, target in zip(intervals, targets, strict=True)]) > 0.97


def test_intervals_cover_where_documents_err_together(setting: Any) -> None:
    found = measured(setting, n=50, rate=0.05, alarms=(0.3, 0.2, 0.1), documents=10, icc=0.2)
    for intervals, targets in found.values():
        assert held(intervals, targets) > 0.88
        assert all("few_documents" in one.flags for one in intervals)


def test_bounds_for_failures_hold_where_wrong_answers_are_missing(setting: Any) -> None:
    found = measured(setting, n=50, rate=0.05, failing=0.5)
    recall, targets = found["population_recall"]
    assert in_errors(recall, targets) > 10.0  # only the right ones answered
    assert held(recall, targets) < 0.8
    for intervals, targets in found.values():
        assert held(intervals, targets, "floor", "ceiling") > 0.93


def test_targets_are_what_scikit_learn_finds_on_a_whole_frame(setting: Any) -> None:
    rng = np.random.default_rng(2)
    hit, strength = np.repeat([0.9, 0.5], 20_000), rng.lognormal(size=40_000)
    alarms, held = np.array([0.3, 0.05]), np.array([10_000, 150_000])
    targets = setting.expected(hit, np.ones(40_000), strength, alarms, held)
    chance = np.concatenate([hit, np.repeat(alarms, held)])
    truth = np.arange(len(chance)) < 40_000
    score = special.expit(setting.STEEPNESS * (special.ndtri(chance) + rng.normal(size=len(chance))))
    activation = np.concatenate([strength, np.zeros(160_000)])
    found = {
        "population_precision": oracle.precision_score(truth, score > 0.5),
        "population_recall": oracle.recall_score(truth, score > 0.5),
        "population_f1": oracle.f1_score(truth, score > 0.5),
        "population_specificity": oracle.recall_score(~truth, score <= 0.5),
        "population_auprc": oracle.average_precision_score(truth, score),
        "population_pearson": np.corrcoef(score, activation)[0, 1],
    }
    assert found == pytest.approx(targets, abs=0.006)
