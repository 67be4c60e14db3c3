"""What each token id stands for, without a tokenizer: the token-bytes table written into every run.

Rendering, rules and reports decode text from this table alone, so that they need neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import final

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

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode a run of tokens; special tokens stand for nothing, characters that span tokens stay whole."""
        whole = b"".join(self.pieces[t] for t in tokens if t not in self.special)
        return whole.decode("utf-8", errors="replace")

    def spans(self, tokens: Sequence[int]) -> list[str]:
        """Decode token by token so that the parts joined equal ``decode``.

        A character whose bytes span several tokens belongs to the last of them; the earlier ones get nothing.
        """
        parts: list[str] = []
        held = b""
        for token in tokens:
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


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into the decoded whole characters and an incomplete tail of at most three bytes."""
    for tail in range(min(3, len(data)), 0, -1):
        lead = data[-tail]
        need = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 1
        if need > tail and all(0x80 <= b <= 0xBF for b in data[len(data) - tail + 1 :]):
            return data[:-tail].decode("utf-8", errors="replace"), data[-tail:]
    return data.decode("utf-8", errors="replace"), b""
