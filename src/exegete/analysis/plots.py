"""Figures as inline SVG, made by hand: text in, no library. Colours are CSS variables, so they follow the theme.

Every piece of text goes through ``_esc``. Sizes are in SVG user units (pixels at full width).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from exegete.analysis.text import bracket, number
from exegete.analysis.visible import visible_line
from exegete.metrics import Interval

Floats = npt.NDArray[np.float64]
BINS = 30


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One row of a comparison: the values of one group of latents, their own nulls (or none), and the median."""

    label: str
    role: str
    values: Floats
    nulls: Floats
    median: Interval


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: a point per place, with its interval; ``style`` is a CSS class."""

    label: str
    style: str
    points: tuple[Interval, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One labelled value with its interval; ``style`` is a CSS class."""

    label: str
    style: str
    interval: Interval


def comparison(strips: Sequence[Strip], domain: tuple[float, float], *, chance: float | None = None) -> str:
    """Return stacked distributions over one axis: scores upwards in colour, their own nulls downwards in grey."""
    left, width, row, top = 112.0, 440.0, 54.0, 8.0
    height = top + row * len(strips) + 26
    axis = _Axis(domain, left, width - 14)
    parts = [axis.grid(top, height - 22, labels_at=height - 8)]
    if chance is not None:
        x = axis(chance)
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 22:.1f}"/>')
    for i, strip in enumerate(strips):
        base = top + row * i + 32
        parts.append(
            f'<text class="label" x="{left - 10}" y="{base - 6:.1f}" text-anchor="end">{_esc(strip.label)}</text>'
        )
        parts.append(
            f'<text class="value r-{strip.role}" x="{left - 10}" y="{base + 9:.1f}" text-anchor="end">'
            f"{_esc(number(strip.median.value))}</text>"
        )
        peak = max(_share(strip.values, domain).max(), _share(strip.nulls, domain).max() * 0.5, 1e-9)
        parts.append(_ridge(strip.values, axis, base, 26 / peak, f"ridge r-{strip.role}"))
        if len(strip.nulls):
            deepest = max(_share(strip.nulls, domain).max(), 1e-9)
            parts.append(_ridge(strip.nulls, axis, base, -13 / deepest, "ridge null"))
        parts.append(f'<line class="base" x1="{left}" x2="{width - 14}" y1="{base:.1f}" y2="{base:.1f}"/>')
        parts.append(_whisker(axis, base, strip.median, f"r-{strip.role}", strip.role, strip.label))
    return _svg(width, height, parts, "Distributions over latents with their medians")


def differences(rows: Sequence[tuple[str, str, Mapping[str, Interval]]], quantities: Sequence[str]) -> str:
    """Return a forest of differences: (label, role, difference by quantity) rows, one panel per quantity, 0 marked."""
    left, gap, row, top, panel = 200.0, 26.0, 24.0, 26.0, 215.0
    width, height = left + len(quantities) * (panel + gap), top + row * len(rows) + 26
    parts = [
        f'<text class="label" x="{left - 12}" y="{top + row * (i + 0.5) + 4:.1f}" text-anchor="end">'
        f"{_esc(label)}</text>"
        for i, (label, _, _) in enumerate(rows)
    ]
    for p, quantity in enumerate(quantities):
        start = left + p * (panel + gap)
        known = [found[quantity] for _, _, found in rows if quantity in found]
        ends = [v for i in known for v in (i.value, i.low, i.high) if math.isfinite(v)]
        low, high = min([-0.05, *ends]), max([0.05, *ends])
        pad = 0.06 * (high - low)
        axis = _Axis((low - pad, high + pad), start, start + panel)
        parts.append(f'<text class="value" x="{start:.1f}" y="14">{_esc(quantity)}</text>')
        parts.append(axis.grid(top, height - 22, labels_at=height - 8))
        parts.append(f'<line class="chance" x1="{axis(0):.1f}" x2="{axis(0):.1f}" y1="{top}" y2="{height - 22:.1f}"/>')
        for i, (label, role, found) in enumerate(rows):
            if quantity in found:
                y = top + row * (i + 0.5)
                parts.append(_whisker(axis, y, found[quantity], f"r-{role}", role, f"{label}, {quantity}"))
    return _svg(width, height, parts, "Differences between trained coders and their controls, with intervals")


def histogram(
    values: Floats,
    nulls: Floats,
    median: Interval,
    null_median: Interval,
    role: str,
    domain: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Return the distribution of a score over latents with that of its null behind it."""
    width, height, left, top, bottom = 440.0, 200.0, 34.0, 12.0, 30.0
    axis = _Axis(domain, left, width - 10)
    ours, theirs = _counts(values, domain, 25), _counts(nulls, domain, 25)
    edges = np.linspace(*domain, 26).tolist()
    tallest = max(int(ours.max()), int(theirs.max()), 1)
    scale = (height - top - bottom) / tallest
    floor = height - bottom
    parts = [axis.grid(top, floor, labels_at=height - 14)]
    for count in sorted({tallest, tallest // 2} - {0}):
        y = floor - count * scale
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>')
    for counts, style, inset in ((theirs, "null", 0.0), (ours, f"r-{role}", 1.4)):
        for i, count in enumerate(counts.tolist()):
            if count:
                x, next_x = axis(edges[i]) + inset, axis(edges[i + 1]) - inset
                y = floor - count * scale
                kind = "null" if style == "null" else "score"
                title = f"{kind} {edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,} latents"
                parts.append(
                    f'<rect class="bar {style}" x="{x:.1f}" y="{y:.1f}" width="{next_x - x:.1f}" '
                    f'height="{floor - y:.1f}"><title>{title}</title></rect>'
                )
    for interval, style in ((null_median, "null"), (median, f"r-{role}")):
        if math.isfinite(interval.value):
            x = axis(interval.value)
            parts.append(
                f'<line class="median {style}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{floor:.1f}">'
                f"<title>median {_esc(bracket(interval))}</title></line>"
            )
    parts.append(f'<line class="base" x1="{left}" x2="{width - 10}" y1="{floor:.1f}" y2="{floor:.1f}"/>')
    return _svg(width, height, parts, "Histogram of scores against their null")


def curves(lines: Sequence[Line], places: Sequence[str], axis_label: str) -> str:
    """Return curves over ordered places (deciles), 0…1, with interval bands and a legend."""
    width, height, left, top, bottom = 400.0, 238.0, 38.0, 12.0, 62.0
    floor = height - bottom
    step = (width - left - 16) / max(1, len(places) - 1)

    def at(i: int, value: float) -> tuple[float, float]:
        return left + step * i, floor - min(1.0, max(0.0, value)) * (floor - top)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i, place in enumerate(places):
        x = at(i, 0)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{_esc(place)}</text>')
    middle = left + (width - left - 16) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{floor + 31}" text-anchor="middle">{_esc(axis_label)}</text>')
    legend = left
    for line in lines:
        known = [(i, p) for i, p in enumerate(line.points) if math.isfinite(p.value)]
        upper = [at(i, p.high) for i, p in known]
        lower = [at(i, p.low) for i, p in reversed(known)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, p.value) for i, p in known))
        parts.append(f'<polygon class="band {line.style}" points="{band}"/>')
        parts.append(f'<polyline class="curve {line.style}" points="{path}"/>')
        for i, p in known:
            x, y = at(i, p.value)
            title = f"{line.label}, {places[i]}: {bracket(p)}, {p.n:,} latents"
            parts.append(
                f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{_esc(title)}</title></circle>"
            )
        parts.append(
            f'<line class="curve {line.style}" x1="{legend:.1f}" x2="{legend + 18:.1f}" '
            f'y1="{height - 10}" y2="{height - 10}"/>'
        )
        parts.append(f'<text class="tick" x="{legend + 23:.1f}" y="{height - 6}">{_esc(line.label)}</text>')
        legend += 34 + 6.3 * len(line.label)
    return _svg(width, height, parts, f"Curves over {axis_label}")


def dots(rows: Sequence[Dot], reference: float | None, reference_label: str) -> str:
    """Return one labelled row per value over 0…1, with intervals and a reference line (the base rate)."""
    width, left, row, top = 400.0, 164.0, 25.0, 8.0
    height = top + row * len(rows) + 26
    axis = _Axis((0.0, 1.0), left, width - 44)
    parts = [axis.grid(top, height - 22, labels_at=height - 8)]
    if reference is not None and math.isfinite(reference):
        x = axis(reference)
        parts.append(
            f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 22:.1f}">'
            f"<title>{_esc(reference_label)}</title></line>"
        )
    for i, dot in enumerate(rows):
        y = top + row * i + row / 2
        parts.append(f'<text class="label" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{_esc(dot.label)}</text>')
        if math.isfinite(dot.interval.value):
            end = axis(dot.interval.value)
            parts.append(f'<line class="stem {dot.style}" x1="{left}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_whisker(axis, y, dot.interval, dot.style, "", dot.label))
        parts.append(f'<text class="value" x="{width - 38}" y="{y + 4:.1f}">{_esc(number(dot.interval.value))}</text>')
    return _svg(width, height, parts, "Medians with their intervals")


def firing_histogram(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Return how many firings there are per binary order of activation, on a logarithmic scale."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = filled[0], filled[-1]
    width, height, left, top, bottom = 400.0, 150.0, 44.0, 10.0, 34.0
    floor = height - bottom
    top_power = max(1, math.ceil(math.log10(max(counts))))
    scale = (floor - top) / math.log10(10**top_power + 1)
    step = (width - left - 12) / (last - first + 1)
    parts = []
    for count in [0, *(10**power for power in range(top_power + 1))]:
        y = floor - math.log10(count + 1) * scale
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_count(count)}</text>')
    every = max(1, math.ceil((last - first + 2) / 9))
    for place, i in enumerate(range(first, last + 2)):
        if place % every == 0:
            x = left + step * place
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{_esc(f"{edges[i]:.3g}")}</text>'
            )
    for place, i in enumerate(range(first, last + 1)):
        if counts[i]:
            tall = math.log10(counts[i] + 1) * scale
            title = f"activation {edges[i]:.3g} to {edges[i + 1]:.3g}: {counts[i]:,} firings"
            parts.append(
                f'<rect class="bar fire" x="{left + step * place + 1:.1f}" y="{floor - tall:.1f}" '
                f'width="{max(1.0, step - 2):.1f}" height="{tall:.1f}"><title>{_esc(title)}</title></rect>'
            )
    parts.append(
        f'<text class="tick" x="{(left + width - 12) / 2:.1f}" y="{height - 4}" text-anchor="middle">activation</text>'
    )
    return _svg(width, height, parts, "Histogram of firings by activation")


def interval_bar(interval: Interval, null: Interval | None) -> str:
    """Return a small bar for a table cell: value and interval over 0…1, the null's value as a grey tick."""
    axis = _Axis((0.0, 1.0), 4, 116)
    parts = [
        '<line class="base" x1="4" x2="116" y1="9" y2="9"/>',
        '<line class="grid" x1="60" x2="60" y1="3" y2="15"/>',
    ]
    if null is not None and math.isfinite(null.value):
        x = axis(null.value)
        parts.append(
            f'<line class="tickmark null" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="16">'
            f"<title>null {_esc(bracket(null))}</title></line>"
        )
    parts.append(_whisker(axis, 9, interval, "r-trained", "", "score"))
    return _svg(120, 18, parts, "Score and interval", style="mini")


@final
class _Axis:
    """A linear axis from a domain to pixels; values outside end at the border."""

    def __init__(self, domain: tuple[float, float], left: float, right: float) -> None:
        self.low, self.high = domain
        self.left, self.right = left, right

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.left + min(1.0, max(0.0, share)) * (self.right - self.left)

    def ticks(self) -> list[float]:
        span = self.high - self.low
        rough = span / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def grid(self, top: float, bottom: float, *, labels_at: float) -> str:
        """Return vertical grid lines with their numbers."""
        parts = []
        for tick in self.ticks():
            x = self(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{labels_at:.1f}" text-anchor="middle">{_tick(tick)}</text>'
            )
        return "".join(parts)


def _counts(values: Floats, domain: tuple[float, float], bins: int) -> npt.NDArray[np.int64]:
    """Return counts per bin, the values outside the domain in its outer bins."""
    known = np.clip(values[np.isfinite(values)], *domain)
    return np.histogram(known, bins=bins, range=domain)[0].astype(np.int64)


def _share(values: Floats, domain: tuple[float, float]) -> Floats:
    return np.asarray(_counts(values, domain, BINS) / max(1, len(values)), dtype=np.float64)


def _ridge(values: Floats, axis: _Axis, base: float, scale: float, style: str) -> str:
    """Return a stepped outline of a distribution standing on (or, for a negative scale, hanging from) a line."""
    shares = _share(values, (axis.low, axis.high))
    if not shares.any():
        return ""
    step = (axis.right - axis.left) / BINS
    points = [f"{axis.left:.1f},{base:.1f}"]
    for i, share in enumerate(shares.tolist()):
        y = base - share * scale
        points += [f"{axis.left + i * step:.1f},{y:.1f}", f"{axis.left + (i + 1) * step:.1f},{y:.1f}"]
    points.append(f"{axis.right:.1f},{base:.1f}")
    return f'<polygon class="{style}" points="{" ".join(points)}"/>'


def _whisker(axis: _Axis, y: float, interval: Interval, style: str, shape: str, label: str) -> str:
    """Return an interval as a line with its value as a mark; the mark's shape tells groups apart without colour."""
    if not math.isfinite(interval.value):
        return ""
    x, low, high = axis(interval.value), axis(interval.low), axis(interval.high)
    if shape == "random-coder":
        mark = f'<rect class="mark {style}" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    elif shape == "random-subject":
        corners = f"{x:.1f},{y - 6:.1f} {x + 5.5:.1f},{y + 4:.1f} {x - 5.5:.1f},{y + 4:.1f}"
        mark = f'<polygon class="mark {style}" points="{corners}"/>'
    else:
        mark = f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if shape else 4}"/>'
    return (
        f"<g><title>{_esc(f'{label}: {bracket(interval)}')}</title>"
        f'<line class="whisker {style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{mark}</g>'
    )


def _tick(value: float) -> str:
    return f"{value:.10g}".replace("-", "−")


def _count(count: int) -> str:
    return f"{count:,}" if count < 1e4 else f"{count / 1e3:,.0f}k" if count < 1e6 else f"{count / 1e6:,.0f}M"


def _esc(text: str) -> str:
    return html.escape(visible_line(text), quote=True)


def _svg(width: float, height: float, parts: Sequence[str], title: str, *, style: str = "plot") -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{_esc(title)}">{"".join(parts)}</svg>'
    )
