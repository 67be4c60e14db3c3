"""Vectors at work: operators against hand computations, positions, states, and what must not change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.steering import Row, SteeringVector, behaviour_vector, fit_vector, generate, steered
from exegete.steering.operators import Steer
from exegete.steering.passes import read_on, row_edits
from exegete.steering.places import places
from exegete.steering.questions import Contrast, encode
from exegete.steering.vector import about
from exegete.subjects import Subject, load_subject
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals, site_point
from exegete.testing import toy_subject_model

IDS = [[7, 21, 35, 4, 66, 12]]
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "falcon_h1", "qwen3_next", "xlstm")


def logits(subject: Subject, ids: list[list[int]], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = subject.model(input_ids=torch.tensor(ids), **options)["logits"]
    return found


def greedy(subject: Subject, ids: list[list[int]], steps: int = 5, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, **options}
    made: torch.Tensor = subject.model.generate(torch.tensor(ids), **given)
    return made[:, len(ids[0]) :]


def vector_at(subject: Subject, *sites: int, size: float = 3.0, seed: int = 0) -> SteeringVector:
    draw = torch.Generator().manual_seed(seed)
    residual = {site: size * torch.randn(32, generator=draw) for site in sites}
    centres = {site: torch.randn(32, generator=draw) for site in sites}
    return SteeringVector(residual=residual, centres=centres, about=about(subject, "mean"))


@pytest.mark.parametrize("operator", ["add", "project-out", "reflect", "clamp"])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_operators_are_their_formulas(operator: Any, multiplier: float) -> None:
    draw = torch.Generator().manual_seed(1)
    y, v, c = torch.randn((5, 6), generator=draw), torch.randn(6, generator=draw), torch.randn(6, generator=draw)
    edit = Steer(("x", "output"), operator, v, multiplier, centre=c, at=0.75)
    found = edit.change(y, None, torch.arange(5))
    unit, length = v / v.norm(), v.norm()
    for h, change in zip(y, found, strict=True):
        along = (h - c) @ unit
        full = {
            "add": h + v,
            "project-out": h - along * unit,
            "reflect": h - 2 * along * unit,
            "clamp": h + (0.75 * length - along) * unit,
        }[operator]
        torch.testing.assert_close(change, multiplier * (full - h), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([0, 0, 1, 1, 2])
    each = Steer(("x", "output"), operator, torch.stack([v, 2 * v, -v]), torch.tensor([1.0, 0.0, -1.0]), centre=c)
    assert not each.change(y, None, rows)[2:4].any()
    alone = Steer(("x", "output"), operator, -v, -1.0, centre=c)
    torch.testing.assert_close(each.change(y, None, rows)[4:], alone.change(y[4:], None, rows[:1] * 0))


@pytest.mark.parametrize(
    ("text", "prompt_and_after", "from_end"),
    [
        ("onward", "0001|111", 1),
        ("last", "0001|000", 1),
        ("last:2", "0011|000", 2),
        ("last:9", "1111|000", 4),
        ("prompt", "1111|000", 4),
        ("from:1", "0111|111", 3),
        ("from:-2", "0011|111", 2),
        ("from:9", "0000|000", 0),
        ("every:1", "1111|111", 4),
        ("every:2", "1010|101", 4),
        ("every:3", "1001|001", 4),
        ("every:9", "1000|000", 4),
        ("generated", "0000|111", 0),
        ("all", "1111|111", 4),
    ],
)
def test_places_are_positions(text: str, prompt_and_after: str, from_end: int) -> None:
    where = places(text)
    found = where.mask(torch.arange(7)[None], torch.tensor([4]))[0]
    assert "".join(str(int(x)) for x in found[:4]) + "|" + "".join(str(int(x)) for x in found[4:]) == prompt_and_after
    assert where.from_end(4) == from_end
    for first in range(4):
        assert where.reaches(4, first) == ("1" in prompt_and_after[first:4])


@pytest.mark.parametrize("text", ["", "first", "last:0", "last:-1", "from:", "from:x", "every:", "every:0", "every:-2"])
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a vector acts at onward, last"):
        places(text)


@pytest.mark.parametrize("positions", ["onward", "last", "last:2", "prompt", "from:2", "every:2", "generated", "all"])
def test_a_pass_is_edited_where_positions_say(llama: Subject, positions: str) -> None:
    vector = vector_at(llama, 1)
    clean = residuals(llama, torch.tensor(IDS), [1])[1]
    with steered(llama, vector, 2.0, positions=positions):
        moved = residuals(llama, torch.tensor(IDS), [1])[1]  # of the body alone, without the head
    chosen = places(positions).mask(torch.arange(6)[None], torch.tensor([6]))[..., None]
    torch.testing.assert_close(moved, clean + 2 * chosen * vector.residual[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["onward", "last", "prompt", "from:2", "generated", "all"])
def test_generating_is_steered_the_same_with_a_cache_without_and_by_us(llama: Subject, positions: str) -> None:
    vector = vector_at(llama, 0, 2, size=1.0)
    with steered(llama, vector, 1.5, positions=positions):
        first = greedy(llama, IDS)
        again = greedy(llama, IDS)
        bare = greedy(llama, IDS, use_cache=False)
    own = generate(llama, [tuple(IDS[0])], vector, [1.5], positions=positions, max_tokens=5)
    assert first.tolist() == again.tolist() == bare.tolist() == [list(own[0].tokens)]


@pytest.mark.parametrize("family", RECURRENT)
def test_generating_is_steered_in_every_kind_of_cache(family: str, tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu")
    d = subject.d(*site_point(subject, 1))
    draw = torch.Generator().manual_seed(0)
    vector = SteeringVector(residual={1: torch.randn(d, generator=draw)}, about=about(subject, "mean"))
    clean = greedy(subject, IDS)
    for positions in ("onward", "generated", "last"):
        with steered(subject, vector, 2.0, positions=positions):
            found = greedy(subject, IDS), greedy(subject, IDS)
        own = generate(subject, [tuple(IDS[0])], vector, [2.0], positions=positions, max_tokens=5)
        assert found[0].tolist() == found[1].tolist() == [list(own[0].tokens)]
    assert greedy(subject, IDS).tolist() == clean.tolist()


@pytest.mark.parametrize("family", ["llama", "mamba", "rwkv"])
def test_a_prompt_of_one_token_begins_a_sequence(family: str, tmp_path: Path) -> None:
    """Also behind a pass that kept no cache, and with one of its own; what goes on with a cache is not a prompt."""
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu")
    d = subject.d(*site_point(subject, 1))
    draw = torch.Generator().manual_seed(0)
    vector = SteeringVector(residual={1: torch.randn(d, generator=draw)}, about=about(subject, "mean"))
    for positions in ("last", "generated", "onward"):
        wanted = list(generate(subject, [(7,)], vector, [2.0], positions=positions, max_tokens=5)[0].tokens)
        with steered(subject, vector, 2.0, positions=positions):
            alone = logits(subject, [[7]])
            assert greedy(subject, [[7]]).tolist() == [wanted]
            logits(subject, [[9]], use_cache=False)
            assert greedy(subject, [[7]]).tolist() == greedy(subject, [[7]]).tolist() == [wanted]
            logits(subject, IDS)
            assert torch.equal(logits(subject, [[7]]), alone)
        clean = logits(subject, [[7]])
        assert torch.equal(clean, alone) == (positions == "generated")


def test_a_cache_given_for_one_token_is_a_sequence_of_its_own(llama: Subject) -> None:
    vector = vector_at(llama, 1)
    options: dict[str, Any] = {"input_ids": torch.tensor([[7]]), "use_cache": True}
    for as_mapping in (True, False):
        with torch.no_grad(), steered(llama, vector, positions="generated"):
            llama.model(input_ids=torch.tensor(IDS), use_cache=False)
            begun = llama.model(**options, past_key_values=transformers.DynamicCache(), return_dict=as_mapping)
            cache = begun["past_key_values"] if as_mapping else begun[1]
            after = llama.model(**options, past_key_values=cache, return_dict=as_mapping)
        with torch.no_grad():
            plain = llama.model(**options)
            onward = llama.model(**options, past_key_values=plain["past_key_values"])
        assert torch.equal(begun[0] if not as_mapping else begun["logits"], plain["logits"])
        assert not torch.allclose(after[0] if not as_mapping else after["logits"], onward["logits"], atol=1e-3)


def test_padding_is_never_edited_and_prompts_count_from_their_first_token(llama: Subject) -> None:
    vector = vector_at(llama, 1)
    ids = [[0, 0, 7, 21, 35, 4], [7, 21, 35, 4, 66, 12]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for positions, left in (("from:1", "000111"), ("last", "000001"), ("all", "001111")):
        seen: list[torch.Tensor] = []
        hook = llama.model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o.clone()))  # noqa: B023
        try:
            logits(llama, ids, attention_mask=mask)
            with steered(llama, vector, positions=positions):
                hook.remove()
                hook = llama.model.model.layers[2].register_forward_pre_hook(
                    lambda m, a: seen.append(a[0].clone())  # noqa: B023
                )
                logits(llama, ids, attention_mask=mask)
        finally:
            hook.remove()
        moved = (seen[1] - seen[0]).norm(dim=-1) > 0.1
        assert "".join(str(int(x)) for x in moved[0]) == left
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with steered(llama, vector, positions="last"):
        padded = logits(llama, [[7, 21, 35, 4, 0, 0], ids[1]], attention_mask=right)[0, 3]
        alone = logits(llama, [[7, 21, 35, 4]])[0, 3]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def test_a_mask_named_before_the_tokens_is_not_taken_for_them(llama: Subject) -> None:
    vector, ids = vector_at(llama, 1), torch.tensor(IDS)
    found = []
    for order in (("attention_mask", "input_ids"), ("input_ids", "attention_mask")):
        with steered(llama, vector, 2.0, positions="all"), torch.no_grad():
            first = llama.model(input_ids=ids[:, :-1], use_cache=True)
            given = {"attention_mask": torch.ones_like(ids), "input_ids": ids[:, -1:]}
            named = {name: given[name] for name in order}
            found.append(llama.model(**named, past_key_values=first.past_key_values)["logits"])
    assert torch.equal(*found)


def test_a_multiplier_for_each_row(llama: Subject) -> None:
    vector = vector_at(llama, 1)
    with steered(llama, vector, torch.tensor([1.0, 0.0, -2.0])):
        found = logits(llama, IDS * 3)[:, -1]
    for row, multiplier in enumerate((1.0, 0.0, -2.0)):
        with steered(llama, vector, multiplier):
            torch.testing.assert_close(found[row], logits(llama, IDS)[0, -1], rtol=1e-4, atol=1e-4)


def test_vectors_add_up_in_nested_contexts(llama: Subject) -> None:
    one, two = vector_at(llama, 1, seed=1), vector_at(llama, 1, seed=2)
    total = SteeringVector(residual={1: one.residual[1] + two.residual[1]}, about=one.about)
    with steered(llama, one), steered(llama, two):
        found = logits(llama, IDS)
    with steered(llama, total):
        torch.testing.assert_close(found, logits(llama, IDS), rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind_and_zero_is_nothing(mamba: Subject, rows: list[Row]) -> None:
    before = logits(mamba, IDS)
    vector = behaviour_vector(mamba, rows, state=True).vector
    with steered(mamba, vector.only(mode="residual"), 0.0):
        assert torch.equal(logits(mamba, IDS), before)
    with steered(mamba, vector.only(mode="residual"), 3.0):
        assert not torch.equal(logits(mamba, IDS), before)
    with pytest.raises(MismatchError, match="do not fit"), steered(mamba, vector.only(mode="residual"), 3.0):
        mamba.capture(torch.tensor([[10**6]]), None, [])
    plain = generate(mamba, [tuple(IDS[0])], max_tokens=6, temperature=1.0, draws=2)
    found = generate(mamba, [tuple(IDS[0])], vector, [-9.0, 0.0, 9.0], max_tokens=6, temperature=1.0, draws=2)
    assert [s.tokens for s in found[2:4]] == [s.tokens for s in plain]
    assert [s.tokens for s in found[:2]] != [s.tokens for s in plain]
    turned = generate(mamba, [tuple(IDS[0])], vector, [9.0, -9.0, 0.0], max_tokens=6, temperature=1.0, draws=2)
    assert {(s.multiplier, s.draw): s.tokens for s in turned} == {(s.multiplier, s.draw): s.tokens for s in found}
    assert torch.equal(logits(mamba, IDS), before)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "rwkv"])
def test_the_difference_of_two_states_turns_one_prompt_into_the_other(family: str, tmp_path: Path) -> None:
    """State(P) + (state(Q) − state(P)) is state(Q): what comes next must be what comes after Q, exactly predicted."""
    subject = load_subject(str(toy_subject_model(family, tmp_path / family)), device="cpu", dtype="float32")
    p, q = (5, 90, 8, 31, 12), (44, 7, 61, 9, 12)  # the same last token
    made = fit_vector(subject, [Contrast(positive=q, negative=p, shared=0)], state=True, read="-2")
    state = made.vector.only(mode="state")
    edits, changes = row_edits(subject, [state], [1.0], torch.zeros(1, dtype=torch.long))
    where: dict[str, Any] = {"prompt": 5, "where": places("last"), "edits": edits}
    tokens = torch.tensor([p])
    begun = Running.start(subject, tokens[:, :-1])
    kept = begun.copy().feed(tokens[:, -1:])
    turned = read_on(subject, begun.copy(), tokens[:, -1:], changes=changes, state_where=places("last"), **where)
    wanted = Running.start(subject, torch.tensor([q])).logits
    torch.testing.assert_close(turned.logits, wanted, rtol=1e-3, atol=1e-3)
    assert float((wanted - kept[:, -1]).abs().max()) > 0.02
    assert torch.equal(begun.feed(tokens[:, -1:]), kept)  # the copy was edited, not what it was copied from
    said = generate(subject, [p], made.vector, [1.0], mode="state", max_tokens=6)
    assert said[0].tokens == generate(subject, [q], max_tokens=6)[0].tokens


def test_the_difference_at_the_last_block_turns_one_prompt_into_the_other(llama: Subject) -> None:
    p, q = (5, 90, 8, 31, 12), (44, 7, 61, 9, 13)
    made = fit_vector(llama, [Contrast(positive=q, negative=p, shared=0)], sites=(2,))
    with steered(llama, made.vector, 1.0, positions="last"):
        found = logits(llama, [list(p)])[0, -1]
    torch.testing.assert_close(found, logits(llama, [list(q)])[0, -1], rtol=1e-4, atol=1e-4)


def test_state_edits_come_before_the_tokens_that_are_named(mamba: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, sites=(1,), state=True).vector.only(mode="state", sites=(1,))
    edits, changes = row_edits(mamba, [vector], [2.0], torch.zeros(1, dtype=torch.long))
    tokens = torch.tensor(IDS)
    cases: tuple[tuple[str, list[int]], ...] = (
        ("last", [5]),
        ("last:3", [3, 4, 5]),
        ("all", [1, 2, 3, 4, 5]),
        ("generated", []),
        ("every:2", [2, 4]),
    )
    for text, edited_before in cases:
        by_hand = Running.start(mamba, tokens[:, :1])
        for at in range(1, 6):
            if at in edited_before:
                by_hand.edit(*changes)
            by_hand.feed(tokens[:, at : at + 1])
        options: dict[str, Any] = {"prompt": 6, "edits": edits, "where": places("last")}
        found = read_on(mamba, None, tokens, changes=changes, state_where=places(text), **options)
        torch.testing.assert_close(found.logits, by_hand.logits, rtol=1e-4, atol=1e-5)


def test_draws_share_their_noise_and_do_not_depend_on_company(llama: Subject) -> None:
    vector = vector_at(llama, 1, size=0.5)
    prompts = [(5, 6, 7), (9, 8, 7, 6), (3, 4, 5)]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "draws": 2, "seed": 3}
    found = generate(llama, prompts, vector, [0.0, 1.0], **options)
    assert [(s.prompt, s.multiplier, s.draw) for s in found[:4]] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    alone = generate(llama, prompts[:1], vector, [1.0], **options)
    assert [s.tokens for s in alone] == [s.tokens for s in found if s.prompt == 0 and s.multiplier == 1]
    assert len({s.tokens for s in found}) > 8
    assert all(s.text == llama.token_table().decode(s.tokens) for s in found)
    other = generate(llama, prompts, vector, [0.0, 1.0], **{**options, "seed": 4})
    assert [s.tokens for s in other] != [s.tokens for s in found]


def test_continuations_end_at_the_end_of_the_text(llama: Subject) -> None:
    prompt = (5, 6, 7)
    (whole,) = generate(llama, [prompt], max_tokens=6)
    end = whole.tokens[3]
    before = copy.copy(llama.model.generation_config.eos_token_id)
    llama.model.generation_config.eos_token_id = [end]
    try:
        (cut,) = generate(llama, [prompt], max_tokens=6)
    finally:
        llama.model.generation_config.eos_token_id = before
    assert cut.tokens == whole.tokens[: whole.tokens.index(end)]


def test_what_cannot_be_applied_is_refused(llama: Subject, mamba: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, state=True).vector
    with pytest.raises(InputError, match="a state is edited between tokens"), steered(mamba, vector.only(mode="state")):
        pass
    with pytest.raises(MismatchError, match="made on"), steered(llama, vector):
        pass
    with (
        pytest.raises(InputError, match=r"nothing at site 7; it has the sites 0, 1, 2"),
        steered(mamba, vector, sites=(7,)),
    ):
        pass
    with pytest.raises(NotFoundError, match="unknown operator"), steered(mamba, vector, operator="flip"):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="reflect is for the residual stream"):
        generate(mamba, ["it is"], vector, operator="reflect")
    assert encode(mamba.tokenizer, "it is")
    for options, message in (
        ({"draws": 2}, "several draws need a temperature"),
        ({"temperature": -1.0}, "a temperature is 0"),
        ({"max_tokens": 0}, "at least one prompt"),
        ({"multipliers": [float("nan")]}, "finite numbers"),
        ({"mode": "state", "sites": (-1,)}, "nothing at site -1"),
        ({"positions": "from:999"}, r"prompt 1 has no token to edit the residual at: it is of \d+ tokens, .*from:999"),
        ({"positions": "generated", "max_tokens": 1}, "no token to edit the residual"),
        ({"state_positions": "from:999"}, "no token to edit the state at"),
    ):
        with pytest.raises(InputError, match=message):
            generate(mamba, ["it is"], vector, **options)
    one: dict[str, Any] = {"mode": "state", "max_tokens": 3}
    with pytest.raises(
        InputError, match="prompt 2 has no token to edit the state at: it is of 1 tokens, a state can be"
    ):
        generate(mamba, [(7, 8), (7,)], vector, **one)
    assert generate(mamba, [(7,)], vector, [0.0], **one)[0].tokens == generate(mamba, [(7,)], max_tokens=3)[0].tokens
    assert generate(mamba, [(7,)], vector, [9.0], state_positions="onward", **one)
    with pytest.raises(MismatchError, match="the vector has 3 dimensions"):
        Steer(("x", "output"), "add", torch.ones(3)).change(torch.ones((1, 4)), None, torch.zeros(1, dtype=torch.long))
