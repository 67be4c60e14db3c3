"""A reader of text who believes explanations at known error rates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, final

from exegete.llm.reader import Reader
from exegete.llm.scripted import Evidence, Predicate
from exegete.llm.scripted.evidence import uniform

PER_CHARACTER: Final = -0.8
"""Nats that a character costs it."""
NATS: Final = 4.0
"""Nats that one deviation of evidence is worth."""
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
