from __future__ import annotations

from typing import Any

import pytest

from exegete.errors import InputError
from exegete.steering import Pair, Row
from exegete.steering.questions import ReadAt, encode, label_contrasts, questions, text_contrasts
from exegete.steering.templates import template_of
from exegete.subjects import Subject


class _Tokenizer:
    """One token a character, ``(A`` a token of its own; texts begin with 1 and end with 2, as some tokenizers do."""

    chat_template = "<c>"

    def __init__(self, *, joins: bool = False, long: bool = False) -> None:
        self.joins, self.long = joins, long

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        while text:
            size = 2 if self.joins and text[:2] == "(A" else 1
            code = ord(text[0]) if size == 1 else 900
            ids += [700, code] if self.long and text[0] in "AB" and len(text) == 1 else [code]
            text = text[size:]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def apply_chat_template(self, asked: Any, **_: Any) -> str:
        return "<c>" + str(asked[0]["content"])


ROW = Row(question="Q (A) (B)", match="B", other="A")


def test_a_text_begins_as_the_tokenizer_begins_it_and_does_not_end() -> None:
    assert encode(_Tokenizer(), "ab") == (1, 97, 98)
    assert encode(_Tokenizer(), "ab", special=False) == (97, 98)
    with pytest.raises(InputError, match="no tokens"):
        encode(_Tokenizer(), "", special=False)


def test_labels_are_tokens_in_context() -> None:
    (found,) = questions([ROW], template_of("{}→"), _Tokenizer())
    assert (found.prompt[0], chr(found.prompt[-1])) == (1, "(")
    assert (found.match, found.other, found.single) == ((ord("B"),), (ord("A"),), True)
    (chat,) = questions([ROW], template_of("chat"), _Tokenizer())
    assert chat.prompt[:3] == tuple(map(ord, "<c>"))


def test_a_bracket_joined_with_a_letter_moves_into_the_answer() -> None:
    (found,) = questions([ROW], template_of("{}→"), _Tokenizer(joins=True))
    assert chr(found.prompt[-1]) == "→"
    assert (found.match, found.other, found.single) == ((ord("("), ord("B")), (900,), False)


def test_what_labels_share_belongs_to_the_prompt() -> None:
    (found,) = questions([ROW], template_of("{}→"), _Tokenizer(long=True))
    assert found.prompt[-1] == 700
    assert found.single


def test_answers_that_begin_alike_are_refused() -> None:
    with pytest.raises(InputError, match="row 1: the tokens of one answer begin with the other's"):
        questions([Row(question="(A) (AB)", match="AB", other="A")], template_of("{}→"), _Tokenizer())


def test_contrasts_hold_what_they_share(llama: Subject) -> None:
    one, two = label_contrasts(
        [ROW, Row(question=ROW.question, match="A", other="B")], template_of("{}→"), _Tokenizer()
    )
    assert (one.first, two.first) == (False, True)
    assert (one.positive, one.negative) == (two.negative, two.positive)
    assert one.positive[: one.shared] == one.negative[: one.shared]
    assert len(one.positive) == one.shared + 1
    (pair,) = text_contrasts([Pair(positive="it is big", negative="it is not")], llama.tokenizer)
    assert pair.first is None
    assert llama.token_table().decode(pair.positive[: pair.shared]) == "it is"


def test_reading_places(llama: Subject) -> None:
    tokens = encode(llama.tokenizer, "Is it big? yes it is (A)")
    end = len(tokens)

    def span(rule: str, shared: int = 2) -> tuple[int, int]:
        return ReadAt(rule=rule).span(tokens, shared, llama)

    assert span("last") == (end - 1, end)
    assert span("-1") == (end - 1, end)
    assert span("-3") == (end - 3, end - 2)
    assert span("1") == (1, 2)
    assert span("answer", 4) == (4, end)
    pieces = [llama.token_table().decode([t]) for t in tokens]
    first, _ = span("after it")
    assert "".join(pieces[: first + 1]).endswith("yes it")
    for rule, message in (("99", "no token 99"), ("-99", "no token -99"), ("after no", "no 'no' to read after")):
        with pytest.raises(InputError, match=message):
            span(rule)
    with pytest.raises(InputError, match="no answer of its own"):
        span("answer", end)
    with pytest.raises(InputError, match="read at last, answer"):
        ReadAt(rule="first")
