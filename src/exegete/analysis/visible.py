"""Foreign text made safe to look at: what cannot be seen, or changes how the rest is seen, is spelled out."""

from __future__ import annotations

import re
import unicodedata

# Control, format (bidi marks, zero-width characters, tags), half surrogate pairs, private use, line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_PLAIN = re.compile(r"[\n\t -~]*")
_SPACES = {"\n": "↵", "\t": "→", "\r": "␍", " ": "·"}


def visible(text: str) -> str:
    """Return text with every invisible or direction-changing character as ⟨U+XXXX⟩; newline and tab stay."""
    if _PLAIN.fullmatch(text):
        return text
    return "".join(c if c in "\n\t" or not _is_hidden(c) else f"⟨U+{ord(c):04X}⟩" for c in text)


def visible_line(text: str) -> str:
    """Return text on one line, for a terminal or a title: newlines and tabs become signs."""
    return visible(text.replace("\n", "↵").replace("\t", "→"))


def visible_token(text: str) -> str:
    """Return a token standing alone: white space at its ends, newlines and tabs as signs, never empty.

    A mark that would join the character before it gets a dotted circle to sit on.
    """
    if not text:
        return "∅"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - left - len(inner) if inner else 0
    shown = visible_line(inner.replace("\r", _SPACES["\r"]))
    if inner and unicodedata.category(inner[0]) in ("Mn", "Me"):
        shown = "◌" + shown
    return _SPACES[" "] * left + shown + _SPACES[" "] * right


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN
