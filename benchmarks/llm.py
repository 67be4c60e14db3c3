"""What a request costs the client: the bare openai SDK, exegete's client, and that of EleutherAI's delphi.

    python -m benchmarks.llm [--quick] [--repeats 5] [--requests 4000]

A server in a process of its own answers every chat after 50 ms. Each side, in a process of its own too, sends it the
same kind of chats, 64 at once and none of them twice: (a) the SDK with nothing around it, (b) exegete's client with
kept replies and ledger, (c) delphi's client. Repeats are interleaved and ratios taken within a repeat. Prints the table
and writes it to ``benchmarks/results/llm.md``. Where delphi is not installed (``make .bench/delphi/ready``) the rest is
measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, final

from benchmarks.collect import PEER, note, spread
from benchmarks.collect_worker import ROOT, Process, SideFailedError
from benchmarks.llm_setting import CONCURRENCY, DELAY, SETTING
from benchmarks.machine import RESULTS, describe, save_section

from exegete.demo.stdlib import corpus_files
from exegete.llm.protocol import judge_messages

SIDES = {"a": "llm_sdk", "b": "llm_exegete", "c": "llm_peer"}
TITLES = {"a": "(a) bare openai SDK", "b": "(b) exegete, replies kept, ledger", "c": "(c) delphi's client"}
WARM_UP = 300
CHATS = 64
PER_REQUEST = 5
CHARACTERS = 120

Answers = dict[str, list[dict[str, Any]]]


@final
class Server:
    """The server's process."""

    def __init__(self, log: TextIO) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.llm_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
        )  # fmt: skip
        if self._process.stdout is None:
            raise SideFailedError("the server has no output")
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"

    def stats(self) -> dict[str, float]:
        """Return how many chats were answered, and the server's CPU seconds."""
        with urllib.request.urlopen(f"{self.url}/stats") as answer:
            found: dict[str, float] = json.load(answer)
        return found

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@contextmanager
def setting(folder: Path, log: TextIO) -> Iterator[Server]:
    """Start the server and write down what the sides read."""
    server = Server(log)
    try:
        (folder / SETTING).write_text(json.dumps({"url": server.url, "chats": chats()}), encoding="utf-8")
        yield server
    finally:
        server.close()


def chats() -> list[list[dict[str, str]]]:
    """Return chats of detection about pieces of the standard library."""
    text = "".join(file.text for file in corpus_files())
    step = len(text) // (CHATS * PER_REQUEST)
    pieces = [text[at : at + CHARACTERS] for at in range(0, step * CHATS * PER_REQUEST, step)]
    explanation = "the name of a parameter in the signature of a function, mostly right before a default value"
    return [
        [dict(message) for message in judge_messages("detection", explanation, pieces[at : at + PER_REQUEST])]
        for at in range(0, len(pieces), PER_REQUEST)
    ]


def start(folder: Path, log: TextIO) -> tuple[dict[str, Process], str | None]:
    """Start the sides; return them, and why the peer is missing, if it is."""
    sides: dict[str, Process] = {}
    missing = None
    for name, module in SIDES.items():
        try:
            sides[name] = Process(PEER if name == "c" else Path(sys.executable), module, folder, 1, log)
        except SideFailedError as error:
            if name != "c":
                raise
            missing = str(error)
    return sides, missing


def measure(sides: dict[str, Process], server: Server, repeats: int, count: int) -> Answers:
    """Return the answers of every side, in the order of the repeats, with the server's CPU seconds in each.

    Turn 0 warms up. Every chat must have been sent exactly once.
    """
    answers: Answers = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            before = server.stats()
            answer = side.ask(turn=turn, count=count if turn else min(WARM_UP, count))
            after = server.stats()
            sent = after["answered"] - before["answered"]
            if turn and sent != answer["requests"]:
                raise SystemExit(f"{TITLES[name]} sent {sent:.0f} requests for {answer['requests']} chats")
            answer["server_cpu"] = after["cpu_seconds"] - before["cpu_seconds"]
            if turn:
                answers[name].append(answer)
            note(f"repeat {turn} of {repeats}: {name}")
    return answers


def kept(side: Process, server: Server, count: int) -> float:
    """Return requests/s when all replies are kept; nothing may be sent."""
    before = server.stats()["answered"]
    answer = side.ask(turn=1, count=count)
    if server.stats()["answered"] != before:
        raise SystemExit("exegete sent requests whose replies it keeps")
    return float(answer["requests"] / answer["seconds"])


def rates(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Return requests per second of every repeat."""
    return [one["requests"] / one["seconds"] for one in answers]


def costs(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Return milliseconds of CPU time per request of every repeat."""
    return [1000 * one["cpu_seconds"] / one["requests"] for one in answers]


def table(answers: Answers) -> str:
    """Return what was measured as Markdown."""
    lines = [
        "| side | requests/s, median (min to max) | share of (a) | CPU ms a request | of (a)'s |",
        "|---|---|---|---|---|",
    ]
    for name, found in answers.items():
        faster = [one / two for one, two in zip(rates(found), rates(answers["a"]), strict=True)]
        dearer = [one / two for one, two in zip(costs(found), costs(answers["a"]), strict=True)]
        shares = (spread(faster, 3), spread(dearer, 3)) if name != "a" else ("1", "1")
        lines.append(
            f"| {TITLES[name]} | {spread(rates(found))} | {shares[0]} | {spread(costs(found), 3)} | {shares[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short repeats, to see that it works; writes no results")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--requests", type=int, default=None, help="requests of a side in a repeat")
    given = parser.parse_args()
    repeats = given.repeats or (2 if given.quick else 5)
    count = given.requests or (600 if given.quick else 4000)
    machine = describe()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as base, (Path(base) / "log").open("w", encoding="utf-8") as log:
        with setting(Path(base), log) as server:
            sides, missing = start(Path(base), log)
            try:
                answers = measure(sides, server, repeats, count)
                from_disk = kept(sides["b"], server, count)
            finally:
                for side in sides.values():
                    side.close()
        asked = json.loads((Path(base) / SETTING).read_text(encoding="utf-8"))["chats"]
    characters = statistics.mean(sum(len(message["content"]) for message in chat) for chat in asked)
    busiest = max(one["server_cpu"] / one["seconds"] for found in answers.values() for one in found)
    body = [
        machine,
        "",
        f"A local server that answers after {1000 * DELAY:.0f} ms, {CONCURRENCY} requests at once (so at most "
        f"{CONCURRENCY / DELAY:,.0f} a second), {repeats} interleaved repeats of {count:,} chats of detection, about "
        f"{characters:,.0f} characters each; every side and the server in a process of its own. Ratios are taken "
        "within a repeat.",
        "",
        table(answers),
        "",
        f"- exegete asked for the same chats again, all replies kept: {from_disk:,.0f} a second, nothing sent",
        f"- the server was busy {busiest:.0%} of the time at most",
    ]
    if missing is not None:
        body.append(f"- delphi was not measured: {missing}")
    print("\n" + "\n".join(body[2:]))
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        save_section(RESULTS / "llm.md", "The language-model client (`make bench-llm`)", "\n".join(body))


if __name__ == "__main__":
    main()
