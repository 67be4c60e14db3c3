"""Text sources: files, .jsonl files, folders, globs, and the standard library, as a stream of documents."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from exegete.errors import InputError, NotFoundError
from exegete.types import Split

STDLIB = "stdlib"


def _suffixes(words: str) -> frozenset[str]:
    return frozenset(f".{word}" for word in words.split())


_LINES = _suffixes("jsonl ndjson")
_TEXT = _suffixes(
    "txt text md rst tex html htm xml csv tsv yaml yml toml py pyi c h cc cpp hpp cu cs go java js jsx ts tsx rs rb "
    "php swift kt scala sh lua pl r jl hs ml sql css"
)
_BINARY = _suffixes("parquet arrow gz bz2 xz zst zip tar npy npz bin safetensors pt pkl pdf")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TextDocument:
    """One text with its unique key; ``split`` is set where the source itself says which split it belongs to."""

    key: str
    text: str
    split: Split | None = None


def text_documents(patterns: Iterable[str], *, column: str = "text") -> Iterator[TextDocument]:
    """Return the documents of files, folders and globs, in the order given and sorted within each.

    A .jsonl file holds one document per line, in field ``column``, keyed ``file:line``; any other file is one document,
    keyed by its path, read as UTF-8 with undecodable bytes replaced. A folder is searched to the bottom for text,
    source and .jsonl files, hidden ones left out. ``stdlib`` is the running interpreter's standard library without its
    tests, its split fixed by the shipped table. A file met twice is read once.

    Paths are looked up before anything is read. Raises InputError when nothing is given, NotFoundError for a pattern
    without a match and, while reading, InputError naming file and line for a bad .jsonl line.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise InputError("empty corpus: no text is given; name files, folders, globs, or stdlib")
    sources: list[Path | None] = []
    seen: set[str] = set()
    for pattern in given:
        for path in [None] if pattern == STDLIB else _expand(pattern):
            identity = STDLIB if path is None else os.path.realpath(path)
            if identity not in seen:
                seen.add(identity)
                sources.append(path)
    return _read(sources, column)


def _expand(pattern: str) -> list[Path]:
    """Return the files that one pattern stands for, sorted."""
    pattern = os.path.expanduser(pattern)
    exact = Path(pattern)
    named = [exact] if exact.exists() else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    found = [file for path in named for file in (_walk(path) if path.is_dir() else [path])]
    if not named:
        raise NotFoundError(f"empty corpus: no file matches {pattern!r}; name files, folders, globs, or stdlib")
    if not found:
        raise NotFoundError(f"empty corpus: {pattern!r} holds no text, source or .jsonl file")
    for path in found:
        if path.suffix.lower() in _BINARY:
            raise InputError(f"{path} is not text; give text files, source files or .jsonl files")
    return found


def _walk(folder: Path) -> list[Path]:
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        suffixes = _TEXT | _LINES
        found += [Path(base) / f for f in files if not f.startswith(".") and Path(f).suffix.lower() in suffixes]
    return sorted(found, key=lambda path: path.as_posix())


def _read(sources: list[Path | None], column: str) -> Iterator[TextDocument]:
    for path in sources:
        if path is None:
            yield from _stdlib_documents()
        elif path.suffix.lower() in _LINES:
            yield from _line_documents(path, column)
        else:
            text = path.read_bytes().decode("utf-8-sig", errors="replace")
            yield TextDocument(key=path.as_posix(), text=text)


def _line_documents(path: Path, column: str) -> Iterator[TextDocument]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.decode("utf-8-sig", errors="replace").strip()
            if not line:
                continue
            where = f"{path.as_posix()}:{number}"
            try:
                data = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON: {error}; a .jsonl file holds one object per line") from None
            if not isinstance(data, dict):
                raise InputError(f"{where} holds a {type(data).__name__}, not an object with a field {column!r}")
            text = data.get(column)
            if not isinstance(text, str):
                fields = ", ".join(sorted(map(str, data))[:8]) or "none"
                raise InputError(f"{where} has no text in field {column!r}; its fields: {fields}; set corpus.column")
            yield TextDocument(key=where, text=text)


def _stdlib_documents() -> Iterator[TextDocument]:
    from exegete.demo.stdlib import corpus_files

    for source in corpus_files():
        yield TextDocument(key=source.key, text=source.text, split="test" if source.side == "held_out" else "train")
