"""What selecting examples and rendering prompts cost, beside EleutherAI's delphi on the same firings.

    python -m benchmarks.examples [--quick] [--repeats 3] [--latents 1280] [--tokens 300000]

Collects the demo's coder at layers.2 over the standard library, exports the firings to delphi's format, and then has
each side, in a process of its own, select 40 train, 50 test and 50 silent windows of each of the same latents and make
all prompts of the default explanation, detection and fuzzing; nothing is sent. Repeats are interleaved and ratios taken
within a repeat; only latents that both sides keep with all their examples count. Prints the table and writes it to
``benchmarks/results/examples.md``. Where delphi is not installed (``make .bench/delphi/ready``) the rest is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, final

import numpy as np
from benchmarks.collect import PEER, note, spread
from benchmarks.collect_worker import Process, SideFailedError
from benchmarks.examples_setting import (
    CODER,
    DECODE,
    N_NEGATIVES,
    N_TEST,
    N_TRAIN,
    RENDER,
    REQUESTS,
    SELECT,
    WINDOW,
    Setting,
    read_setting,
    write_setting,
)
from benchmarks.machine import RESULTS, describe, save_section

import exegete as ex
from exegete.coders import load_coders
from exegete.config import CorpusConfig
from exegete.demo import assets
from exegete.export import export_delphi
from exegete.store.corpus import build_corpus, text_documents
from exegete.store.store import Store

SIDES = {"b": "examples_exegete", "c": "examples_peer"}
TITLES = {"b": "exegete", "c": "delphi"}
ROW_LENGTH = 256
FIRING = 400
"""A latent is asked for when at least so many windows fire, twice what delphi insists on, so that the third of the
documents that exegete keeps for the test has enough of them too …"""
SILENT = 400
"""… and at least so many are silent."""
WARM_UP = 16

Answer = dict[str, Any]


def prepare(folder: Path, tokens: int, wanted: int) -> Setting:
    """Collect, export, and write down which latents are asked for.

    The rows hold documents one after another, with neither BOS nor padding, since delphi knows neither.
    """
    shutil.copytree(assets() / "model", folder / "model")
    subject = ex.load_subject(str(folder / "model"), device="cpu", dtype="float32")
    config = CorpusConfig(text=("stdlib",), row_length=ROW_LENGTH, max_tokens=tokens, bos="none", packing=True)
    documents = text_documents(["stdlib"])
    corpus = build_corpus(folder / "corpus", documents, subject.tokenizer, config, table=subject.token_table())
    run = ex.collect(subject, load_coders(str(assets() / "coders"), [CODER]), corpus, out=folder / "run")
    export_delphi(run, folder / "exported")
    usable = usable_latents(run.store(CODER))
    if len(usable) < wanted:
        raise SystemExit(f"only {len(usable)} latents have enough windows; give more --tokens or fewer --latents")
    write_setting(folder, sorted(np.random.default_rng(0).choice(usable, wanted, replace=False)))
    return read_setting(folder)


def usable_latents(store: Store) -> list[int]:
    """Return the latents with enough firing and silent windows, as delphi cuts them."""
    n_windows = store.corpus.n_rows * ROW_LENGTH // WINDOW
    usable = []
    for firings in store.block(0, store.width):
        firing = len(np.unique((firings.rows * ROW_LENGTH + firings.positions) // WINDOW))
        if firing >= FIRING and n_windows - firing >= SILENT:
            usable.append(firings.latent.index)
    return usable


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a latent takes: seconds by the clock and on the cores."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, answer: Answer, latents: int) -> Cost:
        """Return the cost of each of the latents that count."""
        return cls(seconds=answer["seconds"] / latents, cpu_seconds=answer["cpu_seconds"] / latents)

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """Return this and so many times the other."""
        return Cost(
            seconds=self.seconds + times * other.seconds, cpu_seconds=self.cpu_seconds + times * other.cpu_seconds
        )


@final
class Sides:
    """The measured processes; the peer may be missing."""

    def __init__(self, folder: Path, threads: int, log: TextIO) -> None:
        self.running: dict[str, Process] = {}
        self.missing: str | None = None
        for name, module in SIDES.items():
            python = PEER if name == "c" else Path(sys.executable)
            try:
                self.running[name] = Process(python, module, folder, threads, log)
            except SideFailedError as error:
                if name != "c":
                    raise
                self.missing = str(error)

    def close(self) -> None:
        """End all of them."""
        for process in self.running.values():
            process.close()


def measure(sides: Sides, repeats: int, wanted: int) -> tuple[dict[str, list[Answer]], list[int]]:
    """Return the answers by side and task, ``b/select`` and so on, and the latents that count.

    Every side first does some latents that are not measured, told as ``b/warm``.
    """
    answers: dict[str, list[Answer]] = {}
    for side, process in sides.running.items():
        answers[f"{side}/warm"] = [process.ask(do=SELECT, count=WARM_UP)]
        process.ask(do=RENDER, latents=[int(i) for i in answers[f"{side}/warm"][0]["sizes"]])
    common: list[int] = []
    for number in range(repeats):
        for side, process in sides.running.items():
            note(f"repeat {number + 1} of {repeats}: {TITLES[side]} selects")
            answers.setdefault(f"{side}/{SELECT}", []).append(process.ask(do=SELECT, count=wanted))
        common = shared({side: answers[f"{side}/{SELECT}"][-1] for side in sides.running})
        for side, process in sides.running.items():
            note(f"repeat {number + 1} of {repeats}: {TITLES[side]} renders")
            answer = process.ask(do=RENDER, latents=common)
            if answer["requests"] != REQUESTS * len(common):
                raise SystemExit(f"{TITLES[side]} makes {answer['requests']} requests of {len(common)} latents")
            answers.setdefault(f"{side}/{RENDER}", []).append(answer)
        if "c" in sides.running:
            answers.setdefault(f"c/{DECODE}", []).append(sides.running["c"].ask(do=DECODE, latents=common))
    return answers, common


def shared(found: dict[str, Answer]) -> list[int]:
    """Return the latents of which every side has all examples. Stops when they are not of the same firings."""
    full = [N_TRAIN, N_TEST, N_NEGATIVES]
    kept = [{i for i, sizes in answer["sizes"].items() if sizes == full} for answer in found.values()]
    common = sorted(set.intersection(*kept), key=int)
    for index in common:
        if len({answer["firings"][index] for answer in found.values()}) > 1:
            raise SystemExit(f"the sides see different firings of latent {index}")
    return [int(index) for index in common]


def tasks(answers: dict[str, list[Answer]], latents: int) -> dict[str, dict[str, list[Cost]]]:
    """Return the cost a latent by task and side, in the order of the repeats.

    delphi decodes tokens as it selects, exegete as it renders; so each task is also told with delphi's decoding, timed
    on its own, on the other side of the line.
    """
    own = {key: [Cost.of(answer, latents) for answer in found] for key, found in answers.items()}
    found: dict[str, dict[str, list[Cost]]] = {
        "selecting": {side: own[f"{side}/{SELECT}"] for side in TITLES if f"{side}/{SELECT}" in own},
        "rendering": {side: own[f"{side}/{RENDER}"] for side in TITLES if f"{side}/{RENDER}" in own},
    }
    found["both together"] = {
        side: [one.plus(two) for one, two in zip(chosen, found["rendering"][side], strict=True)]
        for side, chosen in found["selecting"].items()
    }
    if f"c/{DECODE}" in own:
        # It decodes for every latent it keeps, and as many windows for each.
        kept = len(answers[f"c/{SELECT}"][0]["sizes"]) / latents
        decoding = own[f"c/{DECODE}"]
        pairs = list(zip(found["selecting"]["c"], found["rendering"]["c"], decoding, strict=True))
        found["selecting, decoding left out"] = {
            "b": found["selecting"]["b"],
            "c": [chosen.plus(decoded, -kept) for chosen, _, decoded in pairs],
        }
        found["rendering, decoding included"] = {
            "b": found["rendering"]["b"],
            "c": [rendered.plus(decoded) for _, rendered, decoded in pairs],
        }
    return found


def table(answers: dict[str, list[Answer]], latents: int) -> str:
    """Return what was measured as Markdown."""
    lines = [
        "| task | side | latents/s, median (min to max) | times delphi's | CPU ms a latent |",
        "|---|---|---|---|---|",
    ]
    for task, sides in tasks(answers, latents).items():
        for side, costs in sides.items():
            times = "1" if side == "c" else "not measured"
            if side != "c" and "c" in sides:
                times = spread([two.seconds / one.seconds for one, two in zip(costs, sides["c"], strict=True)], 1)
            speed = spread([1 / one.seconds for one in costs], 1)
            cpu = spread([1000 * one.cpu_seconds for one in costs], 2)
            lines.append(f"| {task} | {TITLES[side]} | {speed} | {times} | {cpu} |")
    return "\n".join(lines)


def remarks(answers: dict[str, list[Answer]], latents: int, wanted: int, missing: str | None) -> list[str]:
    """Return what belongs below the table."""
    first, later = answers["b/warm"][0], answers[f"b/{SELECT}"]
    once = first["preparing"] - statistics.median(one["preparing"] for one in later)
    lines = [
        "- exegete selects: opens the store, splits the documents, cuts the frame, joins near-duplicate windows, draws "
        "train and test windows from different documents by deciles, and silent test windows that are verified silent; "
        f"near-duplicate documents were found before, once a corpus, in {once:.2f} s",
        "- delphi selects (`LatentDataset`, defaults): reads the export, cuts and pools the windows that fire, draws "
        "train and test windows from the same ones by deciles, silent ones with replacement, and decodes their tokens; "
        "exegete decodes as it renders",
        f"- rendering makes {REQUESTS} requests a latent: one for the explanation, the others about "
        f"{N_TEST + N_NEGATIVES} windows by detection and by fuzzing, five a request",
    ]
    for side in TITLES:
        if f"{side}/{RENDER}" in answers:
            one = answers[f"{side}/{RENDER}"][0]
            sizes = answers[f"{side}/{SELECT}"][0]["sizes"]
            lines.append(
                f"- {TITLES[side]}: {one['characters'] / latents:,.0f} characters a latent; keeps {len(sizes):,} of "
                f"{wanted:,} latents, {sum(s == [N_TRAIN, N_TEST, N_NEGATIVES] for s in sizes.values()):,} with all "
                "examples"
            )
    if missing is not None:
        lines.append(f"- delphi was not measured: {missing}")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few latents, to see that it works; writes no results")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--latents", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    repeats = given.repeats or (1 if given.quick else 3)
    wanted = given.latents or (64 if given.quick else 1280)
    machine = f"{describe()} Every side has {given.threads} threads."
    print(machine, flush=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as base, (Path(base) / "log").open("w", encoding="utf-8") as log:
        setting = prepare(Path(base), given.tokens, wanted)
        store = ex.open_run(setting.run).store(CODER)
        sides = Sides(Path(base), given.threads, log)
        try:
            answers, common = measure(sides, repeats, wanted)
        finally:
            sides.close()
        about = (
            f"{store.corpus.n_tokens:,} tokens in rows of {ROW_LENGTH}, {store.manifest.n_firings:,} firings of "
            f"{store.width:,} latents; {len(common):,} latents count. Windows of {WINDOW}: {N_TRAIN} train, {N_TEST} "
            f"test, {N_NEGATIVES} silent. {repeats} interleaved repeats, ratios within a repeat."
        )
    body = [machine, "", about, "", table(answers, len(common)), ""]
    body += remarks(answers, len(common), wanted, sides.missing)
    body += ["", f"All of it took {time.perf_counter() - begun:.0f} s."]
    print("\n" + "\n".join(body[2:]))
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        save_section(RESULTS / "examples.md", "Examples and prompts (`make bench-examples`)", "\n".join(body))


if __name__ == "__main__":
    main()
