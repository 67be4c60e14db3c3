"""Exports: what delphi itself read of one (``make oracles``), and that a folder appears whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, load_file

from exegete.errors import InputError, NotFoundError
from exegete.export import delphi as module
from exegete.export import export_delphi
from exegete.export.tensor_file import TensorFile
from exegete.files import fault_hook
from exegete.results import Results
from exegete.runs import Run
from exegete.scorers.scorer import Scoring
from exegete.store.manifest import save_manifest
from exegete.types import Explanation, Judgement, LatentId, Score

FIXTURE = Path(__file__).parent / "fixtures" / "delphi"


def _oracle() -> Any:
    """The script that made the fixture: it makes the same run here."""
    path = Path(__file__).parent / "oracles" / "write_delphi.py"
    spec = importlib.util.spec_from_file_location("write_delphi", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


ORACLE = _oracle()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made: Run = ORACLE.build_run(tmp_path_factory.mktemp("export") / "run")
    return made


@pytest.fixture
def own_run(tmp_path: Path) -> Run:
    """A run that a test may change."""
    made: Run = ORACLE.build_run(tmp_path / "run")
    return made


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "delphi"
    export_delphi(run, out)
    return out


@pytest.fixture(scope="module")
def read() -> dict[str, Any]:
    """What delphi read: firings and windows as arrays."""
    with np.load(FIXTURE / "read.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What delphi computed from the judgements, and the explanations it loaded."""
    return dict(json.loads((FIXTURE / "read.json").read_text(encoding="utf-8")))


def test_the_fixture_is_whole() -> None:
    for line in (FIXTURE / "SHA256SUMS").read_text().splitlines():
        sha256, name = line.split("  ")
        assert hashlib.sha256((FIXTURE / name).read_bytes()).hexdigest() == sha256


def test_the_files_are_those_that_delphi_read(exported: Path) -> None:
    assert ORACLE.hashes(exported) == json.loads((FIXTURE / "exported.json").read_text())


@pytest.mark.parametrize(("coder", "name"), [("layers.0", "layers.0"), ("other", "layers.1")])
def test_delphi_read_every_firing(run: Run, read: dict[str, Any], coder: str, name: str) -> None:
    store = run.store(coder)
    locations, values = read[f"{name}/locations"], read[f"{name}/values"]
    for index in range(store.width):
        own = store.firings(index)
        here = locations[:, 2] == index
        np.testing.assert_array_equal(locations[here, 0], own.rows)
        np.testing.assert_array_equal(locations[here, 1], own.positions)
        np.testing.assert_array_equal(values[here].astype(np.float32), own.values)
    assert len(locations) == store.manifest.n_firings


def test_values_are_half_floats_where_that_is_exact(run: Run, read: dict[str, Any]) -> None:
    assert read["layers.0/values"].dtype == np.float16
    assert read["layers.1/values"].dtype == np.float32
    values = read["layers.1/values"]
    assert values.max() > np.finfo(np.float16).max  # would have become infinite


@pytest.mark.parametrize(("coder", "name"), [("layers.0", "layers.0"), ("other", "layers.1")])
def test_delphi_cuts_windows_that_show_the_firings(run: Run, read: dict[str, Any], coder: str, name: str) -> None:
    store = run.store(coder)
    size, length = ORACLE.WINDOW, ORACLE.LENGTH
    for index in (0, store.width - 1):
        tokens, activations = read[f"{name}/{index}/tokens"], read[f"{name}/{index}/activations"]
        own = store.firings(index)
        dense = np.zeros((len(store.corpus), length), np.float32)
        dense[own.rows, own.positions] = own.values
        dense, texts = dense.reshape(-1, size), np.asarray(store.corpus.tokens).reshape(-1, size)
        firing = np.flatnonzero(dense.max(axis=1) > 0)
        expected = {(texts[i].tobytes(), dense[i].tobytes()) for i in firing}
        given = zip(tokens.astype(texts.dtype), activations.astype(np.float32), strict=True)
        assert {(t.tobytes(), a.tobytes()) for t, a in given} == expected
        assert len(tokens) == len(firing)


def test_delphi_read_explanations_and_settings(found: dict[str, Any]) -> None:
    # What was refused has no file: delphi would score a stand-in for it.
    assert found["explanations"] == {
        "layers.0_latent0": "fires on “letter” 0\n<<a>>",
        "layers.0_latent5": "fires on “letter” 5\n<<a>>",
    }
    assert found["settings"] == [["layers.0", "layers.1"], ORACLE.WINDOW, ["detection", "fuzz"], "toy"]


@pytest.mark.parametrize(("scorer", "name"), [("detection", "detection"), ("fuzzing", "fuzz")])
def test_delphi_computes_the_same_metrics(run: Run, found: dict[str, Any], scorer: str, name: str) -> None:
    with run.results() as results:
        columns = [judged for _, judged in results.judgement_columns("layers.0", scorer)]
    truth = np.concatenate([c.truth for c in columns])
    prediction = np.concatenate([c.prediction for c in columns])
    answered = prediction >= 0
    assert (~answered).sum() == 2  # failed judgements have no prediction, and delphi leaves them out
    truth, yes = truth[answered], prediction[answered] == 1
    metrics = found["metrics"][name]
    assert metrics["total_examples"] == len(truth)
    assert metrics["true_positive_rate"] == pytest.approx(yes[truth].mean())
    assert metrics["false_positive_rate"] == pytest.approx(yes[~truth].mean())
    assert 0.5 < metrics["accuracy"] < 1


def test_delphi_read_the_counts(run: Run, found: dict[str, Any]) -> None:
    for coder, name in (("layers.0", "layers.0"), ("other", "layers.1")):
        assert found["firing_counts"][name] == run.store(coder).counts.tolist()


def test_judged_windows_hold_their_text_and_activations(run: Run, exported: Path) -> None:
    samples = json.loads((exported / "scores" / "fuzz" / "layers.0_latent5.txt").read_text())
    store, window = run.store("layers.0"), ORACLE.WINDOW
    own = store.firings(5)
    dense = np.zeros(store.corpus.tokens.shape, np.float32)
    dense[own.rows, own.positions] = own.values
    assert len(samples) == len(store.corpus)
    for row, sample in enumerate(samples):
        assert sample["activations"] == dense[row, 1 : 1 + window].tolist()
        assert "".join(sample["str_tokens"]) == bytes(store.corpus.tokens[row, 1 : 1 + window].tolist()).decode()
        assert sample["activating"] == any(sample["activations"])
        assert sample["distance"] == (row % 10 if sample["activating"] else -1.0)
        if row == 4:
            assert (sample["prediction"], sample["probability"], sample["correct"]) == (None, None, None)
        else:
            assert sample["correct"] == (sample["prediction"] == sample["activating"])


def test_the_files_of_latents_follow_each_other(run: Run, exported: Path) -> None:
    for folder in (exported / "latents").iterdir():
        names = [path.stem.split("_") for path in folder.glob("*.safetensors")]
        edges = sorted((int(a), int(b)) for a, b in names)
        assert [edges[0][0], edges[-1][1]] == [0, ORACLE.WIDTH - 1]
        assert all(stop + 1 == start for (_, stop), (start, _) in itertools.pairwise(edges))
        assert len(edges) == module.SPLITS
        for path in folder.glob("*.safetensors"):
            tokens = load_file(path)["tokens"]
            assert tokens.dtype == np.int64
            np.testing.assert_array_equal(tokens, run.corpus.tokens)


def test_small_blocks_make_no_difference(
    run: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRINGS", 7)
    monkeypatch.setattr(module, "_TOKENS", 64)
    export_delphi(run, tmp_path / "out")
    assert ORACLE.hashes(tmp_path / "out") == ORACLE.hashes(exported)


def test_large_numbers_take_more_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 20)  # as if rows were too many for 16 bits
    export_delphi(run, tmp_path / "out", coders=["layers.0"])
    found = load_file(tmp_path / "out" / "latents" / "layers.0" / "0_1.safetensors")["locations"]
    assert found.dtype == np.uint32
    own = run.store("layers.0").firings(0)
    np.testing.assert_array_equal(found[found[:, 2] == 0, 0], own.rows)


def test_only_the_coders_asked_for(run: Run, tmp_path: Path) -> None:
    export_delphi(run, tmp_path / "out", coders=["other"])
    assert [path.name for path in (tmp_path / "out" / "latents").iterdir()] == ["layers.1"]
    assert not (tmp_path / "out" / "explanations").exists()
    with pytest.raises(NotFoundError, match="unknown coder 'third'"):
        export_delphi(run, tmp_path / "more", coders=["third"])
    with pytest.raises(InputError, match="no coder to export"):
        export_delphi(run, tmp_path / "more", coders=[])
    assert not (tmp_path / "more").exists()


def _changed(run: Run, coder: str, **fields: Any) -> None:
    store = run.store(coder)
    save_manifest(store.folder, dataclasses.replace(store.manifest, **fields))


def test_coders_of_one_hookpoint_go_by_their_names(own_run: Run, tmp_path: Path) -> None:
    _changed(own_run, "other", hookpoint="layers.0")
    export_delphi(own_run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "latents").iterdir()) == ["layers.0", "other"]


def test_two_coders_never_share_a_folder(own_run: Run, tmp_path: Path) -> None:
    (own_run.store_folder / "other").rename(own_run.store_folder / "third")
    ORACLE.save_store(
        own_run.store_folder / "fourth", own_run.corpus, "layers.0", ORACLE.made_up(own_run.corpus, 3, spread=2.0)
    )
    _changed(own_run, "third", hookpoint="layers.1", name="third")
    _changed(own_run, "fourth", hookpoint="layers.1")
    _changed(own_run, "layers.0", hookpoint="third")
    with pytest.raises(InputError, match="two coders would both be exported as third"):
        export_delphi(own_run, tmp_path / "out")


def test_a_hostile_hookpoint_is_no_path(own_run: Run, tmp_path: Path) -> None:
    _changed(own_run, "other", hookpoint="../../escaped")
    with pytest.raises(InputError, match="cannot be used"):
        export_delphi(own_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_store_is_refused(own_run: Run, tmp_path: Path) -> None:
    _changed(own_run, "other", complete=False)
    with pytest.raises(InputError, match="the store of other is not finished"):
        export_delphi(own_run, tmp_path / "out")


def test_a_run_without_results_has_latents_alone(own_run: Run, tmp_path: Path) -> None:
    (own_run.folder / "results.db").unlink()
    export_delphi(own_run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latents", "log", "run_config.json"]


def test_the_newest_explainer_that_was_judged_is_exported(own_run: Run, tmp_path: Path) -> None:
    """Rules that negatives were made from are newer than the explanations that were judged, and nobody judged them."""
    latent = LatentId(coder="layers.0", index=1)
    text = "half a pair: \ud83d"
    newer = Explanation(latent=latent, text=text, status="ok", explainer={"name": "rule", "args": {}})
    with Results.open(own_run.folder / "results.db") as results:
        id_ = results.add_explanation(newer, "other explain")
    export_delphi(own_run, tmp_path / "before")
    texts = {path.read_text() for path in (tmp_path / "before" / "explanations").iterdir()}
    assert texts
    assert not any("half a pair" in text for text in texts)
    assert any((tmp_path / "before" / "scores" / "detection").iterdir())
    judged = Judgement(row=0, start=1, document=0, stratum="silent", truth=False, prediction=False)
    score = Score(
        latent=latent, scorer="detection", metric="specificity", value=1.0, low=0.2, high=1.0, method="m",
        n_total=1, n_scored=1, n_failed=0,
    )  # fmt: skip
    scoring = Scoring(explanation=newer, scores=(score,), judgements={"none": (judged,)})
    with Results.open(own_run.folder / "results.db") as results:
        results.add_scoring(scoring, "other score", id_)
    export_delphi(own_run, tmp_path / "out")
    (path,) = (tmp_path / "out" / "explanations").iterdir()
    assert path.name == "layers.0_latent1.txt"
    assert json.loads(path.read_text()) == "half a pair: ?"
    assert [p.name for p in (tmp_path / "out" / "scores").rglob("*.txt")] == [path.name]


def test_what_is_there_is_never_written_over(run: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("full", "is not empty"), ("file", "is not a folder"), ("link", "is not a folder")):
        with pytest.raises(InputError, match=message):
            export_delphi(run, tmp_path / name)
    with pytest.raises(InputError, match="cannot be made"):
        export_delphi(run, tmp_path / "file" / "out")
    assert (tmp_path / "full" / "kept").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    export_delphi(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "run_config.json").is_file()


def test_a_stop_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    passed: list[str] = []
    with fault_hook(passed.append):
        export_delphi(run, tmp_path / "whole")
    assert passed[-1] == "before rename export"
    for number in (0, len(passed) // 2, len(passed) - 1):
        seen = iter(range(len(passed)))

        def stop(name: str, seen: Any = seen, number: int = number) -> None:
            if next(seen) == number:
                raise KeyboardInterrupt

        with fault_hook(stop), pytest.raises(KeyboardInterrupt):
            export_delphi(run, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_filled_meanwhile_is_left_alone(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(name: str) -> None:
        if name == "before rename export":
            out.mkdir()
            (out / "theirs").write_text("theirs")

    with fault_hook(meanwhile), pytest.raises(InputError, match="cannot be written"):
        export_delphi(run, out)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)


@given(
    st.dictionaries(st.text("abc", min_size=1), st.tuples(st.sampled_from(["<i8", "<u4", "<u2", "<f4", "<f2"]), SHAPES))
)
def test_tensor_files_read_back(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    stream = io.BytesIO()
    file = TensorFile(stream, tensors)
    whole = {name: np.arange(int(np.prod(shape)), dtype=kind).reshape(shape) for name, (kind, shape) in tensors.items()}
    for name, values in whole.items():
        for part in np.array_split(values.reshape(-1), 3):
            file.append(name, part)
    file.finish()
    read = load(stream.getvalue())
    assert set(read) == set(whole)
    for name, values in whole.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)


def test_tensor_files_are_filled_exactly() -> None:
    file = TensorFile(io.BytesIO(), {"a": ("<u2", (3,))})
    file.append("a", np.arange(2))
    with pytest.raises(ValueError, match="not full"):
        file.finish()
    with pytest.raises(ValueError, match="more items"):
        file.append("a", np.arange(2))
