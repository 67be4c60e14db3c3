"""``exegete steer``: the same results as the library, and one line for what cannot be done."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from exegete.cli import steer as command
from exegete.cli import steer_options
from exegete.cli.options import Parser
from exegete.errors import ExegeteError
from exegete.steering import (
    Row,
    balanced,
    behaviour_vector,
    generate,
    load_pairs,
    load_vector,
    pair_vector,
    save_vector,
    sweep,
)
from exegete.steering.reference import origin
from exegete.subjects import Subject

CPU = ("--device", "cpu", "--dtype", "float32")


def steer(*arguments: Any) -> int:
    """Run a command as the command line does, without its last step, which turns errors into one line."""
    common = Parser(add_help=False)
    common.add_argument("-q", "--quiet", action="count", default=0)
    parser = Parser(prog="exegete")
    steer_options.add_parsers(parser.add_subparsers(parser_class=Parser), [common])
    options = parser.parse_args(["steer", *map(str, arguments)])
    assert options.command == "steer"
    return command.run(options)


def refused(message: str, *arguments: Any) -> None:
    with pytest.raises(ExegeteError, match=message) as caught:
        steer(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", ["vector", "apply", "sweep", "explain", "convert"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        steer(verb, "--help")
    assert stop.value.code == 0
    assert "--quiet" in capsys.readouterr().out


def test_a_vector_is_made_of_a_behaviour(
    mamba: Subject, data: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["--data", data, "--behaviours", "bigness", "--state", "ssm", "--sites", "0-1", "--balance", "swap"]
    out, letters = tmp_path / "v.safetensors", tmp_path / "l.safetensors"
    assert steer("vector", mamba.name, *made, "--out", out, "--letters", letters, *CPU, "-q") == 0
    wanted = behaviour_vector(mamba, balanced(rows[:8]), sites=(0, 1), state=["ssm"])
    found = load_vector(out, mamba)
    assert found.hash == wanted.vector.hash
    assert found.about.source == "bigness, letters balanced by swap, seed 0"
    assert found.about.options == {}
    assert wanted.letters is not None
    assert load_vector(letters, mamba).hash == wanted.letters.hash
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("mean of 8 pairs on ")
    assert f"hash {found.hash}" in said


def test_a_vector_is_made_of_pairs(llama: Subject, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("positive,negative\nyes it is,no it is\nit is big,it is not\n4 is,5 is\n")
    out = tmp_path / "v.safetensors"
    pairs = load_pairs(tmp_path / "p.csv")
    for method, how in (("lda", {"shrinkage": 0.5}), ("logistic", {"penalty": 0.25})):
        ((name, value),) = how.items()
        options = ["--method", method, f"--{name}", value, "--normalise", "unit", "--sites=-1,2"]
        assert steer("vector", llama.name, "--pairs", tmp_path / "p.csv", *options, "--out", out, *CPU, "-q") == 0
        found = load_vector(out, llama)
        assert (found.sites, found.about.method, found.about.n_pairs) == ((-1, 2), method, 3)
        assert (found.about.source, found.about.options) == ("p.csv", how)
        assert float(found.residual[2].norm()) == pytest.approx(1, abs=1e-5)
        given: Any = {"method": method, "normalise": "unit", "sites": (-1, 2), **how}
        assert found.hash == pair_vector(llama, pairs, **given).hash


@pytest.fixture
def saved(mamba: Subject, rows: list[Row], tmp_path: Path) -> Path:
    return save_vector(behaviour_vector(mamba, rows, state=True).vector, tmp_path / "saved.safetensors")


def test_prompts_are_continued(mamba: Subject, saved: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["it is", "no it"]
    options = ["--multipliers", "0", "-2", "--max-tokens", "5", "--components", "ssm", "--state-positions", "onward"]
    assert steer("apply", mamba.name, saved, "--prompt", *prompts, *options, "--json", *CPU) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    vector = load_vector(saved, mamba)
    wanted = generate(mamba, prompts, vector, [0, -2], components=("ssm",), state_positions="onward", max_tokens=5)
    assert [(f["question"], f["multiplier"], tuple(f["tokens"])) for f in found] == [
        (prompts[s.prompt], s.multiplier, s.tokens) for s in wanted
    ]
    asked = data / "test" / "bigness" / "test_dataset_open_ended.json"
    assert steer("apply", mamba.name, saved, "--questions", asked, "--max-tokens", "2", *CPU) == 0
    assert "How big is it?" in capsys.readouterr().out


def test_a_sweep_makes_its_vector_and_writes_its_tables(
    mamba: Subject, data: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--state", "--sites", "0-1", "--multipliers", "-1", "0", "1", "--controls", "2", "--samples", "1"]
    arguments = [
        mamba.name,
        "--data",
        data,
        *options,
        "--max-tokens",
        "2",
        "--reference",
        "--png",
        "--out",
        out,
        *CPU,
        "-q",
    ]
    assert steer("sweep", *arguments) == 0
    said = capsys.readouterr().out
    assert origin()[0] in said
    assert "bigness: nothing published" in said
    assert "Hermes-RWKV-v5-7b" in said
    made = behaviour_vector(mamba, rows[:8], sites=(0, 1), state=True)
    wanted = sweep(
        mamba,
        made.vector,
        rows[8:],
        sites=(0, 1),
        letters=made.letters,
        multipliers=(-1, 0, 1),
        controls=2,
        behaviour="refusal",
    )
    with (out / "points.csv").open() as stream:
        points = [p for p in csv.DictReader(stream) if p["behaviour"] == "refusal"]
    assert [float(p["match"]) for p in points] == pytest.approx([p.match for p in wanted.points], abs=1e-6)
    facts = json.loads((out / "sweep.json").read_text())["facts"]
    assert facts["vectors"][0]["hash"] == made.vector.hash
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {s["multiplier"] for s in samples} == {-1, 0, 1}
    choices = json.loads((out / "sweep.json").read_text())["choices"]
    assert [(s["behaviour"], s["mode"], s["site"]) for s in samples[::3]] == [
        (c["behaviour"], c["mode"], c["site"]) for c in choices
    ]
    assert {c["mode"] for c in choices} == {"residual", "state", "both"}
    for name in ("curves-bigness", "sites-bigness", "curves-refusal", "sites-refusal"):
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_a_given_vector_and_file(mamba: Subject, saved: Path, data: Path, tmp_path: Path) -> None:
    test = data / "test" / "bigness" / "test_dataset_ab.json"
    options = ["--modes", "residual", "--controls", "0", "--multipliers", "-1", "1", "--labels", "1", "2"]
    arguments = ["--vector", saved, "--test", test, *options, "--operator", "reflect", "--out", tmp_path / "o"]
    assert steer("sweep", mamba.name, *arguments, *CPU, "-q") == 0
    with (tmp_path / "o" / "points.csv").open() as stream:
        points = list(csv.DictReader(stream))
    assert {(p["behaviour"], p["mode"], p["operator"]) for p in points} == {("test_dataset_ab", "residual", "reflect")}


def test_a_given_vector_has_the_control_of_a_given_letter_vector(
    mamba: Subject, saved: Path, data: Path, rows: list[Row], tmp_path: Path
) -> None:
    letters = behaviour_vector(mamba, rows, state=True).letters
    assert letters is not None
    file, out = save_vector(letters, tmp_path / "letters.safetensors"), tmp_path / "o"
    options = ["--controls", "0", "--multipliers", "-1", "1", "--modes", "residual", "--out", out, *CPU, "-q"]
    arguments = [mamba.name, "--vector", saved, "--data", data, "--behaviours", "bigness", "bigness", *options]
    assert steer("sweep", *arguments, "--letter-vector", file) == 0
    wanted = sweep(
        mamba,
        load_vector(saved, mamba),
        rows[8:],
        modes=("residual",),
        multipliers=(-1, 1),
        controls=0,
        letters=letters,
        behaviour="bigness",
    )
    with (out / "curves.csv").open() as stream:
        curves = list(csv.DictReader(stream))
    assert len(curves) == len(wanted.curves) == 3  # a behaviour that is named twice is swept once
    assert sum(bool(c["letters"]) for c in curves) == 1
    own = next(c.letters for c in wanted.curves if c.letters == c.letters)
    assert float(next(c["letters"] for c in curves if c["letters"])) == pytest.approx(own, abs=1e-6)
    refused("is a vector by mean, not of the letter", "sweep", *arguments, "--letter-vector", saved)


def test_bad_input_is_refused_in_one_line(
    mamba: Subject, llama: Subject, saved: Path, data: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "x.safetensors", *CPU, "-q"]
    rows = data / "generate" / "bigness" / "generate_dataset.json"
    residual = save_vector(load_vector(saved).only(mode="residual"), tmp_path / "residual.safetensors")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"question": "Is it?\n(A) yes\n(B) no", "answer_matching_behavior": "(A)"}]))
    refused("one of --rows, --data", "vector", mamba.name, *out)
    refused("one of --rows, --data", "vector", mamba.name, "--rows", rows, "--pairs", rows, *out)
    refused("leave out --sites and --state", "vector", "--latent", "a:b/1", "--sites", "1", *out)
    refused("leave out --rows", "sweep", "no-model", "--vector", saved, "--test", rows, "--rows", rows, *out)
    refused("choose parts of it with --modes", "sweep", "no-model", "--vector", saved, "--test", rows, "--state", *out)
    refused("row 1: answer_not_matching_behavior is missing", "vector", mamba.name, "--rows", bad, *out)
    refused("name it with --behaviours: bigness, refusal", "vector", mamba.name, "--data", data, *out)
    refused("name the MODEL", "vector", "--rows", rows, *out)
    refused("leave out MODEL", "vector", mamba.name, "--latent", "a:b/1", *out)
    refused("--shrinkage is auto or a number", "vector", mamba.name, "--rows", rows, "--shrinkage", "x", *out)
    refused("sites are all, blocks", "vector", mamba.name, "--rows", rows, "--sites", "x", *out)
    refused("ends in .safetensors", "vector", mamba.name, "--rows", rows, "--out", tmp_path / "x.pt", *CPU, "-q")
    refused("give prompts", "apply", mamba.name, saved, *CPU)
    refused("was made on", "apply", llama.name, saved, "--prompt", "it", *CPU)
    refused("a vector is a .safetensors or .gguf file", "apply", mamba.name, "nothing", "--prompt", "it", *CPU)
    refused("nothing to test on", "sweep", mamba.name, "--rows", rows, *out)
    for flag in ("--rows", "--test"):
        refused(f"leave out {flag}, or --data", "sweep", "no-model", "--data", tmp_path, flag, rows, *out)
    refused("no rows to make a vector of", "sweep", mamba.name, "--test", rows, *out)
    refused("name it with --data", "sweep", mamba.name, "--test", rows, "--behaviours", "x", *out)
    refused("--limit is at least 1, got -5", "vector", mamba.name, "--rows", rows, "--limit", "-5", *out)
    refused("--penalty takes finite", "vector", mamba.name, "--rows", rows, "--penalty", "nan", *out)
    refused("above 0", "vector", mamba.name, "--rows", rows, "--method", "logistic", "--penalty", "0", *out)
    for option, value in (("--penalty", "0"), ("--shrinkage", "2")):  # before any model
        refused(
            "above 0" if value == "0" else "0 to 1, got 2", "sweep", "no-model", "--test", rows, option, value, *out
        )
    given = ("--vector", saved, "--test", rows, "--samples", "1")
    refused("no open questions for --samples", "sweep", "no-model", *given, *out)
    refused("--max-tokens is at least 1", "apply", mamba.name, saved, "--prompt", "it", "--max-tokens", "0", *CPU)
    refused("a vector acts at", "sweep", "no-model", "--test", rows, "--positions", "x", *out)  # before any model
    refused("unknown template", "sweep", "no-model", "--test", rows, "--template", "x", *out)
    refused("no ssm to choose", "apply", mamba.name, residual, "--prompt", "it is", "--components", "ssm", *CPU)
    refused("--controls is at least 0", "sweep", mamba.name, "--test", rows, "--controls", "-1", *out)
    refused("name it with --model", "convert", "a.gguf", "b.safetensors")
    refused("from .safetensors to .gguf or back", "convert", "a.pt", "b.gguf")
    assert not list(tmp_path.glob("x*"))


def test_vectors_are_converted_both_ways(
    llama: Subject, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    vector = behaviour_vector(llama, rows).vector
    file = save_vector(vector, tmp_path / "v.safetensors")
    assert steer("convert", file, tmp_path / "v.gguf") == 0
    assert "llama.cpp reads no direction.0" in capsys.readouterr().out
    assert steer("convert", tmp_path / "v.gguf", tmp_path / "w.safetensors", "--model", llama.name, *CPU) == 0
    found = load_vector(tmp_path / "w.safetensors", llama)
    for site in (0, 1, 2):
        assert torch.equal(found.residual[site], vector.residual[site])
    assert steer("convert", file, tmp_path / "s.gguf", "--sites", "1-2") == 0
    for sites in ("x", "5-2", "1-9999999999999", "-1"):
        refused("sites are numbers from 0", "convert", file, tmp_path / "s.gguf", f"--sites={sites}")


def test_files_that_are_no_control_vectors_are_refused(
    llama: Subject, mamba: Subject, rows: list[Row], tmp_path: Path
) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from exegete.steering import export_control_vector, import_control_vector

    vector = behaviour_vector(mamba, rows, sites=(0,), state=True).vector
    for held, message in ((vector, "outputs of blocks only"), (vector.only(mode="state"), "outputs of blocks only")):
        with pytest.raises(ExegeteError, match=message):
            export_control_vector(held, tmp_path / "a.gguf")
    file = export_control_vector(vector.only(mode="residual"), tmp_path / "a.gguf")
    with pytest.raises(ExegeteError, match="for a model of type 'mamba', .* is 'llama'"):  # noqa: RUF043
        import_control_vector(file, llama)
    for size in (0, 10, 100, len(file.read_bytes()) - 20):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ExegeteError, match="no readable GGUF file"):
            import_control_vector(cut, mamba)
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ExegeteError, match="a GGUF file of llama"):
        import_control_vector(tmp_path / "other.gguf", mamba)
    with pytest.raises(ExegeteError, match="no control vector"):
        import_control_vector(tmp_path / "nothing.gguf", mamba)


def test_without_the_gguf_package_the_install_line_is_said(
    llama: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from exegete.steering import import_control_vector

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExegeteError, match=r"pip install 'exegete\[gguf\]'"):
        import_control_vector(tmp_path / "a.gguf", llama)
