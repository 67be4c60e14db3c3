"""Who answers detection and fuzzing: a language model, or the executed rule.

Both see the window alone. For a rule that means its state (nesting, quotes, line position) is counted from the
window's start, as a language model reading the same excerpt would have to.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, final, overload

import numpy as np

from exegete.errors import ConfigError, InputError
from exegete.examples.render import marked_texts, plain_texts
from exegete.llm.client import LLMClient, gather_all
from exegete.llm.protocol import Kind, judge_messages_of, verdicts_schema, write_excerpts
from exegete.rules.execute import execute, fitting, read_alone
from exegete.rules.language import Rule
from exegete.scorers.verdicts import Leaning, parse_verdicts, read_leanings
from exegete.tokens import TokenTable
from exegete.types import Array, Explanation, JudgementStatus, LLMReply, LLMRequest
from exegete.views import LatentView, Need

JudgeChoice = Literal["auto", "rule", "llm"]
ALTERNATIVES = 20
"""Alternatives asked for per token when probabilities are wanted: the most that common servers give."""
MAX_TOKENS = 500
"""Tokens that a judge's reply may take."""
_REPAIR = (
    "That does not answer for every excerpt. Answer again with one JSON object and nothing else: "
    '{{"verdicts": [...]}}, a list of exactly {n} numbers, 0 or 1, one for each excerpt in order.'
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One window to be judged: ``tokens`` [window] uint32 and, for fuzzing, ``marks`` [window] bool."""

    tokens: Array
    marks: Array | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items(Sequence[Item]):
    """Windows of one length to be judged: ``tokens`` [n, window] uint32 and, for fuzzing, ``marks`` [n, window] bool.

    Raises InputError when the two differ in shape.
    """

    tokens: Array
    marks: Array | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or (self.marks is not None and self.marks.shape != self.tokens.shape):
            raise InputError("windows to be judged are tokens [n, window], and marks of the same shape")

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> Items: ...

    def __getitem__(self, at: int | slice) -> Item | Items:
        if isinstance(at, slice):
            return self.take(at)
        return Item(tokens=self.tokens[at], marks=None if self.marks is None else self.marks[at])

    def take(self, which: Array | slice) -> Items:
        """Return the items at these places, in this order."""
        return Items(tokens=self.tokens[which], marks=None if self.marks is None else self.marks[which])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The items of one request as they stand in it, and how many they are."""

    excerpts: str
    n: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge said of one item; ``prediction`` is None unless ``status`` is ``ok``.

    ``probability`` is P(yes) among yes and no, ``outside`` the mass on neither; None where the judge gave none.
    ``value`` is what was made of it as a number.
    """

    prediction: bool | None
    probability: float | None = None
    value: float | None = None
    outside: float | None = None
    status: JudgementStatus = "ok"


class Judge(ABC):
    """Says of every item whether an explanation fits it. What it could not say is a status, never a guess."""

    @abstractmethod
    async def verdicts(self, explanation: Explanation, items: Sequence[Item]) -> list[Verdict]:
        """Judge items by one explanation, which has a text; one verdict per item, in order."""

    async def panel(self, explanations: Sequence[Explanation], items: Sequence[Item]) -> list[list[Verdict]]:
        """Judge the same items by several explanations; one list of verdicts per explanation."""
        return await gather_all(self.verdicts(e, items) for e in explanations)

    @abstractmethod
    def takes(self, explanation: Explanation) -> bool:
        """Return whether this judge can use an explanation."""


@final
class LLMJudge(Judge):
    """A language model that answers a few items per request with 0 and 1 for each.

    A reply that does not answer for the batch *sent* (the last one may be short) is asked for once more with a
    clarifying message; after that the whole batch is ``unparsed``. Nothing that changes is shared between requests. At
    most as many are under way at once as ``gate`` lets through. With ``probabilities`` each verdict has its P(yes),
    where the server gives log probabilities. ``stage`` is what the requests are for, by default their kind.
    """

    def __init__(
        self,
        llm: LLMClient,
        kind: Kind,
        table: TokenTable,
        *,
        per_request: int = 5,
        gate: asyncio.Semaphore,
        probabilities: bool = False,
        max_tokens: int = MAX_TOKENS,
        stage: str = "",
    ) -> None:
        if per_request < 1:
            raise InputError(f"a request holds at least one example, got {per_request}")
        self._llm, self._kind, self._table = llm, kind, table
        self._per_request, self._gate, self._probabilities = per_request, gate, probabilities
        self._max_tokens, self._stage = max_tokens, stage

    def takes(self, explanation: Explanation) -> bool:
        """Any explanation with a text."""
        return explanation.text is not None

    def requests(self, explanation: Explanation, items: Sequence[Item]) -> list[LLMRequest]:
        """Return the requests that ``verdicts`` begins with; nothing is sent."""
        batches = write_batches(items, self._table, self._per_request)
        return [self._request(explanation, batch) for batch in batches]

    async def verdicts(self, explanation: Explanation, items: Sequence[Item]) -> list[Verdict]:
        """Judge items a few at a time. Raises LLMError when the server cannot be used at all."""
        return (await self.panel([explanation], items))[0]

    async def panel(self, explanations: Sequence[Explanation], items: Sequence[Item]) -> list[list[Verdict]]:
        """Judge the same items, written once, by several explanations."""
        batches = write_batches(items, self._table, self._per_request)

        async def one(explanation: Explanation) -> list[Verdict]:
            asked = [self._batch(self._request(explanation, batch), batch.n) for batch in batches]
            return [verdict for answer in await gather_all(asked) for verdict in answer]

        return await gather_all(map(one, explanations))

    def _request(self, explanation: Explanation, batch: Batch) -> LLMRequest:
        return judge_request(
            self._kind,
            str(explanation.text),
            batch,
            temperature=self._llm.temperature,
            probabilities=self._probabilities,
            max_tokens=self._max_tokens,
            stage=self._stage,
        )

    async def _batch(self, request: LLMRequest, n: int) -> list[Verdict]:
        reply = await self._ask(request)
        found = None if reply.text is None else parse_verdicts(reply.text, n)
        if found is None and reply.finish in ("stop", "length"):
            said = reply.text or "(no answer)"  # several chat templates refuse an empty message
            repair: tuple[Mapping[str, str], ...] = (
                {"role": "assistant", "content": said},
                {"role": "user", "content": _REPAIR.format(n=n)},
            )
            reply = await self._ask(replace(request, messages=(*request.messages, *repair)))
            found = None if reply.text is None else parse_verdicts(reply.text, n)
        status = _status(reply, found)
        if found is None or status != "ok":
            return [Verdict(prediction=None, status=status)] * n
        leanings = read_leanings(reply.logprobs, found) if self._probabilities else [None] * n
        return [_verdict(answer, leaning) for answer, leaning in zip(found, leanings, strict=True)]

    async def _ask(self, request: LLMRequest) -> LLMReply:
        async with self._gate:
            return await self._llm.reply(request)


def write_batches(items: Sequence[Item], table: TokenTable, per_request: int) -> list[Batch]:
    """Return items as they stand in requests of ``per_request`` each, in order; the last may be short."""
    texts = [""] * len(items)
    for at, group in _columns(items):
        if group.marks is None:
            written = plain_texts(group.tokens, table)
        else:
            written = marked_texts(group.tokens, group.marks, table)
        for i, text in zip(at, written, strict=True):
            texts[i] = text
    parts = [texts[at : at + per_request] for at in range(0, len(texts), per_request)]
    return [Batch(excerpts=write_excerpts(part), n=len(part)) for part in parts]


def judge_request(
    kind: Kind,
    explanation: str,
    batch: Batch,
    *,
    temperature: float,
    probabilities: bool = False,
    max_tokens: int = MAX_TOKENS,
    stage: str = "",
) -> LLMRequest:
    """Return the request that asks whether an explanation fits each item of a batch."""
    return LLMRequest(
        messages=judge_messages_of(kind, explanation, batch.excerpts),
        temperature=temperature,
        max_tokens=max_tokens,
        schema=verdicts_schema(batch.n),
        logprobs=ALTERNATIVES if probabilities else 0,
        stage=stage or kind,
    )


def _verdict(answer: bool, leaning: Leaning | None) -> Verdict:
    if leaning is None:
        return Verdict(prediction=answer)
    return Verdict(prediction=answer, probability=leaning.yes, outside=leaning.outside)


def _status(reply: LLMReply, found: Sequence[bool] | None) -> JudgementStatus:
    if reply.finish == "error":
        return "failed"
    if reply.finish == "refused":
        return "refused"
    return "unparsed" if found is None else "ok"


@final
class RuleJudge(Judge):
    """The executed rule, run on each window alone: detection asks for a match anywhere, fuzzing at every mark.

    A rule states where a latent fires at all; the marks of fuzzing stand where it fires strongly (above a share of the
    window's maximum), and so are among the rule's targets. A mark that the rule does not match speaks against it, a
    match that is not marked says nothing: it may be a weak firing. So a rule that is right everywhere takes true marks
    and refuses wrong ones; one that knows the weak firings alone refuses both, and one that knows the strong alone is
    right.
    """

    def __init__(self, kind: Kind, table: TokenTable) -> None:
        self._kind, self._table = kind, table

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
        for at, group in _columns(items):
            if self._kind == "detection":
                context = read_alone(group.tokens, self._table)
                fits[:, at] = [fitting(rule, context) for rule in rules]
            else:
                shown = ~self._table.is_special[group.tokens]  # no reader sees special tokens
                matches = execute(rules, group.tokens, self._table, shown) > 0
                marks = _marks(group) & shown
                fits[:, at] = (matches | ~marks).all(axis=2) & marks.any(axis=1)
        yes, no = Verdict(prediction=True), Verdict(prediction=False)
        return [[yes if fit else no for fit in row] for row in fits.tolist()]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Who judges, and how it is asked.

    ``judge`` is ``rule`` (the explanation's program, executed), ``llm``, or ``auto``: the language model where there is
    one, else the rule. ``probabilities`` asks for log probabilities, which only a language model gives. The others are
    those of ``LLMJudge``. Raises ConfigError for values that do not fit.
    """

    judge: JudgeChoice = "auto"
    per_request: int = 5
    probabilities: bool = False
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if self.judge not in ("auto", "rule", "llm"):
            raise ConfigError(f"judge is one of auto, rule, llm, got {self.judge!r}")
        if self.per_request < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"per_request and max_tokens are at least 1, got {self.per_request} and {self.max_tokens}"
            )
        if self.probabilities and self.judge == "rule":
            raise ConfigError("an executed rule gives no probabilities; leave out probabilities, or judge with llm")
        if self.probabilities:
            object.__setattr__(self, "judge", "llm")

    @property
    def args(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)

    @property
    def needs(self) -> set[Need]:
        """A language model when only that may judge, and its log probabilities for P(yes)."""
        needed: set[Need] = {"llm"} if self.judge == "llm" else set()
        return {*needed, "logprobs"} if self.probabilities else needed

    def executes(self, view: LatentView) -> bool:
        """Say whether the judge of a view's explanation is its own program, executed."""
        return self.judge == "rule" or (self.judge == "auto" and view.llm is None)

    def judged_by(self, llm: LLMClient | None) -> str:
        """Who judges where this language model is there."""
        return "rule" if llm is None or self.judge == "rule" else llm.name

    def choose(
        self, kind: Kind, explanation: Explanation, view: LatentView, gate: asyncio.Semaphore, stage: str = ""
    ) -> Judge:
        """Return the judge of an explanation. Raises InputError when that is a rule, and the explanation has none."""
        if not self.executes(view):
            return LLMJudge(
                view.require_llm(),
                kind,
                view.tokens,
                per_request=self.per_request,
                gate=gate,
                probabilities=self.probabilities,
                max_tokens=self.max_tokens,
                stage=stage,
            )
        if explanation.program is None:
            raise InputError(
                f"{view.latent}: an explanation in free text is judged by a language model; give one with --llm "
                "URL#MODEL, or explain with rules"
            )
        return RuleJudge(kind, view.tokens)


def _marks(items: Items) -> Array:
    if items.marks is None:
        raise InputError("fuzzing asks about marked windows; this item has no marks")
    return items.marks


def _columns(items: Sequence[Item]) -> list[tuple[Sequence[int], Items]]:
    """Return items as columns, with their places: windows of one length together, marked ones apart."""
    if isinstance(items, Items):
        return [(range(len(items)), items)]
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((len(item.tokens), item.marks is not None), []).append(i)
    found: list[tuple[Sequence[int], Items]] = []
    for (_, marked), at in groups.items():
        marks = [items[i].marks for i in at]
        stacked = np.stack([m for m in marks if m is not None]) if marked else None
        found.append((at, Items(tokens=np.stack([items[i].tokens for i in at]), marks=stacked)))
    return found
