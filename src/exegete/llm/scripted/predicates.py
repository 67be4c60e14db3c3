"""Explanations that can be executed: what they say of a text, or of marked spans of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, final

import numpy as np

from exegete.errors import InputError
from exegete.types import Array, ExampleSet

if TYPE_CHECKING:
    from exegete.rules.language import Rule
    from exegete.tokens import TokenTable

Spans = tuple[tuple[int, int], ...]
Predicate = Callable[[str, Spans | None], bool]
"""Whether a text fits: ``(text, None)`` asks of detection, does any place fit; ``(text, spans)`` of fuzzing, does every
marked span of characters fit (where nothing is marked, nothing fits)."""

_QUOTED = re.compile(r'the text ("(?:[^"\\]|\\.)*")', re.IGNORECASE)


def quoted_text(explanation: str) -> Predicate | None:
    """Return the predicate of ``the text "…"`` (a JSON string); None when the explanation has no such form."""
    found = _QUOTED.search(explanation)
    if found is None:
        return None
    quoted = str(json.loads(found.group(1), strict=False))

    def fits(text: str, spans: Spans | None) -> bool:
        if spans is None:
            return quoted in text
        return bool(spans) and all(quoted in text[start:stop] for start, stop in spans)

    return fits


def known_windows(examples: Sequence[ExampleSet], table: TokenTable) -> dict[str, Array]:
    """Return the token ids of every window of these sets by the plain text that a prompt shows of it."""
    return {table.decode(map(int, e.tokens)): e.tokens for chosen in examples for e in chosen.examples}


def rule_predicate(rule: Rule, table: TokenTable, windows: Mapping[str, Array]) -> TokenPredicate:
    """Return the predicate of a rule, run on the window alone with its state counted from the window's start."""
    from exegete.rules.execute import execute

    def matched(text: str) -> tuple[Array, Array]:
        tokens = np.asarray(windows[text] if text in windows else greedy_tokens(text, table), dtype=np.uint32)
        if not len(tokens):
            return tokens, np.zeros(0, bool)
        shown = ~table.is_special[tokens]
        return tokens, execute([rule], tokens[None], table, shown[None])[0, 0] > 0

    return TokenPredicate(matched, table)


@final
class TokenPredicate:
    """A predicate that says of every token of a text whether it fits: of the text, does any; of marks, do all.

    ``matched`` gives the tokens of a text and which of them fit, both [window]. A span of characters covers the tokens
    that share a character with it. Tokens that are shown only together (the bytes of one character) fit when any of
    them does, as they are marked when any of them is.
    """

    def __init__(self, matched: Callable[[str], tuple[Array, Array]], table: TokenTable) -> None:
        self._matched, self._table = matched, table

    def __call__(self, text: str, spans: Spans | None) -> bool:
        """Return whether a text fits, or all of its marked spans; where nothing is marked, nothing does."""
        if spans is None:
            return bool(self._matched(text)[1].any())
        return bool(spans) and all(self.each(text, spans))

    def each(self, text: str, spans: Spans) -> list[bool]:
        """Return of each span of characters whether it fits."""
        tokens, matches = self._matched(text)
        sizes = [len(part) for part in self._table.spans(tokens.tolist())]
        last = [i for i, size in enumerate(sizes) if size]  # the tokens with which text is shown
        if not last:
            return [False] * len(spans)
        units = np.minimum(np.searchsorted(last, np.arange(len(tokens))), len(last) - 1)
        fitting = np.bincount(units, weights=matches) > 0
        ends = np.cumsum([sizes[i] for i in last])
        low = np.searchsorted(ends, [start for start, _ in spans], side="right").tolist()
        high = np.searchsorted(ends, [stop for _, stop in spans], side="left").tolist()
        return [bool(fitting[begin : end + 1].all()) for begin, end in zip(low, high, strict=True)]


def fit_each(predicate: Predicate, text: str, spans: Spans) -> list[bool]:
    """Return of each span of a text whether it fits."""
    if isinstance(predicate, TokenPredicate):
        return predicate.each(text, spans)
    return [predicate(text, (span,)) for span in spans]


def greedy_tokens(text: str, table: TokenTable) -> Array:
    """Split text into the longest pieces of the table, from the left [n] uint32. Raises InputError where none fits."""
    data = text.encode()
    ids, longest = _pieces(table)
    tokens, at = [], 0
    while at < len(data):
        for size in range(min(longest, len(data) - at), 0, -1):
            token = ids.get(data[at : at + size])
            if token is not None:
                tokens.append(token)
                at += size
                break
        else:
            raise InputError(f"no token stands for {data[at : at + 1]!r}; give the judge the windows it will see")
    return np.array(tokens, dtype=np.uint32)


@lru_cache(maxsize=4)
def _pieces(table: TokenTable) -> tuple[dict[bytes, int], int]:
    ids = {piece: i for i, piece in reversed(list(enumerate(table.pieces))) if piece and i not in table.special}
    return ids, max(map(len, ids), default=0)
