"""A language model whose error rates are known."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, final

from exegete.errors import ConfigError, InputError
from exegete.llm.backend import Capabilities
from exegete.llm.protocol import Question, Shown, read_question
from exegete.llm.scripted.answers import (
    UNPARSED,
    alike,
    commonest_mark,
    level_of,
    level_token,
    levels_text,
    likeliest_gain,
    prompt_tokens,
    reply_of,
    verdict_tokens,
    written,
)
from exegete.llm.scripted.evidence import Evidence, uniform
from exegete.llm.scripted.fakes import Fake
from exegete.llm.scripted.predicates import Predicate, fit_each, quoted_text, rule_predicate
from exegete.streams import stream
from exegete.types import Array, LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.tokens import TokenTable

_SPEC: Final[Mapping[str, str]] = {
    "tpr": "true_positive_rate",
    "fpr": "false_positive_rate",
    "calibration": "calibration",
    "position_bias": "position_bias",
    "parse_failures": "parse_failure_rate",
    "cross_talk": "cross_talk",
    "seed": "seed",
}


@final
class SimulatedJudge(Fake):
    """Explains and judges as a language model would whose error rates are known.

    Asked to judge, it finds the predicate of the explanation in the prompt — given in ``predicates``, else a rule text
    that ``exegete.rules.parse`` reads, else one of the form ``the text "…"`` — and evaluates it on what the prompt
    shows. Where it holds, the answer is 1 with ``true_positive_rate``; where it does not, with
    ``false_positive_rate``. An explanation without a predicate gets a coin. Every draw is a hash of (seed,
    explanation, excerpt), so it does not depend on batches or order, and the same excerpt gets the same answer.

    Behind every answer stands a normal evidence (see ``Evidence``): P(yes) follows from it where a request wants log
    probabilities, as sharply as ``calibration`` says. Three faults tie answers to their request. The evidence of the
    first example of a request is raised by ``position_bias`` deviations, that of the last lowered by as many, and of
    those between in proportion. With ``cross_talk`` c every example's evidence is raised by c times the mean of the
    others' in its request. And a share ``parse_failure_rate`` of all replies holds no verdict.

    Asked to simulate, it gives every token the level 9 · P(yes) for that token alone; ``prompt_logprobs`` says that it
    can do so all at once. Of marked texts it names the one with the least evidence for ``concept`` as the intruder, or,
    not knowing any, for sharing a marked text with another. Texts to write it takes from the known ``windows``, else
    from what an explanation names; each is of the other kind as often as it errs.

    Rules work on tokens: ``windows`` maps the plain text of known windows to their token ids (``known_windows``); other
    text is split greedily into the longest pieces of ``table`` (or of what it returns when first called), which need
    not be the tokenizer's own split.

    Asked to explain, it answers with ``explain`` (a text, or a function of the request); by default it names the
    commonest marked text, or the token that an edit made likelier by the most, in the form ``the text "…"``, which it
    can judge itself.
    """

    def __init__(
        self,
        table: TokenTable | Callable[[], TokenTable] | None = None,
        *,
        true_positive_rate: float = 0.9,
        false_positive_rate: float = 0.1,
        calibration: float = 1.0,
        position_bias: float = 0.0,
        parse_failure_rate: float = 0.0,
        cross_talk: float = 0.0,
        seed: int = 0,
        predicates: Mapping[str, Predicate] | None = None,
        windows: Mapping[str, Array] | None = None,
        concept: Predicate | None = None,
        explain: str | Callable[[LLMRequest], str] | None = None,
        prompt_logprobs: bool = False,
        name: str = "simulated",
    ) -> None:
        can = Capabilities(logprobs=True, completions=prompt_logprobs, prompt_logprobs=prompt_logprobs)
        super().__init__(name, can)
        if not 0.0 <= parse_failure_rate <= 1.0:
            raise InputError(f"a rate lies in [0, 1], got {parse_failure_rate}")
        if not (math.isfinite(position_bias) and math.isfinite(cross_talk)):
            raise InputError(f"position_bias and cross_talk are finite, got {position_bias} and {cross_talk}")
        self.evidence = Evidence(
            true_positive_rate=true_positive_rate, false_positive_rate=false_positive_rate, calibration=calibration
        )
        self._bias, self._unparsed, self._talk = position_bias, parse_failure_rate, cross_talk
        self._table, self._windows = table, dict(windows or {})
        self._seed, self._explain, self._concept = seed, explain, concept
        self._predicates: dict[str, Predicate | None] = dict(predicates or {})

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Answer a prompt of this package. Raises InputError on any other."""
        self.requests.append(request)
        question = read_question(request.messages if request.prompt is None else request.prompt)
        asked = [request.prompt or "", *(m["content"] for m in request.messages)]
        words = sum(len(text.split()) for text in asked)
        if question.kind in ("explain", "effect"):
            return reply_of(f"[EXPLANATION]: {self._explanation(request, question)}", words)
        if self._unparsed and uniform(self._seed, "unparsed", *asked) < self._unparsed:
            return reply_of(UNPARSED, words)
        if question.tokens:
            return self._simulated(request, question, words)
        if question.kind == "intruder":
            felt = self._out_of_place(question.excerpts)
            return reply_of(json.dumps({"intruder": felt.index(min(felt)) + 1}), words)
        if question.kind == "generate":
            return reply_of(json.dumps(self._written(question)), words)
        felt = self.feels(question.explanation, question.excerpts)
        tokens = verdict_tokens([self.evidence.probability(e) for e in felt]) if request.logprobs else None
        return reply_of(json.dumps([int(e > 0) for e in felt]), words, tokens)

    def feels(self, explanation: str, excerpts: Sequence[Shown]) -> list[float]:
        """Return the evidence for each excerpt of one request that the explanation fits it; above 0 is a yes."""
        predicate = self.predicate(explanation)
        felt = []
        for number, shown in enumerate(excerpts):
            fits = None if predicate is None else predicate(shown.text, shown.spans)
            place = 1 - 2 * number / (len(excerpts) - 1) if len(excerpts) > 1 else 0.0
            drawn = uniform(self._seed, "judge", explanation, shown.text, shown.spans)
            felt.append(self.evidence.at(drawn, fits, self._bias * place))
        if not self._talk or len(felt) < 2:
            return felt
        total = sum(felt)
        return [e + self._talk * (total - e) / (len(felt) - 1) for e in felt]

    def predicate(self, explanation: str) -> Predicate | None:
        """Return what an explanation says, executable; None when this judge does not understand it."""
        if explanation not in self._predicates:
            self._predicates[explanation] = self._rule(explanation) or quoted_text(explanation)
        return self._predicates[explanation]

    def _simulated(self, request: LLMRequest, question: Question, words: int) -> LLMReply:
        """Answer a question about tokens: of the last alone, of all in one object, or by the prompt's own tokens."""
        if question.kind == "simulate_token":
            active = self._active(question, last=True)[0]
            tokens = (level_token(active),) if request.logprobs else None
            return reply_of(str(level_of(active)), words, tokens)
        active_all = self._active(question)
        if request.prompt is None:
            return reply_of(levels_text(active_all), words)
        return LLMReply(
            text="",
            finish="length",
            prompt_tokens=words,
            completion_tokens=1,
            prompt_logprobs=prompt_tokens(request.prompt, active_all),
        )

    def _active(self, question: Question, *, last: bool = False) -> list[float]:
        """Return how probable it seems of each token, or of the last one, that the explanation fits it."""
        text = "".join(question.tokens)
        spans = tuple(itertools.pairwise(itertools.accumulate(map(len, question.tokens), initial=0)))[
            -1 if last else 0 :
        ]
        predicate = self.predicate(question.explanation)
        fits = [None] * len(spans) if predicate is None else fit_each(predicate, text, spans)
        drawn = stream(self._seed, "simulate", question.explanation, text).random(len(spans)).tolist()
        return [self.evidence.probability(self.evidence.at(u, f)) for u, f in zip(drawn, fits, strict=True)]

    def _out_of_place(self, excerpts: Sequence[Shown]) -> list[float]:
        """Return the evidence for each marked text that it belongs to the others."""
        if self._concept is None:
            belongs = alike(excerpts)
        else:
            belongs = [self._concept(shown.text, shown.spans) for shown in excerpts]
        drawn = [uniform(self._seed, "intruder", shown.text, shown.spans) for shown in excerpts]
        return [self.evidence.at(u, fits) for u, fits in zip(drawn, belongs, strict=True)]

    def _written(self, question: Question) -> dict[str, list[str]]:
        """Return texts that should fit an explanation, and texts that should not, each in error as often as it errs."""
        predicate = self.predicate(question.explanation)
        texts = {fits: written(question.explanation, predicate, list(self._windows), fits) for fits in (True, False)}
        rng = stream(self._seed, "generate", question.explanation)
        found = {}
        for name, fits, n in zip(("fitting", "other"), (True, False), question.wanted, strict=True):
            kinds = (rng.random(n) < self.evidence.rate(fits)).tolist()
            dealt = {kind: itertools.cycle(rng.permutation(len(texts[kind])).tolist()) for kind in texts}
            found[name] = [texts[kind][next(dealt[kind])] for kind in kinds]
        return found

    def _rule(self, explanation: str) -> Predicate | None:
        if self._table is None:
            return None
        from exegete.rules import parse

        if callable(self._table):
            self._table = self._table()
        try:
            rule = parse(explanation, self._table)
        except InputError:
            return None
        return rule_predicate(rule, self._table, self._windows)

    def _explanation(self, request: LLMRequest, question: Question) -> str:
        if self._explain is not None:
            return self._explain if isinstance(self._explain, str) else self._explain(request)
        return likeliest_gain(question) if question.kind == "effect" else commonest_mark(question.excerpts)


def simulated_from_spec(spec: str, table: Callable[[], TokenTable]) -> SimulatedJudge:
    """Return the judge of ``simulated[:tpr=0.9,fpr=0.1,…]``; ``table`` says what tokens stand for, when first needed.

    Also ``calibration``, ``position_bias``, ``parse_failures``, ``cross_talk`` and ``seed``. Raises ConfigError for
    anything else.
    """
    _, colon, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _SPEC or _SPEC[key] in options:
            known = ", ".join(_SPEC)
            raise ConfigError(f"a simulated judge is written simulated:NAME=NUMBER,… with {known}; got {spec!r}")
        try:
            options[_SPEC[key]] = int(value) if key == "seed" else float(value)
        except ValueError:
            raise ConfigError(f"{key} of a simulated judge is a number, got {value!r} in {spec!r}") from None
    try:
        return SimulatedJudge(table, name=spec, **options)
    except InputError as error:
        raise ConfigError(f"{spec}: {error}") from error
