"""Files are whole or absent, and one process writes a run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exegete import files
from exegete.errors import BusyError, CorruptError, InputError, NotFoundError


class Stop(BaseException):
    """A stop that no handler of errors may swallow."""


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    seen: list[str] = []
    with files.fault_hook(seen.append):
        files.write_text(path, "new")
    assert seen == ["flush a.txt", "before rename a.txt", "after rename a.txt"]
    for point, expected in zip(seen, ["new", "new", "newer"], strict=True):

        def stop(name: str, point: str = point) -> None:
            if name == point:
                raise Stop

        with pytest.raises(Stop), files.fault_hook(stop):
            files.write_text(path, "newer")
        assert path.read_text() == expected
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_and_arrays_round_trip(tmp_path: Path) -> None:
    files.write_json(tmp_path / "sub" / "a.json", {"b": [1, 2.5, None]})
    assert files.read_json(tmp_path / "sub" / "a.json") == {"b": [1, 2.5, None]}
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    files.write_array(tmp_path / "a.npy", array[:, ::2])
    assert np.array_equal(files.read_array(tmp_path / "a.npy"), array[:, ::2])
    assert isinstance(files.read_array(tmp_path / "a.npy"), np.memmap)


def test_pickles_and_damage_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptError, match=r"evil\.npy"):
        files.read_array(tmp_path / "evil.npy")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CorruptError, match=r"b\.json"):
        files.read_json(tmp_path / "b.json")
    with pytest.raises(NotFoundError):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(NotFoundError):
        files.read_array(tmp_path / "none.npy")


def test_canonical_json_ignores_order_and_refuses_nan() -> None:
    assert files.hash_json({"a": 1, "b": 2}) == files.hash_json({"b": 2, "a": 1})
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 2})
    assert files.canonical_json({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json(float("nan"))


def test_file_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("name", ["layers.2", "layers.2@random-coder", "a", "_x"])
def test_good_names(name: str) -> None:
    assert files.safe_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\\b", "-x", "a..b", "a b", "x" * 121, "é"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        files.safe_name(name)


def test_a_second_writer_is_told_who_holds_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from exegete.files import RunLock;RunLock(Path(sys.argv[1])).__enter__()"
    )
    with files.RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
        with pytest.raises(BusyError, match=f"process {os.getpid()}"):
            files.RunLock(tmp_path).__enter__()
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()}" in other.stderr
    with files.RunLock(tmp_path):
        pass


def test_the_hook_is_restored() -> None:
    seen: list[str] = []
    with files.fault_hook(seen.append):
        files.fault_point("one")
    files.fault_point("two")
    assert seen == ["one"]
    assert json.loads(files.canonical_json(seen)) == ["one"]


def test_settings_of_strangers_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert files.read_json(path, most_bytes=8) == {"a": 1}
    with pytest.raises(CorruptError, match=r"config\.json is larger than the 7 bytes"):
        files.read_json(path, most_bytes=7)
    with path.open("wb") as stream:
        stream.truncate((1 << 26) + 1)  # a hole: takes no space
    with pytest.raises(CorruptError, match="larger than the 67108864 bytes"):
        files.read_json(path)
    path.write_text('{"a":' * 100_000)
    with pytest.raises(CorruptError, match=r"config\.json does not parse as JSON: .*recursion"):
        files.read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(CorruptError, match="does not parse"):
        files.read_json(path)
    with pytest.raises(CorruptError, match="cannot be read"):
        files.read_json(tmp_path)


def test_a_file_that_does_not_tell_its_size_is_bounded_too(tmp_path: Path) -> None:
    os.symlink("/dev/zero", tmp_path / "config.json")
    with pytest.raises(CorruptError, match="larger than the 100 bytes"):
        files.read_json(tmp_path / "config.json", most_bytes=100)


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: object) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, "Permission denied", "/there/.a.json.x.tmp")

    monkeypatch.setattr("exegete.files.tempfile.mkstemp", refused)
    with pytest.raises(PermissionError) as error:
        files.write_text(tmp_path / "a.json", "")
    assert error.value.filename == str(tmp_path / "a.json")
