"""The corpus of a run on disk: token rows that remember their document, memory-mapped.

A folder of ``tokens.npy`` [n_rows, row_length] uint16 or uint32, ``segments.npy`` [n_segments, 4] int64 (row, start,
stop, document), ``documents.jsonl``, ``token_table.json``, ``tokenizer.json`` where the tokenizer has one, and
``manifest.json``, written last: a folder without it is not a corpus. ``mask.npy`` [n_rows, ceil(row_length / 8)] uint8,
one bit a position, most significant first, is there where only some roles of a conversation count; ``sources.json``
names the files that were read, where the text came from files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from exegete.config import CorpusConfig
from exegete.errors import CorruptError, NotFoundError
from exegete.files import read_array
from exegete.store.checks import read_manifest, verify_once
from exegete.tokens import TokenTable
from exegete.types import Array, Rows, Split

FORMAT = 2
MANIFEST = "manifest.json"
ROLES = "mask.npy"
SOURCES = "sources.json"
_BLOCK = 1 << 16

Attend = Literal["row", "document"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text of the corpus: its key, its split where the source fixed one, and its size in bytes of UTF-8."""

    key: str
    split: Split | None
    n_bytes: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusManifest:
    """What a corpus was made of.

    ``n_tokens`` counts tokens of text, without BOS, separators and padding; ``n_counted`` the positions at which
    firings count; ``key`` holds the settings that a second build must share; ``attend`` says whether a position sees
    the documents before its own in the row. ``mask_policy`` says which positions do not count, besides padding:
    ``bos`` (``row``: column 0 of every row; ``document``: the first position of every document; ``none``), the
    ``special`` ids, and with ``roles`` = ``assistant`` those whose bit in ``mask.npy`` is 0. ``files`` are SHA-256 of
    the contents.
    """

    format: int
    row_length: int
    n_rows: int
    n_tokens: int
    n_counted: int
    n_documents: int
    attend: Attend
    key: Mapping[str, Any]
    mask_policy: Mapping[str, Any]
    files: Mapping[str, str]
    hash: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data that ``from_json`` turns back into an equal manifest."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CorpusManifest:
        """Read what ``to_json`` gave. Raises CorruptError when fields are missing or unknown."""
        try:
            return cls(**data)
        except TypeError as error:
            raise CorruptError(f"the corpus manifest does not parse: {error}") from error


@final
class Corpus:
    """A complete corpus, opened with ``open_corpus``; arrays are mapped, so nothing is read before it is used."""

    def __init__(
        self, folder: Path, manifest: CorpusManifest, tokens: Array, segments: Array, roles: Array | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokens = tokens
        self.segments = segments
        """The runs of one document's tokens in one row [n_segments, 4] int64: row, start, stop, document.

        Sorted by row and start. The BOS put before a run belongs to it, and so does a separator after it; padding
        belongs to none. Every row has at least one segment, and a document's segments follow one another.
        """
        self._roles = roles

    def __len__(self) -> int:
        return self.n_rows

    @property
    def n_rows(self) -> int:
        """Token rows."""
        return self.manifest.n_rows

    @property
    def row_length(self) -> int:
        """Positions in a row."""
        return self.manifest.row_length

    @property
    def n_tokens(self) -> int:
        """Tokens of text, without BOS, separators and padding."""
        return self.manifest.n_tokens

    @property
    def n_counted(self) -> int:
        """Positions at which firings count."""
        return self.manifest.n_counted

    @property
    def attend(self) -> Attend:
        """What a position sees: everything before it in its ``row``, or only what belongs to its ``document``."""
        return self.manifest.attend

    @property
    def config(self) -> CorpusConfig:
        """The settings it was built with."""
        settings = {f.name: self.manifest.key[f.name] for f in dataclasses.fields(CorpusConfig)}
        return CorpusConfig(**{**settings, "text": tuple(settings["text"])})

    @property
    def hash(self) -> str:
        """Identity of the contents, 16 hex digits."""
        return self.manifest.hash

    @cached_property
    def table(self) -> TokenTable:
        """The token-bytes table."""
        path = self.folder / "token_table.json"
        verify_once(path, self.manifest.files[path.name])
        return TokenTable.from_json(path.read_text(encoding="utf-8"))

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """The documents, in row order."""
        path = self.folder / "documents.jsonl"
        verify_once(path, self.manifest.files[path.name])
        with path.open(encoding="utf-8") as stream:
            return tuple(Document(**json.loads(line)) for line in stream)

    @cached_property
    def _first_segments(self) -> Array:
        """The first segment of every row, and the number of segments [n_rows + 1], int64."""
        found: Array = np.zeros(self.n_rows + 1, np.int64)
        for start in range(0, len(self.segments), _BLOCK):  # no copy of a whole column, however long
            np.add.at(found, self.segments[start : start + _BLOCK, 0] + 1, 1)
        return np.cumsum(found, out=found)

    def rows(self, index: slice | Sequence[int] | Array) -> Rows:
        """Return rows by a slice or by their indices, in that order, copied from disk."""
        if isinstance(index, slice):
            numbers = np.arange(*index.indices(self.n_rows))
            tokens = np.ascontiguousarray(self.tokens[index], dtype=np.uint32)
        else:
            numbers = np.asarray(index, dtype=np.int64)
            tokens = np.ascontiguousarray(self.tokens[numbers], dtype=np.uint32)
            numbers = np.where(numbers < 0, numbers + self.n_rows, numbers)
        place, which = _ranges(self._first_segments[numbers], self._first_segments[numbers + 1])
        segments = np.asarray(self.segments[which])
        begin = place * self.row_length + segments[:, 1]
        owner, positions = _ranges(begin, begin + segments[:, 2] - segments[:, 1])
        documents = np.full(tokens.shape, -1, np.int32)
        documents.reshape(-1)[positions] = segments[owner, 3]
        policy = self.manifest.mask_policy
        mask = (documents >= 0) & np.isin(tokens, np.array(policy["special"], np.int64), invert=True)
        if policy["bos"] == "row":
            mask[:, 0] = False
        elif policy["bos"] == "document":
            opens = (which == 0) | (np.asarray(self.segments[which - 1, 3]) != segments[:, 3])
            mask.reshape(-1)[begin[opens]] = False
        if self._roles is not None:
            mask &= np.unpackbits(self._roles[numbers], axis=1, count=self.row_length).view(bool)
        return Rows(tokens=tokens, documents=documents, mask=mask)

    def verify(self) -> None:
        """Check the checksum of every file, each once per process. Raises CorruptError naming the file."""
        for name, sha256 in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise CorruptError(f"{path} is missing; build the corpus again")
            verify_once(path, sha256)


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Open a corpus and check its token and segment files, once per process.

    Raises NotFoundError when the folder holds no finished corpus, CorruptError naming a damaged file.
    """
    base = Path(folder)
    if not (base / MANIFEST).is_file():
        raise NotFoundError(f"there is no corpus in {base}; make one with build_corpus or exegete collect")
    manifest = CorpusManifest.from_json(read_manifest(base / MANIFEST, number=FORMAT))
    roles = read_array(base / ROLES) if ROLES in manifest.files else None
    corpus = Corpus(base, manifest, read_array(base / "tokens.npy"), read_array(base / "segments.npy"), roles)
    if corpus.tokens.shape != (manifest.n_rows, manifest.row_length):
        raise CorruptError(f"{base / 'tokens.npy'} has shape {corpus.tokens.shape}; build the corpus again")
    corpus.verify()
    return corpus


def _ranges(starts: Array, stops: Array) -> tuple[Array, Array]:
    """Return the numbers of all ranges [starts, stops) one after another, and before them the range each is from."""
    sizes = stops - starts
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shift = starts - (np.cumsum(sizes) - sizes)
    return owner, np.arange(len(owner)) + shift[owner]
