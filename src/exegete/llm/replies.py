"""Kept replies: one SQLite file shared by runs, so that no stored reply is ever paid for again.

A reply is kept under the hash of what determined it. Whoever is about to pay for a key holds its lease, so two runs
that want the same reply pay for it once and the other waits. A cache is a convenience: when its disk is full or gone,
work goes on without it after one warning, and no reply that was paid for is withheld from its caller.

The event loop's thread calls all of this: a statement waits at most a twentieth of a second for another process (then
the reply stays in memory and is stored with a later one), waiting for a lease is asyncio.sleep, and what takes longer,
forgetting old replies and writing the log back, is done beside it in a thread of its own.

The file must lie on this machine's own disk (SQLite's write-ahead log is for processes of one machine); $EXEGETE_CACHE
names another folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from exegete.codec import to_json
from exegete.errors import CorruptError, ExegeteError, InputError
from exegete.files import canonical_json, fault_point
from exegete.llm.database import MOST_BYTES, Aside, Layout, is_busy, open_database, transaction
from exegete.llm.leases import Leases
from exegete.llm.reply_text import decode_reply, encode_reply, try_decode_reply
from exegete.types import LLMReply, LLMRequest

KEY_VERSION = 1
"""Part of every key: raised when what a request means changes, so that older replies are no longer found."""

LAYOUT = Layout(
    kind="replies",
    application=0x45584552,  # "EXER"
    version=1,
    statements=(
        "CREATE TABLE replies (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used REAL NOT NULL, "
        "reply TEXT NOT NULL)",
        "CREATE INDEX replies_by_use ON replies (used)",
    ),
)

_INSERT = "INSERT INTO replies (key, used, reply) VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING"
_DELETE_OLDER = "DELETE FROM replies WHERE id IN (SELECT id FROM replies WHERE used < ? ORDER BY used LIMIT ?)"

_WAIT = 0.05  # seconds that the event loop may stand still for another process's lock
_PATIENCE = 90_000.0  # seconds that a key may stay leased: the slowest answers, those of batch files, take a day
_POLL = (0.01, 0.5)  # seconds between looks at a lease, first and at most
_LOOKS = 20  # looks at a file that stays locked (some six seconds) before going on without what may be in it
_RETRY, _RETRY_DISK = 0.1, 30.0  # seconds until a locked file, and a disk that cannot be written, are tried again
_PAUSE = 0.002  # seconds between two transactions that forget
_FRESH = 3600.0  # seconds in which a reply's last use is not written again
_STEP = 256  # rows forgotten, or uses written, in one transaction
_TIDY = 1024  # stored replies between two tidyings
_PENDING = 4096  # replies kept in memory while the file cannot be written
_log = logging.getLogger(__name__)


def default_cache_path() -> Path:
    """Return where kept replies lie: $EXEGETE_CACHE, $XDG_CACHE_HOME/exegete or ~/.cache/exegete, file replies.db."""
    named, shared = os.environ.get("EXEGETE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "replies.db"
    if shared and Path(shared).is_absolute():  # the XDG specification ignores a relative one
        return Path(shared) / "exegete" / "replies.db"
    try:
        return Path.home() / ".cache" / "exegete" / "replies.db"
    except RuntimeError as error:
        raise InputError("there is no home folder to keep replies in; set EXEGETE_CACHE to a folder") from error


def request_key(name: str, request: LLMRequest) -> str:
    """Return the key of a request to the model named ``name``: 64 hex digits, equal when the output should be.

    Everything that determines the output goes into it; the stage, timeouts and retries do not.
    """
    asked = {
        "version": KEY_VERSION,
        "model": name,
        "messages": [dict(message) for message in request.messages],
        "prompt": request.prompt,
        "temperature": float(request.temperature),
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "sample_index": request.sample_index,
        "stop": list(request.stop),
        "schema": to_json(request.schema),
        "logprobs": request.logprobs,
        "prompt_logprobs": request.prompt_logprobs,
    }
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


@final
class ReplyCache:
    """Replies kept in one file, for all tasks and processes. Never raises because of the file.

    ``max_bytes`` bounds what is kept (the longest unused go first), ``max_days`` how long a reply may lie unused. A
    file that is damaged is set aside under another name. Use it from one thread at a time, and ``close`` it.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_bytes: int = 8 << 30,
        max_days: float | None = None,
        patience: float = _PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_days = max_days
        self._patience = patience
        self._clock = clock
        self._database: sqlite3.Connection | None = None
        self._leases: Leases | None = None
        self._pending: dict[str, str] = {}
        self._retry_at = -math.inf
        self._unwritable = False
        self._touched: set[int] = set()
        self._warned = False
        self._stored = 0
        self._stop = threading.Event()
        try:
            self.path = path or default_cache_path()
            self._aside = Aside(self.path, LAYOUT)
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._leases = Leases(self.path.with_name(self.path.name + ".lock"))
            self._database = self._open(self._leases)
        except (ExegeteError, sqlite3.Error, OSError) as error:
            self._give_up(error)

    async def claim(self, key: str) -> LLMReply | None:
        """Return the kept reply of a key, or None: then the caller has its lease, and must ``put`` or ``release``.

        While another task or process has the lease, this waits. One that ended, however it ended, has it no longer.
        """
        wait, most = _POLL
        looks, give_up = 0, self._clock() + self._patience
        while self._database is not None and self._leases is not None:
            looks += 1
            mine = taken = self._leases.take(key)
            try:
                reply = self._find(key)
            except sqlite3.OperationalError:  # locked for a moment, by a process that opens or closes the file
                reply, mine = None, taken and looks > _LOOKS
            if taken and (reply is not None or not mine):
                self._leases.drop(key)
            if reply is not None:
                return reply
            if mine or self._clock() >= give_up:
                fault_point("lease taken")
                return None
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, most)
            self._flush()
        return None

    def put(self, key: str, reply: LLMReply) -> None:
        """Keep a reply, if it is a whole one (``finish`` "stop"), and give the lease back."""
        if reply.finish != "stop" or self._database is None:
            self.release(key)
            return
        if len(self._pending) >= _PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            self.release(oldest)
        fault_point("before commit reply")
        if len(text := encode_reply(reply)) >= MOST_BYTES:
            self.release(key)
            return
        self._pending[key] = text
        self._flush()
        if self._unwritable and self._leases is not None:
            self._leases.drop(key)  # nobody is to wait for what cannot be stored
        fault_point("after commit reply")

    def release(self, key: str) -> None:
        """Give the lease of a key back without a reply; nothing happens when it is not held."""
        if self._leases is not None and key not in self._pending:
            self._leases.drop(key)

    def evict(self) -> int:
        """Forget replies unused for too long and, while there are too many bytes, the longest unused; return how many.

        Each transaction is short, so that others go on meanwhile.
        """
        if self._database is None:
            return 0
        self._write_uses()
        try:
            with contextlib.closing(open_database(self.path, LAYOUT, timeout=1.0)) as database:
                return self._forget(database)
        except (ExegeteError, sqlite3.Error) as error:
            self._warn(f"old replies in {self.path} were not forgotten: {error}")
            return 0

    def close(self) -> None:
        """Store what waits in memory, give leases back, and close the file."""
        self._stop.set()
        if self._database is not None:
            self._aside.join()
            self._database.execute("PRAGMA busy_timeout = 5000")
            self._retry_at = -math.inf
            self._flush()
            self._write_uses()
        if self._pending:
            _log.warning("%d replies could not be kept in %s", len(self._pending), self.path)
            self._pending.clear()
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._leases is not None:
            self._leases.close()
            self._leases = None

    # ---------------------------------------------------------------- private

    def _open(self, leases: Leases) -> sqlite3.Connection:
        """Open the file, setting a damaged one aside when nobody else uses it."""
        for _ in range(40):  # another process sets a damaged file aside just now
            if leases.share():
                break
            time.sleep(_WAIT)
        try:
            return open_database(self.path, LAYOUT, timeout=_WAIT)
        except CorruptError as error:
            if not leases.alone():
                raise
            aside = _free_name(self.path)
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}{end}", f"{aside}{end}")
            _log.warning("%s; it was set aside as %s, and replies are kept in a new file", error, aside.name)
            database = open_database(self.path, LAYOUT, timeout=_WAIT)
            leases.share()
            return database

    def _find(self, key: str) -> LLMReply | None:
        kept = self._pending.get(key)
        if kept is not None:
            return decode_reply(kept)
        if self._database is None:
            return None
        try:
            row = self._database.execute(
                "SELECT id, used, CAST(reply AS BLOB) FROM replies WHERE key = ?", (bytes.fromhex(key),)
            ).fetchone()
            if row is None:
                return None
            if (reply := try_decode_reply(row[2])) is not None:
                self._use(row[0], row[1])
                return reply
            self._warn(f"a reply kept in {self.path} is damaged, and is asked for again")
            self._database.execute("DELETE FROM replies WHERE id = ?", (row[0],))
        except sqlite3.Error as error:
            if is_busy(error):
                raise
            self._give_up(error)
        return None

    def _flush(self) -> None:
        """Store what waits in memory.

        While another process writes it waits on, leases and all; where the disk cannot be written, without leases.
        """
        if self._database is None or not self._pending or self._clock() < self._retry_at:
            return
        rows = [(bytes.fromhex(key), self._clock(), text) for key, text in self._pending.items()]
        try:
            if len(rows) == 1:
                self._database.execute(_INSERT, rows[0])
            else:
                with transaction(self._database, "replies"):
                    self._database.executemany(_INSERT, rows)
        except sqlite3.OperationalError as error:
            self._retry_at = self._clock() + (_RETRY if is_busy(error) else _RETRY_DISK)
            if not is_busy(error):
                self._warn(f"replies cannot be kept in {self.path}: {error}; work goes on without")
                self._unwritable = True
                self._drop_leases()
        except sqlite3.Error as error:
            self._drop_leases()
            self._give_up(error)
        else:
            self._unwritable = False
            self._drop_leases()
            self._pending.clear()
            self._stored += len(rows)
            if self._stored % _TIDY < len(rows) or self._stored == len(rows):
                self._aside.start(self._forget)

    def _drop_leases(self) -> None:
        if self._leases is not None:
            for key in self._pending:
                self._leases.drop(key)

    def _use(self, row: int, used: Any) -> None:
        if not isinstance(used, float) or self._clock() - used > _FRESH:
            self._touched.add(row)
            if len(self._touched) >= _STEP:
                self._write_uses()

    def _write_uses(self) -> None:
        """Write when replies were used last; when that fails they only look older than they are."""
        uses = [(self._clock(), row) for row in sorted(self._touched)]
        self._touched.clear()
        if uses and self._database is not None:
            with contextlib.suppress(sqlite3.Error), transaction(self._database, "uses"):
                self._database.executemany("UPDATE replies SET used = ? WHERE id = ?", uses)

    def _forget(self, database: sqlite3.Connection) -> int:
        """Delete in short transactions, with pauses in which others come to write."""
        oldest = -math.inf if self._max_days is None else self._clock() - self._max_days * 86_400
        forgotten, too_many = 0, _used_bytes(database) > self._max_bytes
        while not self._stop.is_set():
            deleted = database.execute(_DELETE_OLDER, (oldest, _STEP)).rowcount
            if not deleted and too_many and _used_bytes(database) > 0.9 * self._max_bytes:
                deleted = database.execute(_DELETE_OLDER, (math.inf, _STEP)).rowcount
            if not deleted:
                break
            forgotten += deleted
            time.sleep(_PAUSE)
        while forgotten and not self._stop.is_set() and database.execute("PRAGMA freelist_count").fetchone()[0]:
            database.execute(f"PRAGMA incremental_vacuum({_STEP})").fetchall()
            time.sleep(_PAUSE)
        return forgotten

    def _give_up(self, error: Exception) -> None:
        self._warn(f"replies are not kept in {self.path}: {error}; work goes on without")
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s", text)


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        int(database.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _free_name(path: Path) -> Path:
    """Return a name beside ``path`` that nothing has."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return aside
