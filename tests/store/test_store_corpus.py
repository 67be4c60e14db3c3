from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from exegete.config import CorpusConfig
from exegete.errors import BusyError, CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import RunLock, fault_hook
from exegete.store import corpus as building
from exegete.store import encoding
from exegete.store.corpus import Corpus, TextDocument, build_corpus, copy_corpus, open_corpus, tokenizer_hash
from exegete.tokens import TokenTable


class FastTokenizer:
    """As much of a transformers fast tokenizer as a corpus asks for: every byte a token, two merges, three specials."""

    is_fast = True

    def __init__(self, *, bos: bool = True, merges: bool = True) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [("t", "h"), ("th", "e")] if merges else []
        pieces = [*alphabet, *(a + b for a, b in pairs)]
        backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
        self.backend_tokenizer = backend
        self.bos_token_id = backend.token_to_id("<s>") if bos else None
        to_byte = {backend.encode(chr(b)).tokens[0]: b for b in range(128)}
        to_byte |= {c: b for b, c in _byte_characters().items()}
        self.table = TokenTable(
            [bytes(to_byte[c] for c in p) for p in pieces] + [b"<s>", b"</s>", b"<pad>"],
            range(len(pieces), len(pieces) + 3),
        )


def _byte_characters() -> dict[int, str]:
    """GPT-2's characters for bytes, in its own words: printable ones stand for themselves."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}


class SlowTokenizer:
    """A tokenizer without a Rust backend: one token per character, the vocabulary beyond 16 bits."""

    is_fast = False
    bos_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}


TOKENIZER = FastTokenizer()


def docs(*texts: str) -> list[TextDocument]:
    return [TextDocument(key=f"d{i}", text=text) for i, text in enumerate(texts)]


def make(
    folder: Path, documents: Iterable[TextDocument], *, tokenizer: Any = TOKENIZER, table: Any = None, **options: Any
) -> Corpus:
    config = CorpusConfig(**{"row_length": 8, **options})
    return build_corpus(folder, documents, tokenizer, config, table=table or tokenizer.table)


def test_rows_by_hand(tmp_path: Path) -> None:
    corpus = make(tmp_path, docs("the cats sat", "", "x"))
    bos, pad = 258, -1
    the = 257
    rest = [TOKENIZER.backend_tokenizer.token_to_id(c) for c in "Ġcatsat"]
    space, c, a, t, s, _, _ = rest
    assert corpus.tokens.tolist() == [
        [bos, the, space, c, a, t, s, space],
        [bos, s, a, t, 0, 0, 0, 0],
        [bos, TOKENIZER.backend_tokenizer.token_to_id("x"), 0, 0, 0, 0, 0, 0],
    ]
    rows = corpus.rows(slice(None))
    assert rows.documents.tolist() == [[0] * 8, [0] * 4 + [pad] * 4, [1] * 2 + [pad] * 6]
    assert rows.mask.sum(axis=1).tolist() == [7, 3, 1]
    assert not rows.mask[:, 0].any()
    assert corpus.segments.tolist() == [[0, 0, 8, 0], [1, 0, 4, 0], [2, 0, 2, 1]]
    assert corpus.attend == "row"
    assert (corpus.n_rows, corpus.n_tokens, corpus.n_counted, corpus.row_length) == (3, 11, 11, 8)
    assert [(d.key, d.split, d.n_bytes) for d in corpus.documents] == [("d0", None, 12), ("d2", None, 1)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=6).filter(any), st.integers(2, 11), st.booleans(), st.booleans()
)
def test_rows_of_a_document_decode_to_its_text_and_are_its_own(
    texts: list[str], row_length: int, wants_bos: bool, has_bos: bool
) -> None:
    tokenizer = FastTokenizer(bos=has_bos)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make(
            Path(folder), docs(*texts), tokenizer=tokenizer, row_length=row_length, bos="row" if wants_bos else "none"
        )
        rows = corpus.rows(slice(None))
        decoded = [""] * len(corpus.documents)
        for i in range(corpus.n_rows):
            assert rows.mask[i].any()
            assert set(rows.documents[i]) - {-1} == {corpus.segments[i, 3]}
            assert (rows.tokens[i, 0] == tokenizer.bos_token_id) == (wants_bos and has_bos)
            assert (rows.tokens[i][rows.documents[i] < 0] == 0).all()
            assert (
                rows.mask[i] == ((rows.documents[i] >= 0) & (np.arange(row_length) >= (wants_bos and has_bos)))
            ).all()
        for i, document in enumerate(corpus.documents):
            own = rows.mask & (rows.documents == i)
            decoded[i] = corpus.table.decode(rows.tokens[own].tolist())
            assert document.n_bytes == len(decoded[i].encode())
        assert decoded == [text for text in texts if text]
        assert corpus.n_counted == corpus.n_tokens == rows.mask.sum()


def test_markup_and_direction_marks_pass_through(tmp_path: Path) -> None:
    text = "<s>old</s> <pad> <<b>> \u202eright\u202c \u2067\U0001f469\u200d\U0001f4bb\u2069 <script>\x00\r\n</script>"
    corpus = make(tmp_path, docs(text))
    rows = corpus.rows(slice(None))
    assert corpus.table.decode(rows.tokens[rows.mask].tolist()) == text
    assert not np.isin(rows.tokens[rows.mask], list(corpus.table.special)).any()


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path: Path) -> None:
    corpus = make(tmp_path, docs("a\ud800b"))
    rows = corpus.rows(slice(None))
    assert corpus.table.decode(rows.tokens[rows.mask].tolist()) == "a?b"
    assert corpus.documents[0].n_bytes == 3


def test_truncation_and_padding_of_the_users_tokenizer_do_not_reach_the_corpus(tmp_path: Path) -> None:
    tokenizer = FastTokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    assert tokenizer_hash(tokenizer) == before != tokenizer_hash(FastTokenizer(merges=False))
    assert make(tmp_path, docs("abcdefghijk"), tokenizer=tokenizer).n_tokens == 11
    assert len(tokenizer.backend_tokenizer.encode("abc").ids) == 30 > 2
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_rows_by_slice_and_by_indices(tmp_path: Path) -> None:
    corpus = make(tmp_path, docs("abcdefghijklmnop", "qrs"))
    whole = corpus.rows(slice(None))
    for index in ([2, 0], np.array([1]), slice(1, 3), []):
        part = corpus.rows(index)
        for name in ("tokens", "documents", "mask"):
            assert np.array_equal(
                getattr(part, name),
                getattr(whole, name)[
                    np.arange(corpus.n_rows)[index] if isinstance(index, slice) else np.asarray(index, int)
                ],
            )
    assert whole.tokens.dtype == np.uint32
    assert whole.documents.dtype == np.int32


def test_long_documents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("first line\nsecond line\n\nlong" + "g" * 30, "b" * 25, "c")
    whole = make(tmp_path / "a", docs(*texts))
    monkeypatch.setattr(encoding, "_PIECE", 12)
    pieces = make(tmp_path / "b", docs(*texts))
    monkeypatch.setattr(encoding, "_BATCH", 1)
    single = make(tmp_path / "c", docs(*texts))
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert whole.hash == pieces.hash == single.hash
    assert whole.documents == pieces.documents


@pytest.mark.parametrize(("limit", "n_tokens"), [(1, 7), (7, 7), (8, 14), (14, 14), (15, 16), (17, 19), (99, 19)])
@pytest.mark.parametrize("piece", [3, 1000])
def test_the_limit_cuts_at_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, n_tokens: int, piece: int
) -> None:
    monkeypatch.setattr(encoding, "_PIECE", piece)
    corpus = make(tmp_path, docs("a" * 16, "bbb"), max_tokens=limit)
    assert corpus.n_tokens == n_tokens
    assert len(corpus.documents) == 1 + (n_tokens > 16)


def test_the_limit_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH", 2)

    def endless() -> Iterator[TextDocument]:
        for i in range(1000):
            assert i < 6
            yield TextDocument(key=str(i), text="x" * 7, split="train" if i % 2 else None)

    corpus = make(tmp_path, endless(), max_tokens=30)
    assert corpus.n_rows == 5
    assert [d.split for d in corpus.documents] == [None, "train", None, "train", None]


@pytest.mark.parametrize("documents", [[], docs(""), docs("", "")])
def test_an_empty_corpus_is_refused(tmp_path: Path, documents: list[TextDocument]) -> None:
    with pytest.raises(InputError, match="empty corpus"):
        make(tmp_path, documents)
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_two_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two documents are called 'd0'"):
        make(tmp_path, [*docs("a", "b"), *docs("c")])


def test_a_second_build_returns_the_first_without_reading_text(tmp_path: Path) -> None:
    first = make(tmp_path, docs("abc"), text=("x.txt",))

    def unread() -> Iterator[TextDocument]:
        pytest.fail("the text was read again")
        yield

    assert make(tmp_path, unread(), text=("x.txt",)).hash == first.hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_length": 9}, "row_length: 8 there, 9 now"),
        ({"max_tokens": 5, "bos": "none"}, "bos: 'row' there, 'none' now; .*max_tokens: None there, 5 now"),
        ({"tokenizer": FastTokenizer(merges=False)}, "token_table: .*; tokenizer: "),
    ],
)
def test_another_setting_is_refused_with_the_difference(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    make(tmp_path, docs("abc"))
    with pytest.raises(MismatchError, match=words):
        make(tmp_path, docs("abc"), **change)


def test_a_slow_tokenizer_and_ids_beyond_16_bits(tmp_path: Path) -> None:
    table = TokenTable([chr(min(i, 0xD7FF)).encode() for i in range(0x10001)], special=[ord("!")])
    corpus = make(tmp_path, docs("a\U00010000!b", ""), tokenizer=SlowTokenizer(), table=table)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens[0, :4].tolist() == [97, 0x10000, 33, 98]
    assert corpus.rows([0]).mask[0].tolist() == [True, True, False, True] + [False] * 4
    assert (corpus.n_tokens, corpus.n_counted) == (4, 3)
    assert not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(MismatchError, match="the tokenizer gives id 65537, the token table has 65537"):
        make(tmp_path / "b", docs("\U00010001"), tokenizer=SlowTokenizer(), table=table)


def test_files_are_mapped_small_and_complete(tmp_path: Path) -> None:
    corpus = make(tmp_path, docs("abc" * 20))
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.table == TOKENIZER.table
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids == [257]
    assert np.load(tmp_path / "segments.npy").tolist()[1] == [1, 0, 8, 0]
    manifest = corpus.manifest
    assert type(manifest).from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    with pytest.raises(CorruptError, match="does not parse"):
        type(manifest).from_json({"format": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.n_rows = 3  # type: ignore[misc]


def test_the_hash_is_that_of_the_contents(tmp_path: Path) -> None:
    def hashed(name: str, documents: list[TextDocument], **options: Any) -> str:
        return make(tmp_path / name, documents, **options).hash

    base = hashed("a", docs("abc", "d"))
    assert base == hashed("b", docs("abc", "d"), text=("elsewhere",), max_tokens=50)
    others = [
        hashed("c", docs("abd", "d")),
        hashed("d", docs("abc")),
        hashed("e", docs("abc", "d"), bos="none"),
        hashed("f", docs("abc", "d"), row_length=9),
        hashed("g", [TextDocument(key="d0", text="abc", split="test"), *docs("abc", "d")[1:]]),
        hashed("h", docs("abc", "d"), tokenizer=FastTokenizer(merges=False)),
    ]
    assert len({base, *others}) == 7


@pytest.mark.parametrize("name", ["tokens.npy", "segments.npy", "documents.jsonl", "token_table.json", "manifest.json"])
def test_a_flipped_byte_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    make(tmp_path, docs("abc" * 20))
    data = bytearray((tmp_path / name).read_bytes())
    data[-30] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptError, match=name):
        open_corpus(tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no corpus"):
        open_corpus(tmp_path)
    make(tmp_path, docs("abc"))
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(CorruptError, match=r"documents\.jsonl is missing"):
        open_corpus(tmp_path)


def test_another_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "FORMAT", 9)
    with pytest.raises(InputError, match="has format 9, this version reads 2"):
        make(tmp_path, docs("abc"))


def test_one_writer(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(BusyError, match="is being written by"):
        make(tmp_path, docs("abc"))


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way out."""


def test_stopped_at_every_fault_point_and_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # slow, and nothing here cuts the power
    points: list[str] = []
    with fault_hook(points.append):
        whole = make(tmp_path / "whole", docs("abcdefghijk", "lm"))
    assert "before corpus manifest" in points
    for stop in range(len(points)):
        left = stop

        def kill(_: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1

        folder = tmp_path / str(stop)
        (folder / "stale").mkdir(parents=True)
        (folder / ".tokens.npy.abc.tmp").write_bytes(b"left by a killed process")
        with fault_hook(kill), pytest.raises(Killed):
            make(folder, docs("abcdefghijk", "lm"))
        again = make(folder, docs("abcdefghijk", "lm"))
        assert again.hash == whole.hash
        assert np.array_equal(again.tokens, whole.tokens)
        assert not list(folder.glob(".*.tmp"))
        assert again.manifest == whole.manifest


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    config = CorpusConfig(row_length=8)
    table = TOKENIZER.table
    build_corpus(tmp_path, docs("abc", "", "de"), TOKENIZER, config, table=table, progress=lambda *n: told.append(n))
    assert told == [(1, 3), (1, 3), (2, 5)]


def test_a_copy_is_the_same_corpus(tmp_path: Path) -> None:
    corpus = make(tmp_path / "a", docs("abc", "de"), text=("x", "y"), max_tokens=9)
    copy = copy_corpus(corpus, tmp_path / "b")
    assert copy.folder == tmp_path / "b"
    assert copy.manifest == corpus.manifest
    assert {p.name: p.read_bytes() for p in copy.folder.iterdir()} == {
        p.name: p.read_bytes() for p in corpus.folder.iterdir()
    }
    assert copy.config == CorpusConfig(text=("x", "y"), max_tokens=9, row_length=8)
    assert copy_corpus(corpus, tmp_path / "b").hash == corpus.hash
    with pytest.raises(MismatchError, match="corpus: "):
        copy_corpus(make(tmp_path / "c", docs("zz")), tmp_path / "b")
