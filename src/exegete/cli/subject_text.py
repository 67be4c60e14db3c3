"""What is known of a subject as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from exegete.subjects.inspecting import SubjectInfo
from exegete.subjects.verdicts import Verdict

_ROUTES = {
    "chunks": "several tokens at once",
    "steps": "one by one",
    "whole": "all again from the beginning: nothing this model carries over is exact",
}


def subject_text(info: SubjectInfo) -> str:
    """Return the facts of a subject, a line each, and its hookpoints as a table."""
    facts = {
        "model": info.name,
        "family": f"{info.family} ({info.architecture})",
        "weights": f"{info.parameters:,} in {info.dtype} on {info.device}",
        "vocabulary": f"{info.vocabulary:,} embeddings, {info.tokens:,} tokens",
        "context": "no limit given" if info.context is None else f"{info.context:,} tokens",
        "sites": "none: no list of blocks"
        if info.blocks is None
        else f"-1 (the embedding) to {info.blocks - 1}, d = {info.d:,}",
        **({} if info.verdict is None else _verdict(info.verdict)),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    rows = [("hookpoints", "number", "d of the output")]
    rows += [(found.pattern, str(found.count), "–" if found.d is None else f"{found.d:,}") for found in info.hookpoints]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join([*lines, "", *(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)])


def _verdict(found: Verdict) -> dict[str, str]:
    """Return what the trial said: greatest differences of logits from whole passes."""
    return {
        "state": f"{', '.join(found.components)} in blocks {_ranges(found.layers)}" if found.components else "none",
        "readout": _error(found.readout_error, found.bound),
        "its own steps": _error(found.steps_error, found.bound),
        "… of rows": _error(found.batch_error, found.bound),
        "its own chunks": _error(found.chunk_error, found.bound),
        "steps here": _error(found.mended_error, found.bound),
        "chunks here": _error(found.mended_chunk_error, found.bound),
        "so what follows": f"is fed {_ROUTES[found.route]}",
    }


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as 0-3, 5, 7-8."""
    ends: list[tuple[int, int]] = []
    for number in numbers:
        begun = ends.pop()[0] if ends and ends[-1][1] == number - 1 else number
        ends.append((begun, number))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def _error(error: float, bound: float) -> str:
    if math.isinf(error):
        return "fails"
    return f"{'exact' if error <= bound else 'wrong'}: off by {error:.0e} (up to {bound:.0e} counts as exact)"
