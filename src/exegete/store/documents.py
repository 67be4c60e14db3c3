"""One document as a source gives it: text, token ids, or the messages of a conversation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from exegete.errors import InputError
from exegete.types import Array, Split

Message = Mapping[str, Any]
_ID_BYTES = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TextDocument:
    """One document with its unique key; ``split`` is set where the source itself says which split it belongs to.

    It is given as ``text``, as ``ids`` [n] (integers, tokenised by others), or as ``messages`` in the order spoken.
    """

    key: str
    text: str = ""
    split: Split | None = None
    ids: Array | None = field(default=None, compare=False)
    messages: tuple[Message, ...] | None = None

    @property
    def size(self) -> int:
        """Bytes of the text or of all texts of the messages, or 4 for each token id."""
        if self.ids is not None:
            return _ID_BYTES * len(self.ids)
        texts = [self.text] if self.messages is None else _strings(self.messages)
        return sum(len(text.encode("utf-8", errors="replace")) for text in texts)


class TextSource(ABC):
    """A file, a dataset or the standard library: documents in a fixed order."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What two sources share when they are the same, however they were spelt."""

    @abstractmethod
    def check(self, column: str) -> None:
        """Raise InputError when it is plain from the outset that ``column`` cannot be read."""

    @abstractmethod
    def documents(self, column: str) -> Iterator[TextDocument]:
        """Yield the documents, reading no further than asked."""

    @abstractmethod
    def trace(self) -> dict[str, Any] | None:
        """Return plain data on what was read so far, or None when nothing was."""

    @abstractmethod
    def changed(self, trace: Mapping[str, Any]) -> bool:
        """Tell whether what ``trace`` says was read would now read otherwise, as far as that can be told cheaply."""


def document_of(key: str, value: Any, column: str) -> TextDocument:
    """Return the document that a value of a column stands for: text, a list of ids, or a list of messages.

    A null is an empty document. Raises InputError for anything else.
    """
    if isinstance(value, str):
        return TextDocument(key=key, text=value)
    if value is None or (isinstance(value, list) and not value):
        return TextDocument(key=key)
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds == {int}:
            return TextDocument(key=key, ids=_ids(key, value))
        if kinds == {dict}:
            return TextDocument(key=key, messages=tuple(value))
    raise InputError(
        f"{key} holds no text in field {column!r} but {_named(value)}; a document is a text, a list of token ids, or "
        "a list of messages; set corpus.column"
    )


def missing_column(where: str, column: str, known: Iterable[Any]) -> InputError:
    """Return the error for a column that is not there, naming those that are."""
    names = sorted(map(str, known))
    shown = ", ".join(names[:8]) + (f" … ({len(names)} in all)" if len(names) > 8 else "")
    return InputError(f"{where} has no text in field {column!r}; its fields: {shown or 'none'}; set corpus.column")


def _ids(key: str, value: list[int]) -> Array:
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise InputError(f"{key} holds numbers too large for token ids; set corpus.column") from None


def _named(value: Any) -> str:
    if isinstance(value, list):
        return "a list of " + " and ".join(sorted({type(item).__name__ for item in value}))
    return f"a {type(value).__name__}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
