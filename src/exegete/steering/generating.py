"""What a subject says when steered: open questions answered, greedily or by draws that multipliers share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from exegete.errors import InputError
from exegete.steering.answers import ROWS_AT_ONCE, TOKENS_AT_ONCE
from exegete.steering.operators import POSITIVE, Operator
from exegete.steering.passes import read_on, row_edits
from exegete.steering.places import Places, places
from exegete.steering.questions import Tokens, encode
from exegete.steering.vector import SteeringVector
from exegete.streams import stream
from exegete.subjects import Subject

Mode = Literal["residual", "state", "both"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A continuation: of which prompt, number ``draw`` of it, under which multiplier."""

    prompt: int
    multiplier: float
    draw: int
    tokens: Tokens
    text: str


@torch.no_grad()
def generate(
    subject: Subject,
    prompts: Sequence[str | Tokens],
    vector: SteeringVector | None = None,
    multipliers: Sequence[float] = (1.0,),
    *,
    operator: Operator = "add",
    mode: Mode = "both",
    positions: str = "onward",
    state_positions: str = "last",
    sites: Collection[int] | None = None,
    components: Collection[str] | None = None,
    at: float = POSITIVE,
    max_tokens: int = 40,
    temperature: float = 0.0,
    draws: int = 1,
    seed: int = 0,
) -> tuple[Sample, ...]:
    """Return continuations of every prompt at every multiplier, in the order of prompts, multipliers and draws.

    Noise depends on the seed, prompt, draw and step and nothing else, so that texts at two multipliers differ no more
    than the multipliers make them. The multiplier 0 is the subject as it is.

    Args:
        subject: The model.
        prompts: Texts, or token ids.
        vector: What to steer with; None for the subject as it is.
        multipliers: Numbers.
        operator: On the residual stream; a state is only added to.
        mode: Which part of the vector is used: ``residual``, ``state``, or ``both``, which is whatever it has.
        positions: Tokens at which the residual stream is edited; see ``places``.
        state_positions: Tokens before which the state is edited. ``last`` edits it once, and the edit fades as the
            state does; ``onward`` again before every token, which adds up where it does not fade; ``every:K`` before
            every K-th.
        sites: Which sites and blocks of the vector, None for all.
        components: Which components of the state, None for all.
        at: For ``clamp``.
        max_tokens: How long continuations are; they end at the model's end of text.
        temperature: 0 takes the likeliest token.
        draws: Continuations of each prompt and multiplier; more than one needs a temperature.
        seed: Of the draws.

    Raises:
        InputError: For no prompts or tokens, numbers that are not finite, a temperature below 0, a mode that the vector
            has no part for, or positions at which a part of it would act nowhere (a state is edited between tokens, so
            not at a prompt's only one).
        MismatchError: For a vector of another model.
    """
    if not prompts or max_tokens < 1 or draws < 1:
        raise InputError("give at least one prompt, one token and one draw")
    if not all(math.isfinite(value) for value in (*multipliers, temperature, at)):
        raise InputError("multipliers, temperature and the place of a clamp are finite numbers")
    if temperature < 0:
        raise InputError(f"a temperature is 0 (the likeliest token) or above, got {temperature:g}")
    if draws > 1 and temperature == 0:
        raise InputError(f"several draws need a temperature above 0, got 0 for {draws}")
    if vector is not None:
        vector.require(subject)
        vector = vector.only(sites=sites, components=components, mode=mode)
    ids = [encode(subject.tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
    where = places(positions), places(state_positions)
    if vector is not None and any(multipliers):
        _check_places(ids, where, vector, max_tokens)
    jobs = [(p, m, n) for p in range(len(ids)) for m in range(len(multipliers)) for n in range(draws)]
    found: dict[tuple[int, int, int], Tokens] = {}
    for steer in (False, True):  # at the multiplier 0 nothing is edited
        mine = [job for job in jobs if (vector is not None and multipliers[job[1]] != 0) == steer]
        mine.sort(key=lambda job: (job[0], multipliers[job[1]], job[2]))  # so that their order does not matter
        for batch in _batches(mine, [len(tokens) for tokens in ids], max_tokens):
            tokens = torch.tensor([ids[p] for p, _, _ in batch], device=subject.device)
            edits: tuple[list[Any], list[Any]] = ([], [])
            if steer and vector is not None:
                which = torch.tensor([m for _, m, _ in batch])
                edits = row_edits(subject, [vector] * len(multipliers), multipliers, which, operator=operator, at=at)
            noises = [stream(seed, "steering", "generate", p, n) for p, _, n in batch] if temperature > 0 else []
            said = _continued(subject, tokens, edits, where, max_tokens, temperature, noises)
            found |= dict(zip(batch, said, strict=True))
    decode = subject.token_table().decode
    return tuple(
        Sample(prompt=p, multiplier=float(multipliers[m]), draw=n, tokens=found[p, m, n], text=decode(found[p, m, n]))
        for p, m, n in jobs
    )


def _check_places(prompts: Sequence[Tokens], where: tuple[Places, Places], vector: SteeringVector, steps: int) -> None:
    """Raise InputError where a part of the vector acts nowhere: what is said would be as without it."""
    parts = (("residual", where[0], 0, bool(vector.residual)), ("state", where[1], 1, bool(vector.state.parts)))
    for i, prompt in enumerate(prompts, start=1):
        for part, places_of, first, have in parts:
            if have and not places_of.reaches(len(prompt), first, steps - 1):  # what is said last is not read
                why = "a state can be edited from the second token on" if first else "counted from 0"
                raise InputError(
                    f"prompt {i} has no token to edit the {part} at: it is of {len(prompt)} tokens, {why}, and the "
                    f"positions are {places_of.name}; choose others, onward, say, or mode residual or state alone"
                )


def _batches(
    jobs: Sequence[tuple[int, int, int]], lengths: Sequence[int], steps: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield jobs whose prompts are equally long, no more at once than caches should hold."""
    for length in sorted({lengths[p] for p, _, _ in jobs}):
        same = [job for job in jobs if lengths[job[0]] == length]
        size = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // (length + steps)))
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _continued(
    subject: Subject,
    tokens: torch.Tensor,
    edits: tuple[list[Any], list[Any]],
    where: tuple[Any, Any],
    steps: int,
    temperature: float,
    noises: Sequence[Any],
) -> list[Tokens]:
    prompt, ends = tokens.shape[1], _ends(subject)
    options: dict[str, Any] = {"prompt": prompt, "edits": edits[0], "where": where[0]}
    options |= {"changes": edits[1], "state_where": where[1]}
    running = read_on(subject, None, tokens, **options)
    said: list[torch.Tensor] = []
    over = torch.zeros(len(tokens), dtype=torch.bool)
    for step in range(steps):
        scores = running.logits.float()
        if temperature > 0:
            noise = torch.stack([torch.from_numpy(draw.gumbel(size=scores.shape[1])) for draw in noises])
            scores = scores / temperature + noise.to(scores)
        chosen = scores.argmax(dim=-1)
        said.append(chosen.cpu())
        over |= torch.isin(said[-1], ends)
        if bool(over.all()) or step == steps - 1:
            break
        running = read_on(subject, running, chosen[:, None], **options)
    return [_cut(row, ends.tolist()) for row in torch.stack(said, dim=1).tolist()]


def _cut(tokens: Sequence[int], ends: Collection[int]) -> Tokens:
    """Return the tokens before the end of the text."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:at])


def _ends(subject: Subject) -> torch.Tensor:
    """Return the ids that end a text, as generating in transformers takes them."""
    settings = getattr(subject.model, "generation_config", None)
    given = None if settings is None else settings.eos_token_id
    given = subject.tokenizer.eos_token_id if given is None else given
    return torch.tensor(given if isinstance(given, list) else [] if given is None else [given], dtype=torch.long)
