"""Content hashes of models, so that a run knows whether it looks at the weights it looked at before."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from exegete.errors import CorruptError
from exegete.files import hash_file, hash_json, read_json

_PASSING = ("_name_or_path", "transformers_version", "_commit_hash", "architectures")


def folder_hash(folder: Path) -> str | None:
    """Return the hash of a model folder's config and weight files, None when it holds no weights itself."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        return None
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise CorruptError(f"{folder / 'config.json'} does not hold settings")
    config = {k: v for k, v in settings.items() if k not in _PASSING}
    return hash_json({"config": config, "weights": {path.name: hash_file(path) for path in weights}})


def state_hash(model: torch.nn.Module, config: Any) -> str:
    """Return the hash of a loaded model's config and parameters."""
    settings = {k: repr(v) for k, v in config.to_dict().items() if k not in _PASSING}
    return hash_json({"config": settings, "weights": {n: tensor_hash(t) for n, t in model.state_dict().items()}})


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's shape and values; equal values in a wider type hash alike."""
    values = tensor.detach().cpu()
    if values.is_floating_point() and values.dtype != torch.float64:
        values = values.float()
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
