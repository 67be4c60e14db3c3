"""The template environment of the report: everything is escaped, and what cannot be seen is spelled out."""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.analysis.text import number, percent, signed, small
from exegete.analysis.visible import visible
from exegete.metrics import Interval

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).parent / "templates"


def environment() -> Environment:
    """Return the environment with style and script inlined; the script's hash is the only one that pages allow."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_FOLDER / "table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals["script"] = Markup(script)
    made.globals["script_hash"] = Markup(f"sha256-{digest}")
    made.globals["style"] = Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    made.filters.update(
        number=number, signed=signed, small=small, percent=percent, grouped=_grouped, direction=direction
    )
    made.tests["known"] = _known
    return made


def raw(svg: str) -> Any:
    """Return a figure made by ``plots``, which has escaped its texts, as it is to stand in a page."""
    from markupsafe import Markup

    return Markup(svg)


def direction(difference: Interval) -> str:
    """Return ``above`` or ``below`` when the interval excludes 0, else an empty string."""
    if math.isnan(difference.value):
        return ""
    return "above" if difference.low > 0 else "below" if difference.high < 0 else ""


def flattened(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON data as (dotted name, text) pairs, in the order of the data."""
    if isinstance(data, dict):
        return [
            pair for key, value in data.items() for pair in flattened(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(data, list) and any(isinstance(value, dict | list) for value in data):
        return [pair for i, value in enumerate(data, 1) for pair in flattened(value, f"{prefix} {i}".strip())]
    if isinstance(data, list):
        data = ", ".join(map(_said, data))
    if isinstance(data, int) and not isinstance(data, bool):
        return [(prefix, f"{data:,}")]
    return [(prefix, _said(data))]


def _said(value: Any) -> str:
    """Return a plain value as text: a dash for none, no more digits than are worth reading."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value in (None, "") else str(value)


def _grouped(value: int) -> str:
    return f"{value:,}"


def _known(interval: Interval) -> bool:
    return not math.isnan(interval.value)
