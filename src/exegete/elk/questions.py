"""Questions: rows of a quirky set in words, split by base example so that no claim is in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, final

from exegete.elk.arithmetic import OPERATIONS, BaseExample, arithmetic
from exegete.elk.facts import CHARACTERS, Facts, facts_of
from exegete.elk.templates import Wording, chosen, templates
from exegete.errors import InputError, unknown
from exegete.files import canonical_json, hash_json

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
PUBLISHED: Final = {"train": 100_000, "validation": 10_000, "test": 10_000}
"""Base examples in the published arithmetic sets."""
SQUARING: Final = {"train": 20_000, "validation": 4_000, "test": 4_000}
"""Fewer: there are 99,999 operands in all, and their sizes would no longer be log-uniform."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row: a statement in one character's context and the two answers to it, false and true.

    ``id`` is its own, ``base`` that of the claim. ``alice`` and ``bob`` are what the characters say of the claim.
    """

    id: str
    base: str
    template: str
    character: str
    statement: str
    choices: tuple[str, str]
    alice: bool
    bob: bool
    difficulty: float
    quantile: float

    @property
    def label(self) -> bool:
        """What the character of the context says."""
        return self.alice if self.character == "Alice" else self.bob

    def to_json(self) -> dict[str, Any]:
        """Return the row with the names of the published sets."""
        return {
            "id": self.id,
            "base": self.base,
            "template": self.template,
            "character": self.character,
            "statement": self.statement,
            "choices": list(self.choices),
            "label": self.label,
            "alice_label": self.alice,
            "bob_label": self.bob,
            "difficulty": self.difficulty,
            "difficulty_quantile": self.quantile,
        }


@final
class Questions:
    """The rows of a quirky set, by split.

    Attributes:
        name: Of the set.
        wording: Which templates it was put into; ``given`` where the rows came with their statements.
        splits: Rows by split. No base example is in two of them.

    Raises:
        InputError: For splits that share a base example, or no rows.
    """

    def __init__(self, name: str, wording: str, splits: Mapping[Split, Sequence[Question]]) -> None:
        self.name, self.wording = name, wording
        self.splits: dict[Split, tuple[Question, ...]] = {s: tuple(splits.get(s, ())) for s in SPLITS}
        if not any(self.splits.values()):
            raise InputError(f"the set {name} has no rows")
        seen: dict[str, Split] = {}
        for split, rows in self.splits.items():
            for row in rows:
                if seen.setdefault(row.base, split) != split:
                    raise InputError(
                        f"{name}: the claim of row {row.id} is in {seen[row.base]} and in {split}; "
                        f"splits may share no claim"
                    )

    @cached_property
    def hash(self) -> str:
        """Content hash of all rows, 16 hex digits."""
        return hash_json({s: [row.to_json() for row in rows] for s, rows in self.splits.items()})

    def facts(self, split: Split) -> Facts:
        """Return what is known of a split's rows, as columns."""
        return facts_of([facts_row(row) for row in self.splits[split]])


def facts_row(row: Question) -> dict[str, Any]:
    """Return one row of facts."""
    return {
        "id": row.id,
        "base": row.base,
        "alice_speaks": row.character == "Alice",
        "label": row.label,
        "alice": row.alice,
        "bob": row.bob,
        "difficulty": float(row.difficulty),
        "quantile": float(row.quantile),
    }


def quirky_set(
    name: str,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    wording: Wording = "first",
    digits: int | None = None,
    seed: int = 0,
) -> Questions:
    """Return one of the five arithmetic sets, generated; the numbers are of base examples, each of which has two rows.

    They are by default those of ``PUBLISHED``, or for squaring ``SQUARING``.

    Raises NotFoundError for another set, InputError for more examples than there are operands.
    """
    usual = SQUARING if name == "squaring" else PUBLISHED
    given: dict[Split, int | None] = {"train": train, "validation": validation, "test": test}
    sizes: dict[Split, int] = {split: usual[split] if size is None else size for split, size in given.items()}
    if min(sizes.values()) < 0 or not any(sizes.values()):
        told = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise InputError(f"a split has 0 or more base examples, and one at least has some; got {told}")
    if name not in OPERATIONS:
        raise unknown("generated set", name, OPERATIONS)
    drawn = arithmetic(name, sum(sizes.values()), digits=digits, seed=seed)
    at, splits = 0, {}
    for split, size in sizes.items():
        splits[split] = worded(name, drawn[at : at + size], wording, seed=seed)
        at += size
    return Questions(name, wording, splits)


def worded(name: str, examples: Iterable[BaseExample], wording: Wording, *, seed: int = 0) -> list[Question]:
    """Return each example in the words of a set's templates, once or more for each character."""
    options = templates(name, wording)
    found = []
    for example in examples:
        base = base_id({"set": name, **example.args})
        for character in CHARACTERS:
            for template in chosen(options, wording, f"{base}-{character}", seed):
                ending = "" if wording in ("first", "standardised") else f"-{template.name}"
                found.append(
                    Question(
                        id=f"{base}-{character}{ending}",
                        base=base,
                        template=template.name,
                        character=character,
                        statement=template.fill(example.args, character),
                        choices=template.choices,
                        alice=example.alice,
                        bob=example.bob,
                        difficulty=example.difficulty,
                        quantile=example.quantile,
                    )
                )
    return found


def base_id(claim: Any) -> str:
    """Return the id of a claim, 16 hex digits."""
    return hashlib.sha256(canonical_json(claim).encode()).hexdigest()[:16]
