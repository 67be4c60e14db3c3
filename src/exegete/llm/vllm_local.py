"""vLLM in this process: ``vllm/MODEL``, with the optional part ``vllm``.

Written against the documented offline interface of vLLM 0.11 and later (``LLM.generate`` with token prompts and a
``SamplingParams`` per prompt, ``StructuredOutputsParams``): https://docs.vllm.ai. Its log probabilities are those at
temperature 1, as vLLM gives them by default.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from exegete.errors import LLMError, MissingExtraError
from exegete.llm.backend import Capabilities
from exegete.llm.gathering import Gathering
from exegete.llm.in_process import InProcess
from exegete.llm.tokenised import added_tokens, draw_seed, prompt_ids, spoken
from exegete.types import LLMReply, LLMRequest, TokenLogprob

_QUIET = 0.02
"""Seconds without another request after which those that wait go to the engine."""
_LOGPROBS = 20
"""Most alternatives per token that the engine is asked to be ready for."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    request: LLMRequest
    ids: tuple[int, ...]
    added: int


@final
class VLLMBackend(InProcess[Any]):
    """A model in vLLM's engine, which schedules by itself all requests that wait together, at most ``most`` a call.

    Each has its own sampling parameters; JSON schemas are enforced. The engine starts when first needed and stays
    until the backend is dropped. ``options`` go to ``vllm.LLM``. Raises MissingExtraError where vLLM is not installed.
    """

    service = "vllm"

    def __init__(self, model: str, *, most: int = 4096, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(model)
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError(self.name, "vllm")
        self._options = dict(options or {})
        self._gathering: Gathering[_Asked, LLMReply] = Gathering(
            self._work, lambda waiting: range(min(most, len(waiting))), quiet=_QUIET, most=most
        )

    async def send(self, request: LLMRequest) -> LLMReply:
        """Answer one request, with others that wait.

        What the engine refuses is a reply with ``finish="error"``. Raises LLMError when the engine does not start, or
        the model cannot chat and is sent messages.
        """
        _, tokenizer = await self._ready()
        ids = prompt_ids(tokenizer, request, self.name)
        added = added_tokens(tokenizer, request, ids) if request.prompt_logprobs else 0
        return await self._gathering.put(_Asked(request=request, ids=tuple(ids), added=added))

    async def check(self) -> None:
        """Start the engine. Raises LLMError when it does not."""
        await self._ready()

    async def capabilities(self) -> Capabilities:
        """Return what the engine does with this model: everything, but chat only with a chat template."""
        _, tokenizer = await self._ready()
        return Capabilities(
            chat=bool(tokenizer.chat_template), completions=True, logprobs=True, prompt_logprobs=True, schema=True
        )

    async def close(self) -> None:
        """Forget what waits. The engine stays, and ends the call that it is in."""
        await self._gathering.close()

    def _read(self) -> tuple[Any, Any]:
        vllm = importlib.import_module("vllm")
        # The first prompts of all judgements are the same, and their keys and values need to be computed but once.
        options = {"enable_prefix_caching": True, "max_logprobs": _LOGPROBS, "seed": 0, **self._options}
        try:
            engine = vllm.LLM(model=self._model, **options)
            return engine, engine.get_tokenizer()
        except Exception as error:  # whatever the engine cannot start for
            raise LLMError(f"vLLM cannot start {self._model!r}: {_short(error)}") from error

    async def _work(self, asked: list[_Asked]) -> list[LLMReply]:
        return await asyncio.to_thread(self._answer, asked)

    def _answer(self, asked: list[_Asked]) -> list[LLMReply]:
        assert self._loaded is not None
        with self._running:
            return self._generate(self._loaded[0], asked)

    def _generate(self, engine: Any, asked: Sequence[_Asked]) -> list[LLMReply]:
        """Answer together; when the engine refuses, in halves, until the request it refuses stands alone."""
        try:
            outputs = engine.generate(
                [{"prompt_token_ids": list(a.ids)} for a in asked],
                [_parameters(a.request) for a in asked],
                use_tqdm=False,
            )
        except (ValueError, TypeError) as error:
            if len(asked) == 1:
                return [LLMReply(text=None, finish="error", error=_short(error))]
            half = len(asked) // 2
            return [*self._generate(engine, asked[:half]), *self._generate(engine, asked[half:])]
        except Exception as error:  # the engine is gone
            raise LLMError(f"{self.name} cannot generate text: {_short(error)}") from error
        return [_reply(a, output) for a, output in zip(asked, outputs, strict=True)]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parameters(request: LLMRequest) -> Any:
    vllm = importlib.import_module("vllm")
    sampling = importlib.import_module("vllm.sampling_params")
    schema = request.schema
    return vllm.SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=draw_seed(request) if request.temperature > 0 else None,
        stop=list(request.stop) or None,
        logprobs=min(request.logprobs, _LOGPROBS) or None,
        prompt_logprobs=min(request.logprobs, _LOGPROBS) if request.prompt_logprobs else None,
        structured_outputs=None if schema is None else sampling.StructuredOutputsParams(json=dict(schema)),
    )


def _reply(asked: _Asked, output: Any) -> LLMReply:
    made = output.outputs[0]
    if made.finish_reason not in ("stop", "length"):
        return LLMReply(text=None, finish="error", error=f"vLLM broke off: {made.finish_reason}")
    logprobs = prompt = None
    count = asked.request.logprobs
    if made.logprobs is not None:
        logprobs = tuple(_token(i, found, count) for i, found in zip(made.token_ids, made.logprobs, strict=True))
    if output.prompt_logprobs is not None:
        tokens = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        prompt = tuple(_token(i, found, count) for i, found in tokens)[asked.added :]
    reply = LLMReply(
        text=made.text,
        finish=made.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
        completion_tokens=len(made.token_ids),
        cost=0.0,
        logprobs=logprobs,
        prompt_logprobs=prompt,
    )
    return spoken(reply) if asked.request.messages else reply


def _token(token: int, found: Mapping[int, Any] | None, count: int) -> TokenLogprob:
    """Read one token from what vLLM says of its place: the likeliest tokens, and this one, by id."""
    if not found or token not in found:
        return TokenLogprob(token="", logprob=None)
    alternatives: dict[str, float] = {}
    for one in sorted(found.values(), key=lambda one: one.rank):
        if one.rank <= count:
            alternatives.setdefault(one.decoded_token or "", float(one.logprob))
    return TokenLogprob(
        token=found[token].decoded_token or "", logprob=float(found[token].logprob), alternatives=alternatives
    )
