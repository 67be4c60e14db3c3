"""``exegete elk`` from a set to probes, and its refusals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from exegete.cli import elk, main
from exegete.elk import encode, load_questions
from exegete.elk.questions import SPLITS
from exegete.errors import ExegeteError, InputError, MismatchError, NotFoundError


def run(*arguments: str) -> int:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-q", "--quiet", action="count", default=2)
    parser = argparse.ArgumentParser()
    elk.add_parsers(parser.add_subparsers(), [common])
    return elk.run(parser.parse_args(["elk", *arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toys: Any) -> Path:
    place = tmp_path_factory.mktemp("elk")
    subject = toys.subject("mamba")
    subject.model.save_pretrained(place / "model")
    subject.tokenizer.save_pretrained(place / "model")
    run("data", "addition", "--out", str(place / "set"), "--digits", "2",
        "--train", "40", "--validation", "80", "--test", "60")  # fmt: skip
    return place


def test_from_a_set_to_probes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = {name: str(folder / name) for name in ("model", "set", "quirky", "held", "found")}
    tuned = ("finetune", at["model"], at["set"], "--out", at["quirky"], "--lora-rank", "0", "--steps", "3")
    assert run(*tuned, "--learning-rate", "1e-3", "--device", "cpu") == 0
    model = f"{at['quirky']}/model"
    extracted = ("extract", model, at["set"], "--out", at["held"], "--device", "cpu")
    assert run(*extracted, "--validation", "150", "--test", "120") == 0
    assert run(*extracted, "--validation", "150", "--test", "120") == 0
    told = capsys.readouterr().out
    assert "loss on the validation rows" in told
    assert "AUROC of the model's answers against what each character says" in told
    assert told.count("already there") == 2
    probed = ("probe", at["held"], "--out", at["found"], "--probes", "lr", "mean-diff", "crc", "--device", "cpu")
    more = ("--transfers", "A->B", "B->B", "AE->BH", "--intervene", "last", "--random", "2", "--reference")
    assert run(*probed, *more, "--model", model, "--data", at["set"]) == 0
    told = capsys.readouterr().out
    assert "AUROC against the truth [95 % intervals]" in told
    assert "A -> B   " in told
    assert "reflected along a probe" in told
    assert "published" in told
    held = json.loads((folder / "found" / "probes.json").read_text())
    assert {row["probe"] for row in held["interventions"]} == {"lr", "mean-diff"}
    assert held["facts"]["extraction"]["key"]["data"]
    for name, columns in (
        ("transfers", ("auroc", "on_held_out")),
        ("recovered", ("share", "auroc", "floor", "ceiling")),
        ("interventions", ("flipped", "moved", "before", "after", "flipped_by_random", "moved_by_random")),
    ):
        assert held[name], name
        for column in columns:
            assert {f"{column}_low", f"{column}_high", f"{column}_n", f"{column}_bases"} <= set(held[name][0])
    before = {path: path.read_bytes() for path in (folder / "found").iterdir()}
    with pytest.raises(MismatchError, match="is not the model"):
        run(*probed, "--intervene", "last", "--model", at["model"], "--data", at["set"])
    run("data", "addition", "--out", str(folder / "words"), "--digits", "2", "--wording", "standardised",
        "--train", "40", "--validation", "80", "--test", "60")  # fmt: skip
    with pytest.raises(MismatchError, match="other words"):
        run(*probed, "--intervene", "last", "--model", model, "--data", str(folder / "words"))
    early = ("probe", at["held"], "--out", at["found"], "--intervene", "last", "--model", model, "--data", at["set"])
    for wrong, why in (
        (("--random", "-1"), "--random is 0 or more"),
        (("--pool", "C"), "pool"),
        (("--probes", "crc"), "along lr and mean-diff"),
        (("--transfers", "B->B"), "of A or AE"),
    ):
        with pytest.raises(ExegeteError, match=why):
            run(*early, *wrong)
    assert {path: path.read_bytes() for path in (folder / "found").iterdir()} == before
    with pytest.raises(MismatchError, match="other settings"):
        run("extract", at["model"], at["set"], "--out", at["held"], "--device", "cpu")


def test_refusals_are_one_line(folder: Path, tmp_path: Path) -> None:
    model, data, out = str(folder / "model"), str(folder / "set"), str(tmp_path / "out")
    tuned = ("finetune", model, data, "--out", out, "--device", "cpu")
    for arguments, kind, told in (
        (("data", "capitals", "--out", out), InputError, "--files"),
        (("data", "captals", "--out", out), NotFoundError, "addition"),
        (("data", "nli", "--out", out, "--files", str(tmp_path), "--digits", "2"), InputError, "--digits"),
        (("data", "squaring", "--out", out, "--digits", "1"), InputError, "9 different operands"),
        ((*tuned, "--lora-targets", "dt_proj"), InputError, "dt_proj"),
        (("extract", model, str(tmp_path), "--out", out), NotFoundError, "elk data"),
        (("extract", model, data, "--out", out, "--sites", "7", "--device", "cpu"), NotFoundError, "sites"),
        (("probe", str(tmp_path), "--out", out), NotFoundError, "elk extract"),
        (("probe", str(tmp_path), "--out", out, "--intervene", "1"), InputError, "--model"),
        (("probe", str(tmp_path), "--out", out, "--model", "m"), InputError, "are for --intervene"),
        (("probe", str(tmp_path), "--out", out, "--data", "d"), InputError, "are for --intervene"),
    ):
        with pytest.raises(ExegeteError, match=told) as error:
            run(*arguments)
        assert isinstance(error.value, kind)
        assert "\n" not in str(error.value)


def test_long_rows_are_left_out_or_refused_before_anything_is_written(
    folder: Path, toys: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = toys.subject("llama")
    lengths = [encode(load_questions(folder / "set"), split, subject).lengths for split in SPLITS]
    most = min(int(part[:, 0].max()) for part in lengths) - 1  # so that the longest of each split do not fit
    subject.model.config.max_position_embeddings = most
    subject.model.save_pretrained(tmp_path / "short")
    subject.tokenizer.save_pretrained(tmp_path / "short")
    model, data = str(tmp_path / "short"), str(folder / "set")
    tuned = ("finetune", model, data, "--lora-rank", "0", "--steps", "1", "--device", "cpu", "--out")
    held = ("extract", model, data, "--validation", "160", "--test", "120", "--device", "cpu", "--out")
    for command in (tuned, held):
        with pytest.raises(InputError, match=rf"reads up to {most} tokens.*--most-tokens {most}"):
            run(*command, str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        with pytest.raises(InputError, match="have over 3 tokens"):
            run(*command, str(tmp_path / "out"), "--most-tokens", "3")
        assert not (tmp_path / "out").exists()
        assert run(*command, str(tmp_path / command[0]), "--most-tokens", str(most)) == 0
    assert f"rows of over {most} tokens are left out" in caplog.text


def test_the_command_itself_ends_with_2_and_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = str(folder / "model"), str(folder / "set"), tmp_path / "out"
    code = main(["elk", "finetune", model, data, "--out", str(out), "--device", "cpu", "--lora-targets", "dt_proj"])
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(told) == 1
    assert "LoRA on dt_proj would do nothing" in told[0]
    assert not out.exists()


def test_the_parser_needs_no_torch() -> None:
    import subprocess

    code = (
        "import argparse, sys; from exegete.cli import elk;"
        "elk.add_parsers(argparse.ArgumentParser().add_subparsers());"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
