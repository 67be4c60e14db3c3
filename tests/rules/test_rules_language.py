from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import InputError, NotFoundError
from exegete.rules.english import parse, quote, render, unquote
from exegete.rules.language import (
    CLASSES,
    PLACES,
    STATES,
    ClassAt,
    Clause,
    PositionIn,
    Rule,
    StateIs,
    TokenAt,
    TokenOf,
    TokenWithin,
    significant,
)
from exegete.tokens import TokenTable

NASTY = TokenTable(
    [
        b"",  # special: empty
        b"self",
        b"`",
        b"\\",
        b"\\n",
        b"\n",
        b"\n    ",
        b" or ",
        b"` or `",
        b", right after `(`",
        b"(83% of the time, mean 2)",
        b"#12",
        b"; or ",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",  # an encoded surrogate is no UTF-8
        "é".encode(),
        "\u200b\u202e".encode(),
        "\x85\x00\t\r".encode(),
        b"twice",
        b"twice",
        b"",
        "🙂".encode(),
        b"\\x41",
        b"\\u{41}",
    ],
    [0],
)


def one(condition: object) -> Rule:
    return Rule((Clause((condition,), 0.5, 1.0),))  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_english_and_json_give_the_rule_back(
    rule_strategy: Callable[[int], st.SearchStrategy[Rule]], data: st.DataObject
) -> None:
    rule = data.draw(rule_strategy(len(NASTY)))
    text = render(rule, NASTY)
    assert parse(text, NASTY) == rule
    assert "\n" not in text
    assert Rule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@settings(max_examples=200, deadline=None)
@given(piece=st.binary(min_size=1, max_size=8))
def test_any_bytes_survive_quoting(piece: bytes) -> None:
    assert unquote(quote(piece)[1:-1]) == piece


def test_a_rule_reads_as_english() -> None:
    rule = Rule(
        (
            Clause((TokenAt(0, (1,)), TokenAt(1, (2, 5, 16)), StateIs("string", negated=True)), 0.831, 2.4123),
            Clause((TokenWithin(8, (19,)), ClassAt(2, "digits")), 0.4, 1.0),
            Clause((PositionIn(0, 4), TokenOf("opener", (1,)), StateIs("line_start", after=True)), 1.0, 0.0),
        )
    )
    assert render(rule, NASTY) == (
        "Fires on `self`, right after `\\``, `\\n` or `é`, not inside a string (83.1% of the time, mean 2.412); "
        "or within 8 tokens after #19, 2 tokens after a number (40% of the time, mean 1.0); "
        "or at positions 0 to 3 of the row, in brackets opened by `self`, at the start of a line once it is read "
        "(100% of the time, mean 0.0)."
    )


def test_every_phrase_reads_back() -> None:
    """Phrases that begin alike must not be taken for each other."""
    for name in CLASSES:
        for offset in range(9):
            assert parse(render(one(ClassAt(offset, name)), NASTY), NASTY) == one(ClassAt(offset, name))
    for name in STATES:
        for after in (False, True):
            assert parse(render(one(StateIs(name, after)), NASTY), NASTY) == one(StateIs(name, after))
    for place in PLACES:
        assert parse(render(one(TokenOf(place, (1, 2))), NASTY), NASTY) == one(TokenOf(place, (1, 2)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Fires",
        "Fires on",
        "This latent fires on the token self.",
        "Fires on numbers in code.",
        "Fires on `self` (83% of the time, mean 2.4) and more",
        "Fires on `self` (83% of the time, mean 2.4); or",
        "Fires on `self`",
        "Fires on `self`.",
        "Fires on `self (83% of the time, mean 2.4).",
        "Fires on `unheard of` (83% of the time, mean 2.4).",
        "Fires on `twice` (83% of the time, mean 2.4).",
        "Fires on `self`, `é` (83% of the time, mean 2.4).",
        "Fires on `self` or `self` (83% of the time, mean 2.4).",
        "Fires on `self` (183% of the time, mean 2.4).",
        "Fires on `\\q` (83% of the time, mean 2.4).",
        "Fires on `\\u{d800}` (83% of the time, mean 2.4).",
        "Fires on `\\u{ffffff}` (83% of the time, mean 2.4).",
        "Fires within 99 tokens after `self` (83% of the time, mean 2.4).",
        "Fires on a line that begins with`self` (83% of the time, mean 2.4).",
        "Fires at positions 4 to 2 of the row (83% of the time, mean 2.4).",
        "fires on `self` (83% of the time, mean 2.4).",
    ],
)
def test_other_text_is_no_rule(text: str) -> None:
    with pytest.raises(InputError):
        parse(text, NASTY)


@given(text=st.text(max_size=60))
def test_free_text_is_refused_and_nothing_else_happens(text: str) -> None:
    for tried in (text, "Fires " + text, "Fires on `" + text):
        with pytest.raises(InputError):
            parse(tried, NASTY)


def test_the_last_full_stop_may_be_missing_and_space_may_surround() -> None:
    rule = one(TokenAt(0, (1,)))
    assert parse("  " + render(rule, NASTY)[:-1] + "\n", NASTY) == rule


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenAt(9, (1,)),
        lambda: TokenAt(-1, (1,)),
        lambda: TokenAt(0, ()),
        lambda: TokenAt(0, tuple(range(13))),
        lambda: TokenAt(0, (1, 1)),
        lambda: TokenAt(0, (-1,)),
        lambda: TokenWithin(0, (1,)),
        lambda: TokenWithin(65, (1,)),
        lambda: TokenOf("nowhere", (1,)),
        lambda: ClassAt(0, "digit"),
        lambda: ClassAt(9, "digits"),
        lambda: StateIs("strings"),
        lambda: PositionIn(-1, 3),
        lambda: PositionIn(3, 3),
        lambda: PositionIn(0, None),
        lambda: Clause((), 0.5, 1.0),
        lambda: Clause((TokenAt(0, (1,)),) * 2, 0.5, 1.0),
        lambda: Clause(tuple(TokenAt(i, (1,)) for i in range(4)), 0.5, 1.0),
        lambda: Clause((TokenAt(0, (1,)),), 1.5, 1.0),
        lambda: Clause((TokenAt(0, (1,)),), 0.5, float("inf")),
        lambda: Rule(()),
        lambda: Rule((Clause((TokenAt(0, (1,)),), 0.5, 1.0),) * 4),
    ],
)
def test_what_the_language_cannot_say_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()


def test_the_limits_themselves_are_allowed() -> None:
    TokenAt(8, tuple(range(12)))
    TokenWithin(64, (0,))
    PositionIn(1, None)
    PositionIn(0, 1)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(NotFoundError, match="digits"):
        ClassAt(0, "digit")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"format": 2, "clauses": []},
        {"format": 1, "clauses": []},
        {"format": 1, "clauses": [{"conditions": [{"kind": "spell", "negated": False}], "precision": 1, "mean": 1}]},
        {"format": 1, "clauses": [{"conditions": [{"kind": "state"}], "precision": 1, "mean": 1}]},
        {"format": 1, "clauses": [{"conditions": [], "precision": "high", "mean": 1}]},
    ],
)
def test_data_that_is_no_rule_is_refused(data: object) -> None:
    with pytest.raises(InputError):
        Rule.from_json(data)


def test_numbers_keep_four_significant_digits() -> None:
    assert significant(0.000123456) == 0.0001235
    clause = Clause((TokenAt(0, (1,)),), 0.123456, 98765.4)
    assert (clause.precision, clause.mean) == (0.1235, 98770.0)
    assert Clause((TokenAt(0, (1,)),), 1e-5, 1e-7).precision == 1e-5


def test_a_rule_counts_its_tokens() -> None:
    rule = Rule((Clause((TokenAt(0, (1, 2)), TokenWithin(4, (3,)), StateIs("string")), 0.5, 1.0),) * 2)
    assert rule.n_tokens == 6
