"""Open questions answered under what a sweep chose: what the numbers look like as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from exegete.steering.generating import generate
from exegete.steering.operators import POSITIVE, Operator
from exegete.steering.questions import Tokens, open_prompt
from exegete.steering.sweeping import Choice, Mode
from exegete.steering.templates import template_of
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAnswer:
    """A continuation of an open question: under which choice (``behaviour`` to ``components``) and multiplier."""

    behaviour: str
    site: int
    mode: Mode
    components: str
    question: str
    multiplier: float
    draw: int
    tokens: Tokens
    text: str


def open_answers(
    subject: Subject,
    vector: SteeringVector,
    asked: Sequence[str],
    choices: Sequence[Choice],
    multipliers: Sequence[float] = (-1.0, 0.0, 1.0),
    *,
    template: str = "plain",
    operator: Operator = "add",
    positions: str = "onward",
    state_positions: str = "last",
    at: float = POSITIVE,
    max_tokens: int = 40,
    seed: int = 0,
) -> tuple[OpenAnswer, ...]:
    """Return greedy answers to open questions at the site, mode and components of every choice.

    Other options and errors as ``generate``; without questions there is nothing.
    """
    prompts = [open_prompt(question, template_of(template), subject.tokenizer) for question in asked]
    found = []
    for choice in choices if prompts else ():
        names = tuple(filter(None, choice.components.split("+")))
        samples = generate(
            subject,
            prompts,
            vector.only(sites=(choice.site,), components=names or None, mode=choice.mode),
            multipliers,
            operator=operator,
            positions=positions,
            state_positions=state_positions,
            at=at,
            max_tokens=max_tokens,
            seed=seed,
        )
        found += [
            OpenAnswer(
                behaviour=choice.behaviour,
                site=choice.site,
                mode=choice.mode,
                components=choice.components,
                question=asked[sample.prompt],
                multiplier=sample.multiplier,
                draw=sample.draw,
                tokens=sample.tokens,
                text=sample.text,
            )
            for sample in samples
        ]
    return tuple(found)
