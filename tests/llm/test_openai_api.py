from __future__ import annotations

import asyncio
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from exegete.config import LLMConfig
from exegete.errors import InputError, LLMError, NotFoundError
from exegete.llm.backend import Capabilities, TransientError
from exegete.llm.open import client_from_spec
from exegete.llm.openai_api import OpenAIBackend
from exegete.llm.openai_endpoint import parse_spec
from exegete.llm.openai_reading import without_reasoning
from exegete.types import LLMReply, LLMRequest, TokenLogprob

KEYS = (
    "OPENAI_API_KEY",
    "OPENROUTER_API_KEY",
    "EXEGETE_API_KEY",
    "OPENAI_ORG_ID",
    "OPENAI_PROJECT_ID",
    "OPENAI_BASE_URL",
)
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def request(**options: Any) -> LLMRequest:
    return LLMRequest(messages=({"role": "user", "content": "hello"},), **options)


def chat(content: Any = "hi", finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cost": 0.25},
    }


def client_of(url: str, **options: Any) -> OpenAIBackend:
    endpoint = parse_spec(f"{url}#toy")
    assert endpoint is not None
    return OpenAIBackend(endpoint, **{"timeout": 5.0, **options})


def send(client: OpenAIBackend, *requests: LLMRequest) -> list[LLMReply]:
    async def work() -> list[LLMReply]:
        try:
            return [await client.send(r) for r in requests]
        finally:
            await client.close()

    return asyncio.run(work())


def reply_to(serving: Any, body: Any, status: int = 200, headers: Any = None, **options: Any) -> LLMReply:
    with serving(lambda path, asked: (status, body, headers or {})) as (url, _):
        return send(client_of(url), LLMRequest(**options) if "prompt" in options else request(**options))[0]


def failure_of(serving: Any, *answer: Any, **options: Any) -> LLMError:
    with pytest.raises(LLMError) as caught:
        reply_to(serving, answer[1], answer[0], *answer[2:], **options)
    return caught.value


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "base", "model"),
    [
        ("http://127.0.0.1:8000#m", "http://127.0.0.1:8000/v1", "m"),
        ("http://127.0.0.1:8000/#m", "http://127.0.0.1:8000/v1", "m"),
        ("http://127.0.0.1:8000/v1#m", "http://127.0.0.1:8000/v1", "m"),
        ("http://127.0.0.1:8000/v1/#org/m:8b", "http://127.0.0.1:8000/v1", "org/m:8b"),
        ("https://host/api/v1/chat/completions#m", "https://host/api/v1", "m"),
        ("https://host/v1beta/openai#m", "https://host/v1beta/openai", "m"),
        ("https://host/proxy#m", "https://host/proxy/v1", "m"),
        ("openai/gpt-x", "https://api.openai.com/v1", "gpt-x"),
        ("openrouter/org/m", "https://openrouter.ai/api/v1", "org/m"),
    ],
)
def test_specs_name_a_server_and_a_model(spec: str, base: str, model: str) -> None:
    endpoint = parse_spec(spec)
    assert endpoint is not None
    assert (endpoint.base_url, endpoint.model, endpoint.spec) == (base, model, spec)


def test_none_is_no_client() -> None:
    assert client_from_spec("none", LLMConfig()) is None


@pytest.mark.parametrize(
    "spec", ["", "gpt-4", "openai/", "openrouter/m", "vllm/m", "http://h:1/v1", "http://#m", "http://h:1#", "ftp://h#m"]
)
def test_other_forms_are_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(InputError, match="URL#MODEL"):
        parse_spec(spec)


@pytest.mark.parametrize(
    "spec", [f"http://me:{SECRET}@host/v1#m", f"http://host/v1?key={SECRET}#m", f"http://a:{SECRET}@h"]
)
def test_a_url_holds_no_secrets_and_the_refusal_does_not_repeat_them(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_spec(spec)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "variable"), [("openai/m", "OPENAI_API_KEY"), ("openrouter/o/m", "OPENROUTER_API_KEY")]
)
def test_services_need_their_own_key(spec: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=variable):
        client_from_spec(spec, LLMConfig())
    monkeypatch.setenv(variable, SECRET)
    client = client_from_spec(spec, LLMConfig(temperature=0.7))
    assert client is not None
    assert (client.name, client.temperature) == (spec, 0.7)
    assert SECRET not in repr(client)
    client.end()


# -- replies ----------------------------------------------------------------------------------------------------------


def test_a_reply_carries_text_counts_and_cost(serving: Any) -> None:
    with serving(lambda path, asked: (200, chat("  hi \n"))) as (url, seen):
        (reply,) = send(client_of(url), request(temperature=0.5, max_tokens=9, seed=3, sample_index=2))
    assert reply == LLMReply(text="hi", finish="stop", prompt_tokens=7, completion_tokens=3, cost=0.25)
    assert seen[0]["path"] == "/v1/chat/completions"
    body = seen[0]["body"]
    assert body["model"] == "toy"
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 9, 5)
    assert not {"response_format", "logprobs", "top_logprobs"} & body.keys()


@pytest.mark.parametrize(
    ("body", "text", "finish"),
    [
        (chat("cut", "length"), "cut", "length"),
        (chat(None, "length"), "", "length"),
        (chat(None, "content_filter"), "", "refused"),
        (chat("part", "content_filter"), "part", "refused"),
        (chat(None, "stop", refusal="I will not."), "I will not.", "refused"),
        (chat("yes", "stop", refusal=""), "yes", "stop"),
        (chat("odd", "eos_token"), "odd", "stop"),
        (chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab", "stop"),
        (chat("<think>hm</think>answer", reasoning_content="hm"), "answer", "stop"),
        (chat("half \ud83d pair"), "half ? pair", "stop"),
    ],
)
def test_finish_reasons_and_shapes_of_content(serving: Any, body: Any, text: str, finish: str) -> None:
    reply = reply_to(serving, body)
    assert (reply.text, reply.finish) == (text, finish)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>nginx</html>",
        b"{",
        b'{"choices": [{"message": {"content": "cut o',
        b"null",
        b'"text"',
        b"[1]",
        {"choices": []},
        {"choices": None},
        {"error": {"message": "model is loading"}},
        {"error": "model is loading"},
        {"choices": [{"finish_reason": "error", "error": {"message": "upstream"}}]},
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_completion_may_pass_and_is_never_a_text(serving: Any, body: Any) -> None:
    failure = failure_of(serving, 200, body)
    assert isinstance(failure, TransientError)
    assert not failure.unpaid
    assert "\n" not in str(failure)
    assert len(str(failure)) <= 300


@pytest.mark.parametrize(
    "body",
    [{"choices": [None]}, {"choices": [{"message": None}]}, chat(None), chat(None, "tool_calls"), chat(12)],
)
def test_an_answer_without_a_text_is_an_error(serving: Any, body: Any) -> None:
    reply = reply_to(serving, body)
    assert (reply.finish, reply.text, reply.error) == ("error", None, "the answer has no text")


def test_an_answer_without_a_text_keeps_its_counts(serving: Any) -> None:
    assert reply_to(serving, chat(None)).completion_tokens == 3


def test_odd_numbers_do_no_harm(serving: Any) -> None:
    usage = {"prompt_tokens": "many", "completion_tokens": -1, "cost": "free", "prompt_tokens_details": 3}
    reply = reply_to(serving, chat("x") | {"usage": usage})
    assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens, reply.cost) == (None, 0, None, None)


def test_missing_usage_is_unknown_and_not_zero(serving: Any) -> None:
    body = {key: value for key, value in chat("x").items() if key != "usage"}
    reply = reply_to(serving, body)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cost) == (None, None, None)


def test_tokens_of_the_servers_own_prefix_cache_are_told(serving: Any) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6}}
    assert reply_to(serving, chat("x") | {"usage": usage}).cached_tokens == 6


@pytest.mark.parametrize(
    ("status", "throttled", "unpaid"),
    [(408, True, False), (409, False, True), (429, True, True), (500, False, False), (503, True, False)],
)
def test_what_may_pass_says_so_with_a_short_reason(serving: Any, status: int, throttled: bool, unpaid: bool) -> None:
    failure = failure_of(serving, status, {"error": {"message": "too long " * 200}})
    assert isinstance(failure, TransientError)
    assert f"HTTP {status}" in failure.reason
    assert len(failure.reason) <= 300
    assert (failure.status, failure.throttled, failure.unpaid) == (status, throttled, unpaid)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "0.25"}, 0.25),
        ({"Retry-After-Ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "-4"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(serving: Any, headers: dict[str, str], seconds: float | None) -> None:
    failure = failure_of(serving, 429, {}, headers)
    assert isinstance(failure, TransientError)
    assert failure.retry_after == seconds


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "odd parameter"), (401, "EXEGETE_API_KEY"), (402, "credit"), (403, "key"), (404, "'toy'"), (405, "405"),
     (422, "odd parameter"), (501, "501")],
)  # fmt: skip
def test_what_no_call_can_mend_is_raised_naming_the_server(serving: Any, status: int, hint: str) -> None:
    with (
        serving(lambda path, asked: (status, {"error": {"message": f"odd parameter, key {SECRET}"}})) as (url, seen),
        pytest.raises(LLMError, match=hint) as caught,
    ):
        send(client_of(url), request())
    assert not isinstance(caught.value, TransientError)
    assert url in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(seen) == 1


def test_an_empty_account_is_not_a_busy_server(serving: Any) -> None:
    failure = failure_of(serving, 429, {"error": {"code": "insufficient_quota", "message": "check your plan"}})
    assert not isinstance(failure, TransientError)
    assert "credit" in str(failure)


@pytest.mark.parametrize(("code", "passes"), [(502, True), (429, True), (402, False), (401, False)])
def test_an_error_inside_a_good_answer_has_the_status_it_names(serving: Any, code: int, passes: bool) -> None:
    failure = failure_of(serving, 200, {"error": {"code": code, "message": "provider"}})
    assert isinstance(failure, TransientError) == passes


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"error": {"message": "your input was flagged by moderation"}}),
        (400, {"error": {"code": "content_filter", "message": "ResponsibleAIPolicyViolation"}}),
        (400, {"error": {"code": "invalid_prompt"}}),
    ],
)
def test_a_filtered_text_is_a_refusal_of_that_text(serving: Any, status: int, body: Any) -> None:
    reply = reply_to(serving, body, status)
    assert (reply.finish, reply.text, reply.completion_tokens) == ("refused", "", 0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"code": "context_length_exceeded", "message": "This model's maximum context length is 8192"}}),
        (400, {"error": {"message": "the request exceeds the available context size"}}),
        (413, b"<html>too large</html>"),
    ],
)
def test_a_text_too_long_fails_by_itself(serving: Any, status: int, body: Any) -> None:
    reply = reply_to(serving, body, status, schema={"type": "object"})
    assert (reply.finish, reply.prompt_tokens) == ("error", 0)
    assert "too long for 'toy'" in str(reply.error)


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_hangs_or_drips_has_no_more_time_than_it_was_given(serving: Any, drip: bool) -> None:
    release = threading.Event()

    def wait(path: str, asked: Any) -> Any:
        release.wait(20)
        return 200, chat()

    def dripping(handler: Any) -> None:
        handler.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not release.wait(0.05):
            handler.request.sendall(b" ")

    with serving(wait) as (url, _), socket_server(dripping) as raw:
        with pytest.raises(TransientError) as caught:
            send(client_of(raw if drip else url, timeout=0.3), request())
        release.set()
    assert "did not answer within 0.3 s" in caught.value.reason
    assert (caught.value.throttled, caught.value.unpaid) == (True, False)


@contextmanager
def socket_server(answer: Any) -> Iterator[str]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            with suppress(OSError):
                answer(self)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_broken_connection_may_pass_and_may_have_cost(serving: Any) -> None:
    def reset(handler: Any) -> None:
        handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.request.close()

    with socket_server(reset) as url, pytest.raises(TransientError, match="cannot be reached") as caught:
        send(client_of(url), request())
    assert not caught.value.unpaid


def test_a_server_that_is_not_there_has_cost_nothing() -> None:
    with pytest.raises(TransientError, match="cannot be reached") as caught:
        send(client_of("http://127.0.0.1:9"), request())
    assert caught.value.unpaid


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_server_named_by_url_gets_its_own_key_only(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    with serving(lambda path, asked: (200, chat())) as (url, seen):
        send(client_of(url), request())
        monkeypatch.setenv("EXEGETE_API_KEY", "mine")
        send(client_of(url), request())
    assert not any(SECRET in str(s) or "secret" in str(s) for s in seen)
    assert seen[1]["headers"]["authorization"] == "Bearer mine"


def test_keys_are_taken_out_of_errors(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "plain.key.42")
    body = {"error": {"message": f"you sent plain.key.42 and {SECRET}"}}
    with serving(lambda path, asked: (400, body)) as (url, _):
        client = client_of(url)
        with pytest.raises(LLMError) as caught:
            send(client, request())
    shown = f"{caught.value} {client!r} {client.name}"
    assert "plain.key.42" not in shown
    assert SECRET not in shown
    assert "[key]" in str(caught.value)
    assert os.environ["EXEGETE_API_KEY"] == "plain.key.42"


# -- what servers do not understand -----------------------------------------------------------------------------------


def test_a_model_that_wants_another_limit_gets_it_and_it_is_remembered(serving: Any) -> None:
    def answer(path: str, asked: dict[str, Any]) -> Any:
        if "max_tokens" in asked:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        if "temperature" in asked:
            return 400, {"error": {"message": "'temperature' does not support 0"}}
        return 200, chat("fine")

    with serving(answer) as (url, seen):
        replies = send(client_of(url), request(max_tokens=9), request(max_tokens=9))
    assert [r.text for r in replies] == ["fine", "fine"]
    assert len(seen) == 4
    assert seen[-1]["body"]["max_completion_tokens"] == 9


def format_of(asked: Any) -> str:
    return str(asked["body"].get("response_format", {}).get("type", "none"))


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("known", ["json_schema", "json_object", "none"])
def test_a_schema_is_given_in_the_form_that_a_server_takes(serving: Any, status: int, known: str) -> None:
    def answer(path: str, asked: dict[str, Any]) -> Any:
        given = asked.get("response_format", {}).get("type", "none")
        return (200, chat("[1]")) if given == known else (status, {"error": {"message": "no"}})

    with serving(answer) as (url, seen):
        first, second = send(client_of(url), *[request(schema={"type": "object"})] * 2)
    assert first.text == second.text == "[1]"
    forms = ["json_schema", "json_object", "none"]
    assert [format_of(s) for s in seen] == [*forms[: forms.index(known) + 1], known]
    if known == "json_object":
        assert seen[-1]["body"]["response_format"]["schema"] == {"type": "object"}


def test_a_form_that_was_answered_is_not_given_up_for_a_server_error(serving: Any) -> None:
    left = [200, 500, 200]
    with serving(lambda path, asked: (left.pop(0), chat("[1]"))) as (url, seen):
        client = client_of(url)
        send(client, request(schema={"type": "object"}))
        with pytest.raises(TransientError):
            send(client, request(schema={"type": "object"}))
        send(client, request(schema={"type": "object"}))
    assert [format_of(s) for s in seen] == ["json_schema"] * 3


def test_a_server_error_changes_no_sampling(serving: Any) -> None:
    with serving(lambda path, asked: (500, {"error": {"message": "temperature max_completion_tokens"}})) as (url, seen):
        with pytest.raises(TransientError):
            send(client_of(url), request())
        assert len(seen) == 1


def test_a_model_that_gives_no_logprobs_is_asked_without(serving: Any) -> None:
    def answer(path: str, asked: dict[str, Any]) -> Any:
        if "logprobs" in asked:
            return 403, {"error": {"message": "You are not allowed to request logprobs from this model"}}
        return 200, chat("1")

    with serving(answer) as (url, seen):
        replies = send(client_of(url), *[request(logprobs=2)] * 2)
    assert [r.logprobs for r in replies] == [None, None]
    assert len(seen) == 3


def with_logprobs(content: str, *tokens: Any) -> dict[str, Any]:
    body = chat(content)
    body["choices"][0]["logprobs"] = {"content": list(tokens)}
    return body


def test_logprobs_are_read_where_given_and_none_where_not(serving: Any) -> None:
    top = [{"token": "1", "logprob": -0.1}, {"token": "0", "logprob": None}, {"token": "x", "logprob": "y"}, 3]
    body = with_logprobs("1", {"token": "1", "logprob": -0.1, "top_logprobs": top}, {"token": "?"})
    assert reply_to(serving, body, logprobs=2).logprobs == (
        TokenLogprob(token="1", logprob=-0.1, alternatives={"1": -0.1}),
        TokenLogprob(token="?", logprob=None),
    )
    assert reply_to(serving, chat("1"), logprobs=2).logprobs is None
    assert reply_to(serving, with_logprobs("1"), logprobs=2).logprobs is None


def test_logprobs_of_reasoning_are_left_out_with_it(serving: Any) -> None:
    tokens = [{"token": t, "logprob": -1.0} for t in ("<think>", "0", "</think>", "\n", "1")]
    body = with_logprobs("<think>0</think>\n1", *tokens)
    reply = reply_to(serving, body, logprobs=1)
    assert (reply.text, [t.token for t in reply.logprobs or ()]) == ("1", ["\n", "1"])
    answer_only = with_logprobs("<think>0</think>\n1", tokens[-1])
    assert [t.token for t in reply_to(serving, answer_only, logprobs=1).logprobs or ()] == ["1"]
    unclear = with_logprobs("<think>0</think>\n1", tokens[1], tokens[-1])
    assert reply_to(serving, unclear, logprobs=1).logprobs is None


# -- completions ------------------------------------------------------------------------------------------------------


def completion(text: Any = " mat", finish: str = "stop", **choice: Any) -> dict[str, Any]:
    return {
        "choices": [{"text": text, "finish_reason": finish, **choice}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }


LLAMA = {  # of llama-cpp-python, shortened
    "text_offset": [0, 3, 7, 11],
    "token_logprobs": [None, -5.42, -5.74, -5.5],
    "tokens": ["the", " cat", " sat", "["],
    "top_logprobs": [None, {" cat": -5.42, "re": -5.31}, {" sat": -5.74}, {"[": -5.5}],
}


def test_a_prompt_is_completed(serving: Any) -> None:
    with serving(lambda path, asked: (200, completion())) as (url, seen):
        (reply,) = send(client_of(url), LLMRequest(prompt="the cat", max_tokens=4, stop=("\n",), seed=1))
    assert reply == LLMReply(text=" mat", finish="stop", prompt_tokens=3, completion_tokens=1)
    assert seen[0]["path"] == "/v1/completions"
    body = {"model": "toy", "prompt": "the cat", "max_tokens": 4, "stop": ["\n"], "seed": 1, "temperature": 0.0}
    assert seen[0]["body"] == body


@pytest.mark.parametrize("offsets", [True, False])
def test_prompt_logprobs_come_from_the_echo(serving: Any, offsets: bool) -> None:
    given = LLAMA if offsets else {k: v for k, v in LLAMA.items() if k != "text_offset"}
    with serving(lambda path, asked: (200, completion("the cat sat[", "length", logprobs=given))) as (url, seen):
        (reply,) = send(client_of(url), LLMRequest(prompt="the cat sat", max_tokens=1, prompt_logprobs=True))
    assert (seen[0]["body"]["echo"], seen[0]["body"]["logprobs"], seen[0]["body"]["max_tokens"]) == (True, 1, 1)
    assert (reply.text, reply.finish) == ("[", "length")
    assert [(t.token, t.logprob) for t in reply.prompt_logprobs or ()] == [
        ("the", None), (" cat", -5.42), (" sat", -5.74),
    ]  # fmt: skip
    assert reply.logprobs == (TokenLogprob(token="[", logprob=-5.5, alternatives={"[": -5.5}),)


def test_an_echo_that_is_ignored_gives_no_prompt_logprobs(serving: Any) -> None:
    for body in (completion("[N"), completion("[N", logprobs=LLAMA), completion("the cat sat[")):
        reply = reply_to(serving, body, prompt="the cat sat", prompt_logprobs=True)
        assert reply.prompt_logprobs is None
        assert reply.text in ("[N", "[")


@pytest.mark.parametrize("logprobs", [None, 3, {}, {"tokens": 3}, {"tokens": ["a"], "token_logprobs": ["b"]}])
def test_odd_logprobs_of_completions_do_no_harm(serving: Any, logprobs: Any) -> None:
    reply = reply_to(serving, completion(logprobs=logprobs), prompt="x", logprobs=1)
    assert reply.text == " mat"
    assert all(token.logprob is None for token in reply.logprobs or ())


# -- what a server does, whatever it says -----------------------------------------------------------------------------


def honest(path: str, asked: dict[str, Any]) -> Any:
    if path.endswith("/chat/completions"):
        if "response_format" in asked:
            return 200, chat('{"exegete": "ready"}')
        likely = [{"token": "hi", "logprob": -0.5}, {"token": "yo", "logprob": -1.0}]
        token = {"token": "hi", "logprob": -0.5, "top_logprobs": likely[: asked.get("top_logprobs", 0)]}
        return 200, with_logprobs("hi", token) if "logprobs" in asked else chat("hi")
    lengths = [len(asked["prompt"]), 1]
    given = {"tokens": [asked["prompt"], "!"], "token_logprobs": [-3.0, -1.0], "text_offset": [0, lengths[0]]}
    given["top_logprobs"] = [None, {"!": -1.0, "?": -2.0}]
    return 200, completion(asked["prompt"] + "!", logprobs=given)


def silent(path: str, asked: dict[str, Any]) -> Any:
    return 200, chat("Good morning!") if path.endswith("/chat/completions") else completion("day")


def llama(path: str, asked: dict[str, Any]) -> Any:
    if asked.get("response_format", {}).get("type") == "json_schema":
        return 500, {"error": {"message": "Internal Server Error"}}
    return honest(path, asked)


def chats_only(path: str, asked: dict[str, Any]) -> Any:
    return honest(path, asked) if path.endswith("/chat/completions") else (404, {})


def completions_only(path: str, asked: dict[str, Any]) -> Any:
    return (404, {}) if path.endswith("/chat/completions") else honest(path, asked)


def gives_five(path: str, asked: dict[str, Any]) -> Any:
    """As services do that give few alternatives, and refuse to be asked for more."""
    if asked.get("top_logprobs", 0) > 5:
        return 400, {"error": {"message": "top_logprobs must be between 0 and 5"}}
    return honest(path, asked)


def gives_none(path: str, asked: dict[str, Any]) -> Any:
    """Probabilities of what was chosen, and none of what it was chosen over."""
    if "top_logprobs" in asked:
        return 400, {"error": {"message": "unknown argument top_logprobs"}}
    return chats_only(path, asked)


def thinks(path: str, asked: dict[str, Any]) -> Any:
    if "top_logprobs" not in asked:
        return chats_only(path, asked)
    words = ["<think>", *["hm "] * 20, "</think>", "hi"][: asked["max_tokens"]]
    tokens = [
        {"token": w, "logprob": -0.5, "top_logprobs": [{"token": t, "logprob": -1} for t in (w, "?")]} for w in words
    ]
    body = with_logprobs("".join(words), *tokens)
    body["choices"][0]["finish_reason"] = "length" if asked["max_tokens"] < 23 else "stop"
    return 200, body


EVERYTHING = {"chat": True, "completions": True, "logprobs": True, "prompt_logprobs": True, "schema": True}


@pytest.mark.parametrize(
    ("answer", "missing", "form"),
    [
        (honest, (), "json_schema"),
        (silent, ("logprobs", "prompt_logprobs", "schema"), "none"),
        (llama, (), "json_object"),
        (chats_only, ("completions", "prompt_logprobs"), "json_schema"),
        (completions_only, ("chat", "schema"), "json_schema"),
        (gives_five, (), "json_schema"),
        (gives_none, ("logprobs", "completions", "prompt_logprobs"), "json_schema"),
        (thinks, ("completions", "prompt_logprobs"), "json_schema"),
    ],
)
def test_capabilities_are_seen_and_not_believed(serving: Any, answer: Any, missing: Any, form: str) -> None:
    with serving(answer) as (url, seen):
        client = client_of(url)

        async def work() -> tuple[Capabilities, Capabilities]:
            try:
                return await client.capabilities(), await client.capabilities()
            finally:
                await client.close()

        first, second = asyncio.run(work())
        asked = len(seen)
        if first.chat:
            send(client, request(schema={"type": "object"}))
            assert format_of(seen[-1]) == form
    assert first == second == Capabilities(**{k: v and k not in missing for k, v in EVERYTHING.items()})
    assert asked <= 8
    assert all(s["body"]["max_tokens"] >= 1 for s in seen)


def test_where_twenty_alternatives_are_too_many_five_are_asked_for(serving: Any) -> None:
    # They were left out altogether, and every P(yes) with them.
    with serving(gives_five) as (url, seen):
        replies = send(client_of(url), request(logprobs=20), request(logprobs=20), request(logprobs=2))
        assert [s["body"]["top_logprobs"] for s in seen] == [20, 5, 5, 2]
        assert all(reply.logprobs and len(reply.logprobs[0].alternatives) == 2 for reply in replies)


def test_a_refused_key_is_no_missing_capability(serving: Any) -> None:
    with serving(lambda path, asked: (401, {})) as (url, _), pytest.raises(LLMError, match="EXEGETE_API_KEY"):
        asyncio.run(client_of(url).capabilities())


# -- reasoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a\nb</think>\n\nanswer", "answer"),
        ("  <think></think>answer", "answer"),
        ("reasoning without opening</think>answer", "answer"),
        ("<think>cut off in the middle [1, 0]", ""),
        ("<thinking>x</thinking>[1]", "[1]"),
        ("it fires on <think> and </think> tags", "it fires on <think> and </think> tags"),
        ("<think>a</think>on </think> tags", "on </think> tags"),
    ],
)
def test_reasoning_is_left_out(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer


@pytest.mark.parametrize("value", ["schlüssel-sehr-geheim", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_refused_without_repeating_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", value)
    with pytest.raises(InputError, match="EXEGETE_API_KEY") as caught:
        client_from_spec("http://127.0.0.1:9#m", LLMConfig())
    assert value not in str(caught.value)


# -- the check --------------------------------------------------------------------------------------------------------


def listing(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": n} for n in names]}


@pytest.mark.parametrize("name", ["toy", "toy:latest"])
def test_a_listed_model_passes(serving: Any, name: str) -> None:
    with serving(lambda path, asked: (200, listing("other", name))) as (url, seen):
        asyncio.run(client_of(url).check())
    assert [s["path"] for s in seen] == ["/v1/models"]


def test_a_model_with_a_routing_suffix_passes(serving: Any) -> None:
    endpoint = parse_spec("http://127.0.0.1:1#toy:nitro")
    assert endpoint is not None
    with serving(lambda path, asked: (200, listing("toy"))) as (url, _):
        asyncio.run(OpenAIBackend(replace(endpoint, base_url=f"{url}/v1")).check())


def test_a_missing_model_is_refused_with_the_listed_ones(serving: Any) -> None:
    with serving(lambda path, asked: (200, listing("toy-large", "llama"))) as (url, _):
        with pytest.raises(NotFoundError, match=r"toy-large") as caught:
            asyncio.run(client_of(url).check())
        assert url in str(caught.value)
        endpoint = parse_spec(f"{url}#qqqq")
        assert endpoint is not None
        with pytest.raises(NotFoundError, match=r"known: llama, toy-large"):
            asyncio.run(OpenAIBackend(endpoint).check())


def test_a_server_that_is_not_there_is_named_in_one_line() -> None:
    with pytest.raises(LLMError) as caught:
        asyncio.run(client_of("http://127.0.0.1:9").check())
    message = str(caught.value)
    assert "http://127.0.0.1:9/v1 cannot be reached" in message
    assert "start the server" in message
    assert "\n" not in message


def test_a_refused_key_is_found_by_the_check(serving: Any) -> None:
    with serving(lambda path, asked: (401, {})) as (url, _), pytest.raises(LLMError, match="EXEGETE_API_KEY"):
        asyncio.run(client_of(url).check())


@pytest.mark.parametrize("models", [(500, {}), (404, {}), (200, listing()), (200, b"<html>")])
def test_a_server_that_lists_no_models_is_asked_for_a_chat(serving: Any, models: Any) -> None:
    with serving(lambda path, asked: models if path.endswith("/models") else (200, chat("ready"))) as (url, seen):
        asyncio.run(client_of(url).check())
    assert [s["path"] for s in seen] == ["/v1/models", "/v1/chat/completions"]


def test_what_is_no_model_server_at_all_is_refused(serving: Any) -> None:
    with (
        serving(lambda path, asked: (200, b"<html>hello</html>")) as (url, _),
        pytest.raises(LLMError, match="no completion: <html>hello"),
    ):
        asyncio.run(client_of(url).check())


def test_one_client_serves_one_loop_after_another(serving: Any) -> None:
    with serving(lambda path, asked: (200, chat())) as (url, _):
        client = client_of(url)
        for _ in range(3):
            assert send(client, request())[0].text == "hi"
        asyncio.run(client.close())
