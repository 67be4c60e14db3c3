"""Figures of the studies as SVG files that stand alone: panels beside each other, one scale, one legend."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

_COLOURS: Final = ("#2563a8", "#c2571a", "#2e7d4f", "#7b4fa3", "#8a6d1f", "#a8325a", "#4a6b7c")
_STYLE: Final = "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#ddd}.b{stroke:#888}"
_WIDE, _HIGH, _LEFT, _TOP, _GAP = 220.0, 190.0, 46.0, 46.0, 26.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values by tick of a panel, medians over seeds, with their range; None where there is none.

    ``name`` is its entry in the legend, and with it its colour. Points that are not ``joined`` stand alone.
    """

    name: str
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    joined: bool = True
    dashed: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot: its title, the names of its ticks, and what is drawn."""

    title: str
    ticks: Sequence[str]
    series: Sequence[Series]


def figure(
    title: str, panels: Sequence[Panel], *, label: str, levels: Sequence[float], base: float | None = None
) -> str:
    """Return panels beside each other over the scale of ``levels``, ascending; ``base`` is a dashed line."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    low, high = levels[0], levels[-1]

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _TOP + (1 - share) * _HIGH

    parts = [f'<text class="t" x="{_LEFT}" y="18">{html.escape(title)}</text>']
    for i, panel in enumerate(panels):
        left = _LEFT + i * (_WIDE + _GAP)
        parts += _frame(panel, left, [(level, y(level)) for level in levels], first=i == 0)
        if base is not None:
            parts.append(_line(left, y(base), left + _WIDE, y(base), 'class="b" stroke-dasharray="4 3"'))
        for place, series in enumerate(panel.series):
            shift = 0.0 if series.joined else (place - (len(panel.series) - 1) / 2) * 7
            xs = [x + shift for x in _places(panel, left)]
            parts += _drawn(series, xs, [None if v is None else y(v) for v in series.values], colours[series.name])
            parts += _ranges(series, xs, y, colours[series.name])
    width = _LEFT + len(panels) * (_WIDE + _GAP)
    foot = _TOP + _HIGH + 46
    parts.append(f'<text x="{width / 2:.0f}" y="{foot}" text-anchor="middle">{html.escape(label)}</text>')
    rows, x, row = [], _LEFT, 0
    for name in names:
        size = 34 + 6.6 * len(name)
        if x + size > width and x > _LEFT:
            x, row = _LEFT, row + 1
        at = foot + 22 + 18 * row
        rows.append(_line(x, at - 4, x + 18, at - 4, f'stroke="{colours[name]}" stroke-width="3"'))
        rows.append(f'<text x="{x + 24:.0f}" y="{at:.0f}">{html.escape(name)}</text>')
        x += size
    height = foot + 34 + 18 * row
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{html.escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join([*parts, *rows])}</svg>\n'
    )


def _frame(panel: Panel, left: float, levels: Sequence[tuple[float, float]], *, first: bool) -> list[str]:
    parts = [
        f'<text class="t" x="{left + _WIDE / 2:.0f}" y="38" text-anchor="middle">{html.escape(panel.title)}</text>'
    ]
    for level, at in levels:
        parts.append(_line(left, at, left + _WIDE, at, 'class="g"'))
        if first:
            parts.append(f'<text x="{left - 6:.0f}" y="{at + 4:.1f}" text-anchor="end">{level:g}</text>')
    crowded = 7.0 * max(map(len, panel.ticks)) > _WIDE / len(panel.ticks)
    for place, (x, tick) in enumerate(zip(_places(panel, left), panel.ticks, strict=True)):
        at = _TOP + _HIGH + 16 + (13 if crowded and place % 2 else 0)
        parts.append(f'<text x="{x:.1f}" y="{at:.0f}" text-anchor="middle">{html.escape(tick)}</text>')
    return parts


def _places(panel: Panel, left: float) -> list[float]:
    step = _WIDE / len(panel.ticks)
    return [left + step * (i + 0.5) for i in range(len(panel.ticks))]


def _drawn(series: Series, xs: Sequence[float], ys: Sequence[float | None], colour: str) -> list[str]:
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    dash = ' stroke-dasharray="5 3"' if series.dashed else ""
    parts = []
    if series.joined and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    return parts + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points]


def _ranges(series: Series, xs: Sequence[float], y: Callable[[float], float], colour: str) -> list[str]:
    bounds = zip(xs, series.low or [None] * len(xs), series.high or [None] * len(xs), strict=True)
    return [
        _line(x, y(low), x, y(high), f'stroke="{colour}" stroke-opacity="0.6"')
        for x, low, high in bounds
        if low is not None and high is not None
    ]


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'
