"""Who answers detection and fuzzing: a language model, or the executed rule.

Both see the window alone. For a rule that means its state (nesting, quotes, line position) is counted from the
window's start, as a language model reading the same excerpt would have to.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.examples.render import render_marked, render_plain
from exegete.llm.client import LLMClient
from exegete.llm.protocol import Kind, judge_messages
from exegete.rules.execute import execute
from exegete.rules.language import Rule
from exegete.tokens import TokenTable
from exegete.types import Array, Explanation, JudgementStatus, LLMReply, LLMRequest

_LIST = re.compile(r"\[([^\[\]]*)\]")
_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_REPAIR = (
    "That is not a list of {n} verdicts. Answer again with one JSON list of exactly {n} numbers, 0 or 1, one for each "
    "excerpt in order, and nothing else."
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One window to be judged: ``tokens`` [window] uint32 and, for fuzzing, ``marks`` [window] bool."""

    tokens: Array
    marks: Array | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge said of one item; ``prediction`` is None unless ``status`` is ``ok``."""

    prediction: bool | None
    probability: float | None = None
    status: JudgementStatus = "ok"


class Judge(ABC):
    """Says of every item whether an explanation fits it. What it could not say is a status, never a guess."""

    @abstractmethod
    async def verdicts(self, explanation: Explanation, items: Sequence[Item]) -> list[Verdict]:
        """Judge items by one explanation, which has a text; one verdict per item, in order."""

    async def panel(self, explanations: Sequence[Explanation], items: Sequence[Item]) -> list[list[Verdict]]:
        """Judge the same items by several explanations; one list of verdicts per explanation."""
        return list(await asyncio.gather(*(self.verdicts(e, items) for e in explanations)))

    @abstractmethod
    def takes(self, explanation: Explanation) -> bool:
        """Return whether this judge can use an explanation."""


@final
class LLMJudge(Judge):
    """A language model that answers a few items per request with a JSON list of 0 and 1.

    A reply that is no list of the right length for the batch *sent* (the last one may be short) is asked for once more
    with a clarifying message; after that the whole batch is ``unparsed``. Nothing is shared between requests. At most
    ``limit`` are under way at once.
    """

    def __init__(
        self, llm: LLMClient, kind: Kind, table: TokenTable, *, per_request: int = 5, gate: asyncio.Semaphore
    ) -> None:
        if per_request < 1:
            raise InputError(f"a request holds at least one example, got {per_request}")
        self._llm, self._kind, self._table = llm, kind, table
        self._per_request, self._gate = per_request, gate

    def takes(self, explanation: Explanation) -> bool:
        """Any explanation with a text."""
        return explanation.text is not None

    async def verdicts(self, explanation: Explanation, items: Sequence[Item]) -> list[Verdict]:
        """Judge items a few at a time. Raises LLMError when the server cannot be used at all."""
        batches = [items[at : at + self._per_request] for at in range(0, len(items), self._per_request)]
        answers = await asyncio.gather(*(self._batch(str(explanation.text), batch) for batch in batches))
        return [verdict for answer in answers for verdict in answer]

    async def _batch(self, explanation: str, items: Sequence[Item]) -> list[Verdict]:
        asked = judge_messages(self._kind, explanation, [self._render(item) for item in items])
        reply = await self._ask(asked)
        found = None if reply.text is None else parse_verdicts(reply.text, len(items))
        if found is None and reply.finish in ("stop", "length"):
            repair = _REPAIR.format(n=len(items))
            said = reply.text or "(no answer)"  # several chat templates refuse an empty message
            reply = await self._ask(
                (*asked, {"role": "assistant", "content": said}, {"role": "user", "content": repair})
            )
            found = None if reply.text is None else parse_verdicts(reply.text, len(items))
        status = _status(reply, found)
        answers = found if found is not None and status == "ok" else [None] * len(items)
        return [Verdict(prediction=answer, status=status) for answer in answers]

    async def _ask(self, messages: tuple[dict[str, str], ...]) -> LLMReply:
        async with self._gate:
            return await self._llm.reply(LLMRequest(messages=messages, temperature=self._llm.temperature))

    def _render(self, item: Item) -> str:
        if item.marks is None:
            return render_plain(item.tokens, self._table)
        return render_marked(item.tokens, item.marks, self._table)


def _status(reply: LLMReply, found: Sequence[bool] | None) -> JudgementStatus:
    if reply.finish == "error":
        return "failed"
    if reply.finish == "refused":
        return "refused"
    return "unparsed" if found is None else "ok"


def parse_verdicts(text: str, n: int) -> list[bool] | None:
    """Return the verdicts of a reply to ``n`` items; None when it holds no list of exactly ``n``.

    The last such list counts, since a model may think aloud before it answers. Items are 0 and 1, true and false, yes
    and no, quoted or not: the *text* "0" is a no, although Python takes it for true.
    """
    for body in reversed(_LIST.findall(text)):
        words = [word.strip().strip("\"'").strip().lower() for word in body.rstrip(", \n").split(",")]
        if len(words) == n and all(word in _WORDS for word in words):
            return [_WORDS[word] for word in words]
    return None


@final
class RuleJudge(Judge):
    """The executed rule, run on each window alone: detection asks for a match anywhere, fuzzing at every mark.

    A rule states where a latent fires at all. The marks of fuzzing stand where it fires strongly (above a share of the
    window's maximum), so they are among the rule's targets: a rule that is right everywhere matches every mark.
    """

    def __init__(self, kind: Kind, table: TokenTable) -> None:
        self._kind, self._table = kind, table
        self._special = np.zeros(len(table), dtype=bool)
        self._special[sorted(table.special)] = True

    def takes(self, explanation: Explanation) -> bool:
        """Explanations that carry a program."""
        return explanation.program is not None

    async def verdicts(self, explanation: Explanation, items: Sequence[Item]) -> list[Verdict]:
        """Judge items by one rule."""
        return (await self.panel([explanation], items))[0]

    async def panel(self, explanations: Sequence[Explanation], items: Sequence[Item]) -> list[list[Verdict]]:
        """Judge items by several rules in one pass over the windows."""
        if not explanations or not items:
            return [[] for _ in explanations]
        rules = [Rule.from_json(e.program) for e in explanations]
        fits = np.zeros((len(rules), len(items)), dtype=bool)
        for chosen in _by_length(items):
            tokens = np.stack([items[i].tokens for i in chosen])
            shown = ~self._special[tokens]  # nothing fires at special tokens, and no reader sees them
            matches = execute(rules, tokens, self._table, shown) > 0
            if self._kind == "detection":
                fits[:, chosen] = matches.any(axis=2)
            else:
                marks = np.stack([_marks(items[i]) for i in chosen]) & shown
                fits[:, chosen] = (matches | ~marks).all(axis=2) & marks.any(axis=1)
        yes, no = Verdict(prediction=True), Verdict(prediction=False)
        return [[yes if fit else no for fit in row] for row in fits.tolist()]


def _marks(item: Item) -> Array:
    if item.marks is None:
        raise InputError("fuzzing asks about marked windows; this item has no marks")
    return item.marks


def _by_length(items: Sequence[Item]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(len(item.tokens), []).append(i)
    return list(groups.values())
