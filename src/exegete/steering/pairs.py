"""Pairs of texts that differ in what is to be steered: one shows it, the other does not."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from exegete.errors import CorruptError, InputError, NotFoundError

_LARGEST = 1 << 28
_SUFFIXES = (".jsonl", ".json", ".csv")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two texts; a vector points from ``negative`` to ``positive``."""

    positive: str
    negative: str


def load_pairs(path: str | Path) -> tuple[Pair, ...]:
    """Read pairs: a .jsonl of objects or .json list of objects, or a .csv with a header, of ``positive, negative``.

    Raises NotFoundError when there is no such file, CorruptError when it does not parse, InputError for another kind
    of file or, with its number, a row that lacks a text or has the same twice.
    """
    file = Path(path).expanduser()
    if file.suffix not in _SUFFIXES:
        raise InputError(f"{path} holds no pairs that can be read; allowed: {', '.join(_SUFFIXES)}")
    pairs = tuple(_pair(entry, f"{path}, row {i}") for i, entry in enumerate(_rows(file), start=1))
    if not pairs:
        raise InputError(f"{path} holds no pairs")
    return pairs


def _rows(file: Path) -> Iterator[Any]:
    text = _text(file)
    try:
        if file.suffix == ".csv":
            yield from csv.DictReader(io.StringIO(text, newline=""))
        elif file.suffix == ".json":
            found = json.loads(text)
            yield from found if isinstance(found, list) else [found]
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except (ValueError, RecursionError, csv.Error) as error:
        raise CorruptError(f"{file} does not parse: {error}") from error


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"{file} is larger than the {_LARGEST:,} bytes that are read of pairs; split it")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{file} cannot be read as text: {error}") from error


def _pair(entry: Any, where: str) -> Pair:
    texts = []
    for key in ("positive", "negative"):
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {key} is missing or no text; a pair is positive and negative")
        texts.append(value)
    if texts[0] == texts[1]:
        raise InputError(f"{where}: positive and negative are the same text")
    return Pair(positive=texts[0], negative=texts[1])
