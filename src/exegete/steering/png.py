"""This package's SVG figures as PNG, drawn again through matplotlib, so that both are one picture."""

from __future__ import annotations

import io
import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final
from xml.etree import ElementTree

from exegete.errors import MissingExtraError

_SVG: Final = "{http://www.w3.org/2000/svg}"
_RULE: Final = re.compile(r"([.\w]+)\{([^}]*)\}")
_POINTS: Final = 72  # to the inch: a unit of a figure is a point
_FONT: Final = 10.5  # matplotlib's own font runs wider than those of browsers at 12
_SHARPNESS: Final = 2


def require_png() -> None:
    """Raise MissingExtraError without matplotlib, before there is anything to draw."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("writing PNG figures", "plot")


def png_of(svg: str) -> bytes:
    """Return a figure of this package as PNG, two pixels to a unit.

    It knows the elements that these figures are made of, and no others. Raises MissingExtraError without matplotlib.
    """
    require_png()
    tree = ElementTree.fromstring(svg)
    width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
    figure = import_module("matplotlib.figure").Figure(
        figsize=(width / _POINTS, height / _POINTS), dpi=_SHARPNESS * _POINTS, facecolor="white"
    )
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    rules = _rules(tree)
    for order, element in enumerate(tree):
        name = element.tag.removeprefix(_SVG)
        own = {**element.attrib, **rules.get(name, {}), **rules.get(f".{element.get('class')}", {})}
        if name != "style" and own.get("width") != "100%":  # the background, which is white anyhow
            axes.add_artist(_artist(name, own, element.text or "", order))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is shown as boxes
        figure.savefig(buffer, format="png", metadata={"Software": "exegete"})
    return buffer.getvalue()


def _rules(tree: ElementTree.Element) -> dict[str, dict[str, str]]:
    """Return the properties that the style sheet gives to elements and ``.classes``."""
    sheet = tree.findtext(f"{_SVG}style") or ""
    return {name: dict(_pair(one) for one in body.split(";")) for name, body in _RULE.findall(sheet)}


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition(":")
    return name, value


def _artist(name: str, own: dict[str, str], text: str, order: int) -> Any:
    lines, patches = import_module("matplotlib.lines"), import_module("matplotlib.patches")
    if name == "text":
        sides = {"middle": "center", "end": "right"}
        return import_module("matplotlib.text").Text(
            *(float(own[key]) for key in ("x", "y")),
            text.replace("$", r"\$"),  # which would begin a formula
            ha=sides.get(own.get("text-anchor", ""), "left"),
            va="baseline",
            color=own["fill"],
            weight="bold" if "font-weight" in own else "normal",
            fontsize=_FONT,
            zorder=order,
        )
    dashes = tuple(map(float, own.get("stroke-dasharray", "").split()))
    width = float(own.get("stroke-width", "1")) if "stroke" in own else 0.0
    drawn: dict[str, Any] = {"linestyle": (0, dashes) if dashes else "-", "linewidth": width, "zorder": order}
    if name in ("line", "polyline"):
        points = _places(own.get("points") or "{x1},{y1} {x2},{y2}".format(**own))
        return lines.Line2D(*zip(*points, strict=True), color=own["stroke"], solid_capstyle="butt", **drawn)
    colours = import_module("matplotlib.colors")
    shade = colours.to_rgba(own["fill"], float(own.get("fill-opacity", "1")))
    drawn |= {"facecolor": shade, "edgecolor": own.get("stroke", "none")}
    if name == "polygon":
        return patches.Polygon(_places(own["points"]), closed=True, **drawn)
    if name == "circle":
        return patches.Circle((float(own["cx"]), float(own["cy"])), float(own["r"]), **drawn)
    if name == "rect":
        return patches.Rectangle((float(own["x"]), float(own["y"])), float(own["width"]), float(own["height"]), **drawn)
    raise AssertionError(f"no figure has the element {name!r}")


def _places(points: str) -> list[tuple[float, float]]:
    found = (point.split(",") for point in points.split())
    return [(float(x), float(y)) for x, y in found]
