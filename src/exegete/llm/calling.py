"""A client that never loses or repays a call: kept replies, limits, money and further attempts around one backend."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, final

from exegete.errors import BudgetError, LLMError
from exegete.files import fault_point
from exegete.llm.backend import Backend, Capabilities, TransientError
from exegete.llm.client import LLMClient
from exegete.llm.limits import Limits
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.llm.replies import ReplyCache
    from exegete.llm.spending import Spending

BACKOFF = 0.5
"""Seconds before the second attempt; they double with every further one."""
MOST_BACKOFF = 60.0
PROBE_RETRIES = 2
"""Further attempts at a backend's own requests: whoever asks what it can do does not want to wait for an outage."""


@final
class Caller(LLMClient):
    """Answers a request from what is kept, or by as many attempts as it takes, up to ``retries`` after the first.

    A failure that may pass is tried again after a growing, jittered time, and not before the server's Retry-After. One
    that no further call can mend stops everything: this call and all later ones raise the same LLMError, and nothing
    more is sent. Every attempt is on the ledger before it is sent. Concurrent equal requests are sent once.

    Args:
        backend: Makes the attempts.
        limits: How hard it may be asked; not limited when None.
        retries: Attempts after the first.
        replies: Kept replies; none are kept when None.
        spending: The ledger and its budget; nothing is counted when None.
        temperature: What explainer and judge ask for.
        backoff: Seconds before the second attempt.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        limits: Limits | None = None,
        retries: int = 5,
        replies: ReplyCache | None = None,
        spending: Spending | None = None,
        temperature: float = 0.0,
        backoff: float = BACKOFF,
    ) -> None:
        self._backend, self._retries, self._backoff = backend, retries, backoff
        self._limits = Limits.none() if limits is None else limits
        self._replies, self._spending = replies, spending
        self._temperature = temperature
        backend.probe_through(self._probe)

    @property
    def name(self) -> str:
        """The model as named on the command line, without keys."""
        return self._backend.name

    @property
    def temperature(self) -> float:
        """Sampling temperature that explainer and judge ask for."""
        return self._temperature

    @property
    def natural(self) -> bool:
        """Whether the backend's model is."""
        return self._backend.natural

    @property
    def unlimited(self) -> bool:
        """Whether the backend is."""
        return self._backend.unlimited

    @property
    def backend(self) -> Backend:
        """What makes the attempts."""
        return self._backend

    @property
    def limits(self) -> Limits:
        """How hard the backend may be asked now."""
        return self._limits

    @property
    def spending(self) -> Spending | None:
        """The ledger; None where nothing is counted."""
        return self._spending

    def __repr__(self) -> str:
        return f"Caller({self.name!r})"

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Answer a request. Raises LLMError when no further call can succeed, BudgetError when money is short."""
        if self._limits.stopped is not None:
            raise LLMError(self._limits.stopped)
        if self._replies is None:
            return await self._answer(request, None)
        from exegete.llm.replies import request_key

        key = request_key(self._backend.identity, request)
        kept = await self._replies.claim(key)
        if kept is not None:
            if self._spending is not None:
                self._spending.cached(kept, request.stage)
            return kept
        try:
            return await self._answer(request, key)
        except BaseException:
            self._replies.release(key)
            raise

    async def check(self) -> None:
        """Ask whether the model is there. Raises LLMError or InputError when not."""
        await self._backend.check()

    async def capabilities(self) -> Capabilities:
        """Return what the model can do; found out once. Where that takes requests, they are paid for like others."""
        return await self._backend.capabilities()

    async def close(self) -> None:
        """Give back connections; the next call opens new ones."""
        await self._backend.close()

    def end(self) -> None:
        """Close the files of kept replies and of the ledger; the client is not used again."""
        for part in (self._replies, self._spending):
            if part is not None:
                part.close()

    async def _answer(self, request: LLMRequest, key: str | None) -> LLMReply:
        reply = await self._attempts(request, key, self._retries, stops=True)
        if reply.finish == "error" and key is not None and self._replies is not None:
            self._replies.release(key)
        return reply

    async def _probe(self, request: LLMRequest) -> LLMReply:
        """Answer a request of the backend's own: never from what is kept, and its refusal stops nothing."""
        return await self._attempts(request, None, min(self._retries, PROBE_RETRIES), stops=False)

    async def _attempts(self, request: LLMRequest, key: str | None, retries: int, *, stops: bool) -> LLMReply:
        tokens = self._most_tokens(request) if self._limits.counts_tokens else 0
        for attempt in range(retries + 1):
            slot = await self._limits.acquire(tokens)
            used: int | None = None
            try:
                reply = await self._attempt(request, key)
                used = _spent(reply)
                self._limits.succeeded()
                return reply
            except TransientError as error:
                failure = error
                used = 0 if error.unpaid else None
                self._limits.failed(slot, error.reason, throttled=error.throttled, retry_after=error.retry_after)
            except BudgetError:
                raise
            except LLMError as error:
                if stops:  # before the slot is free for another
                    self._limits.stop(str(error))
                raise
            finally:
                self._limits.release(slot, used)
            if attempt < retries:
                await asyncio.sleep(self._pause(attempt, failure))
        tries = "" if retries == 0 else f" ({retries + 1} attempts)"
        return LLMReply(text=None, finish="error", error=f"{failure.reason}{tries}")

    def _most_tokens(self, request: LLMRequest) -> int:
        from exegete.llm.spending import most_prompt_tokens

        prompt = self._backend.count(request)
        return (most_prompt_tokens(request) if prompt is None else prompt) + request.max_tokens

    async def _attempt(self, request: LLMRequest, key: str | None) -> LLMReply:
        spending = self._spending
        if spending is None or self._backend.collects(request):
            # What an earlier attempt paid for stands on the ledger since then, where nobody came back to settle it.
            reply = await self._backend.send(request)
            self._keep(key, reply)
            if spending is not None:
                spending.cached(reply, request.stage)
            return reply
        entry = await spending.reserve(request, self._backend.count(request))
        fault_point("request reserved")
        try:
            reply = await self._backend.send(request)
        except TransientError as error:
            (spending.cancel if error.unpaid else spending.settle_unknown)(entry)
            raise
        except LLMError:
            spending.cancel(entry)  # refused before any work was done
            raise
        except BaseException:
            spending.settle_unknown(entry)  # under way when this program was stopped
            raise
        # Stored before it is settled: a stop between the two counts it as dear as it could be, and keeps it.
        self._keep(key, reply)
        spending.settle(entry, reply)
        fault_point("reply settled")
        return reply

    def _keep(self, key: str | None, reply: LLMReply) -> None:
        fault_point("reply received")
        if key is not None and self._replies is not None:
            self._replies.put(key, reply)
            fault_point("reply stored")

    def _pause(self, attempt: int, failure: TransientError) -> float:
        """Return the seconds until the next attempt: doubling, half of it by chance, at least what the server asks."""
        longest = min(MOST_BACKOFF, self._backoff * 2.0**attempt)
        return max(longest * random.uniform(0.5, 1.0), failure.retry_after or 0.0)


def _spent(reply: LLMReply) -> int | None:
    """Return the tokens that an attempt used; None where nobody counted."""
    if reply.prompt_tokens is None or reply.completion_tokens is None:
        return None
    return reply.prompt_tokens + reply.completion_tokens
