"""An OpenAI-compatible server that answers every chat after 50 ms with the same words, and does nothing else.

    python -m benchmarks.llm_server

Says its port on the first line of its output. HTTP is read by hand, so that a request costs it a small part of what it
costs a client. ``GET /stats`` tells how many chats it answered and its CPU seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import final

from benchmarks.llm_setting import ANSWER, DELAY, MODEL

_END = b"\r\n\r\n"


def _response(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_CHAT = _response(
    json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 700, "completion_tokens": 14, "total_tokens": 714},
        }
    ).encode()
)
_MODELS = _response(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())


@final
class Connection(asyncio.Protocol):
    """One client's connection, kept open."""

    answered = 0

    def __init__(self) -> None:
        self._held = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take whole requests out of what has come."""
        self._held += data
        while (end := self._held.find(_END)) >= 0:
            head = bytes(self._held[:end])
            size = end + len(_END) + _content_length(head)
            if len(self._held) < size:
                return
            del self._held[:size]
            self._take(head)

    def _take(self, head: bytes) -> None:
        if head.startswith(b"POST"):
            asyncio.get_running_loop().call_later(DELAY, self._chat)
        elif b"/stats" in head.partition(b"\r\n")[0]:
            stats = {"answered": Connection.answered, "cpu_seconds": time.process_time()}
            self._write(_response(json.dumps(stats).encode()))
        else:
            self._write(_MODELS)

    def _chat(self) -> None:
        Connection.answered += 1
        self._write(_CHAT)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def _content_length(head: bytes) -> int:
    place = head.lower().find(b"\r\ncontent-length:")
    return 0 if place < 0 else int(head[place + 17 :].partition(b"\r\n")[0])


async def serve() -> None:
    """Serve until the input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
