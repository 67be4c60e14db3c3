"""What stands behind a client: one attempt at one request, and what the model behind it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import final

from exegete.errors import LLMError
from exegete.types import LLMReply, LLMRequest

Send = Callable[[LLMRequest], Awaitable[LLMReply]]
DIRECT = ("probe", "check")
"""Stages of what a server is asked about itself: at once and at its full price, also where the rest goes in files."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a model was seen to do; what was not seen is False.

    ``chat`` answers messages and ``completions`` goes on with a prompt; ``logprobs`` come with generated tokens and
    their alternatives, ``prompt_logprobs`` with the tokens of a prompt; ``schema``: replies follow a JSON schema
    because the server holds them to it.
    """

    chat: bool = True
    completions: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    schema: bool = False


@final
class TransientError(LLMError):
    """One attempt failed, and another may not.

    ``status`` is the HTTP status, None where no answer came; ``retry_after`` the seconds the server asked to wait;
    ``throttled`` says that there was too much at once (429, 503, a timeout), so that fewer requests should be under
    way; ``unpaid`` that the attempt surely was not billed: it was refused, or never arrived.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        throttled: bool = False,
        unpaid: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.retry_after = reason, status, retry_after
        self.throttled, self.unpaid = throttled, unpaid


class Backend(ABC):
    """One model of one server or of this process. Retries, limits, kept replies and money are the ``Caller``'s."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model as named on the command line, without keys."""

    @property
    def identity(self) -> str:
        """What kept replies are the model's by: its name, with more where one name may stand for several models."""
        return self.name

    @property
    def natural(self) -> bool:
        """Whether the model was trained on natural language, as all are that are not known not to be."""
        return True

    @property
    def unlimited(self) -> bool:
        """Whether any number of requests may wait for any time, as in batch files."""
        return False

    @abstractmethod
    async def send(self, request: LLMRequest) -> LLMReply:
        """Make one attempt.

        Returns what came back; ``finish="error"`` for a failure that is this request's own and that another attempt
        would not mend. Raises TransientError for what another attempt may mend, any other LLMError for what no further
        call can mend (a refused key, an unknown model).
        """

    def collects(self, request: LLMRequest) -> bool:
        """Return whether a request was sent, and paid for, by an earlier attempt, so that ``send`` only collects it."""
        return False

    @abstractmethod
    async def check(self) -> None:
        """Ask whether the model is there. Raises LLMError or InputError when not."""

    @abstractmethod
    async def capabilities(self) -> Capabilities:
        """Return what the model can do; asked of the server once, then kept."""

    def probe_through(self, send: Send) -> None:  # noqa: B027 - most have no requests of their own
        """Make requests of its own, such as probes, through ``send``, which counts and limits them like any other."""

    @abstractmethod
    async def close(self) -> None:
        """Give back connections or memory; the backend opens anew when it is used again."""

    def count(self, request: LLMRequest) -> int | None:
        """Return the prompt's tokens exactly as they will be billed, None where the tokenizer is not known."""
        return None
