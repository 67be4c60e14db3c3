"""The command line of lenses: every verb on a tiny model, and bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exegete.cli import lens as command
from exegete.cli.options import Parser
from exegete.errors import ExegeteError, InputError, MismatchError


def cli(*arguments: Any) -> int:
    common = Parser(add_help=False)
    common.add_argument("-q", "--quiet", action="count", default=0)
    parser = Parser(prog="exegete")
    command.add_parsers(parser.add_subparsers(parser_class=Parser), [common])
    return command.run(parser.parse_args(["lens", *map(str, arguments), "-q"]))


@pytest.fixture(scope="module")
def trained(llama_folder: Path, lens_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lens-cli") / "lens"
    options = ["--steps", 4, "--batch-tokens", 300, "--row-length", 32, "--validation-tokens", "1k", "--sites=-1,0,1"]
    assert cli("train", llama_folder, "--out", out, "--text", lens_text_file, *options) == 0
    return out


def test_train_writes_a_lens_and_says_what_came_of_it(
    trained: Path, llama_folder: Path, lens_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", 4, "--batch-tokens", 300, "--row-length", 32, "--validation-tokens", "1k", "--sites=-1,0,1"]
    assert cli("train", llama_folder, "--out", trained, "--text", lens_text_file, *options) == 0  # complete: only read
    said = capsys.readouterr().out
    assert "validation KL to the model, nats per token" in said
    assert f"next: exegete lens evaluate {llama_folder} --lens {trained}" in said


def test_evaluate_measures_on_test_documents_and_writes_tables(
    trained: Path, llama_folder: Path, lens_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", lens_text_file, "--row-length", 32]
    out = ["--out", tmp_path / "e", "--transfer", "--reference", "pythia"]
    assert cli("evaluate", llama_folder, "--lens", trained, *text, *out) == 0
    said = capsys.readouterr().out
    assert "part test" in said
    assert "pythia 6.9b" in said
    assert "mamba 2.8b" not in said
    names = {path.name for path in (tmp_path / "e").iterdir()}
    assert {"evaluation.json", "evaluation.csv", "kl.svg", "transfer-tuned-ce.csv", "transfer-tuned-kl.svg"} <= names
    assert cli("evaluate", llama_folder, *text, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["part"] == "all"
    assert {row["lens"] for row in data["rows"]} == {"logit", "model"}


def test_evaluate_takes_the_rows_of_the_training_and_refuses_others(
    trained: Path, llama_folder: Path, lens_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", llama_folder, "--lens", trained, "--text", lens_text_file]
    assert cli(*asked, "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert cli(*asked, "--row-length", 32, "--json") == 0
    assert own == json.loads(capsys.readouterr().out)
    assert own["part"] == "test"
    for other in (["--row-length", 16], ["--max-tokens", 300]):
        with pytest.raises(MismatchError, match="its test part may hold text that the lens has seen"):
            cli(*asked, *other)
    assert cli(*asked, "--row-length", 16, "--part", "all", "--json") == 0


def test_evaluate_refuses_lenses_of_different_splits(
    trained: Path, llama_folder: Path, lens_text_file: Path, tmp_path: Path
) -> None:
    options = ["--steps", 1, "--batch-tokens", 50, "--row-length", 32, "--validation-tokens", 50, "--seed", 1]
    text = ["--text", lens_text_file]
    assert cli("train", llama_folder, "--out", tmp_path / "l", *text, *options) == 0
    with pytest.raises(MismatchError, match="different parts of this text"):
        cli("evaluate", llama_folder, *text, "--lens", trained, tmp_path / "l")


def test_the_models_own_output_is_measured_as_well(
    trained: Path, llama_folder: Path, lens_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", llama_folder, "--lens", trained, "--text", lens_text_file]
    assert cli(*asked, "--sites=0,2", "--tokens", 200) == 0  # at site 2 both KL are 0
    assert "KL at most that of logit at 2 of 2 sites" in capsys.readouterr().out


def test_show_generate_and_convert(
    trained: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "the cat sat on a mat"]
    assert cli("show", llama_folder, *prompt, "--lens", trained, "--out", tmp_path / "p.html", tmp_path / "p.svg") == 0
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    (tmp_path / "prompt.txt").write_text("the mat")
    assert cli("show", llama_folder, "--prompt-file", tmp_path / "prompt.txt", "--sites", "0") == 0
    assert "output" in capsys.readouterr().out
    assert cli("generate", llama_folder, *prompt, "--lens", trained, "--sites", "0,2", "--tokens", 3) == 0
    said = capsys.readouterr().out
    assert "--- site 0" in said
    assert "--- site 2" in said
    assert cli("convert", llama_folder, trained, "--to", "tuned-lens", "--out", tmp_path / "t") == 0
    assert cli("convert", llama_folder, tmp_path / "t", "--to", "exegete", "--out", tmp_path / "x") == 0
    assert (tmp_path / "x" / "lens.safetensors").read_bytes() == (trained / "lens.safetensors").read_bytes()
    with pytest.raises(InputError, match="has that form already"):
        cli("convert", llama_folder, trained, "--to", "exegete", "--out", tmp_path / "y")
    with pytest.raises(InputError, match="holds a lens already"):
        cli("convert", llama_folder, trained, "--to", "tuned-lens", "--out", tmp_path / "t")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "{model}", "--out", "{tmp}/a"], "no text given"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--sites", "9"], "sites -1"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--state"], "carries no recurrent state"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--no-repeat"], "give more text"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--steps", "0"], "steps is at least 1"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--checkpoint-every", "0"], "at least 1"),
        (["evaluate", "{model}", "--text", "{text}", "--lens", "{tmp}"], "there is no lens in"),
        (["show", "{model}"], "--prompt TEXT or --prompt-file"),
        (["show", "{model}", "--prompt-file", "{tmp}/none"], "cannot be read"),
        (["show", "{model}", "--prompt", "x", "--out", "{tmp}/a.pdf"], "a picture is"),
        (["show", "{tmp}/none", "--prompt", "x"], "there is no folder"),
        (["show", "{model}", "--prompt", ""], "the prompt is empty"),
        (["show", "{model}", "--prompt", "x", "--top", "0"], "at least one of the likeliest tokens"),
        (["show", "{model}", "--prompt", "x", "--out", "{tmp}/a.html", "{tmp}/b.pdf"], "a picture is"),
        (["show", "{model}", "--prompt", "x", "--out", "{tmp}/a.html", "{tmp}/a.html"], "asked for twice"),
        (["show", "{model}", "--prompt", "x", "--out", "{tmp}/a.html", "{text}/b.svg"], "is a file, not a folder"),
        (["show", "{model}", "--prompt", "x " * 500, "--out", "{tmp}/a.html", "{tmp}/b.png"], "holds at most 500"),
        (["evaluate", "{model}", "--text", "{text}", "--tokens", "0"], "at least one token is measured"),
        (["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--test-share", "1"], "lies between 0 and 1"),
        (
            ["train", "{model}", "--out", "{tmp}/a", "--text", "{text}", "--packing", "--attend", "document"],
            "as a whole",
        ),
        (["generate", "{model}", "--prompt", "x", "--sites", "first"], "sites are all, blocks, last"),
        (["latents", "{tmp}", "all"], "is not a run folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, llama_folder: Path, lens_text_file: Path, tmp_path: Path
) -> None:
    filled = [a.format(model=llama_folder, text=lens_text_file, tmp=tmp_path) for a in arguments]
    with pytest.raises(ExegeteError, match=said) as caught:
        cli(*filled)
    assert "\n" not in str(caught.value)
    # Nothing is written before all is checked; only how much text there is takes reading it.
    assert not any(tmp_path.iterdir()) or "--no-repeat" in arguments


def test_a_lens_is_measured_once(trained: Path, llama_folder: Path, lens_text_file: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        cli("evaluate", llama_folder, "--lens", trained, trained, "--text", lens_text_file, "--row-length", 32)
