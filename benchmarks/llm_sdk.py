"""Side (a) of `benchmarks/llm.py`: the openai SDK as it comes, one call a request."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, final

import openai
from benchmarks.collect_worker import Side, arguments, serve
from benchmarks.llm_setting import MAX_TOKENS, MODEL, chats, read_setting, timed


@final
class Sdk(Side):
    """``AsyncOpenAI.chat.completions.create``, nothing around it."""

    def __init__(self, folder: Path, threads: int) -> None:
        url, self._templates = read_setting(folder)
        self._runner = asyncio.Runner()
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask ``count`` new chats."""
        return self._runner.run(timed(chats(self._templates, request["turn"], request["count"]), self._ask))

    async def _ask(self, messages: Any) -> str | None:
        answer = await self._client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0.0, max_tokens=MAX_TOKENS
        )
        return answer.choices[0].message.content


if __name__ == "__main__":
    serve(lambda: Sdk(*arguments(sys.argv)))
