"""What delphi reads of an exported folder: run by ``write_delphi.py`` in delphi's own environment.

    python read_delphi.py FOLDER OUT

Its ``LatentDataset`` reads the firings and cuts windows from them, ``load_data`` and ``get_agg_metrics`` read the
judgements, ``explanation_loader`` the explanations and ``RunConfig`` the settings.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

CONTEXT = 8


@final
class Letters:
    """Stands in for a tokenizer: delphi only decodes with it."""

    def batch_decode(self, tokens: Any) -> list[str]:
        return [chr(int(token)) for token in tokens]


def dataset(folder: Path, latents: dict[str, torch.Tensor] | None) -> Any:
    config = importlib.import_module("delphi.config")
    loader = importlib.import_module("delphi.latents.loader")
    return loader.LatentDataset(
        folder / "latents",
        config.SamplerConfig(n_examples_train=4, n_examples_test=2, n_quantiles=2),
        config.ConstructorConfig(example_ctx_len=CONTEXT, min_examples=1, n_non_activating=1),
        tokenizer=Letters(),
        modules=sorted(path.name for path in (folder / "latents").iterdir()),
        latents=latents,
    )


def firings(folder: Path) -> dict[str, Any]:
    """Return every firing as delphi's buffers give it: per module row, position, latent and value."""
    found: dict[str, Any] = {}
    for buffer in dataset(folder, None).buffers:
        for data in buffer:
            locations, values = data.activation_data
            assert set(locations[:, 2].tolist()) == {data.latent.latent_index}
            found.setdefault(f"{data.module}/locations", []).append(locations.numpy())
            found.setdefault(f"{data.module}/values", []).append(values.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def windows(folder: Path, module: str, index: int) -> dict[str, Any]:
    """Return the firing windows that delphi cuts for one latent, its tokens and activations, in delphi's order."""
    data = dataset(folder, {name.name: torch.tensor([index]) for name in (folder / "latents").iterdir()})
    records = [record for record in data if record.latent.module_name == module]
    assert [record.latent.latent_index for record in records] == [index]
    examples = records[0].examples
    return {
        f"{module}/{index}/tokens": np.stack([example.tokens.numpy() for example in examples]),
        f"{module}/{index}/activations": np.stack([example.activations.numpy() for example in examples]),
    }


def judged(folder: Path, modules: list[str]) -> dict[str, Any]:
    """Return delphi's metrics over the exported judgements, and the explanations beside them."""
    analysis = importlib.import_module("delphi.log.result_analysis")
    load = importlib.import_module("delphi.explainers").explanation_loader
    frame, counts = analysis.load_data(folder / "scores", modules)
    rows = analysis.get_agg_metrics(frame, counts)
    names = ("score_type", "accuracy", "true_positive_rate", "false_positive_rate", "total_examples", "auc")
    settings = importlib.import_module("delphi.config").RunConfig.load(folder / "run_config.json")
    explanations = {}
    for path in sorted((folder / "explanations").iterdir()):
        found = asyncio.run(load(types.SimpleNamespace(latent=path.stem), str(path.parent)))
        explanations[path.stem] = found.explanation
    return {
        "metrics": {row["score_type"]: {name: row[name] for name in names[1:]} for _, row in rows.iterrows()},
        "texts": sorted(set(frame.text)),
        "distances": sorted(set(frame.distance)),
        "firing_counts": {name: values.tolist() for name, values in counts.items()},
        "explanations": explanations,
        "settings": [settings.hookpoints, settings.constructor_cfg.example_ctx_len, settings.scorers, settings.model],
    }


def main() -> None:
    stand_in = types.ModuleType("delphi.clients.offline")  # the client for vllm, which needs a GPU
    stand_in.Offline = object  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = firings(folder)
    modules = sorted({name.partition("/")[0] for name in found})
    for module in modules:
        found |= windows(folder, module, int(found[f"{module}/locations"][0, 2]))
        found |= windows(folder, module, int(found[f"{module}/locations"][-1, 2]))
    np.savez_compressed(out / "read.npz", **found)
    text = json.dumps(judged(folder, modules), indent=1, sort_keys=True, default=float)
    (out / "read.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
