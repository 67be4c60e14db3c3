"""Files that are never half-written: atomic writes, hashes, canonical JSON, the run lock, and named fault points.

Whatever writes to a run goes through this module or through SQLite, and announces every flush, rename and commit by
``fault_point``; tests enumerate those points and stop the program at each of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from exegete.errors import BusyError, CorruptError, InputError, NotFoundError

FaultHook = Callable[[str], None]
_hook: FaultHook | None = None


def fault_point(name: str) -> None:
    """Announce a point at which a stop must lose nothing; does nothing unless a test installed a hook."""
    if _hook is not None:
        _hook(name)


@contextlib.contextmanager
def fault_hook(hook: FaultHook) -> Iterator[None]:
    """Call ``hook`` with the name of every fault point passed inside the context."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before


def canonical_json(data: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal data give equal text. NaN is refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def hash_json(data: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: a temporary beside it, flushed to disk, then renamed over it.

    The folder is made when missing. An exception inside the context leaves the old file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        error.filename = str(path)  # not the temporary, which nobody asked for
        raise
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            fault_point(f"flush {_kind(path)}")
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        fault_point(f"before rename {_kind(path)}")
        os.replace(name, path)
        fault_point(f"after rename {_kind(path)}")
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, *, most_bytes: int = 1 << 26) -> Any:
    """Read JSON of at most ``most_bytes``: a model folder's settings may come from anybody.

    Raises NotFoundError when the file is missing, CorruptError when it is larger, cannot be read or does not parse.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            room = min(max(size, 1 << 16), most_bytes)  # a device says it is empty
            data = stream.read(room + 1) if size <= most_bytes else None
        if data is None or len(data) > room:
            raise CorruptError(f"{path} is larger than the {most_bytes} bytes that are read of such a file; replace it")
        return json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} does not parse as JSON: {error}") from error


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write one .npy file atomically, never pickled."""
    with atomic_file(path) as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


def read_array(path: Path, *, mapped: bool = True) -> np.ndarray[Any, Any]:
    """Read one .npy file, memory-mapped unless told otherwise. Raises NotFoundError or CorruptError."""
    try:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise CorruptError(f"{path} is not a readable array: {error}") from error
    return array


def safe_name(name: str) -> str:
    """Return a coder or run name unchanged if it can be a folder name; raises InputError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@+=-]{0,119}", name) or ".." in name:
        raise InputError(f"the name {name!r} cannot be used: letters, digits and any of _ . @ + = - (at most 120)")
    return name


@final
class RunLock:
    """The one writer of a run: an advisory lock on ``lock`` in its folder, naming its holder.

    The kernel drops the lock when the holder ends, however it ends. Raises BusyError when it is held.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 200).decode("utf-8", errors="replace").strip() or "another process"
            os.close(handle)
            raise BusyError(
                f"{self._path.parent} is being written by {holder}; wait for it to end, or stop it"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def _kind(path: Path) -> str:
    """Name a file without its number, so that the point has one name for all shards."""
    return re.sub(r"\d+", "#", path.name)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
