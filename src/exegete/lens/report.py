"""What training and measuring gave, as lines of text, tables and pictures in a folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.analysis.text import bracket
from exegete.files import safe_name, write_json, write_text
from exegete.lens.evaluating import METRICS
from exegete.lens.pictures import clipped, curves_svg, site_name, transfer_svg
from exegete.metrics import Interval

if TYPE_CHECKING:
    from exegete.lens.evaluating import Evaluation
    from exegete.lens.trained import Trained
    from exegete.lens.trajectory import Trajectory


def training_lines(trained: Mapping[str, Trained], loss: str) -> list[str]:
    """Return a table of the losses on the validation part, in nats per token."""
    what = "KL to the model" if loss == "kl" else "cross-entropy"
    lines = [f"validation {what}, nats per token"]
    lines.append(f"{'lens':<8}{'site':>6}{'logit lens':>12}{'kept':>10}{'from step':>11}{'last step':>11}")
    for kind, one in trained.items():
        for site, found in one.sites.items():
            line = (
                f"{kind:<8}{site:>6}{found.untrained:>12.4f}{found.best:>10.4f}{found.best_step:>11}{found.last:>11.4f}"
            )
            if found.kept_identity:
                line += "  kept the logit lens: training made it worse"
            elif found.kept_plain:
                line += "  kept the plain translator: the state made it worse"
            lines.append(line)
    return lines


def evaluation_lines(found: Evaluation) -> list[str]:
    """Return tables of the three metrics in bits per byte, with the model and the differences to the first lens."""
    by, names = found.bits_per_byte, list(found.nats)
    first, rest = names[0], names[1:]
    lines = [
        f"{found.subject}: {found.n_tokens:,} tokens ({found.n_bytes:,} bytes) of {found.n_documents:,} documents, "
        f"part {found.part}; bits per byte with {100 * found.level:g} % intervals clustered by document"
    ]
    titles = {"ce": "cross-entropy", "kl": "KL to the model", "entropy": "entropy"}
    for metric in METRICS:
        heads = [*names, *(f"{name} − {first}" for name in rest)]
        lines += ["", titles[metric], f"{'site':>6}" + "".join(f"{head:>26}" for head in heads)]
        for site in found.sites:
            cells = [found.nats[name][metric][site] for name in names]
            cells += [found.differences[name][metric][site] for name in rest]
            signs = [False] * len(names) + [True] * len(rest)
            texts = (bracket(scaled(one, by), sign=sign) for one, sign in zip(cells, signs, strict=True))
            lines.append(f"{site:>6}" + "".join(f"{text:>26}" for text in texts))
        if metric in found.baseline:
            lines.append(f"{'model':>6}{bracket(scaled(found.baseline[metric], by)):>26}")
    lines += _comparison(found)
    for name, by_metric in found.transfer.items():
        for metric, matrix in by_metric.items():
            unit = titles[metric] if metric == "ce" else "KL from the site's own lens"
            lines += ["", f"{name} lens across sites: {unit}, bits per byte; lens in rows, stream in columns"]
            lines.append(f"{'':>6}" + "".join(f"{site:>9}" for site in found.sites))
            for site, row in zip(found.sites, (matrix * by).tolist(), strict=True):
                lines.append(f"{site:>6}" + "".join(f"{value:>9.3f}" for value in row))
    return lines


def trajectory_lines(found: Trajectory) -> list[str]:
    """Return the likeliest token and its probability at every site, a line per token of the prompt."""
    last = found.sites[-1]
    lines = [f"{'after':<14}" + "".join(f"{site_name(site, last):>18}" for site in found.sites)]
    for t, text in enumerate(found.texts):
        cells = (f"{clipped(found.top_texts[s][t][0], 10)} {found.top_p[s, t, 0]:.3f}" for s in range(len(found.sites)))
        lines.append(f"{clipped(text, 12):<14}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def write_evaluation(found: Evaluation, folder: str | Path) -> None:
    """Write ``evaluation.json``, ``evaluation.csv``, transfer matrices as .csv, and curves and matrices as .svg."""
    place = Path(folder)
    write_json(place / "evaluation.json", found.to_json())
    write_text(place / "evaluation.csv", table(found.rows()))
    for metric in METRICS:
        write_text(place / f"{metric}.svg", curves_svg(found, metric))
    for name, by_metric in found.transfer.items():
        for metric, matrix in by_metric.items():
            file = safe_name(f"transfer-{name.split(' ')[0]}-{metric}")
            rows = [
                {"lens": site, **dict(zip(map(str, found.sites), row, strict=True))}
                for site, row in zip(found.sites, (matrix * found.bits_per_byte).tolist(), strict=True)
            ]
            write_text(place / f"{file}.csv", table(rows))
            write_text(place / f"{file}.svg", transfer_svg(found, name, metric))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def scaled(one: Interval, by: float) -> Interval:
    """Return an interval in another unit."""
    return Interval(
        value=one.value * by,
        low=one.low * by,
        high=one.high * by,
        method=one.method,
        n=one.n,
        n_documents=one.n_documents,
    )


def _comparison(found: Evaluation) -> list[str]:
    """Return one line for each lens beside the logit lens: at how many sites its KL is lower, and by how much."""
    lines = [""]
    names = list(found.nats)
    for name in names[1:]:
        first = names[0]
        better = [s for s in found.sites if found.nats[name]["kl"][s].value <= found.nats[first]["kl"][s].value]
        sure = [s for s in found.sites if found.differences[name]["kl"][s].high < 0]
        worse = [s for s in found.sites if found.differences[name]["kl"][s].low > 0]
        pairs = [(found.nats[name]["kl"][s].value, found.nats[first]["kl"][s].value) for s in found.sites]
        known = sorted(own / base for own, base in pairs if math.isfinite(own / base if base > 0 else math.nan))
        middle = known[len(known) // 2] if known else math.nan
        lines.append(
            f"{name}: KL at most that of {first} at {len(better)} of {len(found.sites)} sites (surely lower at "
            f"{len(sure)}, surely higher at {len(worse)}); median ratio {middle:.3f}"
        )
    if "tuned" in found.nats and "state" in found.nats:
        lines += _state_lines(found)
    return lines if len(lines) > 1 else []


def _state_lines(found: Evaluation) -> list[str]:
    tuned, state = found.nats["tuned"]["kl"], found.nats["state"]["kl"]
    lines = ["", "state-aware beside plain: KL in bits per byte", f"{'site':>6}{'tuned':>10}{'state':>10}{'ratio':>8}"]
    for site in found.sites:
        a, b = tuned[site].value * found.bits_per_byte, state[site].value * found.bits_per_byte
        lines.append(f"{site:>6}{a:>10.4f}{b:>10.4f}{b / a if a > 0 else math.nan:>8.3f}")
    return lines
