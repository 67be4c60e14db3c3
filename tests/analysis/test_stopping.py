"""What came of judging only as much as needed: decisions and costs, in text, in the report, from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from exegete.analysis.stopping import stopped
from exegete.analysis.summary import summarise, table_text
from exegete.analysis.text import PLUMBING, stopped_text
from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, LatentId, Score

CODER = "layers.3"
DECIDED = (
    {"judgements": 20, "pairs": 10, "rounds": 1, "certified": True, "fixed_test": 98},
    {"judgements": 30, "pairs": 15, "rounds": 2, "certified": False, "fixed_test": 98},
    {"judgements": 146, "pairs": 73, "rounds": 9, "certified": None, "fixed_test": 98},
)
NARROWED = (
    {"judgements": 120, "pairs": 60, "rounds": 7, "half_width": 0.09, "fixed_width": 60},
    {"judgements": 200, "pairs": 100, "rounds": 9, "half_width": 0.12, "fixed_width": 80},
    {"judgements": 10, "pairs": 0, "rounds": 1, "half_width": None, "fixed_width": None},
)


def store(
    results: Results,
    key: str,
    details: tuple[Mapping[str, Any], ...],
    args: Mapping[str, Any],
    *,
    scorer: str = "detection",
    plumbing: bool = False,
) -> None:
    judge = "simulated" if plumbing else "rule"
    results.add_stage(
        key, scorer, {"explain": "explained", "judge": judge, "scorer": {"name": scorer, "args": dict(args)}}
    )
    for index, detail in enumerate(details):
        latent = LatentId(coder=CODER, index=index)
        explanation = Explanation(latent=latent, text="t", status="ok", explainer={"name": "rule"})
        score = Score(
            latent=latent,
            scorer=scorer,
            metric="balanced_accuracy",
            value=0.8,
            low=0.7,
            high=0.9,
            method="m",
            n_total=int(detail.get("judgements", 200)),
            n_scored=int(detail.get("judgements", 200)),
            n_failed=0,
            flags=("plumbing",) if plumbing else (),
        )
        found = Scoring(explanation=explanation, scores=(score,), judgements={}, detail=detail)
        results.add_scoring(found, key, results.add_explanation(explanation, "explained"), scorer=scorer)


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    with Results.open(tmp_path / "results.db") as made:
        yield made


def test_decisions_and_judgements_are_counted_beside_the_fixed_test(results: Results) -> None:
    store(results, "k", DECIDED, {"certify": 0.8, "margin": 0.15, "stop_when": None})
    (found,) = stopped(results)
    assert (found.coder, found.scorer, found.judge, found.plumbing) == (CODER, "detection", "executed rule", False)
    assert [one.certified for one in found.latents] == [True, False, None]
    assert found.decisions == (1, 1, 1)
    assert (found.judgements, found.fixed_test) == (196, 294)
    text = stopped_text([found])
    assert "1 at least 0.8, 1 at most 0.65, 1 undecided" in text
    assert "196 judgements, 33.3 % fewer than the 294 of a fixed test of equal errors" in text
    assert "±" not in text


def test_a_test_that_cost_more_says_so(results: Results) -> None:
    store(results, "k", DECIDED[2:], {"certify": 0.8, "margin": 0.15, "stop_when": None})
    assert "146 judgements, 49.0 % more than the 98" in stopped_text(stopped(results))


def test_the_cost_of_an_interval_stands_beside_a_fixed_number_and_no_saving_is_claimed(results: Results) -> None:
    store(results, "k", NARROWED, {"certify": None, "margin": 0.15, "stop_when": 0.1})
    (found,) = stopped(results)
    assert found.narrow == 1
    assert found.judgements == 330
    assert found.fixed_width == (320, 140)  # the latent without an interval has no width to compare
    text = stopped_text([found])
    assert "1 with an interval within ±0.1" in text
    assert "320 judgements; numbers fixed beforehand take 140 for the same widths" in text
    assert "fewer" not in text


def test_what_judged_all_windows_is_left_out_and_only_the_newest_counts(results: Results) -> None:
    sequential = {"certify": 0.8, "margin": 0.15, "stop_when": None}
    store(results, "first", DECIDED, sequential)
    store(results, "fuzz", DECIDED[:1], sequential, scorer="fuzzing")
    store(results, "later", ({}, {}, {}), {"certify": None, "margin": 0.15, "stop_when": None})
    assert [one.scorer for one in stopped(results)] == ["fuzzing"]
    assert stopped(results, CODER, scorer="detection") == ()
    assert stopped(results, "another") == ()
    assert stopped_text(()) == ""


def test_plumbing_checks_stand_apart_and_are_marked(results: Results) -> None:
    sequential = {"certify": 0.8, "margin": 0.15, "stop_when": None}
    store(results, "simulated", DECIDED[:1], sequential, plumbing=True)
    store(results, "measured", DECIDED[1:], sequential)
    measured, check = stopped(results)
    assert (measured.plumbing, check.plumbing) == (False, True)
    assert [one.index for one in measured.latents] == [0, 1]
    first, second = stopped_text([measured]), stopped_text([check])
    assert PLUMBING not in first
    assert PLUMBING in second
    text = table_text(summarise(results))
    assert text.index(first) < text.index(second)
