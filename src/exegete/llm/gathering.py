"""Requests that wait together are worked on together: in one batch of a model, or in one file for a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar, final

T = TypeVar("T")
R = TypeVar("R")


@final
class Gathering(Generic[T, R]):
    """Items wait here until the next batch takes them.

    ``choose`` gets all that wait, the longest waiting first, and returns the places of those that go next, at least
    one; ``work`` gets those and returns, in order, a result or an exception for each. A batch starts when nothing has
    arrived for ``quiet`` seconds, or when ``most`` items wait, and not before fewer than ``at_once`` are under way.
    Whoever waits belongs to one event loop; with another loop it starts empty.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        choose: Callable[[Sequence[T]], Sequence[int]],
        *,
        quiet: float,
        most: int,
        at_once: int = 1,
    ) -> None:
        self._work, self._choose = work, choose
        self._quiet, self._most, self._at_once = quiet, most, at_once
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = 0.0

    async def put(self, item: T) -> R:
        """Wait for the result of one item. Raises what ``work`` returned or raised for it."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._waiting, self._tasks, self._driver = loop, [], set(), None
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, future))
        self._arrived = loop.time()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive(loop))
        return await future

    async def close(self) -> None:
        """End what is under way; whoever still waits is cancelled."""
        if self._loop is not asyncio.get_running_loop():
            return
        tasks = [*self._tasks, *([self._driver] if self._driver else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, future in self._waiting:
            future.cancel()
        self._waiting = []

    async def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            while len(self._tasks) >= self._at_once:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            await self._settled(loop)
            self._waiting = [(item, future) for item, future in self._waiting if not future.done()]
            if not self._waiting:
                return
            places = set(self._choose([item for item, _ in self._waiting]))
            batch = [pair for i, pair in enumerate(self._waiting) if i in places]
            self._waiting = [pair for i, pair in enumerate(self._waiting) if i not in places]
            task = loop.create_task(self._finish(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _settled(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until no more items arrive; those of one moment arrive one after the other."""
        while len(self._waiting) < self._most:
            left = self._arrived + self._quiet - loop.time()
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def _finish(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results: Sequence[R | Exception] = await self._work([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 (handed to whoever waits for it)
            results = [error] * len(batch)
        except BaseException as error:  # the program is being stopped; nobody may be left waiting
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            raise
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
