"""Documents → corpus: tokenise in batches, cut into rows, stream to disk in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from exegete.config import CorpusConfig
from exegete.errors import InputError, MismatchError
from exegete.files import RunLock, atomic_file, canonical_json, fault_point, hash_file, hash_json, write_text
from exegete.store.checks import require_same, write_manifest
from exegete.store.sources import TextDocument, text_documents
from exegete.store.token_rows import FORMAT, MANIFEST, Corpus, CorpusManifest, Document, open_corpus
from exegete.tokens import TokenTable
from exegete.types import Array

__all__ = [
    "Corpus",
    "CorpusManifest",
    "Document",
    "TextDocument",
    "build_corpus",
    "copy_corpus",
    "open_corpus",
    "text_documents",
    "tokenizer_hash",
]

Progress = Callable[[int, int], None]

_PIECE = 1 << 20
"""Characters tokenised at once: a longer document is cut after a line, so that no file needs memory of its size."""
_BATCH = 1024
_STREAMED = ("tokens.npy", "segments.npy", "documents.jsonl")


def build_corpus(
    folder: str | os.PathLike[str],
    documents: Iterable[TextDocument],
    tokenizer: Any,
    config: CorpusConfig,
    *,
    table: TokenTable,
    progress: Progress | None = None,
) -> Corpus:
    """Make the corpus of a run, or return the one that is there when it was made with the same settings.

    Every row holds tokens of one document, after a BOS if ``config.bos`` is set and the tokenizer has one; a
    document's last row is padded with token 0. Text is tokenised as text: names of special tokens within it (``<s>``
    in a web page) stay ordinary characters. The build ends with the row that reaches ``config.max_tokens`` tokens of
    text. ``tokenizer`` is a transformers tokenizer; ``progress`` is called with documents and tokens so far.

    Raises InputError when no document holds a token or two share a key, MismatchError when the folder holds a corpus
    of other settings or a token is not in ``table``. The texts behind an existing corpus are not read again.
    """
    base = Path(folder)
    encoder = _Encoder(tokenizer)
    key = {**dataclasses.asdict(config), "tokenizer": encoder.hash, "token_table": _table_hash(table)}
    key["text"] = list(config.text)
    with RunLock(base):
        if (base / MANIFEST).exists():
            corpus = open_corpus(base)
            require_same(f"the corpus in {base}", corpus.manifest.key, key)
            return corpus
        for stale in base.glob(".*.tmp"):
            stale.unlink()
        _build(base, documents, encoder, config, key, table, progress)
    return open_corpus(base)


def copy_corpus(corpus: Corpus, folder: str | os.PathLike[str]) -> Corpus:
    """Copy a corpus into a folder, manifest last, or return the one that is there when its contents are the same.

    Raises MismatchError when the folder holds another corpus.
    """
    base = Path(folder)
    with RunLock(base):
        if (base / MANIFEST).exists():
            found = open_corpus(base)
            require_same(f"the corpus in {base}", {"corpus": found.hash}, {"corpus": corpus.hash})
            return found
        for name in (*corpus.manifest.files, "tokenizer.json"):
            if (corpus.folder / name).is_file():
                with (corpus.folder / name).open("rb") as source, atomic_file(base / name) as target:
                    shutil.copyfileobj(source, target)
        write_manifest(base / MANIFEST, corpus.manifest.to_json())
    return open_corpus(base)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the identity of a transformers tokenizer, 16 hex digits: its model, not its padding or truncation."""
    return _Encoder(tokenizer).hash


def _build(
    base: Path,
    documents: Iterable[TextDocument],
    encoder: _Encoder,
    config: CorpusConfig,
    key: dict[str, Any],
    table: TokenTable,
    progress: Progress | None,
) -> None:
    bos = encoder.bos if config.bos else None
    dtype = np.dtype("<u2" if len(table) <= 1 << 16 else "<u4")
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(atomic_file(base / name)) for name in _STREAMED]
        tokens, segments = _ArrayFile(opened[0], dtype, config.row_length), _ArrayFile(opened[1], np.dtype("<i8"), 4)
        writer = _RowWriter(tokens, segments, opened[2], bos=bos, table=table, limit=config.max_tokens)
        for document, ids, last in _tokenised(documents, encoder):
            writer.add(document, ids, last=last)
            if progress is not None:
                progress(writer.n_documents, writer.n_tokens)
            if writer.full:
                break
        if not tokens.n_rows:
            raise InputError("empty corpus: no document holds a token; give text with some content")
        tokens.finish()
        segments.finish()
    write_text(base / "token_table.json", table.to_json())
    if encoder.json is not None:
        write_text(base / "tokenizer.json", encoder.json)
    mask_policy = {"bos": bos is not None, "special": sorted(table.special)}
    contents = [digest.hexdigest() for digest in (tokens.digest, segments.digest, writer.digest)]
    manifest = CorpusManifest(
        format=FORMAT,
        row_length=config.row_length,
        n_rows=tokens.n_rows,
        n_tokens=writer.n_tokens,
        n_counted=writer.n_counted,
        n_documents=writer.n_documents,
        key=key,
        mask_policy=mask_policy,
        files={name: hash_file(base / name) for name in (*_STREAMED, "token_table.json")},
        hash=hash_json([contents, config.row_length, mask_policy, key["token_table"]]),
    )
    fault_point("before corpus manifest")
    write_manifest(base / MANIFEST, manifest.to_json())


def _tokenised(documents: Iterable[TextDocument], encoder: _Encoder) -> Iterator[tuple[TextDocument, Array, bool]]:
    """Yield the token ids of every piece of every document, and whether it is the document's last."""
    batch: list[tuple[TextDocument, str, bool]] = []
    size = 0
    for document in documents:
        for text, last in _pieces(document.text):
            batch.append((document, text, last))
            size += len(text)
            if size >= _PIECE or len(batch) >= _BATCH:
                yield from _encoded(batch, encoder)
                batch, size = [], 0
    yield from _encoded(batch, encoder)


def _encoded(
    batch: list[tuple[TextDocument, str, bool]], encoder: _Encoder
) -> Iterator[tuple[TextDocument, Array, bool]]:
    for (document, _, last), ids in zip(batch, encoder.encode([text for _, text, _ in batch]), strict=True):
        yield document, np.array(ids, dtype=np.int64), last


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while len(text) - start > _PIECE:
        line = text.rfind("\n", start, start + _PIECE) + 1
        stop = line if line > start else start + _PIECE
        yield _whole(text[start:stop]), False
        start = stop
    yield _whole(text[start:]), True


def _whole(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


@final
class _Encoder:
    """A tokenizer reduced to text → ids: no special tokens added or recognised, no truncation, no padding."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos: int | None = tokenizer.bos_token_id
        self.json: str | None = None
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            own.no_truncation()
            own.no_padding()
            own.encode_special_tokens = True
            self.json = own.to_str()
            self._own = own
            self.hash = hashlib.sha256(self.json.encode()).hexdigest()[:16]
        else:
            self._slow = tokenizer
            self.hash = hash_json([type(tokenizer).__name__, tokenizer.get_vocab()])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        if self.json is not None:
            return [found.ids for found in self._own.encode_batch_fast(texts, add_special_tokens=False)]
        found = self._slow(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [list(ids) for ids in found["input_ids"]] if texts else []


@final
class _ArrayFile:
    """A .npy file that grows row by row; its header is written again once the number of rows is known."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype[Any], columns: int) -> None:
        self._stream = stream
        self._dtype = dtype
        self.columns = columns
        self.n_rows = 0
        self.digest = hashlib.sha256()
        self._write_header()
        self._start = stream.tell()

    def append(self, rows: Array) -> None:
        """Write rows [n, columns]."""
        data = np.ascontiguousarray(rows, dtype=self._dtype).tobytes()
        self.digest.update(data)
        self._stream.write(data)
        self.n_rows += len(rows)

    def finish(self) -> None:
        """Write the final header over the first one, in which numpy leaves room for the number of rows to grow."""
        self._stream.seek(0)
        self._write_header()
        if self._stream.tell() != self._start:
            raise RuntimeError("numpy's array header changed its length with the number of rows")
        self._stream.seek(0, os.SEEK_END)

    def _write_header(self) -> None:
        shape = (self.n_rows, self.columns)
        data = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, data)


@final
class _RowWriter:
    """Cuts the tokens of documents into rows and appends them to the corpus files."""

    def __init__(
        self,
        tokens: _ArrayFile,
        segments: _ArrayFile,
        documents: BinaryIO,
        *,
        bos: int | None,
        table: TokenTable,
        limit: int | None,
    ) -> None:
        self._tokens, self._segments, self._documents = tokens, segments, documents
        self._head = np.array([] if bos is None else [bos], dtype=np.int64)
        self._vocabulary = len(table)
        self._special = np.array(sorted(table.special), dtype=np.int64)
        self._limit = limit
        self._keys: set[str] = set()
        self._held = np.zeros(0, np.int64)
        self._listed = False
        self.digest = hashlib.sha256()
        self.n_tokens = self.n_counted = self.n_documents = 0

    @property
    def full(self) -> bool:
        """Whether the limit of tokens is reached."""
        return self._limit is not None and self.n_tokens >= self._limit

    def add(self, document: TextDocument, ids: Array, *, last: bool) -> None:
        """Append the next tokens of a document; an incomplete row waits for more unless they were the last."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary:
            raise MismatchError(
                f"the tokenizer gives id {int(ids.max())}, the token table has {self._vocabulary}; pass the table of "
                "this tokenizer"
            )
        ids = np.concatenate([self._held, ids])
        room = self._tokens.columns - len(self._head)
        stop = len(ids) if last else len(ids) // room * room
        if self._limit is not None:
            stop = min(stop, -(-(self._limit - self.n_tokens) // room) * room)
        if stop:
            self._list(document)
            self._write(ids[:stop], room)
        self._held = ids[stop:] if not last else ids[:0]
        self._listed = self._listed and not last

    def _list(self, document: TextDocument) -> None:
        if self._listed:
            return
        if document.key in self._keys:
            raise InputError(f"two documents are called {document.key!r}; give each text once, under its own key")
        self._keys.add(document.key)
        size = len(document.text.encode("utf-8", errors="replace"))
        line = canonical_json({"key": document.key, "split": document.split, "n_bytes": size}).encode() + b"\n"
        self._documents.write(line)
        self.digest.update(line)
        self._listed = True
        self.n_documents += 1

    def _write(self, ids: Array, room: int) -> None:
        n_rows = -(-len(ids) // room)
        rows = np.zeros((n_rows, self._tokens.columns), np.int64)
        rows[:, : len(self._head)] = self._head
        padded = np.zeros(n_rows * room, np.int64)
        padded[: len(ids)] = ids
        rows[:, len(self._head) :] = padded.reshape(n_rows, room)
        segments = np.zeros((n_rows, 4), np.int64)
        segments[:, 0] = np.arange(n_rows) + self._tokens.n_rows
        segments[:, 2] = self._tokens.columns
        segments[-1, 2] = len(self._head) + len(ids) - (n_rows - 1) * room
        segments[:, 3] = self.n_documents - 1
        self._tokens.append(rows)
        self._segments.append(segments)
        self.n_tokens += len(ids)
        self.n_counted += int(np.isin(ids, self._special, invert=True).sum())


def _table_hash(table: TokenTable) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()[:16]
