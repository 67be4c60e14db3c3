from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from exegete.demo.stdlib import source_files
from exegete.errors import InputError, NotFoundError
from exegete.store import source_files as reading_files
from exegete.store.sources import TextDocument, text_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("bee", encoding="utf-8")
    (tmp_path / "a.md").write_text("ay", encoding="utf-8")
    (tmp_path / "sub" / "c.py").write_bytes(b"c = 1\r\n")
    (tmp_path / "sub" / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    (tmp_path / "sub" / ".git" / "e.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / ".f.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "g.png").write_bytes(b"\x89PNG")
    return tmp_path


def texts(*patterns: object, column: str = "text") -> list[str]:
    return [document.text for document in text_documents([str(p) for p in patterns], column=column)]


def test_a_folder_is_read_to_the_bottom_and_sorted(folder: Path) -> None:
    found = list(text_documents([str(folder)]))
    assert [d.text for d in found] == ["ay", "bee", "c = 1\r\n", "one", "two"]
    assert [Path(d.key).name for d in found] == ["a.md", "b.txt", "c.py", "d.jsonl:1", "d.jsonl:3"]
    assert {d.split for d in found} == {None}


def test_order_given_globs_and_no_text_twice(folder: Path) -> None:
    assert texts(folder / "b.txt", folder / "*.md", folder / "**" / "*.py", folder) == [
        "bee", "ay", "c = 1\r\n", "one", "two",
    ]  # fmt: skip
    assert texts(folder / "b.txt", folder / "sub" / ".." / "b.txt") == ["bee"]


def test_one_pattern_may_be_a_plain_string(folder: Path) -> None:
    assert [d.text for d in text_documents(str(folder / "b.txt"))] == ["bee"]


def test_undecodable_bytes_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ok")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert texts(tmp_path) == ["caf\ufffd ok", "marked", "x"]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "text": "y"}), encoding="utf-8")
    assert texts(tmp_path, column="body") == ["x"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{bad", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"body": "x", "n": 2}', "fields: body, n; set corpus.column"),
        ('{"text": 3}', "no text in field 'text'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    documents = text_documents([str(tmp_path / "a.jsonl")])
    assert next(documents).text == "fine"
    with pytest.raises(InputError, match=r"a\.jsonl:2 .*" + words):
        next(documents)


def test_what_is_not_there_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty corpus: no text is given"):
        text_documents([])
    with pytest.raises(NotFoundError, match=r"empty corpus: no file matches .*\*\.txt"):
        text_documents([str(tmp_path / "*.txt")])
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(NotFoundError, match="holds no text"):
        text_documents([str(tmp_path)])
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.zip is not text"):
        text_documents([str(tmp_path / "a.zip")])


def test_the_standard_library_without_tests_and_tables(folder: Path) -> None:
    found = list(text_documents(["stdlib", str(folder / "b.txt"), "stdlib"]))
    assert found.pop() == TextDocument(key=(folder / "b.txt").as_posix(), text="bee")
    sides = {s.key: s.side for s in source_files()}
    for document in found:
        assert not {"test", "tests", "idle_test"}.intersection(document.key.split("/")[:-1])
        assert document.split == {"train": "train", "held_out": "test"}[sides[document.key]]
    kept = {d.key for d in found}
    assert len(kept) == len(found) > 300
    assert {"ast.py", "asyncio/events.py"} <= kept
    assert {d.split for d in found} == {"train", "test"}
    left = [k for k, side in sides.items() if side != "excluded" and k not in kept]
    assert all("test" in key for key in left)


def test_mixing_takes_the_size_of_a_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text("x" * 5000, encoding="utf-8")
    (tmp_path / "short.jsonl").write_text('{"text": "tweet"}\n' * 50, encoding="utf-8")
    taken: list[str] = []
    plain = TextDocument.size.fget  # type: ignore[attr-defined]

    def size(self: TextDocument) -> int:
        taken.append(self.key)
        return int(plain(self))

    monkeypatch.setattr(TextDocument, "size", property(size))
    found = [d.key for d in text_documents([f"1*{tmp_path / 'long.txt'}", f"1*{tmp_path / 'short.jsonl'}"])]
    assert len(found) == 51
    assert sorted(taken) == sorted(found)


def test_a_document_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_files, "_DOCUMENT_BYTES", 30)
    monkeypatch.setattr(reading_files, "_BUFFER", 7)
    limit, over = "é" * 15, "é" * 15 + "."
    (tmp_path / "a.txt").write_text(limit, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(limit.encode()))
    line = '{"text": "0123456789abcdefgh"}'
    assert len(line) == 30
    (tmp_path / "c.jsonl").write_text(f"{line}\n{line[:-2]}{chr(34)}}}", encoding="utf-8")
    with pytest.raises(InputError, match=r"c\.jsonl:1 is one document of more than 30 bytes"):  # with its line break
        texts(tmp_path)
    (tmp_path / "c.jsonl").write_text(line, encoding="utf-8")
    assert texts(tmp_path) == [limit, limit, "0123456789abcdefgh"]
    words = "is one document of more than 30 bytes, .* cut it into several files, or into the lines of a .jsonl file"
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(over.encode()))
    with pytest.raises(InputError, match=rf"b\.txt\.gz {words}"):
        texts(tmp_path)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' + b'{"text": "' + b"0" * 10_000))
    with pytest.raises(InputError, match=r"d\.jsonl\.gz:2 is one document"):
        texts(tmp_path / "d.jsonl.gz")
    (tmp_path / "z.txt").write_text(over, encoding="utf-8")
    documents = text_documents([str(tmp_path / "a.txt"), str(tmp_path / "z.txt")])
    with pytest.raises(InputError, match=rf"z\.txt {words}"):  # before anything is read
        next(documents)
