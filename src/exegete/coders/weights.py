"""Weight files of others: what they hold, without loading it, and chosen tensors of them. Nothing in them is run.

``.safetensors``, ``.npz`` and PyTorch's ``.pt``, ``.pth`` and ``.bin`` are read. Headers come from a seekable stream,
so that those of a remote file cost a few kilobytes; a PyTorch file is read with ``weights_only`` and nothing else.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, final

import numpy as np

from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

_LARGEST_HEADER = 100 << 20
_LARGEST_ARRAY_HEADER = 1 << 14
_MOST_ENTRIES = 100_000
_DEEPEST = 16
_PICKLED = (".pt", ".pth", ".bin")
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
SUFFIXES = (".safetensors", ".npz", *_PICKLED)
"""Endings of the files that can be read."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Shape and type (as safetensors spells it: F32, BF16, I64 …) of one tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def header(stream: BinaryIO, name: str) -> dict[str, TensorInfo]:
    """Return the tensors of a weight file by name, reading no weights. ``name`` says its format and names it in errors.

    Tensors in nested tables of a PyTorch file are named ``outer.inner``. Raises CorruptError when the file is damaged,
    InputError for another format or a pickle that asks to run code.
    """
    suffix = PurePosixPath(name).suffix
    if suffix == ".safetensors":
        return _safely(name, lambda: _safetensors_header(stream))
    if suffix == ".npz":
        return _safely(name, lambda: _npz_header(stream))
    found = _safely(name, lambda: flat(_unpickled(stream, name, meta=True)))
    return {
        key: TensorInfo(shape=tuple(v.shape), dtype=_torch_name(v.dtype)) for key, v in found.items() if _is_tensor(v)
    }


def settings(stream: BinaryIO, name: str) -> dict[str, Any]:
    """Return what a PyTorch file holds besides tensors: strings, numbers and lists, by name. As ``header``."""
    found = _safely(name, lambda: flat(_unpickled(stream, name, meta=True)))
    return {key: value for key, value in found.items() if not _is_tensor(value)}


def tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a local weight file, all or those named, on the CPU.

    Of an ``.npz`` file all are those that hold numbers. Raises NotFoundError when there is no such file, CorruptError
    when it is damaged, lacks a tensor, or a tensor holds NaN or infinity; InputError for another format.
    """
    wanted = None if names is None else list(names)
    found = _safely(str(path), lambda: _read(path, wanted))
    missing = [n for n in wanted or () if n not in found]
    if missing:
        raise CorruptError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(found)) or 'no tensors'}")
    bad = _safely(str(path), lambda: {n: t for n, t in found.items() if not _finite(t)})
    if bad:
        raise CorruptError(f"{path}: {next(iter(bad))} holds NaN or infinity")
    return found


def flat(data: Any) -> dict[str, Any]:
    """Return nested tables as one, keys joined with dots. Raises ValueError for a table without end."""
    found: dict[str, Any] = {}
    tables = [("", data, 1)] if isinstance(data, Mapping) else []
    seen = 0
    while tables:
        before, table, depth = tables.pop()
        for key, value in table.items():
            seen += 1
            if seen > _MOST_ENTRIES or depth > _DEEPEST:
                raise ValueError(f"it holds over {_MOST_ENTRIES:,} entries, or tables in tables over {_DEEPEST} deep")
            if isinstance(value, Mapping):
                tables.append((f"{before}{key}.", value, depth + 1))
            else:
                found[f"{before}{key}"] = value
    return found


def _read(path: Path, names: list[str] | None) -> dict[str, torch.Tensor]:
    import torch

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt", device="cpu") as file:
            held = set(file.keys())
            return {n: file.get_tensor(n) for n in (sorted(held) if names is None else names) if n in held}
    if path.suffix == ".npz":
        with path.open("rb") as stream:
            _npz_header(stream)
        with np.load(path, allow_pickle=False) as file:
            chosen = [n for n in (file.files if names is None else names) if n in file.files]
            arrays = {n: np.asarray(file[n], order="C") for n in chosen}
        arrays = {n: a.astype(a.dtype.newbyteorder("="), copy=False) for n, a in arrays.items()}
        return {n: torch.from_numpy(a) for n, a in arrays.items() if names is not None or a.dtype.kind in "biuf"}
    with path.open("rb") as stream:
        found = flat(_unpickled(stream, str(path), meta=False))
    return {n: _plain(t) for n, t in found.items() if _is_tensor(t) and (names is None or n in names)}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is nothing but numbers in memory. Raises ValueError for any other kind."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"it holds a {tensor.layout} tensor on {tensor.device}; only plain tensors are read")
    return tensor.detach()


def _finite(tensor: torch.Tensor) -> bool:
    import torch

    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _safetensors_header(stream: BinaryIO) -> dict[str, TensorInfo]:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _LARGEST_HEADER:
        raise ValueError(f"its header claims {length} bytes")
    data = json.loads(stream.read(length))
    end = 8 + length + max((int(v["data_offsets"][1]) for k, v in data.items() if k != "__metadata__"), default=0)
    if stream.seek(0, 2) != end:
        raise ValueError(f"it is {stream.tell()} bytes long and should be {end}")
    return {name: _safetensors_entry(name, entry) for name, entry in data.items() if name != "__metadata__"}


def _safetensors_entry(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    info = TensorInfo(shape=tuple(int(n) for n in entry["shape"]), dtype=str(entry["dtype"]))
    bits = re.fullmatch(r"(?:BF|F|I|U)(\d+)(?:_E\w+)?", info.dtype)
    size = math.prod(info.shape) * (1 if bits is None else int(bits[1]) // 8)
    if min(info.shape, default=0) < 0 or size != end - begin:
        raise ValueError(f"{name} claims the shape {list(info.shape)} and holds another number of bytes")
    return info


def _npz_header(stream: BinaryIO) -> dict[str, TensorInfo]:
    found = {}
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as part:
                start = io.BytesIO(part.read(min(entry.file_size, _LARGEST_ARRAY_HEADER)))
            version = np.lib.format.read_magic(start)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(start)
            if dtype.hasobject:
                raise ValueError(f"{entry.filename} holds Python objects, which are not read")
            if min(shape, default=0) < 0 or start.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.filename} claims the shape {list(shape)} and holds another number of bytes")
            found[entry.filename.removesuffix(".npy")] = TensorInfo(
                shape=shape, dtype=_NAMES.get(dtype.name, dtype.name)
            )
    return found


def _unpickled(stream: BinaryIO, name: str, *, meta: bool) -> Any:
    import torch

    if PurePosixPath(name).suffix not in _PICKLED:
        raise InputError(f"{name} is no weight file that can be read; readable are {', '.join(SUFFIXES)}")
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch's own files never are")
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and storage classes, which are no concern of a user
            return torch.load(stream, map_location="meta" if meta else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(stream):
            raise ValueError("it is no archive of tensors") from error
        raise InputError(
            f"{name} holds more than tensors and plain data, so reading it could run code; convert it to .safetensors"
        ) from error


def _safely(name: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Turn what readers raise on damaged files into CorruptError."""
    import safetensors

    try:
        return read()
    except InputError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"there is no {name}") from None
    except MemoryError as error:
        raise CorruptError(f"{name} does not fit in memory, or claims more than it holds") from error
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        RuntimeError,
        RecursionError,
        OverflowError,
        AssertionError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise CorruptError(f"{name} is damaged: {detail}") from error


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _torch_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _NAMES.get(name, name)
