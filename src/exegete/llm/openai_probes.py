"""What a server does, found out by asking: several take logprobs or a schema, answer 200, and do neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exegete.errors import BudgetError, LLMError
from exegete.llm.backend import Capabilities, Send
from exegete.llm.openai_manners import FORMS, Manners
from exegete.types import LLMReply, LLMRequest, TokenLogprob

STAGE = "probe"
ALTERNATIVES = 20
"""Alternatives asked for per token: as many as by judges, since a server may give some and refuse more."""
THINKING = 500
"""Tokens of a reply that has to hold reasoning and an answer."""
_FIELD = "exegete"
_SCHEMA = {
    "type": "object",
    "properties": {_FIELD: {"type": "string", "enum": ["ready"]}},
    "required": [_FIELD],
    "additionalProperties": False,
}


async def probe(send: Send, manners: Manners) -> Capabilities:
    """Ask a chat, a schema and a completion; a few short requests.

    ``manners`` learns how the server takes schemas. Raises LLMError where neither chats nor completions are answered.
    """
    greeting = ({"role": "user", "content": "Say good morning."},)
    failure: LLMError | None = None
    chat: LLMReply | None = None
    try:
        asked = LLMRequest(messages=greeting, max_tokens=8, logprobs=ALTERNATIVES, stage=STAGE)
        chat = await send(asked)
        if chat.finish == "length" and not chat.text:  # all of it was reasoning, which is left out with its tokens
            chat = await send(replace(asked, max_tokens=THINKING))
    except BudgetError:
        raise
    except LLMError as error:
        failure = error
    schema = _answered(chat) and await _holds_to_schema(send, manners, LLMRequest(
        messages=greeting, max_tokens=200, schema=_SCHEMA, stage=STAGE))  # fmt: skip
    completion = await _completion(send)
    if not _answered(chat) and not _answered(completion):
        raise failure or LLMError(f"the server answers neither chats nor completions: {chat and chat.error}")
    generated = chat if chat is not None and _answered(chat) else completion
    return Capabilities(
        chat=_answered(chat),
        completions=_answered(completion),
        logprobs=generated is not None and _chosen_among(generated.logprobs),
        prompt_logprobs=completion is not None and _given(completion.prompt_logprobs),
        schema=schema,
    )


async def _holds_to_schema(send: Send, manners: Manners, request: LLMRequest) -> bool:
    """Return whether an answer has a form that no one asked for in words; try the forms a schema can be given in."""
    for form in FORMS[:-1]:
        if manners.form != form:
            continue  # the server refused it
        try:
            reply = await send(request)
        except BudgetError:
            raise
        except LLMError:
            reply = LLMReply(text="", finish="refused")
        if reply.text is None:  # the server failed, which says nothing of schemas
            return False
        text = reply.text.strip()
        if text.startswith("{") and f'"{_FIELD}"' in text and manners.form != FORMS[-1]:
            return True
        manners.ignored(form)
    return False


async def _completion(send: Send) -> LLMReply | None:
    prompt = "Good morning, good day and good"
    try:
        return await send(LLMRequest(prompt=prompt, max_tokens=1, logprobs=2, prompt_logprobs=True, stage=STAGE))
    except BudgetError:
        raise
    except LLMError:
        return None


def _answered(reply: LLMReply | None) -> bool:
    return reply is not None and reply.finish != "error"


def _chosen_among(tokens: Sequence[TokenLogprob] | None) -> bool:
    """Return whether any token came with those it was chosen over: its own probability alone weighs nothing."""
    return tokens is not None and any(len(token.alternatives) > 1 for token in tokens)


def _given(tokens: Sequence[TokenLogprob] | None) -> bool:
    return tokens is not None and any(token.logprob is not None for token in tokens)
