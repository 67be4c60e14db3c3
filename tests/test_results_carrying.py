"""What was scored among fewer explained latents is taken over where it was held against the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, LatentId, Score

NAME = "discrimination"


def scored(results: Results, id_: int, index: int, near: list[str], *, key: str = "old", final: bool = True) -> None:
    latent = LatentId(coder="c", index=index)
    found = Score(
        latent=latent, scorer=NAME, metric="bits", value=1.0 + index, low=0.0, high=4.0, method="m", n_total=1,
        n_scored=1, n_failed=0,
    )  # fmt: skip
    explanation = Explanation(latent=latent, text="t", status="ok", explainer={})
    detail = {"near": [{"latent": name} for name in near]}
    results.add_scoring(
        Scoring(explanation=explanation, scores=(found,), judgements={}, detail=detail), key, id_, final=final
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "results.db")


@pytest.fixture
def ids(results: Results) -> list[int]:
    return [
        results.add_explanation(
            Explanation(latent=LatentId(coder="c", index=i), text="t", status="ok", explainer={}), "explained"
        )
        for i in range(4)
    ]


def test_equally_near_latents_may_change_places(results: Results, ids: list[int]) -> None:
    for i, near in enumerate((["c/8", "c/9"], ["c/8", "c/9"], ["c/8"], [])):
        scored(results, ids[i], i, near)
    wanted = {ids[0]: ["c/9", "c/8"], ids[1]: ["c/8", "c/7"], ids[2]: ["c/8", "c/9"], ids[3]: []}
    kept, changed = results.carry_over(NAME, "new", ["old"], wanted)
    assert (kept, changed) == ({ids[0], ids[3]}, {ids[1], ids[2]})
    assert {i.index for i in results.done("new")} == {0, 3}
    values = {key: [s.value for s in results.scores(scorer=NAME, key=key)] for key in ("old", "new")}
    assert values == {"old": [1.0, 2.0, 3.0, 4.0], "new": [1.0, 4.0]}


def test_what_was_not_finished_is_neither_kept_nor_called_changed(results: Results, ids: list[int]) -> None:
    scored(results, ids[0], 0, ["c/8"], final=False)
    assert results.carry_over(NAME, "new", ["old"], {ids[0]: ["c/8"]}) == (set(), set())
    assert not results.scores(scorer=NAME, key="new")
    scored(results, ids[0], 0, ["c/8"])
    for _ in range(2):  # as often as one likes
        assert results.carry_over(NAME, "new", ["old"], {ids[0]: ["c/8"]}) == ({ids[0]}, set())
    assert len(results.scores(scorer=NAME, key="new")) == 1


def test_what_stands_under_other_keys_is_left_alone(results: Results, ids: list[int]) -> None:
    scored(results, ids[0], 0, ["c/8"], key="of another judge")
    assert results.carry_over(NAME, "new", ["old"], {ids[0]: ["c/8"]}) == (set(), set())
