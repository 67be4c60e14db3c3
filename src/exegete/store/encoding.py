"""Documents → token ids, in batches and in pieces, so that no document needs memory of its size in tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from exegete.errors import InputError, MismatchError
from exegete.files import hash_json
from exegete.store.chat import ChatTemplate
from exegete.store.documents import TextDocument
from exegete.tokens import TokenTable
from exegete.types import Array

_PIECE = 1 << 20
"""Characters or ids taken at once: a longer text is cut after a line."""
_BATCH = 1024


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next tokens of a document.

    ``ids`` [n] int64; ``counted`` [n] bool are those whose role counts, None when all do; ``last`` says that the
    document ends here; ``n_bytes`` is the size of the whole document in bytes of UTF-8.
    """

    document: TextDocument
    ids: Array
    counted: Array | None
    last: bool
    n_bytes: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A text or ids cut from a document, or None for a conversation, which is rendered whole."""

    document: TextDocument
    content: str | Array | None
    first: bool
    last: bool


@final
class TextEncoder:
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
class DocumentEncoder:
    """Turns documents into pieces: text through the tokenizer, conversations through its template, ids as they are.

    A BOS that ids or a rendered conversation begin with is taken off when ``own_bos`` (the one that rows or documents
    get anyway) is the same token.
    """

    def __init__(self, text: TextEncoder, chat: ChatTemplate | None, table: TokenTable, *, own_bos: int | None) -> None:
        self._text, self._chat, self._own_bos = text, chat, own_bos
        self._vocabulary = len(table)
        self._sizes = np.array([0 if i in table.special else len(p) for i, p in enumerate(table.pieces)], np.int64)

    def pieces(self, documents: Iterable[TextDocument]) -> Iterator[Piece]:
        """Yield the pieces of every document in order.

        Raises InputError for a document of another kind than the settings say, MismatchError for an id beyond the
        token table.
        """
        batch: list[_Part] = []
        size = 0
        for document in documents:
            for part in self._parts(document):
                batch.append(part)
                size += document.size if part.content is None else len(part.content)
                if size >= _PIECE or len(batch) >= _BATCH:
                    yield from self._encoded(batch)
                    batch, size = [], 0
        yield from self._encoded(batch)

    def _parts(self, document: TextDocument) -> Iterator[_Part]:
        if document.messages is not None:
            if self._chat is None:
                raise InputError(
                    f"{document.key} is a list of messages; set corpus.chat to all or assistant, or corpus.column to a "
                    "column of text"
                )
            yield _Part(document=document, content=None, first=True, last=True)
            return
        if self._chat is not None and (document.text or document.ids is not None):
            raise InputError(
                f"{document.key} is no list of messages but {'text' if document.ids is None else 'token ids'}; set "
                "corpus.column to the column of messages, or corpus.chat to none"
            )
        cut = _text_cuts(document.text) if document.ids is None else _id_cuts(document.ids)
        for start, stop, end in cut:
            content = document.text[start:stop] if document.ids is None else document.ids[start:stop]
            yield _Part(document=document, content=content, first=start == 0, last=stop == end)

    def _encoded(self, batch: list[_Part]) -> Iterator[Piece]:
        texts = iter(self._text.encode([_whole(part.content) for part in batch if isinstance(part.content, str)]))
        for part in batch:
            document, counted, n_bytes = part.document, None, 0
            if isinstance(part.content, str):
                ids = np.array(next(texts), dtype=np.int64)
                n_bytes = document.size if part.first else 0
            elif part.content is not None:
                ids = np.asarray(part.content, dtype=np.int64)
                n_bytes = self._n_bytes(document) if part.first else 0
            elif self._chat is not None:
                found = self._chat.encode(document)
                ids, counted, n_bytes = found.ids, found.counted, found.n_bytes
            self._checked(document, ids)
            doubled = part.first and not isinstance(part.content, str) and len(ids) > 0 and ids[0] == self._own_bos
            if doubled:
                ids, counted = ids[1:], None if counted is None else counted[1:]
            yield Piece(document=document, ids=ids, counted=counted, last=part.last, n_bytes=n_bytes)

    def _checked(self, document: TextDocument, ids: Array) -> Array:
        """Return ids as int64. Raises MismatchError when one is not of the token table."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            if document.ids is not None:
                raise MismatchError(
                    f"{document.key} holds the token id {worst}, the subject's tokenizer has ids 0 to "
                    f"{self._vocabulary - 1}; give ids made with this tokenizer"
                )
            raise MismatchError(
                f"the tokenizer gives id {worst}, the token table has {self._vocabulary}; pass the table of this "
                "tokenizer"
            )
        return np.asarray(ids, dtype=np.int64)

    def _n_bytes(self, document: TextDocument) -> int:
        """Return the bytes that a document's ids stand for, special tokens left out."""
        ids = document.ids if document.ids is not None else np.zeros(0, np.int64)
        cuts = [ids[start:stop] for start, stop, _ in _id_cuts(ids)]
        return sum(int(self._sizes[self._checked(document, cut)].sum()) for cut in cuts)


def _id_cuts(ids: Array) -> Iterator[tuple[int, int, int]]:
    """Yield start and stop of each cut, and the end of the whole."""
    for start in range(0, max(len(ids), 1), _PIECE):
        yield start, min(start + _PIECE, len(ids)), len(ids)


def _text_cuts(text: str) -> Iterator[tuple[int, int, int]]:
    start = 0
    while len(text) - start > _PIECE:
        line = text.rfind("\n", start, start + _PIECE) + 1
        stop = line if line > start else start + _PIECE
        yield start, stop, len(text)
        start = stop
    yield start, len(text), len(text)


def _whole(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
