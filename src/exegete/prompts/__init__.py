"""Prompt texts, kept as versioned data files so that a stored explanation can name exactly what was asked.

A file ``NAME.md`` holds chat messages, each opened by a line ``--- ROLE``; the last message is the question itself,
with ``{holes}`` that ``messages`` fills. A text is never changed once released: a new wording is a new file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from exegete.errors import CorruptError, unknown

ROLES = ("system", "user", "assistant")
_OPENING = re.compile(r"^--- (\w+)[ \t]*\n", re.MULTILINE)
_HOLE = re.compile(r"\{(\w+)\}")


def names() -> tuple[str, ...]:
    """Return the names of all prompts."""
    return tuple(sorted(f.name[:-3] for f in files(__name__).iterdir() if f.name.endswith(".md")))


@cache
def prompt(name: str) -> str:
    """Return the text of a prompt file. Raises NotFoundError naming the nearest known ones."""
    if name not in names():
        raise unknown("prompt", name, names())
    return (files(__name__) / f"{name}.md").read_text(encoding="utf-8")


@cache
def prompt_hash(name: str) -> str:
    """Return 16 hex digits that identify a prompt's text."""
    return hashlib.blake2b(prompt(name).encode(), digest_size=8).hexdigest()


@cache
def turns(name: str) -> tuple[tuple[str, str], ...]:
    """Return the (role, text) pairs of a prompt, holes unfilled. Raises CorruptError on a malformed file."""
    head, *parts = _OPENING.split(prompt(name))
    pairs = tuple((role, text.strip("\n")) for role, text in zip(parts[::2], parts[1::2], strict=True))
    roles = [role for role, _ in pairs]
    # Chat templates of several model families refuse anything but system, then user and assistant by turns.
    if head.strip() or roles[:1] != ["system"] or roles[1:] != [*["user", "assistant"] * (len(roles) // 2 - 1), "user"]:
        raise CorruptError(f"prompt {name!r} must be a system message, then user and assistant by turns, a user last")
    return pairs


def messages(name: str, holes: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    """Return the chat messages of a prompt, with the holes of its last message filled in one pass.

    One pass, so that braces in a filled-in text are never taken for another hole. All messages but the last are the
    same objects every time, and not to be changed. Raises KeyError on a hole that is not given.
    """
    shots, pieces, places = _split(name)
    filled = list(pieces)
    for place, hole in places:
        filled[place] = holes[hole]
    return (*shots, {"role": "user", "content": "".join(filled)})


@cache
def _split(name: str) -> tuple[tuple[Mapping[str, str], ...], tuple[str, ...], tuple[tuple[int, str], ...]]:
    """Return the constant messages of a prompt, the pieces of its last, and which of these are holes to fill."""
    *shots, (_, last) = turns(name)
    pieces = tuple(_HOLE.split(last))
    constant = tuple({"role": role, "content": text} for role, text in shots)
    return constant, pieces, tuple(enumerate(pieces))[1::2]
