"""Nesting and line state of token rows: inside a string, a comment, brackets; at the start of a line.

A small byte machine that knows Python's strings, comments and brackets. A text (what a row holds of one document)
starts in plain code; special tokens put it back there. A string in single quotes ends at an unescaped line break, so
that the machine finds its way back after an apostrophe. Brackets count in code only; a closing bracket closes the
nearest open one of its kind. Whole tokens are steps of a memoised automaton, so a token costs one dictionary look-up
whatever its length.
"""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple, final

import numpy as np

from exegete.rules.language import STATES
from exegete.tokens import TokenTable
from exegete.types import Array

STATE_BITS = {name: bit for bit, name in enumerate(STATES)}
MAX_DEPTH = 24  # deeper opening brackets are not counted, which bounds the automaton

_CODE, _COMMENT, _SHORT, _LONG, _FIRST, _SECOND = range(6)
_PAIRS = {ord(")"): ord("("), ord("]"): ord("["), ord("}"): ord("{")}
_OPENERS = frozenset(b"([{")
_QUOTES = frozenset(b"\"'")
_BLANK = frozenset(b" \t\r\f")


class _State(NamedTuple):
    """``mode``; the ``quote`` in force; ``closing`` quotes seen of three; an ``escape`` pending; brackets; line."""

    mode: int = _CODE
    quote: int = 0
    closing: int = 0
    escape: bool = False
    stack: tuple[int, ...] = ()
    line_start: bool = True
    indented: bool = False


def _step(state: _State, byte: int) -> _State:
    """Read one byte. _FIRST: one quote was read, _SECOND: two, so the third decides between empty and triple."""
    mode, quote, closing, escape, stack, line_start, indented = state
    if byte == 10:
        line_start, indented = True, False
    elif line_start:
        if byte in _BLANK:
            indented = True
        else:
            line_start = False
    if mode == _FIRST:
        mode = _SECOND if byte == quote else _SHORT
        if mode == _SECOND:
            return _State(mode, quote, 0, False, stack, line_start, indented)
    elif mode == _SECOND:
        if byte == quote:
            return _State(_LONG, quote, 0, False, stack, line_start, indented)
        mode = _CODE
    if mode == _SHORT:
        if escape:
            escape = False
        elif byte == 92:
            escape = True
        elif byte in (quote, 10):
            mode = _CODE
    elif mode == _LONG:
        closing = closing + 1 if byte == quote and not escape else 0
        escape = byte == 92 and not escape
        if closing == 3:
            mode = _CODE
    elif mode == _COMMENT:
        if byte == 10:
            mode = _CODE
    elif byte in _QUOTES:
        mode, quote = _FIRST, byte
    elif byte == 35:
        mode = _COMMENT
    elif byte in _OPENERS:
        stack = (*stack, byte) if len(stack) < MAX_DEPTH else stack
    elif byte in _PAIRS and _PAIRS[byte] in stack:
        opener = _PAIRS[byte]
        while stack[-1] != opener:
            stack = stack[:-1]
        stack = stack[:-1]
    if mode == _CODE:
        quote, closing, escape = 0, 0, False
    return _State(mode, quote, closing, escape, stack, line_start, indented)


def _bits(state: _State) -> int:
    inside = state.mode in (_SHORT, _LONG, _FIRST)
    innermost = state.stack[-1] if state.stack else 0
    held = {
        "string": inside,
        "long_string": state.mode == _LONG,
        "comment": state.mode == _COMMENT,
        "bracket": len(state.stack) > 0,
        "nested": len(state.stack) > 1,
        "round": innermost == ord("("),
        "square": innermost == ord("["),
        "curly": innermost == ord("{"),
        "line_start": state.line_start,
        "top_level": not state.indented,
    }
    return sum(1 << STATE_BITS[name] for name, holds in held.items() if holds)


@final
class Automaton:
    """The memoised machine of one token table; it grows with the (state, token) pairs it meets."""

    def __init__(self, table: TokenTable) -> None:
        self._pieces = table.pieces
        self._special = table.special
        self._size = len(table)
        self._states: list[_State] = [_State()]
        self._numbers: dict[_State, int] = {_State(): 0}
        self._bits: list[int] = [_bits(_State())]
        # (state · ids + token) → next state, and how many brackets stay open of the old stack, where that changes
        self._next: dict[int, tuple[int, int]] = {}

    def _learn(self, state: int, token: int) -> tuple[int, int]:
        old = new = self._states[state]
        kept = len(old.stack)
        if token in self._special:
            new, kept = _State(), 0
        else:
            for byte in self._pieces[token]:
                new = _step(new, byte)
                kept = min(kept, len(new.stack))
        if new not in self._numbers:
            self._numbers[new] = len(self._states)
            self._states.append(new)
            self._bits.append(_bits(new))
        changed = kept if kept != len(old.stack) or len(new.stack) != kept else -1
        known = (self._numbers[new], changed)
        self._next[state * self._size + token] = known
        return known

    def run(self, tokens: Array, starts: Array) -> tuple[Array, Array]:
        """Read texts, laid end to end [size], that begin at ``starts``; return state bits after each token and openers.

        The opener of a position is the index of the token that opened the innermost bracket still open before it, −1
        outside brackets.
        """
        after = np.empty(len(tokens), np.int32)
        openers = np.full(len(tokens), -1, np.int64)
        following, size, learn = self._next, self._size, self._learn
        for start, stop in itertools.pairwise([*starts.tolist(), len(tokens)]):
            state, stack, begun = 0, list[int](), start
            codes = []
            for place, token in enumerate(tokens[start:stop].tolist(), start):
                found = following.get(state * size + token)
                state, kept = found if found is not None else learn(state, token)
                codes.append(state)
                if kept >= 0:
                    if stack:
                        openers[begun : place + 1] = stack[-1]
                    begun = place + 1
                    del stack[kept:]
                    stack += [place] * (len(self._states[state].stack) - kept)
            if stack:
                openers[begun:stop] = stack[-1]
            after[start:stop] = codes
        return np.array(self._bits, np.uint32)[after], openers


START_BITS = _bits(_State())
_made: dict[int, tuple[weakref.ref[TokenTable], Automaton]] = {}


def automaton(table: TokenTable) -> Automaton:
    """Return the machine of a table; made once per table object."""
    key = id(table)
    known = _made.get(key)
    if known is not None and known[0]() is table:
        return known[1]
    made = Automaton(table)
    _made[key] = (weakref.ref(table, lambda _: _made.pop(key, None)), made)
    return made


def unclosed(tokens: Array, table: TokenTable, begins: Array | None = None) -> Array:
    """Whether more brackets opened than closed, after each token [n, length] bool, strings and comments or not.

    A closing bracket that closes nothing does not count against later ones. Counting starts anew with every row, and
    within a row where ``begins`` [n, length] is set.
    """
    net = np.zeros(len(table), np.int32)
    low = np.zeros(len(table), np.int32)
    for token, piece in enumerate(table.pieces):
        depth = least = 0
        if token not in table.special:
            for byte in piece:
                depth += (byte in _OPENERS) - (byte in _PAIRS)
                least = min(least, depth)
        net[token], low[token] = depth, least
    total = np.cumsum(net[tokens], axis=1)
    lowest: Array = total - net[tokens] + low[tokens]
    if begins is None:
        floor: Array = np.minimum.accumulate(lowest, axis=1)
        return np.asarray(total > floor)
    # A step down at every beginning, deeper than any row can climb, makes the running minimum forget what was before.
    deep = int(np.abs(net).max(initial=0)) * tokens.shape[1] + int(-low.min(initial=0)) + 1
    down: Array = np.cumsum(begins, axis=1, dtype=np.int64) * deep
    return np.asarray(total > np.minimum.accumulate(lowest - down, axis=1) + down)
