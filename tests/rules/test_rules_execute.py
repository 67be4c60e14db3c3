from __future__ import annotations

import io
import itertools
import tokenize
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.rules.classes import CLASS_BITS, vocabulary
from exegete.rules.execute import TokenContext, clause_positions, execute, holds, matches
from exegete.rules.language import (
    CLASSES,
    STATES,
    ClassAt,
    Clause,
    Condition,
    PositionIn,
    Rule,
    StateIs,
    TokenAt,
    TokenOf,
    TokenWithin,
)
from exegete.tokens import TokenTable
from exegete.types import Array

PIECES = ["<s>", "foo", " bar", "ing", "(", ")", "()", "[", "]", ")]", "\n", "\n  ", ",", "7", "\n\n", " ", "({", "}"]
SMALL = TokenTable([b"", *(p.encode() for p in PIECES[1:])], [0])
BYTES = TokenTable([bytes([b]) for b in range(256)])
PAIRS = {")": "(", "]": "[", "}": "{"}


def slow_openers(row: list[int], t: int) -> list[int]:
    """Positions whose brackets are open before t, outermost first; there are no strings or comments in this text."""
    stack: list[tuple[str, int]] = []
    for i in range(t):
        if row[i] == 0:
            stack = []
        for c in "" if row[i] == 0 else PIECES[row[i]]:
            if c in "([{":
                stack.append((c, i))
            elif c in ")]}" and PAIRS[c] in [kind for kind, _ in stack]:
                while stack.pop()[0] != PAIRS[c]:
                    pass
    return [position for _, position in stack]


def slow_state(name: str, row: list[int], t: int) -> bool:
    """The state after reading row[:t]."""
    begun = max((i + 1 for i in range(t) if row[i] == 0), default=0)
    text = "".join(PIECES[token] for token in row[begun:t])
    line = text.rpartition("\n")[2]
    stack = slow_openers([*row[:t], 1], t)
    kinds = []
    for position in dict.fromkeys(stack):
        kinds += [c for c in PIECES[row[position]] if c in "([{"][: stack.count(position)]
    match name:
        case "string" | "long_string" | "comment":
            return False
        case "bracket":
            return bool(kinds)
        case "nested":
            return len(kinds) > 1
        case "round" | "square" | "curly":
            return kinds[-1:] == [{"round": "(", "square": "[", "curly": "{"}[name]]
        case "unclosed":
            depth = 0
            for token in row[:t]:
                for c in "" if token == 0 else PIECES[token]:
                    depth = max(0, depth + (c in "([{") - (c in ")]}"))
            return depth > 0
        case "line_start":
            return not line.strip()
        case _:
            return not line.startswith(" ")


def slow_holds(condition: Condition, row: list[int], t: int) -> bool:
    """One condition at one position, as its docstring says it."""

    def of(position: int) -> bool:
        return position >= 0 and row[position] in condition.tokens  # type: ignore[attr-defined]

    match condition:
        case TokenAt(offset=offset):
            found = of(t - offset)
        case TokenWithin(window=window, inclusive=inclusive):
            found = any(of(t - j) for j in range(0 if inclusive else 1, window + 1))
        case TokenOf(place="line" | "break" as place):
            last = max((i for i in range(t) if row[i] == 0 or "\n" in PIECES[row[i]]), default=-1)
            found = of(last + 1) if place == "line" else of(last)
        case TokenOf(place=place):
            stack = slow_openers(row, t)
            found = bool(stack) and of(stack[-1] if place == "opener" else stack[-1] - 1)
        case ClassAt(offset=offset, name=name):
            found = t >= offset and slow_class(name, row, t - offset)
        case StateIs(name=name, after=after):
            found = slow_state(name, row, t + after)
        case PositionIn(low=low, high=high):
            found = low <= t and (high is None or t < high)
        case _:
            raise AssertionError(condition)
    return found != condition.negated


def slow_class(name: str, row: list[int], t: int) -> bool:
    text, before = PIECES[row[t]] if row[t] else "", PIECES[row[t - 1]] if t and row[t - 1] else " "
    if name == "special":
        return row[t] == 0
    if name == "continuation":
        return text[:1].isalpha() and before[-1].isalpha()
    if name == "word_start":
        return text.strip(" ").isalpha() and not (text[0].isalpha() and before[-1].isalpha())
    return bool(vocabulary(SMALL).classes[row[t]] >> CLASS_BITS[name] & 1)  # the words themselves: below


def slow_score(rule: Rule, row: list[int], t: int) -> float:
    return max((c.precision for c in rule.clauses if all(slow_holds(k, row, t) for k in c.conditions)), default=0.0)


ROWS = st.integers(1, 3).flatmap(
    lambda n: st.integers(1, 14).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, len(PIECES) - 1), min_size=length, max_size=length), min_size=n, max_size=n
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=ROWS)
def test_execution_is_what_the_words_say(
    rule_strategy: Callable[[int], st.SearchStrategy[Rule]], data: st.DataObject, rows: list[list[int]]
) -> None:
    rule = data.draw(rule_strategy(len(PIECES)))
    tokens = np.array(rows, np.uint32)
    mask = np.random.default_rng(0).random(tokens.shape) < 0.8
    expected = [[slow_score(rule, row, t) for t in range(len(row))] for row in rows]
    np.testing.assert_array_equal(execute([rule], tokens, SMALL)[0], np.array(expected, np.float32))
    np.testing.assert_array_equal(execute([rule], tokens, SMALL, mask)[0], np.array(expected, np.float32) * mask)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), rows=ROWS)
def test_every_condition_is_what_its_words_say(
    condition_strategy: Callable[[int], st.SearchStrategy[Condition]], data: st.DataObject, rows: list[list[int]]
) -> None:
    condition = data.draw(condition_strategy(len(PIECES)))
    context = TokenContext(np.array(rows, np.uint32), SMALL)
    expected = np.array([slow_holds(condition, row, t) for row in rows for t in range(len(row))])
    np.testing.assert_array_equal(holds(condition, context), expected)
    some = np.flatnonzero(np.random.default_rng(1).random(context.size) < 0.5)
    np.testing.assert_array_equal(holds(condition, context, some), expected[some])
    np.testing.assert_array_equal(clause_positions([condition], context), np.flatnonzero(expected))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=ROWS)
def test_later_tokens_never_change_a_score(
    rule_strategy: Callable[[int], st.SearchStrategy[Rule]], data: st.DataObject, rows: list[list[int]]
) -> None:
    rules = [data.draw(rule_strategy(256)), data.draw(rule_strategy(256))]
    alphabet = np.frombuffer(b"a \n()[]{}'\"#\\,:0", np.uint8)
    tokens = alphabet[np.array(rows) % len(alphabet)].astype(np.uint32)
    t = data.draw(st.integers(0, tokens.shape[1] - 1))
    changed = tokens.copy()
    changed[:, t + 1 :] = alphabet[(np.array(rows)[:, t + 1 :] * 5 + 3) % len(alphabet)]
    before, after = execute(rules, tokens, BYTES), execute(rules, changed, BYTES)
    np.testing.assert_array_equal(before[:, :, : t + 1], after[:, :, : t + 1])
    cut = execute(rules, tokens[:, : t + 1], BYTES)
    np.testing.assert_array_equal(before[:, :, : t + 1], cut)


SOURCE = '''"""Module 'doc' with # no comment."""
import os  # a "comment" (with [brackets)

def f(a, b=[1, {2: "x)"}], *c):
    r\'\'\'Long ''quoted'' text
    over lines (\'\'\'
    if a == '' or b == "" and 'it\\'s' != "\\\\":
        return [g(x)[0] for x in (1, 2)]  # done
    s = "a" 'b' """c""" ''
    return """ends with a quote\\"""" + "#" + '(' + x[1]

class A:
    pass
'''


def test_nesting_state_agrees_with_pythons_own_tokenizer() -> None:
    starts = np.cumsum([0, *(len(line) for line in SOURCE.splitlines(keepends=True))])
    inside = {name: np.zeros(len(SOURCE) + 1, bool) for name in ("string", "long", "comment")}
    depth = np.zeros(len(SOURCE) + 1, int)
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        begin, end = (int(starts[p[0] - 1] + p[1]) for p in (token.start, token.end))
        if token.type == tokenize.STRING:
            prefix = len(token.string) - len(token.string.lstrip("rbfRBF"))
            long = token.string[prefix:].startswith(('"""', "'''"))
            inside["string"][begin + prefix + 1 : end] = True  # after its first quote, before its last
            inside["long"][begin + prefix + 3 : end] = long
        elif token.type == tokenize.COMMENT:
            inside["comment"][begin + 1 : end + 1] = True
        elif token.string in "([{" and token.type == tokenize.OP:
            depth[end:] += 1
        elif token.string in ")]}" and token.type == tokenize.OP:
            depth[end:] -= 1
    tokens = np.frombuffer(SOURCE.encode(), np.uint8)[None].astype(np.uint32)
    context = TokenContext(tokens, BYTES)

    def state(name: str) -> Array:
        return np.concatenate([[False], holds(StateIs(name, after=True), context)])

    np.testing.assert_array_equal(state("comment"), inside["comment"])
    np.testing.assert_array_equal(state("bracket"), depth > 0)
    np.testing.assert_array_equal(state("nested"), depth > 1)
    np.testing.assert_array_equal(state("long_string"), inside["long"])
    # two quotes in a row may begin a triple quote or be an empty string: only the next byte tells
    told = np.array([SOURCE[max(i - 2, 0) : i] not in ("''", '""') for i in range(len(SOURCE) + 1)])
    np.testing.assert_array_equal(state("string")[told], inside["string"][told])
    before = holds(StateIs("bracket"), context)
    np.testing.assert_array_equal(before, (depth > 0)[:-1])


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="a \n()[]'\"#\\", max_size=40), cuts=st.sets(st.integers(1, 39)))
def test_nesting_state_does_not_depend_on_how_text_is_cut_into_tokens(text: str, cuts: set[int]) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    if not parts:
        return
    whole = TokenContext(np.frombuffer(text.encode(), np.uint8)[None].astype(np.uint32), BYTES)
    table = TokenTable([p.encode() for p in parts])
    cut = TokenContext(np.arange(len(parts), dtype=np.uint32)[None], table)
    for name in STATES:
        condition = StateIs(name, after=True)
        np.testing.assert_array_equal(holds(condition, cut), holds(condition, whole)[np.array(edges[1:]) - 1], name)


@pytest.mark.parametrize(
    ("name", "members", "others"),
    [
        ("digits", ["7", " 42"], ["a7", "x", " "]),
        ("lower", [" foo", "b"], ["Foo", "fo_o", "1"]),
        ("upper", ["X", " MAX"], ["Max", "M_X"]),
        ("capitalised", ["Max", " Path"], ["M", "MAX", "maX"]),
        ("mixed_case", ["maX", "getItem", "FooBar"], ["Foo", "foo", "FOO", "X"]),
        ("word", [" foo", "é"], ["foo1", "_", ""]),
        ("keyword", ["def", " in", "match"], ["define", "IN"]),
        ("builtin", ["len", " print"], ["foo", "__name__"]),
        ("underscore", ["_", "a_b"], ["ab"]),
        ("dunder", ["__", "__init__"], ["_"]),
        ("has_digit", ["a1", "7"], ["a"]),
        ("leading_space", [" a", "  ("], ["a", " ", "\n  "]),
        ("blank", [" ", "\n  "], ["", " a"]),
        ("newline", ["\n", "a\n"], [" "]),
        ("blank_line", ["\n\n", "\n\n  "], ["\n", "\n  "]),
        ("indented", ["\n  ", "\n\t"], ["\n", "  "]),
        ("punctuation", ["(", " ==", "'.'"], ["_", "a.", " ", ""]),
        ("operator", [" ==", "+", "->"], ["(", "a+"]),
        ("opens", ["(", "foo(", " [{"], [")", "()"]),
        ("closes", [")", "):"], ["()", "("]),
        ("quote", ["'", '""', "f'"], ["`"]),
        ("hash", ["#", " ##"], ["'"]),
        ("ends_dot", [".", "a."], [".a"]),
        ("ends_comma", [",", "),"], [", "]),
        ("ends_colon", [":", "):"], ["::a"]),
        ("equals", ["=", " =="], ["-"]),
        ("single", ["a", " ("], ["ab", "", " "]),
        ("non_ascii", ["é", "🙂"], ["e"]),
    ],
)
def test_classes_are_what_they_are_called(name: str, members: list[str], others: list[str]) -> None:
    table = TokenTable([p.encode() for p in members + others])
    context = TokenContext(np.arange(len(table), dtype=np.uint32)[:, None], table)
    np.testing.assert_array_equal(holds(ClassAt(0, name), context), [True] * len(members) + [False] * len(others))


def test_special_tokens_are_in_no_class_but_their_own() -> None:
    table = TokenTable([b"def"], [0])
    context = TokenContext(np.zeros((1, 1), np.uint32), table)
    assert [name for name in CLASSES if holds(ClassAt(0, name), context)[0]] == ["special"]


def test_a_special_token_begins_the_text_anew() -> None:
    table = TokenTable([b"(", b"'", b"a", b""], [3])
    context = TokenContext(np.array([[0, 1, 3, 2]], np.uint32), table)
    assert holds(StateIs("string"), context).tolist() == [False, False, True, False]
    assert holds(StateIs("bracket"), context).tolist() == [False, True, True, False]
    assert holds(TokenOf("opener", (0,)), context).tolist() == [False, True, True, False]


def test_the_most_precise_matching_clause_gives_the_score() -> None:
    rule = Rule((Clause((TokenAt(0, (1, 2)),), 0.25, 8.0), Clause((TokenAt(0, (2, 3)),), 0.5, 2.0)))
    tokens = np.array([[1, 2, 3, 4]], np.uint32)
    assert execute([rule], tokens, SMALL)[0].tolist() == [[0.25, 0.5, 0.5, 0.0]]
    assert execute([rule], tokens, SMALL, value="activation")[0].tolist() == [[8.0, 2.0, 2.0, 0.0]]
    positions, scores = matches(rule, TokenContext(tokens, SMALL))
    assert (positions.tolist(), scores.tolist()) == ([0, 1, 2], [0.25, 0.5, 0.5])


def test_a_rule_that_names_ids_outside_the_table_never_matches_there() -> None:
    rule = Rule((Clause((TokenAt(0, (1, 999)), TokenWithin(3, (999,), negated=True)), 0.5, 1.0),))
    assert execute([rule], np.array([[1, 2]], np.uint32), SMALL)[0].tolist() == [[0.5, 0.0]]


def test_tokens_that_fit_no_table_are_refused() -> None:
    with pytest.raises(InputError, match="outside the token table"):
        TokenContext(np.array([[99]], np.uint32), SMALL)
    with pytest.raises(InputError, match="rows"):
        TokenContext(np.array([1], np.uint32), SMALL)
    with pytest.raises(InputError, match="rows"):
        TokenContext(np.zeros((1, 2), np.uint32), SMALL, np.ones((2, 1), bool))


def test_no_rows_give_no_scores() -> None:
    rule = Rule((Clause((StateIs("string"),), 0.5, 1.0), Clause((TokenOf("line", (1,)),), 0.25, 1.0)))
    assert execute([rule], np.zeros((0, 5), np.uint32), SMALL).shape == (1, 0, 5)
