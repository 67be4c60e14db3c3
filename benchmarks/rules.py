"""How long the rule explainer takes, and what its rules are worth, over every alive latent of the embedded default.

    python benchmarks/rules.py [--tokens 1000000] [--latents 4096]

Collects both of the demo's coders over the standard library, searches a rule for each latent, executes them on the
held-out documents, and prints seconds and latents per second beside the time of the bare counting pass over the same
firings, which no search can beat.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from exegete.demo import demo_config
from exegete.explainers.workers import search_on
from exegete.pipeline import Pipeline
from exegete.preparing import prepare
from exegete.rules.evaluate import evaluate_many
from exegete.views import SplitData

BLOCK = 64


def counting_floor(data: SplitData, indices: list[int]) -> float:
    """Seconds to read the firings and count the current token of each: one pass, nothing else."""
    begun = time.perf_counter()
    tokens = data.rows("train").tokens
    for start in range(0, len(indices), BLOCK):
        for firings in data.firings(indices[start : start + BLOCK], "train"):
            np.bincount(tokens[firings.rows, firings.positions])
    return time.perf_counter() - begun


def main() -> None:
    """Collect, search, execute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=4096, help="over both hookpoints")
    arguments = parser.parse_args()
    config = demo_config({"corpus": {"max_tokens": arguments.tokens}, "nulls": []})
    workers = os.cpu_count() or 1
    machine = platform.processor() or platform.machine()
    print(f"{workers} cores, {machine}, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder, Pipeline(config, Path(folder) / "run") as pipeline:
        begun = time.perf_counter()
        pipeline.collect(prepare(config))
        run = pipeline.run
        print(f"collected {run.corpus.n_tokens:,} tokens at two hookpoints in {time.perf_counter() - begun:.1f} s")
        total = n_latents = 0.0
        share = arguments.latents // len(run.coders())
        for coder in run.coders():
            data = run.data(coder, config)
            counts = run.store(coder).counts
            indices = [int(i) for i in np.flatnonzero(counts >= 1e-4 * run.corpus.n_counted)[:share]]
            floor = counting_floor(data, indices)
            begun = time.perf_counter()
            rules = {}
            for i, rule, _ in search_on(workers, data, indices):
                rules[i] = rule
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{coder}: {len(rules)} of {len(indices)}")
            seconds = time.perf_counter() - begun
            found = [(i, rule) for i, rule in sorted(rules.items()) if rule is not None]
            measured = evaluate_many([r for _, r in found], data, [i for i, _ in found])
            auprc = np.array([m.auprc for m in measured if m is not None])
            print(
                f"{coder}: {len(indices)} latents in {seconds:.1f} s ({len(indices) / seconds:.1f} latents/s, "
                f"{seconds / floor:.0f} x the counting pass), median held-out AUPRC {np.median(auprc):.3f} of "
                f"{len(found)}"
            )
            total += seconds
            n_latents += len(indices)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"all: {n_latents:.0f} latents in {total:.1f} s; peak resident memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()
