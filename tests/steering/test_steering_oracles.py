"""Vectors, logits and continuations against steering-vectors and repeng, whose results are fixtures."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exegete.steering import Pair, SteeringVector, generate, import_control_vector, pair_vector, steered
from exegete.steering.vector import about
from exegete.subjects import Subject, load_subject

HERE = Path(__file__).resolve().parents[1] / "fixtures" / "steering"
NO_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(str(HERE / "model"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def said() -> Any:
    return json.loads((HERE / "expected.json").read_text())


@pytest.fixture(scope="module")
def held() -> dict[str, torch.Tensor]:
    return dict(load_file(HERE / "expected.safetensors"))


@pytest.fixture(scope="module")
def pairs(said: Any) -> list[Pair]:
    return [Pair(positive=p, negative=n) for p, n in said["pairs"]]


def logits(subject: Subject, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = subject.model(input_ids=torch.tensor([ids])).logits[0]
    return found


def ids_of(subject: Subject, prompt: str) -> list[int]:
    return list(subject.tokenizer(prompt)["input_ids"])


def test_the_fixture_is_what_the_script_wrote() -> None:
    hashes = json.loads((HERE / "hashes.json").read_text())
    for name, expected in hashes.items():
        assert hashlib.sha256((HERE / name).read_bytes()).hexdigest() == expected, name


@pytest.mark.parametrize(("read", "name"), [("last", "vector"), ("2", "at2")])
def test_mean_differences_are_those_of_steering_vectors(
    subject: Subject, pairs: list[Pair], held: dict[str, torch.Tensor], read: str, name: str
) -> None:
    found = pair_vector(subject, pairs, read=read)
    assert found.sites == (0, 1, 2, 3)
    for site in found.sites:
        torch.testing.assert_close(found.residual[site], held[f"sv.{name}.{site}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["onward", "all"])
@pytest.mark.parametrize("multiplier", [-2.0, 1.5])
def test_steered_logits_and_texts_are_those_of_steering_vectors(
    subject: Subject, pairs: list[Pair], held: dict[str, torch.Tensor], said: Any, multiplier: float, positions: str
) -> None:
    vector = pair_vector(subject, pairs)
    for i, prompt in enumerate(said["prompts"]):
        ids, key = ids_of(subject, prompt), f"{i}.{multiplier}.{positions}"
        with steered(subject, vector, multiplier, positions=positions):
            torch.testing.assert_close(logits(subject, ids), held[f"sv.logits.{key}"], rtol=1e-5, atol=1e-5)
            made = subject.model.generate(
                torch.tensor([ids]), max_new_tokens=said["steps"], do_sample=False, pad_token_id=2
            )
        (own,) = generate(subject, [tuple(ids)], vector, [multiplier], positions=positions, max_tokens=said["steps"])
        assert list(own.tokens) == made[0, len(ids) :].tolist() == said["steering_vectors"][key]
        assert float((logits(subject, ids) - held[f"sv.logits.{key}"]).abs().max()) > 0.1


@pytest.mark.parametrize("method", ["pca-diff", "pca-center"])
def test_principal_components_and_what_they_do_are_repengs(
    subject: Subject, pairs: list[Pair], held: dict[str, torch.Tensor], said: Any, method: Any
) -> None:
    theirs = method.replace("-", "_")
    found = pair_vector(subject, pairs, method=method, sites=(1, 2))
    for site in (1, 2):
        torch.testing.assert_close(found.residual[site], held[f"repeng.{theirs}.{site}"], rtol=1e-4, atol=1e-5)
    for i, prompt in enumerate(said["prompts"]):
        ids = ids_of(subject, prompt)
        with steered(subject, found, 1.5, positions="all"):
            torch.testing.assert_close(logits(subject, ids), held[f"repeng.logits.{theirs}.{i}"], rtol=1e-4, atol=1e-4)
        (own,) = generate(subject, [tuple(ids)], found, [1.5], positions="all", max_tokens=said["steps"])
        assert list(own.tokens) == said["repeng"][f"{theirs}.{i}"]


@NO_GGUF
def test_repengs_own_file_is_read(subject: Subject, held: dict[str, torch.Tensor]) -> None:
    found = import_control_vector(HERE / "repeng.gguf", subject)
    assert found.sites == (1, 2)
    for site in found.sites:
        assert torch.equal(found.residual[site], held[f"repeng.pca_diff.{site}"])


@NO_GGUF
def test_a_control_vector_is_written_as_repeng_writes_it(
    subject: Subject, held: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from exegete.steering import export_control_vector

    residual = {site: held[f"repeng.pca_diff.{site}"] for site in (1, 2)}
    vector = SteeringVector(residual=residual, about=about(subject, "pca-diff"))
    written = export_control_vector(vector, tmp_path / "own.gguf")
    assert written.read_bytes() == (HERE / "repeng.gguf").read_bytes()
