"""Write small dictionary_learning checkpoints, and what that library computes with them, as fixtures for the tests.

Run by ``make oracles`` in an environment of its own, because the library needs an old nnsight; the classes that are
wanted here use none of it, so a module of that name with nothing in it stands in. Checkpoints and settings are written
as the library's ``trainSAE`` does; expectations are what its own ``from_pretrained``, ``encode`` and ``decode`` give.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

D, WIDTH, K, INPUTS = 16, 48, 5, 40
MODEL = "EleutherAI/pythia-70m-deduped"
STEPS = {"steps": 10000, "activation_dim": D, "dict_size": WIDTH, "layer": 3, "lm_name": MODEL}
HERE = Path(__file__).resolve().parents[1] / "fixtures" / "dictionary_learning"


def library() -> tuple[Any, dict[str, Any]]:
    """Import the library's dictionaries and trainers, with a stand-in for nnsight."""
    stand_in = types.ModuleType("nnsight")
    stand_in.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = stand_in
    homes = {
        "dictionary": ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
        "trainers.top_k": ("AutoEncoderTopK",),
        "trainers.batch_top_k": ("BatchTopKSAE",),
        "trainers.matryoshka_batch_top_k": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    }
    classes: dict[str, Any] = {}
    for home, names in homes.items():
        module = importlib.import_module(f"dictionary_learning.{home}")
        classes.update({name: getattr(module, name) for name in names})
    return importlib.import_module("dictionary_learning.trainers"), classes


def trainer_of(kind: str, trainers: Any, classes: dict[str, Any]) -> tuple[Any, str]:
    """Return a trainer that holds a coder of the kind, and which side of its module its buffer read."""
    common = {**STEPS, "device": "cpu", "submodule_name": "resid_post_layer_3"}
    if kind == "AutoEncoder":
        return trainers.StandardTrainer(**{**common, "submodule_name": "mlp_out_layer3"}), "out"
    if kind == "AutoEncoderNew":
        return trainers.StandardTrainer(**common, dict_class=classes["AutoEncoderNew"]), "out"
    if kind == "transcoder":
        named = {**common, "submodule_name": "gpt_neox.layers.3.mlp", "dict_class": classes["AutoEncoderNew"]}
        return trainers.StandardTrainer(**named), "in_and_out"
    if kind == "GatedAutoEncoder":
        return trainers.GatedSAETrainer(**{**common, "submodule_name": "gpt_neox.layers.3.attention"}), "out"
    if kind == "AutoEncoderTopK":
        return trainers.TopKTrainer(**common, k=K), "out"
    if kind.startswith("BatchTopKSAE"):
        return trainers.BatchTopKTrainer(**common, k=K), "out"
    if kind == "MatryoshkaBatchTopKSAE":
        parts = {"k": K, "group_fractions": [0.25, 0.25, 0.5]}
        return classes["MatryoshkaBatchTopKTrainer"](**{**common, "submodule_name": None}, **parts), "out"
    return trainers.JumpReluTrainer(**{**common, "submodule_name": "mlp_layer_3"}), "in"


def randomise(coder: Any, draw: torch.Generator, threshold: float) -> None:
    """Give every parameter values that no initialisation gives, so that nothing cancels by chance."""
    for name, parameter in coder.named_parameters():
        scale = 0.2 if parameter.ndim == 1 else D**-0.5
        parameter.data = torch.randn(parameter.shape, generator=draw) * scale
        if name == "threshold":
            parameter.data = parameter.data.abs() * 2
    for name, buffer in coder.named_buffers():
        if name == "threshold":
            buffer.fill_(threshold)


def write(kind: str, trainers: Any, classes: dict[str, Any]) -> None:
    """Write one checkpoint, its settings, and what the library makes of it."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(len(kind) * 1000 + sum(map(ord, kind)))
    trainer, side = trainer_of(kind, trainers, classes)
    randomise(trainer.ae, draw, -1.0 if kind == "BatchTopKSAE_unset" else 0.4)
    folder = HERE / kind / "trainer_0"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu() for name, tensor in trainer.ae.state_dict().items()}
    torch.save(state, folder / "ae.pt")
    if kind == "AutoEncoderTopK":
        torch.save(state, folder / "checkpoints" / "ae_100.pt")
    else:
        (folder / "checkpoints").rmdir()
    buffer = {"d_submodule": D, "io": side, "n_ctxs": 3e4, "ctx_len": 128, "refresh_batch_size": 512, "device": "cpu"}
    settings = {"trainer": trainer.config, "buffer": buffer}
    (folder / "config.json").write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    given = {"k": K} if "TopK" in kind else {}
    coder = type(trainer.ae).from_pretrained(folder / "ae.pt", **given)
    x = torch.randn(INPUTS, D, generator=draw) + 0.3
    with torch.no_grad():
        code = coder.encode(x)
        made = coder.decode(code)
    np.savez_compressed(HERE / f"{kind}.npz", x=x.numpy(), code=code.numpy(), reconstruction=made.numpy())


def main() -> None:
    """Write all kinds, then the hashes of all files."""
    trainers, classes = library()
    kinds = [name for name in classes if not name.endswith("Trainer")]
    for kind in (*kinds, "BatchTopKSAE_unset", "transcoder"):
        write(kind, trainers, classes)
    files = sorted(p for p in HERE.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(HERE).as_posix()}\n" for p in files]
    (HERE / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
