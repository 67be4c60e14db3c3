"""What each token id stands for, without a tokenizer: the token-bytes table written into every run.

Rendering, rules and reports decode text from this table alone, so that they need neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from exegete.errors import CorruptError


@final
class TokenTable:
    """The bytes of every token id, and which ids are special (BOS, padding …)."""

    def __init__(self, pieces: Sequence[bytes], special: Iterable[int] = ()) -> None:
        self.pieces = tuple(pieces)
        self.special = frozenset(special)

    def __len__(self) -> int:
        return len(self.pieces)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenTable) and (self.pieces, self.special) == (other.pieces, other.special)

    def __hash__(self) -> int:
        return hash((self.pieces, self.special))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Each token decoded on its own; bytes that are no UTF-8 by themselves become U+FFFD."""
        return tuple(piece.decode("utf-8", errors="replace") for piece in self.pieces)

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """Which ids are special, bool [ids]."""
        found = np.zeros(len(self), dtype=bool)
        found[[t for t in self.special if 0 <= t < len(self)]] = True
        return found

    @cached_property
    def shown(self) -> npt.NDArray[Any]:
        """What each token shows when it stands alone, str [ids]: its text, nothing for a special token."""
        found = np.empty(len(self), dtype=object)
        found[:] = self.texts
        found[self.is_special] = ""
        return found

    @cached_property
    def is_whole(self) -> npt.NDArray[np.bool_]:
        """Which tokens show the same beside any others, bool [ids]: special ones, and whole characters, at least one.

        Windows of such tokens alone need no look at bytes: their text is that of the tokens in a row.
        """
        whole = np.fromiter(map(_whole, self.pieces, self.texts), dtype=bool, count=len(self))
        return whole | self.is_special

    @cached_property
    def is_angled(self) -> npt.NDArray[np.bool_]:
        """Which tokens show a ``<``, a ``>`` or a backslash, bool [ids]: what has to be escaped beside marks."""
        return np.fromiter(map(_angled, self.shown), dtype=bool, count=len(self))

    @cached_property
    def _alone(self) -> tuple[str | None, ...]:
        return tuple(t if whole else None for t, whole in zip(self.shown, self.is_whole.tolist(), strict=True))

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode a run of tokens; special tokens stand for nothing, characters that span tokens stay whole."""
        whole = b"".join(self.pieces[t] for t in tokens if t not in self.special)
        return whole.decode("utf-8", errors="replace")

    def decode_rows(self, tokens: npt.NDArray[Any]) -> list[str]:
        """Decode many windows [n, window]; each text equals ``decode`` of its tokens."""
        texts = ["".join(parts) for parts in self.shown[tokens].tolist()]
        for i in np.flatnonzero(~self.is_whole[tokens].all(axis=1)).tolist():
            texts[i] = self.decode(tokens[i].tolist())
        return texts

    def spans(self, tokens: Sequence[int]) -> list[str]:
        """Decode token by token so that the parts joined equal ``decode``.

        A character whose bytes span several tokens belongs to the last of them; the earlier ones get nothing.
        """
        parts: list[str] = []
        held = b""
        for token in tokens:
            if not held and (alone := self._alone[token]) is not None:
                parts.append(alone)
                continue
            if token in self.special:
                parts.append("")
                continue
            held += self.pieces[token]
            text, held = _whole_characters(held)
            parts.append(text)
        if held and parts:
            parts[-1] += held.decode("utf-8", errors="replace")
        return parts

    def to_json(self) -> str:
        """Return the table as JSON: bytes as latin-1 text, which is exact for every byte."""
        data = {"format": 1, "special": sorted(self.special), "pieces": [p.decode("latin-1") for p in self.pieces]}
        return json.dumps(data, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> TokenTable:
        """Read what ``to_json`` wrote. Raises CorruptError on anything else."""
        try:
            data = json.loads(text)
            return cls([p.encode("latin-1") for p in data["pieces"]], data["special"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"the token table does not parse: {error}") from error


def _angled(text: str) -> bool:
    return "<" in text or ">" in text or "\\" in text


def _whole(piece: bytes, text: str) -> bool:
    # U+FFFD may stand in the piece itself; only then need the bytes be compared.
    return bool(text) and ("\ufffd" not in text or text.encode() == piece)


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into the decoded whole characters and an incomplete tail of at most three bytes."""
    for tail in range(min(3, len(data)), 0, -1):
        lead = data[-tail]
        need = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 1
        if need > tail and all(0x80 <= b <= 0xBF for b in data[len(data) - tail + 1 :]):
            return data[:-tail].decode("utf-8", errors="replace"), data[-tail:]
    return data.decode("utf-8", errors="replace"), b""
