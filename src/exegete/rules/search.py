"""Find the rule that best predicts where a latent fires, on train text alone.

Growing: within the positions of a clause (at first: all), the search counts for every place and token, and for every
class and state, how often the latent fires; from the counts it takes, per place, the sets of at most twelve tokens
with the most ``hits − λ · positions`` over a grid of λ, which are the best sets at every trade of precision against
recall. A token must pay for its own description in bits, a condition for its own. Clauses grown so, singly, refined by
a second and third condition, and from what earlier clauses leave over, form a pool. Rules of up to three clauses are
put together from the pool by the average precision they reach on train text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from exegete.rules.evaluate import context_of, find_sorted, flat_firings
from exegete.rules.execute import TokenContext, clause_positions
from exegete.rules.growing import Candidate, Goal, Grower, average_precisions
from exegete.rules.language import MAX_CLAUSES, ClassAt, Clause, Rule, TokenAt, TokenOf, TokenWithin
from exegete.rules.universe import Shared, Universe
from exegete.streams import stream
from exegete.types import Array
from exegete.views import SplitData

MIN_FIRINGS = 8
BEAM = 5
BEST = 2
LEFT_OVER = 2
ROUNDS = 2
STEP = 1e-3  # average precision that a clause must add
CONDITION_COST = 2e-3  # and that a condition or a listed token must add to be worth reading
TOKEN_COST = 1e-4


def _build(universe: Universe) -> list[Candidate]:
    """Return the clauses of the best rule found, none if nothing predicts the latent."""
    grower = Grower(universe)
    pool = _pool(grower)
    chosen: list[Candidate] = []
    score = 0.0
    while pool and len(chosen) < MAX_CLAUSES:
        if chosen:
            pool += _left_over(grower, chosen)
        best, score_with = _best(universe, chosen, pool)
        if score_with <= score + STEP:
            break
        chosen.append(best)
        score = score_with
    for _ in range(ROUNDS if chosen else 0):
        before = score
        for k in range(len(chosen)):
            others = chosen[:k] + chosen[k + 1 :]
            best, score_with = _best(universe, others, [*grower.variants(chosen[k], others), *pool])
            if score_with > score:
                chosen[k], score = best, score_with
        if score < before + STEP:
            break
    return _simplified(grower, chosen, score)


def _simplified(grower: Grower, chosen: list[Candidate], score: float) -> list[Candidate]:
    """Leave out conditions and tokens that add less average precision than they cost to read."""
    for k in range(len(chosen)):
        others = chosen[:k] + chosen[k + 1 :]
        while options := grower.simpler(chosen[k]):
            scores = average_precisions(grower.universe, others, options)
            kept = scores - np.array([_cost(c) for c in options])
            best = int(kept.argmax())
            if kept[best] < score - _cost(chosen[k]):
                break
            chosen[k], score = options[best], float(scores[best])
    return chosen


def _cost(clause: Candidate) -> float:
    tokens = sum(len(c.tokens) for c in clause.conditions if isinstance(c, TokenAt | TokenOf | TokenWithin))
    return CONDITION_COST * len(clause.conditions) + TOKEN_COST * tokens


def _pool(grower: Grower) -> list[Candidate]:
    """Return clauses of one, two and three conditions grown from all positions."""
    singles = grower.grow(grower.root, [(Goal(), 24)], sets=3)
    pool = list(singles)
    level = _varied(singles)
    for width in (3, 2):
        refined: list[Candidate] = []
        for clause in level:
            refined += grower.grow(clause, [(Goal(floor=clause.precision), width), (Goal(), 1)])
        pool += refined
        level = sorted(refined, key=lambda c: -c.f * c.precision)[: BEAM // 2]
    return pool


def _varied(singles: Sequence[Candidate]) -> list[Candidate]:
    """Return the best clauses to refine: the best overall, and the best one that each other place has to offer.

    Without the second a list of tokens, in all its lengths, would crowd out the class that a conjunction needs.
    """
    found: dict[object, Candidate] = {}
    for clause in singles:
        (condition,) = clause.conditions
        match condition:
            case TokenAt(offset=place) | TokenOf(place=place) | ClassAt(offset=place):
                found.setdefault((type(condition), place), clause)
            case _:
                found.setdefault(type(condition), clause)
    return list(dict.fromkeys([*singles[:BEST], *list(found.values())[:BEAM]]))


def _left_over(grower: Grower, chosen: Sequence[Candidate]) -> list[Candidate]:
    """Return clauses grown from what the chosen ones leave over, and finer cuts of the last chosen one."""
    universe = grower.universe
    left = universe.all
    for clause in chosen:
        left = left & ~clause.bits
    n_above, f_above = (float(x) for x in universe.counts(universe.all & ~left))
    fresh = grower.grow(grower.root, [(Goal(n_above, f_above), 6)], within=left)
    for clause in fresh[:LEFT_OVER]:
        n, f = universe.counts(clause.bits & left)
        fresh += grower.grow(clause, [(Goal(floor=float(f / max(n, 1))), 1)], within=left)
    return fresh + grower.grow(chosen[-1], [(Goal(floor=chosen[-1].precision), 3)])


def _best(universe: Universe, chosen: Sequence[Candidate], pool: Sequence[Candidate]) -> tuple[Candidate, float]:
    """Return the clause of the pool that goes best with the chosen ones, and the average precision they reach."""
    scores = average_precisions(universe, chosen, pool)
    best = int(scores.argmax())
    return pool[best], float(scores[best])


def search_rules(
    data: SplitData,
    indices: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    context: TokenContext | None = None,
) -> list[Rule | None]:
    """Search a rule for every latent on the train split.

    None where the latent fires fewer than eight times in train text or nothing predicts it. ``progress`` is called
    with the number of latents done. The result depends on the data, the latent and ``seed`` alone.
    """
    shared = Shared(context_of(data, "train") if context is None else context)
    rules: list[Rule | None] = []
    for index in indices:
        (firings,) = data.firings([index], "train")
        flat, values = flat_firings(firings, shared.context)
        rule = None
        if MIN_FIRINGS <= len(flat) < shared.n:
            universe = Universe(shared, flat, stream(seed, firings.latent, "rules"))
            rule = _finish(_build(universe), shared.context, flat, values)
        rules.append(rule)
        if progress is not None:
            progress(len(rules))
    return rules


def _finish(chosen: Sequence[Candidate], context: TokenContext, flat: Array, values: Array) -> Rule | None:
    clauses = []
    for candidate in chosen:
        positions = clause_positions(candidate.conditions, context)
        _, hit = find_sorted(flat, positions)
        if hit.any():
            clauses.append(
                Clause(candidate.conditions, hit.sum() / len(positions), float(values[hit].sum()) / len(positions))
            )
    clauses.sort(key=lambda c: -c.precision)
    return Rule(tuple(clauses)) if clauses else None
