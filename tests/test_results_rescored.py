"""Explanations scored more than once: by another judge, with other settings, or as a plumbing check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, Judgement, LatentId, Score

CODER = "layers.3"
# In the order in which they are stored; as text the last is neither the first nor the last.
KEYS = ("m rule", "z other settings", "b another judge")


def explanation(index: int) -> Explanation:
    return Explanation(latent=LatentId(coder=CODER, index=index), text="t", status="ok", explainer={"name": "rule"})


def scoring(index: int, value: float, *, plumbing: bool = False) -> Scoring:
    made = Score(
        latent=LatentId(coder=CODER, index=index),
        scorer="detection",
        metric="balanced_accuracy",
        value=value,
        low=value,
        high=value,
        method="m",
        n_total=1,
        n_scored=1,
        n_failed=0,
        flags=("plumbing",) if plumbing else (),
    )
    said = Judgement(
        row=index, start=0, document=1, stratum="decile_0", truth=True, prediction=value > 0.5, probability=value
    )
    return Scoring(
        explanation=explanation(index), scores=(made,), judgements={"none": (said,)}, detail={"value": value}
    )


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    """Two latents scored under three keys, the last of them for the second latent alone."""
    with Results.open(tmp_path / "results.db") as made:
        ids = [made.add_explanation(explanation(index), "explained") for index in (0, 1)]
        for key, value in zip(KEYS, (0.75, 0.25, 1.0), strict=True):
            made.add_stage(key, "detection", {"judge": key, "explain": "explained"})
            for index, id_ in enumerate(ids):
                if key != KEYS[2] or index == 1:
                    made.add_scoring(scoring(index, value), key, id_)
        yield made


def values(results: Results, plumbing: bool | None = None) -> dict[int, float]:
    column = results.score_column(CODER, "detection", "balanced_accuracy", explainer="explained", plumbing=plumbing)
    return dict(zip(column.index.tolist(), column.value.tolist(), strict=True))


def judged(results: Results, plumbing: bool | None = None) -> dict[int, float]:
    found = list(results.judgement_columns(CODER, "detection", explainer="explained", plumbing=plumbing))
    assert len({latent for latent, _ in found}) == len(found)
    return {latent.index: float(columns.probability[0]) for latent, columns in found}


def test_what_was_scored_last_counts_alone_and_scores_are_of_the_judgements(results: Results) -> None:
    assert values(results) == judged(results) == {1: 1.0}  # not latent 0 by another judge
    assert results.scored_with(CODER, "detection", "explained")["judge"] == KEYS[2]


def test_a_latent_has_the_judgements_and_the_detail_of_its_latest_score(results: Results) -> None:
    found = [next(iter(results.explanations(CODER, key="explained")))]
    (first,) = found
    assert [j.probability for j in results.judgements(first, "detection")] == [0.25]
    assert results.detail(first, "detection") == {"value": 0.25}
    assert results.details(CODER, "detection", explainer="explained") == {0: {"value": 0.25}, 1: {"value": 1.0}}


def test_a_plumbing_check_hides_no_measurement(results: Results) -> None:
    first, second = results.explanations(CODER, key="explained")
    results.add_stage("zz", "detection", {"judge": "simulated", "explain": "explained"})
    for index, id_ in ((0, first), (1, second)):
        results.add_scoring(scoring(index, 0.5, plumbing=True), "zz", id_)
    assert values(results, plumbing=False) == judged(results, plumbing=False) == {1: 1.0}
    assert values(results, plumbing=True) == judged(results, plumbing=True) == {0: 0.5, 1: 0.5}
    assert results.detail(second, "detection") == {"value": 1.0}
    assert [j.probability for j in results.judgements(second, "detection")] == [1.0]
    judges = [results.scored_with(CODER, "detection", "explained", plumbing=p).get("judge") for p in (False, True)]
    assert judges == [KEYS[2], "simulated"]


def test_a_retry_under_the_same_key_replaces_what_was_stored_before(results: Results) -> None:
    first = next(iter(results.explanations(CODER, key="explained")))
    failed = scoring(0, 0.0)
    results.add_scoring(failed, "again", first, final=False)
    assert results.done("again") == set()
    results.add_scoring(dataclasses.replace(scoring(0, 0.9)), "again", first)
    assert [s.value for s in results.scores(key="again")] == [0.9]
    assert [j.probability for j in results.judgements(first, "detection")] == [0.9]
    assert results.detail(first, "detection") == {"value": 0.9}
    assert {latent.index for latent in results.done("again")} == {0}


def test_nothing_is_known_of_a_scorer_that_was_not_run(results: Results) -> None:
    assert results.scored_with(CODER, "fuzzing", "explained") == {}
    assert list(results.judgement_columns(CODER, "fuzzing", explainer="explained")) == []
