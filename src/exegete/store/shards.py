"""Immutable shards: the firings of some rows and some latents, sorted by latent, in one memory-mapped file.

Layout, little-endian, every part padded with zeros to a multiple of 64 bytes:

- header: magic ``EXEGSHRD``, uint32 format number, uint32 length of the header, SHA-256 of the other header bytes,
  JSON (``row_start``, ``n_rows``, ``row_length``, ``latent_start``, ``n_latents``, ``n_firings``, ``n_excluded``,
  ``bits``, ``values``, ``digests``: the SHA-256 of each part below);
- offsets: uint32 [n_latents · blocks + 1], where each latent's firings in each block of 2^bits positions begin;
- positions: uint16 or uint32 (``bits``) [n_firings], ``row in shard · row_length + position`` modulo 2^bits, ascending
  within a latent and block;
- values: uint16 [n_firings] (see ``values.py``);
- excluded: uint64 [n_excluded], positions in the shard at which firings do not count, ascending.

Sixteen bits a position make a firing cost little over four bytes. Rows of several shards make a store by being
listed; nothing in a shard refers to the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from exegete.errors import CorruptError, InputError
from exegete.files import atomic_file, canonical_json
from exegete.store.checks import verify_once
from exegete.store.values import ENCODING
from exegete.types import Array

FORMAT = 2
MAX_FIRINGS = 2**32 - 1
"""Most firings of one shard: offsets are uint32."""

_MAGIC = b"EXEGSHRD"
_ALIGN = 64
_PREAMBLE = struct.Struct("<8sII32s")
_PARTS = ("offsets", "positions", "codes", "excluded")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ShardShape:
    """What a shard covers and how large its parts are; ``bits`` is 16 or 32."""

    row_start: int
    n_rows: int
    row_length: int
    latent_start: int
    n_latents: int
    n_firings: int
    n_excluded: int
    bits: int

    @property
    def blocks(self) -> int:
        """Blocks of 2^bits positions."""
        return max(1, -(-(self.n_rows * self.row_length) >> self.bits))

    @property
    def types(self) -> tuple[str, str, str, str]:
        """Data types of the parts."""
        return "<u4", "<u2" if self.bits == 16 else "<u4", "<u2", "<u8"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of the parts, without padding."""
        narrow = 2 if self.bits == 16 else 4
        n = self.n_firings
        return 4 * (self.n_latents * self.blocks + 1), narrow * n, 2 * n, 8 * self.n_excluded

    @classmethod
    def fitting(cls, **fields: int) -> ShardShape:
        """Return the shape whose file is the smaller: narrow positions, or one block of wide ones."""
        narrow, wide = (cls(**fields, bits=bits) for bits in (16, 32))
        return narrow if sum(narrow.sizes) <= sum(wide.sizes) else wide


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard: its parts, memory-mapped, as the module says."""

    shape: ShardShape
    sha256: str
    offsets: Array
    positions: Array
    codes: Array
    excluded: Array

    def counts(self) -> Array:
        """Return the firings of each of its latents, int64 [n_latents]."""
        ends = self.offsets[:: self.shape.blocks].astype(np.int64)
        counts: Array = np.diff(ends)
        return counts

    def piece(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return counts int64 [stop − start], positions int64 and codes of latents ``start`` to ``stop``.

        Positions are counted from the shard's first row. Latents outside the shard have none.
        """
        shape = self.shape
        first = min(max(start - shape.latent_start, 0), shape.n_latents)
        last = min(max(stop - shape.latent_start, first), shape.n_latents)
        ends = self.offsets[first * shape.blocks : last * shape.blocks + 1].astype(np.int64)
        inside = slice(int(ends[0]), int(ends[-1]))
        positions = self.positions[inside].astype(np.int64)
        if shape.blocks > 1:
            block = np.tile(np.arange(shape.blocks, dtype=np.int64) << shape.bits, last - first)
            positions += np.repeat(block, np.diff(ends))
        counts: Array = np.zeros(stop - start, np.int64)
        at = shape.latent_start + first - start
        counts[at : at + last - first] = np.diff(ends[:: shape.blocks])
        return counts, positions, np.array(self.codes[inside])


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
        self._excluded: list[Array] = []

    def add(self, counts: Array, latents: Array, codes: Array, excluded: Array | None = None) -> None:
        """Append whole rows.

        ``counts`` [rows · row_length] firings at each position, ``latents`` and ``codes`` [sum of counts] in position
        order; ``excluded`` flat positions within these rows at which firings do not count, ascending. Raises
        InputError for a latent outside the width, or when the shard gets too large.
        """
        rows, rest = divmod(len(counts), self.row_length)
        if rest or int(counts.sum()) != len(latents) or len(latents) != len(codes):
            raise InputError("a shard takes whole rows, with as many latents and values as the counts add up to")
        if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < self.width:
            raise InputError(f"latents lie in 0 … {self.width - 1}, got {int(latents.min())} … {int(latents.max())}")
        if excluded is not None and len(excluded):
            self._excluded.append(excluded.astype(np.uint64) + np.uint64(self.n_rows * self.row_length))
        self.n_rows += rows
        self.n_firings += len(latents)
        if max(self.n_firings, self.n_rows * self.row_length) >= 2**31:
            raise InputError("a shard begins with fewer than 2^31 positions and firings; set a smaller shard size")
        self._counts.append(counts.astype(np.int32, copy=False))
        self._latents.append(latents.astype(np.int32, copy=False))
        self._codes.append(codes.astype(np.uint16, copy=False))

    def sorted_by_latent(self) -> tuple[Array, Array, Array]:
        """Return offsets [width + 1], positions and codes, latent by latent: one counting sort, in C.

        Raises InputError when a latent has two firings at one position. The firings are used up.
        """
        from scipy import sparse

        starts = np.zeros(self.n_rows * self.row_length + 1, np.int32)
        np.cumsum(_joined(self._counts, np.int32), out=starts[1:])
        shape = (len(starts) - 1, self.width)
        codes, latents = _joined(self._codes, np.uint16), _joined(self._latents, np.int32)
        self._counts, self._codes, self._latents = [], [], []
        by_latent = sparse.csr_matrix((codes, latents, starts), shape=shape).tocsc()
        offsets, positions = by_latent.indptr, by_latent.indices
        repeated = positions[1:] == positions[:-1]
        if repeated.any():
            at = np.flatnonzero(repeated) + 1
            inside = at[~np.isin(at, offsets)]
            if len(inside):
                latent = int(np.searchsorted(offsets, inside[0], side="right")) - 1
                raise InputError(f"the coder gave latent {latent} twice at one position; encode must list each once")
        return offsets, positions, by_latent.data

    def write(self, path: Path) -> str:
        """Write the shard atomically and return its checksum."""
        excluded = _joined(self._excluded, np.uint64)
        shape = ShardShape.fitting(
            row_start=self.row_start,
            n_rows=self.n_rows,
            row_length=self.row_length,
            latent_start=0,
            n_latents=self.width,
            n_firings=self.n_firings,
            n_excluded=len(excluded),
        )
        offsets, positions, codes = self.sorted_by_latent()
        with ShardWriter.open(path, shape) as writer:
            writer.append(np.diff(offsets), positions, codes)
            return writer.finish(excluded)


@final
class ShardWriter:
    """Writes a shard from runs of latents in order, holding one run at a time. Made by ``open``."""

    def __init__(self, stream: BinaryIO, shape: ShardShape) -> None:
        self.shape = shape
        self._stream = stream
        self._digests = [hashlib.sha256() for _ in _PARTS]
        self._header_length = len(_header(shape, ["0" * 64] * len(_PARTS)))
        starts = [self._header_length]
        for size in shape.sizes:
            starts.append(starts[-1] + _aligned(size))
        self._cursors, self._end = starts[:-1], starts[-1]
        self._n_firings = 0
        self._put(0, np.zeros(1, np.uint32))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, shape: ShardShape) -> Iterator[ShardWriter]:
        """Open a shard for writing; it exists, whole, when the context ends without an exception."""
        with atomic_file(path) as stream:
            yield cls(stream, shape)

    def append(self, counts: Array, positions: Array, codes: Array) -> None:
        """Append the firings of the next latents.

        ``counts`` [latents], ``positions`` (from the shard's first row) and ``codes`` [sum of counts], latent by
        latent, positions ascending.
        """
        shape = self.shape
        ends = self._n_firings + np.cumsum(counts, dtype=np.int64)
        if shape.blocks > 1:
            latent = np.repeat(np.arange(len(counts), dtype=np.int64) * shape.blocks, counts)
            latent += positions >> shape.bits
            ends = self._n_firings + np.cumsum(np.bincount(latent, minlength=len(counts) * shape.blocks))
        self._put(0, ends.astype(np.uint32))
        self._put(1, positions.astype(shape.types[1]))
        self._put(2, codes)
        self._n_firings += len(positions)

    def finish(self, excluded: Array) -> str:
        """Write what is left and the header; return the shard's checksum."""
        if self._n_firings != self.shape.n_firings or len(excluded) != self.shape.n_excluded:
            raise RuntimeError("a shard was given another number of firings than it was opened for")
        self._put(3, excluded)
        digests = [digest.hexdigest() for digest in self._digests]
        self._stream.truncate(self._end)
        self._stream.seek(0)
        header = _header(self.shape, digests)
        self._stream.write(header)
        self._stream.seek(0, 2)
        return _checksum(digests)

    def _put(self, part: int, data: Array) -> None:
        raw: Any = np.ascontiguousarray(data, dtype=self.shape.types[part]).view(np.uint8)
        self._digests[part].update(raw)
        self._stream.seek(self._cursors[part])
        self._stream.write(raw)
        self._cursors[part] += len(raw)


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
    """Map a shard into memory, checking the header always and the parts once per process.

    Raises CorruptError naming the file when it is missing, cut short or damaged, and InputError for another format.
    """
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing; collect again") from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    shape, digests, start = _read_header(path, raw)
    starts = [start]
    for size in shape.sizes:
        starts.append(starts[-1] + _aligned(size))
    if starts[-1] != len(raw):
        raise CorruptError(f"{path} is {len(raw)} bytes long and should be {starts[-1]}; collect again")
    parts = []
    for at, end, size, digest, kind in zip(starts, starts[1:], shape.sizes, digests, shape.types, strict=False):
        verify_once(path, digest, start=at, stop=at + size)
        if raw[at + size : end].any():
            raise CorruptError(f"{path} is damaged: its padding is not empty; collect again")
        parts.append(raw[at : at + size].view(kind))
    return Shard(
        shape=shape,
        sha256=_checksum(digests),
        offsets=parts[0],
        positions=parts[1],
        codes=parts[2],
        excluded=parts[3],
    )


def gather(pieces: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    """Join the firings of the same latents from consecutive rows: counts, positions and codes, latent by latent.

    ``pieces`` are what ``Shard.piece`` gives, positions already counted from a common row.
    """
    if len(pieces) == 1:
        return pieces[0]
    counts: Array = np.add.reduce([piece[0] for piece in pieces], axis=0, dtype=np.int64)
    total = int(counts.sum())
    positions, codes = np.empty(total, np.int64), np.empty(total, np.uint16)
    free: Array = np.cumsum(counts) - counts
    for own, at, values in pieces:
        begins = np.cumsum(own) - own
        target = np.repeat(free - begins, own) + np.arange(len(at))
        positions[target], codes[target] = at, values
        free += own
    return counts, positions, codes


def _header(shape: ShardShape, digests: list[str]) -> bytes:
    fields = {name: getattr(shape, name) for name in shape.__slots__}
    text = canonical_json({**fields, "values": ENCODING, "digests": digests}).encode()
    length = _aligned(_PREAMBLE.size + len(text))
    text = text.ljust(length - _PREAMBLE.size, b"\0")
    return _PREAMBLE.pack(_MAGIC, FORMAT, length, _digest(FORMAT, length, text)) + text


def _digest(number: int, length: int, text: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<8sII", _MAGIC, number, length) + text).digest()


def _checksum(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_header(path: Path, raw: Array) -> tuple[ShardShape, list[str], int]:
    """Return the shard's shape, the digests of its parts, and the header's length in bytes."""
    damaged = CorruptError(f"{path} is damaged: its header fails its checksum; collect again")
    if len(raw) < _PREAMBLE.size:
        raise damaged
    magic, number, length, digest = _PREAMBLE.unpack(raw[: _PREAMBLE.size].tobytes())
    text = raw[_PREAMBLE.size : length].tobytes()
    if magic != _MAGIC or length > len(raw) or _digest(number, length, text) != digest:
        raise damaged
    if number != FORMAT:
        raise InputError(f"{path} has shard format {number}, this version reads {FORMAT}; collect again with it")
    fields: dict[str, Any] = json.loads(text.rstrip(b"\0"))
    shape = ShardShape(**{name: int(fields[name]) for name in ShardShape.__slots__})
    return shape, [str(part) for part in fields["digests"]], int(length)


def _joined(parts: list[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
