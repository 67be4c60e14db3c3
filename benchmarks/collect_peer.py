"""Side (c): EleutherAI's delphi on the same model, coder and tokens; runs in an environment of its own.

Its own classes do the work: ``LatentCache.run``, then ``save_splits`` with its default of five files a hookpoint.
Statistics, which it prints by default and which cost more, are left out.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from benchmarks.collect_worker import MEMORY, Side, arguments, resident_anonymous, serve

_SPLITS = 5


@final
class Peer(Side):
    """delphi's latent cache over the rows of one setting."""

    def __init__(self, folder: Path, threads: int) -> None:
        sys.modules["vllm"] = types.ModuleType("vllm")  # imported by delphi's clients, which are not used here
        self._cache: Any = importlib.import_module("delphi.latents.cache").LatentCache
        transformers = importlib.import_module("transformers")
        torch.set_num_threads(threads)
        self._folder = folder
        about = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
        self._batch: int = about["batch_rows"]
        self._rows = torch.from_numpy(np.load(folder / "rows.npy"))
        model = transformers.AutoModel.from_pretrained(folder / "model", dtype=torch.float32)
        self._model: Any = model.eval()
        load = _topk if about["kind"] == "topk" else _jumprelu
        self._coders = {
            depth: {name: load(folder / "coders" / depth / name) for name in about[depth]}
            for depth in ("early", "full")
        }
        self._cache(self._model, self._coders["full"], batch_size=self._batch).run(*self._first_batch())

    def _first_batch(self) -> tuple[int, torch.Tensor]:
        rows = self._rows[: self._batch]
        return rows.numel(), rows

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Cache the latents of all rows, then write them."""
        coders = self._coders[request["depth"]]
        if request["do"] == MEMORY:
            return self._memory(coders, Path(request["rows"]))
        begun, cores = time.perf_counter(), time.process_time()
        cache = self._cache(self._model, coders, batch_size=self._batch)
        cache.run(self._rows.numel(), self._rows)
        ran = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cache.save_splits(_SPLITS, Path(folder))
            ended, cores_ended = time.perf_counter(), time.process_time()
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        values = cache.cache.latent_activations.values()
        return {
            "tokens": self._rows.numel(),
            "seconds": ended - begun,
            "cpu_seconds": cores_ended - cores,
            "run_seconds": ran - begun,
            "bytes": size,
            "firings": sum(len(part) for part in values),
            "total": sum(float(part.double().sum()) for part in values),
        }

    def _memory(self, coders: dict[str, Any], path: Path) -> dict[str, Any]:
        """Read anonymous memory before each batch; nothing else of the run is changed."""
        rows = torch.from_numpy(np.load(path))
        first = next(iter(coders))
        readings: list[tuple[int, int]] = []

        def watched(x: torch.Tensor) -> torch.Tensor:
            readings.append((len(readings) * rows.shape[1] * self._batch, resident_anonymous()))
            answer: torch.Tensor = coders[first](x)
            return answer

        self._cache(self._model, {**coders, first: watched}, batch_size=self._batch).run(rows.numel(), rows)
        return {"readings": readings}


def _topk(folder: Path) -> Any:
    dense = importlib.import_module("delphi.sparse_coders.load_sparsify").sae_dense_latents
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(folder, device="cpu")
    return partial(dense, sae=coder.float())


def _jumprelu(folder: Path) -> Any:
    """Return what delphi's Gemma Scope loader makes of the same file: an encode to dense latents."""
    params = {name: torch.from_numpy(part) for name, part in np.load(folder / "params.npz").items()}
    coder = importlib.import_module("delphi.sparse_coders.custom.gemmascope").JumpReluSae(*params["W_enc"].shape)
    coder.load_state_dict(params)
    return coder.encode


if __name__ == "__main__":
    serve(lambda: Peer(*arguments(sys.argv)))
