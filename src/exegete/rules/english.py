r"""Rules in controlled English, and back: ``parse(render(rule, table), table) == rule`` for every rule.

    Fires on ` self` or `cls`, right after `(`, not inside a string (83.1% of the time, mean 2.41); or on …

A token stands in back-ticks as its text; a back-tick, backslash or unprintable character in it is escaped (``\```,
``\\``, ``\n``, ``\t``, ``\r``, ``\u{200b}``), a byte that is no UTF-8 is ``\xff``. A token that its text does not
name (special, empty, or one of several with the same bytes) is written as its id, ``#123``.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NoReturn, final

from exegete.errors import InputError
from exegete.rules.classes import Vocabulary, vocabulary
from exegete.rules.language import (
    CLASSES,
    PLACES,
    STATES,
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

_START = "Fires "
_NEXT = "; or "
_AFTER = " once it is read"
_ESCAPES = {"\\": "\\\\", "`": "\\`", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_UNESCAPES = {text[1]: character for character, text in _ESCAPES.items()}
_CLASS_NAMES = {phrase: name for name, phrase in CLASSES.items()}
_STATE_NAMES = {phrase: name for name, phrase in STATES.items()}
_PLACE_NAMES = {phrase: name for name, phrase in PLACES.items()}


def quote(piece: bytes) -> str:
    """Return the bytes of a token in back-ticks, escaped so that they can be read back exactly."""
    text = piece.decode("utf-8", errors="surrogateescape")
    return "`" + "".join(map(_escape, text)) + "`"


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() else f"\\u{{{ord(character):x}}}"


def _name(token: int, table: TokenTable, words: Vocabulary) -> str:
    if token < len(table) and words.ids.get(table.pieces[token]) == token:
        return quote(table.pieces[token])
    return f"#{token}"


def _listed(tokens: tuple[int, ...], table: TokenTable) -> str:
    words = vocabulary(table)
    names = [_name(t, table, words) for t in tokens]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def _place(offset: int) -> str:
    return "on" if offset == 0 else "right after" if offset == 1 else f"{offset} tokens after"


def _condition(condition: Condition, table: TokenTable) -> str:
    match condition:
        case TokenAt():
            text = f"{_place(condition.offset)} {_listed(condition.tokens, table)}"
        case ClassAt():
            text = f"{_place(condition.offset)} {CLASSES[condition.name]}"
        case TokenOf():
            text = f"{PLACES[condition.place]} {_listed(condition.tokens, table)}"
        case TokenWithin():
            also = "on or " if condition.inclusive else ""
            text = f"{also}within {condition.window} tokens after {_listed(condition.tokens, table)}"
        case StateIs():
            text = STATES[condition.name] + (_AFTER if condition.after else "")
        case PositionIn(low=low, high=high):
            text = f"at positions {low} to {high - 1} of the row" if high else f"from position {low} of the row on"
        case _:
            raise InputError(f"no such condition: {condition!r}")
    return "not " + text if condition.negated else text


def _percent(share: float) -> str:
    number = Decimal(repr(share)) * 100
    return f"{number.normalize():f}"


def render(rule: Rule, table: TokenTable) -> str:
    """Return the rule as one English sentence that ``parse`` reads back."""
    clauses = [
        ", ".join(_condition(c, table) for c in clause.conditions)
        + f" ({_percent(clause.precision)}% of the time, mean {clause.mean!r})"
        for clause in rule.clauses
    ]
    return _START + _NEXT.join(clauses) + "."


_PERCENT = re.compile(r" \((\d+(?:\.\d+)?)% of the time, mean (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\)")
_TOKEN = re.compile(r"`((?:[^`\\]|\\.)*)`|#(\d{1,9})", re.DOTALL)
_OFFSET = re.compile(r"on |right after |([2-9]) tokens after ")
_WITHIN = re.compile(r"(on or )?within (\d{1,3}) tokens after ")
_RANGE = re.compile(r"from position (\d{1,9}) of the row on|at positions (\d{1,9}) to (\d{1,9}) of the row")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u\{([0-9a-f]{1,6})\}|([\\`ntr]))|\\|[^\\]+", re.DOTALL)


def _phrases(names: dict[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(phrase) for phrase in sorted(names, key=len, reverse=True)))


_CLASS, _STATE, _PLACE = _phrases(_CLASS_NAMES), _phrases(_STATE_NAMES), _phrases(_PLACE_NAMES)


@final
class _Reader:
    """A cursor over the text; every reading method moves on, or returns None and stays."""

    def __init__(self, text: str, table: TokenTable) -> None:
        self.text, self.table, self.at = text, table, 0

    def fail(self) -> NoReturn:
        near = self.text[self.at : self.at + 40]
        raise InputError(f"this is no rule: cannot read {near!r} at character {self.at}; rules start with 'Fires on …'")

    def take(self, literal: str) -> bool:
        if self.text.startswith(literal, self.at):
            self.at += len(literal)
            return True
        return False

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def token(self) -> int | None:
        found = self.match(_TOKEN)
        if found is None:
            return None
        if found[2] is not None:
            return int(found[2])
        token = vocabulary(self.table).ids.get(unquote(found[1]))
        if token is None:
            raise InputError(f"this is no rule here: the token {found[0]} is not in the token table")
        return token

    def tokens(self) -> tuple[int, ...]:
        """Read ``A``, ``A or B`` or ``A, B or C``."""
        first = self.token()
        if first is None:
            self.fail()
        found = [first]
        while True:
            before = self.at
            last = self.take(" or ")
            token = self.token() if last or self.take(", ") else None
            if token is None:
                self.at = before
                if len(found) > 1:
                    self.fail()  # a list of several ends with "or"
                return tuple(found)
            found.append(token)
            if last:
                return tuple(found)

    def condition(self) -> Condition:
        negated = self.take("not ")
        if found := self.match(_WITHIN):
            return TokenWithin(int(found[2]), self.tokens(), found[1] is not None, negated)
        if found := self.match(_PLACE):
            if not self.take(" "):
                self.fail()
            return TokenOf(_PLACE_NAMES[found[0]], self.tokens(), negated)
        if found := self.match(_STATE):
            return StateIs(_STATE_NAMES[found[0]], self.take(_AFTER), negated)
        if found := self.match(_RANGE):
            if found[1] is not None:
                return PositionIn(int(found[1]), None, negated)
            return PositionIn(int(found[2]), int(found[3]) + 1, negated)
        if found := self.match(_OFFSET):
            offset = int(found[1]) if found[1] else 0 if found[0] == "on " else 1
            if named := self.match(_CLASS):
                return ClassAt(offset, _CLASS_NAMES[named[0]], negated)
            return TokenAt(offset, self.tokens(), negated)
        self.fail()

    def clause(self) -> Clause:
        conditions = [self.condition()]
        while self.take(", "):
            conditions.append(self.condition())
        found = self.match(_PERCENT)
        if found is None:
            self.fail()
        return Clause(tuple(conditions), float(Decimal(found[1]) / 100), float(found[2]))


def unquote(text: str) -> bytes:
    """Return the bytes that ``quote`` wrote between its back-ticks. Raises InputError on a stray backslash."""
    parts: list[bytes] = []
    for found in _ESCAPED.finditer(text):
        byte, code, short = found.groups()
        if byte is not None:
            parts.append(bytes([int(byte, 16)]))
        elif code is not None:
            number = int(code, 16)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise InputError(f"this is no rule: no character has the number {code}")
            parts.append(chr(number).encode())
        elif short is not None:
            parts.append(_UNESCAPES[short].encode())
        elif found[0] == "\\":
            raise InputError(f"this is no rule: stray backslash in `{text}`")
        else:
            parts.append(found[0].encode("utf-8", errors="replace"))
    return b"".join(parts)


def parse(text: str, table: TokenTable) -> Rule:
    """Read a rule from its English. Raises InputError, at once, on any text that is no rule."""
    reader = _Reader(text.strip(), table)
    if not reader.take(_START):
        reader.fail()
    clauses = [reader.clause()]
    while reader.take(_NEXT):
        clauses.append(reader.clause())
    if reader.text[reader.at :] not in (".", ""):
        reader.fail()
    return Rule(tuple(clauses))
