"""Connections to a results database, and pieces of SQL."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from exegete.errors import BusyError, CorruptError, InputError, NotFoundError
from exegete.results_schema import MIGRATIONS, check_format, migrate

WAIT = 30.0  # seconds to wait for another writer's transaction


def opened(path: Path, readonly: bool) -> sqlite3.Connection:
    """Return a run's results database, made or migrated when writing. Raises what ``Results.open`` does."""
    if readonly and not path.is_file():
        raise NotFoundError(f"there are no results at {path}; make them with: exegete run")
    if not readonly:
        path.parent.mkdir(parents=True, exist_ok=True)
    database: sqlite3.Connection | None = None
    try:
        database = connect(path, readonly)
        applied = check_format(database, path)
        if readonly and applied == 0:
            raise NotFoundError(f"{path} holds no results yet")
        if readonly and applied < len(MIGRATIONS):
            raise InputError(
                f"{path} has format {applied} and this exegete reads {len(MIGRATIONS)}; upgrade it with: "
                "exegete report RUN"
            )
        if not readonly:
            migrate(database, path)
    except sqlite3.OperationalError as error:
        close(database)
        raise BusyError(f"{path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        close(database)
        raise CorruptError(f"{path} is not a readable database: {error}") from error
    except BaseException:
        close(database)
        raise
    return database


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """Open a database; a write-ahead log is only made when writing."""
    if not readonly:
        database = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA foreign_keys = ON")
        return database
    uri = path.resolve().as_uri()
    try:
        database = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=WAIT, isolation_level=None)
        database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        # A write-ahead log needs files beside the database; on a read-only medium there is no writer to heed either.
        if path.with_name(path.name + "-wal").exists():
            raise
        database = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
    return database


def close(database: sqlite3.Connection | None) -> None:
    """Close a database, where there is one."""
    if database is not None:
        database.close()


def marks(n: int) -> str:
    """Return so many places for values."""
    return ", ".join("?" * n)


def where_of(**filters: Any) -> tuple[str, tuple[Any, ...]]:
    """Return a WHERE clause over fixed column names, and its values; a filter of None is no filter."""
    given = {name: value for name, value in filters.items() if value is not None}
    clause = " AND ".join(f"{name} = ?" for name in given)
    return (f" WHERE {clause}" if clause else ""), tuple(given.values())
