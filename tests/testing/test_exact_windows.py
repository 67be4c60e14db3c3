"""Detection's population metrics, of drawn windows judged by the rule, against the exact figures of all windows."""

from __future__ import annotations

import math

import pytest

from exegete.config import Negative
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.execution import ExecutionScorer
from exegete.testing.latents import RUNGS
from exegete.testing.worlds import World
from exegete.views import LatentView

METRICS = ("precision", "recall", "f1", "specificity", "pearson")


@pytest.mark.parametrize("negatives", [("random",), ("same_token", "random")])
def test_the_estimates_of_drawn_windows_cover_the_exact_figures(world: World, negatives: tuple[Negative, ...]) -> None:
    detection, execution = DetectionScorer(judge="rule", controls="none"), ExecutionScorer(baselines=False)
    held: dict[str, list[bool]] = {metric: [] for metric in METRICS}
    for seed in range(6):
        items = [
            (world.explanation(examples.latent.index, RUNGS[(seed + examples.latent.index) % len(RUNGS)], seed), view)
            for examples in world.select(50, negatives=negatives, seed=seed)
            for view in [LatentView(latent=examples.latent, tokens=world.table, examples=examples, data=world.data)]
        ]
        drawn = {s.explanation.latent: {f.metric: f for f in s.scores} for s in detection.score(items)}
        for scoring in execution.score(items):
            exact = {s.metric: s.value for s in scoring.scores}
            for metric in METRICS:
                estimate, value = drawn[scoring.explanation.latent][f"population_{metric}"], exact[f"window_{metric}"]
                if math.isnan(estimate.value):  # of the windows drawn none was judged yes
                    continue
                held[metric].append(estimate.low - 1e-9 <= value <= estimate.high + 1e-9)
    for metric, inside in held.items():
        assert len(inside) >= 30
        assert sum(inside) / len(inside) >= 0.9, metric
