"""Checksums of stored data: verified when a file is first opened, and once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exegete.errors import CorruptError, InputError, MismatchError
from exegete.files import hash_json, read_json, write_json

_BLOCK = 1 << 20
_verified: set[tuple[str, int, int, int, str]] = set()


def verify_once(path: Path, sha256: str, *, start: int = 0, stop: int | None = None) -> None:
    """Check the bytes of a file from ``start`` to ``stop`` (its end by default) against their SHA-256.

    Nothing is read when this process did so before and the file has not changed since. Raises CorruptError naming
    the file.
    """
    state = path.stat()
    key = (str(path.resolve()), state.st_mtime_ns, state.st_size, start, sha256)
    if key in _verified:
        return
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        left = (state.st_size if stop is None else stop) - start
        while left > 0 and (block := stream.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != sha256:
        raise CorruptError(f"{path} is damaged: its checksum is wrong; make it again")
    _verified.add(key)


def write_manifest(path: Path, data: Mapping[str, Any]) -> None:
    """Write a manifest with its own checksum, atomically."""
    write_json(path, {**data, "checksum": hash_json(data)})


def read_manifest(path: Path, *, number: int) -> dict[str, Any]:
    """Read a manifest and check its checksum and format number.

    Raises NotFoundError when there is none, CorruptError when it is damaged, InputError for another format.
    """
    try:
        data = read_json(path)
        whole = isinstance(data, dict) and data.pop("checksum", None) == hash_json(data)
    except (RecursionError, ValueError):  # nested beyond reason; a number that is none
        raise CorruptError(f"{path} does not parse as a manifest; make it again") from None
    if not whole:
        raise CorruptError(f"{path} is damaged: its checksum is wrong; make it again")
    found = data.get("format")
    if type(found) is not int:
        raise CorruptError(f"{path} does not parse as a manifest: it has no format number; make it again")
    if found != number:
        advice = "update exegete" if found > number else "make it again with this version"
        raise InputError(f"{path} has format {found}, this version reads {number}; {advice}")
    return dict(data)


def require_same(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise MismatchError, listing what differs, unless two keys are equal."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if names:
        changes = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)
        raise MismatchError(f"{what} was made with other settings ({changes}); use another folder, or the old settings")
