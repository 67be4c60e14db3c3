"""Does a probe's direction carry the model's answer? Vectors are reflected along it, and the answers asked again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from exegete.elk.encoding import Encoded
from exegete.elk.extraction import answer_log_odds
from exegete.elk.facts import Filter
from exegete.elk.intervals import DRAWS, clustered_auroc, resampled_statistic
from exegete.errors import InputError
from exegete.metrics import Interval
from exegete.steering.operators import Steer
from exegete.streams import stream
from exegete.subjects.edits import Edit
from exegete.subjects.names import Point
from exegete.subjects.sites import site_point
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.subjects import Subject

RANDOM: Final = 20


@final
class Reflect(Edit):
    """y ↦ y − 2 ((y − centre) · u) u, with u a direction [d] of unit length."""

    def __init__(self, target: Point, direction: Array, centre: Array) -> None:
        self.target, self.source = target, None
        unit = np.asarray(direction, np.float64)
        length = float(np.linalg.norm(unit))
        if not length > 0:
            raise InputError("a direction to reflect along has a length above 0")
        along, middle = (torch.from_numpy(np.asarray(part, np.float32)) for part in (unit / length, centre))
        self._steer = Steer(target, "reflect", along, centre=middle)

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return what is added to ``y`` [n, d]. Raises MismatchError for a direction of another size."""
        return self._steer.change(y, x, rows)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """What became of the model's answers when vectors at one site were reflected along a probe's direction.

    ``flipped`` is the share of answers that changed, ``moved`` the mean change of the log-odds towards the other
    answer, in nats; ``before`` and ``after`` the AUROC of the answers against the truth. ``random_flipped`` are the
    same shares of random directions, each its own, and ``random_moved`` their mean changes; ``flipped_by_random`` and
    ``moved_by_random`` are their means over the directions (NaN without any).
    """

    site: int
    probe: str
    source: str
    pool: str
    which: Filter
    flipped: Interval
    moved: Interval
    before: Interval
    after: Interval
    random_flipped: tuple[float, ...]
    random_moved: tuple[float, ...]
    flipped_by_random: Interval
    moved_by_random: Interval


def intervene(
    subject: Subject,
    data: Encoded,
    direction: Array,
    centre: Array,
    site: int,
    *,
    probe: str = "",
    source: str = "",
    pool: str = "all",
    which: Filter = "all",
    random: int = RANDOM,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Intervention:
    """Reflect the residual stream at a site, at the statement's last token, and compare the answers.

    Args:
        subject: The model.
        data: Rows.
        direction: [d] of a probe at this site (``Probe.direction``).
        centre: [d] what is reflected about: the mean of the vectors that the probe was fitted on.
        site: Where.
        probe: The probe's name, and with ``source`` what it was fitted on, for the record.
        source: See ``probe``.
        pool: Which rows.
        which: Of these.
        random: Random directions for comparison.
        draws: Of the bootstrap over base examples.
        seed: Of both.
        level: Of the intervals.

    Raises:
        InputError: For no rows, or less than no random directions.
        MismatchError: For a direction of another size.
    """
    if random < 0:
        raise InputError(f"the number of random directions is 0 or more, got {random}")
    data = data.take(data.facts.pool(pool) & data.facts.where(which))
    if not len(data):
        raise InputError(f"the pool {pool} ({which}) has no rows to intervene on")
    point = site_point(subject, site)
    before = answer_log_odds(subject, data).astype(np.float64)

    def reflected(along: Array) -> Array:
        return answer_log_odds(subject, data, edits=[Reflect(point, along, centre)]).astype(np.float64)

    after = reflected(direction)
    others = [reflected(stream(seed, "reflect", i).standard_normal(len(direction))) for i in range(random)]
    facts, places = data.facts, data.facts.places
    flips, moves = (
        [change(before, other) for other in others] or [np.full(len(data), np.nan)] for change in (_flipped, _moved)
    )

    def mean(values: Array) -> Interval:
        return resampled_statistic(
            lambda weights: (weights @ values) / weights.sum(axis=1), places, draws=draws, seed=seed, level=level
        )

    return Intervention(
        site=site,
        probe=probe,
        source=source,
        pool=pool,
        which=which,
        flipped=mean(_flipped(before, after)),
        moved=mean(_moved(before, after)),
        before=clustered_auroc(facts.alice, before, places, level=level),
        after=clustered_auroc(facts.alice, after, places, level=level),
        random_flipped=tuple(float(one.mean()) for one in flips[:random]),
        random_moved=tuple(float(one.mean()) for one in moves[:random]),
        flipped_by_random=mean(np.mean(flips, axis=0)),
        moved_by_random=mean(np.mean(moves, axis=0)),
    )


def _flipped(before: Array, after: Array) -> Array:
    found: Array = ((before > 0) != (after > 0)).astype(np.float64)
    return found


def _moved(before: Array, after: Array) -> Array:
    """Return by how much log-odds moved towards the answer that was not given."""
    found: Array = (before - after) * np.where(before > 0, 1.0, -1.0)
    return found
