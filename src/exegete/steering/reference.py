"""Published numbers of steering, beside those of a sweep. They ship as data, with where they are from and cautions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, final

import yaml

from exegete.errors import unknown

if TYPE_CHECKING:
    from exegete.steering.sweeping import Sweep


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was published of one behaviour, in points of p(match).

    Attributes:
        behaviour: Its name.
        multipliers: Of ``change``.
        change: By model, the change against multiplier 0 at each multiplier.
        limits: (model, multiplier) of numbers that the figure cut off: the true ones lie beyond.
        most: By model, the largest difference with residual, state and both.
    """

    behaviour: str
    multipliers: tuple[float, ...]
    change: Mapping[str, tuple[float, ...]]
    limits: frozenset[tuple[str, float]]
    most: Mapping[str, tuple[float, float, float]]


def published(behaviour: str) -> Published:
    """Return the published numbers of a behaviour. Raises NotFoundError for one without."""
    held = _held()
    if behaviour not in held["change"]:
        raise unknown("published behaviour", behaviour, held["change"])
    rows = held["change"][behaviour]
    most = {m: tuple(map(float, table[behaviour])) for m, table in held["most"].items() if behaviour in table}
    return Published(
        behaviour=behaviour,
        multipliers=tuple(map(float, held["multipliers"])),
        change={model: tuple(map(float, row)) for model, row in zip(held["models"], rows, strict=True)},
        limits=frozenset((m, float(x)) for b, m, x in held["limit"] if b == behaviour),
        most={model: (a, b, c) for model, (a, b, c) in most.items()},
    )


def published_behaviours() -> tuple[str, ...]:
    """Return the behaviours that have published numbers, sorted."""
    return tuple(sorted(_held()["change"]))


def origin() -> tuple[str, tuple[str, ...]]:
    """Return where the numbers are from, and the cautions to read them with."""
    return str(_held()["source"]), tuple(map(str, _held()["cautions"]))


def reference_lines(found: Sweep) -> list[str]:
    """Return the published numbers beside a sweep's own, as lines; own ones are of each mode's chosen site."""
    lines = [f"published: {origin()[0]}", *(f"caution: {text}" for text in origin()[1])]
    for behaviour in dict.fromkeys(point.behaviour for point in found.points):
        if behaviour not in _held()["change"]:
            lines.append(f"{behaviour or 'these questions'}: nothing published")
            continue
        table = published(behaviour)
        heads = [f"{m:+g}" for m in table.multipliers]
        rows = [["change in p(match), points", *heads]]
        rows += [[m, *_cells(m, table)] for m in table.change]
        rows += _own(found, behaviour, table.multipliers)
        lines += ["", behaviour, *_aligned(rows)]
        rows = [["largest difference, points", "residual", "state", "both"]]
        rows += [[model, *(f"{value:.1f}" for value in values)] for model, values in table.most.items()]
        lines += _aligned(rows + _own_most(found, behaviour))
    return lines


def _cells(model: str, table: Published) -> list[str]:
    cut = [(model, m) in table.limits for m in table.multipliers]
    marks = [("<" if m < 0 else ">") if beyond else "" for m, beyond in zip(table.multipliers, cut, strict=True)]
    return [f"{mark}{value:+.1f}" for mark, value in zip(marks, table.change[model], strict=True)]


def _own(found: Sweep, behaviour: str, multipliers: Sequence[float]) -> list[list[str]]:
    rows = []
    for choice in (c for c in found.choices if c.behaviour == behaviour):
        own = {
            p.multiplier: 100 * (p.match - p.base)
            for p in found.points
            if (p.behaviour, p.site, p.mode, p.components, p.control)
            == (behaviour, choice.site, choice.mode, choice.components, "none")
        }
        cells = [f"{own[m]:+.1f}" if m in own else "–" for m in multipliers]
        rows.append([f"here: {choice.mode} {choice.components} site {choice.site}".replace("  ", " "), *cells])
    return rows


def _own_most(found: Sweep, behaviour: str) -> list[list[str]]:
    """Return max − min of the curves at the chosen sites, as the bars of the published figures were made."""
    most: dict[str, float] = {}
    for choice in (c for c in found.choices if c.behaviour == behaviour):
        match, _ = found.values[behaviour, choice.site, choice.mode, choice.components]
        curve = match.mean(axis=1)
        most.setdefault(choice.mode, 100 * float(curve.max() - curve.min()))
    return [["here: max − min", *(f"{most[m]:.1f}" if m in most else "–" for m in ("residual", "state", "both"))]]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


@cache
def _held() -> dict[str, Any]:
    return dict(yaml.safe_load((files("exegete.steering") / "reference.yaml").read_text(encoding="utf-8")))
