"""Simulations of a run in OpenAI's form: written by command and from Python, read again and scored by its formulas."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import exegete as ex
from exegete.cli import main
from exegete.config import RunConfig
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.pipeline import Pipeline
from exegete.preparing import prepare
from exegete.scorers.scorer import Scoring
from exegete.scorers.simulation import SimulationScorer


@pytest.fixture(scope="module")
def run(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ex.Run:
    folder = tmp_path_factory.mktemp("openai") / "run"
    base: dict[str, Any] = {
        "subject": str(toy_folder / "model"),
        "coder": [str(toy_folder / "coders")],
        "hookpoints": ["layers.0"],
        "corpus": {"text": [str(toy_folder / "text.jsonl")], "row_length": 64},
        "collect": {"batch_tokens": 512, "threads": 1},
        "examples": {"window": 8, "n_train": 6, "n_test": 5, "n_negatives": 5, "min_train": 2, "min_test": 2},
        "latents": {"count": 8},
        "scorers": ["simulation"],
    }
    settings = RunConfig.from_dict(base)
    with Pipeline(settings, folder) as pipeline:
        pipeline.collect(prepare(settings))
        pipeline.explain(None)
        pipeline.score(None)
    return ex.open_run(folder)


def test_what_is_exported_has_the_scores_of_the_run(
    run: ex.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.folder), "--to", "openai", "--out", str(tmp_path / "a")]) == 0
    ex.export_run(run, to="openai", out=tmp_path / "b")
    results = run.results()
    try:
        column = results.score_column("layers.0", "simulation", "pearson_all")
        texts = {e.latent.index: e.text for e in results.explanations("layers.0").values()}
    finally:
        results.close()
    values = dict(zip(column.index.tolist(), column.value.tolist(), strict=True))
    files = sorted((tmp_path / "a").rglob("*.jsonl"))
    assert {file.relative_to(tmp_path / "a") for file in files} == {Path("layers.0") / f"{i}.jsonl" for i in values}
    capsys.readouterr()
    assert main(["records", "--json", *map(str, files)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == len(files) > 1
    for file, one in zip(files, told, strict=True):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        index = int(file.stem)
        read = ex.load_simulations(file)
        (explained,) = read.explanations
        assert (read.layer, read.neuron, explained.explanation) == ("layers.0", index, texts[index])
        if len({x for s in explained.sequences for x in s.simulation.expected}) == 1:  # the reference has none then
            assert values[index] == 0.0 or math.isnan(values[index])
            values[index] = math.nan
        assert explained.scores.ev_correlation == pytest.approx(values[index], abs=1e-6, nan_ok=True)
        assert (one["neuron"], one["windows"]) == (index, len(explained.sequences))
        assert one["ev_correlation"] == (None if math.isnan(values[index]) else pytest.approx(values[index], abs=1e-6))


def test_scores_that_a_file_tells_are_computed_anew(
    run: ex.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ex.export_run(run, to="openai", out=tmp_path / "a")
    file = next((tmp_path / "a").rglob("*.jsonl"))
    true = ex.load_simulations(file).explanations[0].scores
    data = json.loads(file.read_text())
    scored = data["scored_explanations"][0]
    scored["scored_simulation"]["rsquared_score"] = 0.999
    scored["explanation"] = "red \x1b[31m\nline"
    (tmp_path / "boast.jsonl").write_text(json.dumps(data))
    assert ex.load_simulations(tmp_path / "boast.jsonl").explanations[0].scores == true
    assert main(["records", str(tmp_path / "boast.jsonl")]) == 0
    said = capsys.readouterr().out
    assert f"{true.rsquared:.3f}" in said
    assert "0.999" not in said
    assert "\x1b" not in said
    assert len(said.splitlines()) == 2


def test_what_cannot_be_exported_or_read_is_refused(run: ex.Run, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="unknown coder"):
        ex.export_run(run, to="openai", out=tmp_path / "a", coders=["no"])
    with pytest.raises(InputError, match="--scorers simulation"):
        ex.export_run(run, to="openai", out=tmp_path / "a", coders=[])
    assert not (tmp_path / "a").exists()
    (tmp_path / "not.jsonl").write_text("{}")
    with pytest.raises(CorruptError, match="no simulation results"):
        ex.load_simulations(tmp_path / "not.jsonl")


def test_plumbing_checks_are_in_no_export(run: ex.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    (copy / "results.db").unlink()
    monkeypatch.setattr(SimulationScorer, "plumbing", lambda self, view: True)
    settings = ex.open_run(copy).config
    with Pipeline(settings, copy) as pipeline:
        pipeline.explain(None)
        pipeline.score(None)
    with pytest.raises(InputError, match="no simulations"):
        ex.export_run(ex.open_run(copy), to="openai", out=tmp_path / "a")


def test_a_latent_that_only_an_older_explainer_has_is_exported_too(run: ex.Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    made = ex.open_run(copy)
    with made.results(readonly=False) as results:
        ids = {e.latent.index: (i, e) for i, e in results.explanations("layers.0").items()}
        columns = results.score_column("layers.0", "simulation", "pearson")
        first, *others = columns.index.tolist()
        id_, explanation = ids[first]
        newer = results.add_explanation(dataclasses.replace(explanation, text="newer"), "newer")
        scores = tuple(s for s in results.scores(scorer="simulation") if s.latent.index == first)
        judged = {"none": results.judgements(id_, "simulation")}
        results.add_scoring(Scoring(explanation=explanation, scores=scores, judgements=judged), "again", newer)
    ex.export_run(made, to="openai", out=tmp_path / "a")
    texts = {
        int(file.stem): ex.load_simulations(file).explanations[0].explanation
        for file in (tmp_path / "a").rglob("*.jsonl")
    }
    assert others
    assert texts == {first: "newer", **{i: ids[i][1].text for i in others}}
