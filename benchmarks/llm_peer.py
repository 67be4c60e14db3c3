"""Side (c) of `benchmarks/llm.py`: delphi's client for servers of this kind, in delphi's environment.

``OpenRouter.generate`` is called as its explainers and scorers call it, but with as many requests at once as the other
sides have; its own pipeline sends one after another.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, final

from benchmarks.collect_worker import Side, arguments, serve
from benchmarks.llm_setting import MAX_TOKENS, MODEL, chats, read_setting, timed
from benchmarks.peer import delphi


@final
class Peer(Side):
    """delphi's ``OpenRouter`` client."""

    def __init__(self, folder: Path, threads: int) -> None:
        url, self._templates = read_setting(folder)
        client = delphi("clients").OpenRouter
        self._client: Any = client(MODEL, api_key="none", base_url=f"{url}/chat/completions")
        self._runner = asyncio.Runner()

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask ``count`` new chats."""
        return self._runner.run(timed(chats(self._templates, request["turn"], request["count"]), self._ask))

    async def _ask(self, messages: Any) -> str | None:
        answer = await self._client.generate(messages, max_tokens=MAX_TOKENS, temperature=0.0)
        text: str | None = answer.text
        return text


if __name__ == "__main__":
    serve(lambda: Peer(*arguments(sys.argv)))
