r"""From windows to text: the only place that writes the marks << >> around tokens.

A ``<`` or ``>`` of the text itself that could be taken for part of a mark is written ``\<`` or ``\>``, and a run of
backslashes before any ``<`` or ``>`` is doubled; all other text stands as it is. ``parse_marked`` undoes it exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from exegete.errors import InputError
from exegete.tokens import TokenTable
from exegete.types import Array, Example

_ANGLES = re.compile(r"(\\*)([<>])")


def render_plain(tokens: Sequence[int] | Array, table: TokenTable) -> str:
    """Return the text of a window, without marks and unescaped."""
    return table.decode(_ids(tokens))


def render_marked(tokens: Sequence[int] | Array, marks: Sequence[bool] | Array, table: TokenTable) -> str:
    """Return the text of a window with << >> around marked tokens; adjacent ones share one pair.

    A character whose bytes span several tokens stays whole and is marked when any of them is. A token without text
    (BOS, say) neither shows a mark nor separates two. Raises InputError when tokens and marks differ in length.
    """
    shown = ((text, mark > 0) for text, mark in _visible(tokens, np.asarray(marks, dtype=float), table))
    parts = []
    for marked, group in groupby(shown, key=lambda pair: pair[1]):
        parts.append(("".join(text for text, _ in group), marked))
    return _write(parts)


def render_for_explainer(
    example: Example, maximum: float, table: TokenTable, threshold: float = 0.3
) -> tuple[str, list[tuple[str, int]]]:
    """Return a window's text with its active tokens marked, and those tokens with their strengths.

    Active tokens are those above ``threshold`` of the example's own maximum; a strength is relative to the latent's
    ``maximum`` (arXiv 2410.13928, section 3.2 and App. B): ten times the ratio, rounded up, so that no active token
    shows as 0, and at most 10. Token texts are unescaped. Raises InputError when ``maximum`` is not positive.
    """
    if not maximum > 0:
        raise InputError(f"strengths are relative to a positive maximum, got {maximum}")
    shown = marks(example, threshold)
    active = _visible(example.tokens, np.where(shown, example.activations, 0.0), table)
    return (
        render_marked(example.tokens, shown, table),
        [(text, _strength(value / maximum)) for text, value in active if value > 0],
    )


def marks(example: Example, threshold: float = 0.3) -> Array:
    """Return which tokens of a window are active, bool [window]: above ``threshold`` of its own maximum, and firing."""
    strongest = max(example.maximum, 0.0)
    active: Array = (example.activations > threshold * strongest) & (example.activations > 0)
    return active


def transplant_marks(
    silent: Sequence[Example], firing: Sequence[Example], rng: np.random.Generator, threshold: float = 0.3
) -> Array:
    """Return marks for silent windows, bool [silent, window]: each the whole mark pattern of a firing window.

    Patterns are dealt without repetition until all were used, then anew: with as many silent as firing windows both
    have exactly the same patterns, so that where and how much is marked says nothing about the truth. Raises
    InputError when there is no firing window or the windows differ in length.
    """
    if not firing:
        raise InputError("marks can only be taken from firing windows, and there is none")
    lengths = {len(e.tokens) for e in (*silent, *firing)}
    if len(lengths) != 1:
        raise InputError(f"marks are moved between windows of one length, got {sorted(lengths)}")
    patterns = np.stack([marks(e, threshold) for e in firing])
    rounds = -(-len(silent) // len(firing))
    dealt = [rng.permutation(len(firing)) for _ in range(rounds)]
    chosen = np.concatenate(dealt)[: len(silent)] if dealt else np.empty(0, dtype=np.int64)
    moved: Array = patterns[chosen]
    return moved


def parse_marked(text: str) -> list[tuple[str, bool]]:
    """Return the parts of a marked text, each with whether it was marked: the inverse of ``render_marked``.

    Raises InputError when marks are not closed, or opened twice.
    """
    parts: list[tuple[str, bool]] = []
    current, inside, at = "", False, 0
    while match := _ANGLES.search(text, at):
        slashes, angle = match.groups()
        current += text[at : match.start()] + "\\" * (len(slashes) // 2)
        at = match.end()
        if len(slashes) % 2 or text[at : at + 1] != angle:
            current += angle
            continue
        at += 1
        if inside is (angle == "<"):
            raise InputError(f"marks << >> do not pair up at character {match.start()} of {text!r}")
        parts.append((current, inside))
        current, inside = "", not inside
    if inside:
        raise InputError(f"a mark << is not closed in {text!r}")
    parts.append((current + text[at:], False))
    return [part for part in parts if part[0]]


def _strength(ratio: float) -> int:
    # Rounding first: 10 * 0.3 of a float32 is not to become 4 for a digit in the seventh place.
    return min(max(math.ceil(round(10.0 * ratio, 5)), 0), 10)


def _ids(tokens: Sequence[int] | Array) -> list[int]:
    return np.asarray(tokens).tolist() if len(tokens) else []


def _visible(tokens: Sequence[int] | Array, values: Array, table: TokenTable) -> Iterator[tuple[str, float]]:
    """Yield each token's text and value, without tokens that show nothing.

    Where a character spans tokens, the largest value of them stands with it.
    """
    ids = _ids(tokens)
    if len(ids) != len(values):
        raise InputError(f"every token has one mark, got {len(ids)} tokens and {len(values)} marks")
    held = 0.0
    for token, text, value in zip(ids, table.spans(ids), values.tolist(), strict=True):
        own = 0.0 if token in table.special else value
        if text:
            yield text, max(own, held)
            held = 0.0
        else:
            held = max(own, held)


def _write(parts: Sequence[tuple[str, bool]]) -> str:
    """Join parts, marked ones within << >>, and escape what could be taken for a mark."""
    last = len(parts) - 1
    return "".join(
        f"<<{_escape(text, True, True)}>>" if marked else _escape(text, i > 0, i < last)
        for i, (text, marked) in enumerate(parts)
    )


def _escape(text: str, after_mark: bool, before_mark: bool) -> str:
    """Escape one part: angles beside their like or beside a mark, and backslashes before an angle or a mark."""

    def replace(match: re.Match[str]) -> str:
        slashes, angle = match.groups()
        start, end = match.start(2), match.end(2)
        beside = angle in (text[start - 1 : start], text[end : end + 1])
        edge = (after_mark and start == 0) or (before_mark and end == len(text))
        return slashes * 2 + ("\\" if beside or edge else "") + angle

    body = _ANGLES.sub(replace, text)
    tail = len(text) - len(text.rstrip("\\"))
    return body + "\\" * tail if before_mark else body
