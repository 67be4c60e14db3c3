"""What is known of rows of questions, as columns: who speaks, what is true, how hard it is; and pools of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, final

import numpy as np

from exegete.errors import CorruptError, InputError, unknown
from exegete.types import Array

Character = Literal["Alice", "Bob"]
CHARACTERS: Final = ("Alice", "Bob")
Feature = Literal["last", "pair", "state", "state-pair"]
FEATURES: Final[tuple[Feature, ...]] = ("last", "pair", "state", "state-pair")
Filter = Literal["all", "disagree", "agree"]
FILTERS: Final[tuple[Filter, ...]] = ("all", "disagree", "agree")
POOLS: Final = ("A", "AE", "AH", "B", "BE", "BH", "all", "E", "H")
"""Alice's rows, Bob's, or both; of these the easy ones (difficulty quantile at most .25) or the hard (at least .75)."""
EASY, HARD = 0.25, 0.75
_KINDS: Final = {"id": str, "base": str, "alice_speaks": bool, "label": bool, "alice": bool, "bob": bool}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """Columns [n] of rows.

    Attributes:
        id: Names of the rows, each once.
        base: The fact that a row is about: what a statement claims, whoever speaks and in whatever words.
        alice_speaks: Whether the row is in Alice's context, else it is in Bob's.
        label: What that character says, which is what the model is trained to say.
        alice: What Alice says: the truth.
        bob: What Bob says: by his rule, right or wrong.
        difficulty: The greater, the harder.
        quantile: Rank of the difficulty among base examples, from 0 to 1.
    """

    id: Array
    base: Array
    alice_speaks: Array
    label: Array
    alice: Array
    bob: Array
    difficulty: Array
    quantile: Array

    def __post_init__(self) -> None:
        if any(getattr(self, f.name).shape != (len(self.id),) for f in fields(self)):
            raise InputError("columns of facts differ in length")
        if len(np.unique(self.id)) != len(self.id):
            raise InputError("two rows have one id; each row needs its own")

    def __len__(self) -> int:
        return len(self.id)

    @property
    def places(self) -> Array:
        """Numbers of the base examples [n] int64, as metrics cluster by them."""
        found: Array = np.unique(self.base, return_inverse=True)[1].astype(np.int64)
        return found

    def take(self, rows: Array) -> Facts:
        """Return the rows of a mask or of indices."""
        return Facts(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def pool(self, name: str) -> Array:
        """Return which rows are in a pool [n] bool. Raises NotFoundError for another name."""
        if name not in POOLS:
            raise unknown("pool", name, POOLS)
        chosen = np.ones(len(self), bool)
        if name[0] in "AB":
            chosen &= self.alice_speaks == (name[0] == "A")
        if name[-1] == "E":
            chosen &= self.quantile <= EASY
        if name[-1] == "H":
            chosen &= self.quantile >= HARD
        return chosen

    def where(self, which: Filter) -> Array:
        """Return the rows [n] bool on which both characters say the same, or not, or all."""
        if which == "all":
            return np.ones(len(self), bool)
        differ: Array = self.alice != self.bob
        return differ if which == "disagree" else ~differ

    def held_out(self, share: float, seed: int) -> Array:
        """Return a fixed share of the base examples, their rows [n] bool: the same ones whatever else is there."""
        limit = int(share * 2**32)
        keys = {base: _hash32(f"{seed}|{base}") for base in np.unique(self.base).tolist()}
        return np.array([keys[base] < limit for base in self.base.tolist()], bool)

    def to_json(self) -> dict[str, Any]:
        """Return the columns as lists."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_json(cls, data: Any) -> Facts:
        """Return the columns from what ``to_json`` gave. Raises CorruptError for anything else."""
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            raise CorruptError(f"facts of rows are the columns {', '.join(names)}")
        columns: dict[str, Array] = {}
        for name in names:
            kind = _KINDS.get(name, float)
            values = data[name]
            if not isinstance(values, list) or not all(_is(kind, value) for value in values):
                raise CorruptError(f"the column {name} of the facts holds other things than {kind.__name__}")
            columns[name] = np.array(values, dtype=kind if kind is not str else np.str_)
        return cls(**columns)


def facts_of(rows: Sequence[Mapping[str, Any]]) -> Facts:
    """Return rows (mappings with the names of ``Facts``) as columns."""
    return Facts.from_json({f.name: [row[f.name] for row in rows] for f in fields(Facts)})


def quantiles(difficulty: Array) -> Array:
    """Return (rank + ½) / n of each difficulty, tied ones by their mean rank."""
    from scipy.stats import rankdata

    found: Array = (rankdata(difficulty) - 0.5) / max(1, len(difficulty))
    return found


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
    return type(value) is kind


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
