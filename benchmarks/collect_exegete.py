"""Side (b): exegete's whole collecting, from token rows to a finished store on disk."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from benchmarks.collect_worker import MEMORY, Side, arguments, resident_anonymous, serve

from exegete.coders import JumpReLU, LinearCoder, SparseCoder, load_coder
from exegete.collecting import collect_firings
from exegete.config import CollectConfig
from exegete.store.corpus import open_corpus
from exegete.store.manifest import load_manifest
from exegete.subjects import load_subject

_SHARD_BYTES = 1 << 26


@final
class Collecting(Side):
    """Collecting over the corpus of one setting."""

    def __init__(self, folder: Path, threads: int) -> None:
        about = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
        self._corpus = open_corpus(folder / "corpus")
        self._subject = load_subject(str(folder / "model"), device="cpu", dtype="float32")
        self._threads = threads
        self._batch_tokens = about["batch_rows"] * self._corpus.row_length
        self._coders = {
            depth: {name: _coder(folder / "coders" / depth / name, name, about["kind"]) for name in about[depth]}
            for depth in ("early", "full")
        }

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Collect all rows. The clock starts after the first batch.

        What happens once a run (hashes of weights, quality on the first batch, first manifests) is told apart as
        ``start``: it is the same for thousands of tokens and for billions. What happens once a store (the last shard,
        reading everything back, the summary) is inside.
        """
        memory = request["do"] == MEMORY
        corpus = open_corpus(request["corpus"]) if memory else self._corpus
        config = CollectConfig(
            batch_tokens=self._batch_tokens, threads=self._threads, shard_bytes=_SHARD_BYTES, sink_norm=0
        )
        marks: list[tuple[float, float, int]] = []
        readings: list[tuple[int, int]] = []
        coders = self._coders[request["depth"]]
        written: list[tuple[int, list[int]]] = []

        def progress(done: int, rows: int) -> None:
            marks.append((time.perf_counter(), time.process_time(), done * corpus.row_length))
            if memory:
                readings.append((done * corpus.row_length, resident_anonymous()))
                written.append((done * corpus.row_length, [_shards_written(Path(folder) / name) for name in coders]))

        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            stores = collect_firings(self._subject, coders, corpus, folder, config, progress=progress)
            ended, cores = time.perf_counter(), time.process_time()
            first, first_cores, done = marks[0]
            return {
                "tokens": corpus.n_rows * corpus.row_length - done,
                "seconds": ended - first,
                "cpu_seconds": cores - first_cores,
                "finish": ended - marks[-1][0],
                "whole": ended - begun,
                "bytes": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()),
                "shard_bytes": sum(file.stat().st_size for file in Path(folder).rglob("shard-*")),
                "firings": sum(store.manifest.n_firings for store in stores.values()),
                "total": sum(float(store.summary.totals.sum()) for store in stores.values()),
                "written": written,
                "readings": readings,
            }


def _shards_written(folder: Path) -> int:
    return len(load_manifest(folder).shards)


def _coder(folder: Path, hookpoint: str, kind: str) -> SparseCoder:
    if kind == "topk":
        return load_coder(str(folder), hookpoint, name=hookpoint)
    return _jumprelu(folder, hookpoint)


def _jumprelu(folder: Path, hookpoint: str) -> SparseCoder:
    """Return the JumpReLU coder of Gemma Scope's parameters."""
    params = {name: torch.from_numpy(part) for name, part in np.load(folder / "params.npz").items()}
    return LinearCoder(
        name=hookpoint,
        hookpoint=hookpoint,
        encoder=params["W_enc"].T.contiguous(),
        encoder_bias=params["b_enc"],
        decoder=params["W_dec"],
        decoder_bias=params["b_dec"],
        activation=JumpReLU(threshold=params["threshold"]),
        side="output",
        subtract_decoder_bias=False,
    )


if __name__ == "__main__":
    serve(lambda: Collecting(*arguments(sys.argv)))
