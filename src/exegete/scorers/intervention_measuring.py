"""What is measured of a latent's edited text: the probability that tokens gain, the nats of an explanation, its fit."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.rules.language import Rule, TokenAt
from exegete.scorers.controls import OTHER_LATENT
from exegete.scorers.intervention_reading import read_nats
from exegete.scorers.intervention_scores import Unmet, Values
from exegete.scorers.judge import Item, LLMJudge
from exegete.tokens import TokenTable
from exegete.types import Array, Explanation
from exegete.views import LatentView

if TYPE_CHECKING:
    from exegete.scorers.intervention_effects import Edited, Effects, Gains

RANDOM_DIRECTION: Final = "random_direction"
EXAMPLES: Final = 3
"""Prompts of which the continuations are kept."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An explanation of an effect, the effect, and what else is read after the same text.

    ``lent`` are the explanations of each control, which take turns over the prompts. They and the random direction are
    read in the condition ``first`` alone, or ``everywhere``.
    """

    explanation: Explanation
    view: LatentView
    effects: Effects
    first: int
    everywhere: bool
    lent: Mapping[str, Sequence[Explanation]]

    @property
    def donors(self) -> int:
        """How many other latents lent explanations."""
        return len(self.lent.get(OTHER_LATENT, ()))

    @property
    def unmet(self) -> Unmet:
        """Which conditions no strength gives, by control."""
        return {
            (control, at): f"no strength gives a KL of {matched.target:.3g}; the nearest gives {matched.kl:.3g}"
            for control, edited in (("none", self.effects.own), (RANDOM_DIRECTION, self.effects.random))
            for at, matched in enumerate(edited.matched)
            if not matched.met
        }

    def beside(self, edited: Edited) -> list[int]:
        """Return the conditions in which controls are read."""
        return [at for at in edited.met if self.everywhere or at == self.first]


def token_set(explanation: Explanation) -> tuple[int, ...]:
    """Return the tokens that an explanation's rule names for the token it fires on, ascending; none without a rule."""
    if explanation.program is None:
        return ()
    clauses = Rule.from_json(explanation.program).clauses
    named = (c for clause in clauses for c in clause.conditions if isinstance(c, TokenAt))
    return tuple(sorted({token for c in named if c.offset == 0 and not c.negated for token in c.tokens}))


def masses(case: Case, own: Sequence[int]) -> Values:
    """Return the probability that a set of tokens gains; of a control, the mean over its explanations' sets."""
    effects = case.effects
    sets: list[Sequence[int]] = [own]
    lent: dict[str, slice] = {}
    for name, given in case.lent.items():
        lent[name] = slice(len(sets), len(sets) + len(given))
        sets += map(token_set, given)
    edited = effects.masses(effects.own, sets)
    pushed = effects.masses(effects.random, [own])
    return {
        "none": {at: gained[:, 0] for at, gained in edited.items()},
        RANDOM_DIRECTION: {at: gained[:, 0] for at, gained in pushed.items()},
        **{name: {at: g[:, part].mean(axis=1) for at, g in edited.items()} for name, part in lent.items()},
    }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The continuations of one generation: of the clean model, and of the latent's edit by condition met."""

    generation: int
    clean: list[list[int]]
    edited: Mapping[int, list[list[int]]]

    @classmethod
    def of(cls, effects: Effects, generation: int = 0) -> Sampled:
        """Sample them."""
        met = effects.own.met
        edited = dict(zip(met, effects.continuations(generation, effects.own, met), strict=True))
        return cls(generation=generation, clean=effects.continuations(generation)[0], edited=edited)


async def nats(case: Case, sampled: Sampled, *, controls: bool = True) -> Values:
    """Return log p(explanation | edited text) − log p(explanation | clean text) after every prompt."""
    effects, reader, generation = case.effects, case.view.require_reader(), sampled.generation
    n, own, random = len(effects.prompts), effects.own, effects.random
    clean = effects.passages(sampled.clean)
    texts = [effects.passages(shown) for shown in sampled.edited.values()]
    pushed = case.beside(random) if controls else []
    after = [effects.passages(shown) for shown in effects.continuations(generation, random, pushed)]
    read = await read_nats(reader, [clean, *texts, *after], [str(case.explanation.text)] * n)
    gained = read[1:] - read[0]
    values = {"none": dict(zip(own.met, gained, strict=False))}
    if not controls:
        return values
    values[RANDOM_DIRECTION] = dict(zip(pushed, gained[len(own.met) :], strict=True))
    chosen = case.beside(own)
    for name, given in case.lent.items():
        said = [str(given[i % len(given)].text) for i in range(n)]
        other = await read_nats(reader, [clean, *(texts[own.met.index(at)] for at in chosen)], said)
        values[name] = dict(zip(chosen, other[1:] - other[0], strict=True))
    return values


async def again(case: Case, first: Mapping[int, Array], seeds: int) -> dict[int, list[float | None]]:
    """Return the mean nats of each condition under every generation seed, None where something was not read."""
    later = [Sampled.of(case.effects, generation) for generation in range(1, seeds)]
    rounds = [first, *[(await nats(case, sampled, controls=False))["none"] for sampled in later]]
    means = {at: [float(values[at].mean()) for values in rounds] for at in first}
    return {at: [None if math.isnan(mean) else mean for mean in row] for at, row in means.items()}


async def faithfulness(case: Case, sampled: Sampled, gate: asyncio.Semaphore, stage: str) -> dict[int, Array]:
    """Return whether a language model finds that the explanation fits each continuation, edited less clean."""
    view = case.view
    judge = LLMJudge(view.require_llm(), "detection", view.tokens, gate=gate, stage=stage)
    said = []
    for shown in (sampled.clean, *sampled.edited.values()):
        items = [Item(tokens=np.array(tokens, np.uint32)) for tokens in shown]
        verdicts = await judge.verdicts(case.explanation, items)
        said.append(np.array([math.nan if v.prediction is None else float(v.prediction) for v in verdicts]))
    return {at: fits - said[0] for at, fits in zip(sampled.edited, said[1:], strict=True)}


def describe(effects: Effects, gains: Gains | None, names: Sequence[str], table: TokenTable) -> dict[str, Any]:
    """Return strengths and the KLs they have, and the tokens that gain, as JSON data."""
    found: dict[str, Any] = {"prompts": len(effects.prompts)}
    for control, edited in (("strengths", effects.own), (RANDOM_DIRECTION, effects.random)):
        found[control] = {
            name: {"strength": m.strength if m.met else None, "kl": m.kl if math.isfinite(m.kl) else None}
            for name, m in zip(names, edited.matched, strict=True)
        }
    if gains is not None:
        texts = table.texts
        found["boosted"] = [[texts[t], round(by, 6)] for t, by in zip(gains.tokens, gains.by, strict=True)]
    return found


def continued(case: Case, sampled: Sampled, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return some prompts with their continuations as text, clean and by the name of the condition."""
    table = case.view.tokens
    return [
        {
            "prompt": table.decode(prompt.tokens),
            "clean": table.decode(sampled.clean[i]),
            **{names[at]: table.decode(shown[i]) for at, shown in sampled.edited.items()},
        }
        for i, prompt in enumerate(case.effects.prompts[:EXAMPLES])
    ]
