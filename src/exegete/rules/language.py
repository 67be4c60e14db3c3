"""The rule language: what an executable explanation may say, as frozen data that re-creates itself from JSON.

A rule is a disjunction of at most three clauses, a clause a conjunction of at most three conditions, and a condition
names at most twelve tokens or one class, so that a rule stays readable. Every condition is causal: at a position it
looks at that token and at earlier tokens of the same document in the same row only. Rules are about documents: that
holds too where the subject could attend across the documents of a row. A condition about a place that does not exist
(before the document's first token in the row, or outside any bracket) does not hold; its negation does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from exegete.errors import InputError, unknown

MAX_CLAUSES = 3
MAX_CONDITIONS = 3
MAX_TOKENS = 12
MAX_OFFSET = 8
MAX_WINDOW = 64

# The noun phrases are the English of a class; classes.py holds the predicates of the same names.
CLASSES: Mapping[str, str] = {
    "digits": "a number",
    "lower": "a lower-case word",
    "upper": "an upper-case word",
    "capitalised": "a capitalised word",
    "mixed_case": "a mixed-case word",
    "word": "a word",
    "keyword": "a keyword",
    "builtin": "a built-in name",
    "underscore": "text with an underscore",
    "dunder": "text with a double underscore",
    "has_digit": "text with a digit",
    "leading_space": "text that begins with a space",
    "blank": "white space",
    "newline": "a line break",
    "blank_line": "an empty line",
    "indented": "a line break with indentation",
    "punctuation": "punctuation",
    "operator": "an operator",
    "opens": "an opening bracket",
    "closes": "a closing bracket",
    "quote": "a quotation mark",
    "hash": "a hash sign",
    "ends_dot": "text that ends in a dot",
    "ends_comma": "text that ends in a comma",
    "ends_colon": "text that ends in a colon",
    "equals": "text with an equals sign",
    "single": "a single character",
    "non_ascii": "text outside ASCII",
    "continuation": "a continuation of a word",
    "word_start": "the start of a word",
    "special": "a special token",
}

# Phrases for the state of the text before a token; states.py computes them.
STATES: Mapping[str, str] = {
    "string": "inside a string",
    "long_string": "inside a triple-quoted string",
    "comment": "inside a comment",
    "bracket": "inside brackets",
    "nested": "inside nested brackets",
    "round": "directly inside round brackets",
    "square": "directly inside square brackets",
    "curly": "directly inside curly brackets",
    "unclosed": "after more opening than closing brackets",
    "line_start": "at the start of a line",
    "top_level": "on a line without indentation",
}

PLACES: Mapping[str, str] = {
    "line": "on a line that begins with",
    "break": "on a line introduced by",
    "opener": "in brackets opened by",
    "called": "in brackets opened right after",
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_tokens(tokens: tuple[int, ...]) -> None:
    _check(0 < len(tokens) <= MAX_TOKENS, f"a condition names 1 to {MAX_TOKENS} tokens, got {len(tokens)}")
    _check(len(set(tokens)) == len(tokens), f"a condition names a token twice: {tokens}")
    _check(all(isinstance(t, int) and t >= 0 for t in tokens), f"token ids are integers from 0, got {tokens}")


class Condition(ABC):
    """One thing that must hold at a position."""

    __slots__ = ()

    negated: bool

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data with its ``kind``."""


@final
@dataclass(frozen=True, slots=True)
class TokenAt(Condition):
    """The token ``offset`` positions back (0: the current one, at most 8) is one of ``tokens``."""

    offset: int
    tokens: tuple[int, ...]
    negated: bool = False

    def __post_init__(self) -> None:
        _check(0 <= self.offset <= MAX_OFFSET, f"an offset lies in 0…{MAX_OFFSET}, got {self.offset}")
        _check_tokens(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {"kind": "token_at", "offset": self.offset, "tokens": list(self.tokens), "negated": self.negated}


@final
@dataclass(frozen=True, slots=True)
class TokenWithin(Condition):
    """One of ``tokens`` occurs 1 to ``window`` positions back, or, when ``inclusive``, 0 to ``window`` back."""

    window: int
    tokens: tuple[int, ...]
    inclusive: bool = False
    negated: bool = False

    def __post_init__(self) -> None:
        _check(1 <= self.window <= MAX_WINDOW, f"a window lies in 1…{MAX_WINDOW}, got {self.window}")
        _check_tokens(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {
            "kind": "token_within",
            "window": self.window,
            "tokens": list(self.tokens),
            "inclusive": self.inclusive,
            "negated": self.negated,
        }


@final
@dataclass(frozen=True, slots=True)
class TokenOf(Condition):
    """The token at a named place is one of ``tokens``.

    Places: ``line`` the first token of the current line (the current token itself when it is first); ``break`` the
    token with the line break before the current line (special tokens break lines too); ``opener`` the token that opened
    the innermost bracket still open before the current token; ``called`` the token right before that one.
    """

    place: str
    tokens: tuple[int, ...]
    negated: bool = False

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise unknown("place", self.place, PLACES)
        _check_tokens(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {"kind": "token_of", "place": self.place, "tokens": list(self.tokens), "negated": self.negated}


@final
@dataclass(frozen=True, slots=True)
class ClassAt(Condition):
    """The token ``offset`` positions back belongs to the named class of decoded text."""

    offset: int
    name: str
    negated: bool = False

    def __post_init__(self) -> None:
        _check(0 <= self.offset <= MAX_OFFSET, f"an offset lies in 0…{MAX_OFFSET}, got {self.offset}")
        if self.name not in CLASSES:
            raise unknown("token class", self.name, CLASSES)

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {"kind": "class_at", "offset": self.offset, "name": self.name, "negated": self.negated}


@final
@dataclass(frozen=True, slots=True)
class StateIs(Condition):
    """The text is in the named state before the current token is read, or, when ``after``, once it is read."""

    name: str
    after: bool = False
    negated: bool = False

    def __post_init__(self) -> None:
        if self.name not in STATES:
            raise unknown("state", self.name, STATES)

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {"kind": "state", "name": self.name, "after": self.after, "negated": self.negated}


@final
@dataclass(frozen=True, slots=True)
class PositionIn(Condition):
    """The position in the row (0 is the row's first token) lies in ``low`` ≤ position < ``high`` (None: no end).

    It is the one condition about the row: where a row holds several documents, positions go on through all of them.
    """

    low: int
    high: int | None
    negated: bool = False

    def __post_init__(self) -> None:
        _check(self.low >= 0, f"positions start at 0, got {self.low}")
        _check(self.high is None or self.high > self.low, f"an empty range of positions: {self.low}…{self.high}")
        _check(self.high is not None or self.low > 0, "a range of positions that holds everywhere says nothing")

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON data."""
        return {"kind": "position", "low": self.low, "high": self.high, "negated": self.negated}


def significant(value: float) -> float:
    """Round to four significant digits, the precision a rule is written with."""
    return float(f"{value:.4g}")


@final
@dataclass(frozen=True, slots=True)
class Clause:
    """A conjunction of one to three conditions, with its train ``precision`` and ``mean`` activation where it matches.

    Both numbers are rounded to four significant digits on construction, so that the English carries them exactly.
    ``mean`` counts silent positions as 0.
    """

    conditions: tuple[Condition, ...]
    precision: float
    mean: float

    def __post_init__(self) -> None:
        _check(
            0 < len(self.conditions) <= MAX_CONDITIONS,
            f"a clause has 1 to {MAX_CONDITIONS} conditions, got {len(self.conditions)}",
        )
        _check(len(set(self.conditions)) == len(self.conditions), "a clause says the same thing twice")
        _check(0.0 <= self.precision <= 1.0, f"a precision lies in [0, 1], got {self.precision}")
        _check(math.isfinite(self.mean), f"a mean activation is finite, got {self.mean}")
        object.__setattr__(self, "precision", significant(self.precision))
        object.__setattr__(self, "mean", significant(self.mean) + 0.0)  # + 0.0 turns −0.0 into 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the clause as JSON data."""
        return {
            "conditions": [c.to_json() for c in self.conditions],
            "precision": self.precision,
            "mean": self.mean,
        }


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A disjunction of one to three clauses. A position's score is that of its most precise matching clause, else 0."""

    clauses: tuple[Clause, ...]

    def __post_init__(self) -> None:
        _check(0 < len(self.clauses) <= MAX_CLAUSES, f"a rule has 1 to {MAX_CLAUSES} clauses, got {len(self.clauses)}")

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON data that ``from_json`` reads back."""
        return {"format": 1, "clauses": [c.to_json() for c in self.clauses]}

    @classmethod
    def from_json(cls, data: Any) -> Rule:
        """Re-create a rule from ``to_json``. Raises InputError on anything that is no rule."""
        try:
            _check(data["format"] == 1, f"this rule has format {data['format']!r}; this version reads format 1")
            return cls(
                tuple(
                    Clause(
                        tuple(_condition(c) for c in clause["conditions"]),
                        float(clause["precision"]),
                        float(clause["mean"]),
                    )
                    for clause in data["clauses"]
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no rule: {error!r}") from error

    @property
    def n_tokens(self) -> int:
        """Tokens named in all conditions together."""
        named = (c.tokens for k in self.clauses for c in k.conditions if isinstance(c, TokenAt | TokenWithin | TokenOf))
        return sum(map(len, named))


def _condition(data: Mapping[str, Any]) -> Condition:
    kind, negated = data["kind"], bool(data["negated"])
    match kind:
        case "token_at":
            return TokenAt(int(data["offset"]), _ids(data["tokens"]), negated)
        case "token_within":
            return TokenWithin(int(data["window"]), _ids(data["tokens"]), bool(data["inclusive"]), negated)
        case "token_of":
            return TokenOf(str(data["place"]), _ids(data["tokens"]), negated)
        case "class_at":
            return ClassAt(int(data["offset"]), str(data["name"]), negated)
        case "state":
            return StateIs(str(data["name"]), bool(data["after"]), negated)
        case "position":
            high = data["high"]
            return PositionIn(int(data["low"]), None if high is None else int(high), negated)
        case _:
            raise InputError(f"unknown kind of condition: {kind!r}")


def _ids(tokens: Any) -> tuple[int, ...]:
    return tuple(int(t) for t in tokens)
