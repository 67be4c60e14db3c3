"""Side (a): the least that collecting can cost, plain torch and transformers, the results thrown away.

The forward pass to the deepest hookpoint, where it is stopped, then encoder and top-k, or threshold and nonzero, in
pieces that fit the cache. Nothing is checked, sorted, packed or written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from benchmarks.collect_worker import CHECK, Side, arguments, serve
from torch.nn.functional import linear

_PIECE = 1 << 24
"""Dense activations at once: what exegete takes, and faster than a whole batch."""


@final
class _Reached(Exception):  # noqa: N818 (no error: it ends a forward pass whose work is done)
    """The deepest hookpoint has given its output."""


@final
class Floor(Side):
    """The bare passes over the rows of one setting."""

    def __init__(self, folder: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        about = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
        self._kind: str = about["kind"]
        self._batch: int = about["batch_rows"]
        self._rows = torch.from_numpy(np.load(folder / "rows.npy"))
        model = transformers.AutoModel.from_pretrained(folder / "model", dtype=torch.float32)
        self._model: Any = model.eval().requires_grad_(False)
        self._coders = {
            depth: {name: _weights(folder / "coders" / depth / name, self._kind) for name in about[depth]}
            for depth in ("early", "full")
        }

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take all rows through model and coders."""
        coders = self._coders[request["depth"]]
        modules = dict(self._model.named_modules())
        n_firings, total = 0, 0.0
        with torch.inference_mode():
            for start in range(0, len(self._rows), self._batch):
                caught = self._pass({name: modules[name] for name in coders}, self._rows[start : start + self._batch])
                for name, x in caught.items():
                    for _, values in self._encode(x, coders[name]):
                        if request["do"] == CHECK:
                            n_firings += int((values > 0).sum())
                            total += float(values.double().sum())
        return {"tokens": self._rows.numel(), "firings": n_firings, "total": total}

    def _pass(self, modules: dict[str, Any], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        caught: dict[str, torch.Tensor] = {}

        def catch(name: str) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                caught[name] = (output if torch.is_tensor(output) else output[0]).flatten(0, 1)
                if len(caught) == len(modules):
                    raise _Reached

            return hook

        handles = [module.register_forward_hook(catch(name)) for name, module in modules.items()]
        try:
            self._model(input_ids=rows, use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return caught

    def _encode(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = torch.split(x, max(1, _PIECE // len(weights["encoder"])))
        one = _top_k if self._kind == "topk" else _over_threshold
        return [one(part, weights) for part in parts]


def _top_k(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    top = linear(x - weights["b_dec"], weights["encoder"], weights["bias"]).relu_().topk(int(weights["k"]), dim=-1)
    return top.indices, top.values


def _over_threshold(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    dense = linear(x, weights["encoder"], weights["bias"])
    found = (dense > weights["threshold"]).view(-1).nonzero()[:, 0]
    return found, dense.view(-1)[found]


def _weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if kind == "topk":
        held = load_file(folder / "sae.safetensors")
        k = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))["k"]
        named = {"encoder": held["encoder.weight"], "bias": held["encoder.bias"], "b_dec": held["b_dec"]}
        return {**{name: tensor.float() for name, tensor in named.items()}, "k": torch.tensor(k)}
    params = np.load(folder / "params.npz")
    encoder = torch.from_numpy(params["W_enc"]).T.contiguous()
    return {
        "encoder": encoder,
        "bias": torch.from_numpy(params["b_enc"]),
        "threshold": torch.from_numpy(params["threshold"]),
    }


if __name__ == "__main__":
    serve(lambda: Floor(*arguments(sys.argv)))
