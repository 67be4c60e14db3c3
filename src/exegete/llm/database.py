"""SQLite files of the language-model layer: opened, made when missing, and refused when they are not what they say.

The journal is a write-ahead log and ``synchronous`` is NORMAL: a killed process loses nothing that was committed, and
no commit waits for the disk. A power cut may lose the latest commits, never a part of one.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from exegete.errors import BusyError, CorruptError, ExegeteError, InputError
from exegete.files import fault_point

_LOG_BYTES = 1 << 28  # of the log, after which a commit writes it back itself; ``Aside`` does so long before
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
MOST_BYTES = 1 << 26
"""Longest stored value [bytes]: files may come from anybody."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a database holds: its application id, its format number, and the statements that make it.

    The statements are compared with those that SQLite keeps, so they are written as SQLite keeps them; a database with
    any other table, view or trigger is not ours. ``kind`` names the file for people; ``page`` is the page size [bytes].
    """

    kind: str
    application: int
    version: int
    statements: tuple[str, ...]
    page: int = 4096


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether another process held a lock, so that the same statement may succeed later."""
    code: int = getattr(error, "sqlite_errorcode", 0)  # errors that Python's module raises by itself have none
    return code & 0xFF in _BUSY


def open_database(path: Path | str, layout: Layout, *, timeout: float) -> sqlite3.Connection:
    """Open a database for writing, making it when missing; a statement waits ``timeout`` seconds for a lock.

    Raises CorruptError when the file is damaged or not ours, InputError when it was written by a newer exegete or
    cannot be written, BusyError when it stays locked.
    """
    with _plain_errors(path, layout), contextlib.ExitStack() as undo:
        # Every user keeps to one thread at a time, not always to the one that opened it.
        database = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
        undo.callback(database.close)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        database.execute("PRAGMA trusted_schema = OFF")
        ours = _check(database, path, layout)  # before anything is changed
        database.execute(f"PRAGMA page_size = {layout.page}")
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // layout.page}")
        if not ours:
            _make(database, path, layout)
        undo.pop_all()
        return database


def read_database(path: Path, layout: Layout, *, timeout: float = 5.0) -> sqlite3.Connection | None:
    """Open a database for reading only, also on a read-only medium; return None when there is nothing in it yet.

    Raises CorruptError, InputError and BusyError as ``open_database`` does.
    """
    if not path.is_file():
        return None
    uri = path.resolve().as_uri()
    with _plain_errors(path, layout), contextlib.ExitStack() as undo:
        database = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=timeout, isolation_level=None)
        undo.callback(database.close)
        try:
            database.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.OperationalError:
            # A write-ahead log needs files beside the database; on a read-only medium there is no writer to heed.
            if path.with_name(path.name + "-wal").exists():
                raise
            database = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
            undo.callback(database.close)
        database.execute("PRAGMA trusted_schema = OFF")
        if not _check(database, path, layout):
            return None
        undo.pop_all()
        return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, name: str) -> Iterator[None]:
    """Commit everything written inside together, or nothing of it; ``name`` names the fault points around it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        fault_point(f"before commit {name}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    fault_point(f"after commit {name}")


@final
class Aside:
    """A thread that writes a database's log back, so that no commit has to wait for the disk.

    Writers go on while it copies; only the little that they wrote meanwhile is copied with the database locked, which
    lets the log begin anew. What fails is tried again next time.
    """

    def __init__(self, path: Path | str, layout: Layout) -> None:
        self._path = path
        self._layout = layout
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[sqlite3.Connection], object] | None = None) -> None:
        """Begin, unless it is still at it; ``work`` is done on the way, with a connection of its own."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, args=(work,), name="write back", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Wait until it is done."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, work: Callable[[sqlite3.Connection], object] | None) -> None:
        with (
            contextlib.suppress(ExegeteError, sqlite3.Error),
            contextlib.closing(open_database(self._path, self._layout, timeout=0.2)) as database,
        ):
            database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if work is not None:
                work(database)
            database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()  # so that next to nothing is left for
            database.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()  # the one that keeps writers out


def _make(database: sqlite3.Connection, path: Path | str, layout: Layout) -> None:
    with transaction(database, layout.kind):
        if _check(database, path, layout):  # another process was faster
            return
        for statement in layout.statements:
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {layout.application}")
        database.execute(f"PRAGMA user_version = {layout.version}")


def _check(database: sqlite3.Connection, path: Path | str, layout: Layout) -> bool:
    """Return False for an empty database, True for one of this layout."""
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    owner = int(database.execute("PRAGMA application_id").fetchone()[0])
    kept = [row[0] for row in database.execute("SELECT sql FROM sqlite_master") if row[0] is not None]
    if not kept and not version and not owner:
        return False
    if owner == layout.application and version > layout.version:
        raise InputError(
            f"{path} has format {version}, written by a newer exegete; this one reads {layout.version}: upgrade exegete"
        )
    if owner != layout.application or version != layout.version or sorted(kept) != sorted(layout.statements):
        raise CorruptError(f"{path} is a database, but not exegete's {layout.kind}")
    return True


@contextlib.contextmanager
def _plain_errors(path: Path | str, layout: Layout) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if is_busy(error):
            raise BusyError(f"{path} is locked by another process: {error}") from error
        raise InputError(f"{path} cannot be opened: {error}; the {layout.kind} needs a folder to write to") from error
    except sqlite3.DatabaseError as error:
        raise CorruptError(f"{path} is not a readable database: {error}") from error
