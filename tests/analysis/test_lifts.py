from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exegete.analysis.across import retests
from exegete.analysis.lifts import items_of
from exegete.analysis.shapes import LLMLift
from exegete.analysis.summary import summarise
from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, LatentId, Score

CODER, JUDGE = "c", "http://host/v1#judge"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "results.db")


def explained(results: Results, name: str, n: int = 4, select: str = "drawn") -> list[int]:
    results.add_stage(name, "explain", {"select": select, "explainer": {"name": name}})
    program: dict[str, Any] | None = {"clauses": []} if name == "rule" else None
    made = [
        Explanation(
            latent=LatentId(coder=CODER, index=i), text="t", status="ok", explainer={"name": name}, program=program
        )
        for i in range(n)
    ]
    return [results.add_explanation(one, name) for one in made]


def judged(
    results: Results,
    explainer: str,
    ids: list[int],
    values: list[float],
    *,
    judge: str,
    scorer: str = "fuzzing",
    failed: int = 0,
    first: int = 0,
    detail: Any = None,
    plumbing: bool = False,
    **args: Any,
) -> None:
    name = scorer.partition("_")[0]
    spec = {"explain": explainer, "judge": judge, "scorer": {"name": name, "args": {"judge": "auto", **args}}}
    key = f"{explainer} {scorer} {judge} {sorted(args.items())} {plumbing}"
    results.add_stage(key, scorer, spec)
    for i, value in enumerate(values, first):
        latent = LatentId(coder=CODER, index=i)
        found = Score(
            latent=latent, scorer=scorer, metric="balanced_accuracy", value=value, low=value, high=value, method="m",
            n_total=10, n_scored=10 - failed, n_failed=failed, flags=("plumbing",) if plumbing else (),
        )  # fmt: skip
        explanation = Explanation(latent=latent, text="t", status="ok", explainer={})
        scoring = Scoring(explanation=explanation, scores=(found,), judgements={}, detail=detail or {})
        results.add_scoring(scoring, key, ids[i], scorer=scorer)


def lifts(results: Results) -> tuple[LLMLift, ...]:
    return summarise(results).llm_lifts


def test_a_lift_is_over_rules_asked_about_the_same_items_by_the_same_judge_and_executed(results: Results) -> None:
    rule, text = explained(results, "rule"), explained(results, "default")
    judged(results, "rule", rule, [0.6, 0.6, 0.5, 0.5], judge=JUDGE, threshold=0.3, per_request=1)
    judged(results, "rule", rule, [0.9, 0.9, 0.9], judge="rule", threshold=0.3)
    judged(results, "default", text, [0.8, 0.9, 0.8, 0.9], judge=JUDGE, threshold=0.3, per_request=5)
    (found,) = lifts(results)
    assert found.over_english is not None
    assert found.over_rule is not None
    assert (found.explainer, found.judge, found.n) == ("default", "judge", 4)
    assert found.over_english.value == pytest.approx(0.3)
    assert (found.over_english.n, found.over_rule.n) == (4, 3)
    assert found.over_rule.value == pytest.approx((0.8 + 0.9 + 0.8) / 3 - 0.9)
    assert (found.n_unlike, found.n_partial) == (0, 0)


@pytest.mark.parametrize(
    "other", [{"threshold": 0.0}, {"threshold": 0.3, "certify": 0.8, "margin": 0.15}, {"threshold": 0.3, "kind": "x"}]
)
def test_rules_asked_about_other_items_are_left_out_and_counted(results: Results, other: dict[str, Any]) -> None:
    rule, text = explained(results, "rule"), explained(results, "default")
    judged(results, "rule", rule, [0.9] * 3, judge="rule", **other)
    judged(results, "default", text, [0.8] * 4, judge=JUDGE, threshold=0.3)
    (found,) = lifts(results)
    assert (found.over_english, found.over_rule, found.n, found.n_unlike) == (None, None, 0, 3)
    judged(results, "rule", rule, [0.5] * 2, judge="rule", threshold=0.3)
    (found,) = lifts(results)
    assert found.over_rule is not None
    assert (found.over_rule.n, found.n_unlike) == (2, 1)
    assert found.over_rule.value == pytest.approx(0.3)


def test_windows_drawn_otherwise_are_other_items(results: Results) -> None:
    rule, text = explained(results, "rule", select="before"), explained(results, "default", select="now")
    judged(results, "rule", rule, [0.9] * 4, judge="rule", scorer="detection")
    judged(results, "default", text, [0.8] * 4, judge=JUDGE, scorer="detection")
    (found,) = lifts(results)
    assert (found.n, found.n_unlike) == (0, 4)


def test_failed_answers_are_marked(results: Results) -> None:
    rule, text = explained(results, "rule"), explained(results, "default")
    judged(results, "rule", rule, [0.5] * 4, judge="rule", scorer="detection")
    judged(results, "default", text, [0.8] * 2, judge=JUDGE, scorer="detection")
    judged(results, "default", text, [0.8] * 2, judge=JUDGE, scorer="detection", failed=3, first=2)
    (found,) = lifts(results)
    assert (found.n, found.n_unlike, found.n_partial) == (4, 0, 2)


def test_what_was_stored_before_thresholds_were_one_says_what_was_asked() -> None:
    stages = {"e": ("explain", {"select": "drawn"})}

    def items(judge: str, threshold: float | None) -> Any:
        return items_of(
            stages, {"explain": "e", "judge": judge, "scorer": {"name": "fuzzing", "args": {"threshold": threshold}}}
        )

    assert items(JUDGE, None) == items("rule", 0.3) == items(JUDGE, 0.3)
    assert items("rule", None) == items(JUDGE, 0.0) != items(JUDGE, None)
    assert items_of(stages, {"explain": "unknown", "judge": "rule"}) is None
    assert items_of({}, {}) is None


def test_retests_of_plumbing_checks_are_none(results: Results) -> None:
    text = explained(results, "default", 6)
    for first, plumbing in ((0, False), (3, True)):
        for i in range(3):
            at = first + i
            judged(
                results, "default", text, [0.5], judge="subject", scorer="intervention", first=at, plumbing=plumbing,
                detail={"retest": {"kl_1": [at * 1.0, at + 0.1]}},
            )  # fmt: skip
    (coder,) = summarise(results).coders
    (explainer,) = coder.explainers
    (found,) = retests(results, coder, explainer)
    assert (found.condition, found.icc.n) == ("kl_1", 3)
