"""A few cells of the coverage benchmark, with bounds that only a wrong interval passes; and its simulation."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.coverage import GRIDS, METRICS, lines, tally
from benchmarks.coverage_setting import CAP, Cell, simulate

from exegete.types import STRATA

LATENTS = 250


@pytest.mark.parametrize(
    "cell",
    [
        Cell(n=25, value=0.75),
        Cell(n=50, value=0.95, documents=100),
        Cell(n=25, value=0.95, documents=10, icc=0.1, slope=0.2, effect="apart"),
        Cell(n=100, value=0.65, documents=10, icc=0.1, slope=0.2, effect="able"),
        Cell(n=100, value=0.85, documents=40, icc=0.1, slope=0.2, effect="yes"),
    ],
    ids=lambda cell: f"{cell.effect}-{cell.documents}-{cell.n}",
)
def test_intervals_hold_the_judges_expected_score(cell: Cell) -> None:
    found = tally(cell, LATENTS)
    assert set(found) == set(METRICS)
    for metric, counted in found.items():
        assert counted.held >= 0.9, metric
        assert 0.0 < counted.width < 0.6


def test_intervals_of_lifts_hold_them() -> None:
    cell = Cell(n=50, value=0.75, documents=20, icc=0.1, slope=0.2, effect="apart")
    for metric, counted in tally(cell, 120, lift=True).items():
        assert counted.held >= 0.88, metric


def test_intervals_that_ignore_documents_would_fail() -> None:
    """The simulation is hard enough: Wilson's interval of all windows misses one target in five."""
    from exegete.metrics import wilson

    cell = Cell(n=100, value=0.65, documents=10, icc=0.1, effect="apart")
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        latent = simulate(cell, rng)
        hits = int(latent.observed.prediction[latent.observed.truth].sum())
        interval = wilson(hits, 100)
        held += interval.low <= latent.targets["sensitivity"] <= interval.high
    assert held / 200 < 0.9


def test_targets_are_the_means_of_what_judges_give() -> None:
    cell = Cell(n=50, value=0.7, documents=10, icc=0.1, slope=0.2, effect="able")
    rng = np.random.default_rng(1)
    off = []
    for _ in range(400):
        latent = simulate(cell, rng)
        judged = latent.observed
        right = judged.prediction == judged.truth
        above = (judged.score[:50, None] > judged.score[50:]).mean()
        off.append(
            [
                right[:50].mean() - latent.targets["sensitivity"],
                right[50:].mean() - latent.targets["specificity"],
                above - latent.targets["auroc"],
            ]
        )
    errors = np.array(off)
    assert np.abs(errors.mean(axis=0) / (errors.std(axis=0) / 20)).max() < 4


def test_windows_are_drawn_as_exegete_draws_them() -> None:
    judged = simulate(Cell(n=25, value=0.8, documents=40), np.random.default_rng(2)).observed
    counts = {STRATA[s]: int((judged.stratum == s).sum()) for s in np.unique(judged.stratum)}
    assert sorted(counts.values()) == sorted([3] * 5 + [2] * 5 + [9, 8, 8])
    assert counts["decile_0"] == 3
    assert counts["decile_9"] == 2
    together = np.unique(np.stack([judged.stratum, judged.document]), axis=1, return_counts=True)[1]
    assert together.max() <= CAP


def test_the_table_says_what_falls_short() -> None:
    cells = GRIDS["independent"][1][:2]
    table = lines(cells, [tally(cell, 5) for cell in cells])
    assert len(table) == 5
    assert table[0].startswith("| documents | n | value | sensitivity |")
    assert table[-1].startswith("| **mean** |")
