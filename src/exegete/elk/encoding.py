"""Questions as token ids: the statement, and what each answer adds to it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, final

import numpy as np

from exegete.elk.facts import Facts, facts_of
from exegete.elk.questions import Question, Questions, Split, facts_row
from exegete.errors import InputError
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.subjects import Subject

log = logging.getLogger("exegete")
Ids = tuple[int, ...]
_TEXTS_AT_ONCE: Final = 4096


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Rows as token ids: ``prompts`` [n], the false and the true answer of each, and what is known of them.

    Answers may have several tokens; the first ones differ, since the model is asked, and trained, by them.

    Raises InputError for an empty prompt or answer, or two answers that begin with one token.
    """

    prompts: tuple[Ids, ...]
    choices: tuple[tuple[Ids, Ids], ...]
    facts: Facts

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.choices) == len(self.facts):
            raise InputError("prompts, choices and facts differ in number")
        for i, (prompt, (negative, positive)) in enumerate(zip(self.prompts, self.choices, strict=True)):
            if not (prompt and negative and positive):
                raise InputError(f"row {self.facts.id[i]}: its prompt or an answer has no tokens")
            if negative[0] == positive[0]:
                raise InputError(
                    f"row {self.facts.id[i]}: both answers begin with token {negative[0]}, so nothing tells them apart"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def hash(self) -> str:
        """Content hash of ids and facts, 16 hex digits."""
        digest = hashlib.sha256()
        for prompt, (negative, positive) in zip(self.prompts, self.choices, strict=True):
            digest.update(np.array([*prompt, -1, *negative, -2, *positive, -3], np.int64).tobytes())
        for column in (self.facts.id, self.facts.base):
            digest.update("\n".join(column.tolist()).encode())
        for column in (self.facts.alice_speaks, self.facts.alice, self.facts.bob, self.facts.quantile):
            digest.update(column.astype(np.float64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def answers(self) -> Array:
        """First tokens of the false and the true answer [n, 2] int64."""
        return np.array([[negative[0], positive[0]] for negative, positive in self.choices], np.int64).reshape(-1, 2)

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each row [n, 2]: of its prompt, and of the longer of its answers."""
        longer = [max(map(len, choices)) for choices in self.choices]
        return np.array([[len(p), a] for p, a in zip(self.prompts, longer, strict=True)], np.int64).reshape(-1, 2)

    def take(self, rows: Array) -> Encoded:
        """Return the rows of a mask or of indices."""
        at = np.arange(len(self))[rows].tolist()
        return Encoded(
            prompts=tuple(self.prompts[i] for i in at),
            choices=tuple(self.choices[i] for i in at),
            facts=self.facts.take(rows),
        )

    def first(self, rows: int, seed: int) -> Encoded:
        """Return about ``rows`` rows: whole base examples in a random order, as many as fit; all where fewer."""
        if rows >= len(self):
            return self
        bases, place, sizes = np.unique(self.facts.base, return_inverse=True, return_counts=True)
        keys = np.array([hashlib.blake2b(f"{seed}|{b}".encode(), digest_size=8).hexdigest() for b in bases.tolist()])
        order = np.argsort(keys)
        kept = np.zeros(len(bases), bool)
        kept[order[np.cumsum(sizes[order]) <= rows]] = True
        return self.take(kept[place])


def encode(questions: Questions, split: Split, subject: Subject, *, most_tokens: int | None = None) -> Encoded:
    """Return a split as token ids of a subject's tokenizer, with the special tokens that it puts before a text.

    An answer is what it adds to the statement when both are encoded together; encoded alone where they do not split
    there. Rows of more than ``most_tokens`` tokens are left out, and their number is said.

    Raises InputError for answers that no first token tells apart, or where every row is too long.
    """
    rows: list[Question] = []
    prompts: list[Ids] = []
    choices: list[tuple[Ids, Ids]] = []
    for row, prompt, negative, positive in _tokens(questions.splits[split], subject):
        if most_tokens is None or len(prompt) + max(len(negative), len(positive)) <= most_tokens:
            rows.append(row)
            prompts.append(prompt)
            choices.append((negative, positive))
    left = len(questions.splits[split]) - len(rows)
    if left and not rows:
        raise InputError(f"all {left:,} {split} rows of {questions.name} have over {most_tokens} tokens; allow more")
    if left:
        log.warning("%s %s: %d rows of over %s tokens are left out", questions.name, split, left, most_tokens)
    return Encoded(prompts=tuple(prompts), choices=tuple(choices), facts=facts_of([facts_row(row) for row in rows]))


def require_room(subject: Subject, data: Encoded, *, answers: bool = False) -> None:
    """Raise unless a model can read every row, with or without its answers.

    InputError names the longest row where it is longer than the positions that the model says it has, MismatchError is
    raised for token ids that it does not have.
    """
    import torch

    if not len(data):
        return
    most = subject.context
    lengths = data.lengths[:, 0] + (data.lengths[:, 1] if answers else 0)
    long = int(np.argmax(lengths))
    if most is not None and lengths[long] > most:
        raise InputError(
            f"{subject.name} reads up to {most} tokens; {int((lengths > most).sum()):,} of {len(data):,} rows are "
            f"longer, row {data.facts.id[long]} has {lengths[long]}; leave them out: --most-tokens {most}"
        )
    used = {i for row in data.prompts for i in row} | {i for pair in data.choices for answer in pair for i in answer}
    subject.check_ids(torch.tensor(sorted(used)))


def by_length(prompts: Sequence[Ids], tokens_at_once: int, most_rows: int = 1 << 62) -> Iterator[Array]:
    """Yield the rows [m] of batches of one length each, of at most so many tokens and rows (at least one row)."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    for length in np.unique(lengths).tolist():
        same = np.flatnonzero(lengths == length)
        size = max(1, min(most_rows, tokens_at_once // length))
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _tokens(rows: Sequence[Question], subject: Subject) -> Iterator[tuple[Question, Ids, Ids, Ids]]:
    """Yield rows with the ids of their statement, false and true answer, encoding many texts at a time."""
    for at in range(0, len(rows), _TEXTS_AT_ONCE):
        some = rows[at : at + _TEXTS_AT_ONCE]
        alone = subject.tokenizer([row.statement for row in some])["input_ids"]
        answered = [subject.tokenizer([row.statement + row.choices[i] for row in some])["input_ids"] for i in (0, 1)]
        for row, ids, *both in zip(some, alone, *answered, strict=True):
            prompt = tuple(ids)
            negative, positive = (_answer(subject, prompt, tuple(b), c) for b, c in zip(both, row.choices, strict=True))
            yield row, prompt, negative, positive


def _answer(subject: Subject, prompt: Ids, both: Ids, choice: str) -> Ids:
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return both[len(prompt) :]
    return tuple(subject.tokenizer(choice, add_special_tokens=False)["input_ids"])
