"""What probing writes: tidy tables as CSV, everything as JSON, figures as SVG; and what it says in words."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from exegete.elk.facts import FILTERS, POOLS
from exegete.elk.plots import grid_figure, sites_figure
from exegete.files import RunLock, write_json, write_text
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
    """Write the results of probing into a folder, in the place of earlier ones there; return the files.

    ``transfers.csv`` has a row for every probe, site, transfer and kind of row, ``random.csv`` one for random
    directions, ``recovered.csv`` and ``anomalies.csv`` one for each of these, ``interventions.csv`` likewise;
    ``probes.json`` holds all of them with ``facts``; ``sites-SOURCE-TARGET.svg`` and ``grid.svg`` are the figures. All
    files of these names are removed first, so that results of two runs never stand side by side, and ``probes.json``
    comes last: where it is, everything is. Raises BusyError while another process writes there.
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
    texts = {f"{name}.csv": csv_text(rows) for name, rows in tables.items() if rows}
    for source, target in dict.fromkeys((row.source, row.target) for row in found.rows if row.feature != "output"):
        texts[f"sites-{source}-{target}.svg"] = sites_figure(found, source, target)
    if found.sites:
        texts["grid.svg"] = grid_figure(found)
    held = {name: [{k: _json(v) for k, v in row.items()} for row in rows] for name, rows in tables.items()}
    data = {"format": FORMAT, "facts": dict(facts or {}), "skipped": list(found.skipped), **held}
    figures = ["grid.svg", *(f"sites-{source}-{target}.svg" for source in POOLS for target in POOLS)]
    with RunLock(place):
        for name in (_RESULTS, *(f"{name}.csv" for name in given), *figures):
            (place / name).unlink(missing_ok=True)
        for name, text in texts.items():
            write_text(place / name, text)
        write_json(place / _RESULTS, data)
    return [place / name for name in (*texts, _RESULTS)]


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
    if found.rows:
        lines.append(
            "AUROC against the truth [95 % intervals], at each probe's earliest informative site; chance is 0.500"
        )
    for source, target in dict.fromkeys((row.source, row.target) for row in found.rows):
        lines.append(_columns(f"{source} -> {target}", "all rows", "both disagree", "both agree"))
        own = [r for r in found.rows if (r.source, r.target) == (source, target)]
        for feature, probe in dict.fromkeys((row.feature, row.probe) for row in own):
            rows = [r for r in own if (r.feature, r.probe) == (feature, probe)]
            by = {r.which: r for r in rows if "earliest" in r.rules or r.feature == "output"}
            name = "the model's answer" if feature == "output" else f"{feature} {probe}, site {by['all'].site}"
            lines.append(_columns(f"  {name}", *(bracket(by[which].auroc) for which in FILTERS)))
        for feature in dict.fromkeys(r.feature for r in found.random if (r.source, r.target) == (source, target)):
            drawn = {
                r.which: r
                for r in found.random
                if (r.feature, r.source, r.target) == (feature, source, target) and "earliest" in r.rules
            }
            name = f"{feature} random (mean), site {drawn['all'].site}"
            lines.append(_columns(f"  {name}", *(bracket(drawn[which].mean) for which in FILTERS)))
    best = [row for row in shares if row.rule == "earliest" and not row.source.startswith("B")]
    if best:
        lines.append(
            "share of the gap recovered, from a probe of Bob's rows (0.000) to one of Alice's on her own (1.000)"
        )
        lines += [
            _columns(f"  {row.source} -> {row.target} {of_probe(row)}, site {row.site}", bracket(row.share))
            for row in best
        ]
    if anomalies:
        lines.append(
            "Bob's hard rows told from Alice's by how unusual the log-odds are: AUROC, chance is 0.500; the speaker's "
            "name alone can make them unusual"
        )
        lines += [_columns(f"  {of_probe(row)}, {row.detector}", bracket(row.auroc)) for row in anomalies]
    lines += [f"left out: {text}" for text in found.skipped]
    return lines


def intervention_lines(found: Sequence[Intervention]) -> list[str]:
    """Return what reflecting along probes did to the answers, for people."""
    lines = [
        "reflected along a probe at one site: share of answers that flip, and AUROC of the answers against the truth"
    ]
    for row in found:
        lines.append(_columns(f"  {row.probe} of {row.source}, site {row.site}, rows {row.pool}", bracket(row.flipped)))
        lines.append(_columns("    AUROC before, after", bracket(row.before), bracket(row.after)))
        if row.random_flipped:
            name = f"    {len(row.random_flipped)} random directions (mean), most"
            lines.append(_columns(name, bracket(row.flipped_by_random), number(max(row.random_flipped))))
    return lines


def _columns(name: str, *columns: str) -> str:
    return f"{name:<44}" + "".join(f"  {text:<20}" for text in columns[:-1]) + f"  {columns[-1]}"


def of_probe(row: Probed) -> str:
    """Return the name of a probe with what it reads."""
    return f"{row.feature} {row.probe}"


def bracket(found: Interval) -> str:
    """Return a value with its interval, a dash for none."""
    if math.isnan(found.value):
        return number(found.value)
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
