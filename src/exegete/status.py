"""What of a run is done, failed and skipped."""

from __future__ import annotations

import dataclasses
from typing import Any

from exegete.results_kinds import CoderCounts
from exegete.runs import Run


def status_of(run: Run) -> dict[str, Any]:
    """Return counts per coder: firings collected, explanations by status, scores by scorer, skips by reason."""
    corpus = {"rows": run.corpus.n_rows, "tokens": run.corpus.n_tokens} if run.corpus_folder.is_dir() else {}
    coders: dict[str, Any] = {}
    for name in run.coders():
        manifest = run.store(name).manifest
        rows = sum(s.row_stop - s.row_start for s in manifest.shards)
        coders[name] = {
            "rows": rows,
            "complete": manifest.complete,
            "firings": sum(s.n_firings for s in manifest.shards),
        }
    if (run.folder / "results.db").is_file():
        _count_results(run, coders)
    return {
        "run": str(run.folder),
        "corpus": corpus,
        "coders": coders,
        "report": run.report_path.is_file(),
        "spent": _spent(run),
    }


def _spent(run: Run) -> list[dict[str, Any]]:
    """Return what the ledger of the run says, by stage, model and outcome."""
    from exegete.llm.spending import read_totals

    path = run.folder / "ledger.db"
    return [dataclasses.asdict(total) for total in read_totals(path)] if path.is_file() else []


def _count_results(run: Run, coders: dict[str, Any]) -> None:
    results = run.results()
    try:
        counted = results.counts()
    finally:
        results.close()
    for name, entry in coders.items():
        entry |= dataclasses.asdict(counted.get(name, CoderCounts()))


def status_text(found: dict[str, Any]) -> str:
    """Return the status as lines of text."""
    corpus = found["corpus"]
    lines = [f"run {found['run']}"]
    if corpus:
        lines.append(f"corpus: {corpus['tokens']:,} tokens in {corpus['rows']:,} rows")
    for name, entry in found["coders"].items():
        rows = corpus.get("rows") or 1
        lines.append(f"{name}: collected {100 * entry['rows'] / rows:.0f} %, {entry['firings']:,} firings")
        for part in ("explanations", "scored", "skipped"):
            if entry.get(part):
                lines.append(f"    {part}: " + ", ".join(f"{n:,} {what}" for what, n in entry[part].items()))
    for spent in found["spent"]:
        paid = f"${spent['dollars']:.4f}" if spent["unpriced"] < spent["requests"] else "price not known"
        lines.append(
            f"{spent['model']} {spent['stage']}: {spent['requests']:,} requests {spent['outcome']}, "
            f"{spent['prompt_tokens']:,} + {spent['completion_tokens']:,} tokens, {paid}"
        )
    lines.append("report: written" if found["report"] else "report: not yet")
    return "\n".join(lines)
