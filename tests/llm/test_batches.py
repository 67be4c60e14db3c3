"""Batch files against a server that keeps them as OpenAI's does, and is slow, broken or gone at every step."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from exegete.config import LLMConfig
from exegete.errors import BudgetError, CorruptError, LLMError
from exegete.files import fault_hook
from exegete.llm.backend import TransientError
from exegete.llm.batches import BatchBackend
from exegete.llm.calling import Caller
from exegete.llm.open import client_from_spec
from exegete.llm.openai_endpoint import parse_spec
from exegete.llm.prices import Price
from exegete.llm.replies import request_key
from exegete.llm.spending import Spending, most_prompt_tokens
from exegete.types import LLMReply, LLMRequest

Result = dict[str, Any]


def completed(line: Result) -> Result:
    """The line of an answered request, which repeats what was asked."""
    body = line["body"]
    said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    choice: Result = {"index": 0, "finish_reason": "stop"}
    choice |= (
        {"message": {"role": "assistant", "content": f"re {said}"}} if "messages" in body else {"text": f"re {said}"}
    )
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return wrapped(line, 200, {"choices": [choice], "usage": usage})


def wrapped(line: Result, status: int, body: Result) -> Result:
    return {"id": "x", "custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


def failed(status: int, message: str) -> Callable[[Result], Result]:
    return lambda line: wrapped(line, status, {"error": {"message": message}})


@dataclass
class Service:
    """What the server holds. ``answer`` makes the line of a request, or None for one that it never got to."""

    answer: Callable[[Result], Result | None] = completed
    polls: int = 2
    status: str = "completed"
    errors: Result | None = None
    trouble: Callable[[str, str], tuple[int, Result] | str | None] = lambda method, path: None
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, Result] = field(default_factory=dict)
    worked: Counter[str] = field(default_factory=Counter)
    """How often each request was worked on, and paid for, by its text."""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def respond(self, method: str, path: str, data: bytes) -> tuple[int, Any]:
        self.seen.append((method, path))
        if method == "POST" and path == "/v1/files":
            found = re.search(rb'filename="requests.jsonl"\r\n.*?\r\n\r\n(.*)\r\n--', data, re.DOTALL)
            assert found is not None
            assert b'name="purpose"\r\n\r\nbatch\r\n' in data
            return 200, {"id": self.keep(found.group(1)), "object": "file"}
        if method == "POST" and path == "/v1/batches":
            return self.begin(json.loads(data))
        if path.startswith("/v1/batches?"):
            return 200, {"object": "list", "data": [self.shown(b) for b in self.batches], "has_more": False}
        if path.startswith("/v1/batches/"):
            return self.look(path.rpartition("/")[2])
        if path.startswith("/v1/files/"):
            return 200, self.files[path.split("/")[3]]
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "m"}]}
        return 404, {"error": {"message": f"no {path}"}}

    def keep(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    def begin(self, asked: Result) -> tuple[int, Any]:
        name = f"batch-{len(self.batches)}"
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        assert {line["url"] for line in lines} == {asked["endpoint"]}
        assert asked["completion_window"] == "24h"
        self.batches[name] = {"asked": asked, "lines": lines, "looks": 0}
        return 200, self.shown(name)

    def shown(self, name: str) -> Result:
        batch = self.batches[name]
        asked = batch["asked"]
        return {
            "id": name, "object": "batch", "status": batch.get("status", "in_progress"), "created_at": 0,
            "completion_window": "24h", "endpoint": asked["endpoint"], "input_file_id": asked["input_file_id"],
            "metadata": asked["metadata"], **batch.get("files", {}),
        }  # fmt: skip

    def look(self, name: str) -> tuple[int, Any]:
        if name not in self.batches:
            return 404, {"error": {"message": "no such batch"}}
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["looks"] >= self.polls and "status" not in batch:
            self.work(batch)
        return 200, self.shown(name) | {"errors": batch.get("errors")}

    def work(self, batch: Result) -> None:
        batch["status"] = self.status
        if self.status == "failed":
            batch["errors"] = self.errors
            return
        good: list[Result] = []
        bad: list[Result] = []
        for line in reversed(batch["lines"]):  # the order of a file says nothing
            made = self.answer(line)
            if made is not None and made["response"] is not None:
                said = line["body"].get("messages", [{"content": line["body"].get("prompt")}])[-1]["content"]
                self.worked[said] += made["response"]["status_code"] == 200
            if made is not None:
                (good if made["error"] is None and made["response"]["status_code"] == 200 else bad).append(made)
        batch["files"] = {
            "output_file_id": self.keep(b"".join(json.dumps(g).encode() + b"\n" for g in good)) if good else None,
            "error_file_id": self.keep(b"".join(json.dumps(b).encode() + b"\n" for b in bad)) if bad else None,
        }


@contextmanager
def running(service: Service) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(b"")

        def do_POST(self) -> None:
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

        def reply(self, data: bytes) -> None:
            trouble = service.trouble(self.command, self.path)
            if isinstance(trouble, tuple):
                status, body = trouble
            else:
                status, body = service.respond(self.command, self.path, data)
            if trouble == "cut":  # done, but nobody hears of it
                self.connection.close()
                self.close_connection = True
                return
            out = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#m"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def opened(spec: str, folder: Path) -> BatchBackend:
    endpoint = parse_spec(spec)
    assert endpoint is not None
    return BatchBackend(endpoint, timeout=10.0, folder=folder, quiet=0.05, poll=(0.01, 0.03))


def chat(text: str, **options: Any) -> LLMRequest:
    return LLMRequest(messages=({"role": "user", "content": text},), **options)


def ask(backend: Any, *requests: LLMRequest) -> list[Any]:
    async def together() -> list[Any]:
        send = backend.reply if isinstance(backend, Caller) else backend.send
        try:
            return await asyncio.gather(*(send(request) for request in requests), return_exceptions=True)
        finally:
            await backend.close()

    return asyncio.run(together())


def texts(replies: list[Any]) -> list[str | None]:
    assert all(isinstance(reply, LLMReply) for reply in replies), replies
    return [reply.text for reply in replies]


def test_requests_that_wait_together_go_into_one_file_of_their_route(tmp_path: Path) -> None:
    service = Service(polls=3)
    with running(service) as spec:
        backend = opened(spec, tmp_path)
        requests = [chat(f"c{i}", seed=4, max_tokens=9) for i in range(20)]
        replies = ask(backend, *requests, LLMRequest(prompt="p"), requests[3])
        assert texts(replies) == [*(f"re c{i}" for i in range(20)), "re p", "re c3"]
        assert (replies[0].prompt_tokens, replies[0].completion_tokens, replies[0].finish) == (7, 3, "stop")
        assert sorted(len(batch["lines"]) for batch in service.batches.values()) == [1, 20]
        line = next(b["lines"][0] for b in service.batches.values() if len(b["lines"]) == 20)
        assert line == {
            "custom_id": request_key(spec, requests[0]), "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": "c0"}], "max_tokens": 9, "temperature": 0.0,
                     "seed": 4},
        }  # fmt: skip
        assert set(service.worked.values()) == {1}
        assert texts(ask(opened(spec, tmp_path), *requests)) == [f"re c{i}" for i in range(20)]  # kept on disk
        assert len(service.batches) == 2


def test_every_line_fails_as_it_should_and_only_what_may_pass_is_sent_again(tmp_path: Path) -> None:
    ways: dict[str, Callable[[Result], Result | None]] = {
        "good": completed,
        "busy": failed(429, "slow down"),
        "broken": failed(500, "oops"),
        "long": failed(400, "too long for this model"),
        "filtered": failed(400, "content_filter: not this"),
        "none": lambda line: None,
        "empty": lambda line: wrapped(line, 200, {"choices": []}),
        "late": lambda line: {
            "custom_id": line["custom_id"],
            "response": None,
            "error": {"code": "batch_expired", "message": "the window is over"},
        },
    }
    tries: Counter[str] = Counter()

    def answer(line: Result) -> Result | None:
        said = line["body"]["messages"][-1]["content"]
        tries[said] += 1
        return ways[said](line) if tries[said] == 1 else completed(line)

    with running(Service(answer=answer)) as spec:
        first = dict(zip(ways, ask(opened(spec, tmp_path / "a"), *map(chat, ways)), strict=True))
        for name in ("busy", "broken", "none", "late"):
            assert isinstance(first[name], TransientError), name
            assert first[name].unpaid
        assert isinstance(first["empty"], TransientError)
        assert not first["empty"].unpaid
        assert (first["long"].finish, first["filtered"].finish) == ("error", "refused")
        tries.clear()
        caller = Caller(opened(spec, tmp_path / "b"), retries=2, backoff=0.01)
        second = dict(zip(ways, ask(caller, *map(chat, ways)), strict=True))
        for name in ("good", "busy", "broken", "none", "late"):
            assert second[name].text == f"re {name}"
        assert [tries[name] for name in ways] == [1, 2, 2, 1, 1, 2, 1, 2]
        assert second["empty"].finish == "error"


def test_what_an_expired_batch_did_not_get_to_goes_into_the_next(tmp_path: Path) -> None:
    tries: Counter[str] = Counter()

    def answer(line: Result) -> Result | None:
        tries[line["custom_id"]] += 1
        return completed(line) if tries[line["custom_id"]] > 1 or line["custom_id"] < "8" else None

    service = Service(status="expired", answer=answer)
    with running(service) as spec:
        requests = [chat(f"c{i}") for i in range(24)]
        caller = Caller(opened(spec, tmp_path), retries=1, backoff=0.01)
        assert texts(ask(caller, *requests)) == [f"re c{i}" for i in range(24)]
        assert tries == {key: 1 + (key >= "8") for key in (request_key(spec, r) for r in requests)}
        assert set(service.worked.values()) == {1}


class Killed(BaseException):
    """The program stops here."""


def points_of(spec: str, folder: Path, requests: list[LLMRequest]) -> list[str]:
    points: list[str] = []
    with fault_hook(points.append):
        ask(opened(spec, folder), *requests)
    return points


def test_a_stop_anywhere_loses_nothing_and_pays_nothing_twice(tmp_path: Path) -> None:
    requests = [chat(f"c{i}") for i in range(5)]
    with running(Service()) as spec:
        points = points_of(spec, tmp_path / "whole", requests)
    assert {"batch uploaded", "batch begun", "batch ended"} <= set(points)
    for stop in range(len(points)):
        service, passed = Service(), 0

        def killing(name: str, stop: int = stop) -> None:
            nonlocal passed
            passed += 1
            if passed > stop:
                raise Killed(name)

        folder = tmp_path / str(stop)
        with running(service) as spec:
            with fault_hook(killing):
                assert any(isinstance(found, Killed) for found in ask(opened(spec, folder), *requests))
            assert texts(ask(opened(spec, folder), *requests)) == [f"re c{i}" for i in range(5)], points[stop]
            assert all(count == 1 for count in service.worked.values()), points[stop]
            assert len(service.batches) == 1, points[stop]


def test_a_run_asks_in_files_and_pays_half(tmp_path: Path) -> None:
    service = Service(polls=1)
    with running(service) as spec:
        (tmp_path / "prices.yaml").write_text(json.dumps({spec: {"input": 10.0, "cached": 10.0, "output": 100.0}}))
        config = LLMConfig(batch=True, budget=1.0, prices=str(tmp_path / "prices.yaml"))
        client: Any = client_from_spec(spec, config, folder=tmp_path, cache=tmp_path / "replies.db")
        assert texts(ask(client, chat("a"), chat("b"))) == ["re a", "re b"]
        (spent,) = client.spending.totals()
        assert (spent.requests, spent.prompt_tokens, spent.completion_tokens) == (2, 14, 6)
        assert spent.dollars == pytest.approx((14 * 10 + 6 * 100) / 2e6)
        client.end()
        assert (tmp_path / "batches").is_dir()


def test_collecting_what_was_sent_needs_no_more_budget(tmp_path: Path) -> None:
    # The batch stood on the ledger at its worst case, and was to be reserved once more: it was never collected.
    request = chat("hello", max_tokens=50)
    worst = most_prompt_tokens(request) + 50

    def caller(spec: str) -> Caller:
        spending = Spending(tmp_path / "ledger.db", model=spec, price=None, budget_tokens=worst + 10)
        return Caller(opened(spec, tmp_path), spending=spending, retries=0)

    def stop(point: str) -> None:
        if point == "batch begun":
            raise KeyboardInterrupt

    service = Service()
    with running(service) as spec:
        with pytest.raises(KeyboardInterrupt), fault_hook(stop):
            ask(caller(spec), request)
        again = caller(spec)
        assert texts(ask(again, request)) == ["re hello"]
        assert service.worked == {"hello": 1}
        assert again.spending is not None
        found = {total.outcome: total.prompt_tokens + total.completion_tokens for total in again.spending.totals()}
        assert found == {"lost": worst, "cached": 10}
        assert isinstance(ask(again, chat("another", max_tokens=50))[0], BudgetError)
        again.end()


def test_direct_questions_are_paid_in_full_where_the_rest_is_half_price() -> None:
    price = Price(input=1.0, cached=0.5, output=4.0)
    spending = Spending(":memory:", model="m", price=price, batch=True)
    reply = LLMReply(text="x", finish="stop", prompt_tokens=10, completion_tokens=5)

    async def paid(stage: str) -> float | None:
        return spending.settle(await spending.reserve(chat("x", stage=stage)), reply)

    dollars = {stage: asyncio.run(paid(stage)) for stage in ("probe", "check", "explain")}
    assert dollars == pytest.approx({"probe": 30e-6, "check": 30e-6, "explain": 15e-6})
    spending.close()


def test_a_batch_left_under_way_is_collected_by_the_next_run_beside_new_requests(tmp_path: Path) -> None:
    service = Service(polls=10**9)
    with running(service) as spec:
        requests = [chat(f"c{i}") for i in range(3)]

        async def stopped() -> None:
            backend = opened(spec, tmp_path)
            waiting = asyncio.gather(*map(backend.send, requests))
            while not service.batches or not next(iter(service.batches.values()))["looks"]:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await backend.close()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        asyncio.run(stopped())
        service.polls = 1
        replies = ask(opened(spec, tmp_path), requests[2], chat("new"), requests[0])
        assert texts(replies) == ["re c2", "re new", "re c0"]
        assert [len(batch["lines"]) for batch in service.batches.values()] == [3, 1]
        assert set(service.worked.values()) == {1}


def test_a_batch_whose_beginning_was_not_heard_of_is_found_again(tmp_path: Path) -> None:
    service, cuts = Service(), [True]

    def trouble(method: str, path: str) -> str | None:
        return "cut" if (method, path) == ("POST", "/v1/batches") and cuts and cuts.pop() else None

    service.trouble = trouble
    with running(service) as spec:
        (lost,) = ask(opened(spec, tmp_path / "a"), chat("a"))
        assert isinstance(lost, TransientError)
        assert not lost.unpaid  # it may well have begun
        cuts.append(True)
        caller = Caller(opened(spec, tmp_path / "b"), retries=2, backoff=0.01)
        assert texts(ask(caller, chat("b"), chat("c"))) == ["re b", "re c"]
        assert len(service.batches) == 2
        assert texts(ask(opened(spec, tmp_path / "a"), chat("a"))) == ["re a"]  # another run finds it, too
        assert len(service.batches) == 2


def test_the_same_request_twice_is_one_even_while_its_batch_begins(tmp_path: Path) -> None:
    begun = threading.Event()

    def slow(method: str, path: str) -> None:
        if (method, path) == ("POST", "/v1/batches") and not begun.is_set():
            begun.set()
            time.sleep(0.3)

    service = Service(trouble=slow)
    with running(service) as spec:
        backend = opened(spec, tmp_path)

        async def story() -> list[LLMReply]:
            first = asyncio.ensure_future(backend.send(chat("a")))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            second = asyncio.ensure_future(backend.send(chat("a")))
            try:
                return list(await asyncio.gather(first, second))
            finally:
                await backend.close()

        assert texts(asyncio.run(story())) == ["re a", "re a"]
        assert len(service.batches) == 1


def test_a_batch_that_surely_did_not_begin_is_begun_later(tmp_path: Path) -> None:
    service, answers = Service(), [(429, {"error": {"message": "later"}}), (503, {"error": {"message": "down"}})]

    def trouble(method: str, path: str) -> tuple[int, Result] | None:
        return answers.pop() if (method, path) == ("POST", "/v1/batches") and answers else None

    service.trouble = trouble
    with running(service) as spec:
        caller = Caller(opened(spec, tmp_path), retries=4, backoff=0.01)
        assert texts(ask(caller, chat("a"))) == ["re a"]
        assert len(service.batches) == 1


def test_trouble_while_waiting_is_waited_out_and_a_lost_batch_is_sent_anew(tmp_path: Path) -> None:
    service, troubles = Service(polls=1), [500, 503, 429, 404]

    def trouble(method: str, path: str) -> tuple[int, Result] | None:
        if method == "GET" and path.startswith("/v1/batches/") and troubles:
            return troubles.pop(0), {"error": {"message": "trouble"}}
        return None

    service.trouble = trouble
    with running(service) as spec:
        caller = Caller(opened(spec, tmp_path), retries=1, backoff=0.01)
        assert texts(ask(caller, chat("a"))) == ["re a"]
        assert len(service.batches) == 2
        (lost,) = ask(opened(spec.replace(spec.split(":")[2].split("/")[0], "9"), tmp_path), chat("a"))
        assert isinstance(lost, TransientError)  # nobody listens there
        assert lost.unpaid


def test_a_server_that_says_nothing_of_a_batch_is_left_with_the_batch_kept(tmp_path: Path) -> None:
    def trouble(method: str, path: str) -> tuple[int, Result] | None:
        return (200, {"hello": "proxy"}) if method == "GET" and path.startswith("/v1/batches/") else None

    service = Service(trouble=trouble, polls=1)
    with running(service) as spec:
        (found,) = ask(opened(spec, tmp_path), chat("a"))
        assert isinstance(found, TransientError)
        assert not found.unpaid
        service.trouble = lambda method, path: None
        assert texts(ask(opened(spec, tmp_path), chat("a"))) == ["re a"]
        assert len(service.batches) == 1


@pytest.mark.parametrize(("code", "kind"), [("token_limit_exceeded", TransientError), ("model_not_found", LLMError)])
def test_a_batch_that_is_refused_as_a_whole(code: str, kind: type, tmp_path: Path) -> None:
    errors = {"object": "list", "data": [{"code": code, "message": "no: sk-abcdefghijkl"}]}
    service = Service(status="failed", errors=errors)
    with running(service) as spec:
        found = ask(opened(spec, tmp_path), chat("a"), chat("b"))
        assert [type(f) for f in found] == [kind, kind]
        assert "no: [key]" in str(found[0])
        assert "\n" not in str(found[0])
        service.status = "completed"
        assert texts(ask(opened(spec, tmp_path), chat("a"))) == ["re a"]


@pytest.mark.parametrize(("status", "hint"), [(404, "--llm-batch"), (401, "EXEGETE_API_KEY"), (400, "--llm-batch")])
def test_a_server_without_batch_files_says_so_in_one_line(status: int, hint: str, tmp_path: Path) -> None:
    service = Service(trouble=lambda method, path: (status, {"error": {"message": "no"}}))
    with running(service) as spec:
        (found,) = ask(opened(spec, tmp_path), chat("a"))
        assert type(found) is LLMError
        assert hint in str(found)
        assert "\n" not in str(found)


def test_how_a_server_wants_to_be_asked_is_learnt_from_its_lines(tmp_path: Path) -> None:
    def answer(line: Result) -> Result:
        if "max_tokens" in line["body"]:
            return failed(400, "max_tokens is not supported, use max_completion_tokens")(line)
        return completed(line)

    service = Service(answer=answer)
    with running(service) as spec:
        caller = Caller(opened(spec, tmp_path), retries=1, backoff=0.01)
        assert texts(ask(caller, *(chat(f"c{i}") for i in range(4)))) == [f"re c{i}" for i in range(4)]
        assert len(service.batches) == 2


def test_check_asks_directly_and_damaged_or_foreign_files_are_told_apart(tmp_path: Path) -> None:
    service = Service()
    with running(service) as spec:
        backend = opened(spec, tmp_path)
        asyncio.run(backend.check())
        assert service.seen == [("GET", "/v1/models")]
        assert backend.unlimited
        assert texts(ask(backend, chat("a"))) == ["re a"]
        (state,) = (tmp_path / "batches").glob("*.json")
        data = json.loads(state.read_text())
        assert "sk-" not in state.read_text()
        foreign = {**data, "model": "openai/other"}
        (tmp_path / "batches" / "b.json").write_text(json.dumps(foreign))
        assert texts(ask(opened(spec, tmp_path), chat("a"))) == ["re a"]
        for damaged in ("{", json.dumps({"format": 1}), json.dumps({**data, "format": 9}), "[]"):
            (tmp_path / "batches" / "c.json").write_text(damaged)
            (found,) = ask(opened(spec, tmp_path), chat("a"))
            assert isinstance(found, CorruptError), damaged
