"""What must not change by a bit: the subject after steering, the subject at multiplier 0, results in another order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from exegete.steering import Row, SteeringVector, behaviour_vector, generate, steered, sweep
from exegete.steering.answers import Asked, Setting
from exegete.steering.generating import Mode
from exegete.steering.passes import read_on, row_edits
from exegete.steering.places import places
from exegete.steering.questions import questions
from exegete.steering.templates import template_of
from exegete.subjects import Subject, load_subject
from exegete.subjects.running import Running
from exegete.testing import TEXTS, toy_subject_model

CASES: list[tuple[str, Mode]] = [("llama", "residual")]
CASES += [(family, mode) for family in ("mamba", "rwkv") for mode in ("residual", "state", "both")]
MULTIPLIERS = (-3.0, -0.5, 0.0, 1.5)
LAST = places("last")
Found = Callable[[str], tuple[Subject, SteeringVector]]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Found:
    """Subjects by family, each with a vector of its residual stream and, where it is recurrent, its state."""

    @cache
    def made(family: str) -> tuple[Subject, SteeringVector]:
        folder = tmp_path_factory.mktemp(family) / "toy"
        subject = load_subject(str(toy_subject_model(family, folder, texts=TEXTS)), device="cpu")
        vector = behaviour_vector(subject, rows, state=family != "llama").vector
        assert vector.components == {"llama": (), "mamba": ("conv", "ssm")}.get(family, vector.components)
        return subject, vector

    return made


def whole(subject: Subject, rows: list[Row]) -> torch.Tensor:
    """Return the logits of plain calls of the model, without anything of steering."""
    asked = questions(rows[:3], template_of("plain"), subject.tokenizer)
    with torch.no_grad():
        return torch.stack([subject.model(input_ids=torch.tensor([q.prompt]))["logits"][0, -1] for q in asked])


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_editing_a_copy_leaves_what_it_was_copied_from(subjects: Found, family: str, mode: Mode) -> None:
    subject, vector = subjects(family)
    tokens = torch.tensor([(5, 90, 8, 31, 12), (44, 7, 61, 9, 12)])
    edits, changes = row_edits(subject, [vector.only(mode=mode)], [4.0], torch.zeros(2, dtype=torch.long))
    given: dict[str, Any] = {"prompt": 5, "edits": edits, "changes": changes, "where": LAST, "state_where": LAST}
    begun = Running.start(subject, tokens[:, :-1])
    kept = begun.copy().feed(tokens[:, -1:])
    for rows in (None, torch.tensor([1, 0])):
        turned = read_on(subject, begun.copy(rows), tokens[rows if rows is not None else slice(None), -1:], **given)
        wanted = kept[:, -1] if rows is None else kept[rows, -1]
        assert float((turned.logits - wanted).abs().max()) > 1e-4
        turned.feed(tokens[:, :1])
    assert torch.equal(begun.copy().feed(tokens[:, -1:]), kept)
    assert torch.equal(begun.feed(tokens[:, -1:]), kept)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_a_row_at_multiplier_0_is_the_row_as_it_is(subjects: Found, family: str, mode: Mode) -> None:
    subject, vector = subjects(family)
    part, draw = vector.only(mode=mode), np.random.default_rng(0)
    tokens = torch.tensor([(5, 90, 8, 31, 12)] * 3)
    plain: dict[str, Any] = {"prompt": 5, "where": LAST, "state_where": LAST}
    begun = Running.start(subject, tokens[:, :-1])
    for vectors in ([part] * 3, [part, part.random_like(draw), part]):  # one vector for all, and one for each row
        edits, changes = row_edits(subject, vectors, [2.0, 0.0, -2.0], torch.arange(3))
        clean = read_on(subject, begun.copy(), tokens[:, -1:], edits=(), **plain).logits
        found = read_on(subject, begun.copy(), tokens[:, -1:], edits=edits, changes=changes, **plain).logits
        assert torch.equal(found[1], clean[1])
        assert not torch.equal(found[0], clean[0])
        assert not torch.equal(found[2], clean[2])


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_sweeps_begin_at_the_subject_and_leave_it_alone(
    subjects: Found, rows: list[Row], family: str, mode: Mode
) -> None:
    subject, vector = subjects(family)
    before = whole(subject, rows)
    options: dict[str, Any] = {"modes": (mode,), "controls": 2, "sites": (1,)}
    found = sweep(subject, vector, rows, multipliers=MULTIPLIERS, **options)
    asked = Asked(subject, questions(rows, template_of("plain"), subject.tokenizer), LAST, LAST)
    clean = asked.answers([None])
    (key,) = found.values
    match, nonsense = found.values[key]
    assert np.array_equal(match[2], clean.share[0])
    assert np.array_equal(nonsense[2], clean.nonsense[0])
    assert not np.array_equal(match[0], clean.share[0])
    for order in ((3, 2, 1, 0), (2, 0, 3, 1)):
        turned = sweep(subject, vector, rows, multipliers=[MULTIPLIERS[i] for i in order], **options)
        for own, other in zip(found.values[key], turned.values[key], strict=True):
            assert np.array_equal(own[list(order)], other)
        assert [c.effect for c in turned.curves] == [c.effect for c in found.curves]
    assert np.array_equal(asked.answers([None]).share, clean.share)
    assert torch.equal(whole(subject, rows), before)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_texts_at_multiplier_0_and_in_another_order(subjects: Found, rows: list[Row], family: str, mode: Mode) -> None:
    subject, vector = subjects(family)
    before = whole(subject, rows)
    prompts = [(7, 21, 35, 4, 66, 12), (7, 21, 35)]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "draws": 2}
    plain = generate(subject, prompts, **options)
    found = generate(subject, prompts, vector, [-9.0, 0.0, 9.0], mode=mode, state_positions="onward", **options)
    by = {(s.prompt, s.multiplier, s.draw): s.tokens for s in found}
    assert [by[s.prompt, 0.0, s.draw] for s in plain] == [s.tokens for s in plain]
    assert [by[s.prompt, 9.0, s.draw] for s in plain] != [s.tokens for s in plain]
    turned = generate(subject, prompts, vector, [9.0, -9.0, 0.0], mode=mode, state_positions="onward", **options)
    assert {(s.prompt, s.multiplier, s.draw): s.tokens for s in turned} == by
    assert torch.equal(whole(subject, rows), before)


@pytest.mark.parametrize("family", ["llama", "mamba", "rwkv"])
def test_the_context_at_multiplier_0_is_the_subject(subjects: Found, rows: list[Row], family: str) -> None:
    subject, vector = subjects(family)
    before, part = whole(subject, rows), vector.only(mode="residual")
    with steered(subject, part, 0.0):
        assert torch.equal(whole(subject, rows), before)
    with steered(subject, part, 3.0):
        assert not torch.equal(whole(subject, rows), before)
    assert torch.equal(whole(subject, rows), before)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_vectors_that_share_a_pass_do_not_mix(subjects: Found, rows: list[Row], family: str, mode: Mode) -> None:
    subject, vector = subjects(family)
    part, draw = vector.only(mode=mode, sites=(1,)), np.random.default_rng(0)
    asked = Asked(subject, questions(rows[:4], template_of("plain"), subject.tokenizer), LAST, places("last:2"))
    settings = [Setting(vector=v, multiplier=m) for v in (part, part.random_like(draw)) for m in (2.0, -1.0)]
    found = asked.answers(settings)
    for i, setting in enumerate(settings):
        alone = asked.answers([setting])
        np.testing.assert_allclose(found.match[i], alone.match[0], rtol=1e-4)
        np.testing.assert_allclose(found.other[i], alone.other[0], rtol=1e-4)
    assert abs(found.match[0] - found.match[2]).max() > 1e-6
