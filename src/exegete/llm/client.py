"""The one interface to language models: a request in, a reply out, and how many may be under way at once."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from exegete.errors import LLMError
from exegete.llm.backend import Capabilities
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.llm.reader import Reader

T = TypeVar("T")
R = TypeVar("R")


class LLMClient(ABC):
    """A language model behind some interface. Failures of a call are replies with ``finish="error"``, never raised.

    Raises LLMError only for what no further call can mend (a refused key, an unknown model, an unreachable server).
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The model as named on the command line, without keys."""

    @property
    def temperature(self) -> float:
        """Sampling temperature of explainer and judge, as the configuration sets it for this model."""
        return 0.0

    @property
    def unlimited(self) -> bool:
        """Whether any number of requests may wait for their replies together, as in batch files."""
        return False

    @property
    def simulated(self) -> bool:
        """Whether nothing is asked: what it answers checks that a pipeline works, and measures nothing."""
        return False

    @property
    def natural(self) -> bool:
        """Whether a model trained on natural language answers; what another does checks only that a pipeline works."""
        return not self.simulated

    @abstractmethod
    async def reply(self, request: LLMRequest) -> LLMReply:
        """Send one request."""

    @abstractmethod
    async def check(self) -> None:
        """Ask the server whether it is there and knows the model. Raises LLMError or InputError when not."""

    async def capabilities(self) -> Capabilities:
        """Return what the model can do, so that what needs more is refused before anything is paid for."""
        return Capabilities()

    @abstractmethod
    async def close(self) -> None:
        """Give back connections, at the end of the event loop they belong to; the next call opens new ones."""

    def end(self) -> None:  # noqa: B027 - most hold nothing beyond their connections
        """Close the files of a client that is not used again: kept replies and the ledger."""


async def gather_all(calls: Iterable[Awaitable[R]]) -> list[R]:
    """Return what all calls give, in order; the first exception is raised only when every call has ended.

    Calls left behind by ``asyncio.gather`` would lose replies that were already paid for.
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def gather_limited(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], limit: int
) -> AsyncIterator[tuple[T, R]]:
    """Run ``work`` on every item with at most ``limit`` under way; yield ``(item, result)`` as each ends.

    After the first LLMError no further item is begun. Those under way go on to their own end, since their calls may
    have been paid for, and what they give is yielded before that error is raised. Any other exception, and a caller
    that takes no more, cancels the rest.
    """
    gate = asyncio.Semaphore(limit)
    failure: LLMError | None = None

    async def one(item: T) -> tuple[T, R] | None:
        nonlocal failure
        async with gate:
            if failure is not None:
                return None
            try:
                return item, await work(item)
            except LLMError as error:
                failure = failure or error
                return None

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        for task in asyncio.as_completed(tasks):
            result = await task
            if result is not None:
                yield result
        if failure is not None:
            raise failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_limited(
    items: Sequence[T],
    work: Callable[[T], Awaitable[R]],
    limit: int,
    finish: Callable[[], Awaitable[None]] | None = None,
) -> Iterator[tuple[T, R]]:
    """Do what ``gather_limited`` does from synchronous code, yielding results as they come.

    ``finish`` is awaited at the end in the same loop, however it ends: connections belong to their loop. Where a loop
    is running in this thread already, as in a notebook, another thread does it.
    """
    if not _loop_is_running():
        yield from _run_here(items, work, limit, finish)
        return
    arrived: SimpleQueue[tuple[T, R] | BaseException | None] = SimpleQueue()
    unwanted = threading.Event()

    def drive() -> None:
        try:
            with closing(_run_here(items, work, limit, finish)) as results:
                for result in results:
                    arrived.put(result)
                    if unwanted.is_set():
                        break
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            arrived.put(error)

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    try:
        while (result := arrived.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        unwanted.set()
        thread.join()


def run_closing(
    items: Sequence[T],
    work: Callable[[T], Awaitable[R]],
    limit: int,
    used: Iterable[LLMClient | Reader | None],
) -> Iterator[R]:
    """Yield what ``work`` gives of every item, as ``run_limited`` does, and close at the end whatever was ``used``.

    A client or reader that several items share is closed once; None stands for one that is not there.
    """
    parts = {id(part): part for part in used if part is not None}

    async def finish() -> None:
        for part in parts.values():
            await part.close()

    for _, result in run_limited(items, work, limit, finish):
        yield result


def run_to_end(work: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Return what a coroutine function gives, from synchronous code; in a notebook too, as ``run_limited`` does."""
    if not _loop_is_running():
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_here(
    items: Sequence[T],
    work: Callable[[T], Awaitable[R]],
    limit: int,
    finish: Callable[[], Awaitable[None]] | None,
) -> Generator[tuple[T, R], None, None]:
    arrived: list[tuple[T, R]] = []
    with asyncio.Runner() as runner:
        stream = gather_limited(items, work, limit)

        async def step() -> None:
            # Not returned: Runner sets a signal handler around every task, and the signal module formats the finished
            # task with its result, which takes seconds for one that holds arrays.
            with suppress(StopAsyncIteration):
                arrived.append(await anext(stream))

        try:
            while True:
                runner.run(step())
                if not arrived:
                    return
                yield arrived.pop()
        finally:
            runner.run(stream.aclose())  # type: ignore[attr-defined]
            if finish is not None:
                runner.run(finish())  # type: ignore[arg-type]
