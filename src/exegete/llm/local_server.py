"""A client behind HTTP: a small OpenAI-compatible server, for end-to-end tests and documentation of --llm URL#MODEL."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from exegete.errors import ExegeteError
from exegete.llm.client import LLMClient
from exegete.types import LLMReply, LLMRequest

_log = logging.getLogger(__name__)
_FINISH = {"stop": "stop", "length": "length", "refused": "content_filter"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A running server: its ``url`` (ending in /v1), and the ``spec`` URL#MODEL to give to ``--llm``."""

    url: str
    spec: str


@contextmanager
def serve(client: LLMClient, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[LocalServer]:
    """Serve a client at ``/v1/models`` and ``/v1/chat/completions`` until the block ends; port 0 takes a free one."""
    server = _Server((host, port), _answers(client))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    url = f"http://{host}:{server.server_port}/v1"
    try:
        yield LocalServer(url=url, spec=f"{url}#{client.name}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@final
class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


def _answers(client: LLMClient) -> type[BaseHTTPRequestHandler]:
    @final
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("/models"):
                self._send(200, {"object": "list", "data": [{"id": client.name, "object": "model"}]})
            else:
                self._send(404, _error(f"no route {self.path}"))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.endswith("/chat/completions"):
                self._send(404, _error(f"no route {self.path}"))
                return
            try:
                asked = json.loads(body)
                request = LLMRequest(
                    messages=tuple(asked["messages"]),
                    temperature=asked.get("temperature", 1.0),
                    max_tokens=asked.get("max_tokens", 500),
                    seed=asked.get("seed"),
                )
            except (ValueError, KeyError, TypeError) as error:
                self._send(400, _error(f"not a chat completion request: {error}"))
                return
            if asked.get("model") != client.name:
                self._send(404, _error(f"the model {asked.get('model')!r} does not exist"))
                return
            try:
                reply = asyncio.run(client.reply(request))
            except ExegeteError as error:
                self._send(500, _error(str(error)))
                return
            self._send(*_completion(client.name, reply))

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug(format, *args)

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Answers


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def _completion(model: str, reply: LLMReply) -> tuple[int, dict[str, Any]]:
    if reply.finish == "error":
        return 500, _error(str(reply.error))
    choice = {
        "index": 0,
        "finish_reason": _FINISH[reply.finish],
        "message": {"role": "assistant", "content": reply.text},
    }
    total = reply.prompt_tokens + reply.completion_tokens
    usage = {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": total,
    }
    return 200, {"id": "local", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
