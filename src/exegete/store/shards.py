"""Immutable shards: the firings of some rows and some latents, sorted by latent, in one memory-mapped file.

Layout, little-endian, every part padded with zeros to a multiple of 64 bytes:

- header: magic ``EXEGSHRD``, uint32 format number, uint32 length of the header, SHA-256 of the other header bytes,
  JSON (``row_start``, ``n_rows``, ``row_length``, ``latent_start``, ``n_latents``, ``n_firings``, ``n_excluded``,
  ``bits``, ``values``, ``digests``: the SHA-256 of each part below);
- offsets: uint32 (uint64 from 2^32 firings on) [n_latents · blocks + 1], where each latent's firings in each block of
  2^bits positions begin;
- positions: uint16 or uint32 (``bits``) [n_firings], ``row in shard · row_length + position`` modulo 2^bits, ascending
  within a latent and block;
- values: uint16 [n_firings] (see ``values.py``);
- excluded: uint64 [n_excluded], positions in the shard at which firings do not count, ascending.

Sixteen bits a position make a firing cost little over four bytes. Rows of several shards make a store by being
listed; nothing in a shard refers to the others. A shard's checksum is that of the JSON without padding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
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
from exegete.store.manifest import MANIFEST, ShardEntry
from exegete.store.values import ENCODING
from exegete.types import Array

FORMAT = 3
WIDE_OFFSETS = 1 << 32
"""Firings from which on a shard's offsets take eight bytes."""

Piece = tuple[Array, Array, Array]
"""Firings of some latents, latent by latent: counts int64 [latents], positions int64 and codes uint16 [their sum]."""

_MAGIC = b"EXEGSHRD"
_ALIGN = 64
_PREAMBLE = struct.Struct("<8sII32s")
_PARTS = ("offsets", "positions", "codes", "excluded")
_LONGEST_HEADER = 1 << 14
_LARGEST = 1 << 62
_CHECKED = 1 << 20
_sound: set[str] = set()  # checksums of shards whose offsets were found to ascend


@final
class AbsentShardError(CorruptError):
    """A shard is not there, or another one is: it is damage only if the manifest that lists it is still the newest."""


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
        offsets = "<u4" if self.n_firings < WIDE_OFFSETS else "<u8"
        return offsets, "<u2" if self.bits == 16 else "<u4", "<u2", "<u8"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of the parts, without padding."""
        n = self.n_firings
        offsets, positions, codes, excluded = (np.dtype(kind).itemsize for kind in self.types)
        return offsets * (self.n_latents * self.blocks + 1), positions * n, codes * n, excluded * self.n_excluded

    @classmethod
    def fitting(cls, **fields: int) -> ShardShape:
        """Return the shape whose file is the smaller: narrow positions, or one block of wide ones."""
        narrow, wide = (cls(**fields, bits=bits) for bits in (16, 32))
        return narrow if sum(narrow.sizes) <= sum(wide.sizes) else wide


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard: its parts, memory-mapped, as the module says."""

    path: Path
    shape: ShardShape
    sha256: str
    offsets: Array
    positions: Array
    codes: Array
    excluded: Array

    def release(self) -> None:
        """Take what was read out of this process's memory; it stays in the system's cache of the file."""
        mapped: Any = self.offsets
        mapped._mmap.madvise(mmap.MADV_DONTNEED)

    def counts(self) -> Array:
        """Return the firings of each of its latents, int64 [n_latents]."""
        ends = self.offsets[:: self.shape.blocks].astype(np.int64)
        counts: Array = np.diff(ends)
        return counts

    def count(self, latent: int) -> int:
        """Return how many firings a latent has here, 0 for one outside the shard."""
        low, high = self._bounds(latent, latent + 1)
        return int(self.offsets[high]) - int(self.offsets[low])

    def piece(self, start: int, stop: int) -> Piece:
        """Return counts int64 [stop − start], positions int64 and codes of latents ``start`` to ``stop``.

        Positions are counted from the shard's first row. Latents outside the shard have none. Raises CorruptError
        for a position outside the shard.
        """
        low, high = self._bounds(start, stop)
        ends = self.offsets[low : high + 1].astype(np.int64)
        positions, codes = self._between(ends, (high - low) // self.shape.blocks)
        counts: Array = np.zeros(stop - start, np.int64)
        at = self.shape.latent_start + low // self.shape.blocks - start
        counts[at : at + (high - low) // self.shape.blocks] = np.diff(ends[:: self.shape.blocks])
        return counts, positions, codes

    def part(self, latent: int, begin: int, end: int) -> Piece:
        """Return the firings ``begin`` to ``end`` of those that a latent has here, as ``piece`` does.

        Both may lie outside of what there is.
        """
        low, high = self._bounds(latent, latent + 1)
        ends = self.offsets[low : high + 1].astype(np.int64)
        ends = np.clip(ends, min(ends[0] + max(begin, 0), ends[-1]), min(ends[0] + max(end, 0), ends[-1]))
        positions, codes = self._between(ends, int(high > low))
        return np.array([len(codes)], np.int64), positions, codes

    def _bounds(self, start: int, stop: int) -> tuple[int, int]:
        """Return where latents ``start`` to ``stop`` lie among the offsets."""
        shape = self.shape
        first = min(max(start - shape.latent_start, 0), shape.n_latents)
        last = min(max(stop - shape.latent_start, first), shape.n_latents)
        return first * shape.blocks, last * shape.blocks

    def _between(self, ends: Array, latents: int) -> tuple[Array, Array]:
        """Return positions and codes of so many latents, ``ends`` [latents · blocks + 1] being their offsets."""
        shape = self.shape
        inside = slice(int(ends[0]), int(ends[-1]))
        positions = self.positions[inside].astype(np.int64)
        if shape.blocks > 1:
            block = np.tile(np.arange(shape.blocks, dtype=np.int64) << shape.bits, latents)
            positions += np.repeat(block, np.diff(ends))
        if len(positions) and int(positions.max()) >= shape.n_rows * shape.row_length:
            raise CorruptError(f"{self.path} holds a position outside its rows; collect again")
        return positions, np.array(self.codes[inside])


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
        self._begun: Array = np.zeros(shape.blocks, np.int64)
        self._put(0, np.zeros(1, np.uint32))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, shape: ShardShape) -> Iterator[ShardWriter]:
        """Open a shard for writing; it exists, whole, when the context ends without an exception."""
        with atomic_file(path) as stream:
            yield cls(stream, shape)

    def append(self, counts: Array, positions: Array, codes: Array, *, more: bool = False) -> None:
        """Append the firings of the next latents.

        ``counts`` [latents], ``positions`` (from the shard's first row) and ``codes`` [sum of counts], latent by
        latent, positions ascending. With ``more`` the last of these latents goes on with the next call.
        """
        shape = self.shape
        cells = counts.astype(np.int64) if shape.blocks == 1 else _cells(counts, positions, shape)
        cells[: shape.blocks] += self._begun
        ended = self._n_firings - int(self._begun.sum())
        whole = len(cells) - (shape.blocks if more else 0)
        self._begun = cells[whole:] if more else np.zeros(shape.blocks, np.int64)
        self._put(0, ended + np.cumsum(cells[:whole]))
        self._put(1, positions)
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
        return _checksum(self.shape, digests)

    def _put(self, part: int, data: Array) -> None:
        raw: Any = np.ascontiguousarray(data.astype(self.shape.types[part], copy=False)).view(np.uint8)
        self._digests[part].update(raw)
        self._stream.seek(self._cursors[part])
        self._stream.write(raw)
        self._cursors[part] += len(raw)


def _cells(counts: Array, positions: Array, shape: ShardShape) -> Array:
    """Return the firings of every latent in every block, int64 [latents · blocks].

    Positions ascend within a latent, so that a cell is one run of them, and only its beginning need be looked for.
    """
    cells: Array = np.zeros(len(counts) * shape.blocks, np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    block = (positions >> shape.bits).astype(np.int32, copy=False)
    turns = np.flatnonzero(block[1:] != block[:-1]) + 1
    begins = np.union1d(turns, offsets[:-1][counts > 0])
    latent = np.searchsorted(offsets, begins, side="right") - 1
    cells[latent * shape.blocks + block[begins]] = np.diff(begins, append=len(positions))
    return cells


@final
class OpenShards:
    """Shards of one folder, opened when first read; the least recently used maps are closed beyond ``limit``."""

    def __init__(self, folder: Path, row_length: int, *, limit: int = 64) -> None:
        self._folder = folder
        self._row_length = row_length
        self._limit = limit
        self._open: OrderedDict[tuple[str, str], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def release(self) -> None:
        """Take what was read of the open shards out of this process's memory."""
        with self._lock:
            for shard in self._open.values():
                shard.release()

    def get(self, entry: ShardEntry) -> Shard:
        """Return a shard that a manifest lists.

        Raises AbsentShardError when it is missing or is not the one with this checksum, CorruptError when it is
        damaged or holds other rows, latents or firings than the manifest says.
        """
        key = entry.file, entry.sha256
        with self._lock:
            shard = self._open.get(key)
            if shard is None:
                shard = open_shard(self._folder / entry.file)
                if shard.sha256 != entry.sha256:
                    raise AbsentShardError(f"{shard.path} is not the shard its manifest lists; collect again")
                self._open[key] = shard
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
        if not _is_of(shard.shape, entry, self._row_length):
            listed = f"rows, latents or firings of {entry.file} than it holds"
            raise CorruptError(f"{self._folder / MANIFEST} lists other {listed}; collect again")
        return shard


def _is_of(shape: ShardShape, entry: ShardEntry, row_length: int) -> bool:
    held = (shape.row_start, shape.row_start + shape.n_rows, shape.latent_start, shape.latent_start + shape.n_latents)
    listed = (entry.row_start, entry.row_stop, entry.latent_start, entry.latent_stop)
    return held == listed and shape.n_firings == entry.n_firings and shape.row_length == row_length


def open_shard(path: Path) -> Shard:
    """Map a shard into memory, checking the header always and the parts once per process.

    Raises AbsentShardError when it is missing, CorruptError naming the file when it is cut short or damaged, and
    InputError for another format.
    """
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
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
    except FileNotFoundError:
        raise AbsentShardError(f"{path} is missing; collect again") from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    offsets, positions, codes, excluded = parts
    sha256 = _checksum(shape, digests)
    if sha256 not in _sound:
        if not (_fit(offsets, shape.n_firings) and _lie_inside(excluded, shape.n_rows * shape.row_length)):
            raise CorruptError(f"{path} is damaged: its offsets or excluded positions do not ascend; collect again")
        _sound.add(sha256)
    return Shard(
        path=path,
        shape=shape,
        sha256=sha256,
        offsets=offsets,
        positions=positions,
        codes=codes,
        excluded=excluded,
    )


def _fit(offsets: Array, n_firings: int) -> bool:
    """Return whether offsets ascend from 0 to the number of firings."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != n_firings:
        return False
    blocks = (offsets[start : start + _CHECKED + 1] for start in range(0, len(offsets), _CHECKED))
    return all(bool((block[1:] >= block[:-1]).all()) for block in blocks)


def _lie_inside(excluded: Array, n_positions: int) -> bool:
    """Return whether positions ascend strictly and lie within so many."""
    return not len(excluded) or (bool((excluded[1:] > excluded[:-1]).all()) and int(excluded[-1]) < n_positions)


def _header(shape: ShardShape, digests: list[str]) -> bytes:
    text = _described(shape, digests)
    length = _aligned(_PREAMBLE.size + len(text))
    text = text.ljust(length - _PREAMBLE.size, b"\0")
    return _PREAMBLE.pack(_MAGIC, FORMAT, length, _digest(FORMAT, length, text)) + text


def _described(shape: ShardShape, digests: list[str]) -> bytes:
    fields = {name: getattr(shape, name) for name in shape.__slots__}
    return canonical_json({**fields, "values": ENCODING, "digests": digests}).encode()


def _digest(number: int, length: int, text: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<8sII", _MAGIC, number, length) + text).digest()


def _checksum(shape: ShardShape, digests: list[str]) -> str:
    return hashlib.sha256(_described(shape, digests)).hexdigest()


def _read_header(path: Path, raw: Array) -> tuple[ShardShape, list[str], int]:
    """Return the shard's shape, the digests of its parts, and the header's length in bytes."""
    damaged = CorruptError(f"{path} is damaged: its header fails its checksum; collect again")
    if len(raw) < _PREAMBLE.size:
        raise damaged
    magic, number, length, digest = _PREAMBLE.unpack(raw[: _PREAMBLE.size].tobytes())
    if magic != _MAGIC or not _PREAMBLE.size <= length <= min(len(raw), _LONGEST_HEADER) or length % _ALIGN:
        raise damaged
    text = raw[_PREAMBLE.size : length].tobytes()
    if _digest(number, length, text) != digest:
        raise damaged
    if number != FORMAT:
        raise InputError(f"{path} has shard format {number}, this version reads {FORMAT}; collect again with it")
    try:
        fields: dict[str, Any] = json.loads(text.rstrip(b"\0"))
        return _shape(fields), [str(fields["digests"][part]) for part in range(len(_PARTS))], int(length)
    except (ValueError, TypeError, LookupError, RecursionError):
        raise CorruptError(f"{path} is damaged: its header describes no shard; collect again") from None


def _shape(fields: dict[str, Any]) -> ShardShape:
    """Return the shape a header gives. Raises ValueError, TypeError or LookupError where it gives none."""
    numbers = {name: fields[name] for name in ShardShape.__slots__}
    if not all(type(number) is int and 0 <= number < _LARGEST for number in numbers.values()):
        raise ValueError
    shape = ShardShape(**numbers)
    ends = (shape.row_start + shape.n_rows) * shape.row_length, shape.latent_start + shape.n_latents
    places = shape.n_latents * shape.n_rows * shape.row_length
    if shape.bits not in (16, 32) or max(ends) >= _LARGEST or fields["values"] != ENCODING:
        raise ValueError
    if min(shape.n_rows, shape.row_length, shape.n_latents) < 1 or shape.n_firings > places:
        raise ValueError
    return shape


def _joined(parts: list[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
