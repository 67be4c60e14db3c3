"""What collecting costs, beside the bare passes it cannot do without and beside EleutherAI's delphi.

    python -m benchmarks.collect [--quick] [--repeats 3] [--scale 1] [--settings demo,topk,jumprelu,memory]

Three processes, one a side, each with the same threads, take the same token rows through the same model and coder:
(a) the bare passes with the results thrown away, (b) exegete's whole collecting to disk, (c) delphi's cache and its
saving. Their repeats are interleaved, so that a busy moment of the machine hits all of them; ratios are taken within
a repeat. Then the growth of anonymous memory, each side in a fresh process. Prints the tables and writes them to
``benchmarks/results/collect.md``. Where delphi is not installed (``make .bench/delphi/ready``) the rest is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, final

import numpy as np
from benchmarks.collect_setting import DEPTHS, Setting, joined_corpus, prepare, settings
from benchmarks.collect_worker import CHECK, MEMORY, RUN, Process, SideFailedError
from benchmarks.machine import RESULTS, describe, save_section

from exegete.subjects import load_subject

PEER = Path(__file__).parents[1] / ".bench" / "delphi" / "bin" / "python"
SIDES = {"a": "collect_floor", "b": "collect_exegete", "c": "collect_peer"}
TITLES = {"a": "(a) bare passes", "b": "(b) exegete, to disk", "c": "(c) delphi, to disk"}
MEMORY_TOKENS = 1_000_000
MEMORY_FROM = 200_000
PEER_MEMORY_TOKENS = 200_000
PEER_MEMORY_FROM = 50_000

Answers = dict[str, list[dict[str, Any]]]


@final
class Sides:
    """The measured processes of one setting; the peer may be missing."""

    def __init__(self, folder: Path, threads: int, names: Sequence[str], log: TextIO) -> None:
        self.running: dict[str, Process] = {}
        self.missing: str | None = None
        for name in names:
            python = PEER if name == "c" else Path(sys.executable)
            try:
                self.running[name] = Process(python, SIDES[name], folder, threads, log)
            except SideFailedError as error:
                if name != "c":
                    raise
                self.missing = str(error)

    def close(self) -> None:
        """End all of them."""
        for process in self.running.values():
            process.close()


@contextmanager
def started(folder: Path, threads: int, names: Sequence[str], log: TextIO) -> Iterator[Sides]:
    """Start sides, and end them whatever happens."""
    sides = Sides(folder, threads, names, log)
    try:
        yield sides
    finally:
        sides.close()


def measure(sides: Sides, repeats: int) -> Answers:
    """Return the answers of every side and depth, ``a/early`` and so on, in the order of the repeats.

    Wherever it is hooked, delphi runs all layers, so it is hooked at the last one. Every answer must tell of the
    firings that the bare pass finds, which are counted once, before anything is timed.
    """
    keys = [(side, depth) for depth in DEPTHS for side in sides.running if (side, depth) != ("c", "early")]
    found = {depth: sides.running["a"].ask(do=CHECK, depth=depth) for depth in DEPTHS}
    answers: Answers = {f"{side}/{depth}": [] for side, depth in keys}
    for number in range(repeats):
        for side, depth in keys:
            answer = sides.running[side].ask(do=RUN, depth=depth)
            if side != "a":
                _agree(answer, found[depth], f"{side}/{depth}")
            answers[f"{side}/{depth}"].append(answer)
            note(f"repeat {number + 1} of {repeats}: {side}, {depth}")
    return answers


def _agree(answer: dict[str, Any], reference: dict[str, Any], what: str) -> None:
    """Stop when a side works on something else: the counts and sums of all firings must agree."""
    for name, tolerance in (("firings", 1e-4), ("total", 1e-3)):
        if abs(answer[name] - reference[name]) > tolerance * abs(reference[name]):
            raise SystemExit(f"{what} finds {name} {answer[name]}, the bare pass {reference[name]}: not the same work")


def speed_table(setting: Setting, answers: Answers, missing: str | None) -> str:
    """Return the speeds and ratios of one setting as Markdown."""
    first = answers["b/early"][0]
    lines = [
        f"## {setting.title}",
        "",
        f"{len(answers['a/early'])} interleaved repeats of {setting.tokens:,} tokens; {first['firings']:,} firings a "
        "repeat, the same for all sides.",
        "",
        "| hooked at | side | tokens/s, median (min to max) | share of (a), by clock | by CPU time |",
        "|---|---|---|---|---|",
    ]
    for depth in DEPTHS:
        where = ", ".join(f"`{name}`" for name in (setting.early if depth == "early" else setting.full))
        for side, title in TITLES.items():
            key = "c/full" if side == "c" else f"{side}/{depth}"
            if key not in answers:
                continue
            shares = [
                spread(ratios(answers, key, f"a/{depth}", by=by), 3) if side != "a" else "1"
                for by in ("seconds", "cpu_seconds")
            ]
            lines.append(f"| {where} | {title} | {spread(rates(answers, key))} | {' | '.join(shares)} |")
    return "\n".join([*lines, "", *_remarks(answers, missing)])


def _remarks(answers: Answers, missing: str | None) -> Iterator[str]:
    """Yield what belongs below a table."""
    size = (
        f"- bytes on disk per firing: exegete {per_firing(answers['b/early'], 'shard_bytes')}, or "
        f"{per_firing(answers['b/early'])} with summary and manifest, whose size does not grow with the firings"
    )
    if missing is None:
        equal, free = ratios(answers, "b/full", "c/full"), ratios(answers, "b/early", "c/full")
        yield (
            f"- exegete over delphi, tokens/s: {spread(equal, 2)} at equal layers, {spread(free, 2)} where exegete "
            "stops early (delphi runs all layers wherever it is hooked)"
        )
        writing = statistics.median(1 - one["run_seconds"] / one["seconds"] for one in answers["c/full"])
        yield f"{size}; delphi {per_firing(answers['c/full'])}; of delphi's time {writing:.0%} is writing"
    else:
        yield size
        yield f"- delphi was not measured: {missing}"
    once = statistics.median(one["whole"] - one["seconds"] for one in answers["b/early"])
    finish = statistics.median(one["finish"] for one in answers["b/early"])
    yield (
        f"- exegete once a run: {once:.2f} s up to the end of the first batch, not in its speeds (hashes of the "
        f"weights, quality on the first batch, that batch); {finish:.2f} s after the last batch, in its speeds (last "
        "shards, reading everything back, summary)"
    )


def rates(answers: Answers, key: str, by: str = "seconds") -> list[float]:
    """Return tokens per second of every repeat."""
    return [one["tokens"] / one[by] for one in answers[key]]


def ratios(answers: Answers, key: str, other: str, by: str = "seconds") -> list[float]:
    """Return the speed of one side over that of another within every repeat."""
    return [one / two for one, two in zip(rates(answers, key, by), rates(answers, other, by), strict=True)]


def per_firing(answers: Sequence[dict[str, Any]], of: str = "bytes") -> str:
    """Return bytes on disk per firing."""
    return f"{answers[0][of] / answers[0]['firings']:.2f}"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median with minimum and maximum."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def memory(folder: Path, threads: int, quick: bool, log: TextIO) -> str:
    """Return how anonymous memory grows with the tokens collected, as Markdown."""
    share = 4 if quick else 1
    subject = load_subject(str(folder / "model"), device="cpu", dtype="float32")
    corpus = joined_corpus(folder / "long", subject, MEMORY_TOKENS // share)
    rows = folder / "long.npy"
    np.save(rows, corpus.tokens[: PEER_MEMORY_TOKENS // corpus.row_length].astype(np.int64))
    with started(folder, threads, "b", log) as sides:
        found = sides.running["b"].ask(do=MEMORY, depth="early", corpus=str(folder / "long"))
    with started(folder, threads, "c", log) as sides:
        peer = sides.running["c"].ask(do=MEMORY, depth="early", rows=str(rows)) if sides.missing is None else None
        missing = sides.missing
    lines = ["## Anonymous memory (RssAnon) while the demo model's two hookpoints are collected", ""]
    lines.append(_growth(found, MEMORY_FROM // share))
    if peer is None:
        return "\n".join([*lines, f"- delphi was not measured: {missing}"])
    low, high = _reading(peer["readings"], PEER_MEMORY_FROM), peer["readings"][-1]
    slope = (high[1] - low[1]) / (high[0] - low[0])
    lines.append(
        f"- delphi: {low[1] / 1e6:.0f} MB at {low[0]:,} tokens, {high[1] / 1e6:.0f} MB at {high[0]:,} tokens: "
        f"{slope:,.0f} MB per million tokens while running, before anything is saved"
    )
    return "\n".join(lines)


def _growth(found: dict[str, Any], start: int) -> str:
    """Return exegete's line; a shard fills and is written, so that the highest readings tell more than single ones."""
    readings = found["readings"]
    low, high = _reading(readings, start), readings[-1]
    early, late = (max(size for done, size in readings if (done <= low[0]) is first) for first in (True, False))
    written = ", ".join(str(n) for n in next(counts for done, counts in found["written"] if done >= low[0]))
    return (
        f"- exegete, shard budget 64 MB a coder: {low[1] / 1e6:.0f} MB at {low[0]:,} tokens, {high[1] / 1e6:.0f} MB "
        f"at {high[0]:,} tokens, {(high[1] - low[1]) / 1e6:+.1f} MB; highest reading after a batch {early / 1e6:.0f} "
        f"MB up to the first of these and {late / 1e6:.0f} MB after it, {(late - early) / 1e6:+.1f} MB; shards "
        f"of each coder at the first reading: {written}"
    )


def _reading(readings: Sequence[Sequence[int]], tokens: int) -> Sequence[int]:
    return next(reading for reading in readings if reading[0] >= tokens)


def note(text: str) -> None:
    """Say how far it is, on the terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:60}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short repeats, to see that it works; writes no results")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--scale", type=int, default=1, help="how many times the tokens of a repeat")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--settings", default="demo,topk,jumprelu,memory")
    given = parser.parse_args()
    machine = f"{describe()} Every side has {given.threads} threads."
    wanted = given.settings.split(",")
    begun = time.perf_counter()
    print(machine, flush=True)
    parts = [machine]
    with tempfile.TemporaryDirectory() as base, (Path(base) / "log").open("w", encoding="utf-8") as log:
        for setting in settings(given.quick, given.scale):
            if setting.name not in wanted:
                continue
            folder = Path(base) / setting.name
            folder.mkdir()
            prepare(setting, folder)
            with started(folder, given.threads, "abc", log) as sides:
                answers = measure(sides, given.repeats or (1 if given.quick else 3))
                parts.append(speed_table(setting, answers, sides.missing))
            print("\n" + parts[-1], flush=True)
        if "memory" in wanted and (Path(base) / "demo").exists():
            parts.append(memory(Path(base) / "demo", given.threads, given.quick, log))
            print("\n" + parts[-1], flush=True)
    parts.append(f"All of it took {time.perf_counter() - begun:.0f} s.")
    print("\n" + parts[-1])
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        save_section(
            RESULTS / "collect.md", "Collecting: speed, size and memory (`make bench-collect`)", "\n\n".join(parts)
        )


if __name__ == "__main__":
    main()
