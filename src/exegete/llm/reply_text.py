"""A reply as the text it is kept as, and back; the text may come from anybody."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from exegete.types import LLMReply, TokenLogprob

T = TypeVar("T")


def encode_reply(reply: LLMReply) -> str:
    """Return the JSON text that a whole reply (``finish`` "stop") is kept as; what it cost is left out."""
    return json.dumps(
        {
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "cached_tokens": reply.cached_tokens,
            "completion_tokens": reply.completion_tokens,
            "logprobs": _plain_logprobs(reply.logprobs),
            "prompt_logprobs": _plain_logprobs(reply.prompt_logprobs),
        },
        separators=(",", ":"),
    )


def decode_reply(text: str | bytes) -> LLMReply:
    """Return a kept reply, with ``cached`` set and a cost of 0.

    Raises ValueError, TypeError, KeyError or RecursionError when the text is no kept reply.
    """
    data = json.loads(text)
    return LLMReply(
        text=_of(str, data["text"]),
        finish="stop",
        prompt_tokens=_count(data["prompt_tokens"]),
        cached_tokens=_count(data["cached_tokens"]) or 0,
        completion_tokens=_count(data["completion_tokens"]),
        cost=0.0,
        cached=True,
        logprobs=_read_logprobs(data["logprobs"]),
        prompt_logprobs=_read_logprobs(data["prompt_logprobs"]),
    )


def try_decode_reply(text: str | bytes) -> LLMReply | None:
    """Return a kept reply, None when the text is none."""
    try:
        return decode_reply(text)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _plain_logprobs(tokens: tuple[TokenLogprob, ...] | None) -> list[Any] | None:
    return None if tokens is None else [[t.token, t.logprob, dict(t.alternatives)] for t in tokens]


def _read_logprobs(data: Any) -> tuple[TokenLogprob, ...] | None:
    return None if data is None else tuple(_read_logprob(*item) for item in _of(list, data))


def _read_logprob(token: Any, logprob: Any, alternatives: Any) -> TokenLogprob:
    return TokenLogprob(
        token=_of(str, token),
        logprob=None if logprob is None else _of(float, logprob),
        alternatives={name: _of(float, value) for name, value in _of(dict, alternatives).items()},
    )


def _of(kind: type[T], value: Any) -> T:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _count(value: Any) -> int | None:
    if value is not None and _of(int, value) < 0:
        raise ValueError(f"a number of tokens is at least 0, got {value}")
    return None if value is None else int(value)
