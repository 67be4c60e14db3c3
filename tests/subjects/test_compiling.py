"""Compiled layers: the same activations, and no hook is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.errors import InputError
from exegete.subjects import Subject, load_subject, randomised
from exegete.testing import toy_subject_model

GRAPHS: list[Any] = []


def counting(graph: Any, inputs: Any) -> Any:
    GRAPHS.append(graph)
    return graph.forward


def unregister() -> None:
    for table in (torch._dynamo.backends.registry._COMPILER_FNS, torch._dynamo.backends.registry._BACKENDS):
        table.pop("counting", None)


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    """A compiler that counts what it compiles, and forgets it after each test."""
    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="counting")
    GRAPHS.clear()
    yield
    unregister()
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_subject_model(request.param, tmp_path_factory.mktemp("models") / str(request.param))


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 400, (rows, length), generator=torch.Generator().manual_seed(2))


def layers(subject: Subject) -> list[Any]:
    names = [name for name, _ in subject.points("blocks.*.hook_resid_post")]
    return [(name, side) for name in names for side in ("input", "output")]


def equal(subject: Subject, eager: Subject, ids: torch.Tensor, points: list[Any], *more: Any) -> None:
    caught, expected = subject.capture(ids, None, points, *more), eager.capture(ids, None, points, *more)
    for point in points:
        torch.testing.assert_close(caught[point], expected[point], rtol=1e-4, atol=1e-5)


def test_compiled_equals_eager(folder: Path) -> None:
    subject = load_subject(str(folder), device="cpu", compile="counting")
    eager = load_subject(str(folder), device="cpu")
    points = layers(subject)
    equal(subject, eager, tokens(), points)
    assert len(GRAPHS) == 1  # all layers share it
    equal(subject, eager, tokens(), points[:4])
    assert len(GRAPHS) == 1
    documents = torch.tensor([[0] * 4 + [1] * 5, [2] * 8 + [-1]])
    equal(subject, eager, tokens(), points, documents)
    assert subject.hash == eager.hash


def test_hooks_inside_a_layer_fire_though_others_were_compiled_before(folder: Path) -> None:
    subject = load_subject(str(folder), device="cpu", compile="counting")
    eager = load_subject(str(folder), device="cpu")
    equal(subject, eager, tokens(), layers(subject))
    count = len(GRAPHS)
    inner = [*subject.neurons(layers(subject)[2][0]), *layers(subject)[-1:]]
    equal(subject, eager, tokens(), inner)
    equal(subject, eager, tokens(), layers(subject))
    assert len(GRAPHS) == count


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    subject = load_subject(str(folder), device="cpu", compile="counting")
    before = [dict(vars(module)) for module in subject.model.modules()]
    subject.capture(tokens(), None, layers(subject))
    with pytest.raises(InputError):
        subject.capture(tokens(), None, [*layers(subject), (subject.hookpoints()[0], "input")])
    for module, then in zip(subject.model.modules(), before, strict=True):
        assert ("forward" in vars(module)) == ("forward" in then)
    null = randomised(subject, 1)  # a copy runs its own weights
    equal(null, Subject(null.model, null.tokenizer, name="null"), tokens(), layers(null))
    assert GRAPHS


def test_aot_eager(tmp_path: Path) -> None:
    folder = toy_subject_model("gpt2", tmp_path / "gpt2", n_layer=1)
    subject = load_subject(str(folder), device="cpu", compile="aot_eager")
    equal(subject, load_subject(str(folder), device="cpu"), tokens(), layers(subject))


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nis here")

    unregister()
    torch._dynamo.register_backend(broken, name="counting")
    subject = load_subject(str(toy_subject_model("llama", tmp_path / "llama")), device="cpu", compile="counting")
    with pytest.raises(InputError, match=r"cannot be compiled \(.*load the subject without compile") as refused:
        subject.capture(tokens(), None, layers(subject))
    assert "\n" not in str(refused.value)


def test_what_does_not_compile(tmp_path: Path) -> None:
    llama = toy_subject_model("llama", tmp_path / "llama")
    with pytest.raises(InputError, match=r"unknown compiler backend 'nonsense'; allowed: .*inductor"):
        load_subject(str(llama), device="cpu", compile="nonsense")
    with pytest.raises(InputError, match="carries a state from token to token, which does not compile"):
        load_subject(str(toy_subject_model("mamba", tmp_path / "mamba")), device="cpu", compile=True)
