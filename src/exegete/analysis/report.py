"""The report of a run: ``index.html`` and a page per latent, self-contained, the same bytes for the same results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from exegete.analysis.index_page import extremes, index_context
from exegete.analysis.latent_page import latent_context
from exegete.analysis.rendering import environment
from exegete.analysis.shapes import CoderSummary, RunSummary
from exegete.analysis.summary import ranking, summarise
from exegete.files import write_text
from exegete.results import Results
from exegete.tokens import TokenTable
from exegete.types import ExampleSet, Explanation, LatentId

_PAGE = re.compile(r"\d+-\d+\.html")


def write_report(
    results: Results,
    table: TokenTable,
    examples_of: Callable[[LatentId], ExampleSet | None],
    out_folder: Path,
    *,
    max_latent_pages: int | None = None,
) -> Path:
    """Write the report into a folder and return the path of its first page.

    ``examples_of`` gives the windows of a latent, None for none. At most ``max_latent_pages`` pages are written per
    coder: those of the best and worst latents, and others spread evenly; the first page says how many are left out.
    Pages of an earlier report that are no longer wanted are removed. File names are made of numbers only.
    """
    with results.snapshot():
        summary = summarise(results)
        explanations = results.explanations()
        names = _page_names(results, summary, explanations, max_latent_pages)
        pages = {latent: f"latents/{name}" for latent, name in names.items()}
        made = environment()
        _write_latents(results, summary, explanations, names, table, examples_of, out_folder / "latents")
        index = made.get_template("index.html.j2").render(index_context(results, summary, explanations, pages))
    write_text(out_folder / "index.html", index)
    return out_folder / "index.html"


def _page_names(
    results: Results, summary: RunSummary, explanations: Mapping[int, Explanation], most: int | None
) -> dict[LatentId, str]:
    """Return the file name of every latent that gets a page, in the order of the pages."""
    names: dict[LatentId, str] = {}
    for place, coder in enumerate(summary.coders):
        indices = sorted({e.latent.index for e in explanations.values() if e.latent.coder == coder.name})
        wanted = set(indices)
        if most is not None and len(indices) > most:
            wanted = set()
            for explainer in coder.explainers:
                column = ranking(results, coder.name, explainer)[1]
                best, worst = extremes(column)
                order = [position for pair in zip(best, worst, strict=False) for position in pair]
                wanted.update(column.index[order[: max(0, most - len(wanted))]].tolist())
            rest = [i for i in indices if i not in wanted]
            spread = np.linspace(0, len(rest) - 1, max(0, most - len(wanted))).round().astype(int)
            wanted.update(rest[i] for i in spread.tolist())
        for index in indices:
            if index in wanted:
                names[LatentId(coder=coder.name, index=index)] = f"{place}-{index}.html"
    return names


def _judges(coder: CoderSummary) -> dict[str, str]:
    """Return who judged for each scorer; of measurements where there are some."""
    found = [s for e in coder.explainers for s in e.scorers]
    return {s.scorer: s.judge for s in sorted(found, key=lambda s: not s.plumbing)}


def _write_latents(
    results: Results,
    summary: RunSummary,
    explanations: Mapping[int, Explanation],
    names: Mapping[LatentId, str],
    table: TokenTable,
    examples_of: Callable[[LatentId], ExampleSet | None],
    folder: Path,
) -> None:
    template = environment().get_template("latent.html.j2")
    stats = {s.latent: s for c in summary.coders for s in results.latents(c.name) if s.latent in names}
    judges = {c.name: _judges(c) for c in summary.coders}
    mine: dict[LatentId, dict[int, Explanation]] = {}
    for id_, explanation in explanations.items():
        mine.setdefault(explanation.latent, {})[id_] = explanation
    order = list(names)
    for i, latent in enumerate(order):
        context = latent_context(
            results,
            latent,
            mine[latent],
            stats.get(latent),
            examples_of(latent),
            table,
            judges[latent.coder],
        )
        for side, j in (("previous", i - 1), ("next", i + 1)):
            known = 0 <= j < len(order)
            context[side] = {"name": str(order[j]), "page": names[order[j]]} if known else None
        write_text(folder / names[latent], template.render(context))
    for path in sorted(folder.glob("*.html")):
        if _PAGE.fullmatch(path.name) and path.name not in set(names.values()):
            path.unlink()
