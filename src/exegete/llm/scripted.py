"""Shipped fakes: scripted replies, and a simulated judge with known error rates, for tests and documentation.

The simulated judge reads our own prompts, so what it measures is the whole path: rendering, batching, the protocol,
parsing, metrics and their intervals. Its rates are known, and so is the balanced accuracy that must come out.
"""

from __future__ import annotations

import json
import re
from abc import ABC
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import numpy as np

from exegete.errors import InputError, LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient
from exegete.llm.protocol import Shown, read_question
from exegete.streams import stream
from exegete.types import Array, ExampleSet, LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.rules.language import Rule
    from exegete.tokens import TokenTable

Spans = tuple[tuple[int, int], ...]
Predicate = Callable[[str, Spans | None], bool]
"""Whether a text fits: ``(text, None)`` asks of detection, does any place fit; ``(text, spans)`` of fuzzing, does every
marked span of characters fit (where nothing is marked, nothing fits)."""

_QUOTED = re.compile(r'the text ("(?:[^"\\]|\\.)*")', re.IGNORECASE)


class _Fake(LLMClient, ABC):
    """A client without a server."""

    @property
    def name(self) -> str:
        """The name that stands in a run instead of a model."""
        return self._name

    def __init__(self, name: str, capabilities: Capabilities = Capabilities()) -> None:  # noqa: B008 - frozen
        self._name, self._capabilities = name, capabilities
        self.requests: list[LLMRequest] = []
        """Every request so far, in order of arrival."""

    async def check(self) -> None:
        """A fake is always there."""

    async def capabilities(self) -> Capabilities:
        """Return what the fake was said to do."""
        return self._capabilities

    async def close(self) -> None:
        """A fake holds no connections."""


@final
class ScriptedClient(_Fake):
    """Answers with what it was given: replies in order, or a function of the request.

    A text becomes a reply that stopped by itself; an exception is raised. ``capabilities`` is what it says it can do.
    Raises LLMError when the script has run out.
    """

    def __init__(
        self,
        replies: Sequence[str | LLMReply | Exception] | Callable[[LLMRequest], str | LLMReply],
        *,
        name: str = "scripted",
        capabilities: Capabilities = Capabilities(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(name, capabilities)
        self._replies = replies

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Return the next reply of the script."""
        self.requests.append(request)
        if callable(self._replies):
            answer: str | LLMReply | Exception = self._replies(request)
        elif len(self.requests) <= len(self._replies):
            answer = self._replies[len(self.requests) - 1]
        else:
            raise LLMError(f"the script holds {len(self._replies)} replies, and this is request {len(self.requests)}")
        if isinstance(answer, Exception):
            raise answer
        return LLMReply(text=answer, finish="stop") if isinstance(answer, str) else answer


@final
class SimulatedJudge(_Fake):
    """Explains and judges as a language model would whose error rates are known.

    Asked to judge, it finds the predicate of the explanation in the prompt — given in ``predicates``, else a rule text
    that ``exegete.rules.parse`` reads, else one of the form ``the text "…"`` — and evaluates it on what the prompt
    shows. Where it holds, the answer is 1 with ``true_positive_rate``; where it does not, with
    ``false_positive_rate``. An explanation without a predicate gets a coin. Every draw is a stream of (seed,
    explanation, excerpt), so it does not depend on batches or order, and the same excerpt gets the same answer.

    Rules work on tokens: ``windows`` maps the plain text of known windows to their token ids (``known_windows``); other
    text is split greedily into the longest pieces of ``table``, which need not be the tokenizer's own split.

    Asked to explain, it answers with ``explain`` (a text, or a function of the request); by default it names the
    commonest marked text in the form ``the text "…"``, which it can judge itself.
    """

    def __init__(
        self,
        table: TokenTable | None = None,
        *,
        true_positive_rate: float = 0.9,
        false_positive_rate: float = 0.1,
        seed: int = 0,
        predicates: Mapping[str, Predicate] | None = None,
        windows: Mapping[str, Array] | None = None,
        explain: str | Callable[[LLMRequest], str] | None = None,
        name: str = "simulated",
    ) -> None:
        super().__init__(name)
        for rate in (true_positive_rate, false_positive_rate):
            if not 0.0 <= rate <= 1.0:
                raise InputError(f"a rate lies in [0, 1], got {rate}")
        self._table, self._windows = table, dict(windows or {})
        self._rates = {True: true_positive_rate, False: false_positive_rate, None: 0.5}
        self._seed, self._explain = seed, explain
        self._predicates: dict[str, Predicate | None] = dict(predicates or {})

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Answer a prompt of this package. Raises InputError on any other."""
        self.requests.append(request)
        question = read_question(request.messages)
        if question.kind == "explain":
            text = f"[EXPLANATION]: {self._explanation(request, question.excerpts)}"
        else:
            predicate = self._predicate(question.explanation)
            verdicts = [int(self._verdict(question.explanation, predicate, e)) for e in question.excerpts]
            text = json.dumps(verdicts)
        words = sum(len(m["content"].split()) for m in request.messages)
        return LLMReply(text=text, finish="stop", prompt_tokens=words, completion_tokens=len(text.split()))

    def _verdict(self, explanation: str, predicate: Predicate | None, shown: Shown) -> bool:
        fits = None if predicate is None else predicate(shown.text, shown.spans)
        draw = stream(self._seed, "judge", explanation, shown.text, shown.spans).random()
        return bool(draw < self._rates[fits])

    def _predicate(self, explanation: str) -> Predicate | None:
        if explanation not in self._predicates:
            self._predicates[explanation] = self._rule(explanation) or quoted_text(explanation)
        return self._predicates[explanation]

    def _rule(self, explanation: str) -> Predicate | None:
        if self._table is None:
            return None
        from exegete.rules import parse

        try:
            rule = parse(explanation, self._table)
        except InputError:
            return None
        return rule_predicate(rule, self._table, self._windows)

    def _explanation(self, request: LLMRequest, excerpts: Sequence[Shown]) -> str:
        if self._explain is not None:
            return self._explain if isinstance(self._explain, str) else self._explain(request)
        marked = Counter(e.text[start:stop] for e in excerpts for start, stop in e.spans or ())
        commonest = min(marked, key=lambda text: (-marked[text], text), default="")
        return f"the text {json.dumps(commonest, ensure_ascii=False)}"


def quoted_text(explanation: str) -> Predicate | None:
    """Return the predicate of ``the text "…"`` (a JSON string); None when the explanation has no such form."""
    found = _QUOTED.search(explanation)
    if found is None:
        return None
    quoted = str(json.loads(found.group(1), strict=False))

    def fits(text: str, spans: Spans | None) -> bool:
        if spans is None:
            return quoted in text
        return bool(spans) and all(quoted in text[start:stop] for start, stop in spans)

    return fits


def known_windows(examples: Sequence[ExampleSet], table: TokenTable) -> dict[str, Array]:
    """Return the token ids of every window of these sets by the plain text that a prompt shows of it."""
    return {table.decode(map(int, e.tokens)): e.tokens for chosen in examples for e in chosen.examples}


def rule_predicate(rule: Rule, table: TokenTable, windows: Mapping[str, Array]) -> Predicate:
    """Return the predicate of a rule, run on the window alone with its state counted from the window's start.

    A span of characters covers the tokens that share a character with it. Tokens that are shown only together (the
    bytes of one character) fit when any of them does, as they are marked when any of them is.
    """
    from exegete.rules.execute import execute

    def fits(text: str, spans: Spans | None) -> bool:
        tokens = np.asarray(windows[text] if text in windows else greedy_tokens(text, table), dtype=np.uint32)
        if not len(tokens):
            return False
        shown = ~np.isin(tokens, list(table.special))
        matches = execute([rule], tokens[None], table, shown[None])[0, 0] > 0
        if spans is None:
            return bool(matches.any())
        sizes = [len(part) for part in table.spans(tokens.tolist())]
        last = [i for i, size in enumerate(sizes) if size]  # the tokens with which text is shown
        units = np.minimum(np.searchsorted(last, np.arange(len(tokens))), max(len(last) - 1, 0))
        fitting = np.bincount(units, weights=matches) > 0
        ends = np.cumsum([sizes[i] for i in last])
        starts = np.concatenate([[0], ends[:-1]])
        return bool(spans) and all(
            bool(fitting[: len(last)][(starts < stop) & (ends > start)].all()) for start, stop in spans
        )

    return fits


def greedy_tokens(text: str, table: TokenTable) -> Array:
    """Split text into the longest pieces of the table, from the left [n] uint32. Raises InputError where none fits."""
    data = text.encode()
    ids = {piece: i for i, piece in reversed(list(enumerate(table.pieces))) if piece and i not in table.special}
    longest = max(map(len, ids), default=0)
    tokens, at = [], 0
    while at < len(data):
        for size in range(min(longest, len(data) - at), 0, -1):
            token = ids.get(data[at : at + size])
            if token is not None:
                tokens.append(token)
                at += size
                break
        else:
            raise InputError(f"no token stands for {data[at : at + 1]!r}; give the judge the windows it will see")
    return np.array(tokens, dtype=np.uint32)
