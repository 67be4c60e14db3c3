"""Small subjects, and A/B files of the published format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.steering import Row
from exegete.subjects import Subject, load_subject
from exegete.testing import toy_llama, toy_subject_model

TEXTS = ("Is it big?\n\nChoices:\n (A) yes it is\n (B) no it is not\n\nAnswer: (A) (B) 1 2 3 4 5 6 7 8 9",)


def row(number: int, match: str = "A") -> Row:
    other = "B" if match == "A" else "A"
    return Row(question=f"Is {number} big?\n\nChoices:\n (A) yes it is\n (B) no it is not", match=match, other=other)


def entry(found: Row, space: str = "") -> dict[str, str]:
    return {
        "question": found.question,
        "answer_matching_behavior": f"{space}({found.match})",
        "answer_not_matching_behavior": f"{space}({found.other})",
    }


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return [row(i, "AAB"[i % 3]) for i in range(12)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Path:
    """A folder laid out as the published one, with two behaviours."""
    folder = tmp_path_factory.mktemp("data")
    for name, space in (("bigness", ""), ("refusal", " ")):
        for kind, file, held in (
            ("generate", "generate_dataset.json", [entry(r, space) for r in rows[:8]]),
            ("test", "test_dataset_ab.json", [entry(r, space) for r in rows[8:]]),
            ("test", "test_dataset_open_ended.json", [{"question": "How big is it?"}]),
        ):
            place = folder / kind / name
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(json.dumps(held))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = toy_llama(tmp_path_factory.mktemp("llama") / "toy", texts=TEXTS)
    return load_subject(str(folder), device="cpu")


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = toy_subject_model("mamba", tmp_path_factory.mktemp("mamba") / "toy", texts=TEXTS)
    return load_subject(str(folder), device="cpu")


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, torch.Tensor]:
    """A Llama whose blocks add nothing, and u, which its head reads: the log-odds of A against B are 8 u·norm(h)."""
    folder = toy_llama(tmp_path_factory.mktemp("planted") / "toy", texts=TEXTS, layers=2, tied=False)
    subject = load_subject(str(folder), device="cpu", dtype="float32")
    draw = torch.Generator().manual_seed(3)
    u = torch.randn(32, generator=draw)
    u /= u.norm()
    model: Any = subject.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = model.lm_head.weight
        head.zero_()
        letters = [subject.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in ("A", "B")]
        head[letters[0]], head[letters[1]] = 4 * u, -4 * u
    model.save_pretrained(folder)
    return load_subject(str(folder), device="cpu", dtype="float32"), u
