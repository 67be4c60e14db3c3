"""Steering vectors on disk: ``NAME.safetensors`` with the parts, and ``NAME.json`` beside it with what they are of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import atomic_file, read_json, write_json
from exegete.steering.vector import About, SteeringVector, joined

if TYPE_CHECKING:
    from exegete.subjects import Subject

FORMAT = 1
_ENDING = ".safetensors"
_KINDS: Mapping[str, type] = {"d": int, "n_pairs": int}


def save_vector(vector: SteeringVector, path: str | Path) -> Path:
    """Write a vector and the JSON beside it, atomically each; return the .safetensors file.

    Raises InputError for a path of another ending.
    """
    from safetensors.torch import save

    file = vector_file(path)
    tensors = {name: part.contiguous() for name, part in vector.parts()}
    tensors |= {f"centre.{site}": centre.contiguous() for site, centre in vector.centres.items()}
    with atomic_file(file) as stream:
        stream.write(save(tensors))
    write_json(
        file.with_suffix(".json"),
        {
            "format": FORMAT,
            "kind": "exegete steering vector",
            "hash": vector.hash,
            "parts": {name: list(part.shape) for name, part in vector.parts()},
            **vector.about.to_json(),
        },
    )
    return file


def load_vector(path: str | Path, subject: Subject | None = None, *, other_model: bool = False) -> SteeringVector:
    """Read a vector, and check that it is the subject's where one is given.

    ``other_model`` lets a vector be used on another model with a residual stream of the same size, say a fine-tune.

    Raises:
        NotFoundError: When one of the two files is not there.
        CorruptError: When they are damaged, or do not belong together.
        InputError: For another ending, or a newer format.
        MismatchError: For a vector of another model than the subject.
    """
    from exegete.coders import weights

    file = vector_file(path)
    said = read_json(file.with_suffix(".json")) if file.is_file() else None
    if said is None:
        raise NotFoundError(f"there is no steering vector {str(path)!r}")
    if not isinstance(said, dict) or said.get("kind") != "exegete steering vector":
        raise CorruptError(f"{file.with_suffix('.json')} is not of a steering vector")
    if said.get("format") != FORMAT:
        raise InputError(f"{file} has format {said.get('format')}, this exegete reads {FORMAT}; upgrade exegete")
    stored = weights.tensors(file)
    tensors = {name: _plain(tensor, name, file) for name, tensor in stored.items()}
    try:
        residual, state, centres = joined(tensors)
        vector = SteeringVector(residual=residual, state=state, centres=centres, about=_about(said, file))
    except InputError as error:
        raise CorruptError(f"{file}: {error}") from error
    if vector.hash != said.get("hash"):
        raise CorruptError(
            f"{file} and the .json beside it do not belong together: the hash differs{_rounded(stored.values())}"
        )
    return vector if subject is None else fitted(vector, subject, other_model=other_model)


def fitted(vector: SteeringVector, subject: Subject, *, other_model: bool = False) -> SteeringVector:
    """Return a vector for a subject, checked; ``other_model`` allows any with a residual stream of that size."""
    if other_model and vector.about.model_hash != subject.hash:
        vector = dataclasses.replace(vector, about=dataclasses.replace(vector.about, model_hash=""))
    vector.require(subject)
    return vector


def vector_file(path: str | Path) -> Path:
    """Return the file that a vector has at a path. Raises InputError for another ending than .safetensors."""
    file = Path(path).expanduser()
    if file.suffix != _ENDING:
        raise InputError(f"a steering vector's file ends in {_ENDING}, got {str(path)!r}")
    return file


def _plain(tensor: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise CorruptError(f"{file}: {name} is of type {tensor.dtype}, which are no real numbers")
    return tensor


def _rounded(tensors: Collection[torch.Tensor]) -> str:
    """Return the likely cause of another hash where a vector was turned into fewer bits by hand: it is another one."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors} - {"float32", "float64"})
    if not kinds:
        return ""
    return (
        f" (the hash is of the values, and those in {', '.join(kinds)} are rounded; write the vector with save_vector)"
    )


def _about(said: Mapping[str, Any], file: Path) -> About:
    """Return what is said of a vector. Raises CorruptError for fields that are missing or of another type."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(About):
        value = said.get(field.name)
        kind = _KINDS.get(field.name, str)
        if field.name == "norms":
            norms = value if isinstance(value, dict) else {}
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in norms.values()):
                raise CorruptError(f"{file.with_suffix('.json')}: norms are numbers by part")
            value = {str(name): float(v) for name, v in norms.items()}
        elif field.name == "options":
            value = {} if value is None else value  # files of before there were any
            if not isinstance(value, dict) or not all(isinstance(v, int | float | str) for v in value.values()):
                raise CorruptError(f"{file.with_suffix('.json')}: options are numbers and words by name")
        elif value is None and field.name == "revision":
            value = None
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptError(f"{file.with_suffix('.json')}: {field.name} is missing or no {kind.__name__}")
        values[field.name] = value
    return About(**values)
