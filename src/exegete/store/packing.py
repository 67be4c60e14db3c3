"""Tokens of documents → rows and segments on disk: one document a row, or packed."""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, final

import numpy as np

from exegete.errors import InputError
from exegete.files import canonical_json
from exegete.store.encoding import Piece
from exegete.types import Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rows are filled.

    ``bos`` stands before every row or document (``bos_policy``), None when nowhere; ``eos`` between documents of one
    row, None for nothing; ``special`` ids, of a ``vocabulary`` of so many, are not counted; the row that reaches
    ``limit`` tokens of text is the last.
    """

    row_length: int
    bos: int | None
    bos_policy: Literal["row", "document", "none"]
    packing: bool
    eos: int | None
    special: frozenset[int]
    vocabulary: int
    limit: int | None

    @property
    def head(self) -> int:
        """Positions that BOS takes in every row."""
        return 1 if self.bos is not None and self.bos_policy == "row" else 0

    @property
    def opening(self) -> int:
        """Positions that BOS takes before every document."""
        return 1 if self.bos is not None and self.bos_policy == "document" else 0


@final
class ArrayFile:
    """A .npy file that grows row by row; its header is written again once the number of rows is known."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype[Any], columns: int) -> None:
        self._stream = stream
        self._dtype = dtype
        self.columns = columns
        self.n_rows = 0
        self.digest = hashlib.sha256()
        self._write_header()
        self._start = stream.tell()

    def append(self, rows: Array) -> None:
        """Write rows [n, columns]."""
        data = np.ascontiguousarray(rows, dtype=self._dtype).tobytes()
        self.digest.update(data)
        self._stream.write(data)
        self.n_rows += len(rows)

    def finish(self) -> None:
        """Write the final header over the first one, in which numpy leaves room for the number of rows to grow."""
        self._stream.seek(0)
        self._write_header()
        if self._stream.tell() != self._start:
            raise RuntimeError("numpy's array header changed its length with the number of rows")
        self._stream.seek(0, os.SEEK_END)

    def _write_header(self) -> None:
        shape = (self.n_rows, self.columns)
        data = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, data)


@final
class RowWriter:
    """Lays the tokens of documents out in rows and appends them to the corpus files; ``finish`` ends it.

    A row that is full is written at once; the open one waits for more. ``roles`` gets one bit a position, 1 where a
    token's role counts.
    """

    def __init__(
        self, tokens: ArrayFile, segments: ArrayFile, documents: BinaryIO, roles: ArrayFile | None, layout: Layout
    ) -> None:
        self._tokens, self._segments, self._documents, self._roles = tokens, segments, documents, roles
        self._layout = layout
        self._text = np.ones(max(layout.vocabulary, 1 + max(layout.special, default=0)), bool)
        self._text[sorted(layout.special)] = False
        self._keys = _Keys()
        self._row = np.zeros(layout.row_length, np.int64)
        self._row_counted = np.zeros(layout.row_length, bool)
        self._fill = 0
        self._segment: list[int] | None = None
        self._within = False
        self.digest = hashlib.sha256()
        self.n_tokens = self.n_counted = self.n_documents = 0

    @property
    def n_rows(self) -> int:
        """Rows written."""
        return self._tokens.n_rows

    @property
    def full(self) -> bool:
        """Whether the limit of tokens is reached and the row that reached it is full."""
        limit = self._layout.limit
        return limit is not None and self.n_tokens >= limit and self._fill == 0

    def add(self, piece: Piece) -> None:
        """Append the next tokens of a document. Raises InputError when two documents share a key."""
        if len(piece.ids) and not self._within:
            self._open(piece)
        ids = piece.ids[: self._wanted()] if len(piece.ids) else piece.ids
        counted = np.ones(len(ids), bool) if piece.counted is None else piece.counted[: len(ids)]
        self.n_tokens += len(ids)
        self.n_counted += int((counted & self._text[ids]).sum())
        while len(ids):
            taken = self._fill_rows(ids, counted) if self._fill == 0 else self._fill_open(ids, counted)
            ids, counted = ids[taken:], counted[taken:]
        if piece.last:
            self._within = False
            if not self._layout.packing:
                self._end_row()

    def finish(self) -> None:
        """Write what is left: the open row, padded."""
        self._end_row()

    def _room(self) -> int:
        """Return how many tokens of text the open row still takes."""
        return self._layout.row_length - max(self._fill, self._layout.head)

    def _wanted(self) -> int | None:
        """Return how many tokens of text are wanted until the row that reaches the limit is full."""
        if self._layout.limit is None:
            return None
        beyond = max(self._layout.limit - self.n_tokens - self._room(), 0)
        each = self._layout.row_length - self._layout.head
        return self._room() + -(-beyond // each) * each

    def _open(self, piece: Piece) -> None:
        """List a document and put what comes before its first token."""
        layout = self._layout
        if self._fill and layout.eos is not None and self._segment is not None:
            self._row[self._fill] = layout.eos
            self._fill += 1
            self._segment[2] = self._fill
        if self._fill and layout.row_length - self._fill < 1 + layout.opening:
            self._end_row()  # a BOS never stands apart from its text
        self._list(piece)
        if layout.opening:
            self._begin(self._fill)
            self._put(np.array([layout.bos]), np.array([False]))
        self._within = True

    def _list(self, piece: Piece) -> None:
        document = piece.document
        if not self._keys.add(document.key):
            raise InputError(f"two documents are called {document.key!r}; give each text once, under its own key")
        entry = {"key": document.key, "split": document.split, "n_bytes": piece.n_bytes}
        line = canonical_json(entry).encode() + b"\n"
        self._documents.write(line)
        self.digest.update(line)
        self.n_documents += 1

    def _fill_open(self, ids: Array, counted: Array) -> int:
        """Put tokens into the open row, as many as it takes."""
        if self._segment is None or self._segment[3] != self.n_documents - 1:
            self._begin(self._fill)
        n = min(len(ids), self._room())
        self._put(ids[:n], counted[:n])
        if self._room() == 0:
            self._end_row()
        return n

    def _fill_rows(self, ids: Array, counted: Array) -> int:
        """Write as many full rows as the tokens make, or else begin a row with them."""
        layout = self._layout
        each = layout.row_length - layout.head
        n = len(ids) // each
        if n == 0:
            self._begin(0)
            if layout.head:
                self._put(np.array([layout.bos]), np.array([False]))
            return self._fill_open(ids, counted)
        rows, kept = (np.zeros((n, layout.row_length), kind) for kind in (np.int64, bool))
        rows[:, : layout.head] = layout.bos if layout.bos is not None else 0
        rows[:, layout.head :] = ids[: n * each].reshape(n, each)
        kept[:, layout.head :] = counted[: n * each].reshape(n, each)
        self._end_segment()
        segments = np.zeros((n, 4), np.int64)
        segments[:, 0] = self._tokens.n_rows + np.arange(n)
        segments[:, 2] = layout.row_length
        segments[:, 3] = self.n_documents - 1
        self._segments.append(segments)
        self._write(rows, kept)
        return n * each

    def _put(self, ids: Array, counted: Array) -> None:
        stop = self._fill + len(ids)
        self._row[self._fill : stop] = ids
        self._row_counted[self._fill : stop] = counted
        self._fill = stop
        if self._segment is not None:
            self._segment[2] = stop

    def _begin(self, start: int) -> None:
        """Begin a segment of the latest document in the open row."""
        self._end_segment()
        self._segment = [self._tokens.n_rows, start, start, self.n_documents - 1]

    def _end_segment(self) -> None:
        if self._segment is not None:
            self._segments.append(np.array([self._segment]))
        self._segment = None

    def _end_row(self) -> None:
        self._end_segment()
        if self._fill:
            self._write(self._row[None], self._row_counted[None])
        self._row[:] = 0
        self._row_counted[:] = False
        self._fill = 0

    def _write(self, rows: Array, counted: Array) -> None:
        self._tokens.append(rows)
        if self._roles is not None:
            self._roles.append(np.packbits(counted, axis=1))


@final
class _Keys:
    """The keys of the documents so far, as 16-byte digests, of which two of a billion are the same once in 10^20 times.

    An open-addressing table [slots, 2] of 24 to 48 bytes a key, where a set of strings takes more than 100: a corpus
    may have many millions of documents.
    """

    def __init__(self) -> None:
        self._table = array("Q", [0]) * 2048
        self._n = 0

    def add(self, key: str) -> bool:
        """Add a key; tell whether it is new."""
        digest = hashlib.blake2b(key.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
        low, high = int.from_bytes(digest[:8], "little") | 1, int.from_bytes(digest[8:], "little")  # 0 is a free slot
        place = self._place(low, high)
        if self._table[place]:
            return False
        self._table[place], self._table[place + 1] = low, high
        self._n += 1
        if 3 * self._n > len(self._table):  # two thirds of the slots
            self._grow()
        return True

    def _place(self, low: int, high: int) -> int:
        """Return where a digest stands, or the free slot where it belongs."""
        table, mask = self._table, len(self._table) // 2 - 1
        slot = high & mask
        while table[2 * slot] and (table[2 * slot] != low or table[2 * slot + 1] != high):
            slot = (slot + 1) & mask
        return 2 * slot

    def _grow(self) -> None:
        old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
        for at in range(0, len(old), 2):
            if old[at]:
                place = self._place(old[at], old[at + 1])
                self._table[place], self._table[place + 1] = old[at], old[at + 1]
