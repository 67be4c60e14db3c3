"""Tokens read with a vector at work: the residual stream edited at tokens, the state between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from exegete.errors import InputError, MismatchError
from exegete.steering.operators import POSITIVE, Operator, Steer
from exegete.steering.places import Places
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject
from exegete.subjects.edits import Edit
from exegete.subjects.recurrent_state import AddState, StateEdit, StateVector
from exegete.subjects.running import Running
from exegete.subjects.sites import site_point


def row_edits(
    subject: Subject,
    vectors: Sequence[SteeringVector],
    multipliers: Sequence[float],
    which: torch.Tensor,
    *,
    operator: Operator = "add",
    at: float = POSITIVE,
) -> tuple[list[Edit], list[StateEdit]]:
    """Return the edits of a pass in which row i is steered with vector and multiplier number ``which[i]``.

    All vectors have the same sites, and state parts of the same blocks and components.

    Raises:
        InputError: For an operator other than ``add`` with a state part.
    """
    first = vectors[0]
    by = torch.tensor(multipliers, dtype=torch.float32)[which]
    edits: list[Edit] = []
    alike = all(vector is first for vector in vectors)
    for site in first.sites:
        own = first.residual[site] if alike else torch.stack([v.residual[site] for v in vectors])[which]
        centre = first.centres.get(site)
        if not alike:
            zero = torch.zeros_like(first.residual[site])
            centre = torch.stack([v.centres.get(site, zero) for v in vectors])[which]
        edits.append(Steer(site_point(subject, site), operator, own, by, centre=centre, at=at))
    if not first.state.parts:
        return edits, []
    if operator != "add":
        raise InputError(f"a vector is only added to a state, {operator} is for the residual stream; use mode residual")
    if alike:
        return edits, [AddState(vector=first.state, multiplier=by)]
    return edits, [_AddEach(vectors=[vector.state for vector in vectors], which=which, multipliers=by)]


@final
@dataclass(frozen=True, eq=False)
class _AddEach(StateEdit):
    """Add to row i the vector number ``which[i]`` times ``multipliers[i]``; 0 changes no bit."""

    vectors: Sequence[StateVector]
    which: torch.Tensor
    multipliers: torch.Tensor

    def _about(self, have: Mapping[int, Collection[str]]) -> Mapping[int, Collection[str]]:
        return self.vectors[0].parts

    def changed(self, layer: int, component: str, value: torch.Tensor) -> torch.Tensor:
        """Return the component with each row's vector added. Raises MismatchError for other sizes."""
        parts = [vector.parts[layer][component] for vector in self.vectors]
        if any(part.shape != value.shape[1:] for part in parts):
            raise MismatchError(f"{component} of block {layer} has the sizes {tuple(value.shape[1:])} in this model")
        distinct = {id(part): part for part in parts}
        places = {name: i for i, name in enumerate(distinct)}
        own = torch.tensor([places[id(part)] for part in parts])[self.which].to(value.device)
        by = self.multipliers.to(value).reshape(-1, *(1 for _ in parts[0].shape))
        return torch.where(by == 0, value, value + by * torch.stack(list(distinct.values())).to(value)[own])


def read_on(
    subject: Subject,
    running: Running | None,
    tokens: torch.Tensor,
    *,
    prompt: int,
    edits: Sequence[Edit],
    where: Places,
    changes: Sequence[StateEdit] = (),
    state_where: Places | None = None,
) -> Running:
    """Read the next tokens [rows, positions] of rows under way (None: from the beginning) with edits at their places.

    Residual edits are made at the tokens that ``where`` names, state edits before those that ``state_where`` names; a
    state that has read nothing is not edited. ``prompt`` is the length of the prompt. Returns the pass, advanced.
    """
    begun = 0 if running is None else running.tokens.shape[1]
    at = torch.arange(begun, begun + tokens.shape[1])[None]
    length = torch.tensor([prompt])
    marked = where.mask(at, length)[0]
    before = (state_where or where).mask(at, length)[0] if changes else torch.zeros_like(marked)
    cuts = sorted({0, *before.nonzero()[:, 0].tolist()})
    for first, end in zip(cuts, [*cuts[1:], tokens.shape[1]], strict=True):
        part, mask = tokens[:, first:end], marked[first:end].expand(len(tokens), -1).to(subject.device)
        used = edits if bool(mask.any()) else ()
        if running is None:
            running = Running.start(subject, part, edits=used, where=mask)
            continue
        if bool(before[first]):
            running.edit(*changes)
        running.feed(part, edits=used, where=mask, last=True)
    assert running is not None  # there is at least one token
    return running
