"""Requests sent as batch files: at half the price, answered within a day (OpenAI's Batch API and those like it).

Source: the files and batches endpoints of the OpenAI API reference; a line of a file is ``{"custom_id", "method",
"url", "body"}``, a line of what comes back ``{"custom_id", "response": {"status_code", "body"}, "error"}``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

from exegete.errors import LLMError
from exegete.files import fault_point
from exegete.llm.backend import DIRECT, Backend, Capabilities, Send, TransientError
from exegete.llm.batch_files import BatchFolder, SentBatch
from exegete.llm.gathering import Gathering
from exegete.llm.openai_api import OpenAIBackend
from exegete.llm.openai_endpoint import Endpoint, without_keys
from exegete.llm.openai_manners import Manners
from exegete.llm.openai_reading import chat_reply, completion_reply, mapping, parsed
from exegete.llm.replies import default_cache_path, request_key
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

MOST_REQUESTS = 50_000
MOST_BYTES = 100_000_000
"""Most of one file; the API allows 50,000 requests and 200 MB."""
_QUIET = 2.0
"""Seconds without another request after which a file is sent: those of one stage come one after the other."""
_POLL = (5.0, 60.0)
"""Seconds between two looks at a batch, at first and at most."""
_PATIENCE = 20
"""Looks in a row that may fail before the requests do; the batch goes on, and a later run collects it."""
_ENDED = ("completed", "expired", "cancelled", "failed")
_FILTERED = ("content_filter", "content_policy", "moderation")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that waits for its file: its key, and its line."""

    key: str
    route: str
    body: Mapping[str, Any]
    size: int


@final
class BatchBackend(Backend):
    """One model of one server, asked in files.

    Requests that wait together go into one file. What was sent, and what came back, lies in ``folder`` (of a run; else
    beside the kept replies): after a stop at any moment, a request that is in a batch under way waits for that one, and
    one that was answered is never sent again. Requests that failed in a batch, or that it did not get to before it
    expired, raise TransientError and can be sent in another. What a server is asked about itself (``check``,
    ``capabilities``) is asked directly.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 120.0,
        folder: Path | None = None,
        quiet: float = _QUIET,
        poll: tuple[float, float] = _POLL,
    ) -> None:
        import openai  # slow to import, so not before a language model is asked for

        self._sdk = openai
        self._endpoint, self._timeout, self._poll = endpoint, timeout, poll
        self._key = endpoint.key()
        self._online = OpenAIBackend(endpoint, timeout=timeout)
        self._manners = Manners()
        self._kept = BatchFolder((folder or default_cache_path().parent) / "batches", endpoint.spec)
        self._gathering: Gathering[_Asked, SentBatch] = Gathering(
            self._submit, _one_file, quiet=quiet, most=MOST_REQUESTS, at_once=4
        )
        self._sent: dict[str, Mapping[str, Any]] = {}
        self._polls: dict[str, asyncio.Task[Mapping[str, Mapping[str, Any]]]] = {}
        self._turn = asyncio.Lock()
        self._client: AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        """The spec as given; it never holds a key."""
        return self._endpoint.spec

    @property
    def unlimited(self) -> bool:
        """True: a file takes any number of requests, and they may take a day."""
        return True

    def __repr__(self) -> str:
        return f"BatchBackend({self.name!r})"

    async def send(self, request: LLMRequest) -> LLMReply:
        """Answer a request from what is kept, from the batch that holds it, or in the next file.

        Raises TransientError for what another file may mend; LLMError where the server takes no batch files, refuses
        the key or the whole file; CorruptError when a file of the folder is damaged.
        """
        if request.stage in DIRECT:
            return await self._online.send(request)
        key = request_key(self.name, request)
        line = self._kept.answer(key)
        if line is None:
            batch = self._kept.pending(key) or await self._gathering.put(self._asked(key, request))
            failures = await self._outcome(batch)
            line = self._kept.answer(key) or failures.get(key, {})
        return self._read(key, request, line)

    def collects(self, request: LLMRequest) -> bool:
        """Return whether a request is in a batch under way, or was answered in one that ended."""
        if request.stage in DIRECT:
            return False
        key = request_key(self.name, request)
        return self._kept.pending(key) is not None or self._kept.answer(key) is not None

    async def check(self) -> None:
        """Ask the server for its models. Raises LLMError or NotFoundError as ``OpenAIBackend`` does."""
        await self._online.check()

    async def capabilities(self) -> Capabilities:
        """Ask the server directly, in a few short requests at its full price."""
        return await self._online.capabilities()

    def probe_through(self, send: Send) -> None:
        """Let direct questions be paid for."""
        self._online.probe_through(send)

    async def close(self) -> None:
        """Give back connections and wait no more. What is under way stays so, and is collected when asked for again."""
        await self._gathering.close()
        await self._online.close()
        client, self._client = self._client, None
        if client is None or self._loop is not asyncio.get_running_loop():
            return
        polls, self._polls = list(self._polls.values()), {}
        for task in polls:
            task.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        await client.close()

    def _asked(self, key: str, request: LLMRequest) -> _Asked:
        body = self._manners.arguments(self._endpoint.model, request)
        route = "/v1/chat/completions" if request.prompt is None else "/v1/completions"
        return _Asked(key=key, route=route, body=body, size=len(_line(key, route, body)))

    async def _submit(self, asked: list[_Asked]) -> list[SentBatch]:
        """Send one file and have the server begin with it; the same batch for every request in it."""
        route, bodies = asked[0].route, {a.key: a.body for a in asked}
        data = b"".join(_line(key, route, body) for key, body in bodies.items())
        client = self._connected()
        try:
            raw = await client.files.with_raw_response.create(file=("requests.jsonl", data), purpose="batch")
        except self._sdk.OpenAIError as error:
            self._fail(error, "take a file of requests", unpaid=True)
        file = parsed(raw.text).get("id")
        if not isinstance(file, str) or not file:
            raise TransientError(f"{self._endpoint.base_url} gave no id for a file of requests", unpaid=True)
        fault_point("batch uploaded")
        self._sent.update(bodies)
        async with self._turn:  # else one who asks for the same would find the batch written down, and begin it, too
            batch = await self._create(self._kept.begin(route=route, file=file, keys=bodies))
        return [batch] * len(asked)

    async def _create(self, batch: SentBatch) -> SentBatch:
        """Have the server begin. Where no answer came, it stays open whether it did, and ``_adopt`` finds out."""
        try:
            raw = await self._connected().batches.with_raw_response.create(
                input_file_id=batch.file,
                endpoint=batch.route,  # type: ignore[arg-type]
                completion_window="24h",
                metadata={"exegete": batch.name},
            )
        except self._sdk.APIStatusError as error:
            if error.status_code < 500:
                self._kept.drop(batch)  # refused, so there is nothing to collect
            self._fail(error, "begin a batch", unpaid=error.status_code < 500)
        except self._sdk.OpenAIError as error:
            self._fail(error, "begin a batch", unpaid=False)
        fault_point("batch begun")
        identity = parsed(raw.text).get("id")
        if not isinstance(identity, str) or not identity:
            raise TransientError(f"{self._endpoint.base_url} gave no id for a batch")
        return self._kept.begun(batch, identity)

    async def _adopt(self, batch: SentBatch) -> SentBatch:
        """Find the batch among the server's, or have the server begin with it now."""
        try:
            async for found in self._connected().batches.list(limit=100):
                if found.input_file_id == batch.file or (found.metadata or {}).get("exegete") == batch.name:
                    return self._kept.begun(batch, found.id)
        except self._sdk.OpenAIError as error:
            self._fail(error, "list its batches", unpaid=False)
        return await self._create(batch)

    async def _outcome(self, batch: SentBatch) -> Mapping[str, Mapping[str, Any]]:
        """Wait until a batch has ended, with all others who do; return the lines of requests that failed."""
        self._connected()
        task = self._polls.get(batch.name)
        if task is None or task.done():
            task = self._polls[batch.name] = asyncio.ensure_future(self._watch(batch))
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return await asyncio.shield(task)

    async def _watch(self, batch: SentBatch) -> Mapping[str, Mapping[str, Any]]:
        pause, most = self._poll
        async with self._turn:
            batch = self._kept.pending(batch.keys[0]) or batch
            if batch.batch is None:
                batch = await self._adopt(batch)
        assert batch.batch is not None
        missed = 0
        while True:
            try:
                raw = await self._connected().batches.with_raw_response.retrieve(batch.batch)
                data = parsed(raw.text)
                if data.get("status") in _ENDED:
                    return await self._collect(batch, data)
                missed = 0 if isinstance(data.get("status"), str) else missed + 1
            except self._sdk.OpenAIError as error:
                missed += 1
                if isinstance(error, self._sdk.NotFoundError):
                    self._kept.drop(batch)
                    raise TransientError(f"{self._endpoint.base_url} has lost the batch {batch.batch}") from None
                if missed >= _PATIENCE or not self._passes(error):
                    self._fail(error, "tell of a batch", unpaid=False)
            if missed >= _PATIENCE:
                raise TransientError(f"{self._endpoint.base_url} tells no status of the batch {batch.batch}")
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, most)

    async def _collect(self, batch: SentBatch, data: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Keep the lines of a batch that ended; return those of failures."""
        if data["status"] == "failed":
            self._kept.drop(batch)
            self._refused_whole(data)
        lines: dict[str, Mapping[str, Any]] = {}
        for name in ("error_file_id", "output_file_id"):
            file = data.get(name)
            if isinstance(file, str) and file:
                content = await self._connected().files.content(file)
                lines |= _lines(content.content)
        lost = {"error": {"code": data["status"], "message": f"the batch ended ({data['status']}) without an answer"}}
        lines = {key: lines.get(key, lost) for key in batch.keys}
        fault_point("batch ended")
        self._kept.end(batch, lines)
        return {key: line for key, line in lines.items() if mapping(line.get("response")).get("status_code") != 200}

    def _refused_whole(self, data: Mapping[str, Any]) -> NoReturn:
        """Raise for a batch that the server did not begin with: too much queued may pass, a wrong file may not."""
        found = mapping(data.get("errors")).get("data")
        first = mapping(found[0]) if isinstance(found, list) and found else {}
        code, message = str(first.get("code")), str(first.get("message") or "no reason given")
        text = self._clean(f"{self._endpoint.base_url} refuses a batch for {self._endpoint.model!r}: {message}")
        if "limit" in code:
            raise TransientError(text, retry_after=self._poll[1], throttled=True, unpaid=True)
        raise LLMError(text)

    def _read(self, key: str, request: LLMRequest, line: Mapping[str, Any]) -> LLMReply:
        """Read the line of one request."""
        response = mapping(line.get("response"))
        status, body = response.get("status_code"), mapping(response.get("body"))
        # Before the first file, nothing is known of how the server wants to be asked.
        sent = self._sent.pop(key, None) or Manners().arguments(self._endpoint.model, request)
        if status == 200:
            echoed = request.prompt if request.prompt_logprobs else None
            text = json.dumps(body)[:4096]
            if request.prompt is None:
                return chat_reply(body, text, self._clean)
            return completion_reply(body, text, self._clean, echoed)
        text = json.dumps(body or line.get("error") or "no answer", ensure_ascii=False)
        reason = self._clean(f"{self._endpoint.base_url} in a batch: {status or 'failed'}: {text}")
        if not isinstance(status, int) or status in (408, 409, 425, 429) or status >= 500:
            raise TransientError(reason, status=status if isinstance(status, int) else None, unpaid=True)
        if any(word in text.lower() for word in _FILTERED):
            return LLMReply(text="", finish="refused", prompt_tokens=0, completion_tokens=0)
        if self._manners.learn(status, text, sent):
            raise TransientError(reason, status=status, unpaid=True)
        if status in (401, 402, 403, 404):
            raise LLMError(reason)
        return LLMReply(text=None, finish="error", error=reason, prompt_tokens=0, completion_tokens=0)

    def _passes(self, error: OpenAIError) -> bool:
        """Tell whether a failure may pass: no answer, or a server that is busy or broken."""
        if not isinstance(error, self._sdk.APIStatusError):
            return True
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500

    def _fail(self, error: OpenAIError, what: str, *, unpaid: bool) -> NoReturn:
        where = self._endpoint.base_url
        status = error.status_code if isinstance(error, self._sdk.APIStatusError) else None
        if self._passes(error):
            detail = str(error.__cause__ or error) or type(error).__name__
            reason = self._clean(f"{where} does not {what}: {detail}")
            raise TransientError(reason, status=status, throttled=status in (429, 503), unpaid=unpaid) from None
        if status in (401, 403):
            hint = f"set {self._endpoint.key_variable} to a valid key"
        else:
            hint = "does it take batch files? else leave out llm.batch (--llm-batch)"
        raise LLMError(self._clean(f"{where} does not {what} ({status}: {error}); {hint}")) from None

    def _clean(self, text: str) -> str:
        return without_keys(text, self._key)

    def _connected(self) -> AsyncOpenAI:
        """Return the client of the running loop; nothing of an earlier loop can be used in this one."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client = self._sdk.AsyncOpenAI(
                api_key=self._key, base_url=self._endpoint.base_url, timeout=self._timeout, max_retries=0
            )
            if self._endpoint.key_variable != "OPENAI_API_KEY":
                self._client.organization = self._client.project = None  # never another service's
            self._loop, self._polls, self._turn = loop, {}, asyncio.Lock()
        return self._client


def _line(key: str, route: str, body: Mapping[str, Any]) -> bytes:
    return json.dumps({"custom_id": key, "method": "POST", "url": route, "body": body}).encode() + b"\n"


def _one_file(waiting: Sequence[_Asked]) -> list[int]:
    """Take those that can stand in one file with the first: one route, and not too many."""
    places: list[int] = []
    size = 0
    for i, asked in enumerate(waiting):
        if asked.route != waiting[0].route:
            continue
        size += asked.size
        if places and (size > MOST_BYTES or len(places) == MOST_REQUESTS):
            break
        places.append(i)
    return places


def _lines(content: bytes) -> dict[str, Mapping[str, Any]]:
    """Return the lines of a file by their ids; what is no such line is left out."""
    found = (parsed(text) for text in content.split(b"\n") if text.strip())
    return {line["custom_id"]: line for line in found if isinstance(line.get("custom_id"), str)}
