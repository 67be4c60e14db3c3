"""Leases: who works on which key, among all tasks and processes that share a file.

A lease is an advisory lock on one byte of the file; which byte follows from the key. The kernel drops a process's locks
when it ends, however it ends, so a killed holder's keys are free at once and nothing has to be cleaned up or renewed.
Such locks belong to the process as a whole: within one, a set of held keys tells the tasks apart, and all users of a
file share one handle, since closing any other handle of it would drop every lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import final

_USERS = 0  # the byte that every user holds shared; keys come after it
_TAKEN = frozenset({errno.EAGAIN, errno.EACCES})
_files: dict[str, _LockFile] = {}
_mutex = threading.Lock()


@final
class Leases:
    """The leases of one file, made when missing. ``close`` gives back those that are still held.

    Where the file system knows no locks, leases hold within the process only. Raises OSError when the file cannot be
    opened.
    """

    def __init__(self, path: Path) -> None:
        name = os.path.realpath(path)
        with _mutex:
            self._file = _files.get(name) or _LockFile(name)
            _files[name] = self._file
            self._file.users += 1
        self._held: set[int] = set()

    def take(self, key: str) -> bool:
        """Take the lease of a key (hex digits, at least 15); return False while somebody has it."""
        place = _place(key)
        with _mutex:
            if place in self._file.held or not self._file.lock(fcntl.LOCK_EX, place):
                return False
            self._file.held.add(place)
        self._held.add(place)
        return True

    def drop(self, key: str) -> None:
        """Give the lease of a key back, if it is held through this object."""
        place = _place(key)
        if place in self._held:
            self._held.remove(place)
            self._file.drop([place])

    def share(self) -> bool:
        """Say that this process uses what the file guards; return False while another has it alone."""
        with _mutex:
            return self._file.lock(fcntl.LOCK_SH, _USERS)

    def alone(self) -> bool:
        """Become the only user; return False when there is another, in this process or elsewhere."""
        with _mutex:
            return self._file.users == 1 and self._file.lock(fcntl.LOCK_EX, _USERS)

    def close(self) -> None:
        """Give back everything that is held through this object."""
        self._file.drop(self._held)
        self._held.clear()
        with _mutex:
            self._file.users -= 1
            if not self._file.users:
                self._file.close()
                del _files[self._file.name]


@final
class _LockFile:
    """One open lock file of this process; its users call it with the mutex held."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.users = 0
        self.held: set[int] = set()
        self._handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def lock(self, kind: int, place: int) -> bool:
        try:
            fcntl.lockf(self._handle, kind | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            return error.errno not in _TAKEN
        return True

    def drop(self, places: set[int] | list[int]) -> None:
        with _mutex:
            for place in places:
                self.held.discard(place)
                fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        os.close(self._handle)


def _place(key: str) -> int:
    return 1 + int(key[:15], 16)  # 60 bits: offsets in a file have 63
