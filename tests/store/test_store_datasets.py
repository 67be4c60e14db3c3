"""Datasets, tables, packed files and id arrays as documents; weights, and text that changes behind a corpus."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets  # type: ignore[import-untyped]
import huggingface_hub
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from exegete.config import CorpusConfig
from exegete.errors import InputError, MismatchError, MissingExtraError, NotFoundError
from exegete.store import source_datasets
from exegete.store.corpus import Corpus, build_corpus
from exegete.store.sources import text_documents
from exegete.tokens import TokenTable

datasets.disable_progress_bars()
TABLE = TokenTable([bytes([i]) for i in range(256)])
ROWS: dict[str, list[Any]] = {
    "text": ["one", "two", None, "drei"],
    "n": [1, 2, 3, 4],
    "input_ids": [[1, 2], [3], [], [4, 5, 6]],
}


class ByteTokenizer:
    is_fast = False
    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}


def build(folder: Path, *patterns: object, column: str = "text", **options: Any) -> Corpus:
    given = tuple(map(str, patterns))
    config = CorpusConfig(text=given, column=column, row_length=8, **options)
    return build_corpus(folder, text_documents(given, column=column), ByteTokenizer(), config, table=TABLE)


def texts(*patterns: object, column: str = "text") -> list[str]:
    return [document.text for document in text_documents([str(p) for p in patterns], column=column)]


def ids(pattern: object, column: str) -> list[list[int]]:
    found = text_documents([str(pattern)], column=column)
    return [[] if document.ids is None else document.ids.tolist() for document in found]


def saved(folder: Path, rows: dict[str, list[Any]] = ROWS) -> Path:
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d")
    assert texts(f"hf:{folder}") == ["one", "two", "", "drei"]
    assert ids(f"hf:{folder}", "input_ids") == ROWS["input_ids"]
    found = list(text_documents([f"hf:{folder}"]))
    assert [document.key for document in found] == [f"hf:{folder}:{i}" for i in range(4)]
    with pytest.raises(InputError, match="was saved without splits; leave @test out"):
        texts(f"hf:{folder}@test")


def test_a_saved_dataset_of_several_splits(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert texts(f"hf:{tmp_path / 'd'}") == ["train"]
    assert texts(f"hf:{tmp_path / 'd'}@test", f"hf:{tmp_path / 'd'}@train", f"hf:{tmp_path / 'd'}") == ["test", "train"]
    with pytest.raises(InputError, match="has no split 'nope'; it has: test, train"):
        texts(f"hf:{tmp_path / 'd'}@nope")


def test_folders_of_data_files(tmp_path: Path) -> None:
    for name in ("lines", "table@v2"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n', encoding="utf-8")
    (tmp_path / "lines" / "test.jsonl").write_text('{"text": "z"}\n', encoding="utf-8")
    pq.write_table(pa.table(ROWS), tmp_path / "table@v2" / "train-00000-of-00001.parquet")
    assert texts(f"hf:{tmp_path / 'lines'}") == ["x", "y"]
    assert texts(f"hf:{tmp_path / 'lines'}@test") == ["z"]
    assert texts(f"hf:{tmp_path / 'table@v2'}") == ["one", "two", "", "drei"]
    with pytest.raises(InputError, match="cannot be opened: Bad split: nope") as caught:
        texts(f"hf:{tmp_path / 'lines'}@nope")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be opened: BuilderConfig 'cfg' not found"):
        texts(f"hf:{tmp_path / 'lines'}:cfg")


def test_a_dataset_of_the_hub_is_pinned_to_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    data = datasets.Dataset.from_dict(ROWS).to_iterable_dataset()

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return data

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha=f"sha of {name}"))
    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = build(tmp_path, "hf:org/name:config@validation")
    options = {"split": "validation", "streaming": True, "revision": "sha of org/name"}
    assert asked == [(("org/name", "config"), options)]
    assert [document.key for document in corpus.documents][-1] == "hf:org/name:config@validation:3"
    trace = json.loads((tmp_path / "sources.json").read_text())
    entry = {"dataset": "hf:org/name:config@validation", "revision": "sha of org/name"}
    assert trace == {"complete": True, "sources": [[entry]]}
    assert build(tmp_path, "hf:org/name:config@validation").hash == corpus.hash
    assert len(asked) == 1  # what is there is not fetched again

    def refuse(*_: Any, **__: Any) -> Any:
        raise LookupError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "dataset_info", refuse)
    with pytest.raises(InputError, match="hf:org/name cannot be opened: no network"):
        texts("hf:org/name")


def test_a_dataset_that_does_not_name_its_columns_or_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(n: int) -> Any:
        for i in range(n):
            yield {"text": f"t{i}"}
        if n > 2:
            raise ValueError("broken\nshard")

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda _: SimpleNamespace(sha="s"))
    for n in (2, 3):
        data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"n": n})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, data=data, **__: data)
        with pytest.raises(InputError, match="hf:a has no text in field 'nope'; its fields: text"):
            texts("hf:a", column="nope")
        if n == 2:
            assert texts("hf:a") == ["t0", "t1"]
        else:
            with pytest.raises(InputError, match=r"hf:a cannot be read: .*broken shard"):
                texts("hf:a")


def test_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table(ROWS), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "b.txt").write_text("bee", encoding="utf-8")
    assert texts(tmp_path) == ["one", "two", "", "drei", "bee"]
    assert ids(tmp_path / "a.parquet", "input_ids") == ROWS["input_ids"]
    talk = [{"role": "user", "content": "hi"}]
    pq.write_table(pa.table({"messages": [talk, []]}), tmp_path / "c.parquet")
    found = list(text_documents([str(tmp_path / "c.parquet")], column="messages"))
    assert [document.messages for document in found] == [tuple(talk), None]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_packed_files(tmp_path: Path, pack: Callable[[bytes], bytes], request: pytest.FixtureRequest) -> None:
    ending = request.node.callspec.id
    (tmp_path / f"a.jsonl.{ending}").write_bytes(pack(b'{"text": "x"}\n\n{"text": "y"}\n'))
    (tmp_path / f"b.txt.{ending}").write_bytes(pack("é".encode()))
    (tmp_path / f"c.png.{ending}").write_bytes(pack(b"no"))
    assert texts(tmp_path) == ["x", "y", "é"]
    whole = (tmp_path / f"b.txt.{ending}").read_bytes()
    (tmp_path / f"b.txt.{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"b\.txt\.{ending} cannot be read: "):
        texts(tmp_path / f"b.txt.{ending}")


def test_arrays_of_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    np.save(tmp_path / "flat.npy", np.arange(5))
    assert ids(tmp_path / "rows.npy", "text") == [[0, 1, 2], [3, 4, 5]]
    assert ids(tmp_path / "flat.npy", "text") == [[0, 1, 2, 3, 4]]
    corpus = build(tmp_path / "out", tmp_path / "rows.npy", tmp_path / "flat.npy", packing=True)
    assert corpus.tokens.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [2, 3, 4, 0, 0, 0, 0, 0]]
    assert [d.key.rpartition("/")[2] for d in corpus.documents] == ["rows.npy:0", "rows.npy:1", "flat.npy"]


def _text(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data)
    return path


def _array(path: Path, value: Any) -> Path:
    np.save(path, value, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("make", "column", "words"),
    [
        (lambda p: _text(p / "a.parquet"), "text", r"a\.parquet is not a readable Parquet file"),
        (lambda p: _text(p / "a.jsonl.zst"), "text", r"packed with zstd.*unpack it first: zstd -d"),
        (lambda p: _text(p / "a.tar.gz"), "text", r"a\.tar\.gz is not text"),
        (lambda p: _text(p / "a.npy.gz"), "text", r"a\.npy\.gz is not text"),
        (lambda p: _text(p / "a.npy"), "text", r"a\.npy is not a readable array"),
        (lambda p: _array(p / "a.npy", np.ones(3)), "text", "array of float64 of shape"),
        (lambda p: _array(p / "a.npy", np.ones((1, 1, 1), int)), "text", "token ids are integers"),
        (lambda p: _array(p / "a.npy", np.array([{}], object)), "text", "not a readable array"),
        (lambda p: _text(p / "a.jsonl", b'{"n": [1, true]}'), "n", "a list of bool and int; a document is"),
        (lambda p: _text(p / "a.jsonl", b'{"n": [[1]]}'), "n", "a list of list"),
        (lambda p: _text(p / "a.jsonl", b'{"n": [99999999999999999999]}'), "n", "numbers too large for token ids"),
        (lambda p: _text(p / "a.jsonl", b'{"n": {"a": 1}}'), "n", "holds no text in field 'n' but a dict"),
        (lambda p: _text(p / "a.jsonl.gz", b'{"n": 1}'), "n", r"a\.jsonl\.gz cannot be read"),
    ],
)
def test_bad_files_are_one_line_before_anything_is_tokenised(
    tmp_path: Path, make: Callable[[Path], Path], column: str, words: str
) -> None:
    good = _text(tmp_path / "0.txt", b"good")
    path = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        next(text_documents([str(good), str(path)], column=column))
    assert "\n" not in str(caught.value)


def test_missing_columns_name_those_that_exist(tmp_path: Path) -> None:
    pq.write_table(pa.table(ROWS), tmp_path / "a.parquet")
    folder = saved(tmp_path / "d")
    for source in (tmp_path / "a.parquet", f"hf:{folder}"):
        with pytest.raises(InputError, match="has no text in field 'body'; its fields: input_ids, n, text; set"):
            texts(source, column="body")
        with pytest.raises(InputError, match="holds no text in field 'n' but a int; a document is a text, a list"):
            texts(source, column="n")


def test_what_is_not_installed_is_named_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'exegete\[data\]'"):
        text_documents(["hf:org/name"])
    with pytest.raises(MissingExtraError, match=r"reading \.parquet files.*exegete\[data\]"):
        text_documents([str(_text(tmp_path / "a.parquet"))])


@pytest.mark.parametrize("name", ["hf:", "hf:./nowhere", "hf:a/b/c", "hf:../x", "hf:org/na me"])
def test_names_of_datasets(name: str) -> None:
    with pytest.raises(NotFoundError, match=r"names neither a folder nor a dataset; write hf:ORG/NAME"):
        text_documents([name])


def files(folder: Path, name: str, sizes: list[int]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": name * n}) + "\n" for n in sizes), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(8))
def test_weights_give_shares_of_bytes_within_a_document(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    names = "abcde"[: 2 + seed % 4]
    longest = {name: int(draw.integers(2, 60)) for name in names}
    sizes = {name: draw.integers(0, longest[name], 150).tolist() for name in names}
    weights = {name: round(float(draw.uniform(0.05, 3)), 2) for name in names}
    patterns = [f"{weights[name]}*{files(tmp_path, name, sizes[name])}" for name in names]
    found = texts(*patterns)
    used = dict.fromkeys(names, 0)
    for text in found:
        if any(used[name] + longest[name] > sum(sizes[name]) for name in names):
            break  # one may have ended
        if text:
            used[text[0]] += len(text)
        for name in names:
            share = weights[name] / sum(weights.values())
            assert abs(used[name] - share * sum(used.values())) <= max(longest.values())
    assert sum(used.values()) > 5 * max(longest.values())
    assert sorted(found) == sorted(name * n for name in names for n in sizes[name])
    assert found == texts(*patterns)


def test_weights_of_ids_and_of_what_has_none(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((40, 5), np.int64))  # 20 bytes each
    path = files(tmp_path, "x", [10] * 40)
    kinds = ["ids" if d.ids is not None else d.text[0] for d in text_documents([f"2*{tmp_path}/ids.npy", str(path)])]
    assert kinds[:9] == ["ids", "x", "x" if kinds[2] == "x" else "ids", *kinds[3:9]]
    assert abs(kinds[:30].count("ids") - 15) <= 1
    ended = texts(f"0.5*{files(tmp_path, 'y', [10] * 2)}", f"0.5*{path}")
    assert "".join(text[0] for text in ended) == "yxyx" + "x" * 38


def test_weights_and_globs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("20.txt", "2.md", ".md"):
        _text(tmp_path / name, name.encode())
    assert texts("2*.txt") == ["20.txt"]
    assert texts("./2*.md") == ["2.md"]
    with pytest.raises(InputError, match=r"'2\*\.md' is both a glob and 2 times '\.md'; write \./2\*\.md for the glob"):
        texts("2*.md")
    assert texts("2*./.md") == [".md"]
    with pytest.raises(NotFoundError, match="no file matches 'nothing'"):
        texts("0.5*nothing")
    for weight in ("0", "0.0", "9" * 400):
        with pytest.raises(InputError, match="must be more than 0"):
            texts(f"{weight}*20.txt")
    (tmp_path / "data").mkdir()
    _text(tmp_path / "data" / "a.txt", b"a")
    assert texts("0.7*data/*.txt", ".3*20.txt") == ["a", "20.txt"]


def test_text_that_changed_behind_a_corpus_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    a, b = files(folder, "a", [3, 4]), files(folder, "b", [5])
    corpus = build(tmp_path / "run", folder)
    os.utime(a, ns=(1, 1))
    assert build(tmp_path / "run", folder).hash == corpus.hash  # touched, yet the same bytes
    before = a.read_bytes()
    a.write_bytes(before.replace(b"aaa", b"aab"))
    with pytest.raises(MismatchError, match=r"is another now: .*a\.jsonl has changed; use another folder"):
        build(tmp_path / "run", folder)
    a.write_bytes(before + b'{"text": "more"}\n')
    with pytest.raises(MismatchError, match=r"a\.jsonl has changed"):
        build(tmp_path / "run", folder)
    a.write_bytes(before)
    _text(folder / "c.txt")
    with pytest.raises(MismatchError, match=r"c\.txt is new"):
        build(tmp_path / "run", folder)
    (folder / "c.txt").unlink()
    b.rename(folder / "d.jsonl")
    with pytest.raises(MismatchError, match=r"b\.jsonl is not where it was"):
        build(tmp_path / "run", folder)


def test_text_beyond_what_was_read_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    a, b = _text(folder / "a.txt", b"a" * 20), _text(folder / "b.txt", b"b" * 20)
    corpus = build(tmp_path / "run", folder, max_tokens=5)
    trace = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert not trace["complete"] or len(trace["sources"][0]) == 2
    big = files(tmp_path, "big", [100] * 40_000)
    part = build(tmp_path / "run2", big, max_tokens=5)
    with big.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "more"}\n')
    assert build(tmp_path / "run2", big, max_tokens=5).hash == part.hash
    big.write_bytes(big.read_bytes().replace(b"big", b"gib", 1))
    with pytest.raises(MismatchError, match=r"big\.jsonl has changed"):
        build(tmp_path / "run2", big, max_tokens=5)
    assert build(tmp_path / "run", folder, max_tokens=5).hash == corpus.hash
    assert (a.stat().st_size, b.stat().st_size) == (20, 20)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_local_dataset_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: bool) -> None:
    monkeypatch.setattr(source_datasets, "_HASHED", 1 << 30 if hashed else 0)
    folder = saved(tmp_path / "d")
    corpus = build(tmp_path / "run", f"hf:{folder}")
    assert build(tmp_path / "run", f"hf:{folder}").hash == corpus.hash
    os.utime(folder / "state.json", ns=(1, 1))
    if hashed:
        assert build(tmp_path / "run", f"hf:{folder}").hash == corpus.hash
        (folder / "state.json").write_bytes((folder / "state.json").read_bytes() + b" ")
    with pytest.raises(MismatchError, match=r"hf:.* has changed"):
        build(tmp_path / "run", f"hf:{folder}")


def test_many_sources_leave_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in range(30):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
        pq.write_table(pa.table(ROWS), tmp_path / f"{i}.parquet")
    stream = text_documents([str(tmp_path)])
    assert sum(1 for _ in stream) == 30 * 5
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 5
