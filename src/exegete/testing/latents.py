"""Latents whose truth is a program over tokens, two siblings at a time, each with its ladder of explanations.

A ladder holds the latent's program itself (exact), one that also fires elsewhere (broad), one that misses much of it
(narrow), one half of what it is a union of (half), the program of its sibling, which overlaps it and lies near it in
the store (sibling), and that of an unrelated latent (random). All are rules, so that all can be executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

import numpy as np

from exegete.rules.execute import TokenContext, matches
from exegete.rules.language import Clause, Condition, PositionIn, Rule, StateIs, TokenAt, TokenWithin
from exegete.types import Array

RUNGS: Final = ("exact", "broad", "narrow", "half", "sibling", "random")
"""The rungs of a ladder."""
Programs = Mapping[str, Rule]
Pair = tuple[Programs, Programs]

_PRECISION = 0.9
_TRIES = 400
_SHARE = (0.012, 0.2)  # of windows that a latent fires in
_WINDOW = 32


class NoSuchTokensError(Exception):
    """A draw of tokens came to nothing; another may not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A latent by its place in the store: its kind, its sibling's place, and what each rung of its ladder says."""

    index: int
    kind: str
    sibling: int
    ladder: Mapping[str, Rule]

    @property
    def program(self) -> Rule:
        """What decides where it fires."""
        return self.ladder["exact"]


@final
class Text:
    """The token rows that latents are planted in, and how often tokens stand where."""

    def __init__(self, context: TokenContext, rng: np.random.Generator) -> None:
        self.context, self.rng = context, rng
        self.usable = context.table.is_whole & ~context.table.is_special

    @cached_property
    def rates(self) -> Array:
        """The share of counted positions that each token stands at [ids]."""
        counts = self.context.totals[0][: self.context.none]
        found: Array = counts / max(1.0, counts.sum())
        return found

    def band(self, low: float, high: float, n: int) -> list[int]:
        """Draw n tokens of these rates, most frequent first."""
        return self.among(np.flatnonzero((self.rates >= low) & (self.rates <= high) & self.usable), n)

    def among(self, tokens: Array, n: int) -> list[int]:
        """Draw n of these tokens, most frequent first. Raises NoSuchTokensError when there are fewer."""
        if len(tokens) < n:
            raise NoSuchTokensError
        drawn = self.rng.choice(tokens, n, replace=False)
        found: list[int] = drawn[np.argsort(-self.rates[drawn], kind="stable")].tolist()
        return found

    def before(self, token: int, offset: int = 1, at: Array | None = None) -> list[tuple[int, float]]:
        """Return what stands ``offset`` before a token (or before these positions), most often first, with shares."""
        positions = self.context.positions_of([token]) if at is None else at
        seen = np.bincount(self.context.place(offset)[positions], minlength=self.context.none + 1)[:-1] * self.usable
        order = np.argsort(-seen, kind="stable")[:12]
        return [(int(t), float(seen[t]) / max(1, len(positions))) for t in order if seen[t]]

    def state(self, name: str) -> Array:
        """Return how often each token stands in a state, as a share of its places [ids]."""
        here = matches(_rule(StateIs(name)), self.context)[0]
        counts = np.bincount(self.context.flat[here], minlength=self.context.none + 1)[:-1]
        found: Array = counts / np.maximum(1, np.bincount(self.context.flat, minlength=self.context.none + 1)[:-1])
        return found

    def windows(self, rule: Rule) -> Array:
        """Return the pieces of rows, as long as a window, that a rule matches in."""
        return np.unique(matches(rule, self.context)[0] // _WINDOW)

    @property
    def n_windows(self) -> int:
        """How many such pieces there are."""
        return self.context.size // _WINDOW


def _clause(*conditions: Condition, mean: float = 3.0) -> Clause:
    return Clause(conditions, _PRECISION, mean)


def _rule(*conditions: Condition) -> Rule:
    return Rule((_clause(*conditions),))


def _on(tokens: Sequence[int]) -> TokenAt:
    return TokenAt(0, tuple(tokens))


def _after(tokens: Sequence[int], *, negated: bool = False) -> TokenAt:
    return TokenAt(1, tuple(tokens), negated)


def _siblings(a: dict[str, Rule], b: dict[str, Rule]) -> Pair:
    return {**a, "sibling": b["exact"]}, {**b, "sibling": a["exact"]}


def _token_set(text: Text) -> Pair:
    t = text.band(0.0004, 0.003, 10)
    text.rng.shuffle(t)
    broad = _rule(_on(t))

    def ladder(own: list[int]) -> dict[str, Rule]:
        return {
            "exact": _rule(_on(own)),
            "broad": broad,
            "narrow": _rule(_on(own[:1])),
            "half": _rule(_on(own[:2])),
        }

    return _siblings(ladder(t[0:4]), ladder(t[5:1:-1]))


def _n_gram(text: Text) -> Pair:
    (last,) = text.band(0.004, 0.04, 1)
    found = [t for t, share in text.before(last) if 0.02 <= share <= 0.35]
    if len(found) < 5:
        raise NoSuchTokensError
    p = found[:5]
    text.rng.shuffle(p)

    def ladder(own: list[int]) -> dict[str, Rule]:
        exact = _rule(_after(own), _on([last]))
        return {
            "exact": exact,
            "broad": _rule(_on([last])),
            "narrow": _rule(TokenAt(2, _half_before(text, exact)), _after(own), _on([last])),
            "half": _rule(_after(own[:2]), _on([last])),
        }

    return _siblings(ladder(p[0:3]), ladder(p[4:1:-1]))


def _half_before(text: Text, exact: Rule) -> tuple[int, ...]:
    """Return what most often stands two before the matches of a rule, up to a third of them."""
    at = matches(exact, text.context)[0]
    chosen: list[int] = []
    total = 0.0
    for token, share in text.before(0, 2, at):
        if chosen and total + share > 1 / 3:
            break
        chosen.append(token)
        total += share
    if not chosen:
        raise NoSuchTokensError
    return tuple(chosen)


def _context(text: Text) -> Pair:
    spoken, near = text.band(0.001, 0.01, 4), text.band(0.001, 0.008, 5)
    text.rng.shuffle(near)

    def ladder(own: list[int]) -> dict[str, Rule]:
        return {
            "exact": _rule(TokenWithin(12, tuple(own)), _on(spoken)),
            "broad": _rule(_on(spoken)),
            "narrow": _rule(TokenWithin(3, tuple(own)), _on(spoken)),
            "half": _rule(TokenWithin(12, tuple(own)), _on(spoken[::2])),
        }

    return _siblings(ladder(near[0:3]), ladder(near[4:1:-1]))


def _bracket(text: Text) -> Pair:
    state, size, least = ("nested", 6, 0.002) if text.rng.random() < 0.5 else ("bracket", 4, 0.0008)
    share = text.state(state)
    often = (share > 0.03) & (share < 0.5) & (text.rates > least) & (text.rates < 0.02) & text.usable
    t = text.among(np.flatnonzero(often), size + size // 2)
    text.rng.shuffle(t)

    def ladder(own: list[int]) -> dict[str, Rule]:
        return {
            "exact": _rule(StateIs(state), _on(own)),
            "broad": _rule(_on(t)),
            "narrow": _rule(StateIs(state), _on(own[:1])),
            "half": _rule(StateIs(state), _on(own[: size // 2])),
        }

    return _siblings(ladder(t[:size]), ladder(t[::-1][:size]))


def _line_start(text: Text) -> Pair:
    share = text.state("line_start")
    often = np.flatnonzero((share > 0.15) & (share < 0.7) & (text.rates > 0.0003) & (text.rates < 0.01) & text.usable)
    t = text.among(often, 6)
    text.rng.shuffle(t)

    def ladder(own: list[int]) -> dict[str, Rule]:
        return {
            "exact": _rule(StateIs("line_start"), _on(own)),
            "broad": _rule(_on(t)),
            "narrow": _rule(StateIs("line_start"), _on(own[:1])),
            "half": _rule(StateIs("line_start"), _on(own[:2])),
        }

    return _siblings(ladder(t[0:4]), ladder(t[5:1:-1]))


def _place_in_row(text: Text) -> Pair:
    t = text.band(0.002, 0.02, 4)
    length = text.context.length
    text.rng.shuffle(t)

    def ladder(low: int, high: int) -> dict[str, Rule]:
        return {
            "exact": _rule(PositionIn(low, high), _on(t)),
            "broad": _rule(_on(t)),
            "narrow": _rule(PositionIn(low, (low + high) // 2), _on(t[:2])),
            "half": _rule(PositionIn(low, high), _on(t[:2])),
        }

    return _siblings(ladder(1, length // 3), ladder(length // 6, length // 2))


def _position(text: Text) -> Pair:
    return _place_in_row(text) if text.rng.random() < 1 / 3 else _line_start(text)


def _mixture(text: Text) -> Pair:
    t = text.band(0.0004, 0.002, 8)
    text.rng.shuffle(t)
    (last,) = text.band(0.004, 0.03, 1)
    first = [token for token, share in text.before(last) if 0.04 <= share <= 0.35][:2]
    if not first:
        raise NoSuchTokensError
    shared = _clause(_after(first), _on([last]))

    def ladder(own: list[int]) -> dict[str, Rule]:
        return {
            "exact": Rule((_clause(_on(own)), shared)),
            "broad": Rule((_clause(_on(t)), _clause(_on([last])))),
            "narrow": _rule(_on(own[:1])),
            "half": _rule(_on(own)),
        }

    return _siblings(ladder(t[0:2]), ladder(t[2:4]))


def _graded(text: Text) -> Pair:
    t = text.band(0.0003, 0.002, 12)
    text.rng.shuffle(t)

    def ladder(own: list[int]) -> dict[str, Rule]:
        parts = zip((own[0:2], own[2:4], own[4:6]), (9.0, 3.0, 1.0), strict=True)
        return {
            "exact": Rule(tuple(_clause(_on(part), mean=mean) for part, mean in parts)),
            "broad": _rule(_on(t)),
            "narrow": _rule(_on(own[0:1])),
            "half": _rule(_on(own[0:6:2])),
        }

    return _siblings(ladder(t[0:6]), ladder([*t[0:2], *t[6:10]]))


def _exception(text: Text) -> Pair:
    (first,) = text.band(0.001, 0.02, 1)
    like = (text.rates > 0.6 * text.rates[first]) & (text.rates < 1.7 * text.rates[first]) & text.usable
    like[first] = False
    spoken = [first, *text.among(np.flatnonzero(like), 1)]
    found = text.before(first)
    absorbed = [token for token, share in found if 0.1 <= share <= 0.5][:2]
    others = [token for token, _ in found if token not in absorbed][:4]
    if not absorbed or not others:
        raise NoSuchTokensError
    kept, taken = _rule(_after(absorbed, negated=True), _on(spoken)), _rule(_after(absorbed), _on(spoken))
    parent = {
        "exact": kept,
        "broad": _rule(_on(spoken)),
        "narrow": _rule(_after(others), _on(spoken)),
        "half": _rule(_after(absorbed, negated=True), _on(spoken[:1])),
    }
    child = {
        "exact": taken,
        "broad": _rule(_on(spoken)),
        "narrow": _rule(TokenAt(2, _half_before(text, taken)), _after(absorbed), _on(spoken)),
        "half": _rule(_after(absorbed), _on(spoken[:1])),
    }
    return _siblings(parent, child)


KINDS: Final[Mapping[str, Callable[[Text], Pair]]] = {
    "token set": _token_set,
    "n-gram": _n_gram,
    "context word": _context,
    "bracket depth": _bracket,
    "position": _position,
    "either-or": _mixture,
    "graded": _graded,
    "absorbed exception": _exception,
}
"""What decides where a latent fires."""


def plan_latents(context: TokenContext, n: int, rng: np.random.Generator) -> list[Planted]:
    """Return n latents (rounded up to whole pairs of siblings), the kinds in turn, each with its ladder.

    A pair is drawn until both fire in 1.2 to 20 % of windows, and its rungs deserve their names there: broad at least
    1.3 times as wide, narrow and half at most 0.85 times, siblings that share some firings and not all. Raises
    NoSuchTokensError when the text has no such tokens.
    """
    text, names = Text(context, rng), list(KINDS)
    pairs = [(names[i % len(names)], _drawn(text, KINDS[names[i % len(names)]])) for i in range(-(-n // 2))]
    ladders = [(kind, own) for kind, pair in pairs for own in pair]
    sizes = [len(text.windows(own["exact"])) for _, own in ladders]
    planted = []
    for index, (kind, own) in enumerate(ladders):
        unrelated = [j for j, (other, _) in enumerate(ladders) if other != kind or len(names) == 1]
        pool = unrelated or [j for j in range(len(ladders)) if j // 2 != index // 2] or [index ^ 1]
        like = min(pool, key=lambda j: (abs(np.log(sizes[j] / sizes[index])), j))
        ladder = {**own, "random": ladders[like][1]["exact"]}
        planted.append(Planted(index=index, kind=kind, sibling=index ^ 1, ladder={r: ladder[r] for r in RUNGS}))
    return planted


def _drawn(text: Text, kind: Callable[[Text], Pair]) -> Pair:
    for _ in range(_TRIES):
        try:
            pair = kind(text)
        except NoSuchTokensError:
            continue
        if all(_named_rightly(text, own) for own in pair):
            return pair
    raise NoSuchTokensError(f"no {kind.__name__.strip('_')} of the wanted rates in {text.n_windows} windows of text")


def _named_rightly(text: Text, own: Programs) -> bool:
    found = {name: text.windows(rule) for name, rule in own.items()}
    exact = len(found["exact"])
    low, high = (share * text.n_windows for share in _SHARE)
    if not low <= exact <= high or len(found["broad"]) < 1.3 * exact:
        return False
    if any(not 0.02 * exact <= len(found[name]) <= 0.85 * exact for name in ("narrow", "half")):
        return False
    shared = len(np.intersect1d(found["exact"], found["sibling"], assume_unique=True))
    return 0 < shared <= 0.8 * exact
