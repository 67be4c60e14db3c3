"""Texts of two parts as token ids: which tokens hold a character of the second part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, final

import numpy as np

from exegete.tokens import TokenTable
from exegete.types import Array

_APART: Final = 24
"""Characters before the border of two parts that are always tokenised together with the second."""
_LONG: Final = 200
"""Beginnings of so many characters are worth tokenising in two pieces."""
_TRIES: Final = 6


@final
@dataclass(frozen=True, slots=True)
class Spelled:
    """The ids of a whole text; those from place ``first`` on hold a character of its second part."""

    ids: tuple[int, ...]
    first: int


@final
class Spelling:
    """Spells (beginning, continuation) pairs with a tokenizer: both together, so that a token may cross their border.

    Before them stands what the tokenizer puts there by itself, or BOS where it puts nothing and there is one.

    Of a long beginning only the end is tokenised again with every continuation. It is cut where the tokenizer splits
    words anyway, well before the border. Tokenizers read words from left to right, so what stands before such a place
    never depends on what follows; that the pieces give the ids of the whole is checked on the beginning and on its
    first continuation, and where they do not, everything is tokenised whole.
    """

    def __init__(self, tokenizer: Any, table: TokenTable) -> None:
        self._tokenizer = tokenizer
        self._lengths: Array = np.array([len(piece) for piece in table.pieces], np.int64)
        self._starts = _starts(tokenizer)
        self._cut = lru_cache(64)(self._find_cut)

    def spell(self, pairs: Sequence[tuple[str, str]]) -> list[Spelled | None]:
        """Return each pair's ids; None where it cannot be told which tokens are the continuation's."""
        places: dict[str, list[int]] = {}
        for place, (beginning, _) in enumerate(pairs):
            places.setdefault(beginning, []).append(place)
        ends: dict[tuple[str, str], None] = {}  # texts still to tokenise: the end of a beginning, and what follows it
        cuts: dict[str, tuple[tuple[int, ...], str]] = {}
        for beginning, among in places.items():
            cuts[beginning] = self._checked_cut(beginning, pairs[among[0]][1], len(among))
            ends.update(dict.fromkeys((cuts[beginning][1], pairs[place][1]) for place in among))
        spelled = dict(zip(ends, self._spell_whole(list(ends)), strict=True))
        found: list[Spelled | None] = []
        for beginning, continuation in pairs:
            head, end = cuts[beginning]
            whole = spelled[end, continuation]
            before = (*self._starts, *head)
            found.append(None if whole is None else Spelled((*before, *whole.ids), len(before) + whole.first))
        return found

    def _spell_whole(self, pairs: Sequence[tuple[str, str]]) -> list[Spelled | None]:
        if not pairs:
            return []
        texts = [beginning + continuation for beginning, continuation in pairs]
        every = self._ids(texts)
        return [self._bordered(text, ids, len(b)) for text, ids, (b, _) in zip(texts, every, pairs, strict=True)]

    def _bordered(self, text: str, ids: list[int], border: int) -> Spelled | None:
        """Count by the tokens' own bytes where these spell the text, else by what the tokenizer says of places."""
        known = [i < len(self._lengths) for i in ids]
        stops = self._lengths[ids].cumsum() if all(known) else np.zeros(1, np.int64)
        if (int(stops[-1]) if len(stops) else 0) == len(text.encode()):
            return Spelled(tuple(ids), int(np.searchsorted(stops, len(text[:border].encode()), side="right")))
        if not self._tokenizer.is_fast:
            return None
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        stops = np.array([stop for _, stop in encoded["offset_mapping"]], np.int64)
        return Spelled(tuple(ids), int(np.searchsorted(np.maximum.accumulate(stops), border, side="right")))

    def _checked_cut(self, beginning: str, continuation: str, n: int) -> tuple[tuple[int, ...], str]:
        if n < 2 or len(beginning) < _LONG:
            return (), beginning
        head, end = self._cut(beginning)
        whole, rest = self._ids([beginning + continuation, end + continuation])
        return (head, end) if [*head, *rest] == whole else ((), beginning)

    def _find_cut(self, beginning: str) -> tuple[tuple[int, ...], str]:
        """Return the ids of a first piece, and the text of the second; no first piece where there is no good cut."""
        (whole,) = self._ids([beginning])
        stop = len(beginning) - _APART
        for _ in range(_TRIES):
            at = beginning.rfind("\n", 0, stop) + 1
            if at <= 0:
                break
            head, end = self._ids([beginning[:at], beginning[at:]])
            if [*head, *end] == whole:
                return tuple(head), beginning[at:]
            stop = at - 1
        return (), beginning

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found


def _starts(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that begin every text."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    if place or tokenizer.bos_token_id is None:
        return tuple(full[:place])
    return (int(tokenizer.bos_token_id),)
