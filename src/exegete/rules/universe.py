"""One latent's positions, laid out for searching: its firings, the silent positions most like them, and the rest.

A search never looks at a dense latents × tokens table. It keeps all firings of a latent (up to a limit), the silent
positions that share the tell-tale tokens, and a random draw from all others that stands for them by weight. Conditions
become packed bits over these positions, so that conjunctions, unions and counts are AND, OR and popcount.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.rules import states
from exegete.rules.classes import CLASS_BITS
from exegete.rules.evaluate import find_sorted
from exegete.rules.execute import PLACE_ORDER, Place, TokenContext
from exegete.rules.language import (
    MAX_WINDOW,
    ClassAt,
    Condition,
    PositionIn,
    StateIs,
    TokenAt,
    TokenOf,
    TokenWithin,
)
from exegete.types import Array

MAX_FIRINGS = 16_000
HARD = (16_000, 8_000)  # silent positions taken around the tell-tale tokens of the best and second-best place
REST = 12_000
CLASS_OFFSETS = 3
WORD = 64  # bits that popcounts work on


@final
class Shared:
    """What the latents of one coder share: the train rows and how often each token stands at each place."""

    def __init__(self, context: TokenContext) -> None:
        self.context = context
        self.n = context.n_counted
        self.base_mask = np.ones(context.size, bool) if context.mask is None else context.mask
        self.counted = context.counted
        self.ids = context.none + 1
        self.totals = context.totals


def flag_conditions() -> list[ClassAt | StateIs]:
    """Return every condition without tokens that the search tries, in the order of ``Universe.flags``."""
    classes: list[ClassAt | StateIs] = [ClassAt(offset, name) for offset in range(CLASS_OFFSETS) for name in CLASS_BITS]
    return [*classes, *(StateIs(name, after) for after in (False, True) for name in states.STATE_BITS)]


FLAGS = flag_conditions()


@final
class Universe:
    """The positions of one latent as three segments (firings, hard, rest), each padded to whole 64-bit words."""

    def __init__(self, shared: Shared, fired: Array, generator: np.random.Generator) -> None:
        self.shared = shared
        context = shared.context
        self.n_firings = float(len(fired))
        self.n_positions = float(shared.n)
        self.base = self.n_firings / self.n_positions
        kept = fired
        if len(fired) > MAX_FIRINGS:
            kept = np.sort(generator.choice(fired, MAX_FIRINGS, replace=False))
        hard = self._hard(fired, kept, generator)
        draw = shared.counted
        if len(draw) > 2 * REST:
            draw = np.unique(draw[generator.integers(0, len(draw), 2 * REST)])
        draw = draw[~find_sorted(draw, fired)[1]]
        rest = draw[~find_sorted(draw, hard)[1]]
        remaining = shared.n - len(fired) - len(hard)
        self.weights = (
            len(fired) / max(len(kept), 1),
            1.0,
            remaining / len(rest) if len(rest) else 0.0,
        )
        self.segments: list[slice] = []
        parts = []
        begun = 0
        for part in (kept, hard, rest):
            padded = -(-len(part) // WORD) * WORD
            parts.append(np.concatenate([part, np.full(padded - len(part), -1, np.int64)]))
            self.segments.append(slice(begun // WORD, (begun + padded) // WORD))
            begun += padded
        flat = np.concatenate(parts)
        self.valid = flat >= 0
        self.flat = np.where(self.valid, flat, 0)
        self.split = len(parts[0])  # firings lie before
        self.weight = np.repeat(np.array(self.weights), [len(p) for p in parts]) * self.valid
        self.all = pack(self.valid)
        self.n_valid = int(np.count_nonzero(self.valid))
        self.places = np.stack([context.place(p)[self.flat] for p in PLACE_ORDER]).astype(np.int64)
        self.codes = self.places + np.arange(len(PLACE_ORDER))[:, None] * shared.ids
        self.columns = context.columns[self.flat]
        self.reach = context.reach[self.flat]
        self._flags: Array | None = None

    def _hard(self, fired: Array, kept: Array, generator: np.random.Generator) -> Array:
        """Return silent positions around the tokens that tell most, at the two places that tell most."""
        context, shared = self.shared.context, self.shared
        scale = len(fired) / len(kept)
        tables = []
        for i, place in enumerate(PLACE_ORDER):
            hit = np.bincount(context.place(place)[kept], minlength=shared.ids)[: context.none] * scale
            total = shared.totals[i, : context.none]
            precision = (hit + 2 * self.base) / (total + 2)
            tables.append((float((hit * precision).sum()), i, precision))
        tables.sort(key=lambda t: -t[0])
        found = []
        for (_, i, precision), budget in zip(tables[:2], HARD, strict=True):
            order = np.argsort(-precision, kind="stable")
            order = order[precision[order] > 2 * self.base]
            upto = int(np.searchsorted(np.cumsum(shared.totals[i, order]), budget))
            named = np.zeros(shared.ids, bool)
            named[order[:upto]] = True
            positions = np.flatnonzero(named[context.place(PLACE_ORDER[i])] & shared.base_mask)
            if upto < len(order):  # the next token alone would go over the budget: all of it, up to as much again
                named[:] = False
                named[order[upto]] = True
                more = np.flatnonzero(named[context.place(PLACE_ORDER[i])] & shared.base_mask)
                positions = np.concatenate([positions, more]) if len(more) <= budget else positions
            found.append(positions)
        hard = np.unique(np.concatenate(found))
        return hard[~find_sorted(hard, fired)[1]]

    @property
    def flags(self) -> Array:
        """Packed bits [conditions without tokens, words] in the order of ``FLAGS``."""
        if self._flags is None:
            context = self.shared.context
            rows = []
            for offset in range(CLASS_OFFSETS):
                rows.append(unpack_columns(context.class_bits(offset)[self.flat], len(CLASS_BITS)))
            for after in (False, True):
                rows.append(unpack_columns(context.state_bits(after)[self.flat], len(states.STATE_BITS)))
            bits = np.concatenate(rows) & self.valid
            self._flags = np.packbits(bits, axis=1).view(np.uint64)
        return self._flags

    def counts(self, bits: Array) -> tuple[Array, Array]:
        """Return weighted (positions, firings) of packed bits [..., words]."""
        ones = np.bitwise_count(bits)
        sums = [ones[..., s].sum(axis=-1, dtype=np.int64) * w for s, w in zip(self.segments, self.weights, strict=True)]
        return sums[0] + sums[1] + sums[2], sums[0]

    def named(self, place: Place, tokens: Array) -> Array:
        """Return packed bits of "the token at this place is one of these"."""
        table = np.zeros(self.shared.ids, bool)
        table[tokens] = True
        return pack(table[self.places[PLACE_ORDER.index(place)]] & self.valid)

    def distance(self, tokens: Sequence[int], at: Array) -> Array:
        """Return how far back in its text the nearest of the tokens lies from each index ``at``.

        2 · MAX_WINDOW where there is none.
        """
        positions = self.shared.context.positions_of(tokens)
        flat = self.flat[at]
        if not len(positions):
            return np.full(len(flat), 2 * MAX_WINDOW, np.int64)
        before = np.searchsorted(positions, flat) - 1
        back = flat - positions[np.maximum(before, 0)]
        return np.where((before >= 0) & (back <= self.reach[at]), back, 2 * MAX_WINDOW)

    def bits(self, condition: Condition) -> Array:
        """Return the packed bits of a condition."""
        match condition:
            case TokenAt():
                found = self.named(condition.offset, np.array(condition.tokens))
            case TokenOf():
                found = self.named(condition.place, np.array(condition.tokens))
            case TokenWithin():
                near = self.distance(condition.tokens, np.arange(len(self.flat))) <= condition.window
                if condition.inclusive:
                    near |= np.isin(self.places[0], condition.tokens)
                found = pack(near & self.valid)
            case PositionIn():
                high = condition.high if condition.high is not None else self.shared.context.length
                found = pack((self.columns >= condition.low) & (self.columns < high) & self.valid)
            case ClassAt() | StateIs():
                found = self.flags[FLAGS.index(replace(condition, negated=False))]
            case _:
                raise InputError(f"no such condition: {condition!r}")
        return self.all & ~found if condition.negated else found


def pack(values: Array) -> Array:
    """Pack bools [64 · words] into words."""
    return np.packbits(values).view(np.uint64)


def unpack(bits: Array) -> Array:
    """Return the bools of packed words."""
    return np.unpackbits(bits.view(np.uint8)).view(bool)


def unpack_columns(values: Array, n: int) -> Array:
    """Return the lowest n bits of uint32 values [m] as bools [n, m]."""
    grid = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return np.ascontiguousarray(grid[:, :n].T).view(bool)
