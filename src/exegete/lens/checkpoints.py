"""Where an interrupted training goes on: everything that the next step depends on, in one file written whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from exegete.errors import CorruptError
from exegete.files import atomic_file, canonical_json
from exegete.store.checks import require_same

_NAME = "checkpoint.pt"
_FORMAT = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A training after ``step`` steps; ``epoch`` and ``place`` say where the text stands, the rest is by translator."""

    step: int
    epoch: int
    place: int
    translators: Mapping[str, Any]
    optimizers: Mapping[str, Any]
    best: Mapping[str, Any]
    first: Mapping[str, float]
    last: Mapping[str, float]


def write_checkpoint(folder: Path, key: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Write a checkpoint of a training with these settings."""
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    with atomic_file(folder / _NAME) as stream:
        torch.save({"format": _FORMAT, "key": canonical_json(key), **fields}, stream)


def read_checkpoint(folder: Path, key: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint in a folder, None where there is none.

    Raises MismatchError when it is of other settings, CorruptError when it cannot be read.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        fields = {name: data[name] for name in Checkpoint.__slots__}
        same = data["format"] == _FORMAT
        stored = dict(json.loads(data["key"]))
    except (RuntimeError, OSError, pickle.UnpicklingError, LookupError, TypeError, EOFError, ValueError) as error:
        raise CorruptError(
            f"{path} cannot be read ({type(error).__name__}); remove it to train from the start"
        ) from error
    if not same:
        raise CorruptError(f"{path} has another format number; remove it to train from the start")
    require_same(f"the training in {folder}", stored, json.loads(canonical_json(key)))
    return Checkpoint(**fields)


def misfit(folder: Path, error: Exception) -> CorruptError:
    """Return what is said of a checkpoint that can be read and does not fit the training that it is of."""
    return CorruptError(
        f"{folder / _NAME} does not fit this training ({type(error).__name__}); remove it to train from the start"
    )


def clear_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a training that is complete."""
    (folder / _NAME).unlink(missing_ok=True)
