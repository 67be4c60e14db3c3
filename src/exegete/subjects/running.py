"""A pass over rows under way: fed token by token, copied, and edited, in the same way for every family of models.

How tokens are fed is decided by the subject's verdict, so that the logits are always those of a whole pass: several at
once or one by one on what the model carries, or all again from the beginning where nothing carried is exact.

Rows have one length and are never padded: a recurrent state has no notion of padding. Group prompts by their length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

import torch

from exegete.errors import InputError
from exegete.subjects.edits import Edit, Where, edited
from exegete.subjects.memories import Memory, Parts, called
from exegete.subjects.memories_families import begin
from exegete.subjects.names import Point
from exegete.subjects.recurrent_state import State, StateEdit
from exegete.subjects.subject import Subject
from exegete.subjects.verdicts import verdict


@final
class Running:
    """A pass over some rows under way. Made by ``Running.start``.

    Attributes:
        subject: The model.
        logits: Of the last token of every row, [rows, V] float32.
        tokens: What was read so far, [rows, positions].
    """

    def __init__(self, subject: Subject, tokens: torch.Tensor, logits: torch.Tensor, memory: Memory | None) -> None:
        self.subject, self.tokens, self.logits = subject, tokens, logits
        self._memory = memory
        self._done: tuple[_Done, ...] = ()

    @classmethod
    def begin(cls, subject: Subject, rows: int, *, whole: bool = False) -> Running:
        """Return a pass over rows of which nothing is read yet.

        ``whole`` feeds everything again from the beginning each time, whatever the verdict: slow, and what the fast
        ways are held against. There is no state then.
        """
        memory = None if whole or verdict(subject).route == "whole" else begin(subject, rows)
        nothing = torch.zeros((rows, 0), dtype=torch.long, device=subject.device)
        return cls(subject, nothing, nothing.float(), memory)

    @classmethod
    def start(
        cls, subject: Subject, tokens: torch.Tensor, *, edits: Sequence[Edit] = (), where: Where = slice(None)
    ) -> Running:
        """Read the beginnings [rows, positions] of rows, at least one token of each.

        ``edits`` act at ``where``, as in ``feed``. Raises InputError for no tokens, MismatchError for unknown ids.
        """
        ids = _checked(subject, tokens)
        running = cls.begin(subject, len(ids))
        running.feed(ids, edits=edits, where=where, last=True)
        return running

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @torch.no_grad()
    def feed(
        self,
        tokens: torch.Tensor,
        *,
        edits: Sequence[Edit] = (),
        where: Where = slice(None),
        last: bool = False,
    ) -> torch.Tensor:
        """Read the next tokens [rows, positions] and return their logits [rows, positions, V] float32.

        ``edits`` of the residual stream act at ``where``: positions among these tokens, a slice or a mask
        [rows, positions]. Give them here rather than by ``edited`` around the call: this works on every route.
        ``last`` returns the logits of the last position alone, [rows, 1, V].

        Raises InputError for other rows than before or no tokens, MismatchError for unknown ids.
        """
        ids = _checked(self.subject, tokens)
        if len(ids) != len(self.tokens):
            raise InputError(f"{len(self.tokens)} rows are under way, got tokens for {len(ids)}")
        mask = _mask(where, ids)
        if self._memory is None:
            found = self._again(ids, edits, mask, last)
        else:
            found = self._next(self._memory, ids, edits, mask, last)
        self.tokens = torch.cat([self.tokens, ids], dim=1)
        self.logits = found[:, -1]
        return found

    def _next(
        self, memory: Memory, ids: torch.Tensor, edits: Sequence[Edit], mask: torch.Tensor, last: bool
    ) -> torch.Tensor:
        """Feed tokens to the memory, as many at once as is exact: from nothing, all."""
        chunks = not self.tokens.shape[1] or verdict(self.subject).route == "chunks"
        size = ids.shape[1] if chunks else 1
        found = []
        for at in range(0, ids.shape[1], size):
            here = mask[:, at : at + size]
            with edited(self.subject, edits if bool(here.any()) else (), here):
                logits = memory.feed(ids[:, at : at + size], last=last)
            found.append(logits[:, -1:].float() if last else logits.float())
        return found[-1] if last else torch.cat(found, dim=1)

    def _again(self, ids: torch.Tensor, edits: Sequence[Edit], mask: torch.Tensor, last: bool) -> torch.Tensor:
        """Run the whole pass, with everything that was edited before edited again."""
        before = self.tokens.shape[1]
        tokens = torch.cat([self.tokens, ids], dim=1)
        if edits and bool(mask.any()):
            self._done += (_Done(edits=tuple(edits), start=before, mask=mask),)
        with contextlib.ExitStack() as held:
            for done in self._done:
                held.enter_context(edited(self.subject, done.edits, done.within(tokens)))
            logits: torch.Tensor = called(self.subject.model, tokens, last=last, use_cache=False)["logits"]
        return logits[:, -1 if last else before :].float()

    def copy(self, rows: torch.Tensor | Sequence[int] | None = None) -> Running:
        """Return an independent copy, of some rows in this order (a row may come several times) or of all."""
        at = torch.arange(len(self)) if rows is None else torch.as_tensor(rows, dtype=torch.long)
        at = at.to(self.tokens.device)
        memory = None if self._memory is None else self._memory.copied(None if rows is None else at)
        other = Running(self.subject, self.tokens[at], self.logits[at.to(self.logits.device)], memory)
        other._done = tuple(done.of(at) for done in self._done)
        return other

    def state(self, layers: Collection[int] | None = None) -> State:
        """Return a copy of the recurrent state, of all blocks that carry one or of ``layers`` alone.

        It has no blocks for a model of nothing but attention.
        """
        return State({} if self._memory is None else self._memory.read(layers))

    @torch.no_grad()
    def edit(self, *edits: StateEdit) -> int:
        """Change the recurrent state, one edit after another, for every token from the next on.

        Returns how many entries the model could not hold: denominators of RWKV that an edit would have taken below
        one hundredth of what they were are held there.

        Raises:
            InputError: When the model carries no state that can be edited.
            NotFoundError: For blocks or components that it does not have.
            MismatchError: For sizes of another model.
        """
        known = {} if self._memory is None else self._memory.names()
        if self._memory is None or not known:
            name = self.subject.name
            raise InputError(f"{name} carries no recurrent state that can be edited; edit its residual stream instead")
        reached = [(edit, edit.reach(known)) for edit in edits]
        touched = sorted({i for _, reach in reached for i in reach})
        parts = self._memory.read(touched)
        new: Parts = {i: {} for i in touched}
        for edit, reach in reached:
            for i, names in reach.items():
                for name in names:
                    new[i][name] = edit.changed(i, name, new[i].get(name, parts[i][name]))
        return sum(self._memory.write(i, values) for i, values in new.items())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """Edits that were made at some tokens, from ``start`` on, of the rows of ``mask`` [rows, positions]."""

    edits: tuple[Edit, ...]
    start: int
    mask: torch.Tensor

    def within(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mask among all tokens [rows, positions]."""
        found = torch.zeros(tokens.shape, dtype=torch.bool, device=self.mask.device)
        found[:, self.start : self.start + self.mask.shape[1]] = self.mask
        return found

    def of(self, rows: torch.Tensor) -> _Done:
        """Return these edits for some of the rows."""
        edits = tuple(_OfRows(edit, rows) for edit in self.edits)
        return _Done(edits=edits, start=self.start, mask=self.mask[rows.to(self.mask.device)])


@final
class _OfRows(Edit):
    """An edit made for some rows, at the rows that were copied from them."""

    def __init__(self, edit: Edit, origin: torch.Tensor) -> None:
        self.target: Point = edit.target
        self.source: Point | None = edit.source
        self._edit, self._origin = edit, origin

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return what the edit adds at the rows that these came from."""
        return self._edit.change(y, x, self._origin.to(rows.device)[rows])


def _mask(where: Where, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(where, slice):
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        mask[:, where] = True
        return mask
    if where.shape != ids.shape:
        raise InputError(
            f"a mask of positions has the shape of the tokens {tuple(ids.shape)}, got {tuple(where.shape)}"
        )
    return where.to(ids.device)


def _checked(subject: Subject, tokens: torch.Tensor) -> torch.Tensor:
    if tokens.ndim != 2 or not tokens.numel():
        raise InputError(f"tokens are [rows, positions], at least one of each, got shape {tuple(tokens.shape)}")
    subject.check_ids(tokens)
    return tokens.to(subject.device, torch.long)
