r"""From windows to text: the only place that writes the marks << >> around tokens.

A ``<`` or ``>`` of the text itself that could be taken for part of a mark is written ``\<`` or ``\>``, and a run of
backslashes before any ``<`` or ``>`` is doubled; all other text stands as it is. ``parse_marked`` undoes it exactly.

``render_plain``, ``render_marked`` and ``render_for_explainer`` show one window and say plainly what is meant;
``plain_texts``, ``marked_texts`` and ``explained_texts`` show many at once, the same to the character.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

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
    _require_positive(maximum)
    shown = marks(example, threshold)
    visible = _visible(example.tokens, np.where(shown, example.activations, 0.0), table)
    active = [(text, value) for text, value in visible if value > 0]
    strengths = _strengths(np.array([value for _, value in active]), maximum)
    return (
        render_marked(example.tokens, shown, table),
        [(text, strength) for (text, _), strength in zip(active, strengths, strict=True)],
    )


def plain_texts(tokens: Array, table: TokenTable) -> list[str]:
    """Return ``render_plain`` of many windows, tokens [n, window]."""
    return table.decode_rows(tokens)


def marked_texts(tokens: Array, marked: Array, table: TokenTable) -> list[str]:
    """Return ``render_marked`` of many windows: tokens [n, window] and marks, bool [n, window].

    Raises InputError when the two differ in shape.
    """
    if tokens.shape != marked.shape:
        raise InputError(f"every token has one mark, got {tokens.shape} tokens and {marked.shape} marks")
    return _marked(tokens, *_visible_rows(tokens, marked, table), table)


def explained_texts(
    tokens: Array, activations: Array, maximum: float, table: TokenTable, threshold: float = 0.3
) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return ``render_for_explainer`` of many windows: tokens and activations, both [n, window].

    Raises InputError when ``maximum`` is not positive.
    """
    _require_positive(maximum)
    shown = np.where(active_tokens(activations, threshold), activations, 0)
    rows, pieces, values = _visible_rows(tokens, shown, table)
    active: list[list[tuple[str, int]]] = [[] for _ in tokens]
    at = np.flatnonzero(values > 0)
    for i, row, strength in zip(at.tolist(), rows[at].tolist(), _strengths(values[at], maximum), strict=True):
        active[row].append((pieces[i], strength))
    return list(zip(_marked(tokens, rows, pieces, values, table), active, strict=True))


def marks(example: Example, threshold: float = 0.3) -> Array:
    """Return which tokens of a window are active, bool [window]: above ``threshold`` of its own maximum, and firing."""
    found: Array = active_tokens(example.activations[None], threshold)[0]
    return found


def active_tokens(activations: Array, threshold: float = 0.3) -> Array:
    """Return ``marks`` of many windows, bool [n, window], from their activations [n, window] float32."""
    strongest = activations.max(axis=1, keepdims=True, initial=0.0).astype(np.float64)
    least = (threshold * strongest).astype(activations.dtype)
    active: Array = (activations > least) & (activations > 0)
    return active


def transplant_marks(
    patterns: Array, starts: Array, silent_starts: Array, rng: np.random.Generator, hidden: Array | None = None
) -> Array:
    """Return marks for silent windows, bool [silent, window]: each the whole mark pattern of a firing window.

    ``patterns`` [firing, window] are the marks of firing windows and ``starts`` [firing] where these begin in their
    rows; ``silent_starts`` [silent] the same of the silent ones. Both are ranked by where they begin, ties at random,
    and each silent window gets the pattern at its own rank: what is marked at the start of rows is marked there again.
    With as many silent as firing windows each pattern is dealt once; else each equally often, give or take one, so that
    where and how much is marked says nothing about the truth. ``hidden`` [silent, window] says where a window can show
    no mark (special tokens); a pattern that would lose marks there is exchanged with the nearest that fits.

    Raises InputError when there is no firing window to take marks from.
    """
    silent, firing = len(silent_starts), len(patterns)
    if not firing:
        raise InputError("marks can only be taken from firing windows, and there is none")
    ranked = np.lexsort((rng.random(firing), starts))
    order = np.lexsort((rng.random(silent), silent_starts))
    # Systematic: points of one spacing and one random offset, so that no pattern is dealt twice before all are once.
    places = np.floor((np.arange(silent) + rng.random()) * (firing / max(silent, 1))).astype(np.int64)
    dealt = ranked[np.minimum(places, firing - 1)]
    if hidden is not None:
        _exchange(dealt, patterns, hidden[order])
    moved = np.zeros((silent, patterns.shape[1]), dtype=bool)
    moved[order] = patterns[dealt]
    return moved


def _exchange(dealt: Array, patterns: Array, hidden: Array) -> None:
    """Swap patterns in ``dealt`` [silent] so that, where possible, none has a mark at a hidden place [silent, window].

    Swapping keeps how often each pattern is dealt; the nearest rank that suits both is taken.
    """
    for i in np.flatnonzero((patterns[dealt] & hidden).any(axis=1)).tolist():
        if not (patterns[dealt[i]] & hidden[i]).any():
            continue  # it was exchanged by an earlier one
        suits = ~((patterns[dealt] & hidden[i]).any(axis=1) | (patterns[dealt[i]] & hidden).any(axis=1))
        others = np.flatnonzero(suits)
        if len(others):
            j = int(others[np.abs(others - i).argmin()])
            dealt[i], dealt[j] = dealt[j], dealt[i]


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


def _visible_rows(tokens: Array, values: Array, table: TokenTable) -> tuple[Array, list[str], Array]:
    """Return ``_visible`` of many windows, one after another: the row, text and value of each token that shows one."""
    texts, special = table.shown[tokens], table.is_special[tokens]
    visible, values = ~special, np.where(special, 0, values)
    broken = np.flatnonzero(~table.is_whole[tokens].all(axis=1)).tolist()
    for i in broken:
        texts[i] = parts = table.spans(tokens[i].tolist())
        visible[i] = [part != "" for part in parts]
    if visible.all() and not broken:
        return np.repeat(np.arange(len(tokens)), tokens.shape[1]), texts.ravel().tolist(), values.ravel()
    rows = np.nonzero(visible)[0]
    if not broken or not len(rows):
        return rows, texts[visible].tolist(), values[visible]
    # Each token that shows text, with those before it that show none, back to the last that did or to the row's start.
    at = np.flatnonzero(visible)
    begins = np.append(0, at[:-1] + 1)
    begins = np.maximum(begins, rows * tokens.shape[1])
    behind = np.logical_or.accumulate(visible[:, ::-1], axis=1)[:, ::-1]  # what comes after the last shows nowhere
    return rows, texts[visible].tolist(), np.maximum.reduceat(np.where(behind, values, 0).ravel(), begins)


def _marked(tokens: Array, rows: Array, pieces: list[str], values: Array, table: TokenTable) -> list[str]:
    """Return marked windows from what ``_visible_rows`` says of them. Marks are written into ``pieces``."""
    bounds = np.searchsorted(rows, np.arange(len(tokens) + 1)).tolist()
    opens, closes = _runs(values > 0, rows)
    careful = {}
    for i in np.flatnonzero(table.is_angled[tokens].any(axis=1)).tolist():
        low, high = bisect_left(opens, bounds[i]), bisect_left(opens, bounds[i + 1])
        runs = zip(opens[low:high], closes[low:high], strict=True)
        careful[i] = _write(_parts(pieces, bounds[i], bounds[i + 1], runs))
    for at in opens:
        pieces[at] = "<<" + pieces[at]
    for at in closes:
        pieces[at - 1] += ">>"
    return [careful[i] if i in careful else "".join(pieces[a:b]) for i, (a, b) in enumerate(pairwise(bounds))]


def _runs(on: Array, rows: Array) -> tuple[list[int], list[int]]:
    """Return where runs of marks begin, and one past where they end; none goes on from one row into the next."""
    inside = on[1:] & on[:-1] & (rows[1:] == rows[:-1])  # between two tokens
    opens, closes = on.copy(), on.copy()
    opens[1:] &= ~inside
    closes[:-1] &= ~inside
    return np.flatnonzero(opens).tolist(), (np.flatnonzero(closes) + 1).tolist()


def _parts(pieces: Sequence[str], start: int, stop: int, runs: Iterable[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Return the pieces from ``start`` to ``stop``, those within each run and those between joined, and which is."""
    parts, at = [], start
    for begin, end in (*runs, (stop, stop)):
        if at < begin:
            parts.append(("".join(pieces[at:begin]), False))
        if begin < end:
            parts.append(("".join(pieces[begin:end]), True))
        at = end
    return parts


def _require_positive(maximum: float) -> None:
    if not maximum > 0:
        raise InputError(f"strengths are relative to a positive maximum, got {maximum}")


def _strengths(values: Array, maximum: float) -> list[int]:
    # Rounding first: 10 * 0.3 of a float32 is not to become 4 for a digit in the seventh place.
    tenths = np.ceil(np.round(10.0 * values.astype(np.float64) / maximum, 5))
    strengths: list[int] = np.clip(tenths, 0, 10).astype(np.int64).tolist()
    return strengths


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
    edges = (text[:1] if after_mark else "") + (text[-1:] if before_mark else "")
    if "\\" not in text and "<<" not in text and ">>" not in text and "<" not in edges and ">" not in edges:
        return text  # most texts: nothing in it could be taken for a mark

    def replace(match: re.Match[str]) -> str:
        slashes, angle = match.groups()
        start, end = match.start(2), match.end(2)
        beside = angle in (text[start - 1 : start], text[end : end + 1])
        edge = (after_mark and start == 0) or (before_mark and end == len(text))
        return slashes * 2 + ("\\" if beside or edge else "") + angle

    body = _ANGLES.sub(replace, text)
    tail = len(text) - len(text.rstrip("\\"))
    return body + "\\" * tail if before_mark else body
