from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exegete import metrics
from exegete.errors import ConfigError
from exegete.metrics import Interval, Observed
from exegete.scorers.controls import (
    CONTROLS,
    by_control,
    control_score,
    lift_score,
    named_controls,
    over_donors,
    panel,
    score_of,
    shuffled_text,
)
from exegete.scorers.scorer import scorers
from exegete.types import Explanation, LatentId
from exegete.views import Donor

LATENT = LatentId(coder="c", index=3)
TEXT = "names of rivers that stand after a verb"


def interval(value: float, **more: Any) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.1, method="m", n=10, **more)


def observed(truth: list[bool], said: list[int], documents: list[int] | None = None) -> Observed:
    n = len(truth)
    return Observed(
        truth=np.array(truth),
        prediction=np.array(said, np.int8),
        score=np.full(n, np.nan),
        stratum=np.zeros(n, np.int8),
        document=np.array(documents or range(n), np.int64),
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64),
        activation=np.zeros(n),
    )


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", CONTROLS),
        ("none", ()),
        ([], ()),
        ("empty", ("empty",)),
        ("empty+other_latent", ("empty", "other_latent")),
        (["shuffled_words", "empty"], ("shuffled_words", "empty")),
    ],
)
def test_controls_are_named_one_by_one_or_all_at_once(given: Any, expected: tuple[str, ...]) -> None:
    assert named_controls(given) == expected


@pytest.mark.parametrize("given", ["best", "", ["empty", "empty"], "empty+", ["other_latent", "x"]])
def test_other_names_are_refused_with_what_is_allowed(given: Any) -> None:
    with pytest.raises(ConfigError, match="other_latent, shuffled_words, empty"):
        named_controls(given)


# -- what is judged ---------------------------------------------------------------------------------------------------


def test_a_panel_has_donors_by_rank_then_the_own_words_shuffled_then_nothing(world: Any) -> None:
    view, own = world.view(3), world.explanation(3, text=TEXT)
    failed = Explanation(latent=LatentId(coder="c", index=9), text=None, status="failed", explainer={})
    donors = (
        Donor(explanation=world.explanation(7), rank=2),
        Donor(explanation=failed, rank=0),
        Donor(explanation=world.explanation(5), rank=1),
    )
    asked = panel(own, dataclasses.replace(view, donors=donors), CONTROLS)
    assert [name for name, _ in asked] == ["other_latent", "other_latent", "shuffled_words", "empty"]
    assert [e.latent.index for _, e in asked] == [5, 7, 3, 3]
    shuffled, empty = asked[2][1], asked[3][1]
    assert shuffled.text is not None
    assert sorted(shuffled.text.split()) == sorted(TEXT.split())
    assert shuffled.text != TEXT
    assert (empty.text, empty.status) == ("", "ok")
    assert shuffled.program is empty.program is None


def test_an_executed_judge_takes_donors_with_a_program_alone(world: Any) -> None:
    donors = tuple(Donor(explanation=world.explanation(w, program=w != 6), rank=i) for i, w in enumerate((5, 6, 7)))
    view = dataclasses.replace(world.view(3), donors=donors)
    asked = panel(world.explanation(3), view, CONTROLS, takes=lambda e: e.program is not None)
    assert [(name, e.latent.index) for name, e in asked] == [("other_latent", 5), ("other_latent", 7)]


def test_only_what_was_asked_for_is_in_a_panel(world: Any) -> None:
    view = world.view(3, donors=(5, 6))
    assert panel(world.explanation(3), view, ()) == []
    assert [name for name, _ in panel(world.explanation(3), view, ("empty",))] == ["empty"]


def test_words_are_shuffled_by_the_latents_own_stream_and_never_left_as_they_were() -> None:
    assert shuffled_text(TEXT, 0, LATENT) == shuffled_text(TEXT, 0, LATENT)
    orders = {shuffled_text(TEXT, seed, LatentId(coder="c", index=i)) for seed in range(3) for i in range(5)}
    assert len(orders) > 10
    assert all(shuffled_text("one two", seed, LATENT) == "two one" for seed in range(20))
    assert shuffled_text("a  a\na", 0, LATENT) == "a  a\na"


def test_a_text_that_shuffling_cannot_change_is_no_control(world: Any) -> None:
    for text in ("rivers", "very very", ""):
        assert panel(world.explanation(3, text=text or " "), world.view(3), ("shuffled_words",)) == []


def test_answers_are_sorted_by_control_and_missing_donors_are_told() -> None:
    own = Explanation(latent=LATENT, text="x", status="ok", explainer={})
    asked = [("other_latent", own), ("empty", own), ("other_latent", own)]
    assert by_control(("other_latent", "shuffled_words", "empty"), asked, [1, 2, 3]) == {
        "other_latent": [1, 3],
        "empty": [2],
    }
    assert by_control(("other_latent", "empty"), [], []) == {"other_latent": []}


# -- scores -----------------------------------------------------------------------------------------------------------


def test_a_score_carries_all_that_its_interval_says() -> None:
    given = interval(0.5, floor=0.2, ceiling=0.9, n_documents=12, flags=("few_documents",), n_needed=700)
    score = score_of(LATENT, "detection", "f1", given, 40, 30, "empty")
    assert (score.value, score.low, score.high, score.floor, score.ceiling) == (0.5, 0.4, 0.6, 0.2, 0.9)
    assert (score.method, score.n_documents, score.flags, score.n_needed) == ("m", 12, ("few_documents",), 700)
    assert (score.n_total, score.n_scored, score.n_failed, score.control) == (40, 30, 10, "empty")


def test_the_null_is_the_mean_over_donors_with_students_interval_within_bounds() -> None:
    values = [0.55, 0.4, 0.6]
    found = over_donors([*map(interval, values), Interval(value=math.nan, low=math.nan, high=math.nan, method="", n=0)])
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found.value == pytest.approx(np.mean(values))
    assert [found.low, found.high] == pytest.approx([low, high])
    assert (found.method, found.n) == ("t over 3 donors", 3)
    wide = over_donors([interval(-2.0), interval(2.0)], (-3.0, 3.0))
    assert (wide.low, wide.value, wide.high) == (-3.0, 0.0, 3.0)


def test_what_donors_failed_to_answer_widens_the_null() -> None:
    found = over_donors([interval(0.5, floor=0.0, ceiling=1.0), interval(0.52, floor=0.1, ceiling=0.9)], (0.0, 1.0))
    assert found.floor <= 0.05
    assert found.ceiling >= 0.95


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan]])
def test_fewer_than_two_donors_make_no_null_and_say_so(values: list[float]) -> None:
    given = [Interval(value=v, low=v, high=v, method="m", n=1) for v in values]
    score = control_score(LATENT, "fuzzing", "f1", "other_latent", given, n_total=20, n_scored=18)
    assert math.isnan(score.value)
    assert score.method == f"too few donors: {min(len(values), 1)} of at least 2"
    assert score.flags == ("few_donors",)
    assert (score.n_total, score.n_failed) == (20, 2)


def test_a_control_of_one_explanation_keeps_its_own_interval() -> None:
    score = control_score(LATENT, "fuzzing", "f1", "empty", [interval(0.5)], n_total=10, n_scored=10)
    assert (score.value, score.low, score.high, score.method, score.control) == (0.5, 0.4, 0.6, "m", "empty")


def test_the_lift_is_the_own_metric_less_the_mean_of_the_control_on_the_same_windows() -> None:
    truth = [True] * 30 + [False] * 30
    own = observed(truth, [1] * 27 + [0] * 30 + [1] * 3)
    others = [observed(truth, [1] * 15 + [0] * 15 + [1] * k + [0] * (30 - k)) for k in (12, 18)]
    score = lift_score(LATENT, "detection", "balanced_accuracy", "other_latent", own, others)
    expected = metrics.paired(own, others, "balanced_accuracy")
    assert score.metric == "balanced_accuracy_lift"
    assert score.value == pytest.approx(0.9 - 0.5)
    assert (score.low, score.high, score.method) == (expected.low, expected.high, expected.method)
    assert 0.0 < score.low < score.value < score.high
    assert (score.n_total, score.n_scored, score.control) == (60, 60, "other_latent")


def test_a_lift_over_too_few_donors_is_flagged_and_over_none_undefined() -> None:
    truth = [True] * 30 + [False] * 30
    own = observed(truth, [1] * 30 + [0] * 30)
    one = lift_score(LATENT, "detection", "f1", "other_latent", own, [observed(truth, [1] * 60)])
    assert "few_donors" in one.flags
    assert one.value == pytest.approx(1.0 - 2 / 3)
    none = lift_score(LATENT, "detection", "f1", "other_latent", own, [])
    assert math.isnan(none.value)
    assert (none.n_total, none.n_scored, none.n_failed) == (0, 0, 0)  # nothing has failed
    assert "few_donors" in none.flags


@pytest.mark.parametrize("controls", ["none", "all", "other_latent", "shuffled_words+empty"])
@pytest.mark.parametrize(
    "name",
    ["detection", "fuzzing", "discrimination", "surprisal", "embedding", "simulation", "generation", "intervention"],
)
def test_donors_are_needed_where_other_latents_are_the_null(name: str, controls: str) -> None:
    scorer = scorers.make(name, {"controls": controls})
    assert ("donors" in scorer.needs) == (controls in ("all", "other_latent"))


def test_no_donors_are_needed_where_none_is_asked() -> None:
    for name in ("surprisal", "simulation", "generation", "example_embedding"):
        assert "donors" in scorers.make(name, {"donors": 1}).needs
        assert "donors" not in scorers.make(name, {"donors": 0}).needs
