"""Files as documents: text, lines of JSON, either of them compressed, Parquet tables, and arrays of token ids."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast, final

import numpy as np

from exegete.errors import InputError, MissingExtraError
from exegete.files import hash_file
from exegete.store.documents import TextDocument, TextSource, document_of, missing_column
from exegete.types import Array


def _suffixes(words: str) -> frozenset[str]:
    return frozenset(f".{word}" for word in words.split())


_LINES = _suffixes("jsonl ndjson")
_TEXT = _suffixes(
    "txt text md rst tex html htm xml csv tsv yaml yml toml py pyi c h cc cpp hpp cu cs go java js jsx ts tsx rs rb "
    "php swift kt scala sh lua pl r jl hs ml sql css"
)
_BINARY = _suffixes("arrow zip tar tgz npz bin safetensors pt pkl pdf 7z")
_UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BUFFER = 1 << 20
_TABLE_ROWS = 256
_DOCUMENT_BYTES = 1 << 32
"""The largest text file or line: a document is held in memory whole."""


def walk(folder: Path) -> list[Path]:
    """Return the text, source, .jsonl and .parquet files below a folder, sorted, hidden ones left out."""
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        found += [Path(base) / f for f in files if not f.startswith(".") and _is_text(Path(f))]
    return sorted(found, key=lambda path: path.as_posix())


def require(module: str, what: str) -> None:
    """Raise MissingExtraError unless an optional module is installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(what, "data")


def one_line(error: BaseException) -> str:
    """Return the message of another library's exception on one line."""
    return " ".join(str(error).split())


def _is_text(path: Path) -> bool:
    return _inner(path) in _TEXT | _LINES or path.suffix.lower() == ".parquet"


def _inner(path: Path) -> str:
    """Return the suffix below that of the compression, in lower case."""
    return (Path(path.stem) if path.suffix.lower() in _UNPACK else path).suffix.lower()


@final
class FileSource(TextSource):
    """One file. Raises InputError when its name is that of something else than text, ids or a table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = _inner(path)
        if path.suffix.lower() == ".zst" or kind == ".zst":
            raise InputError(f"{path} is packed with zstd, which Python cannot read; unpack it first: zstd -d {path}")
        if kind in _BINARY or (kind in (".parquet", ".npy") and path.suffix.lower() in _UNPACK):
            raise InputError(f"{path} is not text; give text, source, .jsonl, .parquet or .npy files")
        if kind == ".parquet":
            require("pyarrow", "reading .parquet files")
        self._kind = kind
        self._read: _HashedFile | None = None

    @property
    def identity(self) -> str:
        """The real path."""
        return os.path.realpath(self.path)

    def check(self, column: str) -> None:
        """Look at the first line, the table's columns, the array's header, or the size of a text that is not packed."""
        if self._kind in _LINES:
            with contextlib.closing(self._line_documents(column)) as documents:
                next(documents, None)
            self._read = None
        elif self._kind == ".parquet":
            _table(self.path, column).close()
        elif self._kind == ".npy":
            _id_array(self.path)
        elif self.path.suffix.lower() not in _UNPACK and self.path.stat().st_size > _DOCUMENT_BYTES:
            raise _too_large(self.path.as_posix())

    def documents(self, column: str) -> Iterator[TextDocument]:
        """Yield the lines, the table's rows, the array's rows, or the whole file."""
        if self._kind in _LINES:
            yield from self._line_documents(column)
        elif self._kind == ".parquet":
            yield from self._table_documents(column)
        elif self._kind == ".npy":
            yield from self._id_documents()
        else:
            yield TextDocument(key=self.path.as_posix(), text=self._text())

    def trace(self) -> dict[str, Any] | None:
        """Return path, size, time of change, and the SHA-256 of the first ``n_read`` bytes."""
        return None if self._read is None else {"path": self.path.as_posix(), **self._read.trace()}

    def changed(self, trace: Mapping[str, Any]) -> bool:
        """Compare size and time of change, and the bytes that were read only where those differ."""
        state = self.path.stat()
        if (state.st_size, state.st_mtime_ns) == (trace["size"], trace["mtime_ns"]):
            return False
        whole = trace["n_read"] == trace["size"]
        if state.st_size < trace["n_read"] or (whole and state.st_size != trace["size"]):
            return True
        return _hash_start(self.path, int(trace["n_read"])) != str(trace["sha256"])

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        self._read = _HashedFile(self.path)
        unpack = _UNPACK.get(self.path.suffix.lower())
        with io.BufferedReader(self._read, _BUFFER) as raw:
            yield cast("IO[bytes]", raw if unpack is None else unpack(raw, "rb"))

    def _guarded(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except _DAMAGED as error:
            raise InputError(f"{self.path} cannot be read: {error}; make the file again") from None

    def _text(self) -> str:
        """Return the whole file; its bytes are let go before the text is used."""
        data = bytearray()
        with self._open() as stream:
            while block := self._guarded(lambda: stream.read(_BUFFER)):
                data += block
                if len(data) > _DOCUMENT_BYTES:  # what a packed file holds shows only here
                    raise _too_large(self.path.as_posix())
        return data.decode("utf-8-sig", errors="replace")

    def _line_documents(self, column: str) -> Generator[TextDocument]:
        with self._open() as stream:
            number = 0
            while raw := self._guarded(lambda: stream.readline(_DOCUMENT_BYTES + 1)):
                number += 1
                if len(raw) > _DOCUMENT_BYTES:
                    raise _too_large(f"{self.path.as_posix()}:{number}")
                line = raw.decode("utf-8-sig", errors="replace").strip()
                if line:
                    yield _line_document(f"{self.path.as_posix()}:{number}", line, column)

    def _table_documents(self, column: str) -> Iterator[TextDocument]:
        from pyarrow import ArrowException  # type: ignore[import-untyped]

        self._read = _HashedFile(self.path, whole=True)
        number = 0
        with _table(self.path, column) as table:
            batches = table.iter_batches(batch_size=_TABLE_ROWS, columns=[column])
            while True:
                try:
                    batch = next(batches, None)
                except (ArrowException, OSError) as error:
                    raise InputError(f"{self.path} cannot be read: {one_line(error)}; make the file again") from None
                if batch is None:
                    return
                for value in batch.column(0).to_pylist():
                    yield document_of(f"{self.path.as_posix()}:{number}", value, column)
                    number += 1

    def _id_documents(self) -> Iterator[TextDocument]:
        self._read = _HashedFile(self.path, whole=True)
        ids = _id_array(self.path)
        name = self.path.as_posix()
        if ids.ndim == 1:
            yield TextDocument(key=name, ids=ids)
        else:
            for number in range(len(ids)):
                yield TextDocument(key=f"{name}:{number}", ids=ids[number])


def _too_large(where: str) -> InputError:
    return InputError(
        f"{where} is one document of more than {_DOCUMENT_BYTES} bytes, which would be held in memory whole; cut it "
        "into several files, or into the lines of a .jsonl file"
    )


def _line_document(where: str, line: str, column: str) -> TextDocument:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}; a .jsonl file holds one object per line") from None
    if not isinstance(data, dict):
        raise InputError(f"{where} holds a {type(data).__name__}, not an object with a field {column!r}")
    if column not in data:
        raise missing_column(where, column, data)
    return document_of(where, data[column], column)


def _table(path: Path, column: str) -> Any:
    """Open a Parquet file and check that it has a column."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        table = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
    names = table.schema_arrow.names
    if column not in names:
        table.close()
        raise missing_column(path.as_posix(), column, names)
    return table


def _id_array(path: Path) -> Array:
    """Map an array of token ids [n] or [rows, length]."""
    try:
        ids: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is not a readable array: {one_line(error)}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise InputError(
            f"{path} is an array of {ids.dtype} of shape {ids.shape}; token ids are integers, [rows, length] or flat"
        )
    return ids


def _hash_start(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0 and (block := stream.read(min(size, _BUFFER))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


@final
class _HashedFile(io.RawIOBase):
    """A file that hashes what is read of it; ``whole`` does so at once, for readers that jump about in it."""

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        super().__init__()
        self._stream = path.open("rb", buffering=0)
        state = os.fstat(self._stream.fileno())
        self._size, self._mtime_ns, self._n_read = state.st_size, state.st_mtime_ns, 0
        self._digest = hashlib.sha256()
        self._sha256: str | None = None
        if whole:
            self.close()
            self._n_read, self._sha256 = self._size, hash_file(path)

    def readable(self) -> bool:
        """True: it is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer and hash what came."""
        size = self._stream.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:size])
        self._n_read += size
        return size

    def close(self) -> None:
        """Close the file; the trace stays."""
        self._stream.close()
        super().close()

    def trace(self) -> dict[str, Any]:
        """Return size and time of change at opening, bytes read so far, and their SHA-256."""
        sha256 = self._sha256 or self._digest.hexdigest()
        return {"size": self._size, "mtime_ns": self._mtime_ns, "n_read": self._n_read, "sha256": sha256}
