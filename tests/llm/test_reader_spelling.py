"""Texts of two parts as ids: the border, tokens across it, and long beginnings tokenised in two pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exegete.llm.spelling import Spelled, Spelling
from exegete.subjects.pieces import token_table
from exegete.testing import toy_tokenizer

TOKENIZER = toy_tokenizer()
TABLE = token_table(TOKENIZER)
SPELLING = Spelling(TOKENIZER, TABLE)
LONG = "The quick brown fox\njumps over the lazy dog.\n" * 6 + "Texts with this feature:\n"
PARTS = st.lists(st.sampled_from([*"aé日 \n\t<>0", "def ", " dog", "\r\n"]), max_size=12).map("".join)


def pieces(spelled: Spelled) -> list[bytes]:
    return [TABLE.pieces[i] for i in spelled.ids[1:]]


@settings(max_examples=60)
@given(head=PARTS, tail=PARTS)
@example(head="def a", tail="dd(first")
def test_tokens_spell_the_text_and_those_counted_hold_the_second_part(head: str, tail: str) -> None:
    (spelled,) = SPELLING.spell([(head, tail)])
    assert spelled is not None
    held = pieces(spelled)
    assert spelled.ids[0] == TOKENIZER.bos_token_id
    assert b"".join(held) == (head + tail).encode()
    before = b"".join(held[: spelled.first - 1])
    assert len(before) <= len(head.encode())
    assert not tail or len(before) + len(held[spelled.first - 1]) > len(head.encode())


def test_a_token_across_the_border_counts() -> None:
    (spelled,) = SPELLING.spell([("def a", "dd(first")])
    assert spelled is not None
    crossing = TABLE.pieces[spelled.ids[spelled.first]]
    assert crossing in (b" add", b"add")
    assert b"".join(pieces(spelled)[: spelled.first - 1]) in (b"def", b"def ")


@settings(max_examples=40)
@given(z=PARTS, tails=st.lists(PARTS, min_size=2, max_size=4))
@example(z="ends in a line end\n", tails=["\n\n", " \n", "dog"])
def test_two_pieces_give_the_ids_of_the_whole(z: str, tails: list[str]) -> None:
    beginning = f"{LONG}{z}\nTexts with this feature:\n"
    found = SPELLING.spell([(beginning, tail) for tail in tails])
    for tail, spelled in zip(tails, found, strict=True):
        assert spelled is not None
        assert list(spelled.ids[1:]) == TOKENIZER(beginning + tail)["input_ids"]
        assert [spelled] == SPELLING.spell([(beginning, tail)])  # alone, it is tokenised whole


class Counting:
    """A tokenizer that says how many characters it was given."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.given = inner, 0
        self.bos_token_id, self.is_fast = inner.bos_token_id, inner.is_fast

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        self.given += len(text) if isinstance(text, str) else sum(map(len, text))
        return self._inner(text, **options)


def test_of_a_long_beginning_only_the_end_is_tokenised_again() -> None:
    tokenizer = Counting(TOKENIZER)
    spelling = Spelling(tokenizer, TABLE)
    pairs = [(LONG, f"dog {i}") for i in range(100)]
    spelling.spell(pairs)
    assert tokenizer.given < sum(len(b) + len(c) for b, c in pairs) / 4


def metaspace() -> Any:
    """A tokenizer that writes spaces as ▁ and puts one before every text, as Llama 2's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "▁", "▁the", "▁dog", "s", "▁fox", "x", "▁runs", "\n"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def test_where_pieces_do_not_spell_the_text_the_tokenizer_says_where_tokens_lie() -> None:
    tokenizer = metaspace()
    spelling = Spelling(tokenizer, token_table(tokenizer))
    (spelled,) = spelling.spell([("the dog", " runs the fox")])
    assert spelled == Spelled((1, 3, 4, 8, 3, 6), 3)
    (across,) = spelling.spell([("the do", "g runs")])
    assert across == Spelled((1, 3, 4, 8), 2)
    tokenizer = Counting(tokenizer)
    tokenizer.is_fast = False
    assert Spelling(tokenizer, token_table(metaspace())).spell([("the", " dog")]) == [None]


def test_what_a_tokenizer_begins_texts_with_is_left_to_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[C]"})
    own = int(tokenizer.cls_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[C] $A", special_tokens=[("[C]", own)])
    (spelled,) = Spelling(tokenizer, token_table(tokenizer)).spell([("The", " fox")])
    assert spelled is not None
    assert spelled.ids[0] == own
    assert spelled.ids[1:] == tuple(TOKENIZER("The fox")["input_ids"])


@pytest.mark.parametrize("pairs", [[], [("", "")]])
def test_nothing_to_spell(pairs: list[tuple[str, str]]) -> None:
    assert SPELLING.spell(pairs) == [Spelled((0,), 1)] * len(pairs)
