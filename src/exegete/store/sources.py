"""Text sources: files, folders, globs, Hugging Face datasets and the standard library, as a stream of documents."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from exegete.errors import InputError, NotFoundError
from exegete.store.documents import TextDocument, TextSource
from exegete.store.source_datasets import PREFIX, DatasetSource
from exegete.store.source_files import FileSource, walk
from exegete.streams import stream

__all__ = ["STDLIB", "TextDocument", "TextStream", "shuffled", "text_documents"]

STDLIB = "stdlib"
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\*(.+)", re.DOTALL)


def text_documents(patterns: Iterable[str], *, column: str = "text") -> TextStream:
    """Return the documents of files, folders, globs, datasets and ``stdlib``.

    A .jsonl or .ndjson file holds one document per line, in field ``column``, keyed ``file:line``; a .parquet file one
    per row; a .npy file of token ids one per row [rows, length], or one in all; any other file is one document, keyed
    by its path, read as UTF-8 with undecodable bytes replaced. Lines and text may be packed (.gz, .bz2, .xz). A value
    of ``column`` is a text, a list of token ids, or a list of messages. A folder is searched to the bottom for text,
    source, .jsonl and .parquet files, hidden ones left out. ``stdlib`` is the running interpreter's standard library
    without its tests, its split fixed by the shipped table. ``hf:NAME[:CONFIG][@SPLIT]`` is a Hugging Face dataset of
    the hub, or in a folder. A file or dataset met twice is read once.

    Without weights the patterns are read one after another, each in sorted order. When any is written
    ``WEIGHT*PATTERN`` (the others then weigh 1) their documents are interleaved so that the bytes of each pattern stay
    within one document of its share (4 bytes for a token id); one that ends leaves the rest to the others. A pattern
    such as ``2*.txt`` that could be read either way is refused; ``./2*.txt`` is always a glob.

    Paths are looked up before anything is read. Raises InputError when nothing is given, a weight is not positive or
    a file is of another kind, NotFoundError for a pattern without a match, MissingExtraError when a package is not
    installed; on the first document InputError for a column that is not there; and while reading InputError naming
    the place of a value that is no document.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise InputError("empty corpus: no text is given; name files, folders, globs, datasets (hf:…), or stdlib")
    seen: set[str] = set()
    groups: list[_Group] = []
    weighted = False
    for pattern in given:
        weight, rest = _weight(pattern)
        weighted = weighted or weight is not None
        new: list[TextSource] = []
        for source in _sources(rest):
            if source.identity not in seen:
                seen.add(source.identity)
                new.append(source)
        groups.append(_Group(weight=1.0 if weight is None else weight, sources=new))
    return TextStream(groups, column, weighted=weighted)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What one pattern stands for, and its weight."""

    weight: float
    sources: Sequence[TextSource]


@final
class TextStream(Iterator[TextDocument]):
    """The documents of several sources, each read no further than asked, and a trace of what was read."""

    def __init__(self, groups: Sequence[_Group], column: str, *, weighted: bool) -> None:
        self._groups = groups
        self._column = column
        self._complete = False
        self._documents = self._interleaved() if weighted else self._in_order()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> TextDocument:
        return next(self._documents)

    def trace(self) -> dict[str, Any]:
        """Return plain data on what was read so far: for each pattern its files and datasets, and whether all was."""
        read = [[t for s in group.sources if (t := s.trace()) is not None] for group in self._groups]
        return {"complete": self._complete, "sources": read}

    def change(self, trace: Mapping[str, Any]) -> str | None:
        """Return what would now be read otherwise than ``trace`` tells, in words, or None.

        Files are compared by size and time of change, and by their contents only where those differ.
        """
        if len(trace["sources"]) != len(self._groups):
            return "the number of sources is another"
        for group, read in zip(self._groups, trace["sources"], strict=True):
            sources = [s for s in group.sources if not isinstance(s, _StdlibSource)]
            if trace["complete"] and len(sources) > len(read):
                return f"{_name(sources[len(read)])} is new"
            for place, old in enumerate(read):
                if place >= len(sources) or _name(sources[place]) != old.get("path", old.get("dataset")):
                    return f"{old.get('path', old.get('dataset'))} is not where it was"
                if sources[place].changed(old):
                    return f"{_name(sources[place])} has changed"
        return None

    def _check(self) -> None:
        for group in self._groups:
            for source in group.sources:
                source.check(self._column)

    def _in_order(self) -> Iterator[TextDocument]:
        self._check()
        for group in self._groups:
            yield from self._of(group)
        self._complete = True

    def _interleaved(self) -> Iterator[TextDocument]:
        """Yield by worst-case fair weighted fair queueing (WF2Q: Bennett and Zhang 1996, section 3).

        Each group's bytes stay within one document of its share. A group may go next when its documents so far began
        no later than the common clock; of those, the one whose next document ends first does.
        """
        self._check()
        streams = {number: self._of(group) for number, group in enumerate(self._groups)}
        begins = dict.fromkeys(streams, 0.0)
        clock = 0.0
        waiting: dict[int, tuple[TextDocument, int]] = {}  # a size is counted once: it takes a pass over the text
        while True:
            for number in [n for n in streams if n not in waiting]:
                document = next(streams[number], None)
                if document is None:
                    del streams[number]
                else:
                    waiting[number] = document, document.size
            if not waiting:
                break
            clock = max(clock, min(begins[number] for number in waiting))
            ends = {n: begins[n] + size / self._groups[n].weight for n, (_, size) in waiting.items()}
            chosen = min((n for n in waiting if begins[n] <= clock), key=lambda n: (ends[n], n))
            document, size = waiting.pop(chosen)
            begins[chosen] = ends[chosen]
            clock += size / sum(self._groups[n].weight for n in streams)
            yield document
        self._complete = True

    def _of(self, group: _Group) -> Iterator[TextDocument]:
        for source in group.sources:
            yield from source.documents(self._column)


def shuffled(documents: Iterable[TextDocument], size: int | None, *, seed: int) -> Iterator[TextDocument]:
    """Return documents shuffled through a buffer of ``size``: each leaves it when a draw of ``seed`` says so.

    With ``size`` None they come in order.
    """
    if size is None:
        yield from documents
        return
    draw = stream(seed, "corpus", "shuffle")
    held: list[TextDocument] = []
    for document in documents:
        if len(held) < size:
            held.append(document)
            continue
        place = int(draw.integers(size))
        leaving, held[place] = held[place], document
        yield leaving
    for place in draw.permutation(len(held)):
        yield held[place]


def _name(source: TextSource) -> str:
    return source.path.as_posix() if isinstance(source, FileSource) else source.identity


def _weight(pattern: str) -> tuple[float | None, str]:
    """Split WEIGHT*PATTERN where that is the only way to read it."""
    found = _WEIGHT.fullmatch(pattern)
    if found is None:
        return None, pattern
    rest = found[2]
    whole = _matches(pattern)
    if whole and not _is_source(rest):
        return None, pattern
    if whole:
        raise InputError(
            f"{pattern!r} is both a glob and {found[1]} times {rest!r}; write ./{pattern} for the glob, or "
            f"{found[1]}*./{rest} for the weight"
        )
    weight = float(found[1])
    if not (weight > 0 and math.isfinite(weight)):
        raise InputError(f"the weight of {rest!r} must be more than 0, got {found[1]}; leave out what is not wanted")
    return weight, rest


def _is_source(pattern: str) -> bool:
    return pattern == STDLIB or pattern.startswith(PREFIX) or bool(_matches(pattern))


def _matches(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    exact = Path(pattern)
    return [exact] if os.path.exists(exact) else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]


def _sources(pattern: str) -> list[TextSource]:
    """Return what one pattern stands for, sorted."""
    if pattern == STDLIB:
        return [_StdlibSource()]
    if pattern.startswith(PREFIX):
        return [DatasetSource(pattern)]
    named = _matches(pattern)
    if not named:
        raise NotFoundError(f"empty corpus: no file matches {pattern!r}; name files, folders, globs, hf:…, or stdlib")
    found = [file for path in named for file in (walk(path) if path.is_dir() else [path])]
    if not found:
        raise NotFoundError(f"empty corpus: {pattern!r} holds no text, source, .jsonl or .parquet file")
    return [FileSource(path) for path in found]


@final
class _StdlibSource(TextSource):
    """The running interpreter's standard library."""

    @property
    def identity(self) -> str:
        """Its name."""
        return STDLIB

    def check(self, column: str) -> None:
        """Nothing can be wrong from the outset."""

    def documents(self, column: str) -> Iterator[TextDocument]:
        """Yield its modules."""
        from exegete.demo.stdlib import corpus_files

        for source in corpus_files():
            yield TextDocument(key=source.key, text=source.text, split="test" if source.side == "held_out" else "train")

    def trace(self) -> None:
        """Return None: it changes with the interpreter alone, which is not watched."""

    def changed(self, trace: Mapping[str, Any]) -> bool:
        """Return False: as for ``trace``."""
        return False
