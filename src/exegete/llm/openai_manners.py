"""How one OpenAI-compatible server wants to be asked: learnt from its refusals, kept for the client's life."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from exegete.types import LLMRequest

Form = Literal["json_schema", "json_object", "none"]
FORMS: tuple[Form, ...] = ("json_schema", "json_object", "none")
"""How a schema can be given, the commonest first."""
FEWER = 5
"""Alternatives per token that are asked for where more are refused: several services give no more."""
_OPTIONAL = ("temperature", "seed", "top_logprobs", "logprobs", "stop", "echo")
_log = logging.getLogger(__name__)


@final
@dataclass(slots=True)
class Manners:
    """What a server understands, as far as is known.

    ``form`` is how it takes a JSON schema: as OpenAI does, as llama.cpp does (an object with its schema), or not at
    all; ``proved`` says that a request in this form was answered once. ``dropped`` holds what is left out, of chats
    and of completions; ``most_alternatives`` is FEWER where more of a token's alternatives were refused.
    """

    dropped: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})
    completion_limit: bool = False
    most_alternatives: int | None = None
    form: Form = "json_schema"
    proved: bool = False

    def arguments(self, model: str, request: LLMRequest) -> dict[str, Any]:
        """Return the body of a request, put as this server wants it."""
        limit = "max_completion_tokens" if self.completion_limit and request.prompt is None else "max_tokens"
        body: dict[str, Any] = {"model": model, "temperature": request.temperature, limit: request.max_tokens}
        if request.seed is not None:
            body["seed"] = request.seed + request.sample_index
        if request.stop:
            body["stop"] = list(request.stop)
        if request.schema is not None and self.form != "none":
            body["response_format"] = self._format(request.schema)
        if request.prompt is None:
            body["messages"] = [dict(m) for m in request.messages]
            if request.logprobs:
                body |= {"logprobs": True, "top_logprobs": self._alternatives(request.logprobs)}
        else:
            body["prompt"] = request.prompt
            if request.logprobs or request.prompt_logprobs:
                body["logprobs"] = max(1, self._alternatives(request.logprobs))
            if request.prompt_logprobs:
                body["echo"] = True
        for name in self.dropped[request.prompt is None]:
            body.pop(name, None)
        return body

    def _alternatives(self, wanted: int) -> int:
        return wanted if self.most_alternatives is None else min(wanted, self.most_alternatives)

    def _format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if self.form == "json_schema":
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
        return {"type": "json_object", "schema": dict(schema)}

    def learn(self, status: int, body: str, sent: Mapping[str, Any]) -> bool:
        """Return whether the same request can be put in another way than it was sent."""
        if status in (400, 422) and "max_tokens" in sent and "max_completion_tokens" in body:
            self.completion_limit = True
            return True
        if status in (400, 422) and "response_format" in sent and ("response_format" in body or "schema" in body):
            return self._other_form(sent)
        # Of a completion, the number of alternatives is what "logprobs" says.
        if status in (400, 422) and "logprobs" in body and _asked_alternatives(sent) > FEWER:
            self.most_alternatives = FEWER
            return True
        for name in _OPTIONAL:
            # OpenAI says 403 of a model that gives no log probabilities.
            if name in sent and name in body and (status in (400, 422) or (status == 403 and "logprobs" in name)):
                self._drop("messages" in sent, name)
                return True
        # llama.cpp answers a form it does not know with a bare 500; once a form was answered, a 500 says nothing of it.
        if "response_format" in sent and not self.proved and status in (400, 422, 500):
            return self._other_form(sent)
        return False

    def _drop(self, chat: bool, name: str) -> None:
        # Of many requests under way, the first refusal is told.
        if name not in self.dropped[chat]:
            _log.warning("the server does not take %s; going on without", name)
        self.dropped[chat] |= {"logprobs", "top_logprobs"} if name == "logprobs" else {name}

    def _other_form(self, sent: Mapping[str, Any]) -> bool:
        # Of many requests under way in one form, the first refusal moves on; the others find the form changed.
        if sent["response_format"]["type"] == self.form:
            self.form, self.proved = _next(self.form), False
        return True

    def answered(self, sent: Mapping[str, Any]) -> None:
        """Note that a request was answered."""
        if not self.proved and "response_format" in sent and sent["response_format"]["type"] == self.form:
            self.proved = True

    def ignored(self, form: Form) -> None:
        """Note that a server took a form of schema and did not hold to it."""
        if self.form == form:
            self.form, self.proved = _next(form), False


def _asked_alternatives(sent: Mapping[str, Any]) -> int:
    return int(sent.get("top_logprobs", 0) if "messages" in sent else sent.get("logprobs", 0))


def _next(form: Form) -> Form:
    return FORMS[min(FORMS.index(form) + 1, len(FORMS) - 1)]
