"""Immutable shards: the firings of a range of rows, sorted by latent, in one memory-mapped file.

Layout, little-endian, every part padded with zeros to a multiple of 64 bytes:

- header: magic ``EXEGSHRD``, uint32 format number, uint32 length of the header, SHA-256 of the other header bytes,
  JSON (``row_start``, ``n_rows``, ``row_length``, ``width``, ``n_firings``, ``values``, ``sha256`` of the payload);
- payload: uint32 offsets [width + 1]; uint32 positions [n_firings], ``row in shard · row_length + position``,
  ascending within a latent; uint16 values [n_firings] (see ``values.py``).

Rows of several shards make a store by being listed; nothing in a shard refers to the others.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from exegete.errors import CorruptError, InputError
from exegete.files import atomic_file, canonical_json
from exegete.store.checks import verify_once
from exegete.store.values import ENCODING
from exegete.types import Array

FORMAT = 1
MAX_FIRINGS = 2**31 - 1
"""Most firings, and most positions, of one shard: scipy's counting sort works in int32."""

_MAGIC = b"EXEGSHRD"
_ALIGN = 64
_PREAMBLE = struct.Struct("<8sII32s")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard: ``offsets`` [width + 1] uint32, ``positions`` and ``codes`` [n_firings], all memory-mapped."""

    row_start: int
    n_rows: int
    row_length: int
    width: int
    n_firings: int
    sha256: str
    offsets: Array
    positions: Array
    codes: Array


@final
class ShardBuilder:
    """The firings of one shard under construction, held in memory until ``write``."""

    def __init__(self, *, row_start: int, row_length: int, width: int) -> None:
        self.row_start = row_start
        self.row_length = row_length
        self.width = width
        self.n_rows = 0
        self.n_firings = 0
        self._counts: list[Array] = []
        self._latents: list[Array] = []
        self._codes: list[Array] = []

    def add(self, counts: Array, latents: Array, codes: Array) -> None:
        """Append whole rows.

        ``counts`` [rows · row_length] firings at each position, ``latents`` and ``codes`` [sum of counts] in position
        order. Raises InputError for a latent outside the width, or when the shard gets too large.
        """
        rows, rest = divmod(len(counts), self.row_length)
        if rest or int(counts.sum()) != len(latents) or len(latents) != len(codes):
            raise InputError("a shard takes whole rows, with as many latents and values as the counts add up to")
        if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < self.width:
            raise InputError(f"latents lie in 0 … {self.width - 1}, got {int(latents.min())} … {int(latents.max())}")
        self.n_rows += rows
        self.n_firings += len(latents)
        if max(self.n_firings, self.n_rows * self.row_length) > MAX_FIRINGS:
            raise InputError("a shard holds fewer than 2^31 positions and firings; set a smaller collect.shard_rows")
        self._counts.append(counts.astype(np.int32))
        self._latents.append(latents.astype(np.int32))
        self._codes.append(codes.astype(np.uint16, copy=False))

    def sorted_by_latent(self) -> tuple[Array, Array, Array]:
        """Return offsets, positions and codes, latent by latent: one counting sort, in C.

        Raises InputError when a latent has two firings at one position.
        """
        from scipy import sparse

        starts = np.zeros(self.n_rows * self.row_length + 1, np.int32)
        np.cumsum(_joined(self._counts, np.int32), out=starts[1:])
        shape = (len(starts) - 1, self.width)
        by_position = sparse.csr_matrix(
            (_joined(self._codes, np.uint16), _joined(self._latents, np.int32), starts), shape=shape
        )
        by_latent = by_position.tocsc()
        offsets, positions = by_latent.indptr.astype(np.uint32), by_latent.indices.astype(np.uint32)
        repeated = positions[1:] == positions[:-1]
        if repeated.any():
            at = np.flatnonzero(repeated) + 1
            inside = at[~np.isin(at, offsets)]
            if len(inside):
                latent = int(np.searchsorted(offsets, inside[0], side="right")) - 1
                raise InputError(f"the coder gave latent {latent} twice at one position; encode must list each once")
        return offsets, positions, by_latent.data

    def write(self, path: Path) -> str:
        """Write the shard atomically and return the SHA-256 of its payload."""
        payload = [_padded(part.tobytes()) for part in self.sorted_by_latent()]
        digest = hashlib.sha256()
        for part in payload:
            digest.update(part)
        fields = {
            "row_start": self.row_start,
            "n_rows": self.n_rows,
            "row_length": self.row_length,
            "width": self.width,
            "n_firings": self.n_firings,
            "values": ENCODING,
            "sha256": digest.hexdigest(),
        }
        with atomic_file(path) as stream:
            stream.write(_header(fields))
            for part in payload:
                stream.write(part)
        return digest.hexdigest()


@final
class OpenShards:
    """Shards of one folder, opened when first read; the least recently used maps are closed beyond ``limit``."""

    def __init__(self, folder: Path, *, limit: int = 64) -> None:
        self._folder = folder
        self._limit = limit
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, file: str, sha256: str) -> Shard:
        """Return a shard; raises CorruptError when it is missing, damaged, or not the one with this checksum."""
        with self._lock:
            shard = self._open.get(file)
            if shard is None:
                shard = open_shard(self._folder / file)
                if shard.sha256 != sha256:
                    raise CorruptError(f"{self._folder / file} is not the shard its manifest lists; collect again")
                self._open[file] = shard
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)
            self._open.move_to_end(file)
            return shard


def open_shard(path: Path) -> Shard:
    """Map a shard into memory, checking the header always and the payload once per process.

    Raises CorruptError naming the file when it is missing, cut short or damaged, and InputError for another format.
    """
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing; collect again") from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    fields, start = _read_header(path, raw)
    width, n = int(fields["width"]), int(fields["n_firings"])
    sizes = [4 * (width + 1), 4 * n, 2 * n]
    starts = [start]
    for size in sizes:
        starts.append(starts[-1] + _aligned(size))
    if starts[-1] != len(raw):
        raise CorruptError(f"{path} is {len(raw)} bytes long and should be {starts[-1]}; collect again")
    verify_once(path, str(fields["sha256"]), start=start)
    parts = [raw[at : at + size] for at, size in zip(starts, sizes, strict=False)]
    return Shard(
        row_start=int(fields["row_start"]),
        n_rows=int(fields["n_rows"]),
        row_length=int(fields["row_length"]),
        width=width,
        n_firings=n,
        sha256=str(fields["sha256"]),
        offsets=parts[0].view("<u4"),
        positions=parts[1].view("<u4"),
        codes=parts[2].view("<u2"),
    )


def _header(fields: dict[str, Any]) -> bytes:
    text = canonical_json(fields).encode()
    length = _aligned(_PREAMBLE.size + len(text))
    text = text.ljust(length - _PREAMBLE.size, b"\0")
    return _PREAMBLE.pack(_MAGIC, FORMAT, length, _digest(FORMAT, length, text)) + text


def _digest(number: int, length: int, text: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<8sII", _MAGIC, number, length) + text).digest()


def _read_header(path: Path, raw: Array) -> tuple[dict[str, Any], int]:
    """Return the header's fields and its length in bytes."""
    damaged = CorruptError(f"{path} is damaged: its header fails its checksum; collect again")
    if len(raw) < _PREAMBLE.size:
        raise damaged
    magic, number, length, digest = _PREAMBLE.unpack(raw[: _PREAMBLE.size].tobytes())
    text = raw[_PREAMBLE.size : length].tobytes()
    if magic != _MAGIC or length > len(raw) or _digest(number, length, text) != digest:
        raise damaged
    if number != FORMAT:
        raise InputError(f"{path} has shard format {number}, this version reads {FORMAT}; update exegete")
    fields: dict[str, Any] = json.loads(text.rstrip(b"\0"))
    return fields, int(length)


def _joined(parts: list[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")
