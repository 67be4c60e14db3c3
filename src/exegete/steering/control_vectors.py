"""Control vectors of repeng and llama.cpp: GGUF files of the architecture ``controlvector``.

Tensor ``direction.J`` [d] is added to the output of block J, counted from 0 as sites are; repeng writes 1 to L − 1 by
default, and llama.cpp reads no ``direction.0``. ``controlvector.model_hint`` is the model type of transformers, all
that such a file says of its model. Only the residual part of a vector fits in.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exegete.errors import CorruptError, InputError, MismatchError, MissingExtraError, NotFoundError
from exegete.files import atomic_file
from exegete.steering.vector import About, SteeringVector, about, width
from exegete.subjects.sites import site_point

if TYPE_CHECKING:
    from exegete.subjects import Subject

_ARCHITECTURE = "controlvector"
_SMALLEST = 24  # bytes: magic, version, two counts


def export_control_vector(vector: SteeringVector, path: str | Path) -> Path:
    """Write the residual part as a GGUF control vector in float32, atomically; return the file.

    Raises InputError for a vector without a residual part, with a part that the format has no place for (the state,
    the embedding site −1), or for a path of another ending; MissingExtraError without the ``gguf`` package.
    """
    gguf = _library()
    file = _file(path)
    if vector.state.parts or not vector.residual or min(vector.sites) < 0:
        raise InputError(
            "a control vector holds directions for the outputs of blocks only; leave out the state and site -1 first, "
            "with vector.only(sites=..., mode='residual') (--sites 0-5, say)"
        )
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(str(written), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", vector.about.model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vector.residual))
        for site in vector.sites:
            writer.add_tensor(f"direction.{site}", np.ascontiguousarray(vector.residual[site].numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = written.read_bytes()
    with atomic_file(file) as stream:
        stream.write(data)
    return file


def import_control_vector(path: str | Path, subject: Subject) -> SteeringVector:
    """Read a GGUF control vector for a subject.

    Raises NotFoundError when there is no such file, CorruptError when it is damaged, InputError when it is a GGUF file
    of something else, MismatchError for another model type, size, or blocks that the subject does not have.
    """
    gguf = _library()
    file = _file(path)
    if not file.is_file():
        raise NotFoundError(f"there is no control vector {str(path)!r}")
    held, hint = _read(gguf, file)
    kind = str(subject.model.config.model_type)
    if hint and hint != kind:
        raise MismatchError(f"{file} is for a model of type {hint!r}, {subject.name} is {kind!r}")
    residual = {}
    for name, values in held.items():
        found = re.fullmatch(r"direction\.(\d{1,6})", name)
        if found is None:
            continue
        if values.shape != (width(subject),):
            raise MismatchError(
                f"{file}: {name} has shape {values.shape}, {subject.name} has {width(subject)} dimensions"
            )
        site_point(subject, int(found[1]))
        residual[int(found[1])] = torch.from_numpy(values)
    if not residual:
        raise InputError(f"{file} holds no direction.N, so it is no control vector")
    norms = {f"residual.{site}": float(part.norm()) for site, part in residual.items()}
    own = about(subject, "import", source=file.name, norms=norms)
    return SteeringVector(residual=residual, about=_without_hash(own))


def _without_hash(own: About) -> About:
    """Return it without the subject's hash: a control vector does not say which weights it was made on."""
    return dataclasses.replace(own, model_hash="", revision=None)


def _read(gguf: Any, file: Path) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
    try:
        if os.path.getsize(file) < _SMALLEST:
            raise ValueError("it is too short")
        reader = gguf.GGUFReader(str(file))
        words = {name: _text(reader, name) for name in ("general.architecture", f"{_ARCHITECTURE}.model_hint")}
        if words["general.architecture"] != _ARCHITECTURE:
            raise InputError(
                f"{file} is a GGUF file of {words['general.architecture'] or 'nothing named'}, not of a control vector"
            )
        held = {
            str(tensor.name): np.array(tensor.data, dtype=np.float32)
            for tensor in reader.tensors
            if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        }
    except InputError:
        raise
    except Exception as error:  # the reader maps the file and raises whatever its bytes lead to
        raise CorruptError(f"{file} is no readable GGUF file: {' '.join(str(error).split())[:200]}") from error
    if any(not np.isfinite(values).all() for values in held.values()):
        raise CorruptError(f"{file} holds NaN or infinity")
    return held, words[f"{_ARCHITECTURE}.model_hint"]


def _text(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    return "" if field is None else bytes(field.parts[-1]).decode("utf-8", errors="replace")


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtraError("reading and writing control vectors (GGUF)", "gguf") from None


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.suffix != ".gguf":
        raise InputError(f"a control vector's file ends in .gguf, got {str(path)!r}")
    return file
