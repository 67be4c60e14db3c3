"""What is known of coders as text: a list of facts for one, a table for several."""

from __future__ import annotations

from collections.abc import Sequence

from exegete.coders.formats.format import CoderInfo

_TABLE = ("reads", "reconstructs", "architecture", "d_in", "width", "k", "threshold", "dtype", "path")


def coders_text(infos: Sequence[CoderInfo]) -> str:
    """Return the facts of the coders, what does not apply left out."""
    if len(infos) == 1:
        facts = {**_facts(infos[0]), **{f"note {i}": note for i, note in enumerate(infos[0].notes, start=1)}}
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
    rows = [_facts(info) for info in infos]
    shared = {name: {row.get(name, "") for row in rows} for name in ("format", "base model")}
    heads = [f"{name}: {', '.join(sorted(values - {''})) or 'not said'}" for name, values in shared.items()]
    columns = [name for name in _TABLE if any(name in row for row in rows)]
    cells = [columns, *[[row.get(name, "") for name in columns] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"{len(infos)} coders", *heads, "", *lines])


def _facts(info: CoderInfo) -> dict[str, str]:
    reads = f"{info.side} of {info.hookpoint}" if info.hookpoint else "not said: give --hookpoints"
    facts = {
        "path": info.path,
        "format": info.format,
        "architecture": info.architecture,
        "reads": reads,
        "reconstructs": reads if info.target is None else f"{info.target[1]} of {info.target[0]}",
        "d_in": f"{info.d_in:,}",
        "d_out": f"{info.d_out:,}",
        "width": f"{info.width:,}",
        "k": "" if info.k is None else str(info.k),
        "threshold": info.threshold or "",
        "base model": info.base_model or "",
        "dtype": info.dtype,
    }
    return {name: value for name, value in facts.items() if value}
