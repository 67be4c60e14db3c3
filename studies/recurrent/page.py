"""The page of the studies: what was asked, how, tables, figures, criteria and whether they are met."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from studies.recurrent import criteria as c
from studies.recurrent.drawing import figures_of
from studies.recurrent.models import FAMILIES
from studies.recurrent.tables import TABLES
from studies.recurrent.texts import NOTES, OPENING, TEXTS, TITLES
from studies.recurrent.work import Result, Results, Size

from exegete.files import write_text

_STUDY: Final = {
    "E1": "comparison",
    "E2": "addition",
    "E3": "registers",
    "E4": "registers",
    "E5": "lens",
    "E6": "conformance",
}


def write_page(path: Path, results: Results, size: Size) -> None:
    """Write the page and, into a folder of its name beside it, its figures."""
    drawn = figures_of(results)
    for name, svg in drawn.items():
        write_text(path.with_suffix("") / f"{name}.svg", svg)
    write_text(path, page(results, size, drawn, folder=path.stem))


def page(results: Results, size: Size, drawn: Mapping[str, str], *, folder: str) -> str:
    """Return the page as Markdown; figures are linked from ``folder``."""
    found = c.judged(results)
    seconds = sum(r["seconds"] for families in results.values() for rows in families.values() for r in rows)
    known = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    opening = OPENING.format(
        seeds=size.seeds, minutes=seconds / 60, versions=f"Python {platform.python_version()}, {known}"
    )
    opening = "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False) for part in opening.split("\n\n"))
    parts = [opening, _summary(found)]
    for experiment, study in _STUDY.items():
        if study not in results:
            continue
        own = [one for one in found if one.experiment == experiment]
        parts.append(f"## {experiment}. {TITLES[experiment]}\n\n{TEXTS[experiment]}")
        parts += _incomplete(results[study], size)
        parts += [_table(head, rows) for head, rows in TABLES[experiment](results[study]) if rows]
        for name in (name for name in drawn if name.startswith(experiment.lower())):
            parts.append(f"![{TITLES[experiment]}]({folder}/{name}.svg)")
        parts.append(_verdicts(own))
        parts += [NOTES[experiment]] if experiment in NOTES else []
    return "\n\n".join(parts) + "\n"


def _summary(found: Sequence[c.Judged]) -> str:
    rows = []
    for experiment in _STUDY:
        own = [one for one in found if one.experiment == experiment]
        if own:
            cells = [f"{experiment}. {TITLES[experiment]}"]
            for family in (*FAMILIES, "all"):
                here = [one for one in own if one.family == family]
                cells.append(c.counts(here) if here else "")
            count = len([one for one in own if not one.met])
            rows.append([*cells, f"{count} not met" if count else "all met"])
    missed = [
        f"- {one.experiment}, {FAMILIES.get(one.family, 'every family')}: {one.criterion} (found: {one.found})"
        for one in found
        if not one.met
    ]
    parts = [_table(["criteria met", *FAMILIES.values(), "every family", ""], rows)]
    return "\n\n".join([*parts, "Not met:", "\n".join(missed)] if missed else parts)


def _incomplete(families: Mapping[str, Sequence[Result]], size: Size) -> list[str]:
    """Say of which families fewer seeds were run."""
    few = {name: len(found) for name, found in families.items() if name in FAMILIES and len(found) < size.seeds}
    told = ", ".join(f"{FAMILIES[name]} {count} of {size.seeds}" for name, count in few.items())
    return [f"*Seeds run so far: {told}.*"] if few else []


def _verdicts(found: Sequence[c.Judged]) -> str:
    """Return a table of criteria by family."""
    families = [name for name in (*FAMILIES, "all") if any(one.family == name for one in found)]
    rows = []
    for criterion in dict.fromkeys(one.criterion for one in found):
        by = {one.family: one for one in found if one.criterion == criterion}
        rows.append([criterion, *(_verdict(by[f]) if f in by else "" for f in families)])
    return _table(["criterion", *(FAMILIES.get(f, "every family") for f in families)], rows)


def _verdict(one: c.Judged) -> str:
    return f"{one.found}: {'met' if one.met else '**not met**'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
