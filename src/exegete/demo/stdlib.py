"""The running interpreter's own standard library as a corpus: one document per source file.

Every machine that runs this package has this text. A shipped table (``split.txt``) assigns module paths to a side, so
that the demo's test documents are files which neither the demo language model nor its coders ever saw, on any Python
patch version: the side depends on the path alone, never on the text.
"""

from __future__ import annotations

import fnmatch
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, final

Side = Literal["train", "held_out", "excluded"]

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One standard-library source file.

    ``key`` is the path relative to the standard library's root with forward slashes (``asyncio/events.py``); ``side``
    says whether the demo models were trained on it (``train``), never saw it (``held_out``), or leave it out of every
    figure because it is a table or has near copies elsewhere (``excluded``).
    """

    key: str
    side: Side
    text: str


@cache
def split_table() -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the held-out module paths and the excluded path patterns shipped with the package."""
    held: set[str] = set()
    excluded: list[str] = []
    text = resources.files(__package__).joinpath("split.txt").read_text(encoding="utf-8")
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        side, _, pattern = line.partition(" ")
        if side == "held_out":
            held.add(pattern.strip())
        elif side == "excluded":
            excluded.append(pattern.strip())
        else:
            raise ValueError(f"split.txt: unknown side {side!r}; allowed: held_out, excluded")
    return frozenset(held), tuple(excluded)


def side_of(key: str) -> Side:
    """Return the side of a module path. Paths the table does not name are ``train``, so they never become test text."""
    held, excluded = split_table()
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in excluded):
        return "excluded"
    return "held_out" if key in held else "train"


def stdlib_root() -> Path:
    """Return the folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_paths(root: Path | None = None) -> list[tuple[str, Path]]:
    """List ``(key, path)`` of every standard-library source file, sorted by key."""
    base = root or stdlib_root()
    found = []
    for path in base.rglob("*.py"):
        relative = path.relative_to(base)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.parts[0].startswith("config-"):
            found.append((relative.as_posix(), path))
    return sorted(found)


def source_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield every readable, non-empty standard-library source file with its side, sorted by key.

    Files that do not decode under their own coding declaration (some of CPython's parser tests) are passed over.
    """
    for key, path in source_paths(root):
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield SourceFile(key=key, side=side_of(key), text=text)


def corpus_files(root: Path | None = None) -> list[SourceFile]:
    """Return the files the demo runs on: of either side, none excluded, none from test folders (slim images lack them).

    They come in an order of their own, the same everywhere, so that a corpus cut short is no alphabetical one.
    """
    kept = [
        file
        for file in source_files(root)
        if file.side != "excluded" and _TEST_FOLDERS.isdisjoint(file.key.split("/")[:-1])
    ]
    return sorted(kept, key=lambda file: hashlib.sha256(file.key.encode()).digest())
