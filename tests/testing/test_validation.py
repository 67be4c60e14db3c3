from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from exegete.errors import InputError, NotFoundError
from exegete.llm.scripted import Evidence
from exegete.metrics import wilson
from exegete.testing import Validation, World, validate, validation_lines, validation_page
from exegete.testing.faults import FAULTS
from exegete.testing.figures import Share, bias_of, coverage_of, needed, ordering_of, passes, sanity_of
from exegete.testing.gaps import Gaps
from exegete.testing.latents import RUNGS
from exegete.testing.settings import Round
from exegete.testing.validation import INSTRUMENTS, Examined, Trials, instruments_of

SCORERS = [
    "detection", "embedding", "example_embedding", "simulation", "intruder", "intervention", "generation",
    "discrimination",
]  # fmt: skip
NAMES = [
    "detection", "detection P(yes)", "embedding", "example_embedding", "simulation all at once",
    "simulation whole window", "intruder", "intruder_internal", "intruder_decile", "intervention_tokens",
    "intervention", "generation", "discrimination",
]  # fmt: skip


@pytest.fixture(scope="module")
def validation(world: World) -> Validation:
    return validate(SCORERS, n=50, rounds=1, seed=3, world=world)


def test_every_scorer_is_examined(validation: Validation) -> None:
    assert [one.name for one in validation.examined] == NAMES
    assert set(INSTRUMENTS) == {*SCORERS, "fuzzing", "surprisal"}
    for one in validation.examined:
        assert [trials.n for trials in one.trials] == [12, 25, 50]
        assert one.full.value.shape == one.full.expected.shape
        assert not (one.explained and np.isnan(one.full.expected[:, : len(RUNGS)]).any())


def test_scores_are_what_they_must_be(validation: Validation) -> None:
    # Few latents and one draw: bounds so wide that only a wrong truth, or a wrong scorer, is outside them.
    for one in validation.examined:
        bias, held = bias_of(one.full), coverage_of(one.full)
        assert abs(bias.value) < max(5 * bias.error, 0.05), one.name
        assert held.value > 0.7, one.name


@pytest.mark.parametrize("name", ["fuzzing", "surprisal"])
def test_the_others_too(world: World, name: str) -> None:
    made = Round(world, 1, 30).only(4)
    for one in instruments_of([name], Evidence()):
        said = one.measured(made, ("exact", "half"), 1)
        for setting in made.settings:
            known = one.known(setting, ("exact", "half"), 400, np.random.default_rng(0))
            assert known.drawn.mean(axis=0) == pytest.approx(known.expected, abs=0.02)
            for rung, expected in zip(("exact", "half"), known.expected, strict=True):
                score = said[setting.latent, rung][one.headline]
                assert abs(score.value - expected) < 0.2
                assert score.scorer.startswith(name)


def test_far_rungs_are_ordered_rightly(validation: Validation) -> None:
    for one in validation.examined:
        found = ordering_of(one, one.full) if one.explained else None
        if found is not None and found.right.n:
            assert found.right.value > 0.9, one.name
            assert abs(found.predicted - found.right.value) < 0.08, one.name


def test_halving_a_label_lowers_accuracy_and_all_latents_reach_the_gap_on_hard_windows(validation: Validation) -> None:
    detection = validation.examined[0].full
    assert sanity_of(detection, "balanced_accuracy")["missing"].share.value > 0.9
    share, n = validation.gaps.reached("same token or neighbour", "broad")
    assert (share, n) >= (0.8, 8)
    assert validation.gaps.reached("random", "broad")[0] < share


def test_the_page_holds_every_table_and_instrument(validation: Validation) -> None:
    page, lines = validation_page(validation), validation_lines(validation)
    for name in NAMES:
        assert f"| {name} |" in page
        assert any(line.startswith(name) for line in lines)
    titles = (
        "Bias and coverage",
        "Order of the ladder",
        "Power",
        "Sanity checks",
        "Hard negatives",
        "Every pair of rungs",
    )
    for title in (*titles, "Faults"):
        assert f"## {title}" in page
    assert "token set, n-gram" in page
    assert all(name in page for name in FAULTS)
    assert "nan" not in page


def test_a_judge_at_chance_has_no_gap(world: World) -> None:
    found = validate(["detection"], n=20, rounds=1, world=world, evidence=Evidence(true_positive_rate=0.5,
                     false_positive_rate=0.5))  # fmt: skip
    plain = found.examined[0]
    assert np.abs(plain.full.expected - 0.5).max() < 1e-12
    assert ordering_of(plain, plain.full).right.n == 0
    assert "–" in validation_page(found)


def test_what_makes_no_testbed_is_refused(world: World) -> None:
    with pytest.raises(NotFoundError, match="detecton"):
        validate(["detecton"], world=world)
    with pytest.raises(InputError, match="10 windows"):
        validate(["detection"], n=5, world=world)
    with pytest.raises(InputError, match="name the scorers"):
        validate([], world=world)


# -- figures ----------------------------------------------------------------------------------------------------------


def trials(expected: list[list[float]], value: list[list[float]], power: float = 0.7) -> Trials:
    e, v = np.array(expected), np.array(value)
    half = np.full((len(e), 6, 6), 0.5)
    upper = np.triu(np.ones((6, 6), bool), 1)
    half[:, upper] = power
    half[:, upper.T] = 1 - power
    return Trials(n=100, rungs=RUNGS, expected=e, value=v, low=v - 0.05, high=v + 0.05, power=half, metrics={"m": v})


def test_bias_and_coverage_by_hand() -> None:
    found = trials([[0.9] * 6, [0.5] * 6], [[0.94] * 6, [0.5, 0.5, 0.5, 0.5, 0.5, 0.44]])
    bias = bias_of(found)
    means = [0.04, -0.01]
    assert bias.value == pytest.approx(np.mean(means))
    assert bias.error == pytest.approx(np.std(means, ddof=1) / np.sqrt(2))
    held = coverage_of(found)
    assert (held.value, held.n) == pytest.approx((11 / 12, 12))
    assert (held.low, held.high) == (wilson(11, 12).low, wilson(11, 12).high)


def test_order_by_hand() -> None:
    # exact and broad lie 0.05 apart, all others far from them and equal
    truth = [[0.9, 0.85, 0.5, 0.5, 0.5, 0.5]] * 2
    said = [[0.8, 0.9, 0.5, 0.4, 0.4, 0.4], [0.9, 0.8, 0.9, 0.4, 0.4, 0.4]]
    one = Examined(name="x", headline="m", gap=0.08, explained=True, trials=(trials(truth, said),))
    found = ordering_of(one, one.full)
    assert found.right.n == 16  # exact and broad against four others, in two latents
    assert found.right.value == pytest.approx((8 + 6.5) / 16)  # a tie with exact, and broad below narrow
    pairs = {(first, second): (share.value, predicted) for first, second, share, predicted in found.pairs}
    assert len(pairs) == 8
    assert pairs["broad", "narrow"] == pytest.approx((0.5, 0.7))
    assert pairs["exact", "narrow"] == pytest.approx((0.75, 0.7))
    assert (found.near.n, found.near.value, found.near_predicted) == pytest.approx((2, 0.5, 0.7))
    assert found.deviation == pytest.approx((-0.7 + 0.3) / np.hypot(0.7, 0.3))


def test_sanity_by_hand() -> None:
    plain = trials([[0.9] * 6] * 2, [[0.9] * 6] * 2)
    damaged = replace(
        plain,
        rungs=(*RUNGS, "missing", "extra"),
        metrics={"m": np.array([[0.9] * 6 + [0.7, 0.9], [0.8] * 6 + [0.7, 0.7]])},
    )
    found = sanity_of(damaged, "m")
    assert (found["missing"].share.value, found["extra"].share.value) == (1.0, 0.5)
    assert (found["missing"].mean, found["extra"].mean) == pytest.approx((0.15, 0.05))
    assert not passes(found)


def test_the_number_of_windows_that_a_check_needs() -> None:
    plain = trials([[0.9] * 6] * 2, [[0.9] * 6] * 2)
    power = np.full((2, 8, 8), 0.5)
    power[:, 0, 6], power[:, 0, 7] = 0.8, 0.5
    damaged = replace(plain, rungs=(*RUNGS, "missing", "extra"), expected=np.full((2, 8), 0.9), power=power)
    # Φ⁻¹(0.8) = 0.84 has to become Φ⁻¹(0.9) = 1.28: (1.28 / 0.84)² as many
    assert needed(damaged, "missing") == pytest.approx(100 * (1.28155 / 0.84162) ** 2, rel=0.03)
    assert needed(damaged, "extra") == np.inf


def test_a_goal_within_the_interval_is_open() -> None:
    assert (wilson(72, 72).low, wilson(73, 73).low) == pytest.approx((0.9494, 0.95), abs=1e-4)
    assert [Share.of(n, n).verdict(0.95) for n in (13, 72, 74)] == ["open", "open", "met"]
    assert Share.of(80, 100).verdict(0.95) == "not met"


def test_intervals_without_width_are_not_counted() -> None:
    found = trials([[0.9] * 6], [[0.9] * 6])
    low = found.value - np.array([0.1, 0.1, 0, 0, 0, 0])
    assert coverage_of(replace(found, low=low, high=found.value)).n == 2


def test_gaps_count_latents_that_have_such_windows() -> None:
    gaps = Gaps(
        judged={"random": np.array([[0.1, 0, 0, 0, 0], [0.02, 0, 0, 0, 0], [np.nan] * 5])},
        told=np.array([[0.5, 0, 0, 0, 0], [0.4, 0, 0, 0, 0], [0.1, 0, 0, 0, 0]]),
        wanted=0.37,
    )
    assert gaps.reached("random", "broad") == (0.5, 2)
    assert gaps.told_apart("broad") == pytest.approx((2 / 3, 3))
    assert gaps.added("random", "broad") == (1.0, 1)
