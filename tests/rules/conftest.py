"""Random rules, and a small code-like vocabulary and corpus."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import strategies as st

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
from exegete.types import Array, Firings, LatentId, Rows, Split
from exegete.views import SplitData


def token_lists(ids: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, ids - 1), min_size=1, max_size=min(ids, 12), unique=True).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> PositionIn:
    low = draw(st.integers(0, 40))
    high = draw(st.one_of(st.none(), st.integers(low + 1, low + 40)))
    return PositionIn(max(low, 1) if high is None else low, high, draw(st.booleans()))


@functools.cache
def conditions(ids: int) -> st.SearchStrategy[Condition]:
    tokens, flag = token_lists(ids), st.booleans()
    return st.one_of(
        st.builds(TokenAt, st.integers(0, 8), tokens, flag),
        st.builds(TokenWithin, st.integers(1, 64), tokens, flag, flag),
        st.builds(TokenOf, st.sampled_from(sorted(PLACES)), tokens, flag),
        st.builds(ClassAt, st.integers(0, 8), st.sampled_from(sorted(CLASSES)), flag),
        st.builds(StateIs, st.sampled_from(sorted(STATES)), flag, flag),
        ranges(),
    )


def clauses(ids: int) -> st.SearchStrategy[Clause]:
    return st.builds(
        Clause,
        st.lists(conditions(ids), min_size=1, max_size=3, unique=True).map(tuple),
        st.floats(0, 1),
        st.floats(0, 1e6, allow_subnormal=False),
    )


@functools.cache
def rules(ids: int) -> st.SearchStrategy[Rule]:
    return st.lists(clauses(ids), min_size=1, max_size=3).map(lambda c: Rule(tuple(c)))


_WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "eps",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lam",
    "mu",
    "nu",
    "xi",
    "omi",
    "pi",
    "rho",
    "sigma",
    "tau",
    "phi",
    "chi",
    "psi",
    "omega",
]
_PIECES = [
    *_WORDS,
    *(" " + w for w in _WORDS),
    *["def", "class", "import", "return", "if", "for", "in", "self", "Self", "MAX", "Path", "TODO", "yield"],
    *(f" {w}" for w in ("def", "in", "self", "Path", "MAX", "=", "==", "+", "the", "a", "of")),
    *"0123456789()[]{},.:#\"'_-",
    "ing",
    "ed",
    "er",
    "):",
    "()",
    "\n",
    "\n    ",
    "\n        ",
    "\n\n",
]
PIECES = ["<bos>", *_PIECES]
IDS = {piece: i for i, piece in enumerate(PIECES)}
TABLE = TokenTable([b"", *(p.encode() for p in _PIECES)], [0])


def ids(*pieces: str) -> tuple[int, ...]:
    return tuple(IDS[p] for p in pieces)


def _expression(rng: random.Random, depth: int = 0) -> list[str]:
    kind = rng.random()
    word = [rng.choice(_WORDS)] + (["_", rng.choice(_WORDS)] if rng.random() < 0.2 else [])
    if rng.random() < 0.15:
        word.append(rng.choice(["ing", "ed", "er"]))
    if kind < 0.35 or depth > 2:
        return word
    if kind < 0.5:
        return [rng.choice("0123456789") for _ in range(rng.randint(1, 3))]
    if kind < 0.6:
        mark = rng.choice("\"'")
        return [mark, *(rng.choice(PIECES[24:47]) for _ in range(rng.randint(1, 6))), mark]
    if kind < 0.85:
        inner = _expression(rng, depth + 1)
        for _ in range(rng.randint(0, 2)):
            inner += [",", *([" self"] if rng.random() < 0.2 else _expression(rng, depth + 1))]
        return [*word, "(", *inner, ")"]
    return ["[", *_expression(rng, depth + 1), ",", *_expression(rng, depth + 1), "]"]


def _statement(rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.1:
        return ["import", rng.choice(PIECES[24:47]), rng.choice(["\n", "\n\n"])]
    if kind < 0.2:
        return ["#", *(rng.choice([" the", " a", " of", *PIECES[24:47]]) for _ in range(rng.randint(2, 8))), "\n"]
    if kind < 0.35:
        return ["def", rng.choice(PIECES[24:47]), "(", "self", *([",", " alpha"] * rng.randint(0, 2)), "):", "\n    "]
    if kind < 0.45:
        return ["return", " MAX", rng.choice([" ==", " +"]), *_expression(rng), "\n    "]
    return [rng.choice(_WORDS), " =", *_expression(rng), rng.choice(["\n", "\n    ", "\n        "])]


def make_rows(seed: int, n: int, length: int) -> Array:
    """Token rows [n, length]; each starts with the BOS token."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        row: list[str] = ["<bos>"]
        while len(row) < length:
            row += _statement(rng)
        rows.append([IDS[p] for p in row[:length]])
    return np.array(rows, np.uint32)


SIDES: tuple[Split, Split] = ("train", "test")


class PlantedData(SplitData):
    """Given rows and firings per split."""

    def __init__(self, rows: dict[Split, Rows], fired: Sequence[dict[Split, tuple[Array, Array]]]) -> None:
        self._rows, self._fired = rows, fired

    @property
    def tokens(self) -> TokenTable:
        return TABLE

    def rows(self, split: Split) -> Rows:
        return self._rows[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            flat, values = self._fired[index][split]
            rows, positions = np.divmod(flat, self._rows[split].length)
            found.append(
                Firings(
                    latent=LatentId(coder="planted", index=index),
                    rows=rows.astype(np.int64),
                    positions=positions.astype(np.int32),
                    values=values.astype(np.float32),
                )
            )
        return found


def rows_of(tokens: Array, first_document: int = 0) -> Rows:
    """Rows whose documents are themselves and whose first position does not count."""
    mask = np.ones(tokens.shape, bool)
    mask[:, 0] = False
    documents = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None] + first_document, tokens.shape[1], axis=1)
    return Rows(tokens=tokens, documents=documents, mask=mask)


@pytest.fixture(scope="session")
def rule_strategy() -> Callable[[int], st.SearchStrategy[Rule]]:
    """Random rules over token ids below the given number."""
    return rules


@pytest.fixture(scope="session")
def condition_strategy() -> Callable[[int], st.SearchStrategy[Condition]]:
    return conditions


@pytest.fixture(scope="session")
def table() -> TokenTable:
    return TABLE


@pytest.fixture(scope="session")
def ids_of() -> Callable[..., tuple[int, ...]]:
    """Ids of pieces of the small vocabulary."""
    return ids


@pytest.fixture(scope="session")
def planted() -> Callable[..., SplitData]:
    """Make data of 240 train and 240 test rows from functions of (row of pieces, position) → fires."""
    split_rows: dict[Split, Rows] = {s: rows_of(make_rows(i + 1, 240, 96), 1000 * i) for i, s in enumerate(SIDES)}

    def make(functions: Sequence[Callable[[tuple[str, ...], int], bool]]) -> SplitData:
        fired: list[dict[Split, tuple[Array, Array]]] = []
        for number, function in enumerate(functions):
            parts: dict[Split, tuple[Array, Array]] = {}
            for split, rows in split_rows.items():
                hits = []
                for r, row in enumerate(rows.tokens.tolist()):
                    pieces = tuple(PIECES[t] for t in row)
                    hits += [r * rows.length + t for t in range(1, rows.length) if function(pieces, t)]
                noise = np.random.default_rng([number, len(split)])
                parts[split] = (np.array(hits, np.int64), 0.5 + noise.gamma(2.0, 1.0, len(hits)))
            fired.append(parts)
        return PlantedData(split_rows, fired)

    return make
