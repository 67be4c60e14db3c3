"""Grow clauses for one latent: what to add to a clause, from counts over the positions where it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from exegete.rules.execute import PLACE_ORDER
from exegete.rules.language import (
    MAX_CONDITIONS,
    MAX_OFFSET,
    MAX_TOKENS,
    MAX_WINDOW,
    Condition,
    PositionIn,
    TokenAt,
    TokenOf,
    TokenWithin,
)
from exegete.rules.universe import FLAGS, Universe, unpack
from exegete.types import Array

PRIOR = 2.0  # positions of the surroundings' precision that every token count starts with
GRID = 6
TOKEN_BITS = 6.0  # going on with a list; kept high, since what few firings say of a token is seldom worth reading
CONDITION_BITS = 8.0  # naming a place, class, state or window
POSITION_BITS = 16.0
PLACES_TRIED = 3
MIN_HITS = 3.0
SHORTER = (1, 2, 3, 4, 6, 8, 10)
_NEGATED = [replace(flag, negated=True) for flag in FLAGS]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Conditions with the packed bits of where they hold, and weighted positions ``n`` and firings ``f`` there."""

    conditions: tuple[Condition, ...]
    bits: Array
    n: float
    f: float

    @property
    def precision(self) -> float:
        """Firings over positions."""
        return self.f / self.n if self.n else 0.0


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """What growing looks for: f · ((f_above + f) / (n_above + n) − floor).

    That is the average precision (times all firings) that a block of n positions and f firings adds below blocks of
    n_above and f_above, or, with a floor, gains by being split off from a block of precision ``floor``.
    """

    n_above: float = 0.0
    f_above: float = 0.0
    floor: float = 0.0

    def value(self, n: Array, f: Array) -> Array:
        """Return the worth of blocks."""
        worth: Array = f * ((self.f_above + f) / np.maximum(self.n_above + n, 1e-9) - self.floor)
        return worth


@final
@dataclass(frozen=True, slots=True)
class _Proposal:
    """A condition to add, the family it varies, and the positions and firings that it would leave."""

    condition: Condition
    family: tuple[object, ...]
    n: float
    f: float


@final
@dataclass(frozen=True, slots=True)
class _Room:
    """The positions that counting is restricted to: indices, those that fire, weights, and the totals."""

    bits: Array
    at: Array
    fired: Array
    weight: Array
    n: float
    f: float


def gain_bits(n: Array, f: Array, surroundings: float) -> Array:
    """Bits saved by coding n positions with f firings at their own rate instead of the rate around them."""
    p = np.clip((f + PRIOR * surroundings) / (n + PRIOR), 1e-9, 1 - 1e-9)
    q = min(max(surroundings, 1e-9), 1 - 1e-9)
    saved: Array = f * np.log2(p / q) + (n - f) * np.log2((1 - p) / (1 - q))
    return saved


def token_sets(
    total: Array, hit: Array, around: tuple[float, float], negated: bool
) -> list[tuple[Array, float, float]]:
    """Return the best sets of at most twelve tokens at every trade of precision against recall.

    ``total`` and ``hit`` [ids]: positions and firings by token, within positions and firings ``around``. A set comes
    with its positions and firings, shrunk towards the rate around; tokens stand most telling first.
    """
    n_all, f_all = around
    q = f_all / n_all
    ids = np.flatnonzero((hit < q * total) if negated else (hit > q * total))
    n, h = total[ids], hit[ids]
    saved = gain_bits(n, h, q)
    paying = saved > math.log2(len(total)) + TOKEN_BITS
    if not paying.any():
        return []
    ids, n, h, saved = ids[paying], n[paying], h[paying], saved[paying]
    p = (h + PRIOR * q) / (n + PRIOR)
    f = p * n
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
    found: list[tuple[Array, float, float]] = []
    seen: set[tuple[float, float]] = set()
    for g in range(GRID):
        key = (float(n_set[g]), float(f_set[g]))
        if taken[g].any() and key not in seen:
            seen.add(key)
            chosen = best[g][taken[g]]
            chosen = chosen[np.argsort(-saved[chosen], kind="stable")]
            found.append((ids[chosen], *key))
    return found


def average_precisions(universe: Universe, chosen: Sequence[Candidate], more: Sequence[Candidate]) -> Array:
    """Average precision of the rules ``chosen`` plus each one of ``more``, from counts."""
    ranks = sorted(chosen, key=lambda c: -c.precision)
    left = universe.all
    regions = []
    for clause in ranks:
        regions.append(clause.bits & left)
        left = left & ~clause.bits
    regions.append(left)
    cut = np.stack(regions)
    n_region, f_region = universe.counts(cut)
    bits = np.stack([c.bits for c in more])
    n, f = universe.counts(bits[:, None] & cut)  # [more, regions]
    precision = np.array([c.precision for c in more])
    # a region stays above a clause when its own clause is at least as precise
    above = np.array([[r.precision >= p for r in ranks] + [False] for p in precision])
    taken_n, taken_f = np.where(above, 0, n), np.where(above, 0, f)
    sizes = np.concatenate([n_region - taken_n, taken_n.sum(axis=1, keepdims=True)], axis=1)
    hits = np.concatenate([f_region - taken_f, taken_f.sum(axis=1, keepdims=True)], axis=1)
    place = above.sum(axis=1)
    order = np.argsort(
        np.where(np.arange(sizes.shape[1]) == len(regions), place[:, None] - 0.5, np.arange(sizes.shape[1]))
    )
    sizes, hits = np.take_along_axis(sizes, order, axis=1), np.take_along_axis(hits, order, axis=1)
    running = np.cumsum(hits, axis=1) / np.maximum(np.cumsum(sizes, axis=1), 1e-9)
    scores: Array = (hits * running).sum(axis=1) / hits.sum(axis=1)
    return scores


@final
class Grower:
    """Proposes conditions for one latent."""

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        n, f = universe.counts(universe.all)
        self.root = Candidate((), universe.all, float(n), float(f))

    def candidate(self, conditions: tuple[Condition, ...], bits: Array) -> Candidate:
        """Return conditions that hold at ``bits`` as a clause."""
        n, f = self.universe.counts(bits)
        return Candidate(conditions, bits, float(n), float(f))

    def grow(
        self, clause: Candidate, goals: Sequence[tuple[Goal, int]], sets: int = 1, within: Array | None = None
    ) -> list[Candidate]:
        """Return the clauses with one more condition that serve each goal best, as many as stand beside the goal.

        ``within`` restricts what is counted (say, to what other clauses leave over), not what the clauses match;
        ``sets`` is how many token sets of one place may be returned for a goal.
        """
        room = self._room(clause.bits if within is None else clause.bits & within)
        if room.f < MIN_HITS or len(clause.conditions) >= MAX_CONDITIONS:
            return []
        proposals = self._proposals(room, clause.conditions)
        if not proposals:
            return []
        n, f = np.array([p.n for p in proposals]), np.array([p.f for p in proposals])
        found: dict[Condition, None] = {}
        for goal, width in goals:
            values = goal.value(n, f)
            used: dict[tuple[object, ...], int] = {}
            taken = 0
            for i in np.argsort(-values, kind="stable"):
                family = proposals[i].family
                if taken == width or values[i] <= 0:
                    break
                if used.get(family, 0) < sets:
                    used[family] = used.get(family, 0) + 1
                    found[proposals[i].condition] = None
                    taken += 1
        return [
            self.candidate((*clause.conditions, c), clause.bits & self.universe.bits(c))
            for c in found
            if c not in clause.conditions
        ]

    def variants(self, clause: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """Return the clause with the tokens of one condition chosen anew, given its other conditions.

        Positions that more precise clauses among ``others`` take anyway are not counted.
        """
        free = self.universe.all
        for other in others:
            if other.precision > clause.precision:
                free = free & ~other.bits
        found = []
        for i, condition in enumerate(clause.conditions):
            if not isinstance(condition, TokenAt | TokenOf):
                continue
            rest = (*clause.conditions[:i], *clause.conditions[i + 1 :])
            bits = self.universe.all
            for other_condition in rest:
                bits = bits & self.universe.bits(other_condition)
            room = self._room(bits & free)
            if room.f < MIN_HITS:
                continue
            place = PLACE_ORDER.index(condition.offset if isinstance(condition, TokenAt) else condition.place)
            total, hit = self._count(room, slice(place, place + 1))
            for tokens, _, _ in token_sets(total[0], hit[0], (room.n, room.f), condition.negated):
                changed = replace(condition, tokens=tuple(int(t) for t in tokens))
                conditions = (*clause.conditions[:i], changed, *clause.conditions[i + 1 :])
                found.append(self.candidate(conditions, bits & self.universe.bits(changed)))
        return found

    def simpler(self, clause: Candidate) -> list[Candidate]:
        """Return the clause without one of its conditions, or with a shorter list of tokens in one of them."""
        found = []
        for i, condition in enumerate(clause.conditions):
            rest = (*clause.conditions[:i], *clause.conditions[i + 1 :])
            bits = self.universe.all
            for other in rest:
                bits = bits & self.universe.bits(other)
            if rest:
                found.append(self.candidate(rest, bits))
            if isinstance(condition, TokenAt | TokenOf | TokenWithin):
                for length in SHORTER:
                    if length < len(condition.tokens):
                        changed = replace(condition, tokens=condition.tokens[:length])
                        conditions = (*clause.conditions[:i], changed, *clause.conditions[i + 1 :])
                        found.append(self.candidate(conditions, bits & self.universe.bits(changed)))
        return found

    def _room(self, bits: Array) -> _Room:
        at = np.flatnonzero(unpack(bits))
        n, f = self.universe.counts(bits)
        fired = at[: int(np.searchsorted(at, self.universe.split))]
        return _Room(bits, at, fired, self.universe.weight[at], float(n), float(f))

    def _count(self, room: _Room, places: slice) -> tuple[Array, Array]:
        """Return positions and firings by place and token [places, ids] in a room."""
        universe = self.universe
        ids = universe.shared.ids
        codes = universe.codes[places]
        shape = (len(codes), ids)
        first = (places.start or 0) * ids
        hit = np.bincount((codes[:, room.fired] - first).ravel(), minlength=shape[0] * ids) * universe.weights[0]
        hit = hit.reshape(shape)
        hit[:, -1] = 0  # the last id stands for "no token there"
        if len(room.at) == universe.n_valid:
            return np.maximum(universe.shared.totals[places], hit), hit
        weights = np.broadcast_to(room.weight, (shape[0], len(room.at)))
        total = np.bincount((codes[:, room.at] - first).ravel(), weights=weights.ravel(), minlength=shape[0] * ids)
        total = total.reshape(shape)
        total[:, -1] = 0
        return total, hit

    def _proposals(self, room: _Room, conditions: tuple[Condition, ...]) -> list[_Proposal]:
        around = (room.n, room.f)
        total, hit = self._count(room, slice(0, len(PLACE_ORDER)))
        used = [c.offset for c in conditions if isinstance(c, TokenAt)]
        found: list[_Proposal] = []
        for negated in (False, True) if conditions else (False,):
            for i in _telling(total, hit, around, negated, used):
                for tokens, n, f in token_sets(total[i], hit[i], around, negated):
                    left = (room.n - n, room.f - f) if negated else (n, f)
                    found.append(_Proposal(_token_condition(i, tokens, negated), (i, negated), *left))
        return found + self._flags(room) + self._positions(room) + self._near(room, total, hit, 1 if conditions else 2)

    def _flags(self, room: _Room) -> list[_Proposal]:
        n, f = self.universe.counts(self.universe.flags & room.bits)
        found = []
        for negated in (False, True):
            m, g = (room.n - n, room.f - f) if negated else (n, f)
            paying = (gain_bits(m, g, room.f / room.n) > CONDITION_BITS) & (m > 0) & (m < room.n)
            for i in np.flatnonzero(paying):
                condition = _NEGATED[i] if negated else FLAGS[i]
                found.append(_Proposal(condition, (int(i), negated, "flag"), float(m[i]), float(g[i])))
        return found

    def _positions(self, room: _Room) -> list[_Proposal]:
        universe = self.universe
        length = universe.shared.context.length
        total = np.cumsum(np.bincount(universe.columns[room.at], weights=room.weight, minlength=length))[:-1]
        hit = np.cumsum(np.bincount(universe.columns[room.fired], minlength=length))[:-1] * universe.weights[0]
        if not len(total):
            return []
        found = []
        for early in (True, False):
            m, g = (total, hit) if early else (room.n - total, room.f - hit)
            saved = np.where(g * room.n > room.f * m, gain_bits(m, g, room.f / room.n), 0.0)
            k = int(saved.argmax())
            if saved[k] > POSITION_BITS:
                condition = PositionIn(0, k + 1) if early else PositionIn(k + 1, None)
                found.append(_Proposal(condition, ("position", early), float(m[k]), float(g[k])))
        return found

    def _near(self, room: _Room, total: Array, hit: Array, limit: int) -> list[_Proposal]:
        """Propose tokens within a window: tokens by their counts over near offsets, windows by trying all."""
        spread = (room.n * MAX_OFFSET, room.f * MAX_OFFSET)
        near_total, near_hit = total[1 : MAX_OFFSET + 1].sum(axis=0), hit[1 : MAX_OFFSET + 1].sum(axis=0)
        families = token_sets(near_total, near_hit, spread, False)
        families.sort(key=lambda s: -s[2] * (s[2] / s[1] - room.f / room.n))
        fires = room.weight * (room.at < self.universe.split)
        found = []
        for tokens in _distinct([tokens for tokens, _, _ in families], limit):
            named = tuple(int(t) for t in tokens)
            back = np.minimum(self.universe.distance(named, room.at), MAX_WINDOW + 1)
            here = np.isin(self.universe.places[0, room.at], tokens)
            cost = CONDITION_BITS + len(tokens) * math.log2(self.universe.shared.ids)
            for inclusive in (False, True):
                far = np.where(here, 1, back) if inclusive else back
                m = np.cumsum(np.bincount(far, weights=room.weight, minlength=MAX_WINDOW + 2))
                g = np.cumsum(np.bincount(far, weights=fires, minlength=MAX_WINDOW + 2))
                for negated in (False, True):
                    n, f = (room.n - m, room.f - g) if negated else (m, g)
                    q = room.f / room.n
                    saved = np.where(n < room.n, gain_bits(n, f, q), 0.0)
                    saved[[0, 1, -1]] = 0.0
                    for worth in (saved, f * f / np.maximum(n, 1e-9), f * (f / np.maximum(n, 1e-9) - q)):
                        w = int(np.where(saved > cost, worth, -np.inf).argmax())
                        if saved[w] > cost:
                            condition = TokenWithin(w, named, inclusive, negated)
                            found.append(_Proposal(condition, ("near", negated), float(n[w]), float(f[w])))
        return found


def _telling(total: Array, hit: Array, around: tuple[float, float], negated: bool, used: Sequence[int]) -> list[int]:
    """Return the places whose tokens tell most, by the bits that the best twelve tokens of each place save."""
    n_all, f_all = around
    q = f_all / n_all
    places, ids = np.nonzero((hit < q * total) if negated else (hit > q * total))
    bits = gain_bits(total[places, ids], hit[places, ids], q) - math.log2(total.shape[1]) - TOKEN_BITS
    keep = bits > 0
    places, bits = places[keep], bits[keep]
    order = np.lexsort((-bits, places))
    places, bits = places[order], bits[order]
    rank = np.arange(len(places)) - np.searchsorted(places, places)
    worth = np.bincount(places, weights=bits * (rank < MAX_TOKENS), minlength=len(total))
    worth[list(used)] = 0  # places 0…8 are the offsets themselves
    return [int(i) for i in np.argsort(-worth, kind="stable")[:PLACES_TRIED] if worth[i] > 0]


def _token_condition(place: int, tokens: Array, negated: bool) -> Condition:
    named = tuple(int(t) for t in tokens)
    where = PLACE_ORDER[place]
    return TokenAt(where, named, negated) if isinstance(where, int) else TokenOf(where, named, negated)


def _distinct(sets: Sequence[Array], limit: int) -> list[Array]:
    found: list[Array] = []
    for tokens in sets:
        if all(len(np.intersect1d(tokens, other)) < len(tokens) for other in found):
            found.append(tokens)
        if len(found) == limit:
            break
    return found
