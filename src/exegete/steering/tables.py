"""What a sweep writes: tidy tables as CSV, everything as JSON, continuations as JSON lines, figures as SVG and PNG."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exegete.files import atomic_file, write_json, write_text
from exegete.steering.effects import Estimate
from exegete.steering.open_ended import OpenAnswer
from exegete.steering.plots import curves_figure, sites_figure
from exegete.steering.png import png_of, require_png
from exegete.steering.sweeping import Sweep

FORMAT = 1


def write_sweep(
    found: Sweep,
    folder: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    samples: Sequence[OpenAnswer] = (),
    png: bool = False,
) -> list[Path]:
    """Write a sweep into a folder, each file atomically; return the files.

    ``points.csv`` has a row for every setting, ``curves.csv`` for every site and mode, ``questions.csv`` for every
    question in every setting without a control, ``choices.csv`` for every held-out choice; ``sweep.json`` holds all
    but the third, with ``facts`` (what was run on what); ``samples.jsonl`` the answers to open
    questions; ``curves-BEHAVIOUR.svg`` and ``sites-BEHAVIOUR.svg`` are the figures, with ``png`` as .png beside them.

    Raises MissingExtraError for PNG without matplotlib, before anything is written.
    """
    if png:
        require_png()
    place = Path(folder).expanduser()
    tables = {
        "points": [dataclasses.asdict(point) for point in found.points],
        "curves": [_flat(dataclasses.asdict(curve)) for curve in found.curves],
        "choices": [_flat(dataclasses.asdict(choice)) for choice in found.choices],
    }
    written = []
    for name, rows in {**tables, "questions": list(_questions(found))}.items():
        if rows:
            write_text(place / f"{name}.csv", csv_text(rows))
            written.append(place / f"{name}.csv")
    held = {name: [_json(row) for row in rows] for name, rows in tables.items()}
    write_json(place / "sweep.json", {"format": FORMAT, "facts": dict(facts or {}), **held})
    written.append(place / "sweep.json")
    if samples:
        lines = [json.dumps(dataclasses.asdict(sample)) for sample in samples]
        write_text(place / "samples.jsonl", "\n".join(lines) + "\n")
        written.append(place / "samples.jsonl")
    for behaviour in dict.fromkeys(curve.behaviour for curve in found.curves):
        ending = f"-{_name(behaviour)}" if behaviour else ""
        for name, draw in (("curves", curves_figure), ("sites", sites_figure)):
            written += _figure(place / f"{name}{ending}", draw(found, behaviour), png=png)
    return written


def _figure(place: Path, svg: str, *, png: bool) -> Iterator[Path]:
    """Write a figure beside its tables; yield the files."""
    file = place.with_name(f"{place.name}.svg")
    write_text(file, svg)
    yield file
    if png:
        picture = place.with_name(f"{place.name}.png")
        with atomic_file(picture) as stream:
            stream.write(png_of(svg))
        yield picture


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as CSV with a header; numbers that are not there are empty."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return stream.getvalue()


def summary_lines(found: Sweep) -> list[str]:
    """Return what a sweep found, for people: each mode's chosen site with effect, controls and held-out effect."""
    lines = []
    for choice in found.choices:
        key = (choice.behaviour, choice.site, choice.mode, choice.components)
        curve = next(c for c in found.curves if (c.behaviour, c.site, c.mode, c.components) == key)
        own = [p for p in found.points if (p.behaviour, p.site, p.mode, p.components) == key and p.control == "none"]
        name = " ".join(filter(None, (choice.behaviour, choice.mode, choice.components)))
        lines.append(
            f"{name}, site {choice.site}: effect {_text(curve.effect)}; held out {_text(choice.held_out)} on "
            f"{choice.n_held_out} of {curve.n}"
        )
        lines.append(
            f"    p(match) {own[0].base:.3f} unsteered; slope {_text(curve.slope)}, "
            f"Spearman {_short(curve.spearman.value)}; nonsense {own[0].base_nonsense:.2f} unsteered, "
            f"{max(p.nonsense for p in own):.2f} at most"
        )
        parts = []
        if curve.random:
            parts.append(
                f"{curve.random} random vectors: |effect| mean {curve.random_mean:.3f}, most {curve.random_most:.3f}, "
                f"{curve.random_as_large} as large as this"
            )
        if not math.isnan(curve.letters):
            parts.append(f"letter vector {curve.letters:+.3f}")
        lines.append(f"    as long: {'; '.join(parts)}" if parts else "    no controls")
    low, high = min(found.multipliers), max(found.multipliers)
    lines.append(
        f"effect: p(match) at {high:+g} minus at {low:+g}; held out: on the half of the questions that the site was "
        "not chosen on; in brackets 95 % intervals, questions resampled"
    )
    return lines


def _text(value: Estimate) -> str:
    return "–" if math.isnan(value.value) else f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _questions(found: Sweep) -> Iterable[dict[str, Any]]:
    for (behaviour, site, mode, components), (match, nonsense) in found.values.items():
        for m, shares, losses in zip(found.multipliers, match, nonsense, strict=True):
            for i, (share, loss) in enumerate(zip(shares.tolist(), losses.tolist(), strict=True)):
                yield {
                    "behaviour": behaviour,
                    "site": site,
                    "mode": mode,
                    "components": components,
                    "multiplier": m,
                    "question": i,
                    "match": share,
                    "nonsense": loss,
                }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with intervals as three columns: effect, effect_low, effect_high."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            found[name] = value
    return found


def _json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _name(behaviour: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in behaviour)[:80]
