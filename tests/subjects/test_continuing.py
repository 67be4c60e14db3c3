from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exegete.errors import InputError
from exegete.subjects import Subject, load_subject
from exegete.subjects.continuing import Prompts
from exegete.subjects.edits import AddVector
from exegete.subjects.verdicts import verdict
from exegete.testing import FAMILIES, toy_llama, toy_subject_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [9, 8, 7], [5], [3, 4, 5, 6, 7, 8, 9], [20, 30, 40]]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("model") / "toy")), device="cpu")


def pushing(subject: Subject) -> Callable[[torch.Tensor], AddVector]:
    name = next(n for n in subject.hookpoints() if n.endswith(".1") and n.count(".") <= 2)
    vector = torch.randn(subject.d(name), generator=torch.Generator().manual_seed(0))
    return lambda strengths: AddVector(target=(name, "output"), vector=vector, strength=strengths)


def gumbel(rows: int, size: int) -> Callable[[int], torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    steps = [-torch.empty(rows, size).exponential_(generator=draw).log() for _ in range(5)]
    return steps.__getitem__


@pytest.mark.parametrize("family", list(FAMILIES))
def test_cached_beginnings_give_what_whole_passes_give(family: str, tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu")
    assert verdict(subject).exact
    found, whole = Prompts(subject, PROMPTS), Prompts(subject, PROMPTS, cached=False)
    assert (found.cached, whole.cached) == (True, False)
    edit, strengths = pushing(subject), [0.0, 1.0, 6.0]
    clean = whole.log_probabilities()
    near = 1e-4
    torch.testing.assert_close(found.log_probabilities(), clean, rtol=0, atol=near)
    after = found.log_probabilities(edit, strengths)
    torch.testing.assert_close(after, whole.log_probabilities(edit, strengths), rtol=0, atol=near)
    torch.testing.assert_close(after[0], clean[0], rtol=0, atol=near)
    assert (after[2] - clean[0]).abs().max() > 0.5
    noise = gumbel(len(PROMPTS), clean.shape[-1])
    sampled = found.continuations(noise, 4, edit, [0.0, 6.0])
    assert torch.equal(sampled, whole.continuations(noise, 4, edit, [0.0, 6.0]))
    assert torch.equal(sampled[0], found.continuations(noise, 4)[0])
    torch.testing.assert_close(found.log_probabilities(), clean, rtol=0, atol=near)  # what was held is as it was


def test_no_edit_is_the_model_itself(subject: Subject) -> None:
    with torch.no_grad():
        wanted = [subject.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]
    for cached in (True, False):
        found = Prompts(subject, PROMPTS, cached=cached).log_probabilities()
        torch.testing.assert_close(found[0], torch.stack(wanted), rtol=0, atol=1e-4)


def test_no_strength_changes_no_bit(subject: Subject) -> None:
    edit = pushing(subject)
    for cached in (True, False):
        prompts = Prompts(subject, PROMPTS, cached=cached)
        assert torch.equal(prompts.log_probabilities(edit, [0.0]), prompts.log_probabilities())


def test_an_edit_acts_from_the_last_prompt_token_on(subject: Subject) -> None:
    """By hand: a whole pass in which the vector is added from the last prompt token on, token after token."""
    edit, noise = pushing(subject), gumbel(2, len(subject.tokenizer))
    prompts = [PROMPTS[0], PROMPTS[3]]
    sampled = Prompts(subject, prompts).continuations(noise, 5, edit, [3.0])[0]
    target, vector = edit(torch.ones(1)).target, edit(torch.ones(1)).vector

    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for step in range(5):

            def hook(module: Any, args: Any, output: Any, begin: int = len(prompt) - 1) -> Any:
                added = output.clone()
                added[:, begin:] += 3.0 * vector
                return added

            handle = subject.model.base_model.get_submodule(target[0]).register_forward_hook(hook)
            with torch.no_grad():
                logits = subject.model(torch.tensor([text])).logits[0, -1]
            handle.remove()
            text.append(int((logits.log_softmax(-1) + noise(step)[row]).argmax()))
        assert text[len(prompt) :] == sampled[row].tolist()


def test_samples_follow_the_models_distribution(subject: Subject) -> None:
    """4,000 first tokens after one prompt against their probabilities (chi-squared, a fixed seed)."""
    n, draw = 4000, torch.Generator().manual_seed(3)
    prompts = Prompts(subject, [PROMPTS[0]] * n)
    size = len(subject.tokenizer)
    sampled = prompts.continuations(lambda step: -torch.empty(n, size).exponential_(generator=draw).log(), 1)
    wanted = prompts.log_probabilities()[0, 0].double().exp() * n
    counts = torch.bincount(sampled.flatten(), minlength=size).double()
    large = wanted >= 5
    pooled = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([wanted[large], wanted[~large].sum()[None]])
    statistic = float(((pooled - expected) ** 2 / expected).sum())
    freedom = len(pooled) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_prompts_without_tokens_are_refused(subject: Subject) -> None:
    for given in ([], [[1, 2], []]):
        with pytest.raises(InputError, match="at least one"):
            Prompts(subject, given)
