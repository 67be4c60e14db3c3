"""Execution: a rule run on every held-out token, beside what needs no rule at all.

The rule has all in view that the row holds of the token's document, up to the token. Nothing is drawn and nobody
judges, so the figures are exact over the test split. Beside them stands what the rule says of every window of the test
frame, read alone (``execution_windows``): the exact values of the population metrics that detection estimates from
drawn windows. Free text has no program and gets no score here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, final

from exegete.examples.data import StoreData
from exegete.metrics import Interval, wilson
from exegete.rules.baselines import BaselineMetrics, baseline_auprc
from exegete.rules.evaluate import RuleMetrics, context_of, evaluate_many
from exegete.rules.execute import TokenContext
from exegete.rules.language import Rule
from exegete.scorers.execution_windows import TestWindows, Tiling, WindowMetrics
from exegete.scorers.scorer import Scorer, Scoring
from exegete.types import Explanation, LatentId, Score
from exegete.views import LatentView, Need, SplitData

EXACT = "exact over the frame"
"""The method of figures that come with no interval: they are no estimates for these documents."""

Item = tuple[Explanation, LatentView]


@final
class ExecutionScorer(Scorer):
    """Scores rules on all counted test positions, and the token baselines that a rule has to beat.

    ``execution``: average precision, precision, recall, F1, correlation with the activation, base rate, and the share
    of activation mass matched per tenth of the firings by strength; with ``windows`` also ``window_precision``,
    ``_recall``, ``_f1``, ``_specificity``, ``_balanced_accuracy`` and ``_pearson``, over all windows of the test frame.
    ``baseline``: average precision of the best token, the best token set, and graded unigram and bigram tables, all
    fitted on the train split.
    """

    def __init__(self, *, baselines: bool = True, windows: bool = True) -> None:
        self._baselines, self._windows = baselines, windows
        self._prepared: tuple[SplitData, TokenContext] | None = None
        self._tiled: TestWindows | None = None

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        return {"name": "execution", "args": {"baselines": self._baselines, "windows": self._windows}}

    @property
    def needs(self) -> frozenset[Need]:
        """All firings of both splits; the examples say how the test frame is tiled."""
        return frozenset({"data", "examples"})

    def score(self, items: Sequence[Item], *, concurrency: int = 16) -> Iterator[Scoring]:
        """Yield one Scoring per item; the latents of one coder are measured together."""
        groups: dict[int, list[Item]] = {}
        for explanation, view in items:
            if explanation.status == "ok" and explanation.program is not None:
                groups.setdefault(id(view.require_data()), []).append((explanation, view))
            else:
                yield Scoring(explanation=explanation, scores=(), judgements={})
        for group in groups.values():
            yield from self._group(group)

    def _group(self, items: Sequence[Item]) -> Iterator[Scoring]:
        data = items[0][1].require_data()
        indices = [view.latent.index for _, view in items]
        rules = [Rule.from_json(explanation.program) for explanation, _ in items]
        if self._prepared is None or self._prepared[0] is not data:  # scored in blocks, the rows are prepared once
            self._prepared = data, context_of(data, "test")
        measured = evaluate_many(rules, data, indices, context=self._prepared[1])
        windows = self._over_windows(items, rules)
        beside = baseline_auprc(data, sorted(set(indices))) if self._baselines else {}
        for (explanation, view), found, framed in zip(items, measured, windows, strict=True):
            scores = (
                *execution_scores(view.latent, found),
                *(window_scores(view.latent, framed) if found is not None else ()),
                *baseline_scores(view.latent, beside.get(view.latent.index), found),
            )
            yield Scoring(explanation=explanation, scores=scores, judgements={})

    def _over_windows(self, items: Sequence[Item], rules: Sequence[Rule]) -> list[WindowMetrics | None]:
        """Return the window figures of one coder's rules; none of data that no frame tiles."""
        data = items[0][1].require_data()
        if not self._windows or not isinstance(data, StoreData):
            return [None] * len(items)
        found: list[WindowMetrics | None] = []
        for tiling, group in groupby(zip(items, rules, strict=True), key=lambda pair: _tiling(pair[0][1])):
            pairs = list(group)
            if self._tiled is None or self._tiled.data is not data or self._tiled.tiling != tiling:
                self._tiled = TestWindows.of(data, *tiling)
            found += self._tiled.measure([rule for _, rule in pairs], [view.latent.index for (_, view), _ in pairs])
        return found


def execution_scores(latent: LatentId, found: RuleMetrics | None) -> tuple[Score, ...]:
    """Return the scores of an executed rule; none for a latent that never fires, or always, in the test split.

    Counts are the positions a figure rests on: those matched for precision, the firings for recall and mass, all
    counted positions else. An undefined figure (correlation of a constant, precision without a match) is NaN.
    """
    if found is None:
        return ()
    n, firings = found.n_positions, found.n_firings
    figures: dict[str, Interval] = {
        "auprc": _exact(found.auprc, n),
        "precision": wilson(found.n_hits, found.n_matched),
        "recall": wilson(found.n_hits, firings),
        "f1": _exact(found.f1, n),
        "pearson": _exact(found.pearson, n),
        "base_rate": wilson(firings, n),
        **{f"mass_decile_{i}": _exact(share, firings) for i, share in enumerate(found.mass_deciles)},
    }
    return tuple(_score(latent, "execution", metric, figure) for metric, figure in figures.items())


def window_scores(latent: LatentId, found: WindowMetrics | None) -> tuple[Score, ...]:
    """Return the scores of an executed rule over the windows of the test frame; none for a latent that fires in none.

    Counts are the windows a figure rests on: those it says yes to for precision, the firing ones for recall, the silent
    ones for specificity, all else.
    """
    if found is None:
        return ()
    n = found.n_windows
    figures = {
        "precision": _exact(found.precision, found.n_called),
        "recall": _exact(found.recall, found.n_firing),
        "f1": _exact(found.f1, n),
        "specificity": _exact(found.specificity, n - found.n_firing),
        "balanced_accuracy": _exact(found.balanced_accuracy, n),
        "pearson": _exact(found.pearson, n),
    }
    return tuple(_score(latent, "execution", f"window_{metric}", figure) for metric, figure in figures.items())


def baseline_scores(latent: LatentId, beside: BaselineMetrics | None, found: RuleMetrics | None) -> tuple[Score, ...]:
    """Return the average precision of the four baselines; none where there is nothing to measure."""
    if beside is None or found is None:
        return ()
    values = {
        "auprc_token": beside.token,
        "auprc_token_set": beside.token_set,
        "auprc_unigram": beside.unigram,
        "auprc_bigram": beside.bigram,
    }
    return tuple(_score(latent, "baseline", metric, _exact(v, found.n_positions)) for metric, v in values.items())


def _tiling(view: LatentView) -> Tiling:
    """Return window length, seed and ``keep_bos`` of the frame that a latent's examples were drawn from."""
    examples = view.examples
    return examples.windows.tokens.shape[1], examples.seed, examples.keep_bos


def _exact(value: float, n: int) -> Interval:
    # Sums of floats may pass 1 by a rounding error.
    bounded = value if math.isnan(value) else min(value, 1.0)
    return Interval(value=bounded, low=bounded, high=bounded, method=EXACT, n=n)


def _score(latent: LatentId, scorer: str, metric: str, figure: Interval) -> Score:
    return Score(
        latent=latent,
        scorer=scorer,
        metric=metric,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        method=figure.method,
        n_total=figure.n,
        n_scored=figure.n,
        n_failed=0,
    )
