from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient, SimulatedJudge
from exegete.scorers.fuzzing import FuzzingScorer, misplaced_marks
from exegete.scorers.scorer import Scoring
from exegete.types import SPLITS, Score
from exegete.views import LatentView

ACTIVE = FuzzingScorer(kind="active", threshold=0.0)


def one(view: LatentView, explanation: Any, **options: Any) -> Scoring:
    (scoring,) = FuzzingScorer(kind="active", **options).score([(explanation, view)])
    return scoring


def pick(scoring: Scoring, metric: str, control: str = "none") -> Score:
    (found,) = [s for s in scoring.scores if s.metric == metric and s.control == control]
    return found


def test_half_of_the_firing_windows_carry_their_marks_and_half_as_many_where_the_latent_is_silent(world: Any) -> None:
    view = world.view(3, n_fire=60, n_silent=40)
    questions = ACTIVE.questions(view)
    fired = view.examples.part("test", fires=True)
    assert sorted(q.example.row for q in questions) == sorted(fired.row.tolist())
    assert sum(q.truth for q in questions) == 30
    for q in questions:
        marks, fires = q.item.marks, q.example.activations > 0
        assert marks is not None
        assert marks.sum() == fires.sum()
        assert np.array_equal(marks, fires) if q.truth else not (marks & fires).any()


def test_marks_are_those_above_the_threshold_and_wrong_ones_never_lie_on_weak_firings(world: Any) -> None:
    view = world.view(3, n_fire=60)
    for q in FuzzingScorer(kind="active", threshold=0.9).questions(view):
        marks, values = q.item.marks, q.example.activations
        assert marks is not None
        strong = values > 0.9 * values.max()
        assert marks.sum() == strong.sum()
        assert np.array_equal(marks, strong) if q.truth else not (marks & (values > 0)).any()


def test_both_halves_are_of_all_strata_and_drawn_by_the_seed(world: Any) -> None:
    view = world.view(3, n_fire=60)
    windows = view.examples.windows
    stratum = np.where(windows.fires, np.arange(len(windows)) % 10, windows.stratum).astype(np.int8)
    view = dataclasses.replace(view, examples=dataclasses.replace(
        view.examples, examples=dataclasses.replace(windows, stratum=stratum)))  # fmt: skip
    asked = ACTIVE.asked(view)
    for decile in range(10):
        here = asked.examples.stratum == decile
        assert abs(int(asked.truth[here].sum()) * 2 - int(here.sum())) <= 1
    again = ACTIVE.asked(view)
    assert np.array_equal(again.truth, asked.truth)
    assert again.items.marks is not None
    assert asked.items.marks is not None
    assert np.array_equal(again.items.marks, asked.items.marks)
    other = ACTIVE.asked(dataclasses.replace(view, examples=dataclasses.replace(view.examples, seed=9)))
    at = dict(zip(other.examples.row.tolist(), other.truth.tolist(), strict=True))
    assert [at[row] for row in asked.examples.row.tolist()] != asked.truth.tolist()


def test_windows_that_fire_too_densely_are_in_neither_half(world: Any) -> None:
    view = world.view(3, n_fire=20)
    windows = view.examples.windows
    values = windows.activations.copy()
    dense = np.flatnonzero(windows.fires & (windows.split == SPLITS.index("test")))[:3]
    values[dense] = 1.0
    values[dense[0], 0] = 0.0  # one silent token for eleven marks
    changed = dataclasses.replace(view.examples, examples=dataclasses.replace(windows, activations=values))
    asked = ACTIVE.asked(dataclasses.replace(view, examples=changed))
    assert len(asked) == 17
    assert not set(windows.row[dense].tolist()) & set(asked.examples.row.tolist())


def test_special_tokens_carry_no_wrong_mark(world: Any) -> None:
    view = world.view(3, n_fire=40)
    windows = view.examples.windows
    tokens = windows.tokens.copy()
    tokens[windows.activations == 0] = 0
    tokens[:, -4:] = np.where(windows.activations[:, -4:] == 0, 7, tokens[:, -4:])
    changed = dataclasses.replace(view.examples, examples=dataclasses.replace(windows, tokens=tokens))
    for q in ACTIVE.questions(dataclasses.replace(view, examples=changed)):
        assert q.item.marks is not None
        if not q.truth:
            assert (q.item.tokens[q.item.marks] == 7).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_wrong_marks_are_as_many_and_all_where_free(n: int, window: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fires = rng.random((n, window)) < rng.uniform(0.05, 0.6)
    free = ~fires & (rng.random((n, window)) < 0.9)
    patterns = fires & (np.cumsum(fires, axis=1) <= free.sum(axis=1, keepdims=True))
    wrong = misplaced_marks(patterns, free, rng)
    assert (wrong.sum(axis=1) == patterns.sum(axis=1)).all()
    assert not (wrong & ~free).any()


def test_wrong_marks_stand_at_the_offsets_of_true_ones() -> None:
    rng = np.random.default_rng(0)
    n, window = 2000, 20
    patterns = np.zeros((n, window), bool)
    chances = np.linspace(1, 5, window) / np.linspace(1, 5, window).sum()  # the latent fires late in a window
    for row in patterns:
        row[rng.choice(window, rng.integers(1, 4), replace=False, p=chances)] = True
    wrong = misplaced_marks(patterns, ~patterns, rng)
    assert np.abs(wrong.mean(axis=0) - patterns.mean(axis=0)).max() < 0.03
    runs = [((marks[:, 1:] & marks[:, :-1]).sum() / n) for marks in (patterns, wrong)]
    assert abs(runs[0] - runs[1]) < 0.05


def test_the_right_rule_scores_1_under_its_own_name_and_extends_to_no_frame(world: Any) -> None:
    scoring = one(world.view(3, donors=(5, 6, 7), n_fire=60), world.explanation(3))
    assert pick(scoring, "balanced_accuracy").value == 1.0
    assert {s.scorer for s in scoring.scores} == {"fuzzing_active"}
    assert not [s for s in scoring.scores if s.metric.startswith("population_")]
    assert pick(scoring, "sensitivity", "other_latent").value == 0.0
    null = pick(scoring, "balanced_accuracy", "other_latent").value
    assert pick(scoring, "balanced_accuracy_lift", "other_latent").value == pytest.approx(1.0 - null)
    for j in scoring.judgements["none"]:
        assert (j.activation > 0) == j.truth == j.prediction
    assert FuzzingScorer(kind="active").spec["name"] == "fuzzing"
    assert FuzzingScorer().label == "fuzzing"


def test_an_explanation_of_the_wrong_tokens_in_the_right_windows_is_found_out(world: Any) -> None:
    """Latent 3 always fires beside the word 30: detection and default fuzzing cannot tell, active marks can."""
    view = world.view(3, n_fire=60)
    windows = view.examples.windows
    tokens = np.where(windows.tokens == 30, 29, windows.tokens)
    for row, fires in zip(tokens, windows.activations > 0, strict=True):
        if fires.any():
            row[np.flatnonzero(~fires)[0]] = 30
    changed = dataclasses.replace(view.examples, examples=dataclasses.replace(windows, tokens=tokens))
    scoring = one(dataclasses.replace(view, examples=changed), world.explanation(30), controls="none")
    assert pick(scoring, "sensitivity").value == 0.0
    assert pick(scoring, "specificity").value > 0.5


def test_a_judge_of_known_rates_gives_the_balanced_accuracy_of_theory(world: Any) -> None:
    judge = SimulatedJudge(world.table, true_positive_rate=0.85, false_positive_rate=0.25, seed=4)
    view = dataclasses.replace(world.view(3, n_fire=300), llm=judge)
    scoring = one(view, world.explanation(3), controls="none", per_request=4)
    score = pick(scoring, "balanced_accuracy")
    assert score.low <= 0.8 <= score.high
    assert {read_question(r.messages).kind for r in judge.requests} == {"fuzzing"}
    assert len(judge.requests) == 75


def test_no_request_tells_by_its_order_which_windows_are_right(world: Any) -> None:
    client = ScriptedClient(lambda r: str([1] * len(read_question(r.messages).excerpts)))
    view = dataclasses.replace(world.view(3, n_fire=100), llm=client)
    truth = FuzzingScorer(kind="active").asked(view).truth
    runs = 1 + int((truth[1:] != truth[:-1]).sum())
    assert 36 < runs < 67
