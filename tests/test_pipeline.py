"""The whole pipeline on a toy subject: complete, resumable at every point, the same numbers after any stop."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from exegete.config import RunConfig, merge
from exegete.errors import BusyError, InputError, MismatchError
from exegete.files import RunLock, fault_hook, hash_file, hash_json
from exegete.pipeline import Pipeline, run_pipeline
from exegete.preparing import Prepared, prepare
from exegete.runs import Run, open_run


def config(toy: Path, **changes: Any) -> RunConfig:
    base = {
        "subject": str(toy / "model"),
        "coder": [str(toy / "coders")],
        "scorers": ["detection", "fuzzing", "execution"],
        "nulls": ["random_coder", "random_subject"],
        "donors": 3,
        "corpus": {"text": [str(toy / "text.jsonl")], "row_length": 64},
        "collect": {"batch_tokens": 512, "shard_rows": 40, "threads": 1},
        "examples": {"window": 8, "n_train": 12, "n_test": 12, "n_negatives": 12, "min_train": 2, "min_test": 2},
        "latents": {"count": 5},
    }
    return RunConfig.from_dict(merge(base, changes))


def fingerprint(run: Run) -> dict[str, Any]:
    results = run.results()
    try:
        rows = results.canonical_rows()
    finally:
        results.close()
    return {"stores": {name: run.store(name).content_hash() for name in run.coders()}, "rows": rows}


def finish(settings: RunConfig, prepared: Prepared, folder: Path) -> Run:
    with Pipeline(settings, folder) as pipeline:
        pipeline.collect(prepared)
        pipeline.explain()
        pipeline.score()
        pipeline.report()
        return pipeline.run


@pytest.fixture(scope="module")
def whole(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pipeline(config(toy_folder), tmp_path_factory.mktemp("whole") / "run")


def test_a_run_ends_with_scores_beside_their_nulls_and_a_report(whole: Run) -> None:
    assert whole.coders() == (
        "layers.0",
        "layers.0.mlp",
        "layers.0.mlp@random-coder",
        "layers.0.mlp@random-subject",
        "layers.0@random-coder",
        "layers.0@random-subject",
    )
    assert whole.report_path.is_file()
    scores = whole.table("scores")
    assert {"none", "other_latent"} == set(scores["control"])
    assert {"detection", "fuzzing", "execution", "baseline"} == set(scores["scorer"])
    explained = whole.table("explanations")
    skipped = whole.table("skips")
    for name in whole.coders():
        done = [i for c, i in zip(explained["coder"], explained["idx"], strict=True) if c == name]
        dropped = [i for c, i in zip(skipped["coder"], skipped["idx"], strict=True) if c == name]
        assert len(done) + len(dropped) == 5, f"{name}: a latent vanished"


def test_running_again_does_nothing_again(whole: Run, toy_folder: Path) -> None:
    before = fingerprint(whole)
    seen: list[str] = []
    with fault_hook(seen.append):
        run_pipeline(config(toy_folder), whole.folder)
    assert fingerprint(whole) == before
    assert not any("shard" in name or "tokens" in name for name in seen), "collected again"


def test_a_stop_at_any_point_changes_nothing(toy_folder: Path, tmp_path: Path) -> None:
    """At every flush, rename and commit of a whole run its files are copied as a kill would leave them, and resumed."""
    settings = config(toy_folder, nulls=[], hookpoints=["layers.0"], latents={"count": 2})
    prepared = prepare(settings)
    images: dict[str, tuple[str, Path]] = {}

    def photograph(name: str) -> None:
        state = listing(tmp_path / "run")
        if state not in images:
            images[state] = (name, tmp_path / f"image-{len(images)}")
            shutil.copytree(tmp_path / "run", images[state][1])

    with fault_hook(photograph):
        reference = fingerprint(finish(settings, prepared, tmp_path / "run"))
    points = {name for name, _ in images.values()}
    for part in ("tokens.npy", "shard-", "manifest.json", "config.yaml", "commit results", "index.html"):
        assert any(part in name for name in points), f"no stop at {part}"
    assert len(images) > 40
    for name, image in images.values():
        assert fingerprint(finish(settings, prepared, image)) == reference, f"after a stop at {name}"


def listing(folder: Path) -> str:
    """Identify the state of a folder: every file with its contents, but for locks."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock" and not path.name.endswith("-shm"):
            found.append((str(path.relative_to(folder)), hash_file(path)))
    return hash_json(found)


def test_kill_9_at_random_moments_changes_nothing(whole: Run, toy_folder: Path, tmp_path: Path) -> None:
    settings = config(toy_folder)
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    command = [sys.executable, "-m", "exegete", "run", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), "-q"]
    draw = random.Random(20241017)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        # Wait for the first sign of work, so that the moment falls inside it and not into the imports.
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "lock").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert fingerprint(open_run(tmp_path / "run")) == fingerprint(whole)


def test_a_change_under_existing_output_is_refused_with_the_difference(whole: Run, toy_folder: Path) -> None:
    before = fingerprint(whole)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"examples": {"window": 16}}, ["examples.window", "8", "16"]),
        ({"corpus": {"row_length": 32}}, ["corpus.row_length", "64", "32"]),
        ({"seed": 1}, ["seed"]),
    ]
    for changes, words in cases:
        with pytest.raises(MismatchError) as caught:
            run_pipeline(config(toy_folder, **changes), whole.folder)
        for word in words:
            assert word in str(caught.value)
    assert fingerprint(whole) == before


def test_more_latents_extend_the_draw(whole: Run, toy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    grown = run_pipeline(config(toy_folder, latents={"count": 8}), folder)
    first = {
        (c, i) for c, i in zip(whole.table("explanations")["coder"], whole.table("explanations")["idx"], strict=True)
    }
    after = {
        (c, i) for c, i in zip(grown.table("explanations")["coder"], grown.table("explanations")["idx"], strict=True)
    }
    assert first < after


def test_two_writers_of_one_run(whole: Run, toy_folder: Path) -> None:
    with RunLock(whole.folder):
        with pytest.raises(BusyError, match="process"), Pipeline(config(toy_folder), whole.folder):
            pass
        assert len(whole.table("scores")["value"]) > 0, "readers go on"


def test_a_folder_of_other_files_is_left_alone(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="other files"), Pipeline(config(toy_folder), tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_latents_by_number(toy_folder: Path, whole: Run) -> None:
    view = whole.latent("layers.0", int(whole.table("explanations")["idx"][0]))
    assert view.examples.part("test")
    with pytest.raises(InputError, match="coder"):
        whole.store("layers.9")
