"""A server that misbehaves in every way that servers do, over real HTTP: no request is lost, doubled or paid twice."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from exegete.errors import LLMError
from exegete.llm.calling import Caller
from exegete.llm.limits import Breaker, Limits
from exegete.llm.openai_api import OpenAIBackend
from exegete.llm.openai_endpoint import parse_spec
from exegete.llm.replies import ReplyCache
from exegete.llm.spending import Spending
from exegete.types import LLMReply, LLMRequest

TIMEOUT = 5.0
IMPATIENT = 0.6
PASSING = ("429", "503", "500", "hang", "reset", "truncated", "html", "empty choices", "error in 200")
Fault = Callable[[str, int], str]
"""What happens to a request: its text and how often it was sent before → a name of a fault, or "fine"."""


class Log:
    """What reached the server, and how it ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.ended = threading.Event()


@contextmanager
def faulty(fault: Fault, seconds: float = 0.0) -> Iterator[tuple[str, Log]]:
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][0]["content"]
            with log.lock:
                log.under_way += 1
                log.most = max(log.most, log.under_way)
                before = log.sent[text]
                log.sent[text] += 1
                what = fault(text, before)
            try:
                if what == "fine":
                    time.sleep(seconds)
                with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                    self._act(what, text)
            finally:
                with log.lock:
                    log.under_way -= 1

        def _act(self, what: str, text: str) -> None:
            if what == "hang":
                log.ended.wait(5.0)
            elif what == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            else:
                status, body, headers = answer(what, text)
                if status == 200 and what in ("fine", "no usage"):
                    with log.lock:
                        log.answered[text] += 1
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def handle_one_request(self) -> None:
            with suppress(ConnectionResetError, ValueError):  # a connection we have reset cannot be read on
                super().handle_one_request()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def shutdown_request(self, request: Any) -> None:
            with suppress(OSError):
                super().shutdown_request(request)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#toy", log
    finally:
        log.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer(what: str, text: str) -> tuple[int, bytes, dict[str, str]]:
    content: dict[str, Any] = {
        "choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": f"re: {text}"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }
    whole = json.dumps(content).encode()
    del content["usage"]
    return {
        "fine": (200, whole, {}),
        "no usage": (200, json.dumps(content).encode(), {}),
        "429": (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.02"}),
        "503": (503, b"", {"Retry-After": "0.01"}),
        "500": (500, b"<html>oops</html>", {}),
        "truncated": (200, whole[: len(whole) // 2], {}),
        "html": (200, b"<html>a proxy's page</html>", {}),
        "empty choices": (200, b'{"choices": []}', {}),
        "error in 200": (200, b'{"error": {"code": 502, "message": "provider"}}', {}),
        "filtered": (400, b'{"error": {"code": "content_filter"}}', {}),
        "too long": (400, b'{"error": {"code": "context_length_exceeded"}}', {}),
        "400": (400, b'{"error": {"message": "unknown field"}}', {}),
        "401": (401, b"{}", {}),
        "403": (403, b"{}", {}),
        "404": (404, b"{}", {}),
    }[what]


def caller_of(spec: str, *, folder: Path | None = None, **options: Any) -> Caller:
    endpoint = parse_spec(spec)
    assert endpoint is not None
    limits = Limits(16, breaker=options.pop("breaker", None))
    kept = None if folder is None else ReplyCache(folder / "replies.db")
    spending = Spending(":memory:" if folder is None else folder / "ledger.db", model="toy", price=None)
    backend = OpenAIBackend(endpoint, timeout=options.pop("timeout", TIMEOUT), connections=16)
    return Caller(backend, limits=limits, replies=kept, spending=spending, backoff=0.01, **options)


def ask_all(caller: Caller, texts: Sequence[str]) -> list[LLMReply | BaseException]:
    async def work() -> list[LLMReply | BaseException]:
        try:
            requests = [LLMRequest(messages=({"role": "user", "content": t},), max_tokens=20) for t in texts]
            return await asyncio.gather(*map(caller.reply, requests), return_exceptions=True)
        finally:
            await caller.close()

    return asyncio.run(work())


def shown(result: LLMReply | BaseException) -> str:
    assert isinstance(result, LLMReply), result
    return result.text if result.text is not None else f"{result.finish}: {result.error}"


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_leaves_one_answer_each(fault: str) -> None:
    with faulty(lambda text, before: fault if before == 0 else "fine") as (spec, log):
        caller = caller_of(spec, timeout=IMPATIENT if fault == "hang" else TIMEOUT)
        texts = [f"text {i}" for i in range(12)]
        assert [shown(r) for r in ask_all(caller, texts)] == [f"re: {t}" for t in texts]
        assert log.sent == Counter(dict.fromkeys(texts, 2))
        assert log.answered == Counter(dict.fromkeys(texts, 1))
        found = {s.outcome: s.requests for s in caller.spending.totals()} if caller.spending else {}
        # Only what was refused for being too much surely cost nothing.
        assert found == ({"stop": 12} if fault == "429" else {"stop": 12, "lost": 12})
        caller.end()


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_is_an_error_that_names_it(fault: str) -> None:
    with faulty(lambda text, before: fault if text == "bad" else "fine") as (spec, log):
        caller = caller_of(spec, retries=2, timeout=IMPATIENT if fault == "hang" else TIMEOUT)
        bad, good = ask_all(caller, ["bad", "good"])
        assert isinstance(bad, LLMReply)
        assert (bad.finish, bad.text, shown(good)) == ("error", None, "re: good")
        assert str(bad.error).endswith("(3 attempts)")
        assert "\n" not in str(bad.error)
        assert log.sent == {"bad": 3, "good": 1}
        caller.end()


def test_everything_at_once_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Random faults of every kind; what the server answered is what came back and what is kept, once each."""
    draw = random.Random(3)
    own = {f"text {i}": draw.choice(["filtered", "too long", "fine", "no usage"]) for i in range(60)}

    def fault(text: str, before: int) -> str:
        return draw.choice(PASSING) if before < 4 and draw.random() < 0.3 else own[text]

    with faulty(fault) as (spec, log):
        caller = caller_of(spec, folder=tmp_path, retries=6, timeout=IMPATIENT)
        results = dict(zip(own, ask_all(caller, list(own)), strict=True))
        finishes = {"filtered": "refused", "too long": "error"}
        for text, result in results.items():
            assert isinstance(result, LLMReply)
            assert result.finish == finishes.get(own[text], "stop")
            if result.finish == "stop":
                assert (result.text, result.prompt_tokens) == (f"re: {text}", 5 if own[text] == "fine" else None)
        good = {text for text, kind in own.items() if kind in ("fine", "no usage")}
        assert log.answered == Counter(dict.fromkeys(good, 1))
        assert caller.limits.under_way == 0
        before = log.sent.copy()
        again = dict(zip(own, ask_all(caller, list(own)), strict=True))
        caller.end()
    assert {t for t in own if log.sent[t] == before[t]} == good
    assert all(isinstance(again[t], LLMReply) and again[t].cached for t in good)  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["400", "401", "403", "404"])
def test_a_refusal_after_some_answers_stops_at_once_and_keeps_them(tmp_path: Path, fault: str) -> None:
    texts = [f"text {i}" for i in range(60)]
    total = Counter[str]()

    def breaks(text: str, before: int) -> str:
        total["sent"] += 1
        return "fine" if total["sent"] <= 20 else fault

    with faulty(breaks) as (spec, log):
        caller = caller_of(spec, folder=tmp_path)
        results = ask_all(caller, texts)
        caller.end()
        port = int(spec.split(":")[2].partition("/")[0])
    errors = {str(r) for r in results if isinstance(r, LLMError)}
    assert len(errors) == 1
    assert "\n" not in errors.pop()
    answered = [t for t, r in zip(texts, results, strict=True) if isinstance(r, LLMReply)]
    assert len(answered) == 20
    assert total["sent"] <= 20 + 20  # those already under way
    assert max(log.sent.values()) == 1

    # Put right and started again, it sends only what was not answered. The key is the server's name, so it has the
    # same port.
    again = caller_of(f"http://127.0.0.1:{port}/v1#toy", folder=tmp_path)
    sent: list[str] = []

    async def send(request: LLMRequest) -> LLMReply:
        sent.append(request.messages[0]["content"])
        return LLMReply(text=f"re: {sent[-1]}", finish="stop")

    again.backend.send = send  # type: ignore[method-assign]
    assert [shown(r) for r in ask_all(again, texts)] == [f"re: {t}" for t in texts]
    again.end()
    assert sorted(sent) == sorted(set(texts) - set(answered))


def test_a_server_that_bears_little_is_asked_for_little() -> None:
    refused = Counter[str]()

    def fault(text: str, before: int) -> str:
        busy = logs[0].under_way > 3
        refused["429"] += busy
        return "429" if busy else "fine"

    logs: list[Log] = []
    with faulty(fault, 0.01) as (spec, log):
        logs.append(log)
        caller = caller_of(spec, retries=20)
        texts = [f"text {i}" for i in range(80)]
        assert [shown(r) for r in ask_all(caller, texts)] == [f"re: {t}" for t in texts]
        assert caller.limits.width < 16
        assert refused["429"] <= 100
        caller.end()


def test_a_server_that_stays_broken_is_paused_for_and_then_left_with_everything_kept(tmp_path: Path) -> None:
    total = Counter[str]()

    def breaks(text: str, before: int) -> str:
        total["sent"] += 1
        return "fine" if total["sent"] <= 10 else "500"

    with faulty(breaks) as (spec, _):
        breaker = Breaker(failures=12, pauses=(0.05, 0.1))
        caller = caller_of(spec, folder=tmp_path, retries=50, breaker=breaker)
        texts = [f"text {i}" for i in range(40)]
        results = ask_all(caller, texts)
        kept = [t for t, r in zip(texts, results, strict=True) if isinstance(r, LLMReply)]
        lines = {str(r) for r in results if isinstance(r, LLMError)}
        assert len(kept) == 10
        assert len(lines) == 1
        assert "HTTP 500" in (line := lines.pop())
        assert "everything so far is kept" in line
        assert total["sent"] <= 60  # of the 2,000 that retries allow
        caller.end()
    cache = ReplyCache(tmp_path / "replies.db")
    from exegete.llm.replies import request_key

    async def found(text: str) -> bool:
        key = request_key(spec, LLMRequest(messages=({"role": "user", "content": text},), max_tokens=20))
        return await cache.claim(key) is not None

    assert [t for t in texts if asyncio.run(found(t))] == kept
    cache.close()
