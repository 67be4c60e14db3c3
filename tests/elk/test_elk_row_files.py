"""Extractions written and read some rows at a time: the bytes of the library, and never everything in memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from exegete.elk import Encoded, Extraction, extract, extract_to, load_extraction, save_extraction
from exegete.elk.row_files import RowFile, read_row_file
from exegete.elk.stored_extraction import has_split
from exegete.errors import BusyError, CorruptError, InputError, MismatchError
from exegete.files import RunLock, atomic_file
from exegete.types import Array

NAMES = ("last/-1", "last/10", "last/2", "log_odds", "pair/0", "state-pair/1", "state/1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(
    st.integers(0, 7),
    st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=len(NAMES)),
    st.lists(st.integers(0, 3), max_size=7),
)
def test_rows_in_any_batches_give_the_bytes_of_the_library(
    place: Path, n: int, shapes: list[list[int]], batches: list[int]
) -> None:
    draw = np.random.default_rng(n)
    arrays: dict[str, Array] = {
        name: draw.standard_normal((n, *shape)).astype(np.float32) for name, shape in zip(NAMES, shapes, strict=False)
    }
    of = np.array([batches[i] if i < len(batches) else 0 for i in range(n)], np.int64)
    with atomic_file(place / "a.safetensors") as stream:
        file = RowFile(stream, {name: x.shape for name, x in arrays.items()})
        for batch in np.unique(of):
            rows = np.flatnonzero(of == batch)
            for name, x in arrays.items():
                file.put(name, rows, x[rows])
    data = (place / "a.safetensors").read_bytes()
    assert data == save({name: torch.from_numpy(x) for name, x in arrays.items()})
    again = read_row_file(place / "a.safetensors")
    assert set(again) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x)


def written(path: Path, head: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("entry", "size", "told"),
    [
        ({"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}, 8, "not F32"),
        ({"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, 4, "not F32"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, 0, "F32"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, 4, "another number of bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, 4, "long and should be"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, entry: dict[str, Any], size: int, told: str) -> None:
    with pytest.raises(CorruptError, match=told):
        read_row_file(written(tmp_path / "a.safetensors", {"log_odds": entry}, bytes(size)))


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with pytest.raises(CorruptError, match="NaN or infinity"):
        read_row_file(written(tmp_path / "a.safetensors", {"a": entry}, struct.pack("<2f", 1.0, float("nan"))))


def rows_of(toys: Any, n: int = 30) -> Encoded:
    data: Encoded = toys.rows(n, lengths=(2, 3, 5))
    return data


def test_writing_as_rows_come_is_extracting_and_saving(toys: Any, tmp_path: Path) -> None:
    subject, data = toys.subject("mamba"), rows_of(toys)
    key = {"subject": subject.hash}
    found = extract(subject, data, features=("last", "pair", "state"), tokens_at_once=20)
    save_extraction(found, tmp_path / "saved", "test", key=key)
    came = extract_to(
        subject, data, tmp_path / "came", "test", key=key, features=("last", "pair", "state"), tokens_at_once=20
    )
    held = {f"{kind}/{at}": torch.from_numpy(x) for kind, sites in found.features.items() for at, x in sites.items()}
    slow = save({**held, "log_odds": torch.from_numpy(found.log_odds)})
    for folder in ("saved", "came"):
        assert (tmp_path / folder / "test.safetensors").read_bytes() == slow
        for name in ("test.json", "extraction.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    for kind, sites in came.features.items():
        for at, x in sites.items():
            assert isinstance(x.base, np.memmap)
            np.testing.assert_array_equal(x, found.features[kind][at])
    # What is mapped can be saved again, and rows of it taken.
    save_extraction(came, tmp_path / "again", "test", key=key)
    assert (tmp_path / "again" / "test.safetensors").read_bytes() == slow
    np.testing.assert_array_equal(came.take(np.array([3, 1])).features["last"][0], found.features["last"][0][[3, 1]])


def test_the_model_is_known_whatever_the_key_says(toys: Any, tmp_path: Path) -> None:
    subject, data = toys.subject("llama"), rows_of(toys, 4)
    found = extract(subject, data, features=("last",))
    save_extraction(found, tmp_path / "held", "test", key={"note": 1})
    assert load_extraction(tmp_path / "held", "test").subject == subject.hash
    assert has_split(tmp_path / "held", "test", key={"note": 1}, data=data.hash)
    assert extract_to(subject, data, tmp_path / "came", "test", key={}, features=("last",)).subject == subject.hash
    for key in ({"note": 2}, {"note": 1, "subject": "other"}):
        with pytest.raises(MismatchError):
            save_extraction(found, tmp_path / "held", "validation", key=key)


def test_memory_does_not_grow_with_the_rows(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features of 16 MB, written and read with blocks of 64 KB, no megabyte is ever held."""
    import exegete.elk.row_files as row_files

    monkeypatch.setattr(row_files, "_AT_ONCE", 1 << 16)
    facts = toys.facts(100)
    file = tmp_path / "wide.bin"
    wide = np.memmap(file, np.float32, mode="w+", shape=(200, 20_000))
    wide[:] = np.arange(200, dtype=np.float32)[:, None]
    log_odds = np.zeros(200, np.float32)
    found = Extraction(subject="s", data="d", facts=facts, log_odds=log_odds, features={"state": {1: wide}})
    tracemalloc.start()
    try:
        save_extraction(found, tmp_path / "held", "test", key={})
        again = load_extraction(tmp_path / "held", "test")
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    assert again.features["state"][1].nbytes == 16_000_000
    np.testing.assert_array_equal(again.features["state"][1][:, -1], np.arange(200))


def test_batches_are_bounded_by_the_bytes_of_their_features(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import exegete.elk.extraction as extraction

    subject, data = toys.subject("mamba"), rows_of(toys)
    whole = extract(subject, data, features=("state",))
    row = 4 * sum(x.shape[1] for x in whole.features["state"].values())
    monkeypatch.setattr(extraction, "_BATCH_BYTES", 3 * row)
    reading = extraction.Reading(subject, data, features=("state",))
    sizes = [len(rows) for rows, _, _ in reading.batches()]
    assert max(sizes) == 3
    assert sum(sizes) == len(data)
    for at, x in extract(subject, data, features=("state",)).features["state"].items():
        np.testing.assert_allclose(x, whole.features["state"][at], atol=1e-5)


def test_too_little_room_and_another_writer_are_refused(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, data = toys.subject("mamba"), rows_of(toys, 4)
    with RunLock(tmp_path / "busy"), pytest.raises(BusyError, match="being written"):
        extract_to(subject, data, tmp_path / "busy", "test", key={})
    assert not list((tmp_path / "busy").glob("*.safetensors"))

    class Disk:
        free = 1000

    monkeypatch.setattr("exegete.elk.stored_extraction.shutil.disk_usage", lambda _: Disk)
    with pytest.raises(InputError, match="free; take fewer rows"):
        extract_to(subject, data, tmp_path / "new" / "folder", "test", key={})
    assert not (tmp_path / "new").exists()
