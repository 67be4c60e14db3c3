"""Find the rule that best predicts where a latent fires, on train text alone.

Growing: within the positions of a clause (at first: all), the search counts for every place and token, and for every
class and state, how often the latent fires; from the counts it takes, per place, the sets of at most twelve tokens
with the most ``hits − λ · positions`` over a grid of λ, which are the best sets at every trade of precision against
recall. A token must pay for its own description in bits, a condition for its own. Clauses grown so, singly, refined by
a second and third condition, and from what earlier clauses leave over, form a pool. Rules of up to three clauses are
put together from the pool by the average precision they reach on train text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from exegete.rules.evaluate import average_precision_of_blocks, context_of, find_sorted, flat_firings
from exegete.rules.execute import PLACE_ORDER, TokenContext, clause_positions
from exegete.rules.language import (
    MAX_CLAUSES,
    MAX_CONDITIONS,
    MAX_OFFSET,
    MAX_TOKENS,
    MAX_WINDOW,
    ClassAt,
    Clause,
    Condition,
    PositionIn,
    Rule,
    StateIs,
    TokenAt,
    TokenOf,
    TokenWithin,
)
from exegete.rules.universe import FLAGS, Shared, Universe, unpack
from exegete.streams import stream
from exegete.types import Array
from exegete.views import SplitData

MIN_FIRINGS = 8
PRIOR = 2.0  # positions of the surroundings' precision that every token count starts with
GRID = 8
BEAM = 8
POOL = 48
CONDITION_BITS = 8.0  # which place, class, state or window


@final
@dataclass(frozen=True, slots=True)
class _Candidate:
    """Conditions with the packed bits of where they hold, and weighted positions ``n`` and firings ``f`` there."""

    conditions: tuple[Condition, ...]
    bits: Array
    n: float
    f: float

    @property
    def precision(self) -> float:
        return self.f / self.n if self.n else 0.0


@final
@dataclass(frozen=True, slots=True)
class _Goal:
    """What growing looks for: f · ((fc + f) / (nc + n) − floor).

    That is the average precision (times all firings) that a block of n positions and f firings adds below blocks of nc
    and fc, or, with a floor, gains by being split off from a block of precision ``floor`` and put above it.
    """

    n_above: float = 0.0
    f_above: float = 0.0
    floor: float = 0.0

    def value(self, n: Array, f: Array) -> Array:
        return f * ((self.f_above + f) / np.maximum(self.n_above + n, 1e-9) - self.floor)


def _gain_bits(n: Array, f: Array, surroundings: float) -> Array:
    """Bits saved by coding n positions with f firings at their own rate instead of the rate around them."""
    p = np.clip((f + PRIOR * surroundings) / (n + PRIOR), 1e-9, 1 - 1e-9)
    q = min(max(surroundings, 1e-9), 1 - 1e-9)
    return f * np.log2(p / q) + (n - f) * np.log2((1 - p) / (1 - q))


def _token_sets(
    total: Array, hit: Array, around: tuple[float, float], goal: _Goal, negated: bool
) -> list[tuple[float, Array]]:
    """Return (value, tokens most telling first) of the best sets for a goal, best first.

    ``total`` and ``hit`` [ids]: positions and firings by token within positions and firings ``around``.
    """
    n_all, f_all = around
    q = f_all / n_all
    ids = np.flatnonzero(total > 0 if negated else hit > 0)
    n = total[ids]
    f = (hit[ids] + PRIOR * q) / (n + PRIOR) * n
    p = f / n
    paying = (_gain_bits(n, hit[ids], q) > math.log2(len(total)) + 1) & ((p < q) if negated else (p > q))
    ids, n, f, p = ids[paying], n[paying], f[paying], p[paying]
    if not len(ids):
        return []
    if negated:
        grid = np.geomspace(max(q, 1e-6), max(1.0 - 1e-6, q), GRID)
        worth = grid[:, None] * n - f
    else:
        low, high = max(q, p.min() / 2), p.max() * 0.97
        grid = np.geomspace(min(low, high), max(low, high), GRID)
        worth = f - grid[:, None] * n
    best = np.argsort(-worth, axis=1, kind="stable")[:, :MAX_TOKENS]
    taken = np.take_along_axis(worth, best, axis=1) > 0
    n_set, f_set = (n[best] * taken).sum(axis=1), (f[best] * taken).sum(axis=1)
    values = goal.value(n_all - n_set, f_all - f_set) if negated else goal.value(n_set, f_set)
    found: list[tuple[float, Array]] = []
    seen: set[bytes] = set()
    for g in np.argsort(-values, kind="stable"):
        chosen = best[g][taken[g]]
        chosen = chosen[np.argsort(p[chosen] if negated else -p[chosen], kind="stable")]
        key = np.sort(chosen).tobytes()
        if len(chosen) and key not in seen:
            seen.add(key)
            found.append((float(values[g]), ids[chosen]))
    return found


def _telling(
    total: Array, hit: Array, around: tuple[float, float], negated: bool, used: Sequence[int], limit: int = 4
) -> list[int]:
    """Return the places whose tokens tell most, by the bits that the best twelve tokens of each place save."""
    n_all, f_all = around
    q = f_all / n_all
    wanted = (total * q > hit) if negated else (hit > q * total)
    places, ids = np.nonzero(wanted)
    bits = _gain_bits(total[places, ids], hit[places, ids], q) - math.log2(total.shape[1]) - 1
    keep = bits > 0
    places, bits = places[keep], bits[keep]
    order = np.lexsort((-bits, places))
    places, bits = places[order], bits[order]
    rank = np.arange(len(places)) - np.searchsorted(places, places)
    worth = np.bincount(places, weights=bits * (rank < MAX_TOKENS), minlength=len(total))
    worth[list(used)] = 0  # places 0…8 are the offsets themselves
    return [int(i) for i in np.argsort(-worth, kind="stable")[:limit] if worth[i] > 0]


def _token_condition(place: int, tokens: Array, negated: bool) -> Condition:
    named = tuple(int(t) for t in tokens)
    where = PLACE_ORDER[place]
    return TokenAt(where, named, negated) if isinstance(where, int) else TokenOf(where, named, negated)


@final
class _Grower:
    """Proposes conditions for one latent."""

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        everything = universe.all
        n, f = universe.counts(everything)
        self.root = _Candidate((), everything, float(n), float(f))

    def with_condition(self, clause: _Candidate, condition: Condition) -> _Candidate:
        """Return the clause with one more condition."""
        bits = clause.bits & self.universe.bits(condition)
        n, f = self.universe.counts(bits)
        return _Candidate((*clause.conditions, condition), bits, float(n), float(f))

    def grow(
        self, clause: _Candidate, goals: Sequence[tuple[_Goal, int]], sets: int = 1, within: Array | None = None
    ) -> list[_Candidate]:
        """Return the clauses with one more condition that serve each goal best, as many as stand beside the goal.

        ``within`` restricts what is counted (say, to what other clauses leave over), not what the clauses match.
        """
        universe = self.universe
        room = clause.bits if within is None else clause.bits & within
        n_all, f_all = (float(x) for x in universe.counts(room))
        if f_all < 3 or n_all <= 0 or len(clause.conditions) >= MAX_CONDITIONS:
            return []
        around = (n_all, f_all)
        at = np.flatnonzero(unpack(room))
        fired = at[: int(np.searchsorted(at, universe.split))]
        weight = universe.weight[at]
        total, hit = self._count(at, fired, weight, everywhere=room is universe.all)
        used = [c.offset for c in clause.conditions if isinstance(c, TokenAt)]
        telling = [
            (i, negated)
            for negated in ((False, True) if clause.conditions else (False,))
            for i in _telling(total, hit, around, negated, used)
        ]
        near = self._near(total, hit, at, weight, around)
        flags = universe.counts(universe.flags & room)
        found: dict[Condition, None] = {}
        for goal, width in goals:
            proposals: list[tuple[float, Condition]] = []
            for i, negated in telling:
                for value, tokens in _token_sets(total[i], hit[i], around, goal, negated)[:sets]:
                    proposals.append((value, _token_condition(i, tokens, negated)))
            proposals += _best_flags(flags, around, goal)
            proposals += self._positions(at, fired, weight, around, goal)
            proposals += _best_windows(near, around, goal, universe.shared.ids)
            proposals.sort(key=lambda p: -p[0])
            found.update((c, None) for value, c in proposals[:width] if value > 0)
        return [self.with_condition(clause, c) for c in found]

    def _count(self, at: Array, fired: Array, weight: Array, everywhere: bool) -> tuple[Array, Array]:
        """Return positions and firings by place and token [places, ids] at the indices ``at`` and ``fired``."""
        universe = self.universe
        ids = universe.shared.ids
        shape = (len(PLACE_ORDER), ids)
        hit = np.bincount(universe.codes[:, fired].ravel(), minlength=shape[0] * ids) * universe.weights[0]
        hit = hit.reshape(shape)
        hit[:, -1] = 0  # the last id stands for "no token there"
        if everywhere:
            return np.maximum(universe.shared.totals, hit), hit
        weights = np.broadcast_to(weight, (shape[0], len(at)))
        total = np.bincount(universe.codes[:, at].ravel(), weights=weights.ravel(), minlength=shape[0] * ids)
        total = total.reshape(shape)
        total[:, -1] = 0
        return total, hit

    def _positions(
        self, at: Array, fired: Array, weight: Array, around: tuple[float, float], goal: _Goal
    ) -> list[tuple[float, Condition]]:
        length = self.universe.shared.context.length
        total = np.cumsum(np.bincount(self.universe.columns[at], weights=weight, minlength=length))[:-1]
        hit = np.cumsum(np.bincount(self.universe.columns[fired], minlength=length))[:-1] * self.universe.weights[0]
        if not len(total):
            return []
        n_all, f_all = around
        found: list[tuple[float, Condition]] = []
        for early in (True, False):
            m, g = (total, hit) if early else (n_all - total, f_all - hit)
            values = np.where(_gain_bits(m, g, f_all / n_all) > CONDITION_BITS + 8, goal.value(m, g), 0.0)
            k = int(values.argmax())
            if values[k] > 0:
                found.append((float(values[k]), PositionIn(0, k + 1) if early else PositionIn(k + 1, None)))
        return found

    def _near(
        self, total: Array, hit: Array, at: Array, weight: Array, around: tuple[float, float]
    ) -> list[tuple[tuple[int, ...], bool, Array, Array]]:
        """Return (tokens, inclusive, positions, firings by distance back) of the tokens most telling when near."""
        n_all, f_all = around
        spread = (n_all * MAX_OFFSET, f_all * MAX_OFFSET)
        near_total, near_hit = total[1 : MAX_OFFSET + 1].sum(axis=0), hit[1 : MAX_OFFSET + 1].sum(axis=0)
        proposals = _token_sets(near_total, near_hit, spread, _Goal(floor=f_all / n_all), False)
        fires = weight * (at < self.universe.split)
        found = []
        for tokens in _distinct([tokens for _, tokens in proposals], 2):
            named = tuple(int(t) for t in tokens)
            back = np.minimum(self.universe.distance(named, at), MAX_WINDOW + 1)
            here = np.isin(self.universe.places[0, at], tokens)
            for inclusive in (False, True):
                far = np.where(here, 1, back) if inclusive else back
                m = np.cumsum(np.bincount(far, weights=weight, minlength=MAX_WINDOW + 2))
                g = np.cumsum(np.bincount(far, weights=fires, minlength=MAX_WINDOW + 2))
                found.append((named, inclusive, m, g))
        return found


def _best_flags(counts: tuple[Array, Array], around: tuple[float, float], goal: _Goal) -> list[tuple[float, Condition]]:
    n_all, f_all = around
    n, f = counts
    found: list[tuple[float, Condition]] = []
    for negated in (False, True):
        m, g = (n_all - n, f_all - f) if negated else (n, f)
        values = np.where(_gain_bits(m, g, f_all / n_all) > CONDITION_BITS, goal.value(m, g), 0.0)
        for i in np.argsort(-values, kind="stable")[:6]:
            if 0 < m[i] < n_all and values[i] > 0:
                found.append((float(values[i]), _negate(FLAGS[i]) if negated else FLAGS[i]))
    return found


def _best_windows(
    near: Sequence[tuple[tuple[int, ...], bool, Array, Array]], around: tuple[float, float], goal: _Goal, ids: int
) -> list[tuple[float, Condition]]:
    n_all, f_all = around
    found: list[tuple[float, Condition]] = []
    for tokens, inclusive, m, g in near:
        cost = CONDITION_BITS + len(tokens) * math.log2(ids)
        for negated in (False, True):
            n, f = (n_all - m, f_all - g) if negated else (m, g)
            values = np.where(_gain_bits(n, f, f_all / n_all) > cost, goal.value(n, f), 0.0)
            w = int(values[2 : MAX_WINDOW + 1].argmax()) + 2
            if values[w] > 0:
                found.append((float(values[w]), TokenWithin(w, tokens, inclusive, negated)))
    return found


def _negate(condition: ClassAt | StateIs) -> Condition:
    return replace(condition, negated=True)


def _distinct(sets: Sequence[Array], limit: int) -> list[Array]:
    found: list[Array] = []
    for tokens in sets:
        if all(len(np.intersect1d(tokens, other)) < len(tokens) for other in found):
            found.append(tokens)
        if len(found) == limit:
            break
    return found


def average_precision_of(clauses: Sequence[_Candidate], universe: Universe) -> float:
    """Average precision of a rule made of these clauses, from counts."""
    left = universe.all
    sizes: list[float] = []
    hits: list[float] = []
    for clause in sorted(clauses, key=lambda c: -c.precision):
        n, f = universe.counts(clause.bits & left)
        left = left & ~clause.bits
        sizes.append(float(n))
        hits.append(float(f))
    n, f = universe.counts(left)
    return average_precision_of_blocks(np.array([*sizes, float(n)]), np.array([*hits, float(f)]))


def _length_bits(clause: _Candidate, ids: int) -> float:
    tokens = sum(len(c.tokens) for c in clause.conditions if isinstance(c, TokenAt | TokenOf | TokenWithin))
    return CONDITION_BITS * len(clause.conditions) + tokens * math.log2(ids)


def _build(universe: Universe) -> list[_Candidate]:
    grower = _Grower(universe)
    root = grower.root
    singles = grower.grow(root, [(_Goal(), 24)], sets=3)
    if not singles:
        return []
    pool = list(singles)
    level = singles[:BEAM]
    for width in (3, 2):
        refined = []
        for clause in level:
            refined += grower.grow(clause, [(_Goal(floor=clause.precision), width), (_Goal(), 1)])
        pool += refined
        level = sorted(refined, key=lambda c: -c.f * c.precision)[: BEAM // 2]
    chosen: list[_Candidate] = []
    score = 0.0
    while len(chosen) < MAX_CLAUSES:
        if chosen:
            left = universe.all
            for clause in chosen:
                left = left & ~clause.bits
            n_above, f_above = (float(x) for x in universe.counts(universe.all & ~left))
            fresh = grower.grow(root, [(_Goal(n_above, f_above), 6)], within=left)
            for clause in fresh[:3]:
                n, f = universe.counts(clause.bits & left)
                fresh += grower.grow(clause, [(_Goal(floor=float(f / max(n, 1))), 1)], within=left)
            fresh += grower.grow(chosen[-1], [(_Goal(floor=chosen[-1].precision), 3)])
            pool += fresh
        scored = [(average_precision_of([*chosen, c], universe), i) for i, c in enumerate(pool)]
        best, i = max(scored, key=lambda s: (s[0], -s[1]))
        if best <= score + 1e-3:
            break
        chosen.append(pool[i])
        score = best
    for _ in range(2):
        for k in range(len(chosen)):
            rest = chosen[:k] + chosen[k + 1 :]
            scored = [(average_precision_of([*rest, c], universe), i) for i, c in enumerate(pool)]
            best, i = max(scored, key=lambda s: (s[0], -s[1]))
            if best > score + 1e-4:
                chosen, score = [*rest, pool[i]], best
    return chosen


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


def _finish(chosen: Sequence[_Candidate], context: TokenContext, flat: Array, values: Array) -> Rule | None:
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
