"""Subjects and coders that this project did not make work with the same commands; so does a language model's server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exegete.cli import main
from exegete.llm.local_server import serve
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.runs import open_run
from exegete.testing import toy_tokenizer
from exegete.types import LLMRequest

SIZES = [
    *("--row-length", "64", "--window", "8", "--n-train", "12", "--n-test", "12", "--n-negatives", "12"),
    *("--min-train", "2", "--min-test", "2", "--latents", "4", "--donors", "2", "-q"),
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-NeoX subject written by transformers, a coder written by sparsify, text in two forms."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("foreign")
    texts = [f"Line {i}: the quick brown fox, number {i * 7}, jumps over {i % 5} dogs.\n" * 9 for i in range(30)]
    tokenizer = toy_tokenizer(texts, vocabulary=300)
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    coder = SparseCoder(32, SparseCoderConfig(num_latents=64, k=4))
    coder.save_to_disk(folder / "coders" / "layers.1")
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:02}.txt").write_text(text)
    return {name: folder / name for name in ("model", "coders", "text")}


def test_run_on_files_of_transformers_and_sparsify(
    foreign: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    names = [str(foreign["model"]), str(foreign["coders"]), "--text", str(foreign["text"])]
    assert main(["run", *names, *SIZES, "--nulls", "random_coder", "random_subject", "--out", str(out)]) == 0
    assert "layers.1" in capsys.readouterr().out
    run = open_run(out)
    assert run.coders() == ("layers.1", "layers.1@random-coder", "layers.1@random-subject")
    assert run.store("layers.1").width == 64
    assert set(run.table("scores")["scorer"]) >= {"detection", "fuzzing"}
    assert run.report_path.is_file()


def answer(request: LLMRequest) -> str:
    """Explain, or call every excerpt firing, in the form that is asked for."""
    question = read_question(request.messages)
    if question.kind == "explain":
        return "I see words.\n[EXPLANATION]: words of any kind"
    assert question.explanation == "words of any kind"
    return json.dumps([1] * len(question.excerpts))


def test_run_with_a_language_model_behind_a_url(
    foreign: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = ScriptedClient(answer)
    arguments: list[Any] = [foreign["model"], foreign["coders"], "--text", foreign["text"], *SIZES]
    with serve(client) as server:
        command = ["run", *map(str, arguments), "--explainer", "default", "--llm", server.spec]
        assert main([*command, "--out", str(tmp_path / "run")]) == 0
        asked = len(client.requests)
        assert asked > 4
        assert main([*command, "--out", str(tmp_path / "run")]) == 0
        assert len(client.requests) == asked, "a stored reply was paid for again"
    explanations = open_run(tmp_path / "run").table("explanations")
    assert set(explanations["status"]) == {"ok"}
    assert set(explanations["text"]) == {"words of any kind"}
    scores = open_run(tmp_path / "run").table("scores")
    judged = [
        (value, failed)
        for name, metric, control, value, failed in zip(
            *(scores[column] for column in ("scorer", "metric", "control", "value", "n_failed")), strict=True
        )
        if (name, metric, control) == ("detection", "balanced_accuracy", "none")
    ]
    assert judged
    assert all(value == 0.5 and failed == 0 for value, failed in judged), "a judge that says yes to all is at chance"
    shown = capsys.readouterr().out
    assert "detection" in shown
