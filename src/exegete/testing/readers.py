"""Readers of text who believe explanations at known error rates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Final, final

from exegete.llm.reader import Reader
from exegete.llm.scripted import Evidence, Predicate
from exegete.llm.scripted.evidence import uniform
from exegete.tokens import TokenTable

PER_CHARACTER: Final = -0.8
"""Nats that a character costs it."""
NATS: Final = 4.0
"""Nats that one deviation of evidence is worth."""
WORTH: Final = 1.0
"""Nats that a token is worth which an explanation is taken to cover."""
_SPELLED = re.compile("\u27e8(\\d+)\u27e9")
_DESCRIBED = re.compile(r"Feature: ([^\n]*)\nTexts with this feature:\n\Z")


@final
class SimulatedReader(Reader):
    """Finds a text the more probable the more the description before it seems to fit.

    ``predicates`` are those of descriptions by their text. The evidence for each text is drawn as that of a simulated
    judge is, by a hash of seed, description and text; a description that it does not know changes nothing.
    """

    def __init__(self, predicates: Mapping[str, Predicate], evidence: Evidence, *, seed: int = 0) -> None:
        # A beginning holds a description on one line.
        self._predicates = {" ".join(text.split()): predicate for text, predicate in predicates.items()}
        self._evidence, self._seed = evidence, seed

    @property
    def name(self) -> str:
        """``simulated``."""
        return "simulated"

    @property
    def natural(self) -> bool:
        """Never: what it reads measures nothing."""
        return False

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return log p of each continuation."""
        return [self._nats(beginning, continuation) for beginning, continuation in pairs]

    async def close(self) -> None:
        """It holds nothing."""

    def _nats(self, beginning: str, continuation: str) -> float:
        plain = PER_CHARACTER * len(continuation)
        found = _DESCRIBED.search(beginning)
        predicate = None if found is None else self._predicates.get(found.group(1))
        if found is None or predicate is None:
            return plain
        drawn = uniform(self._seed, "reader", found.group(1), continuation)
        return plain + NATS * self._evidence.at(drawn, predicate(continuation, None))


@final
class CountingReader(Reader):
    """Finds an explanation the more probable the more tokens of the text before it the explanation seems to cover.

    ``covered`` are the tokens that explanations cover, by their text. Such a token is taken for covered with the true
    positive rate of the evidence, any other with the false positive rate, and each taken is worth ``WORTH`` nats. The
    draw for a token is a hash of seed, explanation, and the text up to it, so that texts that begin alike are read
    alike. Texts hold tokens as ``spelled`` spells them.
    """

    def __init__(self, covered: Mapping[str, Iterable[int]], evidence: Evidence, *, seed: int = 0) -> None:
        self._covered = {text: frozenset(tokens) for text, tokens in covered.items()}
        self._evidence, self._seed = evidence, seed

    @property
    def name(self) -> str:
        """``counting``."""
        return "counting"

    @property
    def natural(self) -> bool:
        """It stands for a reader that was trained on natural language: all prompts are read to it."""
        return True

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return log p of each continuation, an explanation and the quotation mark that closes it."""
        return [
            PER_CHARACTER * len(said) + WORTH * self._taken(beginning, said.removesuffix('"'))
            for beginning, said in pairs
        ]

    async def close(self) -> None:
        """It holds nothing."""

    def _taken(self, beginning: str, explanation: str) -> int:
        covered = self._covered[explanation]
        rates = {fits: self._evidence.rate(fits) for fits in (True, False)}
        drawn = blake2b(f"{self._seed}|{explanation}".encode(), digest_size=8)
        taken = 0
        for token in map(int, _SPELLED.findall(beginning)):
            drawn.update(b"%d|" % token)
            taken += int.from_bytes(drawn.digest(), "little") / 2.0**64 < rates[token in covered]
        return taken


def spelled(table: TokenTable) -> TokenTable:
    """Return a table that spells tokens by their numbers, so that text can be taken apart into the same tokens."""
    return TokenTable([f"\u27e8{token}\u27e9".encode() for token in range(len(table))], table.special)
