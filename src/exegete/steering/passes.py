"""Tokens read with a vector at work: the residual stream edited at tokens, the state between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exegete.errors import InputError
from exegete.steering.operators import POSITIVE, Operator, Steer
from exegete.steering.places import Places
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject
from exegete.subjects.edits import Edit
from exegete.subjects.recurrent_state import AddState, StateEdit
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

    All vectors have the same sites, and one state part between them.

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
    return edits, [AddState(vector=first.state, multiplier=by)]


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
