"""What scores say together: how scorers agree over latents, output latents, retests, collisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exegete.analysis.shapes import (
    Agreement,
    CoderSummary,
    Collision,
    ExplainerSummary,
    OutputLatent,
    Retest,
)
from exegete.metrics import Interval
from exegete.metrics.inputs import undefined
from exegete.results import Results
from exegete.results_columns import ScoreColumn
from exegete.scorers.contrast import collisions
from exegete.scorers.intervention_retest import reliability
from exegete.types import Array

LEAST = 8
"""Latents below which no correlation is told."""
CAUSAL, RANDOM, JUDGED = "intervention", "random_direction", ("detection", "fuzzing")
N_OUTPUT = 20
DISCRIMINATION = "discrimination"
EMBEDDED = ("embedding", "example_embedding")


def agreements(results: Results, coder: CoderSummary, explainer: ExplainerSummary) -> tuple[Agreement, ...]:
    """Return how each pair of scorers agrees on the latents of a coder; measurements only."""
    columns = {
        s.scorer: results.score_column(coder.name, s.scorer, s.metric, explainer=explainer.key, plumbing=False)
        for s in explainer.measured
    }
    names, found = list(columns), []
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            a, b = shared(columns[left], columns[right])
            if len(a) >= LEAST:
                found.append(
                    Agreement(
                        coder=coder.name,
                        explainer=explainer.name,
                        left=left,
                        right=right,
                        n=len(a),
                        spearman=spearman(a, b),
                    )
                )
    return tuple(found)


def spearman(a: Array, b: Array) -> Interval:
    """Return Spearman's correlation of pairs; Fisher's interval with the variance of Bonett and Wright (2000)."""
    from scipy import stats

    n = len(a)
    if n < 4 or not (np.ptp(a) and np.ptp(b)):
        return undefined("bonett-wright")
    value = float(stats.spearmanr(a, b).statistic)
    bounded = min(max(value, -0.9999999), 0.9999999)
    half = 1.959963984540054 * math.sqrt((1 + bounded**2 / 2) / (n - 3))
    centre = math.atanh(bounded)
    low, high = math.tanh(centre - half), math.tanh(centre + half)
    return Interval(value=value, low=min(low, value), high=max(high, value), method="bonett-wright", n=n)


def output_latents(results: Results, coder: CoderSummary, explainer: ExplainerSummary) -> tuple[OutputLatent, ...]:
    """Return the latents whose causal score lies in the best third and whose detection lies in the worst, best first.

    The causal score is its lift over a random direction at equal KL. Only latents count whose whole interval of it is
    above 0: the paper's "reputation" latent, detection 0.6 with a clear effect, is of this kind (arXiv 2410.13928,
    section 3.2.1).
    """
    by = {s.scorer: s for s in explainer.measured}
    causal = next((s for name, s in by.items() if name.startswith(CAUSAL) and "ablate" not in name), None)
    judged = next((by[name] for name in JUDGED if name in by), None)
    if causal is None or judged is None:
        return ()
    lift = f"{causal.metric}_lift"
    effect = results.score_column(
        coder.name, causal.scorer, lift, control=RANDOM, explainer=explainer.key, plumbing=False
    )
    seen = results.score_column(coder.name, judged.scorer, judged.metric, explainer=explainer.key, plumbing=False)
    both, here, there = np.intersect1d(effect.index, seen.index, assume_unique=True, return_indices=True)
    value, low, detected = effect.value[here], effect.low[here], seen.value[there]
    known = np.isfinite(value) & np.isfinite(detected)
    if known.sum() < LEAST:
        return ()
    high, poor = np.quantile(value[known], 2 / 3), np.quantile(detected[known], 1 / 3)
    wanted = np.flatnonzero(known & (low > 0) & (value >= high) & (detected <= poor))
    order = wanted[np.argsort(-value[wanted], kind="stable")][:N_OUTPUT]
    return tuple(
        OutputLatent(coder=coder.name, index=int(both[i]), intervention=float(value[i]), detection=float(detected[i]))
        for i in order
    )


def retests(results: Results, coder: CoderSummary, explainer: ExplainerSummary) -> tuple[Retest, ...]:
    """Return the test–retest reliability of every intervention scorer; measurements only."""
    return tuple(
        Retest(coder=coder.name, explainer=explainer.name, scorer=s.scorer, condition=condition, icc=found)
        for s in explainer.measured
        if s.scorer.startswith(CAUSAL)
        for condition, found in reliability(
            results.details(coder.name, s.scorer, explainer=explainer.key, plumbing=False).values()
        ).items()
    )


def collided(results: Results, coder: CoderSummary, explainer: ExplainerSummary) -> tuple[Collision, ...]:
    """Return clusters of latents whose explanations do not tell each other apart, largest first; measurements only."""
    if not any(s.scorer == DISCRIMINATION for s in explainer.measured):
        return ()
    details = results.details(coder.name, DISCRIMINATION, explainer=explainer.key, plumbing=False)
    clusters = collisions({f"{coder.name}/{index}": found for index, found in details.items()})
    return tuple(
        Collision(
            coder=coder.name,
            explainer=explainer.name,
            latents=tuple(sorted(int(name.rpartition("/")[2]) for name in cluster)),
        )
        for cluster in clusters
    )


def shared(left: ScoreColumn, right: ScoreColumn) -> tuple[Array, Array]:
    """Return the values of two metrics over the latents that have both, in order of latent."""
    _, here, there = np.intersect1d(left.index, right.index, assume_unique=True, return_indices=True)
    a, b = left.value[here], right.value[there]
    keep = np.isfinite(a) & np.isfinite(b)
    return a[keep], b[keep]


def judge_name(spec: Mapping[str, Any]) -> str:
    """Return who judged under a scoring stage's options, as the report names it.

    An executed rule, a language model by its short name, or what gave the vectors or the log probabilities.
    """
    scorer = spec.get("scorer") or {}
    name, args = scorer.get("name"), scorer.get("args") or {}
    judge = str(spec.get("judge") or "unknown")
    if spec.get("reader"):
        return f"reader {_short(str(spec['reader']))}"
    vectors = args.get("embedder")
    if name in EMBEDDED or args.get("judge") == "embedding" or (vectors and judge in ("rule", vectors)):
        return str(args.get("embedder", "embedder")).rstrip("/").rpartition("/")[2]
    if name == CAUSAL:
        return "the subject itself"
    return "executed rule" if "rule" in (judge, args.get("judge")) else _short(judge)


def _short(model: str) -> str:
    return model.rpartition("#")[2] or model


def matrix(found: Sequence[Agreement]) -> tuple[tuple[str, ...], Mapping[tuple[str, str], Agreement]]:
    """Return the names of scorers and their agreements by pair, both ways round, for a square table."""
    names = tuple(dict.fromkeys(name for a in found for name in (a.left, a.right)))
    return names, {pair: a for a in found for pair in ((a.left, a.right), (a.right, a.left))}
