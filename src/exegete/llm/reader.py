"""Language models that read: how probable is a continuation, given its beginning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Reader(ABC):
    """Gives log probabilities of text. What could not be read is None, never a number."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model as named on the command line."""

    @property
    @abstractmethod
    def natural(self) -> bool:
        """Whether it was trained on natural language; what another reads checks only that a pipeline works."""

    @property
    def final(self) -> bool:
        """Whether what it could not read it never can: text that is too long, and no call that failed."""
        return False

    @abstractmethod
    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return log p(continuation | beginning) in nats of each (beginning, continuation).

        It is summed over every token that holds a character of the continuation, the first included; None where the
        reading failed. Raises LLMError when the model cannot be used at all.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back connections; what is loaded stays."""
