"""Documents → corpus: tokenise in batches, lay out in rows, stream to disk in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exegete.config import CorpusConfig
from exegete.errors import InputError, MismatchError
from exegete.files import RunLock, atomic_file, fault_point, hash_file, hash_json, read_json, write_json, write_text
from exegete.store.chat import ChatTemplate
from exegete.store.checks import require_same, write_manifest
from exegete.store.documents import TextDocument
from exegete.store.encoding import DocumentEncoder, Piece, TextEncoder
from exegete.store.packing import ArrayFile, Layout, RowWriter
from exegete.store.sources import TextStream, shuffled, text_documents
from exegete.store.token_rows import FORMAT, MANIFEST, ROLES, SOURCES, Corpus, CorpusManifest, Document, open_corpus
from exegete.tokens import TokenTable

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

_STREAMED = ("tokens.npy", "segments.npy", "documents.jsonl")
_SOURCES_BYTES = 1 << 30  # some 200 for each file that was read


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

    Every row holds tokens of one document, or with ``config.packing`` of several that follow one another, with the
    tokenizer's BOS where ``config.bos`` says; what is left of a row is padded with token 0. Text is tokenised as text:
    names of special tokens within it (``<s>`` in a web page) stay ordinary characters. Conversations go through the
    chat template with ``config.chat``; token ids are taken as they are. Where ids or a rendered conversation begin
    with the BOS that is put anyway, it stands once. The build ends with the row that reaches ``config.max_tokens``
    tokens of text. ``tokenizer`` is a transformers tokenizer; ``progress`` is called with documents and tokens so far.

    Raises InputError when no document holds a token, two share a key, one is of another kind than ``config`` says, or
    the tokenizer lacks what it asks for (EOS, chat template); MismatchError when the folder holds a corpus of other
    settings, or of files that have changed since, or when a token is not in ``table``. The texts behind an existing
    corpus are read again only where size or time of change of a file differ.
    """
    base = Path(folder)
    encoder = TextEncoder(tokenizer)
    chat = None if config.chat == "none" else ChatTemplate(tokenizer, config.chat)
    layout = _layout(tokenizer, config, table)
    key = {**dataclasses.asdict(config), "tokenizer": encoder.hash, "token_table": _table_hash(table)}
    key |= {"text": list(config.text), "bos_id": layout.bos, "eos_id": layout.eos, "template": chat and chat.hash}
    with RunLock(base):
        if (base / MANIFEST).exists():
            corpus = open_corpus(base)
            require_same(f"the corpus in {base}", corpus.manifest.key, key)
            _require_unchanged(corpus, documents)
            return corpus
        for stale in base.glob(".*.tmp"):
            stale.unlink()
        order = shuffled(documents, config.shuffle_buffer, seed=config.shuffle_seed)
        pieces = DocumentEncoder(encoder, chat, table, own_bos=layout.bos).pieces(order)
        writer, digests = _write(base, pieces, layout, config, table, progress)
        write_text(base / "token_table.json", table.to_json())
        if encoder.json is not None:
            write_text(base / "tokenizer.json", encoder.json)
        if isinstance(documents, TextStream):
            write_json(base / SOURCES, documents.trace())
        _finish(base, writer, digests, layout, config, key, traced=isinstance(documents, TextStream))
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
    return TextEncoder(tokenizer).hash


def _layout(tokenizer: Any, config: CorpusConfig, table: TokenTable) -> Layout:
    eos: int | None = tokenizer.eos_token_id if config.separator == "eos" else None
    if config.separator == "eos" and eos is None:
        raise InputError("the tokenizer has no EOS token to put between documents; set corpus.separator to none")
    bos: int | None = None if config.bos == "none" else tokenizer.bos_token_id
    return Layout(
        row_length=config.row_length,
        bos=bos,
        bos_policy="none" if bos is None else config.bos,
        packing=config.packing,
        eos=eos,
        special=table.special if eos is None else table.special | {eos},
        vocabulary=len(table),
        limit=config.max_tokens,
    )


def _require_unchanged(corpus: Corpus, documents: Iterable[TextDocument]) -> None:
    """Raise MismatchError when files that a corpus was made from have changed since."""
    if not isinstance(documents, TextStream) or SOURCES not in corpus.manifest.files:
        return
    change = documents.change(read_json(corpus.folder / SOURCES, most_bytes=_SOURCES_BYTES))
    if change is not None:
        raise MismatchError(
            f"the text behind the corpus in {corpus.folder} is another now: {change}; use another folder, or put the "
            "old text back"
        )


def _write(
    base: Path,
    pieces: Iterator[Piece],
    layout: Layout,
    config: CorpusConfig,
    table: TokenTable,
    progress: Progress | None,
) -> tuple[RowWriter, dict[str, str]]:
    """Write rows, segments, documents and role bits; return the writer, and the SHA-256 of what each holds."""
    dtype = np.dtype("<u2" if len(table) <= 1 << 16 else "<u4")
    with contextlib.ExitStack() as files:
        tokens_file, segments_file, documents_file = (files.enter_context(atomic_file(base / n)) for n in _STREAMED)
        arrays = {
            "tokens.npy": ArrayFile(tokens_file, dtype, config.row_length),
            "segments.npy": ArrayFile(segments_file, np.dtype("<i8"), 4),
        }
        if config.chat == "assistant":
            roles_file = files.enter_context(atomic_file(base / ROLES))
            arrays[ROLES] = ArrayFile(roles_file, np.dtype("u1"), -(-config.row_length // 8))
        writer = RowWriter(arrays["tokens.npy"], arrays["segments.npy"], documents_file, arrays.get(ROLES), layout)
        for piece in pieces:
            writer.add(piece)
            if progress is not None:
                progress(writer.n_documents, writer.n_tokens)
            if writer.full:
                break
        writer.finish()
        if not writer.n_rows:
            raise InputError("empty corpus: no document holds a token; give text with some content")
        for array in arrays.values():
            array.finish()
    digests = {name: array.digest.hexdigest() for name, array in arrays.items()}
    return writer, {**digests, "documents.jsonl": writer.digest.hexdigest()}


def _finish(
    base: Path,
    writer: RowWriter,
    digests: dict[str, str],
    layout: Layout,
    config: CorpusConfig,
    key: dict[str, Any],
    *,
    traced: bool,
) -> None:
    """Write the manifest, which makes the folder a corpus."""
    roles = "assistant" if ROLES in digests else "all"
    mask_policy = {"bos": layout.bos_policy, "special": sorted(layout.special), "roles": roles}
    attend = config.attend if config.packing else "row"  # without packing there is nothing before a document
    names = (*digests, "token_table.json", *([SOURCES] if traced else []))
    manifest = CorpusManifest(
        format=FORMAT,
        row_length=config.row_length,
        n_rows=writer.n_rows,
        n_tokens=writer.n_tokens,
        n_counted=writer.n_counted,
        n_documents=writer.n_documents,
        attend=attend,
        key=key,
        mask_policy=mask_policy,
        files={name: hash_file(base / name) for name in names},
        hash=hash_json([digests, config.row_length, mask_policy, attend, key["token_table"]]),
    )
    fault_point("before corpus manifest")
    write_manifest(base / MANIFEST, manifest.to_json())


def _table_hash(table: TokenTable) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()[:16]
