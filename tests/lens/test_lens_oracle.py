"""The tuned-lens package on the same tiny transformers: the same logits from the same files, both ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.lens import LogitLens, TunedLens, export_lens, load_lens, new_lens, save_lens
from exegete.subjects import Subject, load_subject
from exegete.subjects.readout import read_out
from exegete.testing import toy_subject_model

Make = Callable[..., TunedLens]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("tuned_lens.nn.lenses")

TOKENS = torch.tensor([[0, 5, 9, 40, 7, 11], [0, 8, 8, 61, 2, 3]])


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2", "opt"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Of families that the package knows; its opt takes its final norm from one more place."""
    folder = toy_subject_model(request.param, tmp_path_factory.mktemp("oracle") / request.param, seed=5)
    return load_subject(str(folder), device="cpu")


@pytest.fixture(scope="module")
def hidden(subject: Subject) -> tuple[torch.Tensor, ...]:
    """The package's own streams: entry I is what block I reads."""
    with torch.no_grad():
        found: Any = subject.model(TOKENS, output_hidden_states=True).hidden_states[:-1]
    return tuple(found)


def test_the_hash_of_the_unembedding(subject: Subject) -> None:
    assert theirs.TunedLens.from_model(subject.model).config.unembed_hash == read_out(subject).hash


def test_the_logit_lens(subject: Subject, hidden: tuple[torch.Tensor, ...]) -> None:
    logit = theirs.LogitLens.from_model(subject.model)
    own = LogitLens(subject)
    with torch.no_grad():
        for entry, h in enumerate(hidden):
            torch.testing.assert_close(own.logits(entry - 1, h), logit(h, entry), rtol=1e-5, atol=1e-5)


def test_it_reads_what_we_write(
    trained: Make, subject: Subject, hidden: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    own = trained(subject)
    export_lens(own, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the package warns where the hash is another
        read = theirs.TunedLens.from_model_and_pretrained(subject.model, str(tmp_path), weights_only=True)
    with torch.no_grad():
        for entry, h in enumerate(hidden):
            torch.testing.assert_close(own.logits(entry - 1, h), read(h, entry), rtol=1e-5, atol=1e-5)


def test_it_reads_a_lens_without_biases(subject: Subject, tmp_path: Path) -> None:
    export_lens(new_lens(subject, bias=False), tmp_path)
    read = theirs.TunedLens.from_model_and_pretrained(subject.model, str(tmp_path), weights_only=True)
    assert not any(bool(p.any()) for p in read.layer_translators.parameters())


def test_we_read_what_it_writes(subject: Subject, hidden: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    made = theirs.TunedLens.from_model(subject.model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.layer_translators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    made.save(tmp_path / "theirs")
    own = load_lens(tmp_path / "theirs", subject)
    save_lens(own, tmp_path / "ours")
    again = load_lens(tmp_path / "ours", subject)
    with torch.no_grad():
        for entry, h in enumerate(hidden):
            torch.testing.assert_close(own.logits(entry - 1, h), made(h, entry), rtol=1e-5, atol=1e-5)
            assert torch.equal(own.logits(entry - 1, h), again.logits(entry - 1, h))


def test_the_same_loss_and_gradient(trained: Make, subject: Subject, hidden: tuple[torch.Tensor, ...]) -> None:
    own, made = trained(subject), theirs.TunedLens.from_model(subject.model)
    with torch.no_grad():
        target = subject.model(TOKENS).logits.log_softmax(-1)
        for entry, translator in enumerate(made):
            translator.weight.copy_(own.translators[entry - 1].weight)
            translator.bias.copy_(own.translators[entry - 1].bias)
    for entry, h in enumerate(hidden):
        for lens, weight, logits in (
            ("ours", own.translators[entry - 1].weight, own.logits(entry - 1, h)),
            ("theirs", made[entry].weight, made(h, entry)),
        ):
            loss = torch.sum(target.exp() * (target - logits.log_softmax(-1)), dim=-1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            assert weight.grad is not None, lens
        ours, wanted = own.translators[entry - 1].weight.grad, made[entry].weight.grad
        assert ours is not None
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
