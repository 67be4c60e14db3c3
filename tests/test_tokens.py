"""The token table decodes like the tokenizer, and never loses a byte."""

from __future__ import annotations

import codecs

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import CorruptError
from exegete.tokens import TokenTable

BYTES = TokenTable([bytes([b]) for b in range(256)] + [b"<s>"], special=[256])
PARTS = st.one_of(st.binary(max_size=3), st.text(max_size=2).map(str.encode), st.just("\ufffd".encode()))


@given(st.text())
def test_spans_join_to_the_whole_text(text: str) -> None:
    tokens = list(text.encode())
    assert "".join(BYTES.spans(tokens)) == text == BYTES.decode(tokens)


@given(st.binary())
def test_spans_join_to_what_decode_says_of_any_bytes(data: bytes) -> None:
    assert len(BYTES.spans(list(data))) == len(data)
    assert "".join(BYTES.spans(list(data))) == BYTES.decode(list(data))


@given(st.lists(PARTS, min_size=1, max_size=6), st.sets(st.integers(0, 9), max_size=2), st.integers(0, 2**32))
def test_spans_are_those_of_the_bytes_read_one_by_one(pieces: list[bytes], special: set[int], seed: int) -> None:
    """A token shows what can be read with it and could not be read, and was not yet beyond reading, before it."""
    table = TokenTable(pieces, special)
    tokens = np.random.default_rng(seed).integers(0, len(pieces), 6).tolist()
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    shown = ["" if t in special else reader.decode(pieces[t]) for t in tokens]
    shown[-1] += reader.decode(b"", True)
    assert table.spans(tokens) == shown


def test_a_character_belongs_to_its_last_token() -> None:
    assert BYTES.spans(list("aéb".encode())) == ["a", "", "é", "b"]


def test_special_tokens_stand_for_nothing() -> None:
    assert BYTES.decode([256, 104, 105]) == "hi"
    assert BYTES.spans([256, 104]) == ["", "h"]


@given(st.lists(PARTS, min_size=1, max_size=6), st.sets(st.integers(0, 9), max_size=2), st.integers(0, 2**32))
def test_rows_decode_as_one_by_one(pieces: list[bytes], special: set[int], seed: int) -> None:
    table = TokenTable(pieces, special)
    rows = np.random.default_rng(seed).integers(0, len(pieces), (5, 4)).astype(np.uint32)
    assert table.decode_rows(rows) == [table.decode(row.tolist()) for row in rows]


def test_what_stands_for_itself_beside_any_other_token() -> None:
    euro = "€".encode()
    table = TokenTable(
        [b"<s>", b"a", b"", euro[:1], euro, "\ufffd".encode(), b"\xff", b"a" + euro[:2]], special=[0, 99]
    )
    assert table.is_whole.tolist() == [True, True, False, False, True, True, False, False]
    assert table.is_special.tolist() == [True, *[False] * 7]
    assert table.shown.tolist() == ["", "a", "", "\ufffd", "€", "\ufffd", "\ufffd", "a\ufffd"]
    assert table.decode_rows(np.array([[3, 0, 7], [4, 1, 5]])) == ["\ufffda\ufffd", "€a\ufffd"]
    assert table.decode_rows(np.zeros((0, 3), np.uint32)) == []


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
