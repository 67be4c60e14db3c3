"""Named classes of decoded text: one bit per class for every token of a vocabulary.

A class looks at the text of one token with leading spaces taken off (the whole text for those about white space);
``continuation`` and ``word_start`` also look at the token before, and are completed by ``execute.TokenContext``.
"""

from __future__ import annotations

import builtins
import keyword
import weakref
from collections.abc import Callable, Mapping
from typing import final

import numpy as np

from exegete.rules.language import CLASSES
from exegete.tokens import TokenTable
from exegete.types import Array

_KEYWORDS = frozenset(keyword.kwlist) | {"match", "case"}
_BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_"))
_OPERATORS = frozenset("+-*/%=<>!&|^~@:")

# Each predicate is given (text, text without leading spaces); special tokens are in no class but ``special``.
_PREDICATES: Mapping[str, Callable[[str, str], bool]] = {
    "digits": lambda text, word: word.isdigit(),
    "lower": lambda text, word: word.isalpha() and word.islower(),
    "upper": lambda text, word: word.isalpha() and word.isupper(),
    "capitalised": lambda text, word: len(word) > 1 and word.isalpha() and word[0].isupper() and word[1:].islower(),
    "mixed_case": lambda text, word: word.isalpha() and not (word[1:].islower() or word.islower() or word.isupper()),
    "word": lambda text, word: word.isalpha(),
    "keyword": lambda text, word: word in _KEYWORDS,
    "builtin": lambda text, word: word in _BUILTINS,
    "underscore": lambda text, word: "_" in text,
    "dunder": lambda text, word: "__" in text,
    "has_digit": lambda text, word: any(c.isdigit() for c in text),
    "leading_space": lambda text, word: text[:1] == " " and bool(word),
    "blank": lambda text, word: text.isspace(),
    "newline": lambda text, word: "\n" in text,
    "blank_line": lambda text, word: text.count("\n") > 1,
    "indented": lambda text, word: "\n" in text and text[-1] in " \t",
    "punctuation": lambda text, word: bool(word) and all(_is_punctuation(c) for c in word),
    "operator": lambda text, word: bool(word) and _OPERATORS.issuperset(word),
    "opens": lambda text, word: bool(word) and word[-1] in "([{",
    "closes": lambda text, word: bool(word) and word[0] in ")]}",
    "quote": lambda text, word: '"' in text or "'" in text,
    "hash": lambda text, word: "#" in text,
    "ends_dot": lambda text, word: word[-1:] == ".",
    "ends_comma": lambda text, word: word[-1:] == ",",
    "ends_colon": lambda text, word: word[-1:] == ":",
    "equals": lambda text, word: "=" in text,
    "single": lambda text, word: len(word) == 1,
    "non_ascii": lambda text, word: not text.isascii(),
}
CLASS_BITS: Mapping[str, int] = {name: bit for bit, name in enumerate(CLASSES)}


def _is_punctuation(character: str) -> bool:
    return not (character.isalnum() or character.isspace() or character == "_") and character.isprintable()


def _is_letter(character: str) -> bool:
    return character.isalpha() or character == "_"


@final
class Vocabulary:
    """What rules need to know of every token id, worked out once per token table.

    ``classes`` [ids] uint32, one bit per name in ``CLASS_BITS``; ``joins`` and ``ends`` [ids] bool: the text begins
    with, or ends in, a letter or underscore; ``breaks`` [ids] bool: a line begins after the token (it has a line break,
    or is special); ``ids`` maps the bytes of a token to its id where no other token has the same bytes and the token is
    not special or empty.
    """

    def __init__(self, table: TokenTable) -> None:
        self.size = len(table)
        self.classes: Array = np.zeros(self.size, np.uint32)
        self.joins: Array = np.zeros(self.size, bool)
        self.ends: Array = np.zeros(self.size, bool)
        self.breaks: Array = np.zeros(self.size, bool)
        for token, text in enumerate(table.texts):
            if token in table.special:
                self.classes[token] = 1 << CLASS_BITS["special"]
                self.breaks[token] = True
                continue
            word = text.lstrip(" ")
            bits = sum(1 << CLASS_BITS[name] for name, holds in _PREDICATES.items() if holds(text, word))
            self.classes[token] = bits
            self.joins[token] = bool(text) and _is_letter(text[0])
            self.ends[token] = bool(text) and _is_letter(text[-1])
            self.breaks[token] = "\n" in text
        counts: dict[bytes, int] = {}
        for piece in table.pieces:
            counts[piece] = counts.get(piece, 0) + 1
        self.ids: dict[bytes, int] = {
            piece: token
            for token, piece in enumerate(table.pieces)
            if piece and counts[piece] == 1 and token not in table.special
        }


_made: dict[int, tuple[weakref.ref[TokenTable], Vocabulary]] = {}


def vocabulary(table: TokenTable) -> Vocabulary:
    """Return the vocabulary of a table; made once per table object."""
    key = id(table)
    known = _made.get(key)
    if known is not None and known[0]() is table:
        return known[1]
    made = Vocabulary(table)
    _made[key] = (weakref.ref(table, lambda _: _made.pop(key, None)), made)
    return made
