"""Probabilities of the two answers to questions, as the subject is and steered in many settings at once.

Prompts are grouped by their exact length. What no setting edits is read once; every setting goes on from a copy. One
pass holds many settings: a row has its own vector and its own multiplier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

from exegete.errors import InputError
from exegete.steering.operators import POSITIVE, Operator
from exegete.steering.passes import read_on, row_edits
from exegete.steering.places import Places
from exegete.steering.questions import Question, Tokens
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject
from exegete.subjects.edits import Edit
from exegete.subjects.recurrent_state import StateEdit
from exegete.subjects.running import Running

ROWS_AT_ONCE: Final = 256
TOKENS_AT_ONCE: Final = 16384
"""What copies of caches that exist at once hold, in tokens: those of attention grow with the prompt."""
Floats = npt.NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A vector and how much of it."""

    vector: SteeringVector
    multiplier: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """p of the answer that shows the behaviour and of the other one, each [settings, questions]."""

    match: Floats
    other: Floats

    @property
    def share(self) -> Floats:
        """p(match) / (p(match) + p(other)) [settings, questions]; ½ where both are 0."""
        both = self.match + self.other
        return np.where(both > 0, self.match / np.where(both > 0, both, 1.0), 0.5)

    @property
    def nonsense(self) -> Floats:
        """1 − p(match) − p(other) [settings, questions]: what falls on anything else."""
        return np.asarray(np.clip(1.0 - self.match - self.other, 0.0, 1.0))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Prompts of one length: their places among all, what is left to read [n, k], and the pass so far."""

    places: tuple[int, ...]
    rest: torch.Tensor
    length: int
    begun: Running | None


@final
class Asked:
    """Questions put to a subject, the beginnings that are never edited read once.

    Args:
        subject: The model.
        questions: Prompts with two answers each.
        where: Prompt tokens at which the residual stream is edited.
        state_where: Prompt tokens before which the state is edited.

    Raises:
        InputError: For no questions.
    """

    def __init__(self, subject: Subject, questions: Sequence[Question], where: Places, state_where: Places) -> None:
        if not questions:
            raise InputError("there are no questions to ask")
        self._subject, self._questions = subject, tuple(questions)
        self._where, self._state_where = where, state_where
        self._groups: list[_Group] = []
        for length in sorted({len(question.prompt) for question in questions}):
            all_places = [i for i, question in enumerate(questions) if len(question.prompt) == length]
            size = _rows_at_once(length)
            for at in range(0, len(all_places), size):
                self._groups.append(self._group(tuple(all_places[at : at + size]), length))

    def __len__(self) -> int:
        return len(self._questions)

    def answers(
        self, settings: Sequence[Setting | None], *, operator: Operator = "add", at: float = POSITIVE
    ) -> Answers:
        """Return the probabilities in every setting; None, and a multiplier of 0, is the subject as it is.

        Settings are run in an order of their own, so that theirs does not matter to the last bit.
        """
        match, other = (np.zeros((len(settings), len(self))) for _ in range(2))
        clean = [i for i, setting in enumerate(settings) if setting is None or setting.multiplier == 0]
        if clean:
            for group in self._groups:
                found = self._run(group, [], torch.arange(len(group.places)), None, operator, at)
                for values, probabilities in zip((match, other), found, strict=True):
                    values[np.ix_(clean, group.places)] = probabilities
        for indices, batch in _batches(settings):
            for group in self._groups:
                size = max(1, _rows_at_once(group.length) // len(group.places))
                for first in range(0, len(batch), size):
                    part = batch[first : first + size]
                    pairs = torch.cartesian_prod(torch.arange(len(part)), torch.arange(len(group.places)))
                    found = self._run(group, part, pairs[:, 1], pairs[:, 0], operator, at)
                    for values, probabilities in zip((match, other), found, strict=True):
                        for k, i in enumerate(indices[first : first + size]):
                            n = len(group.places)
                            values[i, list(group.places)] = probabilities[k * n : (k + 1) * n]
        return Answers(match=match, other=other)

    def _group(self, chosen: tuple[int, ...], length: int) -> _Group:
        tokens = torch.tensor([self._questions[i].prompt for i in chosen], device=self._subject.device)
        last = max(1, self._where.from_end(length), self._state_where.from_end(length))
        begun = Running.start(self._subject, tokens[:, :-last]) if last < length else None
        return _Group(places=chosen, rest=tokens[:, -last:], length=length, begun=begun)

    def _run(
        self,
        group: _Group,
        settings: Sequence[Setting],
        rows: torch.Tensor,
        which: torch.Tensor | None,
        operator: Operator,
        at: float,
    ) -> tuple[Floats, Floats]:
        """Return p of both answers for rows of a group, each under its setting."""

        def edits_of(chosen: torch.Tensor) -> tuple[list[Edit], list[StateEdit]]:
            if which is None:
                return [], []
            vectors, multipliers = [s.vector for s in settings], [s.multiplier for s in settings]
            return row_edits(self._subject, vectors, multipliers, which[chosen], operator=operator, at=at)

        everyone = torch.arange(len(rows))
        edits, changes = edits_of(everyone)
        running = read_on(
            self._subject,
            None if group.begun is None else group.begun.copy(rows),
            group.rest[rows.to(group.rest.device)],
            prompt=group.length,
            edits=edits,
            where=self._where,
            changes=changes,
            state_where=self._state_where,
        )
        asked = [self._questions[group.places[int(row)]] for row in rows]
        logs = running.logits.double().log_softmax(dim=-1).cpu()
        found = []
        for answers in ([question.match for question in asked], [question.other for question in asked]):
            log_p = logs[everyone, [answer[0] for answer in answers]]
            for chosen, tail in _longer(answers):
                held = running.copy(chosen)
                more, more_changes = edits_of(chosen)
                log_p[chosen] += self._spelled(held, tail, group.length, more, more_changes)
            found.append(log_p.exp().numpy())
        return found[0], found[1]

    def _spelled(
        self,
        running: Running,
        tail: torch.Tensor,
        prompt: int,
        edits: Sequence[Edit],
        changes: Sequence[StateEdit],
    ) -> torch.Tensor:
        """Return log p [rows] of the tokens [rows, k] of answers after their first, which is read here."""
        total = torch.zeros(len(tail), dtype=torch.float64)
        for at in range(tail.shape[1] - 1):
            running = read_on(
                self._subject,
                running,
                tail[:, at : at + 1].to(self._subject.device),
                prompt=prompt,
                edits=edits,
                where=self._where,
                changes=changes,
                state_where=self._state_where,
            )
            logs = running.logits.double().log_softmax(dim=-1).cpu()
            total += logs.gather(1, tail[:, at + 1 : at + 2])[:, 0]
        return total


def _rows_at_once(length: int) -> int:
    return max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // length))


def _longer(answers: Sequence[Tokens]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield answers of several tokens by their length: which they are [n], and their tokens [n, k]."""
    for length in sorted({len(answer) for answer in answers} - {1}):
        chosen = [i for i, answer in enumerate(answers) if len(answer) == length]
        yield torch.tensor(chosen), torch.tensor([answers[i] for i in chosen])


def _batches(settings: Sequence[Setting | None]) -> Iterator[tuple[list[int], list[Setting]]]:
    """Yield settings that can share a pass, sorted by multiplier: those of vectors with the same parts."""
    kinds: dict[tuple[str, ...], list[tuple[int, Setting]]] = {}
    for i, setting in enumerate(settings):
        if setting is not None and setting.multiplier != 0:
            kinds.setdefault(tuple(name for name, _ in setting.vector.parts()), []).append((i, setting))
    for held in kinds.values():
        # Vectors keep the order in which they first come, so only multipliers are sorted within one.
        order: dict[int, int] = {}
        for _, setting in held:
            order.setdefault(id(setting.vector), len(order))
        held.sort(key=lambda one: (order[id(one[1].vector)], one[1].multiplier))
        yield [i for i, _ in held], [setting for _, setting in held]
