from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError
from exegete.steering import (
    Pair,
    Row,
    balanced,
    behaviours,
    load_behaviour,
    load_pairs,
    load_questions,
    load_rows,
    relabelled,
    swapped,
)
from exegete.steering.templates import prompt_text, template_of


def row(number: int, match: str = "A") -> Row:
    question = f"Is {number} big?\n\nChoices:\n (A) yes it is\n (B) no it is not"
    return Row(question=question, match=match, other="B" if match == "A" else "A")


def entry(found: Row, space: str = "") -> dict[str, str]:
    return {
        "question": found.question,
        "answer_matching_behavior": f"{space}({found.match})",
        "answer_not_matching_behavior": f"{space}({found.other})",
    }


def written(folder: Path, rows: Any) -> Path:
    file = folder / "rows.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_the_published_format_is_read_with_and_without_a_leading_space(tmp_path: Path) -> None:
    rows = [row(1), row(2, "B")]
    for space in ("", " "):
        assert load_rows(written(tmp_path, [entry(r, space) for r in rows])) == tuple(rows)
    file = tmp_path / "open.json"
    file.write_text(json.dumps([{"question": "How?"}, {"question": "Why?"}]))
    assert load_questions(file) == ("How?", "Why?")


def test_a_folder_of_behaviours_is_read(data: Path, rows: list[Row]) -> None:
    assert behaviours(data) == ("bigness", "refusal")
    found = load_behaviour(data, "refusal")
    assert (found.generate, found.test) == (tuple(rows[:8]), tuple(rows[8:]))
    assert found.open_ended == ("How big is it?",)
    with pytest.raises(NotFoundError, match="unknown behaviour 'refusl'; did you mean refusal"):
        load_behaviour(data, "refusl")
    with pytest.raises(NotFoundError, match="no behaviours"):
        behaviours(data / "generate")


BAD: dict[str, tuple[Any, str]] = {
    "no list": ({"question": "?"}, "no list of questions"),
    "empty": ([], "no list of questions"),
    "no object": ([entry(row(1)), 5], "row 2: expected an object"),
    "missing": ([{**entry(row(1)), "question": None}], "row 1: question is missing"),
    "no answer": ([{"question": "Is it?\n (A) yes\n (B) no"}], "row 1: answer_matching_behavior is missing"),
    "no label": (
        [entry(row(1)), {**entry(row(1)), "answer_matching_behavior": "yes"}],
        "row 2: .*'yes'; expected a label",
    ),
    "the same": ([{**entry(row(1)), "answer_matching_behavior": "(B)"}], "row 1: both answers are \\(B\\)"),
    "no option": ([{**entry(row(1)), "answer_matching_behavior": "(C)"}], "row 1: the question has no option \\(C\\)"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_not_in_the_format_is_refused_with_its_row(name: str, tmp_path: Path) -> None:
    rows, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        load_rows(written(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="does not parse"):
        load_rows(written(tmp_path, "[{"))
    with pytest.raises(NotFoundError):
        load_rows(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="row 1"):
        load_questions(written(tmp_path, [{"text": "?"}]))


def test_options_are_swapped_by_their_text() -> None:
    found = swapped(row(3))
    assert found.question == "Is 3 big?\n\nChoices:\n (A) no it is not\n (B) yes it is"
    assert (found.match, found.other) == ("B", "A")
    more = Row(question="Why?\n\nChoices:\n(A) one\n(B) two\n(C) three", match="C", other="A")
    assert swapped(more).question == "Why?\n\nChoices:\n(A) three\n(B) two\n(C) one"
    with pytest.raises(InputError, match="begin a line"):
        swapped(Row(question="Is it (A) big or (B) small?", match="A", other="B"))


@given(
    st.text(),
    st.text(alphabet=st.characters(blacklist_characters="\n\r")),
    st.lists(st.text("xyz (AB).", max_size=9), min_size=2, max_size=5),
)
def test_swapping_twice_changes_nothing(question: str, line: str, options: list[str]) -> None:
    labels = "ABCDE"[: len(options)]
    text = f"{question}\n{line}\n" + "\n".join(f" ({a}) {o}" for a, o in zip(labels, options, strict=True))
    held = Row(question=text, match=labels[-1], other="A")
    once = swapped(held)
    assert swapped(once) == held
    assert (once.match, once.other) == ("A", labels[-1])
    assert sorted(once.question) == sorted(text)


@pytest.mark.parametrize("n_a", [0, 3, 7, 8, 13])
def test_letters_are_balanced(n_a: int) -> None:
    rows = [row(i, "A" if i < n_a else "B") for i in range(13)]
    random.Random(0).shuffle(rows)
    found = balanced(rows, seed=4)
    assert abs(sum(r.match == "A" for r in found) - 6.5) == 0.5
    changed = [a for a, b in zip(rows, found, strict=True) if a != b]
    assert len(changed) == abs(13 - 2 * n_a) // 2
    assert all(b in (a, swapped(a)) for a, b in zip(rows, found, strict=True))
    assert balanced(rows, seed=4) == found
    both = balanced(rows, "both")
    assert len(both) == 26
    assert sum(r.match == "A" for r in both) == 13
    assert balanced(rows, "none") == tuple(rows)
    with pytest.raises(InputError, match="none, swap or both"):
        balanced(rows, "some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^row 2: "):
        balanced([rows[0], Row(question="(A) or (B)?", match="A", other="B")], "both")


@pytest.mark.parametrize("pair", ["A B", "1 2", "2 10", "A2 A10", "A B2", "01 1", "9 A", "2 1" + "0" * 5000])
def test_labels_are_sorted_with_their_numbers_by_size(pair: str) -> None:
    first, second = pair.split()
    for match, other in ((first, second), (second, first)):
        assert Row(question="?", match=match, other=other).labels == (first, second)


def test_labels_are_called_otherwise() -> None:
    (found,) = relabelled([row(3, "B")])
    assert found.question.endswith("(1) yes it is\n (2) no it is not")
    assert (found.match, found.other) == ("2", "1")
    with pytest.raises(InputError, match="row 1 has the label B; new labels are given for A"):
        relabelled([row(3)], ["x"])
    with pytest.raises(InputError, match="different words"):
        relabelled([row(3)], ["x", "x"])


def test_pairs_are_read_from_three_kinds_of_files(tmp_path: Path) -> None:
    pairs = (Pair(positive="I, yes", negative="no\nno"), Pair(positive="a", negative="b"))
    held = [{"positive": p.positive, "negative": p.negative} for p in pairs]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(h) for h in held) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(held))
    (tmp_path / "p.csv").write_text('id,positive,negative\n1,"I, yes","no\nno"\n2,a,b\n')
    for ending in ("jsonl", "json", "csv"):
        assert load_pairs(tmp_path / f"p.{ending}") == pairs


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a", "allowed: .jsonl, .json, .csv"),
        ("p.jsonl", '{"positive": "a", "negative": "b"}\n{"positive": "a"}', "row 2: negative is missing"),
        ("p.csv", "positive,negative\na,a\n", "row 1: positive and negative are the same"),
        ("p.csv", "positive,other\na,a\n", "row 1: negative is missing"),
        ("p.jsonl", "", "holds no pairs"),
        ("p.jsonl", "{", "does not parse"),
        ("p.json", "3", "row 1: positive is missing"),
    ],
)
def test_bad_pairs_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ExegeteError, match=message):
        load_pairs(tmp_path / name)
    with pytest.raises(NotFoundError):
        load_pairs(tmp_path / "nothing.csv")


class _Chat:
    chat_template: str | None = "{}"

    def apply_chat_template(self, asked: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<user>{asked[0]['content']}<model>"


def test_templates_end_in_an_open_bracket() -> None:
    found = {
        name: prompt_text(template_of(name), "Q{}?", _Chat())
        for name in ("plain", "llama-2", "hermes", "chat", "Ask: {} →(")
    }
    assert found == {
        "plain": "Q{}?\n\nAnswer: (",
        "llama-2": "[INST] Q{}? [/INST] (",
        "hermes": "\x16user\nQ{}?\x17\n\x16assistant\n(",
        "chat": "<user>Q{}?<model>(",
        "Ask: {} →(": "Ask: Q{}? →(",
    }
    assert prompt_text(template_of("llama-2"), "Q", None, bracket=False) == "[INST] Q [/INST]"
    with pytest.raises(NotFoundError, match="unknown template 'lama-2'; did you mean llama-2"):
        template_of("lama-2")
    with pytest.raises(InputError, match="once"):
        template_of("{} {}")
    silent = _Chat()
    silent.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        prompt_text(template_of("chat"), "Q", silent)
