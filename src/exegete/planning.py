"""What a run's language model will be asked, counted before anything is sent.

The real explainers and scorers run on a seeded sample of the latents, with a client that counts requests and answers
nothing; the counts are scaled to all latents that are left. What cannot be known before (how long explanations will
be) is assumed, and the plan says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exegete.llm.client import LLMClient
from exegete.llm.protocol import read_question
from exegete.llm.reading_server import STAGE as READING
from exegete.metrics.sequential import fixed_pairs
from exegete.scorers.sequential import Rounds, Stopping, Tested
from exegete.types import LLMReply, LLMRequest

if TYPE_CHECKING:
    from exegete.llm.prices import Price

SAMPLED = 24
"""Latents of a coder on which requests are counted."""
EXPLANATION_TOKENS = 60
"""Tokens that an explanation is assumed to take, as long as there are none to measure."""
SCORES = (6.0, 2.2)
"""Parameters of the beta distribution that balanced accuracies of the paper are like (arXiv 2410.13928)."""
BYTES_PER_TOKEN = 3.6
"""Bytes of a prompt that are assumed to make a token, where the tokenizer is not at hand."""
MESSAGE_TOKENS = 4
"""Tokens that a chat template is assumed to add to a message."""
_TEXT = "A sentence or two as a language model would write them, which fit what is asked of them or do not."
_FILLER = "occurrences of some word in a certain context, mostly at the beginning of a clause, and "

_PIECE = re.compile(r"[^\W\d_]+|\d{1,3}|[^\w\s]")
_SIMULATED = 60  # latents at least for which stopping is simulated
_WIDEST = 60  # columns for a coder and a stage

CountTokens = Callable[[str], int]
CountPrompt = Callable[[LLMRequest], int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one stage asks of the language model: ``shared`` tokens of the prompts begin as the request before did."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    shared_tokens: float = 0.0
    completion_tokens: float = 0.0

    @property
    def shared(self) -> float:
        """The share of prompt tokens that a prefix cache can serve."""
        return self.shared_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def plus(self, other: Asked) -> Asked:
        """Return both together."""
        return Asked(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            shared_tokens=self.shared_tokens + other.shared_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )

    def times(self, factor: float) -> Asked:
        """Return so many times as much."""
        return Asked(
            requests=self.requests * factor,
            prompt_tokens=self.prompt_tokens * factor,
            shared_tokens=self.shared_tokens * factor,
            completion_tokens=self.completion_tokens * factor,
        )

    def dollars(self, price: Price) -> Mapping[str, float]:
        """Return what it costs at list price, with the shared beginnings cached by the server, and as batch files."""
        output = self.completion_tokens * price.output
        plain = self.prompt_tokens * price.input + output
        cached = price.input if price.cached is None else price.cached
        kept = (self.prompt_tokens - self.shared_tokens) * price.input + self.shared_tokens * cached + output
        return {"list": plain / 1e6, "cached": kept / 1e6, "batch": plain * price.batch / 1e6}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of one coder: latents in all and left to do, and what is asked for those that are left.

    ``by`` says who answers where it is not the run's language model alone, ``elsewhere`` that what is asked goes to
    another server and is no part of what the run pays for. Where judging stops once it is enough, ``asked`` is the most
    that it can come to and ``expected`` what it comes to for scores like those of the paper.
    """

    coder: str
    stage: str
    latents: int
    left: int
    asked: Asked
    by: str = ""
    elsewhere: bool = False
    expected: Asked | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run still costs. ``collect`` says what collecting will take where it is not done, by figure.

    ``exact`` tells whether prompts were counted with the model's own tokenizer; ``remarks`` say what was assumed.
    """

    model: str
    stages: tuple[StagePlan, ...]
    exact: bool
    price: Price | None
    collect: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def total(self) -> Asked:
        """All stages together, as far as the run's language model is asked; at most, where judging stops early."""
        return _together(stage.asked for stage in self.stages if not stage.elsewhere)

    @property
    def expected(self) -> Asked | None:
        """``total`` with what is expected where judging stops early; None where no stage does."""
        if all(stage.expected is None for stage in self.stages):
            return None
        return _together(stage.expected or stage.asked for stage in self.stages if not stage.elsewhere)


def _together(parts: Iterable[Asked]) -> Asked:
    whole = Asked()
    for part in parts:
        whole = whole.plus(part)
    return whole


@final
class CountingClient(LLMClient):
    """A client that sends nothing: it counts what it is asked, and answers as shortly as the real one would.

    ``count`` returns the tokens of a text, ``count_prompt`` those of a request. The beginning that a prompt shares with
    the one before it in the same stage is what a server's prefix cache can serve.
    """

    def __init__(
        self, name: str, temperature: float, count: CountTokens, count_prompt: CountPrompt, explanation_tokens: int
    ) -> None:
        self._name, self._temperature, self._count, self._count_prompt = name, temperature, count, count_prompt
        words = max(1, round(explanation_tokens * BYTES_PER_TOKEN))
        self._explanation = (_FILLER * (words // len(_FILLER) + 1))[:words].strip()
        self.asked: dict[str, Asked] = {}
        self._before: dict[str, str] = {}

    def begin(self) -> None:
        """Count anew."""
        self.asked.clear()
        self._before.clear()

    def count_all(self, requests: Sequence[LLMRequest]) -> None:
        """Count requests that would be sent."""
        for request in requests:
            self._count_one(request)

    @property
    def name(self) -> str:
        """The model that is planned for."""
        return self._name

    @property
    def explanation(self) -> str:
        """A text as long as explanations are taken to be."""
        return self._explanation

    @property
    def temperature(self) -> float:
        """That of the configuration."""
        return self._temperature

    async def reply(self, request: LLMRequest) -> LLMReply:
        """Count a request."""
        return LLMReply(text=self._count_one(request), finish="stop")

    def _count_one(self, request: LLMRequest) -> str:
        """Count a request and return how it would be answered; nothing is said where a prompt is only read."""
        prompt = "\n".join(message["content"] for message in request.messages) or request.prompt or ""
        tokens = self._count_prompt(request)
        before = self._before.get(request.stage, "")
        shared = _beginning(before, prompt) / max(len(prompt), 1)
        self._before[request.stage] = prompt
        answer = "" if request.stage == READING else self._answer(request)
        asked = Asked(
            requests=1,
            prompt_tokens=tokens,
            shared_tokens=tokens * shared,
            completion_tokens=min(self._count(answer), request.max_tokens),
        )
        self.asked[request.stage] = self.asked.get(request.stage, Asked()).plus(asked)
        return answer

    async def check(self) -> None:
        """There is no server to ask."""

    async def close(self) -> None:
        """There is no connection to give back."""

    def _answer(self, request: LLMRequest) -> str:
        question = read_question(request.messages if request.prompt is None else request.prompt)
        match question.kind:
            case "explain" | "effect":
                return f"[EXPLANATION]: {self._explanation}"
            case "simulate":
                return '{"active": [{"token": 1, "level": 9}]}'
            case "simulate_token":
                return "0"
            case "simulate_all":
                return ""
            case "intruder":
                return '{"intruder": 1}'
            case "generate":
                fitting, other = ([_TEXT] * n for n in question.wanted)
                return json.dumps({"fitting": fitting, "other": other})
            case "detection" | "fuzzing":
                return str([0] * len(question.excerpts))


def count_parts(request: LLMRequest, count: CountTokens) -> int:
    """Return the tokens of a request's texts, with what a chat template is assumed to add."""
    if request.prompt is not None:
        return count(request.prompt)
    return sum(count(message["content"]) + MESSAGE_TOKENS for message in request.messages)


def _beginning(before: str, prompt: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(before), len(prompt))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[:middle] == prompt[:middle] else (low, middle - 1)
    return low


def count_bytes(text: str) -> int:
    """Return how many tokens a text is assumed to be: from its bytes, at least one for each word, number and mark."""
    return max(round(len(text.encode("utf-8", errors="replace")) / BYTES_PER_TOKEN), len(_PIECE.findall(text)))


def judged_share(stopping: Stopping, tested: Sequence[Tested], per_request: int) -> tuple[float, float]:
    """Return which share of their windows latents are asked about where judging stops early: at most, and expected.

    Expected for latents whose sensitivity and specificity are alike and spread as Beta(6, 2.2), like the paper's
    scores; simulated with ``tested`` over and over.
    """
    from scipy import stats

    windows = sum(len(t.windows) for t in tested)
    if not windows:
        return 1.0, 1.0
    test = stopping.test
    budget = 2 * fixed_pairs(test) * len(tested) if test is not None and stopping.stop_when is None else windows
    block = [tested[i % len(tested)] for i in range(max(_SIMULATED, len(tested)))]
    true = stats.beta(*SCORES).ppf((np.arange(len(block)) + 0.5) / len(block))
    rng = np.random.default_rng(0)
    rng.shuffle(true)
    rounds = Rounds(stopping, block, per_request=per_request)
    asked = 0
    while drawn := rounds.draw():
        for place, which in drawn:
            right = rng.random(len(which)) < true[place]
            rounds.tell(place, (right == block[place].windows.fires[which]).tolist())
            asked += len(which)
    most = min(1.0, budget / windows)
    return most, min(most, asked / sum(len(t.windows) for t in block))


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield a plan as lines of text."""
    for name, value in plan.collect.items():
        yield f"{name}: {value}"
    if plan.model == "none":
        yield "no language model: rules only, nothing to pay"
        return
    yield f"language model: {plan.model}"
    yield from _stage_lines(plan)
    about = "" if plan.exact else "about "
    for what, asked in (("in all", plan.total), ("expected", plan.expected)):
        if asked is not None:
            most = "at most " if what == "in all" and plan.expected is not None else ""
            yield (
                f"{what}: {most}{asked.requests:,.0f} requests, {about}{asked.prompt_tokens:,.0f} prompt tokens "
                f"({asked.shared:.0%} shared with the request before), {about}{asked.completion_tokens:,.0f} reply "
                "tokens"
            )
            if plan.price is not None:
                cost = asked.dollars(plan.price)
                yield (
                    f"price: {most}${cost['list']:.2f} at list, ${cost['cached']:.2f} where the server caches shared "
                    f"beginnings, ${cost['batch']:.2f} as batch files (--llm-batch)"
                )
    if plan.price is None:
        yield "price: not known; give one with --prices FILE.yaml (tokens are counted either way)"
    yield from plan.remarks


def _stage_lines(plan: Plan) -> Iterator[str]:
    """Yield the table of what each stage asks per latent."""
    if not plan.stages:
        yield "nothing is left to do"
        return
    names = [f"{s.coder} {s.stage}" for s in plan.stages]
    wide = min(max(map(len, names)), _WIDEST)
    yield (
        f"{'per latent':<{wide}}  {'latents left':>16}  {'requests':>10}  {'prompt tokens':>13}  shared  "
        f"{'reply tokens':>12}"
    )
    for name, stage in zip(names, plan.stages, strict=True):
        head = f"{name:<{wide}}  {f'{stage.left:,} of {stage.latents:,}':>16}"
        mark = "≤ " if stage.expected is not None else ""
        counted = _per_latent(stage.asked, stage.left, mark) if stage.asked.requests or not stage.by else ""
        yield "  ".join(part for part in (head, counted, stage.by) if part)
        if stage.expected is not None:
            yield f"{'  expected':<{wide}}  {'':>16}  {_per_latent(stage.expected, stage.left)}"


def _per_latent(asked: Asked, latents: int, mark: str = "") -> str:
    each = asked.times(1 / max(latents, 1))
    shared = f"{asked.shared:.0%}"
    return (
        f"{f'{mark}{each.requests:,.1f}':>10}  {f'{mark}{each.prompt_tokens:,.0f}':>13}  {shared:>6}  "
        f"{f'{mark}{each.completion_tokens:,.0f}':>12}"
    )


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data; ``expected`` stands where judging stops early, beside what is asked at most."""

    def asked(what: Asked) -> dict[str, Any]:
        found: dict[str, Any] = {
            "requests": round(what.requests),
            "prompt_tokens": round(what.prompt_tokens),
            "shared_tokens": round(what.shared_tokens),
            "completion_tokens": round(what.completion_tokens),
        }
        return found | ({"dollars": dict(what.dollars(plan.price))} if plan.price is not None else {})

    def expected(what: Asked | None) -> dict[str, Any]:
        return {} if what is None else {"expected": asked(what)}

    return {
        "model": plan.model,
        "exact": plan.exact,
        "collect": dict(plan.collect),
        "stages": [
            {"coder": s.coder, "stage": s.stage, "latents": s.latents, "left": s.left, "by": s.by or plan.model}
            | asked(s.asked)
            | expected(s.expected)
            for s in plan.stages
        ],
        "total": asked(plan.total) | expected(plan.expected),
        "remarks": list(plan.remarks),
    }


def sample(indices: Sequence[int], n: int = SAMPLED) -> list[int]:
    """Return up to n of the latents, evenly spread over the order they were drawn in."""
    if len(indices) <= n:
        return list(indices)
    return [indices[i * len(indices) // n] for i in range(n)]
