"""What a subject is said to be: its sizes, where it can be read, what it carries, and how exactly it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import exegete as ex
from exegete.cli import main
from exegete.subjects import SubjectInfo, load_subject
from exegete.testing import toy_subject_model


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_subject_model("mamba", tmp_path_factory.mktemp("mamba"))


def inspected(folder: Path) -> SubjectInfo:
    return ex.inspect_subject(load_subject(str(folder)))


def test_a_recurrent_subject(mamba: Path) -> None:
    subject = load_subject(str(mamba))
    info = ex.inspect_subject(subject)
    assert (info.family, info.architecture, info.blocks, info.d) == ("mamba", "MambaForCausalLM", 3, 32)
    assert info.context is None
    assert info.parameters == sum(p.numel() for p in subject.model.parameters())
    assert sum(found.count for found in info.hookpoints) == len(subject.hookpoints())
    found = {one.pattern: (one.count, one.d) for one in info.hookpoints}
    assert found["layers.*"] == (3, 32)
    assert found["layers.*.mixer.in_proj"] == (3, 2 * subject.model.config.intermediate_size)
    assert found["layers.*.mixer.conv1d"] == (3, None)  # channels before positions
    assert info.verdict is not None
    assert (info.verdict.route, info.verdict.components) == ("chunks", ("conv", "ssm"))
    assert ex.inspect_subject(subject, tried=False).verdict is None


@pytest.mark.parametrize(("family", "where"), [("gpt2", "h.*"), ("mixtral", "layers.*"), ("gpt_neox", "layers.*")])
def test_sizes_are_what_a_pass_puts_out(family: str, where: str, tmp_path: Path) -> None:
    folder = toy_subject_model(family, tmp_path)
    subject, info = load_subject(str(folder)), inspected(folder)
    assert info.context == subject.model.config.max_position_embeddings
    assert {one.pattern: one.count for one in info.hookpoints}[where] == info.blocks
    for group in info.hookpoints:
        if group.d is not None and not group.pattern.startswith("rotary"):
            assert group.d in {subject.d(name) for name, _ in subject.points(group.pattern)}


def test_the_command_says_it(mamba: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(mamba), "--subject"]) == 0
    text = capsys.readouterr().out
    for part in (
        "conv, ssm in blocks 0-2",
        "-1 (the embedding) to 2, d = 32",
        "its own chunks   wrong: off by",
        "chunks here      exact: off by",
        "is fed several tokens at once",
        "layers.*.mixer.out_proj",
    ):
        assert part in text
    assert main(["inspect", str(mamba), "--subject", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read == json.loads(json.dumps(inspected(mamba).as_dict()))
    assert read["verdict"]["chunks"] is False


def test_what_fails_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toy_subject_model("rwkv", tmp_path)
    assert main(["inspect", str(folder), "--subject", "--json"]) == 0
    read = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert read["verdict"]["batch_error"] is None
    assert main(["inspect", str(folder), "--subject"]) == 0
    assert "… of rows        fails" in capsys.readouterr().out


def test_bad_input_is_one_line(mamba: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        ([str(mamba), "--dtype", "float32"], "give --subject"),
        ([str(mamba), "--subject", "--hookpoints", "layers.0"], "--hookpoints chooses coders"),
        ([str(mamba)], "to look at a model, give --subject"),
        ([str(tmp_path / "none"), "--subject"], "there is no folder"),
        ([str(mamba), "--subject", "--dtype", "int3"], "dtype"),
    ):
        assert main(["inspect", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert part in error
        assert "\n" not in error
