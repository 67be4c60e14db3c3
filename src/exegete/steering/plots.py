"""Figures of a sweep as SVG files that stand alone, made by hand: text in, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from exegete.steering.sweeping import Choice, Point, Sweep

_COLOURS: Final = ("#2563a8", "#c2571a", "#2e7d4f", "#7b4fa3", "#8a6d1f", "#a8325a", "#4a6b7c")
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#ddd}"
    ".b{stroke:#888;stroke-dasharray:4 3}.n{stroke-dasharray:2 3}"
)
_WIDTH, _LEFT, _TOP, _HEIGHT = 840.0, 52.0, 34.0, 300.0
_END = 520.0  # of the axis; the legend is to the right of it
_APART: Final = 4.0
"""How far the marks of two modes at one place are from each other, so that none hides another."""
_MARGIN: Final = 16.0
_SCALES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def curves_figure(found: Sweep, behaviour: str) -> str:
    """Return p(match) by multiplier at each mode's chosen site, with intervals, nonsense, and both controls."""
    low, high = min(found.multipliers), max(found.multipliers)
    lines, controls = [], set()
    choices = [c for c in found.choices if c.behaviour == behaviour]
    for i, choice in enumerate(choices):
        colour = _COLOURS[i % len(_COLOURS)]
        own = [p for p in found.points if _of(p, choice)]
        plain = sorted((p for p in own if p.control == "none"), key=lambda p: p.multiplier)
        xs = [_x(p.multiplier, low, high, _MARGIN) for p in plain]
        band = [(x, _y(p.low)) for x, p in zip(xs, plain, strict=True)]
        band += [(x, _y(p.high)) for x, p in reversed(list(zip(xs, plain, strict=True)))]
        lines.append(f'<polygon points="{_points(band)}" fill="{colour}" fill-opacity="0.13"/>')
        match = [(x, _y(p.match)) for x, p in zip(xs, plain, strict=True)]
        lines.append(f'<polyline points="{_points(match)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        nonsense = [(x, _y(p.nonsense)) for x, p in zip(xs, plain, strict=True)]
        lines.append(f'<polyline class="n" points="{_points(nonsense)}" fill="none" stroke="{colour}"/>')
        for p in (p for p in own if p.control != "none"):
            x = _x(p.multiplier, low, high, _MARGIN) + _aside(i, len(choices), _APART)
            lines.append(_mark(p.control, x, _y(p.match), colour))
            controls.add(p.control)
        lines.append(_legend(i, colour, f"{choice.mode} {choice.components}".strip() + f", site {choice.site}"))
    base = next((p.base for p in found.points if p.behaviour == behaviour), 0.5)
    lines.append(f'<line class="b" x1="{_LEFT}" x2="{_END}" y1="{_y(base):.1f}" y2="{_y(base):.1f}"/>')
    ticks = [(f"{m:g}", _x(m, low, high, _MARGIN)) for m in sorted(found.multipliers)]
    lines += _key(len(choices), controls)
    lines.append(_note("bands: 95 % over questions"))
    title = f"{behaviour}: p(match) by multiplier"
    return _figure(title, ticks, "multiplier", [(v / 4, _y(v / 4)) for v in range(5)], lines)


def sites_figure(found: Sweep, behaviour: str) -> str:
    """Return the effect (largest minus smallest multiplier) of each mode by site, with intervals."""
    own = [c for c in found.curves if c.behaviour == behaviour]
    sites = sorted({c.site for c in own})
    kinds = list(dict.fromkeys((c.mode, c.components) for c in own))
    largest = max(max(abs(c.effect.low), abs(c.effect.high)) for c in own)
    scale = next((s for s in _SCALES if s >= largest), _SCALES[-1])
    gap = (_END - _LEFT - 2 * _MARGIN) / max(1, sites[-1] - sites[0])
    apart = min(_APART, 0.7 * gap / len(kinds), 2 * _MARGIN / len(kinds))

    def y(value: float) -> float:
        return _y((value / scale + 1) / 2)

    def x_of(site: int) -> float:
        return _x(site, sites[0], sites[-1], _MARGIN)

    lines = [f'<line class="b" x1="{_LEFT}" x2="{_END}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>']
    for i, (mode, components) in enumerate(kinds):
        colour = _COLOURS[i % len(_COLOURS)]
        curve = sorted((c for c in own if (c.mode, c.components) == (mode, components)), key=lambda c: c.site)
        at = [(x_of(c.site) + _aside(i, len(kinds), apart), c) for c in curve]
        lines.append(
            f'<polyline points="{_points([(x, y(c.effect.value)) for x, c in at])}" fill="none" stroke="{colour}" '
            f'stroke-width="2"/>'
        )
        for x, c in at:
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(c.effect.low):.1f}" y2="{y(c.effect.high):.1f}" '
                f'stroke="{colour}"><title>site {c.site}: {c.effect.value:+.3f}</title></line>'
            )
        lines.append(_legend(i, colour, f"{mode} {components}".strip()))
    lines.append(_note("bars: 95 % over questions"))
    shown = sites[:: max(1, math.ceil(len(sites) / 16))]
    ticks = [(str(site), x_of(site)) for site in shown]
    title = f"{behaviour}: effect by site, p(match) at {max(found.multipliers):+g} minus at {min(found.multipliers):+g}"
    return _figure(title, ticks, "site", [(v * scale / 2, y(v * scale / 2)) for v in range(-2, 3)], lines)


def _of(point: Point, choice: Choice) -> bool:
    return (point.behaviour, point.site, point.mode, point.components) == (
        choice.behaviour,
        choice.site,
        choice.mode,
        choice.components,
    )


def _x(value: float, low: float, high: float, margin: float = 0.0) -> float:
    share = 0.5 if high == low else (value - low) / (high - low)
    return _LEFT + margin + share * (_END - _LEFT - 2 * margin)


def _aside(place: int, n: int, apart: float) -> float:
    """Return how far to the right the marks of one of n modes are put."""
    return (place - (n - 1) / 2) * apart


def _y(share: float) -> float:
    return _TOP + (1 - min(1.0, max(0.0, share))) * (_HEIGHT - _TOP)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _legend(place: int, colour: str, text: str, style: str = ' stroke-width="2"') -> str:
    y, x = _TOP + 10 + 18 * place, _END + 14
    swatch = f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}"{style}/>'
    return f'{swatch}<text x="{x + 24}" y="{y}">{html.escape(text)}</text>'


def _note(text: str) -> str:
    """Return words at the bottom right, below the legend."""
    return f'<text x="{_END + 14}" y="{_HEIGHT}">{html.escape(text)}</text>'


def _mark(control: str, x: float, y: float, colour: str) -> str:
    """Return what stands for a control: a light dot for a random vector, a hollow square for that of the letter."""
    if control == "random":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}" fill-opacity="0.35"/>'
    return (
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="#fff" fill-opacity="0.7" stroke="{colour}" '
        f'stroke-width="1.5"/>'
    )


def _key(place: int, controls: Collection[str]) -> Iterator[str]:
    """Yield what the marks mean, below the modes in the legend."""
    x = _END + 23
    yield _legend(place, "#777", "nonsense", ' class="n"')
    for control, text in (("random", "random vectors as long"), ("letters", "the letter's vector as long")):
        if control in controls:
            place += 1
            y = _TOP + 10 + 18 * place
            yield _mark(control, x, y - 4, "#777")
            yield f'<text x="{x + 15}" y="{y}">{html.escape(text)}</text>'


def _figure(
    title: str,
    ticks: Sequence[tuple[str, float]],
    label: str,
    levels: Sequence[tuple[float, float]],
    lines: Sequence[str],
) -> str:
    parts = [f'<text class="t" x="{_LEFT}" y="18">{html.escape(title)}</text>']
    for value, y in levels:
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{_END}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for text, x in ticks:
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 18}" text-anchor="middle">{html.escape(text)}</text>')
    middle = (_LEFT + _END) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT + 36}" text-anchor="middle">{label}</text>')
    size = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT + 46:g}" width="{_WIDTH:g}" height="{_HEIGHT + 46:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(title)}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join([*parts, *lines])}</svg>\n'
    )
