"""Any OpenAI-compatible server: OpenAI, OpenRouter, vLLM, llama.cpp, Ollama, transformers serve.

Keys come from the environment and nowhere else, and are taken out of every text that leaves this module. A key is sent
only to the service it belongs to: a server named by URL gets ``EXEGETE_API_KEY``, never ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final
from urllib.parse import urlsplit, urlunsplit

from exegete.errors import InputError, LLMError, unknown
from exegete.llm.client import LLMClient
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

    from exegete.config import LLMConfig

FORMS = "URL#MODEL (http://127.0.0.1:8000/v1#model), openai/MODEL, openrouter/ORG/MODEL, or none"
MAX_RETRIES = 2
_KEY_LIKE = re.compile(r"\b(sk|key|hf|gsk)[-_][\w-]{8,}")
_VERSION = re.compile(r"v\d+\w*")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served: ``base_url`` with its version part, and the environment variable that holds the key."""

    spec: str
    base_url: str
    model: str
    key_variable: str
    key_required: bool

    def key(self) -> str:
        """Return the key from the environment. Raises InputError when a service that needs one has none."""
        value = os.environ.get(self.key_variable, "").strip()
        if not value and self.key_required:
            raise InputError(f"{self.spec} needs a key; set {self.key_variable} in the environment")
        return value or "none"  # the SDK insists on some key; local servers ignore it


def parse_spec(spec: str) -> Endpoint | None:
    """Read the name of a language model; None for ``none``. Raises InputError on an unknown form."""
    if spec == "none":
        return None
    if spec.startswith(("http://", "https://")):
        return _url_endpoint(spec)
    service, _, model = spec.partition("/")
    if service == "openai" and model:
        return Endpoint(spec=spec, base_url="https://api.openai.com/v1", model=model, key_variable="OPENAI_API_KEY",
                        key_required=True)  # fmt: skip
    if service == "openrouter" and model.partition("/")[2]:
        return Endpoint(spec=spec, base_url="https://openrouter.ai/api/v1", model=model,
                        key_variable="OPENROUTER_API_KEY", key_required=True)  # fmt: skip
    raise InputError(f"unknown language model {spec!r}; write {FORMS}")


def _url_endpoint(spec: str) -> Endpoint:
    url, _, model = spec.partition("#")
    if not model:
        raise InputError(f"{url.split('@')[-1]} names a server but no model; write URL#MODEL")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        # Specs are written into run folders and logs, so nothing secret may be part of one.
        raise InputError("a server's URL holds no user, password or query; put a key into EXEGETE_API_KEY")
    if not parts.hostname:
        raise InputError(f"{spec!r} names no server; write {FORMS}")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not any(_VERSION.fullmatch(piece) for piece in path.split("/")):
        path += "/v1"
    base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return Endpoint(spec=spec, base_url=base, model=model, key_variable="EXEGETE_API_KEY", key_required=False)


def client_from_spec(spec: str, config: LLMConfig) -> OpenAIClient | None:
    """Return the client of a language model named on the command line; None for ``none``.

    Raises InputError on an unknown form or a missing key. Nothing is sent before ``check`` or ``reply``.
    """
    endpoint = parse_spec(spec)
    if endpoint is None:
        return None
    return OpenAIClient(endpoint, timeout=config.timeout, temperature=config.temperature)


@final
@dataclass(slots=True)
class _Manners:
    """What this server turned out not to understand; learnt from its refusals, kept for the client's life."""

    dropped: set[str] = field(default_factory=set)
    completion_limit: bool = False

    def learn(self, status: int, body: str, sent: Mapping[str, Any]) -> bool:
        """Return whether the same request can be put in another way."""
        if status in (400, 422) and "max_tokens" in sent and "max_completion_tokens" in body:
            self.completion_limit = True
            return True
        for name in ("response_format", "temperature", "seed", "top_logprobs"):
            if status in (400, 422) and name in sent and name in body:
                self.dropped.add(name)
                return True
        if status in (400, 422, 500) and "response_format" in sent:  # llama.cpp answers a schema with a bare 500
            self.dropped.add("response_format")
            return True
        return False


@final
class OpenAIClient(LLMClient):
    """One model of one server, through the chat completions of the openai SDK, which retries twice by itself.

    Failures of a call are replies with ``finish="error"``; a refused key (401, 403), an empty account (402), an unknown
    model or route (404) raises LLMError, since no further call can mend it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 120.0,
        temperature: float = 0.0,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        import openai  # slow to import, so not before a language model is asked for

        self._sdk = openai
        self._endpoint = endpoint
        self._key = endpoint.key()
        self._timeout = timeout
        self._temperature = temperature
        self._max_retries = max_retries
        self._manners = _Manners()
        self._client: AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        """The spec as given; it never holds a key."""
        return self._endpoint.spec

    @property
    def temperature(self) -> float:
        """Sampling temperature that explainer and judge ask for."""
        return self._temperature

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name!r})"

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Send one request. Raises LLMError on a refused key or an unknown model."""
        client = self._connected()
        for _ in range(5):  # one more than the ways in which a request can be put differently
            arguments = self._arguments(request)
            try:
                raw = await client.chat.completions.with_raw_response.create(**arguments)
                return _read(raw.text, self._clean)
            except self._sdk.APIStatusError as error:
                body = error.response.text
                if error.status_code == 403 and "moderation" in body:  # OpenRouter: this text, not this key
                    return LLMReply(text="", finish="refused")
                if error.status_code in (401, 402, 403, 404):
                    raise LLMError(self._refusal(error.status_code)) from None
                if self._manners.learn(error.status_code, body, arguments):
                    continue
                return _failed(self._clean(f"HTTP {error.status_code}: {body}"))
            except self._sdk.OpenAIError as error:
                return _failed(self._unreached(error))
        return _failed("the server refuses every form of the request")

    async def check(self) -> None:
        """Ask the server for its models, or failing that for one token.

        Raises LLMError when it cannot be reached or refuses the key, NotFoundError when it lacks the model.
        """
        async with self._open() as client:
            try:
                raw = await client.models.with_raw_response.list()
                known = _model_names(raw.text)
            except self._sdk.APIStatusError as error:
                if error.status_code in (401, 402, 403):
                    raise LLMError(self._refusal(error.status_code)) from None
                known = ()  # a server without this route may still complete chats
            except self._sdk.OpenAIError as error:
                raise LLMError(
                    f"{self._unreached(error)}; start the server, or correct the URL in {self.name!r}"
                ) from None
        model = self._endpoint.model
        if known and model not in known and f"{model}:latest" not in known:
            raise unknown(f"model at {self._endpoint.base_url}", model, known)
        if not known:
            await self._probe()

    async def close(self) -> None:
        """Give back connections. The client opens new ones when it is used again."""
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.close()

    async def _probe(self) -> None:
        request = LLMRequest(messages=({"role": "user", "content": "Answer with one word: ready"},), max_tokens=8)
        try:
            reply = await self.reply(request)
        finally:
            await self.close()
        if reply.finish == "error":
            raise LLMError(f"{self._endpoint.base_url} does not complete chats with {self._endpoint.model!r}: "
                           f"{reply.error}; is it an OpenAI-compatible server?")  # fmt: skip

    def _open(self) -> AsyncOpenAI:
        client = self._sdk.AsyncOpenAI(
            api_key=self._key, base_url=self._endpoint.base_url, timeout=self._timeout, max_retries=self._max_retries
        )
        if self._endpoint.key_variable != "OPENAI_API_KEY":
            client.organization = client.project = None  # the SDK takes these from the environment for every server
        return client

    def _connected(self) -> AsyncOpenAI:
        """Return the client of the running loop; connections of an earlier loop cannot be used in this one."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client, self._loop = self._open(), loop
        return self._client

    def _arguments(self, request: LLMRequest) -> dict[str, Any]:
        limit = "max_completion_tokens" if self._manners.completion_limit else "max_tokens"
        arguments: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [dict(m) for m in request.messages],
            "temperature": request.temperature,
            limit: request.max_tokens,
        }
        if request.seed is not None:
            arguments["seed"] = request.seed + request.sample_index
        if request.schema is not None:
            schema = {"name": "answer", "schema": dict(request.schema)}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.logprobs and "top_logprobs" not in self._manners.dropped:
            arguments |= {"logprobs": True, "top_logprobs": request.logprobs}
        return {k: v for k, v in arguments.items() if k not in self._manners.dropped}

    def _clean(self, text: str) -> str:
        """Return a short single line without keys."""
        if self._key != "none":
            text = text.replace(self._key, "[key]")
        return " ".join(_KEY_LIKE.sub("[key]", text).split())[:300]

    def _unreached(self, error: OpenAIError) -> str:
        if isinstance(error, self._sdk.APITimeoutError):
            return f"{self._endpoint.base_url} did not answer within {self._timeout:g} s"
        if isinstance(error, self._sdk.APIConnectionError):
            return self._clean(f"{self._endpoint.base_url} cannot be reached ({error.__cause__ or error})")
        return self._clean(f"{self._endpoint.base_url}: {error}")

    def _refusal(self, status: int) -> str:
        where, model = self._endpoint.base_url, self._endpoint.model
        if status == 404:
            return f"{where} has no chat completions for the model {model!r} (404); check URL and model"
        if status == 402:
            return f"{where} asks to be paid for {model!r} (402); add credit to the account"
        return f"{where} refuses the key for {model!r} ({status}); set {self._endpoint.key_variable} to a valid one"


def _failed(error: str) -> LLMReply:
    return LLMReply(text=None, finish="error", error=error)


def _model_names(body: str) -> tuple[str, ...]:
    data = _mapping(_parsed(body)).get("data")
    return tuple(str(_mapping(m).get("id")) for m in data) if isinstance(data, list) else ()


def _parsed(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(body: str, clean: Callable[[str], str]) -> LLMReply:
    """Read the body of a chat completion without trusting it to be one."""
    data = _mapping(_parsed(body))
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        detail = _mapping(data.get("error")).get("message") or body or "an empty body"
        return _failed(clean(f"the answer is no chat completion: {detail}"))
    choice = _mapping(choices[0])
    message = _mapping(choice.get("message"))
    usage = _mapping(data.get("usage"))
    content, refusal = _content(message.get("content")), message.get("refusal")
    reason = choice.get("finish_reason")
    finish: Literal["stop", "length", "refused"] = "length" if reason == "length" else "stop"
    if reason == "content_filter" or (refusal and not content):
        finish, content = "refused", content or str(refusal or "")
    if content is None and finish == "stop":
        return _failed("the answer has no text")
    cost = usage.get("cost")
    return LLMReply(
        text=without_reasoning(_sound(content or "")),
        finish=finish,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cost=float(cost) if isinstance(cost, int | float) else None,
        logprobs=_logprobs(choice.get("logprobs")),
    )


def _content(value: Any) -> str | None:
    if isinstance(value, list):  # some servers answer in parts
        texts = [part["text"] for part in map(_mapping, value) if isinstance(part.get("text"), str)]
        return "".join(texts)
    return value if isinstance(value, str) else None


def _sound(text: str) -> str:
    """Return text that can be sent on: a lone half of a surrogate pair, which JSON can carry, cannot be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _logprobs(value: Any) -> tuple[Mapping[str, float], ...] | None:
    """Return the alternatives per token; None where the server, asked or not, gave none."""
    tokens = _mapping(value).get("content")
    if not isinstance(tokens, list) or not tokens:
        return None
    return tuple(_alternatives(_mapping(t).get("top_logprobs")) for t in tokens)


def _alternatives(value: Any) -> dict[str, float]:
    found = map(_mapping, value if isinstance(value, list) else [])
    return {str(a.get("token")): float(a["logprob"]) for a in found if isinstance(a.get("logprob"), int | float)}


def without_reasoning(text: str) -> str:
    """Return a reply without the reasoning that some models write before it, between ``<think>`` and ``</think>``.

    Some chat templates open the tag themselves, so that the reply holds only the closing one. Reasoning that was cut
    off before it ended leaves nothing. Tags later in the text are part of the answer.
    """
    for tag in ("think", "thinking"):
        opening, closing = f"<{tag}>", f"</{tag}>"
        head, closed, answer = text.partition(closing)
        if head.lstrip().startswith(opening) or (closed and opening not in head):
            return answer.strip()
    return text.strip()
