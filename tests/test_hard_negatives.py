"""Runs whose silent windows are hard ones: made from rules, neighbours and text, by command line and from Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

import exegete as ex
from exegete.config import RunConfig, merge
from exegete.errors import InputError
from exegete.llm.scripted import ScriptedClient
from exegete.pipeline import Pipeline, run_pipeline
from exegete.preparing import prepare
from exegete.progress import Progress
from exegete.runs import Run, open_run
from exegete.store.neighbours import cofiring_neighbours
from exegete.types import ExampleSet, Explanation

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
            assert all(0.0 < e.inclusion_probability <= 1.0 for e in drawn)
            # Windows of documents that hold few are likelier than the rest: no document gives more than three.
            assert not drawn or max(e.inclusion_probability for e in drawn) >= len(drawn) / size - 1e-9
    examples = dataclasses.replace(run.config.examples, negatives=("random",))
    alone = dataclasses.replace(run.config, examples=examples)
    for chosen in sets:
        (plain,) = run.select("layers.0", [chosen.latent.index], alone)
        assert isinstance(plain, ExampleSet)
        assert sum(size for _, size in chosen.strata) == dict(plain.strata)["silent"]


def test_judgements_carry_the_kinds(run: Run) -> None:
    results = run.results()
    try:
        id_ = next(iter(results.explanations()))
        strata = {j.stratum for j in results.judgements(id_, "detection")}
    finally:
        results.close()
    assert strata & set(KINDS)


def test_the_report_tells_how_many_windows_of_each_kind_there_are(run: Run) -> None:
    pages = [path.read_text() for path in sorted((run.folder / "report" / "latents").glob("*.html"))]
    for chosen in drawn_sets(run):
        told = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in chosen.strata)
        assert any(f"<h1>{chosen.latent}</h1>" in page and told in page for page in pages)


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


def same(one: list[Any], other: list[Any]) -> bool:
    """Return whether two selections are the same windows, drawn alike."""
    return len(one) == len(other) and all(
        a.strata == b.strata and all(np.array_equal(getattr(a.examples, n), getattr(b.examples, n)) for n in COLUMNS)
        for a, b in zip(one, other, strict=True)
    )


COLUMNS = ("row", "start", "stratum", "fires", "probability", "multiplicity")


def test_explaining_and_scoring_see_the_same_train_windows(run: Run) -> None:
    judged = drawn_sets(run)
    plain = dataclasses.replace(run.config.examples, negatives=("random",))
    indices = [s.latent.index for s in judged]
    shown = run.select("layers.0", indices, dataclasses.replace(run.config, examples=plain))
    for one, other in zip(judged, shown, strict=True):
        assert isinstance(other, ExampleSet)
        for name in COLUMNS:
            assert np.array_equal(getattr(one.part("train"), name), getattr(other.part("train"), name))


def test_near_misses_are_those_of_the_default_rule_whatever_else_is_explained(toy_folder: Path, tmp_path: Path) -> None:
    made = run_pipeline(config(toy_folder), tmp_path / "run")
    before = drawn_sets(made)
    assert any(dict(s.strata)["near_miss"] for s in before)
    results = made.results(readonly=False)
    try:
        first, second, *_ = [e for e in results.explanations().values() if e.program is not None]
        results.add_stage("other", "explain", {})
        spec = {"name": "rule", "args": {"max_clauses": 1}}
        results.add_explanation(
            Explanation(latent=first.latent, text="another", status="ok", explainer=spec, program=second.program),
            "other",
        )
    finally:
        results.close()
    indices = [s.latent.index for s in before]
    assert same(before, open_run(made.folder).select("layers.0", indices))


def test_neighbours_once_found_stay_when_more_latents_are_asked_for(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large store how far a latent is looked at depends on how many others are, but what was judged stays."""
    asked: list[list[int]] = []

    def few(store: Any, latents: Any, *, seed: int) -> Any:
        asked.append(list(latents))
        return cofiring_neighbours(store, latents, positions=200, seed=seed)

    monkeypatch.setattr("exegete.hard_negatives.cofiring_neighbours", few)
    changes = {"negatives": ["neighbour", "random"]}
    made = run_pipeline(config(toy_folder, examples=changes), tmp_path / "run")
    before = drawn_sets(made)
    more = run_pipeline(config(toy_folder, examples=changes, latents={"count": 12}), tmp_path / "run")
    assert [len(a) for a in asked] == [4, 8]
    assert same(before, open_run(more.folder).select("layers.0", [s.latent.index for s in before]))
    assert [len(a) for a in asked] == [4, 8]


def test_a_latent_with_too_few_windows_of_the_kinds_is_counted_as_skipped(toy_folder: Path, tmp_path: Path) -> None:
    settings = config(
        toy_folder,
        examples={"negatives": ["similar"], "min_test": 40},
        latents={"count": 12},
        scorers=["detection", "fuzzing"],
    )
    made = run_pipeline(settings, tmp_path / "run")
    explained = set(made.table("explanations")["idx"].tolist())
    assert explained
    assert not made.table("scores")["idx"].size
    results = made.results()
    try:
        skips = results.skips()
    finally:
        results.close()
    short = [s for s in skips if s.reason == "too few silent test windows"]
    assert {s.latent.index for s in short} >= explained
    assert len(skips) == len({s.latent for s in skips}) == 12


def judge(request: Any) -> str:
    return "[EXPLANATION]: words" if request.stage == "explain" else json.dumps({"verdicts": [1] * 5})


def test_before_scoring_report_and_plan_do_with_random_windows_and_after_it_the_judged_ones_are_exported(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(toy_folder, explainer="default")
    monkeypatch.setattr(ScriptedClient, "simulated", False)  # stands for a server, whose judgements are exported
    llm = ScriptedClient(judge, name="server")
    with Pipeline(settings, tmp_path / "run") as pipeline:
        pipeline.collect(prepare(settings))
        pipeline.explain(llm)
        assert pipeline.report().is_file()
        asking = merge(settings.to_dict(), {"llm": {"llm": "http://127.0.0.1:1/v1#m"}})
        assert any(stage.asked.requests for stage in ex.plan(pipeline.run, llm=asking["llm"]).stages)
        pipeline.score(llm)
    results = pipeline.run.results()
    try:
        assert [name for _, name in results.explainers("layers.0")] == ["default", "rule"]
    finally:
        results.close()
    out = ex.export_run(open_run(tmp_path / "run"), to="delphi", out=tmp_path / "delphi")
    texts = {json.loads(path.read_text()) for path in out.glob("**/explanations/*.txt")}
    assert texts == {"words"}
    assert list(out.glob("**/scores/detection/*.txt"))


@final
class StopAfter(Progress):
    """Breaks off collecting after some tokens."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def test_of_rows_still_to_be_collected_nothing_is_taken_to_be_silent(toy_folder: Path, tmp_path: Path) -> None:
    settings = config(toy_folder, collect={"shard_rows": 20}, examples={"negatives": ["random"]})
    with Pipeline(settings, tmp_path / "run", StopAfter(64 * 60)) as pipeline, pytest.raises(KeyboardInterrupt):
        pipeline.collect(prepare(settings))
    store = pipeline.run.store("layers.0")
    assert not store.manifest.complete
    assert 0 < store.manifest.row_stop < store.corpus.n_rows
    found = (ex.select(store, i, window=8, min_train=1, min_test=1, n_negatives=500) for i in range(store.width))
    sets = [chosen for chosen in found if isinstance(chosen, ExampleSet)]
    assert sets
    assert all(chosen.windows.row.max() < store.manifest.row_stop for chosen in sets)
    with Pipeline(settings, tmp_path / "run") as pipeline, pytest.raises(InputError, match="not all collected"):
        pipeline.explain()


def test_another_seed_is_another_split_of_one_open_run(run: Run) -> None:
    opened = open_run(run.folder)
    one = opened.data("layers.0").segment_split
    assert opened.data("layers.0", dataclasses.replace(opened.config, seed=99)).segment_split.tolist() != one.tolist()


def test_blocks_of_latents_are_bounded_in_firings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.examples import build

    indices = [s.latent.index for s in drawn_sets(run)]
    before = run.select("layers.0", indices)
    sizes: list[int] = []
    block = build._Job.block

    def watched(self: Any, some: list[int]) -> Any:
        sizes.append(len(some))
        return block(self, some)

    monkeypatch.setattr(build, "_FIRINGS", 1)
    monkeypatch.setattr(build._Job, "block", watched)
    assert same(before, run.select("layers.0", indices))
    assert sizes == [1] * len(indices)
