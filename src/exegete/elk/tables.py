"""What probing writes: tidy tables as CSV, everything as JSON, figures as SVG; and what it says in words."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from exegete.elk.plots import grid_figure, sites_figure
from exegete.files import write_json, write_text
from exegete.metrics import Interval

if TYPE_CHECKING:
    from exegete.elk.anomaly import Anomaly
    from exegete.elk.gap import Recovered
    from exegete.elk.intervention import Intervention
    from exegete.elk.transfers import Transfers

FORMAT: Final = 1
_RESULTS: Final = "probes.json"


class Probed(Protocol):
    """Anything that names a probe and the feature set that it reads."""

    @property
    def feature(self) -> str:
        """The feature set."""

    @property
    def probe(self) -> str:
        """The probe."""


def write_probes(
    found: Transfers,
    folder: str | Path,
    *,
    shares: Sequence[Recovered] = (),
    anomalies: Sequence[Anomaly] = (),
    interventions: Sequence[Intervention] = (),
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the results of probing into a folder, each file atomically; return the files.

    ``transfers.csv`` has a row for every probe, site, transfer and kind of row, ``random.csv`` one for random
    directions, ``recovered.csv`` and ``anomalies.csv`` one for each of these, ``interventions.csv`` likewise;
    ``probes.json`` holds all of them with ``facts``; ``sites-SOURCE-TARGET.svg`` and ``grid.svg`` are the figures.
    """
    place = Path(folder).expanduser()
    given: dict[str, Sequence[Any]] = {
        "transfers": found.rows,
        "random": found.random,
        "recovered": shares,
        "anomalies": anomalies,
        "interventions": interventions,
    }
    tables = {name: [_flat(dataclasses.asdict(row)) for row in rows] for name, rows in given.items()}
    written = []
    for name, rows in tables.items():
        if rows:
            write_text(place / f"{name}.csv", csv_text(rows))
            written.append(place / f"{name}.csv")
    held = {name: [{k: _json(v) for k, v in row.items()} for row in rows] for name, rows in tables.items()}
    data = {"format": FORMAT, "facts": dict(facts or {}), "skipped": list(found.skipped), **held}
    write_json(place / _RESULTS, data)
    written.append(place / _RESULTS)
    for source, target in dict.fromkeys((row.source, row.target) for row in found.rows if row.feature != "output"):
        path = place / f"sites-{source}-{target}.svg"
        write_text(path, sites_figure(found, source, target))
        written.append(path)
    if found.sites:
        write_text(place / "grid.svg", grid_figure(found))
        written.append(place / "grid.svg")
    return written


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as CSV with a header; what is not there is empty."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()})
    return stream.getvalue()


def summary_lines(
    found: Transfers, *, shares: Sequence[Recovered] = (), anomalies: Sequence[Anomaly] = ()
) -> list[str]:
    """Return what was found, for people: each transfer's probes at their earliest informative site."""
    lines = []
    for source, target in dict.fromkeys((row.source, row.target) for row in found.rows):
        lines.append(f"{source} -> {target}: AUROC against the truth (rows on which both disagree, agree)")
        own = [r for r in found.rows if (r.source, r.target) == (source, target)]
        for feature, probe in dict.fromkeys((row.feature, row.probe) for row in own):
            chosen = [
                r
                for r in own
                if (r.feature, r.probe) == (feature, probe) and ("earliest" in r.rules or r.feature == "output")
            ]
            by = {row.which: row for row in chosen}
            name = "the model's answer" if feature == "output" else f"{feature} {probe}, site {by['all'].site}"
            apart = ", ".join(number(by[w].auroc.value) for w in ("disagree", "agree"))
            lines.append(f"  {name:<36} {bracket(by['all'].auroc)}  ({apart})")
    best = [row for row in shares if row.rule == "earliest"]
    if best:
        lines.append("share of the gap between a probe of Bob's rows and one of Alice's that is recovered")
        lines += [
            f"  {row.source + ' -> ' + row.target:<10} {of_probe(row)}, site {row.site}: {bracket(row.share)}"
            for row in best
        ]
    if anomalies:
        lines.append("Bob's hard rows told from Alice's by how unusual the log-odds are")
        lines += [f"  {of_probe(row)}, {row.detector}: {bracket(row.auroc)}" for row in anomalies]
    lines += [f"left out: {text}" for text in found.skipped]
    return lines


def intervention_lines(found: Sequence[Intervention]) -> list[str]:
    """Return what reflecting along probes did to the answers, for people."""
    lines = ["reflected along a probe at one site: share of answers that flip (random directions: mean, most)"]
    for row in found:
        mean = sum(row.random_flipped) / max(1, len(row.random_flipped))
        most = max(row.random_flipped, default=math.nan)
        lines.append(
            f"  {row.probe} of {row.source}, site {row.site}, rows {row.pool}: {bracket(row.flipped)} "
            f"({number(mean)}, {number(most)}); AUROC against the truth {number(row.before.value)} → "
            f"{number(row.after.value)}"
        )
    return lines


def of_probe(row: Probed) -> str:
    """Return the name of a probe with what it reads."""
    return f"{row.feature} {row.probe}"


def bracket(found: Interval) -> str:
    """Return a value with its interval."""
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def number(value: float) -> str:
    """Return a number of three digits, a dash for none."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with each interval as its value, bounds and counts, and lists as text."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            found |= {f"{name}_n": value["n"], f"{name}_bases": value["n_documents"]}
        elif isinstance(value, tuple):
            found[name] = " ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
        else:
            found[name] = value
    return found


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
