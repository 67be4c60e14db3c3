"""The prediction trajectory as a page of its own: no script, every text escaped, colouring chosen by radio buttons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exegete.analysis.rendering import environment
from exegete.analysis.visible import visible_token
from exegete.lens.pictures import TITLES, clipped, ink, shade, shares, site_name

if TYPE_CHECKING:
    from exegete.lens.trajectory import Colour, Trajectory

_LEVELS: Final = 32
_TEMPLATE: Final = Path(__file__).parent / "templates" / "trajectory.html.j2"


def trajectory_html(found: Trajectory, colour: Colour) -> str:
    """Return the page; it opens coloured by ``colour``."""
    from exegete.lens.trajectory import COLOURS

    scales = {name: shares(found.values(name), name) for name in COLOURS}
    last = found.sites[-1]
    rows = []
    for s in reversed(range(len(found.sites))):
        cells = []
        for t in range(len(found.tokens)):
            levels = " ".join(f"{name[0]}{_level(float(part[s, t]))}" for name, (part, _) in scales.items())
            cells.append(_cell(found, s, t, levels))
        rows.append({"name": site_name(found.sites[s], last), "cells": cells})
    return (
        environment()
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            subject=found.subject,
            lens=found.lens,
            rows=rows,
            prompt=[clipped(text, 14) for text in found.texts],
            colours=[
                {"name": name, "letter": name[0], "title": TITLES[name], "end": f"{scales[name][1]:.3g}"}
                for name in COLOURS
            ],
            chosen=colour,
            levels=[
                {"number": i, "shade": shade(i / (_LEVELS - 1)), "ink": ink(i / (_LEVELS - 1))} for i in range(_LEVELS)
            ],
            undefined={"shade": shade(math.nan), "ink": ink(math.nan)},
        )
    )


def _cell(found: Trajectory, s: int, t: int, levels: str) -> dict[str, Any]:
    ce, rank = float(found.ce[s, t]), int(found.rank[s, t])
    return {
        "levels": levels,
        "text": clipped(found.top_texts[s][t][0], 12),
        "site": found.sites[s],
        "after": visible_token(found.texts[t]),
        "top": [
            {"text": visible_token(text), "p": f"{p:.4f}"}
            for text, p in zip(found.top_texts[s][t], found.top_p[s, t].tolist(), strict=True)
        ],
        "entropy": f"{found.entropy[s, t]:.3f}",
        "kl": f"{found.kl[s, t]:.3f}",
        "next": None if rank < 0 else {"ce": f"{ce:.3f}", "rank": rank + 1},
    }


def _level(share: float) -> str:
    return str(round(min(max(share, 0.0), 1.0) * (_LEVELS - 1))) if math.isfinite(share) else "x"
