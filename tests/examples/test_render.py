from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.examples.render import (
    active_tokens,
    explained_texts,
    marked_texts,
    marks,
    parse_marked,
    plain_texts,
    render_for_explainer,
    render_marked,
    render_plain,
    transplant_marks,
)
from exegete.metrics import Interval, auroc
from exegete.tokens import TokenTable
from exegete.types import Array, Example

WORDS = TokenTable([b"<s>", b"The", b" cat", b" sat", b" on", b" a << b", b">", b"<", b"\\"], special=[0])
EURO = "€".encode()  # three bytes


def example(activations: list[float], tokens: list[int] | None = None, start: int = 0) -> Example:
    values = np.array(activations, np.float32)
    fires = bool((values > 0).any())
    return Example(
        split="test",
        fires=fires,
        stratum="decile_0" if fires else "silent",
        row=0,
        start=start,
        tokens=np.array(tokens if tokens is not None else [1] * len(values), np.uint32),
        activations=values,
        document=0,
        inclusion_probability=1.0,
    )


def rendered(tokens: Sequence[int] | Array, shown: Sequence[int] | Array, table: TokenTable) -> str:
    return render_marked(tokens, np.asarray(shown, dtype=bool), table)


def test_adjacent_marks_share_one_pair() -> None:
    assert rendered([1, 2, 3, 4], [1, 0, 1, 1], WORDS) == "<<The>> cat<< sat on>>"
    assert rendered(np.array([1, 2], np.uint32), np.array([False, True]), WORDS) == "The<< cat>>"
    assert rendered([1, 2], [0, 0], WORDS) == "The cat"
    assert rendered([1, 2], [1, 1], WORDS) == "<<The cat>>"
    assert rendered([], [], WORDS) == ""
    assert render_plain([0, 1, 2], WORDS) == "The cat"
    assert render_plain([], WORDS) == ""
    with pytest.raises(InputError, match="2 tokens and 1 marks"):
        rendered([1, 2], [1], WORDS)


def test_special_tokens_show_no_mark_and_separate_nothing() -> None:
    assert rendered([0, 1], [1, 0], WORDS) == "The"
    assert rendered([1, 0, 2], [1, 0, 1], WORDS) == "<<The cat>>"
    assert rendered([0], [1], WORDS) == ""


def test_a_character_that_spans_tokens_stays_whole() -> None:
    table = TokenTable([b"a", EURO[:1], EURO[1:2], EURO[2:], b"z", b"<pad>", b"x" + EURO[:1]], special=[5])
    whole = [0, 1, 2, 3, 4]
    for only in (1, 2, 3):
        shown = [i == only for i in range(5)]
        assert rendered(whole, shown, table) == "a<<€>>z"
    assert rendered(whole, [1, 0, 0, 0, 0], table) == "<<a>>€z"
    assert rendered(whole, [0, 0, 0, 0, 1], table) == "a€<<z>>"
    assert rendered([1, 5, 2, 3, 4], [1, 0, 0, 0, 0], table) == "<<€>>z"
    assert rendered([6, 2, 3], [1, 0, 0], table) == "<<x>>€"
    assert rendered([0, 1], [0, 1], table) == "a<<\ufffd>>"
    told = render_for_explainer(example([0, 4, 2, 0, 1], whole), 4.0, table)
    assert told == ("a<<€>>z", [("€", 10)])


def test_what_the_text_itself_says_is_no_mark() -> None:
    assert rendered([1, 5], [0, 0], WORDS) == r"The a \<\< b"
    assert rendered([5, 2], [0, 1], WORDS) == r" a \<\< b<< cat>>"
    assert rendered([7, 1, 6], [0, 1, 0], WORDS) == r"\<<<The>>\>"
    assert rendered([8, 1], [0, 1], WORDS) == r"\\<<The>>"
    assert rendered([8, 1], [1, 0], WORDS) == r"<<\\>>The"
    assert rendered([1, 8], [1, 0], WORDS) == "<<The>>\\"
    free = TokenTable([b"if a < b and c->d: print('\\n')"])
    assert rendered([0], [0], free) == "if a < b and c->d: print('\\n')"


PIECES = st.lists(st.tuples(st.text(alphabet="<>\\ab ", min_size=1, max_size=5), st.booleans()), max_size=8)


@given(PIECES)
def test_marked_text_can_be_read_back(pieces: list[tuple[str, bool]]) -> None:
    table = TokenTable([text.encode() for text, _ in pieces])
    text = rendered(range(len(pieces)), [m for _, m in pieces], table)
    merged: list[tuple[str, bool]] = []
    for part, marked in pieces:
        if merged and merged[-1][1] == marked:
            merged[-1] = (merged[-1][0] + part, marked)
        else:
            merged.append((part, marked))
    assert parse_marked(text) == merged


@pytest.mark.parametrize("text", ["<<a", "a>>", "<<a<<b>>", "<<a>>>>", "<<a>>b>>"])
def test_marks_that_do_not_pair_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="mark"):
        parse_marked(text)


def test_parts_without_text_are_not_returned() -> None:
    assert parse_marked("<<a>>") == [("a", True)]
    assert parse_marked("") == []


def test_active_tokens_are_above_a_share_of_the_examples_own_maximum() -> None:
    shown = example([0.0, 3.0, 3.0001, 10.0, -5.0, 1.0])
    assert marks(shown).tolist() == [False, False, True, True, False, False]
    assert marks(shown, 0.05).tolist() == [False, True, True, True, False, True]
    assert marks(shown, 0.0).tolist() == [False, True, True, True, False, True]
    assert marks(example([0.0, -1.0])).tolist() == [False, False]


def test_strengths_are_relative_to_the_latents_maximum() -> None:
    shown = example([0.0, 4.0, 1.0, 3.0], [1, 2, 3, 4])
    # 4 and 3 exceed .3 × 4; of a latent's maximum of 8 they are 5.0 and 3.75, rounded up.
    assert render_for_explainer(shown, 8.0, WORDS) == ("The<< cat>> sat<< on>>", [(" cat", 5), (" on", 4)])
    assert render_for_explainer(shown, 8.0, WORDS, 0.2)[1] == [(" cat", 5), (" sat", 2), (" on", 4)]
    assert render_for_explainer(shown, 1000.0, WORDS)[1] == [(" cat", 1), (" on", 1)]  # never 0 for an active token
    assert render_for_explainer(shown, 2.0, WORDS)[1] == [(" cat", 10), (" on", 10)]  # never above 10
    assert render_for_explainer(example([0.0, 0.0]), 2.0, WORDS) == ("TheThe", [])
    tenth = example([0.3, 0.1, 0.7], [2, 3, 4])
    assert render_for_explainer(tenth, 1.0, WORDS, 0.0)[1] == [
        (" cat", 3),
        (" sat", 1),
        (" on", 7),
    ]  # no 4 for .3 in float32
    angle = example([1.0], [5])
    assert render_for_explainer(angle, 1.0, WORDS) == (r"<< a \<\< b>>", [(" a << b", 10)])
    for maximum in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="positive maximum"):
            render_for_explainer(shown, maximum, WORDS)


# -- many windows at once ---------------------------------------------------------------------------------------------

EDGES = b"<>\\ab \xe2\x82\xac\xff\xf0\x9f"  # marks, escapes, parts of characters and what is no part of any
PIECE = st.one_of(
    st.binary(max_size=4), st.text(max_size=3).map(str.encode), st.lists(st.sampled_from(EDGES)).map(bytes)
)


@st.composite
def shown_windows(draw: st.DrawFn) -> tuple[TokenTable, Array, Array]:
    """Windows over an arbitrary table of bytes, with activations."""
    pieces = draw(st.lists(PIECE, min_size=1, max_size=8))
    table = TokenTable(pieces, draw(st.sets(st.integers(0, len(pieces) - 1), max_size=2)))
    shape = (draw(st.integers(0, 5)), draw(st.integers(1, 7)))
    ids = st.lists(st.integers(0, len(pieces) - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    tokens = np.array(draw(ids), np.uint32).reshape(shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    activations = (rng.gamma(1.0, size=shape) * (rng.random(shape) < 0.4)).astype(np.float32)
    return table, tokens, activations


@given(shown_windows(), st.sampled_from([0.0, 0.3, 0.9]))
def test_many_windows_at_once_are_shown_as_one_by_one(given_windows: Any, threshold: float) -> None:
    table, tokens, activations = given_windows
    marked = activations > 0
    assert plain_texts(tokens, table) == [render_plain(row, table) for row in tokens]
    assert marked_texts(tokens, marked, table) == [
        render_marked(row, on, table) for row, on in zip(tokens, marked, strict=True)
    ]
    one_by_one = [example(a.tolist(), t.tolist()) for t, a in zip(tokens, activations, strict=True)]
    assert explained_texts(tokens, activations, 2.5, table, threshold) == [
        render_for_explainer(e, 2.5, table, threshold) for e in one_by_one
    ]
    assert active_tokens(activations, threshold).tolist() == [marks(e, threshold).tolist() for e in one_by_one]


@given(shown_windows())
def test_many_marked_windows_can_be_read_back(given_windows: Any) -> None:
    table, tokens, activations = given_windows
    for row, text in zip(tokens, marked_texts(tokens, activations > 0, table), strict=True):
        assert "".join(part for part, _ in parse_marked(text)) == render_plain(row, table)


def test_many_windows_with_everything_that_needs_care() -> None:
    table = TokenTable([b"<s>", b"a", EURO[:1], EURO[1:2], EURO[2:], b" << ", b"\\", b"", b">"], special=[0])
    tokens = np.array([[0, 1, 1, 1], [2, 3, 4, 1], [1, 5, 6, 1], [0, 0, 0, 0], [1, 7, 1, 1], [1, 8, 8, 1]], np.uint32)
    marked = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]], bool)
    assert plain_texts(tokens, table) == ["aaa", "€a", "a << \\a", "", "aaa", "a>>a"]
    assert marked_texts(tokens, marked, table) == [
        "<<a>>aa", "<<€>>a", "a \\<\\< \\\\<<a>>", "", "a<<a>>a", "<<a>>\\>\\><<a>>"
    ]  # fmt: skip
    with pytest.raises(InputError, match="every token has one mark"):
        marked_texts(tokens, marked[:2], table)
    with pytest.raises(InputError, match="positive maximum"):
        explained_texts(tokens, marked.astype(np.float32), 0.0, table)


# -- fuzzing's false marks --------------------------------------------------------------------------------------------

WINDOW, ROW = 16, 128


def windows(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Mark patterns of firing windows with a strong habit, and where they begin: they fire late, in runs."""
    patterns = np.zeros((n, WINDOW), bool)
    for pattern in patterns:
        start = int(rng.integers(8, 14))
        pattern[start : start + int(rng.integers(1, 3))] = True
    return patterns, starts_of(n, rng)


def starts_of(n: int, rng: np.random.Generator) -> Array:
    """Where windows of a frame begin in their rows: a random offset in each row, then one after another."""
    starts: Array = rng.integers(0, WINDOW, n) + WINDOW * rng.integers(0, ROW // WINDOW, n)
    return starts


def test_marks_say_nothing_about_the_truth() -> None:
    """Peer's defect: negatives always have the token at 3/4 of the window marked, positives do not."""
    rng = np.random.default_rng(0)
    true, starts = windows(100, rng)
    false = transplant_marks(true, starts, starts_of(100, rng), rng)
    assert false.shape == (100, 16)
    assert false.dtype == np.bool_
    assert sorted(map(tuple, false.tolist())) == sorted(map(tuple, true.tolist()))  # the very same patterns
    truth = np.repeat([True, False], 100)
    both = np.concatenate([true, false])
    for tell in (both.sum(axis=1), both.argmax(axis=1), both[:, 12], both @ np.arange(16)):
        assert auroc(truth, tell.astype(float)).value == 0.5


@pytest.mark.parametrize(("n_silent", "n_firing"), [(70, 100), (230, 100)])
def test_marks_say_nothing_when_the_numbers_differ(n_silent: int, n_firing: int) -> None:
    rng = np.random.default_rng(1)
    true, starts = windows(n_firing, rng)
    both = np.concatenate([true, transplant_marks(true, starts, starts_of(n_silent, rng), rng)])
    truth = np.repeat([True, False], [n_firing, n_silent])
    for tell in (both.sum(axis=1), both.argmax(axis=1), both @ np.arange(16)):
        interval = auroc(truth, tell.astype(float))
        assert interval.low <= 0.5 <= interval.high


@given(st.integers(1, 30), st.integers(0, 90), st.integers(0, 2**32))
def test_every_pattern_is_dealt_equally_often(n_firing: int, n_silent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dealt = transplant_marks(
        np.eye(n_firing, dtype=bool), rng.integers(0, 4, n_firing), rng.integers(0, 4, n_silent), rng
    )
    times = dealt.sum(axis=0)
    assert dealt.shape == (n_silent, n_firing)
    assert times.min() >= n_silent // n_firing
    assert times.max() <= -(-n_silent // n_firing)


def test_fewer_silent_windows_take_any_pattern_alike() -> None:
    starts = np.arange(5)
    times = np.zeros(5)
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        times += transplant_marks(np.eye(5, dtype=bool), starts, np.arange(3), rng).sum(axis=0)
    assert np.abs(times - 1200).max() < 5 * np.sqrt(2000 * 0.6 * 0.4)


def test_marks_are_taken_from_windows_that_begin_at_much_the_same_place() -> None:
    rng = np.random.default_rng(0)
    patterns = np.eye(6, dtype=bool)
    starts, silent = np.array([90, 0, 50, 3, 70, 20]), np.array([80, 1, 60, 2, 71, 40])
    dealt = transplant_marks(patterns, starts, silent, rng).argmax(axis=1)
    assert starts[dealt].tolist() == [90, 0, 50, 3, 70, 20]  # rank for rank
    at_the_start = [
        tuple(transplant_marks(patterns[:2], np.zeros(2), np.zeros(2), rng).argmax(axis=1)) for _ in "x" * 40
    ]
    assert set(at_the_start) == {(0, 1), (1, 0)}  # ties at random


def test_a_pattern_is_not_put_where_no_mark_shows() -> None:
    """A mark on a special token is not shown: a silent window without any mark would give itself away."""
    rng = np.random.default_rng(0)
    patterns = np.eye(4, dtype=bool)
    for _ in range(20):
        hidden = np.zeros((4, 4), bool)
        hidden[2, :3] = True  # only the last pattern shows in this window
        hidden[0, 3] = True
        dealt = transplant_marks(patterns, np.arange(4), np.arange(4), rng, hidden)
        assert not (dealt & hidden).any()
        assert dealt.sum(axis=0).tolist() == [1, 1, 1, 1]
    nowhere = transplant_marks(patterns, np.arange(4), np.arange(4), rng, np.ones((4, 4), bool))
    assert nowhere.sum() == 4  # what fits nowhere stays


def marked_latent(rng: np.random.Generator, n_firing: int, n_silent: int) -> tuple[Array, Array, Array]:
    """Patterns and starts of firing windows, starts of silent ones; windows at row starts are marked in another way."""
    habit, starts = int(rng.integers(4, 13)), starts_of(n_firing, rng)
    patterns = np.zeros((n_firing, WINDOW), bool)
    for pattern, start in zip(patterns, starts, strict=True):
        first = 0 if start < WINDOW else min(habit + int(rng.integers(0, 3)), WINDOW - 1)
        pattern[first : first + int(rng.integers(1, 4))] = True
    return patterns, starts, starts_of(n_silent, rng)


def tells(deal: Callable[..., Array], columns: Callable[..., list[Array]], n_firing: int = 100) -> Interval:
    """The AUROC, on latents it has not seen, of a logistic regression on marks and offsets."""
    rng, x, truth = np.random.default_rng(5), [], []
    for _ in range(60):
        patterns, starts, silent = marked_latent(rng, n_firing, 100)
        shown = np.concatenate([patterns, deal(patterns, starts, silent, rng)])
        x.append(np.column_stack([np.ones(len(shown)), *columns(shown, np.concatenate([starts, silent]))]))
        truth.append(np.repeat([1.0, 0.0], [n_firing, 100]))
    seen, labels = np.concatenate(x[:30]), np.concatenate(truth[:30])
    weights = np.zeros(seen.shape[1])
    for _ in range(12):  # Newton's steps, with a little ridge
        p = 1 / (1 + np.exp(-seen @ weights))
        curvature = seen.T @ (seen * (p * (1 - p))[:, None]) + 0.1 * np.eye(len(weights))
        weights += np.linalg.solve(curvature, seen.T @ (labels - p) - 0.1 * weights)
    return auroc(np.concatenate(truth[30:]) > 0, np.concatenate(x[30:]) @ weights)


def positions(marked: Array, starts: Array) -> list[Array]:
    return [marked, marked.sum(axis=1), marked[:, 1:] & marked[:, :-1]]


def and_offsets(marked: Array, starts: Array) -> list[Array]:
    return [marked, marked.sum(axis=1), starts / ROW, starts < WINDOW]


def and_both_together(marked: Array, starts: Array) -> list[Array]:
    return [*and_offsets(marked, starts), marked & (starts < WINDOW)[:, None]]


def fixed_marks(patterns: Array, starts: Array, silent: Array, rng: np.random.Generator) -> Array:
    """The released code's: always the token at three quarters of the window."""
    return np.tile(np.arange(WINDOW) == 12, (len(silent), 1))


def any_marks(patterns: Array, starts: Array, silent: Array, rng: np.random.Generator) -> Array:
    """Dealt without a look at offsets."""
    chosen: Array = patterns[rng.permutation(len(patterns))]
    return chosen


def test_a_classifier_on_the_places_of_marks_alone_is_at_chance() -> None:
    assert tells(fixed_marks, positions).low > 0.9  # it does see a tell
    for n_firing in (100, 60):
        for columns in (positions, and_offsets):
            found = tells(transplant_marks, columns, n_firing)
            assert found.low <= 0.5 <= found.high
    for at in range(WINDOW):
        assert tells(transplant_marks, lambda marked, _, at=at: [marked[:, at]]).value == 0.5


def test_marks_follow_the_offset_where_row_starts_are_marked_in_another_way() -> None:
    assert tells(any_marks, and_both_together).low > 0.6
    # What is left: the two samples do not have quite as many windows at row starts as one another.
    assert tells(transplant_marks, and_both_together).value < 0.54


def test_negatives_of_a_latent_do_not_share_their_marks() -> None:
    """Peer's defect: the seed is set anew in every call, so all negatives are marked at the same places."""
    rng = np.random.default_rng(3)
    (patterns, starts), silent = windows(50, rng), starts_of(50, rng)
    first, second = (transplant_marks(patterns, np.zeros(50), np.zeros(50), rng) for _ in range(2))
    assert len({row.tobytes() for row in first}) > 8
    assert (first != second).any()
    again: Any = [transplant_marks(patterns, starts, silent, np.random.default_rng(9)) for _ in range(2)]
    assert (again[0] == again[1]).all()


def test_marks_that_cannot_be_moved() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="there is none"):
        transplant_marks(np.zeros((0, 4), bool), np.zeros(0), np.zeros(2), rng)
    assert transplant_marks(np.ones((1, 2), bool), np.zeros(1), np.zeros(0), rng).shape == (0, 2)


def test_an_example_is_not_changed_by_showing_it() -> None:
    shown = example([0.0, 4.0], [1, 2])
    before = dataclasses.replace(shown, activations=shown.activations.copy())
    render_for_explainer(shown, 4.0, WORDS)
    assert (shown.activations == before.activations).all()
