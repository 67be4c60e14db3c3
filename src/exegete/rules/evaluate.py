"""Exact figures of a rule on held-out text: every position that counts is scored, none is sampled, nobody judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.rules.execute import TokenContext, matches
from exegete.rules.language import Rule
from exegete.types import Array, Firings, Rows, Split
from exegete.views import SplitData

DECILES = 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RuleMetrics:
    """How well a rule says where a latent fires, over all ``n_positions`` counted positions of a split.

    ``precision``, ``recall`` and ``f1`` take "any clause matches" as the prediction; a rule that matches nowhere has
    precision 0. ``auprc`` is average precision of the rule score (equal scores are one block). ``pearson`` correlates
    the mean activation of the matching clause with the activation; it is NaN when either never varies.
    ``mass_deciles`` [10] is the share of activation mass at matched positions in each tenth of the firings by
    strength, the strongest first; NaN for a tenth that is empty because there are fewer than ten firings.
    """

    n_positions: int
    n_firings: int
    n_matched: int
    n_hits: int
    base_rate: float
    precision: float
    recall: float
    f1: float
    auprc: float
    pearson: float
    mass_deciles: tuple[float, ...]


def average_precision_of_blocks(sizes: Array, hits: Array) -> float:
    """Average precision of blocks of equally scored positions, the best block first.

    ``sizes`` and ``hits`` [blocks]: positions and firings in each block, which together hold everything. Average
    precision is the sum over blocks of their share of the firings times the precision down to and with that block.
    Raises InputError when nothing fires.
    """
    total = float(hits.sum())
    if total <= 0:
        raise InputError("average precision is not defined where nothing fires")
    ranked = np.cumsum(sizes)
    precision = np.cumsum(hits) / np.maximum(ranked, 1)
    return float(np.sum(hits * precision) / total)


def average_precision(scores: Array, truth: Array) -> float:
    """Average precision of ``scores`` [n] for ``truth`` [n] bool, equal scores taken as one block.

    Raises InputError when nothing is true.
    """
    levels, block = np.unique(scores, return_inverse=True)
    sizes = np.bincount(block, minlength=len(levels))[::-1]
    hits = np.bincount(block, weights=truth, minlength=len(levels))[::-1]
    return average_precision_of_blocks(sizes, hits)


def flat_firings(firings: Firings, context: TokenContext) -> tuple[Array, Array]:
    """Return the flat positions and values of the firings at positions that count, in row order."""
    flat = firings.rows.astype(np.int64) * context.length + firings.positions
    values = firings.values.astype(np.float64)
    keep = values > 0
    if context.mask is not None:
        keep &= context.mask[flat]
    flat, values = flat[keep], values[keep]
    if len(flat) > 1 and not (np.diff(flat) > 0).all():
        order = np.argsort(flat, kind="stable")
        flat, values = flat[order], values[order]
    return flat, values


def find_sorted(needles: Array, haystack: Array) -> tuple[Array, Array]:
    """Return where sorted ``haystack`` would hold each needle, and whether it does."""
    if not len(haystack):
        return np.zeros(len(needles), np.int64), np.zeros(len(needles), bool)
    where = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return where, haystack[where] == needles


def evaluate(rule: Rule, firings: Firings, context: TokenContext) -> RuleMetrics | None:
    """Measure a rule against the firings of a latent on the rows of ``context``.

    Returns None when the latent does not fire there, or fires everywhere: then there is nothing to measure.
    """
    flat, values = flat_firings(firings, context)
    n = context.n_counted
    if not 0 < len(flat) < n:
        return None
    positions, scores = matches(rule, context)
    _, means = matches(rule, context, value="activation")
    where, hit = find_sorted(flat, positions)
    n_matched, n_hits = len(positions), int(hit.sum())
    levels, block = np.unique(scores, return_inverse=True)
    sizes = np.bincount(block, minlength=len(levels))[::-1]
    hits = np.bincount(block[where[hit]], minlength=len(levels))[::-1]
    precision = n_hits / n_matched if n_matched else 0.0
    recall = n_hits / len(flat)
    predicted_at_firings = np.where(hit, means[where] if n_matched else 0.0, 0.0)
    return RuleMetrics(
        n_positions=n,
        n_firings=len(flat),
        n_matched=n_matched,
        n_hits=n_hits,
        base_rate=len(flat) / n,
        precision=precision,
        recall=recall,
        f1=2 * n_hits / (n_matched + len(flat)),
        auprc=average_precision_of_blocks(
            np.append(sizes, n - n_matched), np.append(hits, len(flat) - n_hits).astype(np.float64)
        ),
        pearson=_pearson(n, means.astype(np.float64), values, predicted_at_firings),
        mass_deciles=_mass_deciles(values, hit),
    )


def _pearson(n: int, predicted: Array, values: Array, predicted_at_firings: Array) -> float:
    """Correlation over n positions of which only the given ones are not 0."""
    covariance = float(predicted_at_firings @ values) / n - predicted.sum() / n * values.sum() / n
    spread = (float(predicted @ predicted) / n - (predicted.sum() / n) ** 2) * (
        float(values @ values) / n - (values.sum() / n) ** 2
    )
    return float(np.clip(covariance / math.sqrt(spread), -1.0, 1.0)) if spread > 0 else math.nan


def _mass_deciles(values: Array, hit: Array) -> tuple[float, ...]:
    """Tenths differ in size by at most one; equally strong firings keep row order."""
    order = np.argsort(-values, kind="stable")
    parts = np.array_split(order, DECILES)
    return tuple(float(values[p][hit[p]].sum() / values[p].sum()) if len(p) else math.nan for p in parts)


def context_of(data: SplitData, split: Split) -> TokenContext:
    """Return the rows of a split prepared for rules, each document in a row by itself."""
    rows: Rows = data.rows(split)
    return TokenContext(rows.tokens, data.tokens, rows.mask, rows.documents)


def evaluate_many(
    rules: Sequence[Rule | None],
    data: SplitData,
    indices: Sequence[int],
    *,
    split: Split = "test",
    context: TokenContext | None = None,
) -> list[RuleMetrics | None]:
    """Measure one rule per latent on a split (held-out unless told). None where there is no rule or nothing to measure.

    ``context`` is ``context_of(data, split)`` where the caller has it already.
    """
    shared = context_of(data, split) if context is None else context
    firings = data.firings(list(indices), split)
    return [None if rule is None else evaluate(rule, fired, shared) for rule, fired in zip(rules, firings, strict=True)]
