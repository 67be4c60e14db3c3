"""Side (b) of `benchmarks/llm.py`: exegete's client with everything that a run has: limits, kept replies, a ledger.

The store of replies and the ledger lie on the disk and begin empty. ``again`` asks what a turn has asked before: every
reply is kept, and nothing is sent.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, final

from benchmarks.collect_worker import Side, arguments, serve
from benchmarks.llm_setting import CONCURRENCY, MAX_TOKENS, MODEL, chats, read_setting, timed

from exegete.config import LLMConfig
from exegete.llm.open import client_from_spec
from exegete.types import LLMRequest


@final
class Exegete(Side):
    """The client of ``--llm URL#MODEL``."""

    def __init__(self, folder: Path, threads: int) -> None:
        url, self._templates = read_setting(folder)
        config = LLMConfig(llm=f"{url}#{MODEL}", concurrency=CONCURRENCY)
        client = client_from_spec(config.llm, config, folder=folder, cache=folder / "replies.db")
        if client is None:
            raise ValueError("there is no client")
        self._client = client
        self._runner = asyncio.Runner()

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask ``count`` chats, new ones or those of a turn before."""
        asked = [
            LLMRequest(messages=tuple(messages), max_tokens=MAX_TOKENS, stage="detection")
            for messages in chats(self._templates, request["turn"], request["count"])
        ]
        return self._runner.run(timed(asked, self._ask))

    async def _ask(self, request: LLMRequest) -> str | None:
        return (await self._client.reply(request)).text


if __name__ == "__main__":
    serve(lambda: Exegete(*arguments(sys.argv)))
