"""The command line: quick to start, one clear line and exit code 2 for bad input, the same results as the library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from exegete.cli import main
from exegete.cli.options import build_parser, fields, given
from exegete.config import RunConfig

COMMANDS = ("demo", "run", "collect", "explain", "score", "report", "status")
SECOND = ("steer", "lens", "elk")


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must be refused; return its one line."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("exegete: ")
    return lines[0]


def toy_arguments(toy: Path, out: Path) -> list[str]:
    text = ["--text", str(toy / "text.jsonl"), "--row-length", "64", "--window", "8"]
    sizes = ["--n-train", "12", "--n-test", "12", "--n-negatives", "12", "--min-train", "2", "--min-test", "2"]
    return [
        str(toy / "model"),
        str(toy / "coders"),
        *text,
        *sizes,
        "--latents",
        "4",
        "--donors",
        "2",
        "--out",
        str(out),
    ]


def test_help_is_quick_and_names_every_command() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "exegete", "--help"], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begun
    for command in (*COMMANDS, *SECOND):
        assert command in done.stdout
    assert seconds < 30, "the machine is stuck"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--verbose" in capsys.readouterr().out


@pytest.mark.parametrize("command", SECOND)
def test_every_verb_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    verbs = re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert len(verbs) >= 4
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            main([command, verb, "--help"])
        assert stop.value.code == 0
        assert "--verbose" in capsys.readouterr().out


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    flags = [flag for _, flag, _, _ in fields()]
    assert len(flags) == len(set(flags)), "two settings share a flag"
    for name, _, _, text in fields():
        assert len(text) > 10, name


def test_flags_become_settings() -> None:
    options = build_parser().parse_args(
        ["run", "m", "c", "--out", "o", "--latents", "7", "--max-tokens", "500k", "--window", "16", "--bos", "none"]
    )
    nested = given(options)
    assert nested == {
        "latents": {"count": 7},
        "corpus": {"max_tokens": 500_000, "bos": "none"},
        "examples": {"window": 16},
    }
    assert RunConfig.from_dict(nested).corpus.bos == "none"


def test_run_then_each_stage_again(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["run", *toy_arguments(toy_folder, out), "-q"]) == 0
    first = capsys.readouterr().out
    assert str(out / "report" / "index.html") in first
    assert "layers.0" in first
    assert (out / "report" / "index.html").is_file()
    for command in ("explain", "score", "report", "status"):
        assert main([command, str(out), "-q"]) == 0, command
    capsys.readouterr()
    assert main(["status", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["coders"]["layers.0"]["complete"] is True
    assert status["coders"]["layers.0"]["scored"]["detection"] >= 1


def test_stages_one_by_one_equal_run(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exegete.runs import open_run

    main(["run", *toy_arguments(toy_folder, tmp_path / "a"), "-q"])
    main(["collect", *toy_arguments(toy_folder, tmp_path / "b"), "-q"])
    assert "firings of" in capsys.readouterr().out
    for command in ("explain", "score", "report"):
        assert main([command, str(tmp_path / "b"), "-q"]) == 0
    rows = []
    for name in "ab":
        results = open_run(tmp_path / name).results()
        rows.append(results.canonical_rows())
        results.close()
    assert rows[0] == rows[1]


def test_bad_input_is_one_line_and_nothing_half_written(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    good = toy_arguments(toy_folder, out)

    def with_change(position: int, value: str) -> list[str]:
        return [*good[:position], value, *good[position + 1 :]]

    assert "nothing-here" in refused(capsys, "run", *with_change(0, str(tmp_path / "nothing-here")))
    assert "nothing-here" in refused(capsys, "run", *with_change(1, str(tmp_path / "nothing-here")))
    assert "layers.7" in refused(capsys, "run", *good, "--hookpoints", "layers.7")
    assert "nowhere.txt" in refused(capsys, "run", *with_change(3, str(tmp_path / "nowhere.txt")))
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in refused(capsys, "run", *with_change(3, str(tmp_path / "empty.txt")))
    assert "windw" in refused(capsys, "run", *good, "--windw", "3")
    assert "strategy" in refused(capsys, "run", *good, "--strategy", "best")
    assert "--latents" in refused(capsys, "run", *good, "--latents", "many")
    (tmp_path / "bad.yaml").write_text("subject: [")
    assert "not valid YAML" in refused(capsys, "run", tmp_path / "bad.yaml", "--out", out)
    assert "no configuration file" in refused(capsys, "run", tmp_path / "no.yaml", "--out", out)
    assert "a model and a coder" in refused(capsys, "run", "only-one", "--out", out)
    assert "--llm" in refused(capsys, "run", *good, "--explainer", "default")
    url = "http://127.0.0.1:9/v1#tiny"
    assert "127.0.0.1:9" in refused(capsys, "run", *good, "--explainer", "default", "--llm", url)
    assert "scorer" in refused(capsys, "run", *good, "--scorers", "detektion")
    for command in ("explain", "score", "report", "status"):
        assert "not a run folder" in refused(capsys, command, tmp_path / "none")
    assert not (out / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_place_that_cannot_be_written_is_refused_in_one_line(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = toy_arguments(toy_folder, tmp_path / "file" / "run")
    assert str(tmp_path / "file") in refused(capsys, "run", *arguments)


def test_a_coder_that_does_not_fit_is_refused_with_both_sizes(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from exegete.testing import toy_topk_coder

    toy_topk_coder(tmp_path / "coders", d=48, width=64, k=4, hookpoints=("layers.0",), seed=0)
    arguments = toy_arguments(toy_folder, tmp_path / "run")
    line = refused(capsys, "run", arguments[0], tmp_path / "coders", *arguments[2:])
    assert "48" in line
    assert "32" in line


def test_a_damaged_shard_is_named(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["collect", *toy_arguments(toy_folder, out), "-q"]) == 0
    capsys.readouterr()
    shard = next((out / "store" / "layers.0").glob("shard-*.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    # A fresh process, since checksums are checked once per process.
    done = subprocess.run(
        [sys.executable, "-m", "exegete", "explain", str(out), "-q"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_hostile_files_do_no_harm(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle
    import shutil

    marker = tmp_path / "harm"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    coders = tmp_path / "coders" / "layers.0"
    coders.mkdir(parents=True)
    (coders / "sae.pt").write_bytes(pickle.dumps(Evil()))
    arguments = toy_arguments(toy_folder, tmp_path / "run")
    refused(capsys, "run", arguments[0], tmp_path / "coders", *arguments[2:])
    shutil.copytree(toy_folder / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    line = refused(capsys, "run", tmp_path / "model", *arguments[1:])
    assert "--remote-code" in line or "remote" in line
    assert not marker.exists()


def test_a_corpus_of_html_and_bidi_marks_is_escaped(toy_folder: Path, tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script> <img src=x onerror=alert(2)> \u202eevil\u202c \u2066x\u2069 & "quotes" '
    text = tmp_path / "nasty.jsonl"
    text.write_text("".join(json.dumps({"text": nasty * (4 + i % 3)}) + "\n" for i in range(30)))
    arguments = toy_arguments(toy_folder, tmp_path / "run")
    arguments[3] = str(text)
    assert main(["run", *arguments, "--duplicates", "0", "-q"]) == 0
    pages = list((tmp_path / "run" / "report").rglob("*.html"))
    assert pages
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert "<script>alert" not in content
        assert "<img" not in content
        assert not any(mark in content for mark in "\u202e\u202c\u2066\u2069")
