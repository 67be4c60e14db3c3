"""What a vector does to the residual stream: add, project out, reflect, clamp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final, get_args

import torch

from exegete.errors import InputError, MismatchError, unknown
from exegete.steering.vector import SteeringVector
from exegete.subjects import Subject
from exegete.subjects.edits import Edit, Strength
from exegete.subjects.names import Point
from exegete.subjects.sites import site_point

Operator = Literal["add", "project-out", "reflect", "clamp"]
POSITIVE = 0.5
"""Where ``clamp`` puts activations: half a mean difference from the middle of both classes is the positive's mean."""


@final
class Steer(Edit):
    """Move activations y along a vector v, with û = v / |v| and c the middle between the two classes (or 0).

    ``add``: y + v. ``project-out``: y − ((y − c)·û) û. ``reflect``: y − 2 ((y − c)·û) û. ``clamp``: the coordinate
    (y − c)·û becomes ``at`` · |v|. The multiplier scales the change, so 0 changes nothing and 1 is the whole of it.

    Args:
        target: Where.
        operator: Which of the four.
        vector: [d], or one for each row of the pass [rows, d].
        multiplier: A number, or one for each row [rows].
        centre: The middle c, [d] or one for each row [rows, d]; None for 0.
        at: For ``clamp``.

    Raises:
        NotFoundError: For another operator.
    """

    def __init__(
        self,
        target: Point,
        operator: Operator,
        vector: torch.Tensor,
        multiplier: Strength = 1.0,
        *,
        centre: torch.Tensor | None = None,
        at: float = POSITIVE,
    ) -> None:
        if operator not in get_args(Operator):
            raise unknown("operator", operator, get_args(Operator))
        self.target, self.source = target, None
        self._operator, self._vector, self._multiplier = operator, vector.float(), multiplier
        self._centre, self._at = centre, at

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return what is added to ``y`` [n, d]. Raises MismatchError for a vector of another size."""
        if self._vector.shape[-1] != y.shape[1]:
            raise MismatchError(
                f"the vector has {self._vector.shape[-1]} dimensions, {self.target[0]!r} has {y.shape[1]}"
            )
        vector = self._vector.to(y.device)
        vector = vector if vector.ndim == 1 else vector[rows]
        by = self._multiplier
        times = by.to(y.device)[rows][:, None].float() if isinstance(by, torch.Tensor) and by.ndim else float(by)
        if self._operator == "add":
            return (times * vector).expand(len(y), -1)
        length = vector.norm(dim=-1, keepdim=True)
        unit = vector / length.clamp_min(torch.finfo(vector.dtype).tiny)
        own = y.float()
        if self._centre is not None:
            centre = self._centre.to(y.device)
            own = own - (centre if centre.ndim == 1 else centre[rows])
        along = (own * unit).sum(dim=1, keepdim=True)
        wanted = {"project-out": 0.0 * along, "reflect": -along, "clamp": (self._at * length).expand_as(along)}
        change: torch.Tensor = times * (wanted[self._operator] - along) * unit
        return change


def steer_edits(
    subject: Subject,
    vector: SteeringVector,
    multiplier: Strength,
    *,
    operator: Operator = "add",
    sites: Sequence[int] | None = None,
    at: float = POSITIVE,
) -> list[Edit]:
    """Return the edits of the residual stream that a vector stands for, at all its sites or those given.

    Raises InputError where the vector has nothing at a site, MismatchError where it is of another model's size.
    """
    chosen = vector.sites if sites is None else tuple(sites)
    if missing := [site for site in chosen if site not in vector.residual]:
        have = ", ".join(map(str, vector.sites)) or "none"
        raise InputError(f"the vector has nothing at site {missing[0]}; it has the sites {have}")
    vector.require(subject)
    return [
        Steer(
            site_point(subject, site),
            operator,
            vector.residual[site],
            multiplier,
            centre=vector.centres.get(site),
            at=at,
        )
        for site in chosen
    ]
