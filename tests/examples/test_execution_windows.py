"""Exact window figures of a rule against a slow loop over all windows of the frame, each put to detection's judge."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exegete.examples import StoreData, select_many, split_segments
from exegete.examples.split import CODES
from exegete.examples.windows import frame
from exegete.metrics import FrameCounts
from exegete.rules.language import Clause, PositionIn, Rule, TokenAt, TokenWithin
from exegete.runs import example_config
from exegete.scorers.execution import EXACT, ExecutionScorer, window_scores
from exegete.scorers.execution_windows import TestWindows, WindowMetrics
from exegete.scorers.judge import Item, RuleJudge
from exegete.types import ExampleSet, Explanation, LatentId, Score
from exegete.views import LatentView

WINDOW = 8
FIGURES = {"precision", "recall", "f1", "specificity", "balanced_accuracy", "pearson"}
RULES = {
    "a word": Rule((Clause((TokenAt(0, (3, 4, 5)),), 0.9, 1.0),)),
    "where it stands in its window": Rule((Clause((TokenAt(0, (7, 8, 9, 10)), PositionIn(0, 2)), 0.8, 1.0),)),
    "what stands before": Rule((Clause((TokenWithin(6, (11, 12)), TokenAt(0, (20, 21, 22))), 0.8, 1.0),)),
    "a clause that was never right": Rule(
        (Clause((TokenAt(0, (30,)),), 0.0, 1.0), Clause((TokenAt(0, (31,)),), 0.5, 1.0))
    ),
    "everywhere": Rule((Clause((TokenAt(0, (0,), negated=True),), 0.5, 1.0),)),
}


def made(build: Callable[..., Any], **options: Any) -> StoreData:
    rng = np.random.default_rng(1)
    store = build(lengths=rng.integers(5, 120, 60).tolist(), rates=(0.02, 0.05, 0.2), **options)
    odd = store.found[1]
    values = np.where(np.arange(len(odd)) % 3, odd.values, np.float32(-1.0))  # recorded, but no firing
    found = (store.found[0], dataclasses.replace(odd, values=values), *store.found[2:])
    store = dataclasses.replace(store, found=found)
    store.corpus.tokens[5:8] = store.corpus.tokens[4]  # near-duplicates
    return StoreData(store, split_segments(store.corpus, seed=0, test_share=0.5))


def views(data: StoreData, **settings: Any) -> list[LatentView]:
    config = example_config(
        **{"window": WINDOW, "n_train": 5, "n_test": 10, "n_negatives": 10, "min_train": 1, "min_test": 1, **settings}
    )
    sets = select_many(data, [0, 1, 2], config, seed=4)
    return [
        LatentView(latent=s.latent, tokens=data.tokens, examples=s, data=data)
        for s in sets
        if isinstance(s, ExampleSet)
    ]


def explanation(view: LatentView, rule: Rule) -> Explanation:
    return Explanation(latent=view.latent, text="t", status="ok", explainer={}, program=rule.to_json())


def scores(view: LatentView, rule: Rule) -> dict[str, Score]:
    (scoring,) = ExecutionScorer(baselines=False).score([(explanation(view, rule), view)])
    head = "window_"
    return {s.metric.removeprefix(head): s for s in scoring.scores if s.metric.startswith(head)}


def by_hand(view: LatentView, rule: Rule) -> dict[str, tuple[float, int]]:
    """Every window of the test split, one by one: what the judge says of it, and its strongest firing."""
    data: Any = view.data
    corpus, store = data.store.corpus, data.store
    fired = store.firings(view.latent.index)
    value = {(r, p): v for r, p, v in zip(fired.rows.tolist(), fired.positions.tolist(), fired.values, strict=True)}
    special = [0] if view.examples.keep_bos else None
    tiled = frame(store.rows(np.arange(len(corpus.tokens))), WINDOW, seed=view.examples.seed, special=special)
    items, strongest = [], []
    for row, start in zip(tiled.row.tolist(), tiled.start.tolist(), strict=True):
        place = row * tiled.length + start
        if data.segment_split[data.segment_of(np.array([place]))[0]] != CODES["test"]:
            continue
        items.append(Item(tokens=corpus.tokens[row, start : start + WINDOW]))
        strongest.append(max(0.0, *(float(value.get((row, start + i), 0.0)) for i in range(WINDOW))))
    said = asyncio.run(RuleJudge("detection", view.tokens).verdicts(explanation(view, rule), items))
    yes, activation = np.array([verdict.prediction for verdict in said]), np.array(strongest)
    truth = activation > 0
    hits, called, firing, n = (yes & truth).sum(), yes.sum(), truth.sum(), len(yes)
    recall, specificity = hits / firing, (~yes & ~truth).sum() / (~truth).sum()
    precision = hits / called if called else math.nan
    return {
        "precision": (precision, called),
        "recall": (recall, firing),
        "f1": (2 * hits / (called + firing), n),
        "specificity": (specificity, n - firing),
        "balanced_accuracy": ((recall + specificity) / 2, n),
        "pearson": (float(np.corrcoef(yes, activation)[0, 1]) if 0 < called < n else math.nan, n),
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("setting", ["plain", "kept BOS", "packed", "positions left out"])
def test_figures_are_those_of_a_loop_over_all_windows(make_store: Callable[..., Any], name: str, setting: str) -> None:
    options: dict[str, dict[str, Any]] = {"packed": {"packed": True}, "positions left out": {"excluded": 0.02}}
    data = made(make_store, **options.get(setting, {}))
    found = views(data, keep_bos=setting == "kept BOS")
    assert len(found) == 3
    for view in found:
        here, expected = scores(view, RULES[name]), by_hand(view, RULES[name])
        assert set(here) == FIGURES
        for metric, (value, n) in expected.items():
            score = here[metric]
            assert score.value == pytest.approx(value, nan_ok=True)
            assert score.low == pytest.approx(score.high, nan_ok=True)
            assert (score.n_total, score.n_failed, score.method, score.scorer) == (n, 0, EXACT, "execution")
        frame_of = FrameCounts.of(view.examples)
        assert (frame_of.windows, frame_of.firing) == (expected["f1"][1], expected["recall"][1])


def test_latents_of_one_call_are_measured_in_the_frame_of_each(make_store: Callable[..., Any]) -> None:
    data = made(make_store)
    first, other = views(data), views(data, keep_bos=True)
    rule = RULES["a word"]
    mixed = [first[0], other[1], other[2]]
    scorings = list(ExecutionScorer(baselines=False).score([(explanation(v, rule), v) for v in mixed]))
    for view, scoring in zip(mixed, scorings, strict=True):
        assert {s.metric: s for s in scoring.scores if s.metric.startswith("window_")} == {
            f"window_{metric}": score for metric, score in scores(view, rule).items()
        }
    assert scores(first[1], rule)["recall"].n_total != scores(other[1], rule)["recall"].n_total


def test_windows_are_prepared_once_for_all_blocks(
    make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of, original = [], TestWindows.of

    def counting(*args: Any) -> TestWindows:
        made_of.append(args[1:])
        return original(*args)

    monkeypatch.setattr(TestWindows, "of", counting)
    scorer = ExecutionScorer(baselines=False)
    for view in views(made(make_store)):
        list(scorer.score([(explanation(view, RULES["a word"]), view)]))
    assert made_of == [(WINDOW, 4, False)]


def test_a_latent_that_fires_in_no_window_has_no_figures_and_undefined_ones_are_nan() -> None:
    latent = LatentId(coder="c", index=0)
    assert window_scores(latent, None) == ()
    silent = WindowMetrics(n_windows=10, n_firing=10, n_called=0, n_hits=0, pearson=math.nan)
    found = {s.metric: s.value for s in window_scores(latent, silent)}
    assert (found["window_recall"], found["window_f1"]) == (0.0, 0.0)
    for metric in ("precision", "specificity", "balanced_accuracy", "pearson"):
        assert math.isnan(found[f"window_{metric}"])


def test_they_can_be_left_out(make_store: Callable[..., Any]) -> None:
    view = views(made(make_store))[0]
    scorer = ExecutionScorer(baselines=False, windows=False)
    (scoring,) = scorer.score([(explanation(view, RULES["a word"]), view)])
    assert scoring.scores
    assert not [s for s in scoring.scores if s.metric.startswith("window_")]


def test_a_latent_that_always_fires_has_no_figures_of_either_kind(
    make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first metric that a scorer stores is its headline: a latent must not have the later ones alone."""
    view = views(made(make_store))[0]
    data: Any = view.data
    monkeypatch.setattr("exegete.scorers.execution.evaluate_many", lambda rules, *_, **__: [None] * len(rules))
    (tiled,) = (TestWindows.of(data, WINDOW, 4, False).measure([RULES["a word"]], [view.latent.index]),)
    assert tiled[0] is not None
    (scoring,) = ExecutionScorer(baselines=False).score([(explanation(view, RULES["a word"]), view)])
    assert scoring.scores == ()
