"""Rule search on several cores: child processes that open the store themselves and answer lines of JSON.

A child is a plain ``python -m exegete.explainers.workers``, not a fork: it imports no torch, shares no threads with its
parent, and runs none of the parent's own script. It ends when its input does, so it never outlives a killed parent.
Every latent is searched on its own, so the number of workers cannot change a rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, final

import numpy as np

from exegete.errors import ExegeteError
from exegete.examples.build import StoreData
from exegete.rules import Rule, search_rules
from exegete.rules.evaluate import RuleMetrics, context_of, evaluate_many
from exegete.rules.execute import TokenContext
from exegete.store.store import Store
from exegete.views import SplitData

Found = tuple[int, Rule | None, dict[str, Any]]
"""A latent's index, its rule, and the rule's figures on the train split."""

CHUNK = 4  # latents to a line: what is found comes back soon, and no worker waits long for the last


def search_with_detail(data: SplitData, indices: Sequence[int], context: TokenContext) -> list[Found]:
    """Search the rule of each latent on the train split and measure it there; ``context`` is that split's."""
    rules = search_rules(data, indices, context=context)
    measured = evaluate_many(rules, data, indices, split="train", context=context)
    details = [{} if metrics is None else {"train": _plain(metrics)} for metrics in measured]
    return list(zip(indices, rules, details, strict=True))


def search_on(workers: int, data: StoreData, indices: Sequence[int]) -> Iterator[Found]:
    """Yield what is found for every latent, in any order, searched by ``workers`` child processes."""
    chunks: SimpleQueue[list[int]] = SimpleQueue()
    for start in range(0, len(indices), CHUNK):
        chunks.put(list(indices[start : start + CHUNK]))
    found: SimpleQueue[list[Found] | ExegeteError] = SimpleQueue()
    children = [_Child(data) for _ in range(workers)]

    def drive(child: _Child) -> None:
        try:
            while True:
                found.put(child.search(chunks.get_nowait()))
        except Empty:
            return
        except ExegeteError as error:
            found.put(error)

    left = len(indices)
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(drive, child) for child in children]
            while left:
                answer = found.get()
                if isinstance(answer, ExegeteError):
                    raise answer
                left -= len(answer)
                yield from answer
            for future in futures:
                future.result()
        finally:
            with contextlib.suppress(Empty):
                while True:
                    chunks.get_nowait()
            for child in children:
                child.end()


@final
class _Child:
    """One worker process."""

    def __init__(self, data: StoreData) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "exegete.explainers.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        where = {"store": str(data.folder), "split": data.segment_split.tolist()}
        self._tell(where)

    def search(self, indices: list[int]) -> list[Found]:
        """Return what is found for each latent. Raises ExegeteError when the process died."""
        self._tell(indices)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ExegeteError(f"a worker that searched rules for latents {indices} ended; run the command again")
        return [(i, None if rule is None else Rule.from_json(rule), detail) for i, rule, detail in json.loads(line)]

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, data: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ExegeteError("a worker process ended before its work; run the command again") from None


def main() -> None:
    """Answer lines of latents with lines of rules until the input ends."""
    first = json.loads(sys.stdin.readline())
    data = StoreData(Store.open(Path(first["store"])), np.array(first["split"], dtype=np.int8))
    context = context_of(data, "train")
    for line in sys.stdin:
        found = search_with_detail(data, json.loads(line), context)
        answer = [(i, None if rule is None else rule.to_json(), detail) for i, rule, detail in found]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _plain(metrics: RuleMetrics) -> dict[str, Any]:
    """Return the figures as JSON data; what is undefined (NaN, which JSON lacks) becomes None."""
    figures = dataclasses.asdict(metrics)
    shares = figures.pop("mass_deciles")
    known = {name: None if math.isnan(value) else value for name, value in figures.items()}
    return known | {"mass_deciles": [None if math.isnan(share) else share for share in shares]}


if __name__ == "__main__":
    main()
