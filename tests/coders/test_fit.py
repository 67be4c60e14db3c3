from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.coders import ReLU, TopK, fit_coder
from exegete.coders.fit import same_model
from exegete.coders.linear import LinearCoder
from exegete.errors import MismatchError
from exegete.subjects import load_subject
from exegete.subjects.subject import Subject
from exegete.testing import toy_llama
from exegete.types import Side


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A Llama of 3 layers with 32 dimensions, 64 inside its MLPs."""
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("m") / "toy")), device="cpu")


@pytest.fixture
def released(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The same, as if it came from the hub."""
    monkeypatch.setattr(subject, "name", "org/Toy-2-2b")
    return subject


def coder(
    hookpoint: str,
    d_in: int = 32,
    d_out: int | None = None,
    side: Side = "output",
    target: tuple[str, Side] | None = None,
    **options: Any,
) -> LinearCoder:
    d_out = d_in if d_out is None else d_out
    return LinearCoder(
        name="c",
        hookpoint=hookpoint,
        side=side,
        target=target,
        encoder=torch.zeros(4, d_in),
        encoder_bias=torch.zeros(4),
        decoder=torch.zeros(4, d_out),
        decoder_bias=torch.zeros(d_out),
        **{"activation": TopK(1), **options},
    )


@pytest.mark.parametrize(
    ("hookpoint", "side", "expected"),
    [
        ("layers.1", "output", ("layers.1", "output")),
        ("model.layers.1", "output", ("layers.1", "output")),
        ("layers.1.mlp", "input", ("layers.1.mlp", "input")),
        ("blocks.1.hook_resid_post", "output", ("layers.1", "output")),
        ("blocks.2.hook_resid_pre", "output", ("layers.1", "output")),
        ("blocks.0.hook_resid_pre", "output", ("layers.0", "input")),
        ("blocks.1.hook_mlp_out", "output", ("layers.1.mlp", "output")),
        ("blocks.1.hook_attn_out", "output", ("layers.1.self_attn", "output")),
        ("blocks.1.mlp.hook_in", "output", ("layers.1.mlp", "input")),
        ("blocks.1.attn.hook_z", "output", ("layers.1.self_attn.o_proj", "input")),
        ("1-gemmascope-res-16k", "output", ("layers.1", "output")),
    ],
)
def test_hookpoints_are_translated(subject: Subject, hookpoint: str, side: Side, expected: tuple[str, Side]) -> None:
    given = coder(hookpoint, side=side)
    fitted = fit_coder(given, subject)
    assert fitted.point == fitted.target == expected
    assert (fitted.name, fitted.hash, given.hookpoint) == ("c", given.hash, hookpoint)
    assert fit_coder(fitted, subject).point == expected


def test_both_ends_of_a_transcoder_are_translated(subject: Subject) -> None:
    fitted = fit_coder(
        coder("blocks.1.mlp.hook_in", target=("blocks.1.hook_mlp_out", "output"), activation=ReLU()), subject
    )
    assert (fitted.point, fitted.target) == (("layers.1.mlp", "input"), ("layers.1.mlp", "output"))
    assert fitted.architecture == "relu transcoder"
    with pytest.raises(MismatchError, match=r"'c' does not fit .*unknown hookpoint 'layers\.7\.mlp'"):
        fit_coder(coder("layers.1.mlp", side="input", target=("layers.7.mlp", "output")), subject)
    with pytest.raises(MismatchError, match=r"'c' predicts 'layers\.\*', which stands for 3 hookpoints"):
        fit_coder(coder("layers.1.mlp", side="input", target=("layers.*", "output")), subject)


def test_hookpoints_that_are_not_there(subject: Subject) -> None:
    with pytest.raises(MismatchError, match=r"'c' does not fit .*unknown hookpoint 'layers\.10'") as caught:
        fit_coder(coder("layers.10"), subject)
    assert "\n" not in str(caught.value)
    with pytest.raises(MismatchError, match=r"reads 'layers\.\*', which stands for 3 hookpoints"):
        fit_coder(coder("layers.*"), subject)


def test_sizes(subject: Subject) -> None:
    with pytest.raises(
        MismatchError, match=r"reads 48 dimensions, the output of layers\.1 in .* has 32; is it a coder"
    ):
        fit_coder(coder("layers.1", 48), subject)

    def transcoder(d_in: int, d_out: int) -> LinearCoder:
        hookpoint = "layers.1.mlp.down_proj"
        return coder(hookpoint, d_in, d_out, side="input", target=(hookpoint, "output"))

    assert fit_coder(transcoder(64, 32), subject).d_out == 32
    with pytest.raises(MismatchError, match=r"predicts 64 dimensions, the output of .*down_proj .* has 32"):
        fit_coder(transcoder(64, 64), subject)
    with pytest.raises(MismatchError, match=r"reads 32 dimensions, the input of .* has 64"):
        fit_coder(transcoder(32, 32), subject)


def test_another_base_model_is_refused(released: Subject, caplog: pytest.LogCaptureFixture) -> None:
    for base in ("org/other", "Toy-2-9b", "org/Toy-22b", "org/Toy-2-2b-it"):
        given = coder("layers.1", base_model=base)
        with pytest.raises(
            MismatchError, match=rf"'c' was trained on {base}, the subject is org/Toy-2-2b; .*other_model"
        ) as caught:
            fit_coder(given, released)
        assert "\n" not in str(caught.value)
        assert fit_coder(given, released, other_model=True).point == ("layers.1", "output")
    for same in (None, "org/Toy-2-2b", "toy-2-2b", "Toy2-2B", "someone/toy_2_2b/"):
        fit_coder(coder("layers.1", base_model=same), released)
    assert not caplog.records
    with pytest.raises(MismatchError, match="reads 48 dimensions"):
        fit_coder(coder("layers.1", 48, base_model="org/other"), released, other_model=True)


def test_local_folders_have_no_reliable_name(
    subject: Subject,
    released: Subject,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = str(tmp_path / "checkpoint-7")
    for base, name, warnings in (
        ("org/other", str(tmp_path), 1),
        ("org/other", "./models/x", 1),
        ("/elsewhere/run/model", "org/Toy-2-2b", 1),
        (local, "org/Toy-2-2b", 1),
        ("org/checkpoint-7", local, 0),
    ):
        monkeypatch.setattr(subject, "name", name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="exegete"):
            fit_coder(coder("layers.1", base_model=base), subject)
        assert len(caplog.records) == warnings
        if warnings:
            assert caplog.records[0].getMessage() == f"coder 'c' was trained on {base} and is used on {name}"
            with caplog.at_level(logging.WARNING, logger="exegete"):
                fit_coder(coder("layers.1", base_model=base), subject, other_model=True)
            assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-2b-instruct", "google/gemma-2-2b-it"),
        ("meta-llama/Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("Mixtral-8x7B", "mistralai/mixtral-8x7b"),
    ],
)
def test_one_model(one: str, other: str) -> None:
    assert same_model(one, other)
    assert same_model(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gemma-2-2b", "gemma-2-2b-it"),
        ("gemma-2-2b", "gemma-2-9b"),
        ("gemma-2-2b", "gemma-22b"),
        ("gpt2", "gpt2-medium"),
        ("t5-small", "t5-base"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
        ("pythia-70m", "pythia-70m-deduped"),
        ("pythia-1.4b", "pythia-14b"),
        ("Llama-3-8B", "Llama-3.1-8B"),
        ("Llama-3.1-8B", "Llama-3.1-8B-Instruct"),
    ],
)
def test_two_models(one: str, other: str) -> None:
    assert not same_model(one, other)
    assert not same_model(other, one)
