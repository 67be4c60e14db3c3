"""Clients without a server."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import final

from exegete.errors import LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient
from exegete.types import LLMReply, LLMRequest


class Fake(LLMClient, ABC):
    """A client without a server, which keeps what it was asked."""

    @property
    def name(self) -> str:
        """The name that stands in a run instead of a model."""
        return self._name

    @property
    def simulated(self) -> bool:
        """Always: what it answers measures nothing."""
        return True

    def __init__(self, name: str, capabilities: Capabilities = Capabilities()) -> None:  # noqa: B008 - frozen
        self._name, self._capabilities = name, capabilities
        self.requests: list[LLMRequest] = []
        """Every request so far, in order of arrival."""

    async def check(self) -> None:
        """A fake is always there."""

    async def capabilities(self) -> Capabilities:
        """Return what the fake was said to do."""
        return self._capabilities

    async def close(self) -> None:
        """A fake holds no connections."""


@final
class ScriptedClient(Fake):
    """Answers with what it was given: replies in order, or a function of the request.

    A text becomes a reply that stopped by itself; an exception is raised. ``capabilities`` is what it says it can do.
    Raises LLMError when the script has run out.
    """

    def __init__(
        self,
        replies: Sequence[str | LLMReply | Exception] | Callable[[LLMRequest], str | LLMReply],
        *,
        name: str = "scripted",
        capabilities: Capabilities = Capabilities(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(name, capabilities)
        self._replies = replies

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Return the next reply of the script."""
        self.requests.append(request)
        if callable(self._replies):
            answer: str | LLMReply | Exception = self._replies(request)
        elif len(self.requests) <= len(self._replies):
            answer = self._replies[len(self.requests) - 1]
        else:
            raise LLMError(f"the script holds {len(self._replies)} replies, and this is request {len(self.requests)}")
        if isinstance(answer, Exception):
            raise answer
        return LLMReply(text=answer, finish="stop") if isinstance(answer, str) else answer
