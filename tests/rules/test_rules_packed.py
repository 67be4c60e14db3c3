"""Rules on rows that hold several documents: each document is read as if it stood in a row by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from exegete.errors import InputError
from exegete.rules import evaluate_many, search_rules
from exegete.rules.baselines import baseline_auprc
from exegete.rules.evaluate import context_of
from exegete.rules.execute import PLACE_ORDER, TokenContext, clause_positions, execute, holds, matches
from exegete.rules.language import CLASSES, STATES, Condition, PositionIn, Rule, StateIs, TokenAt, TokenOf, TokenWithin
from exegete.rules.universe import Shared, Universe, unpack
from exegete.tokens import TokenTable
from exegete.types import Array, Firings, LatentId, Rows, Split
from exegete.views import SplitData

ALPHABET = [b"", *(bytes([b]) for b in b"aB7 _\n()[]{}'\"#\\,:="), b"foo", b" bar", b"\n  ", b"({", b")]", b"\n\n"]
TABLE = TokenTable(ALPHABET, [0])
IDS = len(TABLE)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[Array, Array]:
    """Tokens and documents [n, length]; a document of −1 is one of another split, or padding."""
    length = draw(st.integers(1, 16))
    tokens, documents, number = [], [], 0
    for _ in range(draw(st.integers(1, 3))):
        tokens.append(draw(st.lists(st.integers(0, IDS - 1), min_size=length, max_size=length)))
        steps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=length, max_size=length))
        line: list[int] = []
        for step in steps:
            number += step > 0
            foreign = step == 2 or (step == 0 and line[-1:] == [-1])
            line.append(-1 if foreign else number)
        documents.append(line)
        number += 1
    return np.array(tokens, np.uint32), np.array(documents, np.int32)


def texts(documents: Array) -> list[tuple[int, int, int]]:
    """Return row, start and stop of every run of one document, told slowly."""
    found = []
    for row, line in enumerate(documents.tolist()):
        start = 0
        for stop in range(1, len(line) + 1):
            if stop == len(line) or line[stop] != line[start]:
                if line[start] >= 0:
                    found.append((row, start, stop))
                start = stop
    return found


def alone(condition: Condition, context: TokenContext, start: int) -> Array:
    """Whether a condition holds in one text, made a row of its own; ``start`` is where it stood in its row."""
    if isinstance(condition, PositionIn):  # the one condition about the row
        at = np.arange(start, start + context.size)
        inside: Array = (at >= condition.low) & (at < (np.inf if condition.high is None else condition.high))
        return inside ^ condition.negated
    return holds(condition, context)


@settings(max_examples=150)
@given(data=st.data(), case=packed_rows())
def test_every_condition_reads_each_document_by_itself(
    condition_strategy: Callable[[int], st.SearchStrategy[Condition]], data: st.DataObject, case: tuple[Array, Array]
) -> None:
    tokens, documents = case
    condition = data.draw(condition_strategy(IDS))
    context = TokenContext(tokens, TABLE, documents >= 0, documents)
    found = holds(condition, context).reshape(tokens.shape)
    expected = np.zeros(tokens.shape, bool)
    for row, start, stop in texts(documents):
        expected[row, start:stop] = alone(condition, TokenContext(tokens[row : row + 1, start:stop], TABLE), start)
        np.testing.assert_array_equal(found[row, start:stop], expected[row, start:stop])
    np.testing.assert_array_equal(clause_positions([condition], context), np.flatnonzero(expected))


@settings(max_examples=60)
@given(data=st.data(), case=packed_rows())
def test_a_rule_on_a_packed_row_is_the_rule_on_each_document(
    rule_strategy: Callable[[int], st.SearchStrategy[Rule]], data: st.DataObject, case: tuple[Array, Array]
) -> None:
    tokens, documents = case
    rule = data.draw(rule_strategy(IDS))
    mask = (documents >= 0) & (np.random.default_rng(0).random(tokens.shape) < 0.8)
    expected = np.zeros(tokens.shape, np.float32)
    for row, start, stop in texts(documents):
        text = TokenContext(tokens[row : row + 1, start:stop], TABLE)
        for clause in rule.clauses:
            every = np.all([alone(c, text, start) for c in clause.conditions], axis=0)
            worth = np.where(every, np.float32(clause.precision), np.float32(0))
            expected[row, start:stop] = np.maximum(expected[row, start:stop], worth)
    expected *= mask
    np.testing.assert_array_equal(execute([rule], tokens, TABLE, mask, documents=documents)[0], expected)
    positions, scores = matches(rule, TokenContext(tokens, TABLE, mask, documents))
    np.testing.assert_array_equal(scores, expected.reshape(-1)[positions])


@settings(max_examples=40)
@given(case=packed_rows(), seed=st.integers(0, 2**32))
def test_nothing_outside_a_document_changes_what_is_said_of_it(case: tuple[Array, Array], seed: int) -> None:
    tokens, documents = case
    rng = np.random.default_rng(seed)
    row, start, stop = (*texts(documents), (0, 0, 0))[0]
    changed = rng.integers(0, IDS, tokens.shape).astype(np.uint32)
    changed[row, start:stop] = tokens[row, start:stop]
    seen = []
    for given_tokens in (tokens, changed):
        context = TokenContext(given_tokens, TABLE, None, documents)
        parts = [context.place(place) for place in PLACE_ORDER]
        parts += [context.class_bits(offset) for offset in range(9)]
        parts += [context.state_bits(after) for after in (False, True)]
        seen.append(np.stack([part.reshape(tokens.shape)[row, start:stop] for part in parts]))
    np.testing.assert_array_equal(seen[0], seen[1])


def test_a_document_behind_another_begins_as_a_row_does() -> None:
    # Row: ( a | foo ' | ) a, three documents.
    tokens = np.array([[7, 1, 20, 13, 8, 1]], np.uint32)
    documents = np.array([[0, 0, 1, 1, 2, 2]], np.int32)
    assert [TABLE.texts[t] for t in tokens[0]] == ["(", "a", "foo", "'", ")", "a"]
    context = TokenContext(tokens, TABLE, None, documents)
    assert context.reach.tolist() == [0, 1, 0, 1, 0, 1]
    assert holds(StateIs("bracket"), context).tolist() == [False, True, False, False, False, False]
    assert holds(StateIs("unclosed"), context).tolist() == [False, True, False, False, False, False]
    assert holds(StateIs("string", after=True), context).tolist() == [False, False, False, True, False, False]
    assert holds(StateIs("line_start"), context).tolist() == [True, False] * 3
    assert holds(TokenAt(1, (1,)), context).tolist() == [False] * 6
    assert holds(TokenWithin(3, (7,)), context).tolist() == [False, True, False, False, False, False]
    assert holds(TokenOf("line", (7, 8)), context).tolist() == [True, True, False, False, True, True]
    assert holds(TokenOf("break", (0,)), context).tolist() == [False] * 6
    assert holds(PositionIn(4, None), context).tolist() == [False] * 4 + [True] * 2
    whole = TokenContext(tokens, TABLE)
    assert holds(StateIs("bracket"), whole).tolist() == [False, *[True] * 5]  # the last bracket is in the string


def test_the_bracket_opened_by_a_documents_first_token_was_called_by_nothing() -> None:
    tokens = np.array([[20, 7, 1]], np.uint32)  # foo | ( a
    documents = np.array([[0, 1, 1]], np.int32)
    packed, whole = TokenContext(tokens, TABLE, None, documents), TokenContext(tokens, TABLE)
    assert holds(TokenOf("called", (20,)), whole).tolist() == [False, False, True]
    assert holds(TokenOf("called", (20,)), packed).tolist() == [False] * 3
    assert holds(TokenOf("opener", (7,)), packed).tolist() == [False, False, True]


def test_rows_of_one_document_need_no_more_than_before() -> None:
    tokens = np.array([[1, 2, 3, 0], [3, 4, 0, 0]], np.uint32)
    documents = np.array([[5, 5, 5, -1], [6, 6, -1, -1]], np.int32)
    context = TokenContext(tokens, TABLE, documents >= 0, documents)
    assert context.reach is context.columns


def test_documents_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="mask and documents of that shape"):
        TokenContext(np.zeros((1, 2), np.uint32), TABLE, None, np.zeros((2, 1), np.int32))


def test_every_name_is_tried(condition_strategy: Callable[[int], st.SearchStrategy[Condition]]) -> None:
    """The strategies above reach every class, state and place only by chance; here each is met once."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, IDS, (20, 60)).astype(np.uint32)
    documents = np.cumsum(rng.random((20, 60)) < 0.1, axis=1).astype(np.int32)
    context = TokenContext(tokens, TABLE, None, documents)
    bits = {("class", 1): context.class_bits(1), ("state", 0): context.state_bits(False)}
    for (kind, which), found in bits.items():
        for row, start, stop in texts(documents):
            text = TokenContext(tokens[row, start:stop][None], TABLE)
            expected = text.class_bits(which) if kind == "class" else text.state_bits(bool(which))
            np.testing.assert_array_equal(found.reshape(20, 60)[row, start:stop], expected)
    assert int(bits["class", 1].max()).bit_length() == len(CLASSES)
    assert int(bits["state", 0].max()).bit_length() == len(STATES)


# -- search and figures -----------------------------------------------------------------------------------------------


class Planted(SplitData):
    """Rows and firings by split, given whole."""

    def __init__(self, table: TokenTable, rows: dict[Split, Rows], fired: list[dict[Split, Array]]) -> None:
        self._table, self._rows, self._fired = table, rows, fired

    @property
    def tokens(self) -> TokenTable:
        return self._table

    def rows(self, split: Split) -> Rows:
        return self._rows[split]

    def firings(self, indices: object, split: Split) -> list[Firings]:
        found = []
        for index in indices:  # type: ignore[attr-defined]
            rows, positions = np.nonzero(self._fired[index][split])
            values = self._fired[index][split][rows, positions].astype(np.float32)
            latent = LatentId(coder="planted", index=index)
            found.append(
                Firings(latent=latent, rows=rows, positions=positions.astype(np.int32), values=values),
            )
        return found


@pytest.fixture(scope="module")
def twice(planted: Callable[..., SplitData], ids_of: Callable[..., tuple[int, ...]]) -> tuple[Planted, Planted]:
    """The same documents and firings, packed and one document a row; a fifth of the packed ones are another split's."""
    rng = np.random.default_rng(5)
    source = planted([])
    opening, equals, comma = ids_of("("), ids_of(" ="), ids_of(",")
    rows: list[dict[Split, Rows]] = [{}, {}]
    fired: list[list[dict[Split, Array]]] = [[{}, {}, {}], [{}, {}, {}]]
    sides: tuple[Split, Split] = ("train", "test")
    for split in sides:
        tokens = source.rows(split).tokens[:120]
        documents = np.cumsum(rng.random(tokens.shape) < 0.04, axis=1).astype(np.int32)
        documents += np.arange(len(tokens), dtype=np.int32)[:, None] * 200
        foreign = np.isin(documents, rng.choice(np.unique(documents), len(np.unique(documents)) // 5))
        documents = np.where(foreign, -1, documents)
        mask = (documents >= 0) & (tokens != 0)
        state = TokenContext(tokens, source.tokens, mask, documents)
        strings = holds(StateIs("string"), state).reshape(tokens.shape)
        truths = [
            np.isin(tokens, comma) & ~strings,
            holds(TokenWithin(4, (*opening, *equals)), state).reshape(tokens.shape) & (rng.random(tokens.shape) < 0.9),
            holds(TokenOf("called", ids_of("alpha", "beta", "gamma")), state).reshape(tokens.shape),
        ]
        dense = [np.where(t & mask, 1.0 + rng.gamma(2.0, 1.0, t.shape), 0.0).astype(np.float32) for t in truths]
        pieces = texts(documents)
        apart = [np.zeros((len(pieces), tokens.shape[1]), a.dtype) for a in (tokens, documents, mask, *dense)]
        apart[1][:] = -1
        for place, (row, start, stop) in enumerate(pieces):
            for target, origin in zip(apart, (tokens, documents, mask, *dense), strict=True):
                target[place, : stop - start] = origin[row, start:stop]
        rows[0][split] = Rows(tokens=tokens, documents=documents, mask=mask)
        rows[1][split] = Rows(tokens=apart[0], documents=apart[1], mask=apart[2])
        for number in range(3):
            fired[0][number][split], fired[1][number][split] = dense[number], apart[3 + number]
    return Planted(source.tokens, rows[0], fired[0]), Planted(source.tokens, rows[1], fired[1])


def test_search_finds_the_same_rules_packed_or_not(twice: tuple[Planted, Planted]) -> None:
    packed, apart = twice
    rules = search_rules(packed, range(3))
    assert None not in rules
    assert rules == search_rules(apart, range(3))
    assert evaluate_many(rules, packed, range(3)) == evaluate_many(rules, apart, range(3))
    found = evaluate_many(rules, packed, range(3))
    assert all(m is not None and m.auprc > 0.8 for m in found)


def test_the_search_counts_as_rules_are_executed(twice: tuple[Planted, Planted]) -> None:
    context = context_of(twice[0], "train")
    fired = np.flatnonzero(twice[0]._fired[0]["train"])
    universe = Universe(Shared(context), fired, np.random.default_rng(0))
    tokens = tuple(np.argsort(-context.totals[0])[:3].tolist())
    for condition in (
        TokenWithin(9, tokens),
        TokenWithin(40, tokens, inclusive=True, negated=True),
        TokenAt(2, tokens),
        TokenOf("line", tokens),
        StateIs("bracket"),
        PositionIn(7, 30),
    ):
        bits = unpack(universe.bits(condition))[universe.valid]
        np.testing.assert_array_equal(bits, holds(condition, context, universe.flat[universe.valid]))


def test_baselines_do_not_look_into_the_document_before(twice: tuple[Planted, Planted]) -> None:
    packed, apart = twice
    found, expected = baseline_auprc(packed, [0, 1, 2]), baseline_auprc(apart, [0, 1, 2])
    assert found == expected
    # The best token by hand, over counted positions alone.
    train, test = packed.rows("train"), packed.rows("test")
    truth = packed._fired[0]["train"][train.mask] > 0
    tokens = train.tokens[train.mask]
    f1 = {t: (tokens[truth] == t).sum() / ((tokens == t).sum() + truth.sum()) for t in np.unique(tokens)}
    best = max(f1, key=lambda t: f1[t])
    metrics = found[0]
    assert metrics is not None
    held = packed._fired[0]["test"][test.mask] > 0
    assert metrics.token == pytest.approx(average_precision_score(held, test.tokens[test.mask] == best))
