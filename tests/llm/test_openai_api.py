from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from exegete.config import LLMConfig
from exegete.errors import InputError, LLMError, NotFoundError
from exegete.llm.openai_api import OpenAIClient, client_from_spec, parse_spec, without_reasoning
from exegete.types import LLMReply, LLMRequest

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


def client_of(url: str, **options: Any) -> OpenAIClient:
    endpoint = parse_spec(f"{url}#toy")
    assert endpoint is not None
    return OpenAIClient(endpoint, **{"timeout": 5.0, "max_retries": 0, **options})


def send(client: OpenAIClient, *requests: LLMRequest) -> list[LLMReply]:
    async def work() -> list[LLMReply]:
        try:
            return [await client.reply(r) for r in requests]
        finally:
            await client.close()

    return asyncio.run(work())


def reply_to(serving: Any, body: Any, status: int = 200, **options: Any) -> LLMReply:
    with serving(lambda path, asked: (status, body)) as (url, _):
        return send(client_of(url), request(**options))[0]


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
        b"null",
        b'"text"',
        b"[1]",
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"message": None}]},
        {"error": {"message": "model is loading"}},
        chat(None),
        chat(None, "tool_calls"),
        chat(12),
        b"\xff\xfe",
    ],
)
def test_what_is_no_completion_is_an_error_and_never_a_text(serving: Any, body: Any) -> None:
    reply = reply_to(serving, body)
    assert (reply.finish, reply.text) == ("error", None)
    assert reply.error


def test_odd_numbers_do_no_harm(serving: Any) -> None:
    body = chat("x") | {"usage": {"prompt_tokens": "many", "completion_tokens": -1, "cost": "free"}}
    reply = reply_to(serving, body)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cost) == (0, 0, None)


@pytest.mark.parametrize("status", [400, 409, 422, 429, 500, 503])
def test_failed_calls_are_errors_with_a_short_reason(serving: Any, status: int) -> None:
    reply = reply_to(serving, {"error": {"message": "too long " * 200}}, status)
    assert reply.finish == "error"
    assert f"HTTP {status}" in str(reply.error)
    assert len(str(reply.error)) <= 300


@pytest.mark.parametrize(("status", "hint"), [(401, "EXEGETE_API_KEY"), (402, "credit"), (403, "key"), (404, "'toy'")])
def test_what_no_call_can_mend_is_raised_naming_the_server(serving: Any, status: int, hint: str) -> None:
    with (
        serving(lambda path, asked: (status, {"error": {"message": f"bad key {SECRET}"}})) as (url, _),
        pytest.raises(LLMError, match=hint) as caught,
    ):
        send(client_of(url), request())
    assert url in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_moderated_text_is_a_refusal_of_that_text(serving: Any) -> None:
    reply = reply_to(serving, {"error": {"message": "your input was flagged by moderation"}}, 403)
    assert (reply.finish, reply.text) == ("refused", "")


def test_a_failure_that_passes_is_retried(serving: Any) -> None:
    left = [500, 200]
    with serving(lambda path, asked: (left.pop(0), chat("there"))) as (url, seen):
        (reply,) = send(client_of(url, max_retries=2), request())
    assert reply.text == "there"
    assert len(seen) == 2


def test_a_server_that_hangs_is_a_failed_call(serving: Any) -> None:
    release = threading.Event()

    def wait(path: str, asked: Any) -> Any:
        release.wait(20)
        return 200, chat()

    with serving(wait) as (url, _):
        (reply,) = send(client_of(url, timeout=0.2), request())
        release.set()
    assert reply.finish == "error"
    assert "did not answer within 0.2 s" in str(reply.error)


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
        (reply,) = send(client, request())
    shown = f"{reply.error} {client!r} {client.name}"
    assert "plain.key.42" not in shown
    assert SECRET not in shown
    assert "[key]" in str(reply.error)
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


@pytest.mark.parametrize("status", [400, 500])
def test_a_schema_that_a_server_refuses_is_left_out(serving: Any, status: int) -> None:
    with serving(lambda path, asked: (status if "response_format" in asked else 200, chat("[1]"))) as (url, seen):
        (reply,) = send(client_of(url), request(schema={"type": "object"}))
    assert reply.text == "[1]"
    assert [("response_format" in s["body"]) for s in seen] == [True, False]


def test_a_server_error_changes_no_sampling(serving: Any) -> None:
    with serving(lambda path, asked: (500, {"error": {"message": "temperature max_completion_tokens"}})) as (url, seen):
        (reply,) = send(client_of(url), request())
    assert reply.finish == "error"
    assert len(seen) == 1


def test_logprobs_are_read_where_given_and_none_where_not(serving: Any) -> None:
    body = chat("1")
    body["choices"][0]["logprobs"] = {
        "content": [{"token": "1", "top_logprobs": [{"token": "1", "logprob": -0.1}, {"token": "0", "logprob": None}]}]
    }
    assert reply_to(serving, body, logprobs=2).logprobs == ({"1": -0.1},)
    assert reply_to(serving, chat("1"), logprobs=2).logprobs is None


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


# -- the check --------------------------------------------------------------------------------------------------------


def listing(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": n} for n in names]}


@pytest.mark.parametrize("name", ["toy", "toy:latest"])
def test_a_listed_model_passes(serving: Any, name: str) -> None:
    with serving(lambda path, asked: (200, listing("other", name))) as (url, seen):
        asyncio.run(client_of(url).check())
    assert [s["path"] for s in seen] == ["/v1/models"]


def test_a_missing_model_is_refused_with_the_listed_ones(serving: Any) -> None:
    with serving(lambda path, asked: (200, listing("toy-large", "llama"))) as (url, _):
        with pytest.raises(NotFoundError, match=r"toy-large") as caught:
            asyncio.run(client_of(url).check())
        assert url in str(caught.value)
        endpoint = parse_spec(f"{url}#qqqq")
        assert endpoint is not None
        with pytest.raises(NotFoundError, match=r"known: llama, toy-large"):
            asyncio.run(OpenAIClient(endpoint).check())


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
        pytest.raises(LLMError, match="OpenAI-compatible"),
    ):
        asyncio.run(client_of(url).check())


def test_one_client_serves_one_loop_after_another(serving: Any) -> None:
    with serving(lambda path, asked: (200, chat())) as (url, _):
        client = client_of(url)
        for _ in range(3):
            assert send(client, request())[0].text == "hi"
        asyncio.run(client.close())
