"""The embedded default: a small Python-code language model and two coders made by this project, and their text.

Beside it a recurrent one, a Mamba with a coder on its residual stream. Everything here ships in the package, so that
``exegete demo`` runs with no network, GPU or key.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from exegete.config import RunConfig, merge
from exegete.demo.stdlib import corpus_files, stdlib_root

HOOKPOINTS = ("layers.2", "layers.2.mlp")
RECURRENT_HOOKPOINTS = ("layers.2",)


def assets() -> Path:
    """Return the folder of the demo's weights: ``model`` (Hugging Face layout) and ``coders`` (sparsify layout).

    Its folder ``recurrent`` holds the same two of the recurrent model.
    """
    return Path(str(resources.files(__package__))) / "assets"


def demo_config(changes: Mapping[str, Any] | None = None, *, recurrent: bool = False) -> RunConfig:
    """Return the configuration of ``exegete demo``, or of the recurrent one, with nested ``changes`` laid over it."""
    folder = assets() / "recurrent" if recurrent else assets()
    base = {
        "subject": str(folder / "model"),
        "coder": [str(folder / "coders")],
        "hookpoints": list(RECURRENT_HOOKPOINTS if recurrent else HOOKPOINTS),
        "explainer": "rule",
        "scorers": ["detection", "fuzzing", "execution"],
        "nulls": ["random_coder", "random_subject"],
        "corpus": {"text": ["stdlib"], "max_tokens": 700_000},
        "latents": {"count": 272, "null_count": 128},
        "examples": {"min_test": 20},
    }
    return RunConfig.from_dict(merge(base, changes or {}))


def title(subject: str) -> str | None:
    """Return what a report on one of the demo's models is called, None for another subject."""
    folder = Path(subject)
    if folder.is_relative_to(assets() / "recurrent"):
        return "The recurrent demo: a Python-code Mamba"
    return "The embedded default: a Python-code model" if folder.is_relative_to(assets()) else None


def describe_corpus() -> str:
    """Say which text the demo runs on."""
    sizes: dict[str, list[int]] = {"train": [], "held_out": []}
    for file in corpus_files():
        sizes[file.side].append(len(file.text.encode()))
    train, test = (f"{len(v)} files, {sum(v) / 1e6:.1f} MB" for v in sizes.values())
    return (
        f"corpus: Python {platform.python_version()}'s standard library at {stdlib_root()}: {train} to explain from, "
        f"{test} held out (the models never saw them); test folders, tables and near copies left out"
    )
