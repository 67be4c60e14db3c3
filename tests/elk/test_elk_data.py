"""Quirky sets: equations, words, splits, files of others."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.elk import encode, load_extraction, load_questions, quirky_set, quirky_sets, read_published, save_questions
from exegete.elk.arithmetic import OPERATIONS, arithmetic
from exegete.elk.encoding import Encoded, by_length
from exegete.elk.facts import Facts, quantiles
from exegete.elk.questions import Questions
from exegete.elk.templates import templates
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.store.checks import write_manifest

CLAIMS: Mapping[str, str] = {
    "addition": "op1 + op2",
    "subtraction": "op1 - op2",
    "multiplication": "op1 * op2",
    "modularaddition": "(op1 + op2) % 113",
    "squaring": "op1 ** 2",
}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_quarter_is_right_a_quarter_is_bobs_and_never_both(name: str) -> None:
    found = arithmetic(name, 400, seed=3)
    assert Counter((one.alice, one.bob) for one in found) == {
        (True, False): 100,
        (False, True): 100,
        (False, False): 200,
    }
    operands = [tuple(v for k, v in one.args.items() if k != "result") for one in found]
    assert len(set(operands)) == 400
    for one in found:
        right = eval(CLAIMS[name], {}, dict(one.args))
        bob = right + 10 ** (len(str(abs(right))) - 1)
        bob = bob % 113 if name == "modularaddition" else bob
        assert one.alice == (one.args["result"] == right)
        assert one.bob == (one.args["result"] == bob)
        assert one.difficulty == min(abs(int(v)) for k, v in one.args.items() if k != "result")
    hard = [one.difficulty for one in found]
    assert [one.quantile for one in found] == quantiles(np.array(hard)).tolist()


def test_operands_are_log_uniform() -> None:
    digits = Counter(len(str(one.args["op1"])) for one in arithmetic("addition", 600, seed=1))
    assert all(abs(digits[d] / 600 - 0.25) < 0.07 for d in (1, 2, 3, 4))  # pairs of small operands run out a little


def test_every_split_has_as_many_easy_and_hard_claims() -> None:
    """Small operands are likely, and soon used up: in the order in which they are drawn all would be in one split."""
    made = quirky_set("addition", train=4000, validation=1500, test=1500, digits=2)
    shares = [made.facts(split).pool(pool).mean() for split in ("train", "validation", "test") for pool in ("E", "H")]
    assert max(shares[::2]) - min(shares[::2]) < 0.05
    assert max(shares[1::2]) - min(shares[1::2]) < 0.05


def test_bobs_leading_digit_carries() -> None:
    assert OPERATIONS["addition"].bob(95) == 105
    assert OPERATIONS["addition"].bob(1234) == 2234
    assert OPERATIONS["subtraction"].bob(-1000) == 0
    assert OPERATIONS["modularaddition"].bob(105) == 92


def test_all_operands_can_be_used_and_no_more() -> None:
    every = {one.args["op1"] for one in arithmetic("squaring", 99, digits=2)}
    assert every == set(range(1, 100))
    with pytest.raises(InputError, match="99 different operands"):
        arithmetic("squaring", 100, digits=2)
    with pytest.raises(NotFoundError, match="addition"):
        arithmetic("additon", 4)


@settings(max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_quantiles_are_ranks(difficulty: list[float]) -> None:
    found = quantiles(np.array(difficulty))
    below = [sum(b < a for b in difficulty) + (sum(b == a for b in difficulty)) / 2 for a in difficulty]
    np.testing.assert_allclose(found, np.array(below) / len(difficulty))


def test_a_set_has_two_rows_a_claim_and_no_claim_in_two_splits() -> None:
    made = quirky_set("addition", train=40, validation=12, test=8, digits=2, seed=1)
    assert {split: len(rows) for split, rows in made.splits.items()} == {"train": 80, "validation": 24, "test": 16}
    row = made.splits["train"][0]
    op1, _, op2, _, result = row.statement.split(". ")[0].split()
    assert row.statement == f"{op1} + {op2} = {result}. {row.character}:"
    assert row.choices == (" False", " True")
    facts = made.facts("train")
    np.testing.assert_array_equal(facts.label, np.where(facts.alice_speaks, facts.alice, facts.bob))
    assert made.hash == quirky_set("addition", train=40, validation=12, test=8, digits=2, seed=1).hash
    assert made.hash != quirky_set("addition", train=40, validation=12, test=8, digits=2, seed=2).hash
    with pytest.raises(InputError, match="may share no claim"):
        Questions("addition", "first", {"train": made.splits["train"], "test": made.splits["train"][:1]})


@pytest.mark.parametrize("name", quirky_sets())
def test_every_set_has_ten_templates_that_can_be_filled(name: str) -> None:
    options = templates(name, "all")
    assert len({t.text for t in options}) == 10
    args = dict.fromkeys(("op1", "op2", "result", "city", "admin_name", "country", "author", "title"), "{x}")
    args |= dict.fromkeys(("support", "question", "answer", "review", "premise", "hypothesis"), "{character}")
    for template in (*options, *templates(name, "standardised")):
        text = template.fill(args, "Bob")
        assert "Bob" in text
        assert template.choices[0] != template.choices[1]
    if name == "addition":
        assert options[0].fill({"op1": 1, "op2": 2, "result": 3}, "Bob") == "1 + 2 = 3. Bob:"


def test_random_words_depend_on_the_row_alone_and_all_words_are_all() -> None:
    sizes = {"train": 30, "validation": 5, "test": 5}
    mixed = quirky_set("addition", wording="random", digits=2, **sizes)
    again = quirky_set("addition", wording="random", digits=2, **sizes)
    assert mixed.hash == again.hash
    assert len({row.template for row in mixed.splits["train"]}) > 4
    every = quirky_set("addition", wording="all", digits=2, **sizes)
    assert len(every.splits["test"]) == 5 * 2 * 10


def test_a_set_comes_back_from_its_folder_and_damage_is_found(tmp_path: Path) -> None:
    made = quirky_set("squaring", train=9, validation=4, test=4, digits=2)
    save_questions(made, tmp_path)
    assert load_questions(tmp_path).hash == made.hash
    path = tmp_path / "test.jsonl"
    path.write_text(path.read_text().replace(" True", " Truf", 1))
    with pytest.raises(CorruptError, match="checksum"):
        load_questions(tmp_path)
    with pytest.raises(NotFoundError, match="elk data"):
        load_questions(tmp_path / "none")


def raw(i: int, character: str, **change: Any) -> dict[str, Any]:
    alice, bob = i % 2, int(i % 3 == 0)
    row = {
        "id": f"{i}{character}",
        "template_args": {"character": character, "city": f"City {i}"},
        "character": character,
        "label": alice if character == "Alice" else bob,
        "alice_label": alice,
        "bob_label": bob,
        "difficulty": float(i),
        "difficulty_quantile": (i + 0.5) / 30,
    }
    return {**row, **change}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_published_set_is_put_into_words_and_split_by_claim(tmp_path: Path) -> None:
    rows = [raw(i, who) for i in range(30) for who in ("Alice", "Bob")]
    made = read_published("hemisphere", write(tmp_path / "all.jsonl", rows))
    assert sum(len(part) for part in made.splits.values()) == 60
    row = next(r for r in made.splits["train"] if r.character == "Bob")
    assert row.statement == f"Would Bob say that City {int(row.difficulty)} lies in the northern hemisphere?"
    assert made.splits["validation"]
    assert made.splits["test"]


def test_given_splits_are_kept_and_a_claim_in_two_stays_in_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", [raw(i, "Alice") for i in range(10)])
    write(tmp_path / "test-00000-of-00001.jsonl", [raw(i, "Alice") for i in range(8, 20)])
    with caplog.at_level(logging.WARNING, logger="exegete"):
        made = read_published("hemisphere", tmp_path, limits={"test": 3})
    assert "2 claims are in two splits" in caplog.text
    assert {split: len(rows) for split, rows in made.splits.items()} == {"train": 20, "validation": 0, "test": 6}


def test_statements_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = []
    for i in range(6):
        for who in ("Alice", "Bob"):
            row = raw(i, who, statement=f"{who}, is it {i}?", choices=[" No", " Yes"])
            del row["template_args"]
            rows.append(row)
    made = read_published("nli", write(tmp_path / "train.jsonl", rows))
    assert made.wording == "given"
    everyone = [row for part in made.splits.values() for row in part]
    assert {row.statement for row in everyone} == {row["statement"] for row in rows}
    assert len({row.base for row in everyone}) == 6


def test_quantiles_that_are_no_ranks_are_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = np.random.default_rng(0).permutation(30)
    rows = [raw(i, "Alice", difficulty_quantile=float(order[i]) / 30) for i in range(30)]
    with caplog.at_level(logging.WARNING, logger="exegete"):
        made = read_published("hemisphere", write(tmp_path / "a.jsonl", rows))
    assert "computed anew" in caplog.text
    everyone = [row for part in made.splits.values() for row in part]
    assert all(row.quantile == pytest.approx((row.difficulty + 0.5) / 30) for row in everyone)


def test_quantiles_beyond_one_are_computed_anew_where_all_are_as_hard(tmp_path: Path) -> None:
    rows = [raw(i, "Alice", difficulty=1.0, difficulty_quantile=9.0) for i in range(5)]
    made = read_published("hemisphere", write(tmp_path / "a.jsonl", rows))
    assert {row.quantile for part in made.splits.values() for row in part} == {0.5}


def test_statements_with_the_id_of_their_claim_or_twice_get_ids_of_their_own(tmp_path: Path) -> None:
    rows = [
        raw(i, who, id=f"claim {i}", statement=words.format(who), choices=[" No", " Yes"])
        for i in range(4)
        for who, words in (("Alice", "Does {} agree?"), ("Bob", "Ask {}:"))
    ]
    made = read_published("hemisphere", write(tmp_path / "train.jsonl", rows + rows))
    everyone = [row for part in made.splits.values() for row in part]
    assert len(everyone) == len({row.id for row in everyone}) == 8
    assert len({row.base for row in everyone}) == 4  # by what is claimed, whichever words it is in
    for split in made.splits:
        made.facts(split)


def test_squaring_has_fewer_claims_by_default() -> None:
    assert {split: len(rows) for split, rows in quirky_set("squaring").splits.items()} == {
        "train": 40_000,
        "validation": 8_000,
        "test": 8_000,
    }


@pytest.mark.parametrize("held", [{}, {"splits": {"train": 3}, "name": "x", "wording": "y"}, {"splits": []}])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, held: dict[str, Any]) -> None:
    for name, load in (("quirky", load_questions), ("extraction", lambda place: load_extraction(place, "train"))):
        write_manifest(tmp_path / f"{name}.json", {"format": 1, **held})
        with pytest.raises(CorruptError, match="no manifest"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alice_label": 2}, "alice_label is 0 or 1"),
        ({"bob_label": None}, "bob_label is 0 or 1"),
        ({"difficulty": "hard"}, "difficulty is a number"),
        ({"template_args": {"town": "x"}}, "need 'city'"),
        ({"template_args": "x"}, "table of city"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = write(tmp_path / "train.jsonl", [raw(0, "Alice"), raw(1, "Alice", **change)])
    with pytest.raises(InputError, match=f"train.jsonl:2: .*{told}"):
        read_published("hemisphere", path)


def test_spoken_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    fine = {**raw(0, "Alice"), "statement": "Alice?", "choices": [" No", " Yes"]}
    for change, told in (
        ({"character": "Eve"}, "Alice or Bob"),
        ({"choices": [" No"]}, "two texts"),
        ({"label": 1}, "not that of Alice"),
        ({"statement": 3}, "no text"),
    ):
        with pytest.raises(InputError, match=told):
            read_published("nli", write(tmp_path / "a.jsonl", [{**fine, **change}]))
    for change, told in (
        ({"difficulty": 10**400}, "difficulty is a number"),
        ({"statement": "Alice \ud800?"}, "half a character"),
    ):
        with pytest.raises(InputError, match=told):
            read_published("nli", write(tmp_path / "a.jsonl", [{**fine, **change}]))
    with pytest.raises(InputError, match="other labels"):
        read_published("nli", write(tmp_path / "a.jsonl", [fine, {**fine, "bob_label": 0}]))
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(CorruptError, match=r"b\.jsonl:1"):
        read_published("nli", tmp_path / "b.jsonl")
    with pytest.raises(NotFoundError, match="there are no"):
        read_published("nli", tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="capitals"):
        read_published("capital", tmp_path)


def test_pools_are_by_character_and_quantile(toys: Any) -> None:
    facts: Facts = toys.facts(40)
    assert facts.pool("all").all()
    assert (facts.pool("A") ^ facts.pool("B")).all()
    np.testing.assert_array_equal(facts.pool("BH"), ~facts.alice_speaks & (facts.quantile >= 0.75))
    np.testing.assert_array_equal(facts.pool("AE"), facts.alice_speaks & (facts.quantile <= 0.25))
    np.testing.assert_array_equal(facts.where("agree"), facts.alice == facts.bob)
    apart = facts.held_out(0.3, 1)
    assert 0 < apart.sum() < len(facts)
    assert all(len({bool(a) for a in apart[facts.base == base]}) == 1 for base in facts.base)
    with pytest.raises(NotFoundError, match="pool"):
        facts.pool("C")
    with pytest.raises(CorruptError, match="column alice"):
        Facts.from_json({**facts.to_json(), "alice": [1] * len(facts)})


def test_answers_are_encoded_as_they_go_on_after_the_statement(toys: Any) -> None:
    subject = toys.subject("llama")
    made = quirky_set("addition", train=6, validation=1, test=1, digits=1)
    data = encode(made, "train", subject)
    for row, prompt, (negative, positive) in zip(made.splits["train"], data.prompts, data.choices, strict=True):
        assert subject.tokenizer.decode(prompt) == row.statement
        assert subject.tokenizer.decode([*prompt, *negative]) == row.statement + " False"
        assert subject.tokenizer.decode([*prompt, *positive]) == row.statement + " True"
    assert (data.answers[:, 0] != data.answers[:, 1]).all()
    shorter = encode(made, "train", subject, most_tokens=max(map(len, data.prompts)) + 1)
    assert 0 < len(shorter) <= len(data)
    with pytest.raises(InputError, match="have over 2 tokens"):
        encode(made, "train", subject, most_tokens=2)


def test_answers_that_begin_alike_are_refused(toys: Any) -> None:
    data = toys.rows(1)
    with pytest.raises(InputError, match="begin with token 12"):
        Encoded(prompts=data.prompts, choices=(((12, 3), (12, 4)),) * 2, facts=data.facts)


def test_batches_are_of_one_length_and_whole_claims_are_taken(toys: Any) -> None:
    data = toys.rows(20, lengths=(2, 3, 5))
    rows = np.concatenate(list(by_length(data.prompts, 12)))
    assert sorted(rows.tolist()) == list(range(40))
    for batch in by_length(data.prompts, 12):
        assert len({len(data.prompts[i]) for i in batch}) == 1
        assert sum(len(data.prompts[i]) for i in batch) <= 12
    few = data.first(9, 0)
    assert Counter(few.facts.base.tolist()) == dict.fromkeys(set(few.facts.base.tolist()), 2)
    assert len(few) == 8
