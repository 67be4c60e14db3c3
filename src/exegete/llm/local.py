"""Hugging Face models in this process: ``hf/MODEL``, a folder or a hub id; on the processor too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from exegete.errors import InputError, LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.gathering import Gathering
from exegete.llm.in_process import InProcess
from exegete.llm.tokenised import added_tokens, prompt_ids, spoken
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.llm.generating import Asked, BatchedModel

_QUIET = 0.005
"""Seconds without another request after which a batch starts: requests of one moment come one after the other."""
_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
"""What a model raises that cannot generate, or a device that is gone; out of memory is dealt with before."""


@final
class TransformersBackend(InProcess["BatchedModel"]):
    """A causal language model of transformers that answers in batches, in a thread of its own.

    A batch takes the request that has waited longest and those of the most similar length, at most ``rows``, and at
    most ``tokens`` of prompt and reply with padding. Replies do not depend on what else is in their batch, except for
    rounding. Sampling follows the temperature alone, from a stream of (seed, sample index, prompt); log probabilities
    are those at temperature 1. JSON schemas are not enforced. The model is loaded when first needed and kept until the
    backend is dropped; ``close`` ends what is under way.
    """

    service = "hf"

    def __init__(
        self, model: str, *, device: str = "auto", dtype: str = "auto", rows: int = 32, tokens: int = 1 << 16
    ) -> None:
        super().__init__(model)
        self._device, self._dtype = device, dtype
        self._rows, self._tokens = rows, tokens
        self._gathering: Gathering[Asked, LLMReply] = Gathering(self._work, self._choose, quiet=_QUIET, most=rows)

    async def send(self, request: LLMRequest) -> LLMReply:
        """Answer one request, with others that wait.

        An empty prompt, or one longer than the model reads, is a reply with ``finish="error"``. Raises LLMError when
        the model cannot be loaded, or cannot chat and is sent messages.
        """
        try:
            model, tokenizer = await self._ready()
        except InputError as error:
            raise LLMError(str(error)) from None
        ids = prompt_ids(tokenizer, request, self.name)
        if not ids or (model.positions is not None and len(ids) >= model.positions):
            room = "at least one" if not ids else f"at most {model.positions}, prompt and reply together"
            refusal = f"the prompt has {len(ids)} tokens; {self.name} takes {room}"
            return LLMReply(text=None, finish="error", error=refusal)
        return await self._gathering.put(self._asked(tokenizer, request, ids))

    async def check(self) -> None:
        """Load the model. Raises InputError, NotFoundError or CorruptError when that fails, as for subjects."""
        await self._ready()

    async def capabilities(self) -> Capabilities:
        """Return what the loaded model can do: everything but schemas, and chat only with a chat template."""
        _, tokenizer = await self._ready()
        return Capabilities(chat=bool(tokenizer.chat_template), completions=True, logprobs=True, prompt_logprobs=True)

    async def close(self) -> None:
        """End what is under way. The model stays loaded."""
        await self._gathering.close()

    def _read(self) -> tuple[BatchedModel, Any]:
        from exegete.llm.generating import BatchedModel
        from exegete.subjects.load import load_subject

        subject = load_subject(self._model, device=self._device, dtype=self._dtype)
        ends = _end_ids(subject.model, subject.tokenizer)
        model = BatchedModel(subject.model, subject.token_table(), ends, device=subject.device)
        _ = model.pads  # found out here, in this thread, and then known
        return model, subject.tokenizer

    def _asked(self, tokenizer: Any, request: LLMRequest, ids: list[int]) -> Asked:
        from exegete.llm.generating import Asked

        added = added_tokens(tokenizer, request, ids) if request.prompt_logprobs else 0
        return Asked(request=request, ids=tuple(ids), added=added)

    def _choose(self, waiting: Sequence[Asked]) -> list[int]:
        """Take the first, and those whose prompts are nearest to its in length, as many as fit one batch."""
        assert self._loaded is not None
        length = len(waiting[0].ids)
        places = sorted(range(len(waiting)), key=lambda i: (abs(len(waiting[i].ids) - length), i))
        if not self._loaded[0].batches:
            return [0]
        if not self._loaded[0].pads:
            places = [i for i in places if len(waiting[i].ids) == length]
        chosen, longest, most = [0], length, waiting[0].request.max_tokens
        for i in places[: self._rows]:
            if i == 0:
                continue
            longest, most = max(longest, len(waiting[i].ids)), max(most, waiting[i].request.max_tokens)
            if (longest + most) * (len(chosen) + 1) > self._tokens:
                break
            chosen.append(i)
        return chosen

    async def _work(self, asked: list[Asked]) -> list[LLMReply]:
        stopped = threading.Event()
        try:
            return await asyncio.to_thread(self._answer, asked, stopped)
        except asyncio.CancelledError:
            stopped.set()  # the thread ends at its next token
            raise

    def _answer(self, asked: list[Asked], stopped: threading.Event) -> list[LLMReply]:
        assert self._loaded is not None
        try:
            with self._running:  # a batch of an earlier loop may still be ending
                replies = self._loaded[0].replies(asked, stopped)
        except _BROKEN as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise LLMError(f"{self.name} cannot generate text: {text}") from error
        return [spoken(reply) if a.request.messages else reply for a, reply in zip(asked, replies, strict=True)]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a reply: those of the model's own settings, and the tokenizer's."""
    found = [model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    return [int(i) for part in found if part is not None for i in (part if isinstance(part, list) else [part])]
