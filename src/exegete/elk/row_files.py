"""Arrays of rows in one safetensors file, written some rows at a time and read as memory maps: never all in memory.

The file has the very bytes that the safetensors library writes for the same arrays: a header of names in order, then
each array, row by row.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final, final

import numpy as np

from exegete.coders.weights import header
from exegete.errors import CorruptError
from exegete.types import Array

_TYPE: Final = np.dtype("<f4")
_AT_ONCE: Final = 1 << 24
Shape = tuple[int, ...]


@final
class RowFile:
    """A file of float32 arrays under way, each of as many rows.

    Args:
        stream: A file open for writing (``files.atomic_file``); nothing else may be written to it.
        shapes: The whole shape of each array, rows first.
    """

    def __init__(self, stream: BinaryIO, shapes: Mapping[str, Shape]) -> None:
        self._handle = stream.fileno()
        entries, end = {}, 0
        self._starts: dict[str, int] = {}
        for name in sorted(shapes):
            begin, end = end, end + _bytes(shapes[name])
            self._starts[name] = begin
            entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
        head = json.dumps(entries, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self._start = 8 + len(head)
        os.ftruncate(self._handle, self._start + end)
        self._write(struct.pack("<Q", len(head)) + head, 0)

    def put(self, name: str, rows: Array, values: Array) -> None:
        """Write ``values`` [m, …] as the rows [m] of an array, given in ascending order."""
        size = values[:1].size * _TYPE.itemsize
        step = max(1, _AT_ONCE // max(1, size))
        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for first, end in itertools.pairwise(cuts):
            for at in range(first, end, step):
                part = np.ascontiguousarray(values[at : min(at + step, end)], _TYPE)
                self._write(part.tobytes(), self._start + self._starts[name] + int(rows[at]) * size)

    def _write(self, data: bytes, at: int) -> None:
        while data:
            done = os.pwrite(self._handle, data, at)
            data, at = data[done:], at + done


def read_row_file(path: Path) -> dict[str, Array]:
    """Return the arrays of a file by name, float32, as read-only memory maps.

    Raises CorruptError for a damaged file, arrays of another type, or what is no number.
    """
    with path.open("rb") as stream:
        known = header(stream, str(path))
        stream.seek(0)
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    found: dict[str, Array] = {}
    for name, info in known.items():
        begin = entries[name]["data_offsets"][0]
        if info.dtype != "F32" or not info.shape or begin < 0:
            raise CorruptError(f"{path}: {name} is {info.dtype} {list(info.shape)}, not F32 [rows, …]")
        found[name] = _mapped(path, 8 + length + int(begin), info.shape)
        if not _finite(found[name]):
            raise CorruptError(f"{path}: {name} holds NaN or infinity")
    return found


def _mapped(path: Path, offset: int, shape: Shape) -> Array:
    if not _bytes(shape):  # nothing can be mapped of no bytes
        return np.zeros(shape, _TYPE)
    found: Array = np.asarray(np.memmap(path, _TYPE, mode="r", offset=offset, shape=shape))
    return found


def _finite(x: Array) -> bool:
    step = max(1, _AT_ONCE // max(1, x[:1].nbytes))
    return all(bool(np.isfinite(x[at : at + step]).all()) for at in range(0, len(x), step))


def _bytes(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _TYPE.itemsize
