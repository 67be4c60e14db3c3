"""A safetensors file written piece by piece, so that no tensor need be in memory whole.

The format: the length of a JSON header in 8 bytes, little-endian; the header, which gives every tensor's type, shape
and place; then the data of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from exegete.types import Array

TYPES = {"<i8": "I64", "<u4": "U32", "<u2": "U16", "<f4": "F32", "<f2": "F16"}


@final
class TensorFile:
    """Tensors of known types and shapes, each filled front to back by ``append``; ``finish`` says that all is there.

    ``stream`` must be seekable and empty. ``tensors`` maps names to numpy types and shapes.
    """

    def __init__(self, stream: BinaryIO, tensors: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]]) -> None:
        self._stream = stream
        self._types = {name: np.dtype(kind).newbyteorder("<") for name, (kind, _) in tensors.items()}
        header: dict[str, Any] = {}
        self._free: dict[str, int] = {}
        self._end: dict[str, int] = {}
        begin = 0
        # The widest first, so that every tensor begins at a multiple of its items' size.
        for name in sorted(tensors, key=lambda name: (-self._types[name].itemsize, name)):
            kind, shape = self._types[name], tensors[name][1]
            end = begin + math.prod(shape) * kind.itemsize
            header[name] = {"dtype": TYPES[kind.str], "shape": list(shape), "data_offsets": [begin, end]}
            self._free[name], self._end[name] = begin, end
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
        self._base = 8 + len(text)

    def append(self, name: str, values: Array) -> None:
        """Write the next items of a tensor, in the order of its memory."""
        data = np.ascontiguousarray(values, dtype=self._types[name])
        if self._free[name] + data.nbytes > self._end[name]:
            raise ValueError(f"tensor {name!r} is given more items than its shape has")
        self._stream.seek(self._base + self._free[name])
        self._stream.write(data.tobytes())
        self._free[name] += data.nbytes

    def finish(self) -> None:
        """Check that every tensor is full."""
        short = [name for name, free in self._free.items() if free != self._end[name]]
        if short:
            raise ValueError(f"tensors {short} are not full")
