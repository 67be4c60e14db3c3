"""What OpenAI-compatible servers answer, read without trusting it to be what was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Literal

from exegete.llm.backend import TransientError
from exegete.types import LLMReply, TokenLogprob

Clean = Callable[[str], str]
Finish = Literal["stop", "length", "refused"]


def parsed(body: bytes | str) -> Mapping[str, Any]:
    """Return the JSON object of a body; an empty one for anything else."""
    try:
        return mapping(json.loads(body))
    except (ValueError, RecursionError):
        return {}


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a value that is a JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def error_in(data: Mapping[str, Any]) -> tuple[int | None, str] | None:
    """Return status and message of an error that came in place of an answer; None where there is none.

    OpenRouter sends such a body with status 200 when the server behind it fails.
    """
    error = data.get("error")
    if not error or data.get("choices"):
        return None
    detail = mapping(error)
    code = detail.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else None
    return status, str(detail.get("message") or error)


def model_names(body: bytes | str) -> tuple[str, ...]:
    """Return the ids of a list of models; none for any other body."""
    data = parsed(body).get("data")
    return tuple(str(mapping(m).get("id")) for m in data) if isinstance(data, list) else ()


def chat_reply(data: Mapping[str, Any], body: str, clean: Clean) -> LLMReply:
    """Read a chat completion. Raises TransientError where the body is none."""
    choice = _choice(data, body, clean)
    message = mapping(choice.get("message"))
    content, refusal = _content(message.get("content")), message.get("refusal")
    finish = _finish(choice)
    if finish == "refused" or (refusal and not content):
        finish, content = "refused", content or str(refusal or "")
    tokens = _chat_tokens(choice.get("logprobs"))
    text, tokens = _answer(_sound(content or ""), tokens)
    if content is None and finish == "stop":
        return LLMReply(text=None, finish="error", error="the answer has no text", **_usage(data))
    return LLMReply(text=text, finish=finish, logprobs=tokens, **_usage(data))


def completion_reply(data: Mapping[str, Any], body: str, clean: Clean, echoed: str | None = None) -> LLMReply:
    """Read a completion; ``echoed`` is the prompt that should stand before it. Raises TransientError where it is none.

    Without log probabilities of the prompt's tokens, ``prompt_logprobs`` is None; that a server took no notice of
    ``echo`` shows by the text, which then does not begin with the prompt.
    """
    choice = _choice(data, body, clean)
    text = choice.get("text")
    if not isinstance(text, str):
        return LLMReply(text=None, finish="error", error="the answer has no text", **_usage(data))
    tokens, starts = _completion_tokens(choice.get("logprobs"))
    prompt: tuple[TokenLogprob, ...] | None = None
    if echoed is not None and text.startswith(echoed):
        text = text[len(echoed) :]
        if tokens is not None:
            known = sum(start < len(echoed) for start in starts)
            prompt, tokens = tokens[:known] or None, tokens[known:] or None
    return LLMReply(text=_sound(text), finish=_finish(choice), logprobs=tokens, prompt_logprobs=prompt, **_usage(data))


def without_reasoning(text: str) -> str:
    """Return a reply without the reasoning that some models write before it, between ``<think>`` and ``</think>``.

    Some chat templates open the tag themselves, so that the reply holds only the closing one. Reasoning that was cut
    off before it ended leaves nothing. Tags later in the text are part of the answer.
    """
    return _after_reasoning(text)[0]


def _after_reasoning(text: str) -> tuple[str, int]:
    """Return the answer, and the place in the text from which it was taken."""
    for tag in ("think", "thinking"):
        opening, closing = f"<{tag}>", f"</{tag}>"
        head, closed, answer = text.partition(closing)
        if head.lstrip().startswith(opening) or (closed and opening not in head):
            return answer.strip(), len(head) + len(closed)
    return text.strip(), 0


def _answer(text: str, tokens: tuple[TokenLogprob, ...] | None) -> tuple[str, tuple[TokenLogprob, ...] | None]:
    """Leave reasoning out of a text and of its tokens; no tokens where it is not clear which are the answer's."""
    answer, start = _after_reasoning(text)
    if not start or tokens is None:
        return answer, tokens
    said = "".join(token.token for token in tokens)
    if said.strip() == answer:
        return answer, tokens
    if said != text:
        return answer, None
    ends = accumulate(len(token.token) for token in tokens)
    return answer, tuple(token for token, end in zip(tokens, ends, strict=True) if end > start) or None


def _choice(data: Mapping[str, Any], body: str, clean: Clean) -> Mapping[str, Any]:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        detail = mapping(data.get("error")).get("message") or body or "an empty body"
        raise TransientError(clean(f"the answer is no completion: {detail}"))
    choice = mapping(choices[0])
    if choice.get("finish_reason") == "error":
        detail = mapping(choice.get("error")).get("message") or "the server gave no reason"
        raise TransientError(clean(f"the answer broke off: {detail}"))
    return choice


def _finish(choice: Mapping[str, Any]) -> Finish:
    reason = choice.get("finish_reason")
    return "length" if reason == "length" else "refused" if reason == "content_filter" else "stop"


def _content(value: Any) -> str | None:
    if isinstance(value, list):  # some servers answer in parts
        texts = [part["text"] for part in map(mapping, value) if isinstance(part.get("text"), str)]
        return "".join(texts)
    return value if isinstance(value, str) else None


def _sound(text: str) -> str:
    """Return text that can be sent on: a lone half of a surrogate pair, which JSON can carry, cannot be encoded."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _usage(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the server counted; None where it did not."""
    usage = mapping(data.get("usage"))
    cost = _number(usage.get("cost"))
    return {
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "cached_tokens": _count(mapping(usage.get("prompt_tokens_details")).get("cached_tokens")) or 0,
        "completion_tokens": _count(usage.get("completion_tokens")),
        "cost": cost if cost is not None and cost >= 0 else None,
    }


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _chat_tokens(value: Any) -> tuple[TokenLogprob, ...] | None:
    tokens = mapping(value).get("content")
    if not isinstance(tokens, list) or not tokens:
        return None
    return tuple(_chat_token(mapping(token)) for token in tokens)


def _chat_token(token: Mapping[str, Any]) -> TokenLogprob:
    listed = token.get("top_logprobs")
    found = map(mapping, listed if isinstance(listed, list) else [])
    alternatives = {_sound(str(a.get("token"))): _number(a.get("logprob")) for a in found}
    return TokenLogprob(
        token=_sound(str(token.get("token") or "")),
        logprob=_number(token.get("logprob")),
        alternatives={text: value for text, value in alternatives.items() if value is not None},
    )


def _completion_tokens(value: Any) -> tuple[tuple[TokenLogprob, ...] | None, list[int]]:
    """Return the tokens of a completion and where each starts in its text."""
    given = mapping(value)
    tokens = given.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None, []
    texts = [_sound(str(token)) for token in tokens]
    logprobs, tops = (_padded(given.get(name), len(texts)) for name in ("token_logprobs", "top_logprobs"))
    starts = given.get("text_offset")
    if not isinstance(starts, list) or len(starts) != len(texts) or not all(isinstance(s, int) for s in starts):
        starts = [0]
        for text in texts[:-1]:
            starts.append(starts[-1] + len(text))
    read = []
    for text, logprob, top in zip(texts, logprobs, tops, strict=True):
        alternatives = {_sound(str(k)): _number(v) for k, v in mapping(top).items()}
        read.append(
            TokenLogprob(
                token=text,
                logprob=_number(logprob),
                alternatives={k: v for k, v in alternatives.items() if v is not None},
            )
        )
    return tuple(read), [int(start) for start in starts]


def _padded(value: Any, n: int) -> list[Any]:
    return value if isinstance(value, list) and len(value) == n else [None] * n
