from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.examples.split import split_documents, split_segments
from exegete.types import Array, Rows, Split


@dataclass(frozen=True)
class Document:
    key: str
    split: Split | None = None


@dataclass(frozen=True)
class Corpus:
    documents: tuple[Document, ...]
    segments: Array
    tokens: Array

    @property
    def owners(self) -> Array:
        return self.segments[:, 3]

    def rows(self, index: slice, /) -> Rows:
        tokens = self.tokens[index]
        documents = np.broadcast_to(self.owners[index, None], tokens.shape).astype(np.int32)
        return Rows(tokens=tokens, documents=documents, mask=np.ones(tokens.shape, dtype=bool))


def corpus(rows_of: list[int], fixed: dict[int, Split] | None = None, like: dict[int, int] | None = None) -> Corpus:
    """Documents of so many rows each, one document a row; all of its own text, or of the text of another (``like``)."""
    documents = tuple(Document(f"d{i}", (fixed or {}).get(i)) for i in range(len(rows_of)))
    owners = np.repeat(np.arange(len(rows_of)), rows_of)
    n = len(owners)
    segments = np.stack([np.arange(n), np.zeros(n, np.int64), np.full(n, 8), owners], axis=1)
    text = np.array([(like or {}).get(i, i) for i in range(len(rows_of))], np.int64)
    begins = np.cumsum(rows_of) - rows_of if rows_of else np.zeros(0, np.int64)
    tokens = text[owners, None] * 1000 + (np.arange(n) - begins[owners])[:, None] * 8 + np.arange(8)
    return Corpus(documents, segments, tokens.astype(np.uint32))


def sides(made: Corpus, seed: int = 0, **options: Any) -> list[list[int]]:
    """Return the codes of every document's segments."""
    codes = split_segments(made, seed=seed, test_share=0.4, **options)
    return [sorted(set(codes[made.owners == number].tolist())) for number in range(len(made.documents))]


def keys(n: int) -> list[str]:
    return [f"https://example.org/{i}" for i in range(n)]


def test_the_share_of_test_documents_is_as_asked() -> None:
    for share in (0.1, 0.4, 0.75):
        split = split_documents(keys(4000), [None] * 4000, seed=1, test_share=share)
        assert set(split) == {"train", "test"}
        assert abs(split.count("test") / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@given(st.integers(0, 2**40), st.permutations(range(30)))
def test_a_documents_split_depends_on_seed_and_key_alone(seed: int, order: list[int]) -> None:
    names = keys(30)
    known = dict(zip(names, split_documents(names, [None] * 30, seed=seed, test_share=0.4), strict=True))
    shuffled = [names[i] for i in order][:25]
    again = split_documents(shuffled, [None] * 25, seed=seed, test_share=0.4)
    assert again == [known[name] for name in shuffled]


def test_another_seed_is_another_split_and_the_value_is_pinned() -> None:
    a, b = (split_documents(keys(500), [None] * 500, seed=s, test_share=0.5) for s in (0, 1))
    same = sum(x == y for x, y in zip(a, b, strict=True))
    assert 190 < same < 310  # independent coins agree half the time
    # Pinned: a stored split must not change with a version.
    assert "".join(str(s)[1] for s in a[:20]) == "rrerrrererrerreeerre"


def test_what_the_source_fixed_stays() -> None:
    fixed: list[Split | None] = ["validation", "train", "test", *[None] * 30]
    for seed in range(5):
        assert split_documents(keys(33), fixed, seed=seed, test_share=0.5)[:3] == fixed[:3]


def test_twenty_documents_are_hashed_and_nineteen_are_left_to_blocks() -> None:
    assert split_documents(keys(19), [None] * 18 + ["test"], seed=0, test_share=0.4) == [None] * 18 + ["test"]
    assert None not in split_documents(keys(20), [None] * 20, seed=0, test_share=0.4)


def test_wrong_shares_and_lengths_are_refused() -> None:
    for share in (0.0, 1.0, -0.1, 40.0):
        with pytest.raises(InputError, match="test_share"):
            split_documents(keys(3), [None] * 3, seed=0, test_share=share)
    with pytest.raises(InputError, match="got 3 and 2"):
        split_documents(keys(3), [None] * 2, seed=0, test_share=0.5)


@given(st.lists(st.integers(1, 6), min_size=20, max_size=60), st.integers(0, 1000))
def test_all_rows_of_a_document_share_its_split(rows_of: list[int], seed: int) -> None:
    made = corpus(rows_of, {0: "train", 1: "test", 2: "validation"})
    rows = split_segments(made, seed=seed, test_share=0.4)
    assert rows.dtype == np.int8
    assert len(rows) == sum(rows_of)
    for number in range(len(rows_of)):
        assert len(set(rows[made.owners == number].tolist())) == 1
    assert set(rows.tolist()) <= {0, 1, 2}
    assert (rows[made.owners == 0] == 0).all()
    assert (rows[made.owners == 1] == 2).all()
    assert (rows[made.owners == 2] == 1).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=19), st.integers(0, 1000), st.floats(0.05, 0.95))
def test_few_documents_are_cut_into_two_blocks_with_a_gap(rows_of: list[int], seed: int, share: float) -> None:
    n = sum(rows_of)
    if n < 3:
        with pytest.raises(InputError, match="no row is left for the test split of"):
            split_segments(corpus(rows_of), seed=seed, test_share=share)
        return
    rows = split_segments(corpus(rows_of), seed=seed, test_share=share).tolist()
    gap = rows.index(-1)
    left, right = set(rows[:gap]), set(rows[gap + 1 :])
    assert {frozenset(left), frozenset(right)} == {frozenset({0}), frozenset({2})}
    assert rows.count(2) == min(max(round((n - 1) * share), 1), n - 2)


def test_the_seed_draws_which_end_is_judged() -> None:
    firsts = {int(split_segments(corpus([50]), seed=seed, test_share=0.4)[0]) for seed in range(20)}
    assert firsts == {0, 2}


def test_the_smallest_cut() -> None:
    for share in (0.01, 0.4, 0.99):
        assert sorted(split_segments(corpus([3]), seed=0, test_share=share).tolist()) == [-1, 0, 2]


def test_few_documents_that_the_source_fixed_are_left_alone() -> None:
    rows = split_segments(corpus([2, 3, 10], {0: "test", 1: "train"}), seed=0, test_share=0.4)
    assert rows[:5].tolist() == [2, 2, 0, 0, 0]
    assert sorted(rows[5:].tolist()) == [-1, *[0] * 5, *[2] * 4]
    # Two rows cannot be cut; they go to training and what is fixed stays.
    assert split_segments(corpus([2, 2], {0: "test"}), seed=0, test_share=0.4).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("missing", ["train", "test"])
def test_an_empty_split_is_refused_with_what_to_do(missing: str) -> None:
    other: Split = "test" if missing == "train" else "train"
    with pytest.raises(InputError, match=rf"{missing} split of 25 documents in 25 rows; give more text"):
        split_segments(corpus([1] * 25, dict.fromkeys(range(25), other)), seed=0, test_share=0.4)
    with pytest.raises(InputError, match="no row is left"):
        split_segments(corpus([]), seed=0, test_share=0.4)


def test_real_rows_split_before_anything_is_drawn(make_store: Callable[..., Any]) -> None:
    store = make_store(lengths=[100] * 40, rates=[0.1])
    rows = split_segments(store.corpus, seed=0, test_share=0.4)
    owners = store.corpus.segments[:, 3]
    assert not set(owners[rows == 0]) & set(owners[rows == 2])


# -- near-duplicates --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=20, max_size=40), st.integers(0, 1000))
def test_near_duplicates_share_the_draw_of_the_smallest_key(texts: list[int], seed: int) -> None:
    made = corpus([2] * len(texts), like=dict(enumerate(texts)))
    names = [document.key for document in made.documents]
    first = [min(name for name, other in zip(names, texts, strict=True) if other == text) for text in texts]
    expected = split_documents(first, [None] * len(texts), seed=seed, test_share=0.4)
    try:
        found = sides(made, seed)
    except InputError:
        assert len(set(expected)) == 1
        return
    assert found == [[0 if split == "train" else 2] for split in expected]


def test_near_duplicates_follow_what_the_source_fixed() -> None:
    fixed: dict[int, Split] = {3: "test", 4: "train", 5: "validation"}
    made = corpus([2] * 30, fixed, like={0: 3, 10: 3, 11: 4, 12: 5})
    for seed in range(5):
        found = sides(made, seed)
        assert [found[i] for i in (0, 3, 10)] == [[2]] * 3
        assert [found[i] for i in (4, 11)] == [[0]] * 2
        assert [found[i] for i in (5, 12)] == [[1]] * 2


def test_of_near_duplicates_fixed_in_several_splits_the_first_split_keeps_its_own() -> None:
    fixed: dict[int, Split] = {1: "test", 2: "train", 3: "validation", 11: "test", 12: "validation", 20: "test"}
    made = corpus([2] * 30, fixed, like={1: 0, 2: 0, 3: 0, 11: 10, 12: 10, 13: 10})
    found = sides(made)
    assert found[:4] == [[0], [-1], [0], [-1]]  # train, and what nobody fixed with it
    assert found[10:14] == [[1], [-1], [1], [1]]
    assert found[20] == [2]


def test_zero_lets_near_duplicates_part() -> None:
    made = corpus([2] * 30, {1: "test", 2: "train"}, like={1: 0, 2: 0, **dict.fromkeys(range(5, 30), 5)})
    names = [document.key for document in made.documents]
    fixed = [document.split for document in made.documents]
    expected = split_documents(names, fixed, seed=1, test_share=0.4)
    assert sides(made, 1, duplicates=0) == [[0 if split == "train" else 2] for split in expected]
    assert expected.count("test") > 5


def test_of_few_documents_the_block_of_training_keeps_near_duplicates() -> None:
    rows_of = [4] * 10
    for seed in range(6):
        plain = sides(corpus(rows_of), seed)
        # Document 8 has the text of 1; they lie in different blocks, and the cut divides neither.
        made = corpus(rows_of, like={8: 1})
        found = sides(made, seed)
        assert sorted([plain[1], plain[8]]) == [[0], [2]]
        assert sorted([found[1], found[8]]) == [[-1], [0]]
        assert [s for i, s in enumerate(found) if i not in (1, 8)] == [
            s for i, s in enumerate(plain) if i not in (1, 8)
        ]
        assert sides(made, seed, duplicates=0) == plain


def test_a_cut_document_keeps_of_its_near_duplicates_what_is_trained_on() -> None:
    made = corpus([3, 30, 3], like={2: 1})
    for seed in range(6):
        plain = sides(made, seed)
        assert plain[1] == [-1, 0, 2]  # 30 rows and 3 of its beginning: a Jaccard similarity of 0.1
    alike = corpus([6, 5], like={1: 0})
    with pytest.raises(InputError, match=r"2 documents in 11 rows, 2 of them near-duplicates of one another \(see"):
        split_segments(alike, seed=0, test_share=0.4)
    assert sorted(set(split_segments(alike, seed=0, test_share=0.4, duplicates=0).tolist())) == [-1, 0, 2]


def test_clusters_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="a key and a cluster, got 3 and 2"):
        split_documents(keys(3), [None] * 3, seed=0, test_share=0.5, clusters=np.arange(2))
    with pytest.raises(InputError, match="duplicates lies between"):
        split_segments(corpus([1] * 30), seed=0, test_share=0.4, duplicates=0.2)
