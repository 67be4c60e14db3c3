"""Runs whose silent windows are hard ones: made from rules, neighbours and text, by command line and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exegete as ex
from exegete.config import RunConfig, merge
from exegete.errors import InputError
from exegete.pipeline import Pipeline, run_pipeline
from exegete.preparing import prepare
from exegete.runs import Run, open_run
from exegete.types import ExampleSet

KINDS = ["near_miss", "same_token", "neighbour", "similar", "random"]


def config(toy: Path, **changes: Any) -> RunConfig:
    base = {
        "subject": str(toy / "model"),
        "coder": [str(toy / "coders")],
        "hookpoints": ["layers.0"],
        "scorers": ["detection"],
        "donors": 2,
        "corpus": {"text": [str(toy / "text.jsonl")], "row_length": 64},
        "collect": {"batch_tokens": 512, "threads": 1},
        "examples": {
            "window": 8,
            "n_train": 12,
            "n_test": 12,
            "n_negatives": 20,
            "min_train": 2,
            "min_test": 2,
            "negatives": KINDS,
        },
        "latents": {"count": 4},
    }
    return RunConfig.from_dict(merge(base, changes))


@pytest.fixture(scope="module")
def run(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pipeline(config(toy_folder), tmp_path_factory.mktemp("hard") / "run")


def drawn_sets(run: Run) -> list[ExampleSet]:
    results = run.results()
    try:
        indices = [e.latent.index for e in results.explanations().values()]
    finally:
        results.close()
    return [s for s in open_run(run.folder).select("layers.0", indices) if isinstance(s, ExampleSet)]


def test_all_kinds_divide_the_silent_windows_and_the_judged_ones_carry_theirs(run: Run) -> None:
    sets = drawn_sets(run)
    assert sets
    for chosen in sets:
        sizes = dict(chosen.strata)
        assert list(sizes) == ["near_miss", "same_token", "neighbour", "similar", "silent"]
        silent = chosen.part("test", fires=False)
        for name, size in sizes.items():
            drawn = [e for e in silent if e.stratum == name]
            assert len(drawn) <= size
            assert all(e.inclusion_probability == pytest.approx(len(drawn) / size) for e in drawn)
    assert {name for chosen in sets for name, size in chosen.strata if size} >= {"same_token", "silent"}


def test_judgements_carry_the_kinds(run: Run) -> None:
    results = run.results()
    try:
        id_ = next(iter(results.explanations()))
        strata = {j.stratum for j in results.judgements(id_, "detection")}
    finally:
        results.close()
    assert strata & set(KINDS)


def test_near_misses_without_rules_say_what_to_do(toy_folder: Path, tmp_path: Path) -> None:
    settings = config(toy_folder, examples={"negatives": ["near_miss", "random"]})
    with Pipeline(settings, tmp_path / "run") as pipeline:
        pipeline.collect(prepare(settings))
        with pytest.raises(InputError, match="--explainer rule"):
            pipeline.run.select("layers.0", [0], settings)


@pytest.mark.parametrize("which", ["decoder", "encoder"])
def test_neighbours_by_direction_are_found_when_scoring_and_kept(which: str, toy_folder: Path, tmp_path: Path) -> None:
    settings = config(
        toy_folder,
        examples={"negatives": ["neighbour", "random"], "neighbours": which},
        nulls=["random_coder"],
        scorers=["detection"],
    )
    made = run_pipeline(settings, tmp_path / "run")
    for coder in made.coders():
        assert (made.store(coder).folder / f"neighbours-{which}.npz").is_file()
    assert open_run(tmp_path / "run").table("scores")["value"].size


def test_from_python_kinds_that_need_no_run_are_drawn(run: Run) -> None:
    chosen = ex.select(
        run.store("layers.0"),
        drawn_sets(run)[0].latent.index,
        window=8,
        min_train=2,
        min_test=2,
        negatives=("same_token", "neighbour", "random"),
    )
    assert isinstance(chosen, ExampleSet)
    assert [name for name, _ in chosen.strata] == ["same_token", "neighbour", "silent"]
    with pytest.raises(InputError, match="decoder neighbours"):
        ex.select(run.store("layers.0"), 0, window=8, negatives=("neighbour",), neighbours="decoder")
