"""A long collection: time, peak memory and size of a store of many tokens, the demo model's two hookpoints in one pass.

    python -m benchmarks.long [--tokens 20000000] [--threads 2]

The text is the standard library, over and over under other keys, as ordinary documents: rows begin with BOS and a
document's last row is padded. One process does all of it (tokenising, collecting, finishing), and its peak resident
memory is told. The result is put into ``benchmarks/results/collect.md`` when at least 10 M tokens were collected.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import RESULTS, describe, save_section

from exegete.coders import load_coders
from exegete.collecting import collect_firings
from exegete.config import CollectConfig, CorpusConfig
from exegete.demo import HOOKPOINTS, assets
from exegete.store.corpus import TextDocument, build_corpus, text_documents
from exegete.subjects import load_subject

WORTH_KEEPING = 10_000_000


def repeated() -> Iterator[TextDocument]:
    """Yield the standard library's documents without end."""
    documents = list(text_documents(["stdlib"]))
    for turn in itertools.count():
        for document in documents:
            yield TextDocument(key=f"{turn}/{document.key}", text=document.text)


def peak() -> tuple[float, float]:
    """Return the peak resident memory of this process in MB, by getrusage and by the kernel's VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    mark = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, mark * 1024 / 1e6


def main() -> None:
    """Collect, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    machine = describe()
    print(machine, flush=True)
    subject = load_subject(str(assets() / "model"), device="cpu", dtype="float32")
    coders = load_coders(str(assets() / "coders"), HOOKPOINTS)
    with tempfile.TemporaryDirectory() as base:
        begun = time.perf_counter()
        config = CorpusConfig(text=("stdlib",), max_tokens=given.tokens)
        corpus = build_corpus(Path(base) / "corpus", repeated(), subject.tokenizer, config, table=subject.token_table())
        tokenised = time.perf_counter() - begun
        begun = time.perf_counter()

        def progress(done: int, rows: int) -> None:
            if sys.stderr.isatty():
                rate = done * corpus.row_length / (time.perf_counter() - begun)
                sys.stderr.write(
                    f"\r{done / rows:7.2%} of {rows:,} rows, {rate:,.0f} tokens/s, peak {peak()[1]:,.0f} MB"
                )

        stores = collect_firings(
            subject, coders, corpus, Path(base) / "run", CollectConfig(threads=given.threads), progress=progress
        )
        seconds = time.perf_counter() - begun
        firings = sum(store.manifest.n_firings for store in stores.values())
        size = sum(file.stat().st_size for file in (Path(base) / "run").rglob("*") if file.is_file())
        used, mark = peak()
        body = "\n".join(
            [
                f"{machine} {given.threads} threads.",
                "",
                f"- {corpus.n_tokens:,} tokens of text in {corpus.n_rows:,} rows of {corpus.row_length} "
                f"({corpus.manifest.n_documents:,} documents: the standard library, repeated), tokenised in "
                f"{tokenised:,.0f} s",
                f"- collected at {', '.join(stores)} in one pass in {seconds:,.0f} s ({seconds / 60:.0f} minutes): "
                f"{corpus.n_tokens / seconds:,.0f} tokens/s, finishing included",
                f"- {firings:,} firings, {size / 1e9:.2f} GB, {size / firings:.2f} bytes a firing, "
                f"{', '.join(str(len(store.manifest.shards)) for store in stores.values())} shards",
                f"- peak resident memory of the process: {used:,.0f} MB (getrusage), {mark:,.0f} MB (VmHWM)",
            ]
        )
    print(body)
    if corpus.n_tokens >= WORTH_KEEPING:
        save_section(RESULTS / "collect.md", "A long collection (`python -m benchmarks.long`)", body)


if __name__ == "__main__":
    main()
