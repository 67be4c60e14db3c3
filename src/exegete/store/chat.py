"""Conversations → token ids through a tokenizer's chat template, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from exegete.errors import InputError
from exegete.files import hash_json
from exegete.store.documents import Message, TextDocument
from exegete.types import Array

ASSISTANT = "assistant"
_SPEAKERS = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT}
"""Names that ShareGPT uses, and the roles they stand for."""
_ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "model", "ipython", "observation")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_BREAK = "\u2060"
"""WORD JOINER: invisible, and part of no special token."""
_TRIES = 3
_TEMPLATE_FAILS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as tokens: ``ids`` [n] int64; ``counted`` [n] bool or None for all; size in bytes of UTF-8."""

    ids: Array
    counted: Array | None
    n_bytes: int


@final
class ChatTemplate:
    """The chat template of a transformers fast tokenizer.

    Special tokens that the template writes become special tokens. Names of special tokens within a message (text, role
    or any other field) stay text: an invisible U+2060 is put after their first character before rendering. With
    ``counted`` = ``assistant`` the tokens of the assistant's messages count, end of turn included, header not: as the
    template marks them by ``{% generation %}``, or else by what each message adds to the rendered text.

    Raises InputError when the tokenizer has no template or is not a fast one.
    """

    def __init__(self, tokenizer: Any, counted: Literal["all", "assistant"]) -> None:
        if not tokenizer.is_fast:
            raise InputError("corpus.chat needs a fast tokenizer (tokenizer.json), which this one is not")
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                "the tokenizer has no chat template; set corpus.chat to none, or use a chat model's tokenizer"
            ) from None
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self._own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._own.no_truncation()
        self._own.no_padding()
        self._own.encode_special_tokens = False
        self._assistant = counted == ASSISTANT
        self._marked = _GENERATION.search(template) is not None
        added = tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._names = sorted((name for name in names if name), key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._normalised = [str(token) for token in added if token.special and token.normalized]
        self.hash = hash_json([template, dict(tokenizer.special_tokens_map)])

    def encode(self, document: TextDocument) -> Rendered:
        """Return the tokens of a conversation.

        Raises InputError naming the document when it is none, when the template refuses it, when special tokens in it
        cannot be kept text, or when what the assistant wrote cannot be told from the rendered text.
        """
        messages = [self._message(document.key, message) for message in document.messages or ()]
        if not messages:
            return Rendered(ids=np.zeros(0, np.int64), counted=None, n_bytes=0)
        text = self._render(document.key, messages)
        n_bytes = len(text.encode("utf-8", errors="replace"))
        if self._assistant and self._marked:
            found = self._apply(
                document.key, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = np.array(found["input_ids"], dtype=np.int64)
            return Rendered(ids=ids, counted=np.array(found["assistant_masks"], dtype=bool), n_bytes=n_bytes)
        encoded = self._own.encode(text, add_special_tokens=False)
        ids = np.array(encoded.ids, dtype=np.int64)
        if not self._assistant:
            return Rendered(ids=ids, counted=None, n_bytes=n_bytes)
        ends = np.array([stop for _, stop in encoded.offsets], dtype=np.int64)
        counted = np.zeros(len(ids), dtype=bool)
        for start, stop in self._spans(document.key, messages, text):
            counted |= (ends > start) & (ends <= stop)
        return Rendered(ids=ids, counted=counted, n_bytes=n_bytes)

    def _spans(self, key: str, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return where in the text each of the assistant's messages stands: after its header, to its end of turn."""
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            until = self._render(key, messages[: place + 1]) if place + 1 < len(messages) else text
            if place:
                header = self._render(key, messages[:place], add_generation_prompt=True)
            else:
                header = self._first_header(key, until)
            if not (until.startswith(header) and text.startswith(until)):
                raise InputError(
                    f"{key}: message {place + 1} changes what the chat template makes of others, so the assistant's "
                    "tokens cannot be told; use a template with generation markers, or set corpus.chat to all"
                )
            stop = len(until.rstrip())
            ended = any(until.endswith(name, 0, stop) for name in self._names)
            spans.append((len(header), max(stop, len(header)) if ended else len(until)))
        return spans

    def _first_header(self, key: str, until: str) -> str:
        """Return what stands before the content when the assistant speaks first: all up to its usual header."""
        others: list[Message] = [{"role": "user", "content": "x"}]
        asked = self._render(key, others, add_generation_prompt=True)
        usual = asked.removeprefix(self._render(key, others))
        return until[: until.find(usual) + len(usual)] if usual and usual in until else asked

    def _render(self, key: str, messages: Sequence[Message], **options: Any) -> str:
        return str(self._apply(key, messages, tokenize=False, **options))

    def _apply(self, key: str, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except (TemplateError, *_TEMPLATE_FAILS) as error:
            detail = " ".join(str(error).split())
            raise InputError(f"{key}: the chat template does not take this conversation: {detail}") from None

    def _message(self, key: str, message: Message) -> dict[str, Any]:
        """Return a message with a role and a content, in which no text is that of a special token."""
        if "role" not in message and {"from", "value"} <= set(message):
            speaker = message["from"]
            message = {"role": _SPEAKERS.get(str(speaker), speaker), "content": message["value"]}
        role = message.get("role")
        if not isinstance(role, str) or not isinstance(message.get("content", ""), str | list | None):
            raise InputError(
                f"{key}: a message has a role and a content (text), or from and value; got the fields "
                f"{', '.join(sorted(map(str, message))) or 'none'}"
            )
        if role not in _ROLES and any(role in name for name in self._names):
            raise InputError(f"{key}: the role {role!r} is part of a special token; use one of {', '.join(_ROLES)}")
        return {name: self._plain(key, value) for name, value in message.items()}

    def _plain(self, key: str, value: Any) -> Any:
        """Return a value in which every name of a special token is broken by an invisible character."""
        if isinstance(value, Mapping):
            return {self._plain(key, name): self._plain(key, inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._plain(key, inner) for inner in value]
        if not isinstance(value, str):
            return value
        text = value.encode("utf-8", errors="replace").decode("utf-8")
        for _ in range(_TRIES):  # names may overlap
            text = self._pattern.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)
        normaliser = self._own.normalizer
        seen = normaliser.normalize_str(text) if normaliser is not None and self._normalised else ""
        if self._pattern.search(text) or any(name in seen for name in self._normalised):
            raise InputError(
                f"{key}: a message holds the text of a special token that cannot be kept apart from the token; leave "
                "this conversation out"
            )
        return text
