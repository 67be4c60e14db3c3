"""Calls to language models and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from exegete.types.common import require


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMRequest:
    """One call to a language model; nothing is shared between requests.

    Either ``messages``, ``{"role", "content"}`` pairs of a chat, or ``prompt``, the text to complete. ``sample_index``
    tells repeated draws of one prompt apart; ``schema`` is a JSON schema the reply should follow where the server can
    enforce it; ``logprobs`` is the number of alternatives wanted per generated token, 0 for none; ``prompt_logprobs``
    asks for the log probability of every token of ``prompt``. ``stage`` says what it is for, on the ledger only.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None
    temperature: float = 0.0
    max_tokens: int = 500
    seed: int | None = None
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    logprobs: int = 0
    prompt_logprobs: bool = False
    stage: str = ""

    def __post_init__(self) -> None:
        require(bool(self.messages) != (self.prompt is not None), "a request holds either messages or a prompt")
        require(self.prompt is not None or not self.prompt_logprobs, "prompt_logprobs are those of a prompt")
        require(self.max_tokens > 0, f"max_tokens is at least 1, got {self.max_tokens}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of a reply or a prompt: its text, log probability, and the likeliest alternatives with theirs.

    ``logprob`` is None where the server gave none, as for the first token of a prompt; it is never 0 instead.
    """

    token: str
    logprob: float | None
    alternatives: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMReply:
    """What came back: ``text`` or None with ``error``; token counts; ``cost`` in dollars where known.

    ``finish`` is ``stop``, ``length``, ``refused`` or ``error``. ``prompt_tokens`` and ``completion_tokens`` are None
    where the server did not count; ``cached_tokens`` of the prompt's tokens came from the server's own prefix cache.
    ``logprobs`` are those of the generated tokens, ``prompt_logprobs`` those of the prompt's; None where the server
    gave none. ``cached`` says that the reply was kept from before and cost nothing.
    """

    text: str | None
    finish: Literal["stop", "length", "refused", "error"]
    error: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int | None = None
    cost: float | None = None
    cached: bool = False
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def __post_init__(self) -> None:
        require((self.text is None) == (self.finish == "error"), "a reply has a text exactly when it is no error")
