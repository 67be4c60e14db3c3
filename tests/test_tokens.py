"""The token table decodes like the tokenizer, and never loses a byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import CorruptError
from exegete.tokens import TokenTable

BYTES = TokenTable([bytes([b]) for b in range(256)] + [b"<s>"], special=[256])


@given(st.text())
def test_spans_join_to_the_whole_text(text: str) -> None:
    tokens = list(text.encode())
    assert "".join(BYTES.spans(tokens)) == text == BYTES.decode(tokens)


@given(st.binary())
def test_spans_join_to_what_decode_says_of_any_bytes(data: bytes) -> None:
    assert len(BYTES.spans(list(data))) == len(data)
    assert "".join(BYTES.spans(list(data))) == BYTES.decode(list(data))


def test_a_character_belongs_to_its_last_token() -> None:
    assert BYTES.spans(list("aéb".encode())) == ["a", "", "é", "b"]


def test_special_tokens_stand_for_nothing() -> None:
    assert BYTES.decode([256, 104, 105]) == "hi"
    assert BYTES.spans([256, 104]) == ["", "h"]


@given(st.lists(st.binary(max_size=6)), st.sets(st.integers(0, 5)))
def test_the_table_round_trips_through_json(pieces: list[bytes], special: set[int]) -> None:
    table = TokenTable(pieces, special)
    again = TokenTable.from_json(table.to_json())
    assert again == table
    assert hash(again) == hash(table)
    assert again.texts == table.texts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pieces": [1], "special": []}', '{"pieces": 3}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(CorruptError, match="token table"):
        TokenTable.from_json(text)
