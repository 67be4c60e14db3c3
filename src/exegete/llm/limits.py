"""How hard one model may be asked: requests under way, requests and tokens a minute, and when to stop asking.

How many requests a server bears is found out as TCP finds out how much a line bears: doubling until the first sign of
too much, halving at every sign, and one more for every full round without one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from exegete.errors import LLMError

MINUTE = 60.0
START = 16.0
SELDOM, MOST_SELDOM = 0.01, 30.0
"""Seconds between attempts at a server that is still too busy with one at a time: doubling, and at most."""
MOST_HOLD = 600.0
"""A server that asks to wait longer than so many seconds is not waited for."""
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """When to leave a failing server alone.

    After ``failures`` attempts in a row without one success, all wait for the first of ``pauses`` seconds, and then a
    single attempt is made; if that fails too, they wait for the next pause, and after the last everything stops.
    """

    failures: int = 20
    pauses: tuple[float, ...] = (5.0, 20.0, 60.0)


@final
@dataclass(slots=True, eq=False)
class Slot:
    """Leave for one attempt: when it was given, and the entry of its tokens in the last minute's account."""

    since: float
    entry: list[float] | None


@final
class Limits:
    """Gives leave to attempts, in order of arrival. Serves one event loop after another, never two at once.

    At most ``maximum`` attempts are under way; at most ``requests_per_minute`` are given leave within any 60 seconds,
    and at most ``tokens_per_minute`` tokens. An attempt's tokens are what it may cost at most until it ends, then what
    it did cost; one that alone may exceed the limit goes when nothing else counts. Without ``adapt``, as many as there
    may be are under way from the beginning, whatever the server says.
    """

    def __init__(
        self,
        maximum: int = 32,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        breaker: Breaker | None = None,
        adapt: bool = True,
    ) -> None:
        self._maximum, self._adapt = float(maximum), adapt
        self._width = min(self._maximum, START) if adapt else self._maximum
        self._threshold = self._maximum  # below it, width doubles with every round
        self._requests = None if requests_per_minute is None else _Minute(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _Minute(tokens_per_minute)
        self._breaker = breaker
        self._under_way = 0
        self._shrunk = float("-inf")  # when the width was last halved
        self._held = float("-inf")  # nothing goes before
        self._failures, self._paused, self._trial = 0, 0, False
        self._waiting: deque[tuple[asyncio.Future[Slot], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped: str | None = None

    @classmethod
    def none(cls) -> Limits:
        """Return limits that hold nothing back."""
        return cls(1 << 30, adapt=False)

    @property
    def width(self) -> int:
        """How many attempts may be under way now."""
        return int(self._width)

    @property
    def under_way(self) -> int:
        """How many attempts are under way."""
        return self._under_way

    @property
    def counts_tokens(self) -> bool:
        """Whether ``acquire`` needs to be told of tokens."""
        return self._tokens is not None

    @property
    def stopped(self) -> str | None:
        """Why nothing is given leave any more; None while it is."""
        return self._stopped

    async def acquire(self, tokens: int = 0) -> Slot:
        """Wait for leave for one attempt of at most so many tokens. Raises LLMError once everything is stopped."""
        if self._stopped is not None:
            raise LLMError(self._stopped)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            now = loop.time()
            if self._wait(now, tokens) == 0.0:
                return self._admit(now, tokens)
            self._timer = None  # one of an earlier loop will never ring
        future: asyncio.Future[Slot] = loop.create_future()
        self._waiting.append((future, tokens))
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            else:
                self._waiting = deque(w for w in self._waiting if w[0] is not future)
                self._pump()  # the next may need less
            raise

    def release(self, slot: Slot, tokens: int | None = None) -> None:
        """Say that an attempt has ended, and what it cost where that is known."""
        self._under_way -= 1
        if slot.entry is not None and tokens is not None and self._tokens is not None:
            self._tokens.correct(slot.entry, tokens)
        if self._waiting:
            self._pump()

    def succeeded(self) -> None:
        """Say that an attempt was answered; called before its ``release``."""
        self._failures, self._paused, self._trial = 0, 0, False
        if self._width < self._maximum and self._under_way >= int(self._width):  # unused room says nothing
            self._width += 1.0 if self._width < self._threshold else 1.0 / self._width
            self._width = min(self._width, self._maximum)

    def failed(self, slot: Slot, reason: str, *, throttled: bool = False, retry_after: float | None = None) -> None:
        """Say that an attempt failed in a way that may pass; called before its ``release``."""
        now = asyncio.get_running_loop().time()
        self._failures += 1
        if retry_after is not None and retry_after > MOST_HOLD:
            self.stop(f"{reason}; the server asks to wait {retry_after:.0f} s; everything so far is kept, start again "
                      "later")  # fmt: skip
            return
        if throttled and self._adapt:
            self._shrink(slot, now, retry_after)
        if self._breaker is not None:
            self._break(self._breaker, now, reason)

    def _shrink(self, slot: Slot, now: float, retry_after: float | None) -> None:
        """Ask for less: half as much at once, and from one at a time on more and more seldom."""
        if slot.since > self._shrunk:  # what set off before the last halving tells nothing new
            self._width = self._threshold = max(1.0, min(self._width, float(self._under_way)) / 2)
            self._shrunk = now
        if retry_after is None:
            retry_after = 0.0 if self._width > 1.0 else min(MOST_SELDOM, SELDOM * 2.0**self._failures)
        self._held = max(self._held, now + retry_after)

    def stop(self, reason: str) -> None:
        """Give no leave any more; whoever waits gets LLMError."""
        if self._stopped is None:
            self._stopped = reason
        waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if not future.done():
                future.set_exception(LLMError(self._stopped))

    def _break(self, breaker: Breaker, now: float, reason: str) -> None:
        if not self._trial and (self._paused or self._failures < breaker.failures):
            return  # fine so far, or one that set off before the pause
        self._trial = False  # it ran alone
        if self._paused == len(breaker.pauses):
            self.stop(f"{reason}; the last {self._failures} attempts failed, so nothing more is sent; everything so "
                      "far is kept, start again to go on")  # fmt: skip
            return
        pause = breaker.pauses[self._paused]
        self._paused += 1
        self._held = max(self._held, now + pause)
        _log.warning("%s; %d attempts in a row failed, waiting %g s", reason, self._failures, pause)

    def _wait(self, now: float, tokens: float) -> float:
        """Return how long an attempt has to wait: 0 for not at all, infinity for until another ends."""
        if self._under_way >= int(self._width) or (self._paused and self._under_way):
            return float("inf")
        wait = max(0.0, self._held - now)
        if self._requests is not None:
            wait = max(wait, self._requests.wait(now, 1.0))
        if self._tokens is not None:
            wait = max(wait, self._tokens.wait(now, tokens))
        return wait

    def _admit(self, now: float, tokens: float) -> Slot:
        self._under_way += 1
        self._trial = bool(self._paused)
        if self._requests is not None:
            self._requests.add(now, 1.0)
        return Slot(since=now, entry=None if self._tokens is None else self._tokens.add(now, tokens))

    def _pump(self) -> None:
        """Give leave to those at the head of the queue that may go; ring again when the next may."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            future, tokens = self._waiting[0]
            if future.done():
                self._waiting.popleft()
                continue
            now = loop.time()
            wait = self._wait(now, tokens)
            if wait > 0.0:
                if wait < float("inf"):
                    self._timer = loop.call_later(wait, self._pump)
                return
            self._waiting.popleft()
            future.set_result(self._admit(now, tokens))


@final
class _Minute:
    """What was given leave within the last minute: amounts that add up to at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = float(limit)
        self._entries: deque[list[float]] = deque()  # [when, amount]
        self._sum = 0.0

    def add(self, now: float, amount: float) -> list[float]:
        entry = [now, amount]
        self._entries.append(entry)
        self._sum += amount
        return entry

    def correct(self, entry: list[float], amount: float) -> None:
        """Replace an amount by another; an entry older than a minute no longer counts."""
        if self._entries and entry[0] >= self._entries[0][0]:
            self._sum += amount - entry[1]
            entry[1] = amount

    def wait(self, now: float, amount: float) -> float:
        """Return the seconds until so much more fits."""
        while self._entries and self._entries[0][0] + MINUTE <= now:
            self._sum -= self._entries.popleft()[1]
        if not self._entries:
            self._sum = 0.0
        over = self._sum + min(amount, self._limit) - self._limit
        return 0.0 if over <= 1e-9 else _until(self._entries, over) - now


def _until(entries: Sequence[list[float]], over: float) -> float:
    """Return when entries that add up to ``over`` will be a minute old."""
    for when, amount in entries:
        over -= amount
        if over <= 1e-9:
            return when + MINUTE
    return entries[-1][0] + MINUTE
