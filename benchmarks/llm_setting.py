"""What the sides of `benchmarks/llm.py` share: which requests, how many at once, and how they are timed.

Imported in the peer's environment too, and therefore without exegete.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

CONCURRENCY = 64
DELAY = 0.05
MODEL = "bench"
MAX_TOKENS = 500
ANSWER = '{"verdicts": [0, 1, 0, 0, 1]}'
SETTING = "setting.json"

Messages = list[dict[str, str]]


def read_setting(folder: Path) -> tuple[str, list[Messages]]:
    """Return the server's base URL and the chats that requests are made from."""
    setting = json.loads((folder / SETTING).read_text(encoding="utf-8"))
    return setting["url"], setting["chats"]


def chats(templates: list[Messages], turn: int, count: int) -> list[Messages]:
    """Return ``count`` chats, none of them asked before: each says which turn and number it is."""
    made = []
    for number in range(count):
        *before, last = templates[number % len(templates)]
        made.append([*before, {**last, "content": f"{last['content']}\n({turn}/{number})"}])
    return made


async def timed(asked: list[Any], ask: Callable[[Any], Awaitable[str | None]]) -> dict[str, Any]:
    """Ask everything, at most ``CONCURRENCY`` at once; return seconds by the clock and on the cores.

    Raises ValueError when an answer is not the server's.
    """
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(what: Any) -> str | None:
        async with gate:
            return await ask(what)

    begun, cores = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(one(what) for what in asked))
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cores
    wrong = sum(answer != ANSWER for answer in answers)
    if wrong:
        raise ValueError(f"{wrong} of {len(answers)} answers are not the server's")
    return {"requests": len(answers), "seconds": seconds, "cpu_seconds": cpu_seconds}
