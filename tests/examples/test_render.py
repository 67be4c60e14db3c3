from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.examples.render import (
    marks,
    parse_marked,
    render_for_explainer,
    render_marked,
    render_plain,
    transplant_marks,
)
from exegete.metrics import auroc
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


# -- fuzzing's false marks --------------------------------------------------------------------------------------------


def windows(n: int, rng: np.random.Generator) -> list[Example]:
    """Firing windows with a strong habit: they fire late, in runs."""
    made = []
    for _ in range(n):
        values = np.zeros(16)
        start = int(rng.integers(8, 14))
        values[start : start + int(rng.integers(1, 3))] = rng.uniform(1, 2)
        made.append(example(values.tolist()))
    return made


def test_marks_say_nothing_about_the_truth() -> None:
    """Peer's defect: negatives always have the token at 3/4 of the window marked, positives do not."""
    rng = np.random.default_rng(0)
    firing, silent = windows(100, rng), [example([0.0] * 16)] * 100
    false = transplant_marks(silent, firing, rng)
    true = np.stack([marks(e) for e in firing])
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
    firing = windows(n_firing, rng)
    false = transplant_marks([example([0.0] * 16)] * n_silent, firing, rng)
    both = np.concatenate([np.stack([marks(e) for e in firing]), false])
    truth = np.repeat([True, False], [n_firing, n_silent])
    for tell in (both.sum(axis=1), both.argmax(axis=1), both @ np.arange(16)):
        interval = auroc(truth, tell.astype(float))
        assert interval.low <= 0.5 <= interval.high


def test_every_pattern_is_dealt_before_one_comes_again() -> None:
    firing = [example([float(i == j) for j in range(5)]) for i in range(5)]
    silent = [example([0.0] * 5)] * 12
    dealt = transplant_marks(silent, firing, np.random.default_rng(2)).argmax(axis=1).tolist()
    assert sorted(dealt[:5]) == sorted(dealt[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(dealt[10:])) == 2


def test_negatives_of_a_latent_do_not_share_their_marks() -> None:
    """Peer's defect: the seed is set anew in every call, so all negatives are marked at the same places."""
    rng = np.random.default_rng(3)
    firing, silent = windows(50, rng), [example([0.0] * 16)] * 50
    first, second = (transplant_marks(silent, firing, rng) for _ in range(2))
    assert len({row.tobytes() for row in first}) > 8
    assert (first != second).any()
    again: Any = [transplant_marks(silent, firing, np.random.default_rng(9)) for _ in range(2)]
    assert (again[0] == again[1]).all()


def test_the_threshold_reaches_the_patterns() -> None:
    firing, silent = [example([1.0, 0.5, 0.0])], [example([0.0] * 3)]
    rng = np.random.default_rng(0)
    assert transplant_marks(silent, firing, rng, 0.6).tolist() == [[True, False, False]]
    assert transplant_marks(silent, firing, rng).tolist() == [[True, True, False]]


def test_marks_that_cannot_be_moved() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="there is none"):
        transplant_marks([example([0.0])], [], rng)
    with pytest.raises(InputError, match=r"one length, got \[1, 2\]"):
        transplant_marks([example([0.0])], [example([1.0, 0.0])], rng)
    assert transplant_marks([], [example([1.0, 0.0])], rng).shape == (0, 2)


def test_an_example_is_not_changed_by_showing_it() -> None:
    shown = example([0.0, 4.0], [1, 2])
    before = dataclasses.replace(shown, activations=shown.activations.copy())
    render_for_explainer(shown, 4.0, WORDS)
    assert (shown.activations == before.activations).all()
