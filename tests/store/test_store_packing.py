"""Rows and segments: nothing of a document is lost, and what rows() says is what a slow reader of them says."""

from __future__ import annotations

import hashlib
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import CorpusConfig
from exegete.errors import ConfigError, InputError, MismatchError
from exegete.store import encoding, token_rows
from exegete.store.corpus import Corpus, TextDocument, build_corpus, copy_corpus, open_corpus
from exegete.store.packing import _Keys
from exegete.tokens import TokenTable
from exegete.types import Rows

BOS, EOS, ODD = 1, 2, 3
TABLE = TokenTable([b"\x00", b"<s>", b"</s>", b"<odd>", *(bytes([i]) for i in range(4, 256))], [BOS, EOS, ODD])


class ByteTokenizer:
    """One token per byte; ids 1 to 3 are special."""

    is_fast = False

    def __init__(self, *, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode("latin-1")) for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}


def documents(*lists: list[int]) -> list[TextDocument]:
    return [TextDocument(key=f"d{i}", ids=np.array(ids, np.int32)) for i, ids in enumerate(lists)]


def make(folder: Path, lists: list[list[int]], *, tokenizer: Any = None, **options: Any) -> Corpus:
    config = CorpusConfig(**{"row_length": 8, "packing": True, **options})
    return build_corpus(folder, documents(*lists), tokenizer or ByteTokenizer(), config, table=TABLE)


def slow_rows(corpus: Corpus) -> Rows:
    """Documents and mask position by position, from the definition."""
    policy = corpus.manifest.mask_policy
    owner = np.full(corpus.tokens.shape, -1, np.int32)
    mask = np.zeros(corpus.tokens.shape, bool)
    seen: set[int] = set()
    for row, start, stop, document in corpus.segments.tolist():
        for position in range(start, stop):
            assert owner[row, position] == -1
            owner[row, position] = document
            bos = (policy["bos"] == "row" and position == 0) or (
                policy["bos"] == "document" and position == start and document not in seen
            )
            mask[row, position] = not bos and int(corpus.tokens[row, position]) not in policy["special"]
        seen.add(document)
    return Rows(tokens=np.asarray(corpus.tokens, np.uint32), documents=owner, mask=mask)


def ids_of(corpus: Corpus, document: int, *, has_bos: bool, separated: bool) -> list[int]:
    """The tokens of one document: its segments joined, without BOS and separators."""
    policy = corpus.manifest.mask_policy["bos"] if has_bos else "none"
    found: list[int] = []
    begun = False
    for row, start, stop, owner in corpus.segments.tolist():
        if owner != document:
            continue
        tokens = corpus.tokens[row, start:stop].tolist()
        if (policy == "row" and start == 0) or (policy == "document" and not begun):
            assert tokens.pop(0) == BOS
        begun = True
        found += tokens
    return found[:-1] if separated else found


IDS = st.lists(st.sampled_from([0, 2, 3, 7, 8, 9, 255]), max_size=23)


@settings(max_examples=80)
@given(
    st.lists(IDS, min_size=1, max_size=7).filter(any),
    st.integers(2, 11),
    st.sampled_from(["row", "document", "none"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "eos"]),
    st.sampled_from([2, 5, 1000]),
)
def test_no_token_is_lost_and_rows_are_what_segments_say(
    lists: list[list[int]], row_length: int, bos: Any, has_bos: bool, packing: bool, separator: Any, piece: int
) -> None:
    separator = separator if packing else "none"
    tokenizer = ByteTokenizer(bos=BOS if has_bos else None)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_PIECE", piece)
        corpus = make(
            Path(folder), lists, tokenizer=tokenizer, row_length=row_length, bos=bos, packing=packing,
            separator=separator,
        )  # fmt: skip
        segments = np.asarray(corpus.segments)
        slow = slow_rows(corpus)
        for name in ("tokens", "documents", "mask"):
            assert np.array_equal(getattr(corpus.rows(slice(None)), name), getattr(slow, name)), name
        assert corpus.n_counted == slow.mask.sum()
        kept = [ids for ids in lists if ids]
        assert corpus.n_tokens == sum(map(len, kept))
        assert len(corpus.documents) == corpus.manifest.n_documents == len(kept)
        for number, ids in enumerate(kept):
            last = segments[segments[:, 3] == number][-1]
            follows = segments[(segments[:, 0] == last[0]) & (segments[:, 1] >= last[2])]
            tokens = ids_of(corpus, number, has_bos=has_bos, separated=False)
            assert tokens[: len(ids)] == ids
            # A separator is there when another document follows in the row, or would have but for want of room.
            assert tokens[len(ids) :] in ([[EOS]] if separator == "eos" and len(follows) else [[], [EOS]])
            assert separator == "eos" or tokens == ids
            assert number + 1 < len(kept) or tokens == ids
            size = sum(len(TABLE.pieces[i]) for i in ids if i not in TABLE.special)
            assert corpus.documents[number].n_bytes == size
        assert (segments[:, 1] < segments[:, 2]).all()
        assert (np.diff(segments[:, 0] * row_length + segments[:, 1]) > 0).all()
        assert set(segments[:, 0].tolist()) == set(range(corpus.n_rows))
        assert (np.diff(segments[:, 3]) >= 0).all()
        assert (slow.tokens[slow.documents < 0] == 0).all()
        if packing:  # only the last row, and rows whose BOS would stand apart, have room left
            filled = (slow.documents >= 0).sum(axis=1)[:-1]
            assert (filled >= row_length - (1 if bos == "document" and has_bos else 0)).all()
        else:
            assert len(segments) == corpus.n_rows
        draw = np.random.default_rng(0).integers(-corpus.n_rows, corpus.n_rows, 5)
        indices: list[Any] = [draw, draw.tolist(), slice(corpus.n_rows, None, -2), slice(0, 0), []]
        for index in indices:
            part = corpus.rows(index)
            chosen = np.arange(corpus.n_rows)[index if isinstance(index, slice) else np.asarray(index, int)]
            for name in ("tokens", "documents", "mask"):
                assert np.array_equal(getattr(part, name), getattr(slow, name)[chosen])


def test_packed_rows_by_hand(tmp_path: Path) -> None:
    lists = [[7, 7, 7], [], [8, 8], [9] * 9]
    row = make(tmp_path / "a", lists, separator="eos")
    assert row.tokens.tolist() == [[1, 7, 7, 7, 2, 8, 8, 2], [1, 9, 9, 9, 9, 9, 9, 9], [1, 9, 9, 0, 0, 0, 0, 0]]
    assert row.segments.tolist() == [[0, 0, 5, 0], [0, 5, 8, 1], [1, 0, 8, 2], [2, 0, 3, 2]]
    assert row.rows([0]).mask.tolist() == [[False, True, True, True, False, True, True, False]]
    assert row.rows([2, 0]).documents.tolist() == [[2] * 3 + [-1] * 5, [0] * 5 + [1] * 3]
    assert (row.n_tokens, row.n_counted) == (14, 14)
    document = make(tmp_path / "b", [[7] * 6, [8] * 3, [9]], bos="document", row_length=8)
    assert document.tokens.tolist() == [[1, 7, 7, 7, 7, 7, 7, 0], [1, 8, 8, 8, 1, 9, 0, 0]]
    assert document.segments.tolist() == [[0, 0, 7, 0], [1, 0, 4, 1], [1, 4, 6, 2]]
    long = make(tmp_path / "c", [[7] * 9], bos="document", packing=False)
    assert long.tokens.tolist() == [[1, *[7] * 7], [7, 7, 0, 0, 0, 0, 0, 0]]
    assert long.rows([0, 1]).mask.sum(axis=1).tolist() == [7, 2]
    none = make(tmp_path / "d", [[7] * 3, [8] * 6], bos="none")
    assert none.tokens.tolist() == [[7, 7, 7, 8, 8, 8, 8, 8], [8, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("limit", "n_tokens", "n_rows"), [(1, 7, 1), (7, 7, 1), (8, 14, 2), (15, 20, 3), (99, 20, 3)])
def test_a_packed_build_ends_with_the_row_that_reaches_the_limit(
    tmp_path: Path, limit: int, n_tokens: int, n_rows: int
) -> None:
    corpus = make(tmp_path, [[7] * 3, [8] * 3, [9] * 14], max_tokens=limit)
    assert (corpus.n_tokens, corpus.n_rows) == (n_tokens, n_rows)
    assert corpus.n_counted == corpus.rows(slice(None)).mask.sum()


def test_ids_that_begin_with_the_bos_have_it_once(tmp_path: Path) -> None:
    lists = [[BOS, 7, 7], [BOS, BOS, 8], [BOS]]
    for bos, tokens in {
        "row": [[1, 7, 7, 1], [1, 8, 0, 0]],
        "document": [[1, 7, 7, 0], [1, 1, 8, 0]],
        "none": [[1, 7, 7, 1], [1, 8, 1, 0]],
    }.items():
        assert make(tmp_path / bos, lists, bos=bos, row_length=4).tokens.tolist() == tokens


def test_text_and_ids_go_through_the_same_rows(tmp_path: Path) -> None:
    texts = ["ab<s>c", "x" * 30]
    by_ids = make(tmp_path / "a", [list(text.encode()) for text in texts])
    given = [TextDocument(key=f"d{i}", text=text) for i, text in enumerate(texts)]
    config = CorpusConfig(row_length=8, packing=True)
    by_text = build_corpus(tmp_path / "b", given, ByteTokenizer(), config, table=TABLE)
    assert np.array_equal(by_ids.tokens, by_text.tokens)
    assert by_ids.hash == by_text.hash


def test_what_a_document_sees_is_part_of_the_identity_where_it_matters(tmp_path: Path) -> None:
    hashes = {}
    for packing in (True, False):
        for attend in ("row", "document"):
            corpus = make(tmp_path / f"{packing}{attend}", [[7] * 3, [8] * 3], packing=packing, attend=attend)
            assert corpus.attend == (attend if packing else "row")
            hashes[packing, attend] = corpus.hash
    assert len(set(hashes.values())) == 3
    assert hashes[False, "row"] == hashes[False, "document"]


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    lists = [[7] * 9, [8] * 2, [9] * 20]
    made = [make(tmp_path / name, lists, separator="eos", shuffle_buffer=2) for name in "ab"]
    for name in made[0].manifest.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert made[0].manifest == made[1].manifest
    assert open_corpus(tmp_path / "a").config == CorpusConfig(
        row_length=8, packing=True, separator="eos", shuffle_buffer=2
    )
    assert copy_corpus(made[0], tmp_path / "c").rows(slice(None)).mask.sum() == made[0].n_counted


def test_shuffling_is_a_function_of_the_seed(tmp_path: Path) -> None:
    def order(seed: int, size: int | None) -> list[str]:
        folder = tmp_path / f"{seed}-{size}"
        corpus = make(folder, [[7]] * 40, shuffle_buffer=size, shuffle_seed=seed)
        return [document.key for document in corpus.documents]

    plain = [f"d{i}" for i in range(40)]
    assert order(0, None) == order(1, 1) == plain
    for size in (5, 100):
        assert sorted(order(0, size)) == sorted(plain)
        assert order(0, size) != order(1, size) != plain
    assert all(plain.index(key) <= place + 5 for place, key in enumerate(order(0, 5)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bos": True}, "'corpus.bos' is one of 'row', 'document', 'none', got True"),
        ({"attend": "all"}, "corpus.attend"),
        ({"chat": "user"}, "corpus.chat"),
        ({"separator": "eos", "packing": False}, "set corpus.packing too"),
        ({"row_length": 1}, "corpus.row_length' is too small; it must be at least 2"),
        ({"max_tokens": 0}, "corpus.max_tokens"),
        ({"shuffle_buffer": 0}, "corpus.shuffle_buffer"),
        ({"column": ""}, "corpus.column"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CorpusConfig(**{"packing": True, **options})


def test_a_tokenizer_without_eos_and_ids_of_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no EOS token"):
        make(tmp_path, [[7]], separator="eos", tokenizer=ByteTokenizer(eos=None))
    with pytest.raises(MismatchError, match="d0 holds the token id 256, the subject's tokenizer has ids 0 to 255"):
        make(tmp_path, [[7, 256]])
    with pytest.raises(MismatchError, match="holds the token id -100"):
        make(tmp_path, [[7, -100]])
    make(tmp_path, [[7]])
    with pytest.raises(MismatchError, match="bos_id: 1 there, None now"):
        make(tmp_path, [[7]], tokenizer=ByteTokenizer(bos=None))


def test_an_eos_that_the_table_does_not_call_special_is_still_not_counted(tmp_path: Path) -> None:
    corpus = make(tmp_path, [[7], [8, 50]], separator="eos", tokenizer=ByteTokenizer(eos=50))
    assert corpus.tokens[0, :5].tolist() == [1, 7, 50, 8, 50]
    assert corpus.rows([0]).mask[0, :5].tolist() == [False, True, False, True, False]
    assert corpus.n_counted == 2


@given(st.lists(st.text(max_size=3), max_size=60))
def test_keys_are_new_once(keys: list[str]) -> None:
    known = _Keys()
    seen: set[str] = set()
    for key in keys:
        assert known.add(key) == (key not in seen)
        seen.add(key)


def test_many_keys_in_little_memory() -> None:
    tracemalloc.start()
    known = _Keys()
    assert all(known.add(f"data/part-00012-of-00100.jsonl:{i}") for i in range(12_000))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 50 * 12_000
    assert not any(known.add(f"data/part-00012-of-00100.jsonl:{i}") for i in range(12_000))
    assert known.add("\udcff.txt")  # the name of a file that is not UTF-8
    assert not known.add("\udcff.txt")


def test_digests_that_share_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """All digests end alike, so that all want one slot, some share their first half, and one is all zeros."""

    class Digest:
        def __init__(self, key: bytes, *, digest_size: int) -> None:
            self.key = int(key)

        def digest(self) -> bytes:
            low, high = 2 * (self.key % 500), (self.key // 500) << 40
            return low.to_bytes(8, "little") + high.to_bytes(8, "little")

    monkeypatch.setattr(hashlib, "blake2b", Digest)
    known = _Keys()
    assert all(known.add(str(i)) for i in range(1000))
    assert not any(known.add(str(i)) for i in range(1000))


def test_the_first_segments_of_rows_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(tmp_path, [[7 + i % 40] * (1 + i * 5 % 13) for i in range(30)], bos="none")
    expected = np.searchsorted(corpus.segments[:, 0], np.arange(corpus.n_rows + 1))
    assert len(corpus.segments) > corpus.n_rows > 20
    for size in (1, 7, 1 << 16):
        monkeypatch.setattr(token_rows, "_BLOCK", size)
        again = open_corpus(tmp_path)
        assert np.array_equal(again._first_segments, expected)
