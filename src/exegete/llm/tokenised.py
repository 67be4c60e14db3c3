"""Requests as the token ids that a model of this process gets: through its chat template, or as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from exegete.errors import LLMError
from exegete.files import hash_json
from exegete.llm.openai_reading import without_reasoning
from exegete.streams import stream
from exegete.types import LLMReply, LLMRequest


def folder_identity(model: str) -> str | None:
    """Return what tells a model's folder from others by its files' names, sizes and times; None for a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    files = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return "folder/" + hash_json([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])


def prompt_ids(tokenizer: Any, request: LLMRequest, name: str) -> list[int]:
    """Return the token ids of a request's prompt, special tokens included as the tokenizer or its template sets them.

    Raises LLMError for messages when the tokenizer has no chat template, or one that refuses them.
    """
    if request.prompt is not None:
        return [int(i) for i in tokenizer(request.prompt)["input_ids"]]
    if not tokenizer.chat_template:
        raise LLMError(
            f"{name} has no chat template, so it cannot be asked in messages; name a model tuned for chat, or save a "
            f"chat_template with its tokenizer"
        )
    return _chat_ids(tokenizer, request.messages, name)


def _chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], name: str) -> list[int]:
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        folded = _without_system(messages)
        if len(folded) < len(messages):
            return _chat_ids(tokenizer, folded, name)
        raise LLMError(f"the chat template of {name} refuses the messages: {' '.join(str(error).split())}") from None
    return [int(i) for i in encoded["input_ids"]]


def _without_system(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """Return the messages with the system's words before the first user's: some templates know no system role."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def added_tokens(tokenizer: Any, request: LLMRequest, ids: Sequence[int]) -> int:
    """Return how many tokens the tokenizer put before those of the prompt itself, such as BOS."""
    if request.prompt is None:
        return 0
    plain = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
    added = len(ids) - len(plain)
    return added if added > 0 and list(ids[added:]) == list(plain) else 0


def draw_seed(request: LLMRequest) -> int:
    """Return the seed of a request's own random stream, in 63 bits.

    It depends on the request's seed (0 where it has none), its sample index and its text, so that requests of one seed
    do not share their luck, and the same request draws the same whatever else is under way.
    """
    asked = [list(map(dict, request.messages)), request.prompt]
    return int(stream(request.seed or 0, "reply", request.sample_index, hash_json(asked)).integers(1 << 63))


def spoken(reply: LLMReply) -> LLMReply:
    """Return the reply to a chat without reasoning and outer spaces; log probabilities are those of what is left."""
    if reply.text is None:
        return reply
    text = without_reasoning(reply.text)
    tokens = reply.logprobs
    if tokens is not None and text != reply.text.strip():
        said = "".join(token.token for token in tokens)
        start = said.rfind(text) if text else -1
        ends = accumulate(len(token.token) for token in tokens)
        kept = [token for token, end in zip(tokens, ends, strict=True) if end > start]
        tokens = tuple(kept) if start >= 0 else None
    return replace(reply, text=text, logprobs=tokens)
