"""A client behind HTTP: a small OpenAI-compatible server, for end-to-end tests and documentation of --llm URL#MODEL."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any, final

from exegete.errors import ExegeteError, InputError
from exegete.llm.client import LLMClient
from exegete.llm.openai_reading import parsed
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
    """Serve a client until the block ends; port 0 takes a free one.

    It answers at ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions``.
    """
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
            if not self.path.endswith("/completions"):
                self._send(404, _error(f"no route {self.path}"))
                return
            asked = parsed(body)
            if not asked:
                self._send(400, _error("the body is no JSON object"))
                return
            if asked.get("model") != client.name:
                self._send(404, _error(f"the model {asked.get('model')!r} does not exist"))
                return
            try:
                request = _request(asked, chat=self.path.endswith("/chat/completions"))
            except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
                self._send(400, _error(f"not a completion request: {error}"))
                return
            try:
                reply = asyncio.run(client.reply(request))
            except ExegeteError as error:
                self._send(500, _error(str(error)))
                return
            self._send(*_answer(client.name, request, reply))

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


def _request(asked: Mapping[str, Any], *, chat: bool) -> LLMRequest:
    common: dict[str, Any] = {
        "temperature": asked.get("temperature", 1.0),
        "max_tokens": asked.get("max_tokens", 500),
        "seed": asked.get("seed"),
        "stop": tuple(asked.get("stop") or ()),
    }
    if not chat:
        alternatives, echo = asked.get("logprobs") or 0, bool(asked.get("echo"))
        return LLMRequest(prompt=asked["prompt"], logprobs=alternatives, prompt_logprobs=echo, **common)
    wanted = (asked.get("response_format") or {}).get("json_schema") or {}
    alternatives = asked.get("top_logprobs") or 0 if asked.get("logprobs") else 0
    return LLMRequest(messages=tuple(asked["messages"]), logprobs=alternatives, schema=wanted.get("schema"), **common)


def _answer(model: str, request: LLMRequest, reply: LLMReply) -> tuple[int, dict[str, Any]]:
    if reply.finish == "error":
        return 500, _error(str(reply.error))
    choice: dict[str, Any] = {"index": 0, "finish_reason": _FINISH[reply.finish]}
    if request.prompt is None:
        choice |= {"message": {"role": "assistant", "content": reply.text}, "logprobs": _chat_logprobs(reply)}
    else:
        before = request.prompt if request.prompt_logprobs else ""
        choice |= {"text": before + str(reply.text), "logprobs": _completion_logprobs(reply)}
    kind = "chat.completion" if request.prompt is None else "text_completion"
    answer: dict[str, Any] = {"id": "local", "object": kind, "model": model, "choices": [choice]}
    if reply.prompt_tokens is not None and reply.completion_tokens is not None:
        answer["usage"] = {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        }
    return 200, answer


def _chat_logprobs(reply: LLMReply) -> dict[str, Any] | None:
    if reply.logprobs is None:
        return None
    return {
        "content": [
            {
                "token": token.token,
                "logprob": token.logprob,
                "top_logprobs": [{"token": text, "logprob": value} for text, value in token.alternatives.items()],
            }
            for token in reply.logprobs
        ]
    }


def _completion_logprobs(reply: LLMReply) -> dict[str, Any] | None:
    tokens = (*(reply.prompt_logprobs or ()), *(reply.logprobs or ()))
    if not tokens:
        return None
    ends = accumulate(len(token.token) for token in tokens)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.alternatives) or None for token in tokens],
        "text_offset": [0, *ends][: len(tokens)],
    }
