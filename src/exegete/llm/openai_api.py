"""Any OpenAI-compatible server: OpenAI, OpenRouter, vLLM, llama.cpp, Ollama, transformers serve.

Keys are taken out of every text that leaves this module. The SDK's own retries are off: the ``Caller`` has them.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from exegete.errors import LLMError, unknown
from exegete.llm.backend import Backend, Capabilities, Send, TransientError
from exegete.llm.openai_endpoint import Endpoint, without_keys
from exegete.llm.openai_manners import Manners
from exegete.llm.openai_probes import probe
from exegete.llm.openai_reading import chat_reply, completion_reply, error_in, model_names, parsed
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

CONNECT = 10.0
"""Most seconds until a connection stands; after that the server is not there."""
_FORMS = 12  # more than the ways in which one request can be put
_AGAIN = frozenset({408, 409, 425, 429})  # and the 5xx
_UNPAID = frozenset({409, 425, 429})  # refused before any work was done
_BUSY = frozenset({408, 429, 503, 504, 529})
_NEVER_AGAIN = frozenset({501, 505})
_FILTERED = ("content_filter", "content_policy", "responsibleaipolicy", "invalid_prompt", "moderation")
_TOO_LONG = (
    "context_length", "context length", "context window", "context size", "exceed_context", "prompt is too long",
    "too many tokens", "maximum number of tokens",
)  # fmt: skip

Answer = tuple[int, Mapping[str, str], bytes]


@final
class OpenAIBackend(Backend):
    """One model of one server, through the openai SDK.

    An attempt takes at most ``timeout`` seconds in all; ``connections`` may be open at once. Too much at once, a
    timeout, a broken connection, a 5xx or an unreadable answer raises TransientError. A text that the server's filter
    refuses is a refused reply, one too long for the model an error reply; any other refusal (400, a key, an empty
    account, an unknown model) raises LLMError.
    """

    def __init__(self, endpoint: Endpoint, *, timeout: float = 120.0, connections: int = 32) -> None:
        import openai  # slow to import, so not before a language model is asked for

        self._sdk = openai
        self._endpoint = endpoint
        self._key = endpoint.key()
        self._timeout, self._connections = timeout, connections
        self._manners = Manners()
        self._send: Send = self.send
        self._seen: Capabilities | None = None
        self._client: AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._response, self._limits = _http_types(connections)

    @property
    def name(self) -> str:
        """The spec as given; it never holds a key."""
        return self._endpoint.spec

    @property
    def endpoint(self) -> Endpoint:
        """Where the model is served."""
        return self._endpoint

    def __repr__(self) -> str:
        return f"OpenAIBackend({self.name!r})"

    async def send(self, request: LLMRequest) -> LLMReply:
        """Make one attempt, put in as many ways as the server needs to understand it."""
        client = self._connected()
        route = "/chat/completions" if request.prompt is None else "/completions"
        for _ in range(_FORMS):
            body = self._manners.arguments(self._endpoint.model, request)
            status, headers, content = await self._exchange(client, route, body)
            if status < 400:
                data = parsed(content)
                wrong = error_in(data)
                if wrong is None:
                    reply = self._read(request, data, content)
                    self._manners.answered(body)
                    return reply
                if wrong[0] is None:
                    raise TransientError(self._clean(f"{self._endpoint.base_url} answers with an error: {wrong[1]}"))
                status = wrong[0]
            text = content.decode("utf-8", "replace")
            reply_of_its_own = self._refused(status, text)
            if reply_of_its_own is not None:
                return reply_of_its_own
            if not self._manners.learn(status, text, body):
                raise self._failure(status, headers, text, route)
        raise LLMError(f"{self._endpoint.base_url} refuses every form of the request")

    async def check(self) -> None:
        """Ask the server for its models, or failing that for one short answer.

        Raises LLMError when it cannot be reached or refuses the key, NotFoundError when it lacks the model.
        """
        try:
            status, headers, content = await self._exchange(self._connected(), "/models", None)
            if status in (401, 402, 403):
                raise self._failure(status, headers, content.decode("utf-8", "replace"), "/models")
            # A server without this route may still complete chats.
            known = model_names(content) if status < 400 else ()
            model = self._endpoint.model
            # Ollama lists llama3:latest for llama3, OpenRouter org/model alone for org/model:nitro.
            if known and not {model, f"{model}:latest", model.rpartition(":")[0]} & {*known}:
                raise unknown(f"model at {self._endpoint.base_url}", model, known)
            if not known:
                await self._ready()
        except TransientError as error:
            raise LLMError(f"{error.reason}; start the server, or correct the URL in {self.name!r}") from None
        finally:
            await self.close()

    async def capabilities(self) -> Capabilities:
        """Ask a few short questions whose answers show what the server does, whatever it says that it does."""
        if self._seen is None:
            self._seen = await probe(self._send, self._manners)
        return self._seen

    def probe_through(self, send: Send) -> None:
        """Let the questions of ``check`` and ``capabilities`` be paid for."""
        self._send = send

    async def close(self) -> None:
        """Give back connections. The backend opens new ones when it is used again."""
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.close()

    async def _ready(self) -> None:
        request = LLMRequest(
            messages=({"role": "user", "content": "Answer with one word: ready"},), max_tokens=8, stage="check"
        )
        reply = await self._send(request)
        if reply.finish == "error":
            raise LLMError(f"{self._endpoint.base_url} does not complete chats with {self._endpoint.model!r}: "
                           f"{reply.error}; is it an OpenAI-compatible server?")  # fmt: skip

    def _open(self) -> AsyncOpenAI:
        # One clock runs over the whole attempt (``_exchange``), so that a server that drips bytes does not hold it.
        timeout = self._sdk.Timeout(None, connect=min(CONNECT, self._timeout))
        client = self._sdk.AsyncOpenAI(
            api_key=self._key,
            base_url=self._endpoint.base_url,
            timeout=timeout,
            max_retries=0,
            http_client=self._sdk.DefaultAsyncHttpxClient(limits=self._limits, timeout=timeout),
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

    async def _exchange(self, client: AsyncOpenAI, route: str, body: dict[str, Any] | None) -> Answer:
        """Return what the server answered, whatever its status. Raises TransientError where there was no answer."""
        try:
            async with asyncio.timeout(self._timeout):
                # Not ``chat.completions.create``: it reads the arguments and the answer into models that we do not
                # use, which costs more than all the rest, and refuses or changes what is not OpenAI's own.
                if body is None:
                    response = await client.get(route, cast_to=self._response)
                else:
                    response = await client.post(route, cast_to=self._response, body=body)
                return int(response.status_code), response.headers, response.content
        except self._sdk.APIStatusError as error:
            return error.status_code, error.response.headers, error.response.content
        except TimeoutError:
            reason = f"{self._endpoint.base_url} did not answer within {self._timeout:g} s"
            raise TransientError(reason, throttled=True) from None
        except self._sdk.OpenAIError as error:
            raise self._unreached(error) from None

    def _read(self, request: LLMRequest, data: Mapping[str, Any], content: bytes) -> LLMReply:
        # The body is shown only where it is no completion.
        shown = "" if data.get("choices") else content.decode("utf-8", "replace")[:4096]
        if request.prompt is None:
            return chat_reply(data, shown, self._clean)
        return completion_reply(data, shown, self._clean, request.prompt if request.prompt_logprobs else None)

    def _refused(self, status: int, body: str) -> LLMReply | None:
        """Return the reply where this text is at fault, not the way of asking: others may pass."""
        if status not in (400, 403, 413, 422):
            return None
        said = body.lower()
        if status != 413 and any(word in said for word in _FILTERED):
            return LLMReply(text="", finish="refused", prompt_tokens=0, completion_tokens=0)
        if status == 413 or (status != 403 and any(word in said for word in _TOO_LONG)):
            reason = self._clean(f"the prompt is too long for {self._endpoint.model!r}: {body}")
            return LLMReply(text=None, finish="error", error=reason, prompt_tokens=0, completion_tokens=0)
        return None

    def _failure(self, status: int, headers: Mapping[str, str], body: str, route: str) -> LLMError:
        where, model = self._endpoint.base_url, self._endpoint.model
        if status == 402 or (status == 429 and "insufficient_quota" in body):
            return LLMError(f"{where} asks to be paid for {model!r} ({status}); add credit to the account")
        if status in _AGAIN or (status >= 500 and status not in _NEVER_AGAIN):
            return TransientError(
                self._clean(f"{where}: HTTP {status}: {body}"),
                status=status,
                retry_after=_retry_after(headers),
                throttled=status in _BUSY,
                unpaid=status in _UNPAID,
            )
        if status == 404:
            kind = "chat completions" if route == "/chat/completions" else "completions"
            message = f"{where} has no {kind} for the model {model!r} (404); check URL and model"
        elif status in (401, 403):
            variable = self._endpoint.key_variable
            message = f"{where} refuses the key for {model!r} ({status}); set {variable} to a valid one"
        else:
            message = self._clean(f"{where} refuses the request for {model!r}: HTTP {status}: {body}")
        return LLMError(message)

    def _clean(self, text: str) -> str:
        return without_keys(text, self._key)

    def _unreached(self, error: OpenAIError) -> TransientError:
        cause = error.__cause__
        # By name, since the SDK has changed its HTTP library.
        absent = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        where = self._endpoint.base_url
        if isinstance(error, self._sdk.APITimeoutError):
            seconds = min(CONNECT, self._timeout)
            return TransientError(f"{where} did not answer within {seconds:g} s", throttled=not absent, unpaid=absent)
        if isinstance(error, self._sdk.APIConnectionError):
            detail = str(cause or error) or type(cause).__name__
            return TransientError(self._clean(f"{where} cannot be reached ({detail})"), unpaid=absent)
        return TransientError(self._clean(f"{where}: {error}"))


def _http_types(connections: int) -> tuple[type[Any], Any]:
    """Return the response type of the SDK's HTTP library, and its limits for so many connections kept open."""
    try:
        import httpx2 as http
    except ImportError:  # openai 2
        import httpx as http  # type: ignore[no-redef]
    return http.Response, http.Limits(max_connections=None, max_keepalive_connections=connections)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asked to wait."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
