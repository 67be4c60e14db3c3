"""Rows that hold several documents: every document on one side, and nothing of another side in sight."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import ExampleConfig
from exegete.errors import InputError
from exegete.examples import StoreData, select, select_many, split_segments
from exegete.types import SPLITS, Array, ExampleSet, Firings, Rows, Skipped, Split

Make = Callable[..., Any]
CODES: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
SMALL = ExampleConfig(window=6, n_train=20, n_test=30, n_negatives=25, min_train=1, min_test=1, duplicates=0)
SIDES: tuple[Split, Split] = ("train", "test")
FEW = st.lists(st.integers(1, 90), min_size=1, max_size=19)
MANY = st.lists(st.integers(1, 60), min_size=20, max_size=40)
FIXED = st.lists(st.sampled_from([None, None, None, *SPLITS]), max_size=25)


def opened(store: Any, seed: int) -> StoreData | None:
    """Return the data of a store, None when a split would be empty."""
    try:
        return StoreData(store, split_segments(store.corpus, seed=seed, test_share=0.4, duplicates=0))
    except InputError:
        return None


def segment_of(corpus: Any) -> Array:
    """Return the segment of every position [rows, length], −1 for padding."""
    found = np.full(corpus.tokens.shape, -1)
    for number, (row, start, stop, _) in enumerate(corpus.segments):
        found[row, start:stop] = number
    return found


# -- the split --------------------------------------------------------------------------------------------------------


@given(FEW | MANY, FIXED, st.integers(0, 1000), st.booleans())
def test_documents_and_rows_lie_where_they_must(
    make_store: Make, lengths: list[int], fixed: list[Split | None], seed: int, bos: bool
) -> None:
    store = make_store(lengths=lengths, rates=[], row=32, bos=bos, fixed=fixed, packed=True)
    corpus, data = store.corpus, opened(store, seed)
    if data is None:
        return
    codes = data.segment_split
    rows, owners = corpus.segments[:, 0], corpus.segments[:, 3]
    known = [document.split for document in corpus.documents]
    for number, split in enumerate(known):
        mine = set(codes[owners == number].tolist())
        if split is not None:
            assert mine == {CODES[split]}
        elif len(lengths) >= 20:
            assert len(mine) == 1
            assert mine < {0, 2}
    if len(lengths) < 20:
        loose = np.array([known[d] is None for d in owners.tolist()])
        blocks = {row: set(codes[loose & (rows == row)].tolist()) for row in np.unique(rows[loose]).tolist()}
        assert all(len(block) == 1 for block in blocks.values())  # one side a row, whatever segments it holds
        line = [block.pop() for block in blocks.values()]
        assert line.count(-1) == (len(line) > 2)
        if len(line) > 2:
            gap = line.index(-1)
            assert {frozenset(line[:gap]), frozenset(line[gap + 1 :])} == {frozenset({0}), frozenset({2})}


def test_a_row_may_hold_documents_of_both_sides(make_store: Make) -> None:
    store = make_store(lengths=[7] * 60, rates=[0.2], row=32, packed=True)
    codes = split_segments(store.corpus, seed=0, test_share=0.5, duplicates=0)
    rows = store.corpus.segments[:, 0]
    mixed = set(rows[codes == 0].tolist()) & set(rows[codes == 2].tolist())
    assert len(mixed) > len(np.unique(rows)) / 2
    by_document = {
        tuple(set(codes[store.corpus.segments[:, 3] == d].tolist())) for d in range(len(store.corpus.documents))
    }
    assert by_document == {(0,), (2,)}


def test_a_hashed_document_is_on_the_same_side_packed_or_not(make_store: Make) -> None:
    sides = []
    for packed in (False, True):
        corpus = make_store(lengths=[40, 9, 70] * 10, rates=[], row=32, packed=packed).corpus
        codes = split_segments(corpus, seed=3, test_share=0.4, duplicates=0)
        sides.append(dict(zip(corpus.segments[:, 3].tolist(), codes.tolist(), strict=True)))
    assert sides[0] == sides[1]


# -- the data ---------------------------------------------------------------------------------------------------------


@given(FEW | MANY, FIXED, st.integers(0, 1000), st.booleans())
def test_each_split_sees_its_own_text_and_nothing_else(
    make_store: Make, lengths: list[int], fixed: list[Split | None], seed: int, bos: bool
) -> None:
    store = make_store(
        lengths=lengths, rates=[0.1, 0.5, 0.0], row=32, bos=bos, fixed=fixed, seed=seed, packed=True, excluded=0.1
    )
    data = opened(store, seed)
    if data is None:
        return
    corpus, which = store.corpus, segment_of(store.corpus)
    codes = np.append(data.segment_split, -1)[which]  # padding is of no segment
    named: dict[int, Split] = {}
    for split, code in CODES.items():
        numbers, rows = data.numbers(split), data.rows(split)
        mine = codes[numbers] == code
        assert numbers.tolist() == np.flatnonzero((codes == code).any(axis=1)).tolist()
        assert (rows.tokens == corpus.tokens[numbers]).all()
        assert ((rows.documents >= 0) == mine).all()
        assert (rows.mask == (corpus.mask[numbers] & mine)).all()
        assert rows.documents.dtype == np.int32
        for document in np.unique(rows.documents[mine]).tolist():
            assert named.setdefault(document, split) == split
            # one name for all of an undivided document, one for each segment of a divided one
            behind = which[numbers][rows.documents == document]
            if document < len(lengths):
                assert set(corpus.segments[behind, 3].tolist()) == {document}
            else:
                assert set(behind.tolist()) == {document - len(lengths)}
        for index, part in zip([0, 2, 1], data.firings([0, 2, 1], split), strict=True):
            whole, seen = np.zeros(corpus.tokens.shape, np.float32), np.zeros(rows.tokens.shape, np.float32)
            firings = store.firings(index)
            whole[firings.rows, firings.positions] = firings.values
            seen[part.rows, part.positions] = part.values
            assert (seen == np.where(mine, whole[numbers], 0)).all()
            assert len(part) == int(((whole[numbers] > 0) & mine).sum())


@settings(max_examples=40)
@given(FEW | MANY, FIXED, st.integers(0, 1000), st.booleans())
def test_what_is_shown_and_judged_never_meets(
    make_store: Make, lengths: list[int], fixed: list[Split | None], seed: int, centred: bool
) -> None:
    store = make_store(lengths=lengths, rates=[0.1], row=32, fixed=fixed, seed=seed, packed=True, excluded=0.05)
    data = opened(store, seed)
    if data is None or not all((data.frame(6, seed).split == CODES[split]).any() for split in SIDES):
        return
    config = dataclasses.replace(SMALL, centred=centred)
    found = select(data, 0, config=config, seed=seed)
    if isinstance(found, Skipped):
        return
    corpus, which = store.corpus, segment_of(store.corpus)
    dense = np.zeros(corpus.tokens.shape, np.float32)
    firings = store.firings(0)
    dense[firings.rows, firings.positions] = firings.values
    taken: dict[Split, set[tuple[int, int]]] = {"train": set(), "test": set()}
    texts: dict[Split, set[int]] = {"train": set(), "test": set()}
    for example in found.examples:
        span = slice(example.start, example.stop)
        (segment,) = set(which[example.row, span].tolist())  # one document a window
        assert data.segment_split[segment] == CODES[example.split]
        assert example.document in (corpus.segments[segment, 3], len(lengths) + segment)
        assert (example.tokens == corpus.tokens[example.row, span]).all()
        assert (example.activations == dense[example.row, span]).all()
        assert corpus.mask[example.row, span].all()
        taken[example.split] |= {(example.row, position) for position in range(example.start, example.stop)}
        texts[example.split].add(int(corpus.segments[segment, 3]))
    assert not taken["train"] & taken["test"]
    if len(lengths) >= 20:
        assert not texts["train"] & texts["test"]
    tiled = data.frame(6, seed)
    mine = tiled.split == 2
    fires = [dense[r, s : s + 6].any() for r, s in zip(tiled.row[mine], tiled.start[mine], strict=True)]
    assert found.frame == len(fires)
    assert found.firing_rate == pytest.approx(np.mean(fires))


# -- unpacked rows are as they always were ----------------------------------------------------------------------------


def frozen_split(corpus: Any, seed: int, share: float) -> list[int]:
    """The split of unpacked rows as first released, told slowly."""

    def uniform(key: str) -> float:
        digest = hashlib.blake2b(f"{seed}|split|{key}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2.0**53

    owners = corpus.segments[:, 3].tolist()
    few = len(corpus.documents) < 20
    codes = []
    for document in corpus.documents:
        drawn = 2 if uniform(document.key) < share else 0
        codes.append(CODES[document.split] if document.split is not None else -9 if few else drawn)
    rows = [codes[owner] for owner in owners]
    loose = [i for i, code in enumerate(rows) if code == -9]
    n = len(loose)
    n_test = min(max(round((n - 1) * share), 1), n - 2)
    block = [0] * n if n < 3 else [0] * (n - n_test - 1) + [-1] + [2] * n_test
    if n >= 3 and uniform("which end is the test block") >= 0.5:
        block.reverse()
    for place, code in zip(loose, block, strict=True):
        rows[place] = code
    return rows


def frozen_rows(store: Any, split_of: Sequence[int], split: Split) -> tuple[Array, Rows]:
    numbers = np.array([i for i, code in enumerate(split_of) if code == CODES[split]], np.int64)
    owners = store.corpus.segments[:, 3]
    elsewhere = {int(owners[i]) for i, code in enumerate(split_of) if code not in (CODES[split], -1)}
    rows = store.rows(numbers)
    documents = rows.documents.copy()
    for place, number in enumerate(numbers.tolist()):
        if int(owners[number]) in elsewhere:
            documents[place] = np.where(documents[place] >= 0, len(store.corpus.documents) + number, -1)
    return numbers, Rows(tokens=rows.tokens, documents=documents, mask=rows.mask)


def frozen_firings(firings: Firings, numbers: Array) -> list[tuple[int, int, float]]:
    place = {number: i for i, number in enumerate(numbers.tolist())}
    every = zip(firings.rows.tolist(), firings.positions.tolist(), firings.values.tolist(), strict=True)
    return [(place[row], position, value) for row, position, value in every if row in place]


@given(FEW | MANY, FIXED, st.integers(0, 1000), st.booleans())
def test_unpacked_rows_are_split_named_and_read_as_ever(
    make_store: Make, lengths: list[int], fixed: list[Split | None], seed: int, bos: bool
) -> None:
    store = make_store(lengths=lengths, rates=[0.1, 0.4], row=32, bos=bos, fixed=fixed, seed=seed)
    expected = frozen_split(store.corpus, seed, 0.4)
    data = opened(store, seed)
    if data is None:
        assert not {0, 2} <= set(expected)
        return
    assert data.segment_split.tolist() == expected
    for split in CODES:
        numbers, rows = frozen_rows(store, expected, split)
        assert data.numbers(split).tolist() == numbers.tolist()
        assert (data.rows(split).tokens == rows.tokens).all()
        assert (data.rows(split).documents == rows.documents).all()
        assert (data.rows(split).mask == rows.mask).all()
        for index, part in enumerate(data.firings([0, 1], split)):
            found = list(zip(part.rows.tolist(), part.positions.tolist(), part.values.tolist(), strict=True))
            assert found == frozen_firings(store.firings(index), numbers)


def test_rows_of_one_split_are_handed_on_untouched(make_store: Make) -> None:
    store = make_store(lengths=[50] * 30, rates=[0.1], row=32)
    data = opened(store, 0)
    assert data is not None
    given_rows: list[Rows] = []
    store_rows = store.rows

    class Watched:
        name, corpus = store.name, store.corpus
        firings, block = store.firings, store.block

        def rows(self, numbers: Array, /) -> Rows:
            given_rows.append(store_rows(numbers))
            return given_rows[-1]

    watched = StoreData(Watched(), data.segment_split)
    watched.firings([0], "train")
    assert given_rows == []  # no position is looked at for a latent when no row is shared
    assert watched.rows("train") is given_rows[0]


# -- positions that a store leaves out --------------------------------------------------------------------------------


def test_the_mask_is_that_of_the_store(make_store: Make) -> None:
    """Nothing is known of a position left out: it is in no window, neither a firing nor a silent one."""
    store = make_store(lengths=[120] * 30, rates=[0.1], row=32, excluded=0.04)
    left_out = (store.corpus.owners >= 0) & ~store.corpus.mask
    left_out[:, 0] = False
    assert left_out.sum() > 50
    data = opened(store, 0)
    assert data is not None
    for found in select_many(data, [0, 0], SMALL):
        assert isinstance(found, ExampleSet)
        for example in found.examples:
            assert not left_out[example.row, example.start : example.stop].any()
