"""Who predicts the activation at every token of a window: a language model, or the executed rule.

Both see the window alone and answer for its shown tokens. What could not be read at a token is a status, never a 0.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal, final

import numpy as np

from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient, gather_all
from exegete.llm.protocol_simulation import (
    Form,
    Level,
    active_schema,
    parse_active,
    parse_all,
    parse_level,
    simulate_messages,
    simulate_prompt,
    simulate_token_messages,
)
from exegete.rules.execute import execute
from exegete.rules.language import Rule
from exegete.tokens import TokenTable
from exegete.types import Array, Explanation, JudgementStatus, LLMReply, LLMRequest, Windows

How = Literal["auto", "all_at_once", "token_by_token", "whole_window"]
ALTERNATIVES: Final = 20
"""Alternatives asked for per token: the most that common servers give."""
STAGE: Final = "simulation"
_FORMS: Final[Mapping[How, Form]] = {
    "all_at_once": "simulate_all",
    "token_by_token": "simulate_token",
    "whole_window": "simulate",
}
_REPAIR: Final = (
    "That cannot be read. Answer again with one JSON object and nothing else: "
    '{"active": [{"token": NUMBER, "level": LEVEL}, ...]}, each active token once, levels from 1 to 9.'
)

Answer = Level | JudgementStatus
"""What was said of a token, or why nothing was."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of some windows as they are shown, one after another.

    ``window`` and ``column`` [t] int64 say where each lies, ``texts`` what it shows, ``activation`` [t] float64 how
    strongly the latent fires there; ``windows`` is the number of windows. A token stands for those before it that show
    nothing, from column ``first`` [t] on: special ones, and the first bytes of a character that spans several tokens.
    Its activation is the strongest of theirs, special tokens aside.
    """

    window: Array
    column: Array
    first: Array
    texts: tuple[str, ...]
    activation: Array
    windows: int

    @classmethod
    def of(cls, windows: Windows, table: TokenTable) -> Tokens:
        """Return the tokens of windows, in order."""
        length = windows.tokens.shape[1]
        spans = [table.spans(ids) for ids in windows.tokens.tolist()]
        shows = np.array([[bool(text) for text in row] for row in spans], bool).reshape(-1, length)
        window, column = np.nonzero(shows)
        before = np.append(-1, column[:-1])
        first = np.where(np.append(-1, window[:-1]) == window, before, -1) + 1
        values = np.where(table.is_special[windows.tokens], 0.0, windows.activations)
        return cls(
            window=window,
            column=column,
            first=first,
            texts=tuple(text for row in spans for text in row if text),
            activation=_strongest(values, window, first, column),
            windows=len(windows),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def by_window(self) -> list[tuple[str, ...]]:
        """Return the texts of each window's tokens."""
        bounds = np.searchsorted(self.window, np.arange(self.windows + 1)).tolist()
        return [self.texts[a:b] for a, b in pairwise(bounds)]


def _strongest(values: Array, window: Array, first: Array, last: Array) -> Array:
    """Return the largest of values [windows, length] between two columns, the last included, float64 [t]."""
    flat, length = values.astype(np.float64).ravel(), values.shape[1]
    found: Array = flat[window * length + last]
    for at in np.flatnonzero(first < last).tolist():
        start = int(window[at]) * length
        found[at] = flat[start + int(first[at]) : start + int(last[at]) + 1].max()
    return found


class Simulator(ABC):
    """Says of every token how strongly the latent fires there, going by an explanation."""

    @property
    @abstractmethod
    def in_units(self) -> bool:
        """Whether it predicts activations, rather than levels on a scale of its own."""

    @abstractmethod
    def takes(self, explanation: Explanation) -> bool:
        """Return whether it can use an explanation."""

    @abstractmethod
    async def simulate(self, explanation: Explanation, windows: Windows, tokens: Tokens) -> list[Answer]:
        """Return an answer for each of the tokens of these windows."""


@final
class RuleSimulator(Simulator):
    """The executed rule, run on each window alone: the mean activation where its most precise clause matched in train.

    Where no clause matches the prediction is 0.
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    @property
    def in_units(self) -> bool:
        """Rules carry the activations they were fitted on."""
        return True

    def takes(self, explanation: Explanation) -> bool:
        """Explanations that carry a program."""
        return explanation.program is not None

    async def simulate(self, explanation: Explanation, windows: Windows, tokens: Tokens) -> list[Answer]:
        """Return the rule's prediction for each token."""
        shown = ~self._table.is_special[windows.tokens]
        rule = Rule.from_json(explanation.program)
        found = execute([rule], windows.tokens, self._table, shown, value="activation")[0]
        predicted = _strongest(found, tokens.window, tokens.first, tokens.column)
        return [Level(expected=x, values=(), probabilities=()) for x in predicted.tolist()]


@final
class LLMSimulator(Simulator):
    """A language model, asked in one of three forms; see ``protocol_simulation``.

    ``auto`` asks for all tokens at once where the model gives the log probabilities of prompts, else by windows.
    An answer for a whole window that cannot be read is asked for once more. Nothing is shared between requests; at most
    as many are under way at once as ``gate`` lets through.
    """

    def __init__(
        self, llm: LLMClient, how: How, can: Capabilities, *, gate: asyncio.Semaphore, max_tokens: int
    ) -> None:
        if how == "auto":
            how = "all_at_once" if can.prompt_logprobs else "whole_window"
        self._llm, self._form, self._gate, self._max_tokens = llm, _FORMS[how], gate, max_tokens
        self._logprobs = ALTERNATIVES if can.logprobs else 0

    @property
    def in_units(self) -> bool:
        """Levels are on a scale of their own."""
        return False

    @property
    def form(self) -> Form:
        """In which form it asks."""
        return self._form

    def takes(self, explanation: Explanation) -> bool:
        """Explanations with a text."""
        return explanation.text is not None

    async def simulate(self, explanation: Explanation, windows: Windows, tokens: Tokens) -> list[Answer]:
        """Ask about every window. Raises LLMError when the model cannot be used at all."""
        asked = [self._window(str(explanation.text), texts) for texts in tokens.by_window()]
        return [answer for answers in await gather_all(asked) for answer in answers]

    async def _window(self, explanation: str, texts: Sequence[str]) -> Sequence[Answer]:
        if not texts:
            return []
        if self._form == "simulate_token":
            asked = [self._token(explanation, texts[: i + 1]) for i in range(len(texts))]
            return await gather_all(asked)
        if self._form == "simulate_all":
            return await self._all(explanation, texts)
        return await self._whole(explanation, texts)

    async def _all(self, explanation: str, texts: Sequence[str]) -> Sequence[Answer]:
        request = LLMRequest(
            prompt=simulate_prompt(explanation, texts),
            max_tokens=1,
            logprobs=ALTERNATIVES,
            prompt_logprobs=True,
            stage=STAGE,
        )
        reply = await self._ask(request)
        found = parse_all(reply.prompt_logprobs, len(texts))
        if found is None:
            return [unread(reply)] * len(texts)
        return ["unparsed" if level is None else level for level in found]

    async def _token(self, explanation: str, texts: Sequence[str]) -> Answer:
        request = LLMRequest(
            messages=simulate_token_messages(explanation, texts),
            temperature=self._llm.temperature,
            max_tokens=self._max_tokens,
            logprobs=self._logprobs,
            stage=STAGE,
        )
        reply = await self._ask(request)
        level = None if reply.text is None else parse_level(reply.text, reply.logprobs)
        return unread(reply) if level is None else level

    async def _whole(self, explanation: str, texts: Sequence[str]) -> Sequence[Answer]:
        n = len(texts)
        request = LLMRequest(
            messages=simulate_messages(explanation, texts),
            temperature=self._llm.temperature,
            max_tokens=self._max_tokens,
            schema=active_schema(n),
            stage=STAGE,
        )
        reply = await self._ask(request)
        found = None if reply.text is None else parse_active(reply.text, n)
        if found is None and reply.finish in ("stop", "length"):
            repair: tuple[Mapping[str, str], ...] = (
                {"role": "assistant", "content": reply.text or "(no answer)"},
                {"role": "user", "content": _REPAIR},
            )
            reply = await self._ask(replace(request, messages=(*request.messages, *repair)))
            found = None if reply.text is None else parse_active(reply.text, n)
        if found is None:
            return [unread(reply)] * n
        return [Level(expected=float(x), values=(x,), probabilities=(1.0,)) for x in found]

    async def _ask(self, request: LLMRequest) -> LLMReply:
        async with self._gate:
            return await self._llm.reply(request)


def unread(reply: LLMReply) -> JudgementStatus:
    """Return the status of what a reply was to say, where nothing could be read from it."""
    if reply.finish == "error":
        return "failed"
    return "refused" if reply.finish == "refused" else "unparsed"
