"""Pictures of lenses as standalone SVG, made by hand, and the prediction trajectory as PNG through matplotlib.

Every piece of text is escaped, and what cannot be seen is spelled out. Sizes are in SVG user units (pixels).
"""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import numpy as np

from exegete.analysis.visible import visible_line, visible_token
from exegete.errors import InputError, MissingExtraError
from exegete.files import atomic_file
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.lens.evaluating import Evaluation
    from exegete.lens.trajectory import Colour, Trajectory
    from exegete.metrics import Interval

TITLES: Final[Mapping[str, str]] = {
    "probability": "probability of the likeliest token",
    "entropy": "entropy, nats",
    "kl": "KL to the model, nats",
    "ce": "cross-entropy of the prompt's next token, nats",
}
_STOPS: Final = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_LINES: Final = ("#c4500a", "#0b62a8", "#0a7d5c", "#7a3b1d", "#8a2be2")
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
_MONO: Final = "ui-monospace, Menlo, Consolas, 'Noto Sans Mono', 'DejaVu Sans Mono', monospace"
_MOST_COLUMNS: Final = 500  # a PNG of matplotlib's has less than 2¹⁶ pixels a side
_CELL_WIDTH, _CELL_HEIGHT, _MOST_CHARACTERS = 74.0, 22.0, 9


def shade(share: float) -> str:
    """Return the colour of a share 0 … 1, white to dark blue; grey for one that is not defined."""
    if not math.isfinite(share):
        return "#e4e4e4"
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    mixed = [a + (place - low) * (b - a) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True)]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def ink(share: float) -> str:
    """Return the colour of text that can be read on ``shade(share)``."""
    return "#ffffff" if math.isfinite(share) and share > 0.55 else "#16181d"


def shares(values: Array, colour: str) -> tuple[Array, float]:
    """Return values as shares of the scale's end, and that end: 1 for probabilities, else the largest value."""
    known = values[np.isfinite(values)]
    end = 1.0 if colour == "probability" else float(known.max()) if len(known) and known.max() > 0 else 1.0
    found: Array = values / end
    return found, end


def site_name(site: int, last: int) -> str:
    """Return what a row of a picture is called."""
    return "embedding" if site < 0 else "output" if site == last else str(site)


def clipped(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return a token made visible, and short."""
    shown = visible_token(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def trajectory_svg(found: Trajectory, colour: Colour) -> str:
    """Return the prediction trajectory: tokens across, sites upwards, the likeliest token in every cell."""
    part, end = shares(found.values(colour), colour)
    rows, columns = part.shape
    left, top = 86.0, 46.0
    width, height = left + columns * _CELL_WIDTH + 16, top + rows * _CELL_HEIGHT + 74
    title = f"{found.subject} · {found.lens} lens · coloured by {TITLES[colour]}"
    width = max(width, left + 12 + 7.6 * len(title))
    body = [_text(left, 18, title, "title"), _text(left - 8, 37, "site", "tick", "end")]
    last = found.sites[-1]
    for s, site in enumerate(found.sites):
        y = top + (rows - 1 - s) * _CELL_HEIGHT
        body.append(_text(left - 8, y + 15, site_name(site, last), "tick", "end"))
        for t in range(columns):
            x, share = left + t * _CELL_WIDTH, float(part[s, t])
            body.append(
                f'<g><title>{_esc(_cell_text(found, s, t))}</title><rect x="{x:g}" y="{y:g}" '
                f'width="{_CELL_WIDTH:g}" height="{_CELL_HEIGHT:g}" fill="{shade(share)}"/>'
                f'<text class="cell" x="{x + _CELL_WIDTH / 2:g}" y="{y + 15:g}" style="fill:{ink(share)}">'
                f"{_esc(clipped(found.top_texts[s][t][0]))}</text></g>"
            )
    base = top + rows * _CELL_HEIGHT
    for t, text in enumerate(found.texts):
        body.append(_text(left + (t + 0.5) * _CELL_WIDTH, base + 17, clipped(text), "token", "middle"))
    body.append(_text(left - 8, base + 17, "prompt", "tick", "end"))
    body.append(_scale(left, base + 32, end))
    return _svg(width, height, body, title)


def require_png(n_tokens: int) -> None:
    """Raise InputError for more tokens than a PNG holds, MissingExtraError without matplotlib."""
    if n_tokens > _MOST_COLUMNS:
        raise InputError(f"a PNG holds at most {_MOST_COLUMNS} tokens, the prompt has {n_tokens}; write .html or .svg")
    try:
        for part in ("figure", "patches", "backends.backend_agg"):
            import_module(f"matplotlib.{part}")
    except ImportError:
        raise MissingExtraError("writing PNG pictures", "plot") from None


def trajectory_png(found: Trajectory, path: Path, colour: Colour) -> None:
    """Write the picture as PNG. Raises what ``require_png`` does."""
    require_png(len(found.tokens))
    figures, patches = import_module("matplotlib.figure"), import_module("matplotlib.patches")
    agg = import_module("matplotlib.backends.backend_agg")
    part, end = shares(found.values(colour), colour)
    rows, columns = part.shape
    title = visible_line(f"{found.subject} · {found.lens} lens · coloured by {TITLES[colour]}")
    inches = max(1.1 + 0.74 * columns, 1.2 + 0.09 * len(title))  # a short prompt leaves room for the title
    figure = figures.Figure(figsize=(inches, 1.3 + 0.24 * rows), dpi=150)
    agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    width, height = inches / 0.74, 1.3 / 0.24 + rows
    axes.set_xlim(-1.1 / 0.74 * 0.85, width - 1.1 / 0.74 * 0.85)
    axes.set_ylim(-3.1, height - 3.1)
    axes.axis("off")
    last = found.sites[-1]
    for s, site in enumerate(found.sites):
        axes.text(-0.1, s + 0.5, site_name(site, last), ha="right", va="center", fontsize=7.5, color="#5b606b")
        for t in range(columns):
            share = float(part[s, t])
            axes.add_patch(patches.Rectangle((t, s), 1, 1, facecolor=shade(share), edgecolor="white", linewidth=0.4))
            text = clipped(found.top_texts[s][t][0])
            axes.text(t + 0.5, s + 0.47, _plain(text), ha="center", va="center", fontsize=7, color=ink(share))
    for t, text in enumerate(found.texts):
        axes.text(t + 0.5, -0.55, _plain(clipped(text)), ha="center", va="center", fontsize=7.5, weight="bold")
    axes.text(-0.1, -0.55, "prompt", ha="right", va="center", fontsize=7.5, color="#5b606b")
    axes.text(0, rows + 0.9, _plain(title), ha="left", va="center", fontsize=9)
    for i in range(32):
        axes.add_patch(patches.Rectangle((i * 0.09, -2.2), 0.09, 0.6, facecolor=shade(i / 31), linewidth=0))
    axes.text(0, -2.6, "0", ha="center", va="center", fontsize=7)
    axes.text(32 * 0.09, -2.6, f"{end:.3g}", ha="center", va="center", fontsize=7)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is shown as boxes
        figure.savefig(buffer, format="png", metadata={"Software": "exegete"})
    with atomic_file(path) as stream:
        stream.write(buffer.getvalue())


def curves_svg(evaluation: Evaluation, metric: str) -> str:
    """Return a metric over sites in bits per byte, a curve per lens with its interval; logarithmic for CE and KL."""
    by, sites = evaluation.bits_per_byte, evaluation.sites
    lines = {name: [found[metric][site] for site in sites] for name, found in evaluation.nats.items()}
    model = evaluation.baseline.get(metric)
    values = [v * by for line in lines.values() for one in line for v in (one.value, one.low, one.high)]
    values += [] if model is None else [model.value * by]
    plane = _Plane(len(sites), values, logarithmic=metric != "entropy")
    names = {"ce": "cross-entropy", "kl": "KL to the model", "entropy": "entropy"}
    title = f"{evaluation.subject}: {names[metric]}, bits per byte"
    body = [_text(plane.left, 18, title, "title"), *plane.grid()]
    last = max(sites) + 1
    every = max(1, math.ceil(len(sites) / 16))
    for i, site in enumerate(sites):
        if i % every == 0:
            body.append(_text(plane.x(i), plane.floor + 17, site_name(site, last), "tick", "middle"))
    body.append(_text((plane.left + plane.right) / 2, plane.floor + 34, "site", "tick", "middle"))
    if model is not None:
        y = plane.y(model.value * by)
        body.append(
            f'<line x1="{plane.left:g}" x2="{plane.right:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="#5b606b" '
            f'stroke-dasharray="5 4"><title>{_esc(_said("the model", model, by))}</title></line>'
        )
    place = plane.left
    for number, (name, line) in enumerate(lines.items()):
        colour = _LINES[number % len(_LINES)]
        body += _curve(plane, name, sites, line, by, colour)
        body.append(f'<rect x="{place:g}" y="{plane.floor + 46:g}" width="16" height="4" fill="{colour}"/>')
        body.append(_text(place + 22, plane.floor + 52, name, "tick"))
        place += 40 + 7.5 * len(name)
    if model is not None:
        body.append(_text(place, plane.floor + 52, "- - the model", "tick"))
    width = max(plane.right + 24, plane.left + 12 + 7.6 * len(title))
    return _svg(width, plane.floor + 66, body, title)


def transfer_svg(evaluation: Evaluation, lens: str, metric: str) -> str:
    """Return the transfer matrix in bits per byte: the site of the lens upwards, that of the stream across."""
    matrix = evaluation.transfer[lens][metric] * evaluation.bits_per_byte
    part, end = shares(matrix, metric)
    size, left, top = len(matrix), 90.0, 46.0
    cell = min(44.0, max(14.0, 620.0 / size))
    width, height = left + size * cell + 24, top + size * cell + 92
    names = {"ce": "cross-entropy", "kl": "KL from the site's own lens"}
    title = f"{evaluation.subject}: {lens} lens across sites, {names[metric]}, bits per byte"
    width = max(width, 24 + 7.6 * len(title))
    body = [_text(12, 18, title, "title")]
    last = max(evaluation.sites) + 1
    every = max(1, math.ceil(20 / cell))
    for i, site in enumerate(evaluation.sites):
        y = top + (size - 1 - i) * cell
        if i % every == 0:
            body.append(_text(left - 8, y + cell / 2 + 4, site_name(site, last), "tick", "end"))
            body.append(_text(left + (i + 0.5) * cell, top + size * cell + 16, str(site), "tick", "middle"))
        for j, other in enumerate(evaluation.sites):
            share = float(part[i, j])
            said = f"lens {site} on stream {other}: {matrix[i, j]:.3f}"
            number = f"{matrix[i, j]:.2g}" if cell >= 34 else ""
            body.append(
                f'<g><title>{_esc(said)}</title><rect x="{left + j * cell:g}" y="{y:g}" width="{cell:g}" '
                f'height="{cell:g}" fill="{shade(share)}"/><text class="cell" x="{left + (j + 0.5) * cell:g}" '
                f'y="{y + cell / 2 + 4:g}" style="fill:{ink(share)}">{_esc(number)}</text></g>'
            )
    body.append(_text(left + size * cell / 2, top + size * cell + 34, "stream of site", "tick", "middle"))
    body.append(_text(12, 36, "lens of site", "tick"))
    body.append(_scale(left, top + size * cell + 48, end))
    return _svg(width, height, body, title)


@final
class _Plane:
    """A plane of curves: places of sites and of values."""

    def __init__(self, places: int, values: Sequence[float], *, logarithmic: bool) -> None:
        self.left, self.right, self.top, self.floor = 64.0, 620.0, 34.0, 300.0
        self._places, self._logarithmic = max(1, places - 1), logarithmic
        known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if logarithmic:
            low = min((v for v in known if v > 0), default=1e-6)
            low, high = max(low, high * 1e-4, 1e-6), max(high, 1e-6)
            self._low, self._high = math.log10(low) - 0.05, math.log10(high) + 0.05
        else:
            self._low, self._high = min(0.0, low), high * 1.05 or 1.0

    def x(self, place: int) -> float:
        """Return where a site is."""
        return self.left + 14 + place * (self.right - self.left - 28) / self._places

    def y(self, value: float) -> float:
        """Return where a value is, at the border where it lies beyond."""
        at = math.log10(max(value, 1e-300)) if self._logarithmic else value
        share = (at - self._low) / (self._high - self._low)
        return self.floor - min(1.0, max(0.0, share)) * (self.floor - self.top)

    def grid(self) -> list[str]:
        """Return lines across with their numbers."""
        if self._logarithmic:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            ticks = [t for t in ticks if self._low <= math.log10(t) <= self._high]
        else:
            ticks = [self._high * i / 5 for i in range(6)]
        found = []
        for tick in ticks:
            y = self.y(tick)
            found.append(f'<line x1="{self.left:g}" x2="{self.right:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e0d8"/>')
            found.append(_text(self.left - 8, y + 4, f"{tick:.3g}", "tick", "end"))
        return found


def _curve(
    plane: _Plane, name: str, sites: Sequence[int], line: Sequence[Interval], by: float, colour: str
) -> list[str]:
    upper = [(plane.x(i), plane.y(one.high * by)) for i, one in enumerate(line) if math.isfinite(one.high)]
    lower = [(plane.x(i), plane.y(one.low * by)) for i, one in enumerate(line) if math.isfinite(one.low)]
    band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    path = " ".join(f"{plane.x(i):.1f},{plane.y(one.value * by):.1f}" for i, one in enumerate(line))
    found = [
        f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>',
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
    ]
    for i, (site, one) in enumerate(zip(sites, line, strict=True)):
        found.append(
            f'<circle cx="{plane.x(i):.1f}" cy="{plane.y(one.value * by):.1f}" r="3.2" fill="{colour}">'
            f"<title>{_esc(_said(f'{name}, site {site}', one, by))}</title></circle>"
        )
    return found


def _said(name: str, one: Interval, by: float) -> str:
    return f"{name}: {one.value * by:.4g} [{one.low * by:.4g}, {one.high * by:.4g}] bits per byte"


def _cell_text(found: Trajectory, s: int, t: int) -> str:
    likely = ", ".join(
        f"{visible_token(text)} {p:.3f}"
        for text, p in zip(found.top_texts[s][t][:5], found.top_p[s, t, :5].tolist(), strict=True)
    )
    return f"site {found.sites[s]} after {visible_token(found.texts[t])}: {likely}"


def _scale(x: float, y: float, end: float) -> str:
    steps = "".join(
        f'<rect x="{x + i * 6:g}" y="{y:g}" width="6.2" height="12" fill="{shade(i / 31)}"/>' for i in range(32)
    )
    return steps + _text(x, y + 26, "0", "tick", "middle") + _text(x + 192, y + 26, f"{end:.3g}", "tick", "middle")


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{_esc(text)}</text>'


def _plain(text: str) -> str:
    """Return text that matplotlib takes as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _esc(text: str) -> str:
    return html.escape(visible_line(text), quote=True)


def _svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    style = (
        f"text{{font-family:{_FONT};font-size:12px;fill:#1d1f23}}.title{{font-size:13px;font-weight:600}}"
        f".tick{{font-size:11.5px;fill:#5b606b}}.cell{{font-family:{_MONO};font-size:11px;text-anchor:middle}}"
        f".token{{font-family:{_MONO};font-size:11.5px;font-weight:600}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{_esc(title)}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(body)}</svg>\n'
    )
