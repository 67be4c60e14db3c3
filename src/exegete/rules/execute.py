"""Run rules over token rows: which positions match, and with what score.

``TokenContext`` holds what all rules share (streams of tokens at each place, class and state bits, an index from token
to positions), each part made when first asked for. A rule then costs about as much as the positions of its rarest
condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, final

import numpy as np

from exegete.errors import InputError
from exegete.rules import states
from exegete.rules.classes import CLASS_BITS, vocabulary
from exegete.rules.language import (
    MAX_OFFSET,
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
from exegete.tokens import TokenTable
from exegete.types import Array

Place = int | str
Value = Literal["precision", "activation"]
PLACE_ORDER: tuple[Place, ...] = (*range(MAX_OFFSET + 1), "line", "break", "opener", "called")


@final
class TokenContext:
    """Rows of tokens prepared for rules. Positions are flat indices, row · length + column.

    ``tokens`` [n, length]; ``mask`` [n, length] bool, the positions that count (all when None); ``documents``
    [n, length] int, the document of every position, below 0 for none (one a row when None). A *text* is what a row
    holds of one document: rules are about documents, so every text is read as if it were a row of its own, whatever
    the subject could see of the texts before it. Raises InputError on token ids outside the table.
    """

    def __init__(
        self, tokens: Array, table: TokenTable, mask: Array | None = None, documents: Array | None = None
    ) -> None:
        if tokens.ndim != 2 or any(a is not None and a.shape != tokens.shape for a in (mask, documents)):
            raise InputError(
                f"rules run on token rows [n, length] with mask and documents of that shape, got {tokens.shape}"
            )
        if tokens.size and int(tokens.max()) >= len(table):
            raise InputError(f"token id {int(tokens.max())} lies outside the token table of {len(table)} tokens")
        self.table = table
        self.words = vocabulary(table)
        self.n, self.length = (int(s) for s in tokens.shape)
        self.size = self.n * self.length
        self.none = len(table)  # stands for "no token there"
        kind = np.uint16 if self.none < 2**16 else np.int32
        self.flat: Array = np.ascontiguousarray(tokens).reshape(-1).astype(kind)
        self.mask: Array | None = None if mask is None else np.ascontiguousarray(mask, bool).reshape(-1)
        self._begins = None if documents is None else _begins(documents)
        self._places: dict[Place, Array] = {0: self.flat}
        self._class_bits: dict[int, Array] = {}

    @cached_property
    def n_counted(self) -> int:
        """Positions that count."""
        return self.size if self.mask is None else int(np.count_nonzero(self.mask))

    @cached_property
    def counted(self) -> Array:
        """The flat positions that count, int64."""
        return np.arange(self.size) if self.mask is None else np.flatnonzero(self.mask)

    @cached_property
    def totals(self) -> Array:
        """How often each token stands at each place [places, ids + 1] float64, over the positions that count."""
        found = np.zeros((len(PLACE_ORDER), self.none + 1))
        for i, place in enumerate(PLACE_ORDER):
            found[i] = np.bincount(self.place(place)[self.counted], minlength=self.none + 1)
        found[:, self.none] = 0
        return found

    @cached_property
    def columns(self) -> Array:
        """Position in the row of every flat position [size] int32."""
        return np.tile(np.arange(self.length, dtype=np.int32), self.n)

    @cached_property
    def reach(self) -> Array:
        """How many tokens of its text lie before every flat position [size] int32."""
        if self._begins is None:
            return self.columns
        columns = self.columns.reshape(self.n, self.length)
        begun = np.maximum.accumulate(np.where(self._begins, columns, 0), axis=1)
        reach: Array = (columns - begun).reshape(-1)
        return reach

    def shifted(self, values: Array, offset: int, fill: int) -> Array:
        """Return ``values`` [size] as seen ``offset`` positions later, ``fill`` where that lies before the text."""
        if offset == 0:
            return values
        grid = values.reshape(self.n, self.length)
        moved = np.full_like(grid, fill)
        if offset < self.length:
            moved[:, offset:] = grid[:, : self.length - offset]
        flat: Array = moved.reshape(-1)
        if self._begins is not None:
            flat[self.reach < offset] = fill
        return flat

    def place(self, place: Place) -> Array:
        """Return the token at a place for every position [size]; ``none`` where there is none."""
        if place not in self._places:
            self._places[place] = self._make_place(place)
        return self._places[place]

    def _make_place(self, place: Place) -> Array:
        if isinstance(place, int):
            return self.shifted(self.flat, place, self.none)
        if place in ("opener", "called"):
            where = self._run[1] if place == "opener" else np.maximum(self._run[1] - 1, -1)
            inside = self._run[1] >= 0
            if place == "called":
                inside &= self.reach[self._run[1]] > 0
        else:
            at = np.arange(self.size, dtype=np.int64)
            last = np.maximum.accumulate(np.where(self.words.breaks[self.flat], at, -1))
            broken = np.concatenate([[-1], last[:-1]])[: self.size]  # the last line break before the position
            first = at - self.reach
            inside = broken >= first if place == "break" else np.ones(self.size, bool)
            where = np.maximum(broken, first - 1) + (place == "line")
        found = self.flat[np.where(inside, where, 0)] if self.size else self.flat
        return np.where(inside, found, np.array(self.none, self.flat.dtype))

    @cached_property
    def _run(self) -> tuple[Array, Array]:
        return states.automaton(self.table).run(self.flat, np.flatnonzero(self.reach == 0))

    def state_bits(self, after: bool) -> Array:
        """Return the state bits before or after each position's token [size] uint32."""
        return self._states_after if after else self._states_before

    @cached_property
    def _states_after(self) -> Array:
        bits = self._run[0].copy()
        open_now = states.unclosed(self.flat.reshape(self.n, self.length), self.table, self._begins).reshape(-1)
        bits |= open_now.astype(np.uint32) << np.uint32(states.STATE_BITS["unclosed"])
        return bits

    @cached_property
    def _states_before(self) -> Array:
        return self.shifted(self._states_after, 1, states.START_BITS)

    def class_bits(self, offset: int) -> Array:
        """Return the class bits of the token ``offset`` back [size] uint32; none before the text."""
        if offset not in self._class_bits:
            self._class_bits[offset] = self.shifted(self._classes, offset, 0) if offset else self._classes
        return self._class_bits[offset]

    @cached_property
    def _classes(self) -> Array:
        bits = self.words.classes[self.flat]
        joins = self.words.joins[self.flat]
        continued = joins & self.shifted(self.words.ends[self.flat], 1, 0)
        bits |= continued.astype(np.uint32) << np.uint32(CLASS_BITS["continuation"])
        starts = (bits >> np.uint32(CLASS_BITS["word"])) & np.uint32(1) & ~continued
        bits |= starts << np.uint32(CLASS_BITS["word_start"])
        return np.asarray(bits)

    @cached_property
    def index(self) -> tuple[Array, Array]:
        """Positions sorted by token, and where each token's positions start [ids + 2]."""
        order = np.argsort(self.flat, kind="stable")
        starts = np.zeros(self.none + 2, np.int64)
        np.cumsum(np.bincount(self.flat, minlength=self.none + 1), out=starts[1:])
        return order, starts

    def positions_of(self, tokens: Sequence[int]) -> Array:
        """Return all flat positions whose token is one of ``tokens``, sorted."""
        order, starts = self.index
        parts = [order[starts[t] : starts[t + 1]] for t in tokens if t < self.none]
        # stable sorting merges runs that are sorted already
        return np.sort(np.concatenate(parts), kind="stable") if parts else np.zeros(0, np.int64)

    def later(self, positions: Array, offset: int) -> Array:
        """Move sorted positions ``offset`` on, leaving out those that leave their text."""
        if offset == 0:
            return positions
        moved = positions + offset
        moved = moved[: np.searchsorted(moved, self.size)]
        inside: Array = moved[self.reach[moved] >= offset]
        return inside


def _begins(documents: Array) -> Array | None:
    """Return where in a row a document begins behind another [n, length] bool; None when no row holds two."""
    begins = np.zeros(documents.shape, bool)
    begins[:, 1:] = (documents[:, 1:] != documents[:, :-1]) & (documents[:, 1:] >= 0)
    return begins if begins.any() else None


def _lookup(context: TokenContext, tokens: Sequence[int]) -> Array:
    named = np.zeros(context.none + 1, bool)
    named[[t for t in tokens if t < context.none]] = True
    return named


def holds(condition: Condition, context: TokenContext, positions: Array | None = None) -> Array:
    """Whether a condition holds at flat ``positions`` (all when None), as bool."""

    def at(values: Array) -> Array:
        return values if positions is None else values[positions]

    match condition:
        case TokenAt():
            found = _lookup(context, condition.tokens)[at(context.place(condition.offset))]
        case TokenOf():
            found = _lookup(context, condition.tokens)[at(context.place(condition.place))]
        case TokenWithin():
            found = at(_within(condition, context))
        case ClassAt():
            found = at(context.class_bits(condition.offset)) >> np.uint32(CLASS_BITS[condition.name]) & 1 > 0
        case StateIs():
            found = at(context.state_bits(condition.after)) >> np.uint32(states.STATE_BITS[condition.name]) & 1 > 0
        case PositionIn():
            columns = at(context.columns)
            found = columns >= condition.low
            if condition.high is not None:
                found &= columns < condition.high
        case _:
            raise InputError(f"no such condition: {condition!r}")
    return ~found if condition.negated else found


def _within(condition: TokenWithin, context: TokenContext) -> Array:
    found = np.zeros(context.size, bool)
    positions = context.positions_of(condition.tokens)
    for offset in range(0 if condition.inclusive else 1, min(condition.window, context.length - 1) + 1):
        found[context.later(positions, offset)] = True
    return found


def clause_positions(conditions: Sequence[Condition], context: TokenContext) -> Array:
    """Return the sorted flat positions that count and at which every condition holds."""
    anchors = [c for c in conditions if isinstance(c, TokenAt) and not c.negated]
    if anchors:
        _, starts = context.index
        sizes = np.diff(starts)
        anchor = min(anchors, key=lambda c: int(sum(sizes[t] for t in c.tokens if t < context.none)))
        positions = context.later(context.positions_of(anchor.tokens), anchor.offset)
        rest = [c for c in conditions if c is not anchor]
    else:
        positions = np.flatnonzero(holds(conditions[0], context))
        rest = list(conditions[1:])
    if context.mask is not None:
        positions = positions[context.mask[positions]]
    for condition in rest:
        positions = positions[holds(condition, context, positions)]
    return positions


def ranked(rule: Rule) -> list[Clause]:
    """Return the clauses, most precise first (ties keep their order)."""
    return sorted(rule.clauses, key=lambda c: -c.precision)


def matches(rule: Rule, context: TokenContext, *, value: Value = "precision") -> tuple[Array, Array]:
    """Return the sorted flat positions at which any clause matches, and their scores (float32).

    The score is the precision, or with ``value="activation"`` the mean activation, of the most precise matching clause.
    """
    found = np.zeros(0, np.int64)
    scores = np.zeros(0, np.float32)
    for clause in ranked(rule):
        fresh = np.setdiff1d(clause_positions(clause.conditions, context), found, assume_unique=True)
        worth = clause.precision if value == "precision" else clause.mean
        found = np.concatenate([found, fresh])
        scores = np.concatenate([scores, np.full(len(fresh), worth, np.float32)])
        order = np.argsort(found, kind="stable")
        found, scores = found[order], scores[order]
    return found, scores


def read_alone(windows: Array, table: TokenTable) -> TokenContext:
    """Return windows, tokens [n, window], prepared for rules that see each of them by itself.

    Special tokens are read but do not count: nothing fires there, and no reader sees them.
    """
    return TokenContext(windows, table, ~table.is_special[windows])


def fitting(rule: Rule, context: TokenContext) -> Array:
    """Return which rows of ``context`` a rule fits [n] bool: those with a position that counts and scores above 0."""
    positions, scores = matches(rule, context)
    found = np.zeros(context.n, bool)
    found[positions[scores > 0] // context.length] = True
    return found


def execute(
    rules: Sequence[Rule],
    tokens: Array,
    table: TokenTable,
    mask: Array | None = None,
    *,
    documents: Array | None = None,
    value: Value = "precision",
) -> Array:
    """Run rules over rows [n, length]; return scores [rules, n, length] float32, 0 where no clause matches.

    Every row is read on its own from its first column, so windows may be given as rows, and where ``documents`` says
    that a row holds several, each of them on its own; positions that ``mask`` leaves out score 0 but are still read by
    later ones. For many rules over many rows use ``matches``, which never
    builds the dense array.
    """
    context = TokenContext(tokens, table, mask, documents)
    dense = np.zeros((len(rules), context.size), np.float32)
    for i, rule in enumerate(rules):
        positions, scores = matches(rule, context, value=value)
        dense[i, positions] = scores
    return dense.reshape(len(rules), context.n, context.length)
