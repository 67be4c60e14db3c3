"""Figures of probing as SVG files that stand alone, made by hand: text in, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from exegete.elk.transfers import RandomRow, Row, Transfers

_COLOURS: Final = ("#2563a8", "#c2571a", "#2e7d4f", "#7b4fa3", "#8a6d1f", "#a8325a", "#4a6b7c", "#5c8a1f", "#8c4a2f")
_DASHES: Final = ("none", "7 3", "2 3")
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#ddd}"
    ".b{stroke:#888;stroke-dasharray:4 3}.w{fill:#fff}.c{fill:#888;font-size:11px}"
)
_WIDTH, _RIGHT, _LEFT, _TOP, _HEIGHT = 760.0, 510.0, 44.0, 34.0, 300.0


def sites_figure(found: Transfers, source: str, target: str) -> str:
    """Return the AUROC of each probe by site in one transfer, all rows, with intervals.

    Open rings mark the earliest informative sites; the dashed grey line is the model's own answer, the grey bands are
    where 95 % of random directions lie.
    """
    rows = [r for r in found.rows if (r.source, r.target, r.which) == (source, target, "all")]
    own = [r for r in rows if r.site is not None]
    sites = sorted({r.site for r in own if r.site is not None})
    names = list(dict.fromkeys((r.feature, r.probe) for r in own))
    drawn = [r for r in found.random if (r.source, r.target, r.which) == (source, target, "all")]
    lines = []
    for i, feature in enumerate(dict.fromkeys(r.feature for r in drawn), start=len(names)):
        lines.append(_band([r for r in drawn if r.feature == feature], sites))
        lines.append(_legend(i, 'stroke="#777" stroke-opacity=".3"', f"{feature} random, 95 %", wide=8))
    for i, (feature, probe) in enumerate(names):
        curve = sorted((r for r in own if (r.feature, r.probe) == (feature, probe)), key=lambda r: r.site or 0)
        stroke = f'stroke="{_COLOURS[i % len(_COLOURS)]}"'
        dashed = f'{stroke} stroke-dasharray="{_DASHES[i // len(_COLOURS) % len(_DASHES)]}"'
        lines += _curve([r for r in curve if math.isfinite(r.auroc.value)], sites, stroke, dashed)
        lines.append(_legend(i, dashed, f"{feature} {probe}"))
    for row in rows:
        if row.site is None and math.isfinite(row.auroc.value):
            y = _y(row.auroc.value)
            lines.append(f'<line class="b" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    step = max(1, math.ceil(len(sites) / 16))
    ticks = [(str(site), _x(site, sites)) for site in sites[::step]]
    title = f"{source} to {target}: AUROC against the truth by site (dashed: the model's answer; ring: chosen site)"
    legend = _TOP + 18 * (len(names) + len({r.feature for r in drawn}))
    return _figure(title, ticks, lines, legend)


def grid_figure(found: Transfers) -> str:
    """Return the AUROC of each probe (down) in each transfer (across) at its earliest informative site, as a table."""
    chosen = {
        (r.feature, r.probe, r.source, r.target): r for r in found.rows if r.which == "all" and "earliest" in r.rules
    }
    across = list(dict.fromkeys((s, t) for _, _, s, t in chosen))
    down = list(dict.fromkeys((f, p) for f, p, _, _ in chosen))
    left, wide, high = 200.0, 74.0, 24.0
    title = "AUROC against the truth at the earliest informative site"
    parts = [f'<text class="t" x="8" y="18">{title}</text>']
    for j, (source, target) in enumerate(across):
        x = left + wide * (j + 0.5)
        parts.append(f'<text x="{x:.1f}" y="42" text-anchor="middle">{html.escape(f"{source}→{target}")}</text>')
    for i, (feature, probe) in enumerate(down):
        y = 52 + high * i
        parts.append(f'<text x="{left - 8}" y="{y + 16:.1f}" text-anchor="end">{html.escape(feature)} {probe}</text>')
        for j, (source, target) in enumerate(across):
            row = chosen.get((feature, probe, source, target))
            if row is not None and math.isfinite(row.auroc.value):
                parts.append(_cell(left + wide * j, y, wide, high, row))
    return _svg(left + wide * len(across) + 8, 60 + high * len(down), title, parts)


def _cell(x: float, y: float, wide: float, high: float, row: Row) -> str:
    value = row.auroc.value
    strength = min(1.0, abs(value - 0.5) * 2)
    fill = f"rgba({'37,99,168' if value >= 0.5 else '194,87,26'},{0.08 + 0.8 * strength:.2f})"
    shade = ' class="w"' if strength > 0.6 else ""
    told = f"site {row.site}: {value:.3f} [{row.auroc.low:.3f}, {row.auroc.high:.3f}]"
    return (
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2}" height="{high - 2}" fill="{fill}">'
        f"<title>{told}</title></rect>"
        f'<text{shade} x="{x + wide / 2:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:.2f}</text>'
    )


def _curve(rows: Sequence[Row], sites: Sequence[int], stroke: str, dashed: str) -> list[str]:
    at = [(_x(r.site or 0, sites), r) for r in rows]
    points = " ".join(f"{x:.1f},{_y(r.auroc.value):.1f}" for x, r in at)
    lines = [f'<polyline points="{points}" fill="none" {dashed} stroke-width="2"/>']
    for x, r in at:
        low, high = _y(r.auroc.low), _y(r.auroc.high)
        told = f"site {r.site}: {r.auroc.value:.3f} [{r.auroc.low:.3f}, {r.auroc.high:.3f}]"
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" {stroke}><title>{told}</title></line>'
        )
        if "earliest" in r.rules:
            lines.append(f'<circle cx="{x:.1f}" cy="{_y(r.auroc.value):.1f}" r="5" fill="none" {stroke}/>')
    return lines


def _band(rows: Sequence[RandomRow], sites: Sequence[int]) -> str:
    """Return the area between the outer quantiles of random directions; a bar where there is one site."""
    kept = sorted((r for r in rows if math.isfinite(r.quantiles[0])), key=lambda r: r.site)
    edges = [(_x(r.site, sites), r.quantiles[0], r.quantiles[-1]) for r in kept]
    if len(edges) == 1:
        x, low, high = edges[0]
        edges = [(x - 8, low, high), (x + 8, low, high)]
    points = [(x, high) for x, _, high in edges] + [(x, low) for x, low, _ in reversed(edges)]
    text = " ".join(f"{x:.1f},{_y(value):.1f}" for x, value in points)
    return f'<polygon points="{text}" fill="#777" fill-opacity=".15"/>'


def _x(site: int, sites: Sequence[int]) -> float:
    low, high = sites[0], sites[-1]
    share = 0.5 if low == high else (site - low) / (high - low)
    return _LEFT + 12 + share * (_RIGHT - _LEFT - 24)


def _y(value: float) -> float:
    return _TOP + (1 - min(1.0, max(0.0, value))) * (_HEIGHT - _TOP)


def _legend(place: int, stroke: str, text: str, *, wide: int = 2) -> str:
    y, x = _TOP + 10 + 18 * place, _RIGHT + 14
    swatch = f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" {stroke} stroke-width="{wide}"/>'
    return f'{swatch}<text x="{x + 24}" y="{y}">{html.escape(text)}</text>'


def _figure(title: str, ticks: Sequence[tuple[str, float]], lines: Sequence[str], legend: float) -> str:
    parts = [f'<text class="t" x="8" y="18">{html.escape(title)}</text>']
    for quarter in range(5):
        y = _y(quarter / 4)
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{quarter / 4:g}</text>')
    parts.append(f'<text class="c" x="{_LEFT - 6}" y="{_y(0.5) + 16:.1f}" text-anchor="end">chance</text>')
    for text, x in ticks:
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2:.1f}" y="{_HEIGHT + 36}" text-anchor="middle">site</text>')
    return _svg(_WIDTH, max(_HEIGHT + 46, legend + 10), title, [*parts, *lines])


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(title)}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
