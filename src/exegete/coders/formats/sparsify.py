"""Reader of EleutherAI's sparsify checkpoints: ``cfg.json`` beside ``sae.safetensors``.

A folder is one coder, or holds a folder per hookpoint, each of which is a coder or holds ``seed0``, ``seed1`` …
Nothing in such a folder is trusted: weights are read as safetensors only, names and shapes are checked before weights
are loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.coders.topk import TopKCoder, check_settings
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import read_json
from exegete.types import Side

if TYPE_CHECKING:
    import torch

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_SEED = re.compile(r"seed\d+")
_MODULE = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+(?:\.|$)")
_LARGEST_CONFIG = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderFolder:
    """Where one coder lies: the hookpoint that its folder names, None where it names none, and its seed folder."""

    path: Path
    hookpoint: str | None
    seed: str | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderInfo:
    """What is known of a coder without its weights."""

    path: Path
    hookpoint: str | None
    side: Side
    d_in: int
    d_out: int
    width: int
    k: int
    activation: str
    transcode: bool
    skip: bool
    dtype: str


def find(folder: Path) -> tuple[CoderFolder, ...]:
    """Return the coders in a folder in natural order, by their config files alone.

    Raises InputError when the folder holds no sparsify coder, saying so when what it holds are pickles.
    """
    if (folder / CONFIG).is_file():
        return (_own(folder),)
    found: list[CoderFolder] = []
    for child in _folders(folder):
        if (child / CONFIG).is_file():
            seeded = bool(_SEED.fullmatch(child.name))
            hookpoint = _hookpoint(folder.name) if seeded else child.name
            found.append(CoderFolder(path=child, hookpoint=hookpoint, seed=child.name if seeded else None))
        else:
            seeds = [s for s in _folders(child) if _SEED.fullmatch(s.name) and (s / CONFIG).is_file()]
            found += [CoderFolder(path=s, hookpoint=child.name, seed=s.name) for s in seeds]
    if not found:
        raise _nothing(folder)
    return tuple(found)


def inspect(place: CoderFolder) -> CoderInfo:
    """Return what a coder's config and the header of its weights say. Raises InputError or CorruptError."""
    config = _config(place.path)
    shapes, dtypes = _header(place.path)
    what = str(place.path)
    width, d_in = _integer(config, "num_latents", what, 0), _integer(config, "d_in", what)
    width = width or d_in * _integer(config, "expansion_factor", what, 32)
    transcode, skip = _flag(config, "transcode", what), _flag(config, "skip_connection", what)
    k, activation = _integer(config, "k", what, 32), config.get("activation", "topk")
    expected = {
        "encoder.weight": (width, d_in),
        "encoder.bias": (width,),
        "W_dec": (width, d_in),
        "b_dec": (d_in,),
        **({"W_skip": (d_in, d_in)} if skip else {}),
    }
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise CorruptError(f"{place.path / WEIGHTS} lacks {', '.join(missing)}; it has {', '.join(sorted(shapes))}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CorruptError(
                f"{place.path / WEIGHTS}: {name} has shape {list(shapes[name])}, its {CONFIG} says {list(shape)}"
            )
        if not dtypes[name].startswith(("F", "BF")):
            raise CorruptError(f"{place.path / WEIGHTS}: {name} is of type {dtypes[name]}, not floating point")
    check_settings(what, width, k, str(activation))
    return CoderInfo(
        path=place.path,
        hookpoint=place.hookpoint,
        side="input" if transcode else "output",
        d_in=d_in,
        d_out=d_in,
        width=width,
        k=k,
        activation=str(activation),
        transcode=transcode,
        skip=skip,
        dtype=dtypes["encoder.weight"],
    )


def load(place: CoderFolder, *, name: str, hookpoint: str, device: str, dtype: torch.dtype) -> TopKCoder:
    """Load one coder. Raises InputError or CorruptError, also for weights that are not finite."""
    import torch
    from safetensors import safe_open

    info = inspect(place)
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if info.skip else [])]
    with safe_open(str(place.path / WEIGHTS), framework="pt", device="cpu") as file:
        tensors: dict[str, torch.Tensor] = {n: file.get_tensor(n) for n in names}
    for n, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptError(f"{place.path / WEIGHTS}: {n} holds NaN or infinity")
    coder = TopKCoder(
        name=name,
        hookpoint=hookpoint,
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        k=info.k,
        activation="groupmax" if info.activation == "groupmax" else "topk",
        transcode=info.transcode,
        skip=tensors.get("W_skip"),
        base_model=trained_on(place.path),
    )
    return coder.to(device, dtype)


def trained_on(folder: Path) -> str | None:
    """Return the model that the run's ``config.json`` says its coders were trained on, None when it says nothing."""
    for place in (folder, folder.parent, folder.parent.parent):
        path = place / "config.json"
        if path.is_file() and path.stat().st_size <= _LARGEST_CONFIG:
            settings = read_json(path)
            model = settings.get("model") if isinstance(settings, dict) and "sae" in settings else None
            return model if isinstance(model, str) else None
    return None


def _own(folder: Path) -> CoderFolder:
    if _SEED.fullmatch(folder.name):
        return CoderFolder(path=folder, hookpoint=_hookpoint(folder.parent.name), seed=folder.name)
    return CoderFolder(path=folder, hookpoint=_hookpoint(folder.name))


def _hookpoint(name: str) -> str | None:
    """Return a folder's name when it looks like a module's: a layer or what is inside it, or an embedding."""
    return name if _MODULE.search(name) or name.startswith("embed") else None


def _folders(folder: Path) -> list[Path]:
    from exegete.subjects.names import natural

    children = (c for c in folder.iterdir() if c.is_dir() and not c.name.startswith("."))
    return sorted(children, key=lambda c: natural(c.name))


def _nothing(folder: Path) -> InputError:
    inside = [f for f in (*folder.glob("*"), *folder.glob("*/*")) if f.is_file()]
    pickles = sorted(f.relative_to(folder).as_posix() for f in inside if f.suffix in _PICKLES)
    if pickles:
        return InputError(
            f"{str(folder)!r} holds pickled weights only ({pickles[0]}), which can run code when read; convert them to "
            f"{WEIGHTS} with a {CONFIG} beside it"
        )
    return InputError(
        f"{str(folder)!r} holds no sparse coder: expected {CONFIG} and {WEIGHTS} in it, or in one folder per hookpoint"
    )


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size > _LARGEST_CONFIG:
        raise CorruptError(f"{path} is too large to be the settings of a coder")
    try:
        config = read_json(path)
    except RecursionError:
        raise CorruptError(f"{path} does not parse as JSON: nested too deeply") from None
    if not isinstance(config, dict):
        raise CorruptError(f"{path} does not hold settings")
    return config


def _header(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        if any(f.suffix in _PICKLES for f in folder.iterdir()):
            raise _nothing(folder)
        raise NotFoundError(f"there is no {path}")
    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: tuple(int(n) for n in part.get_shape()) for name, part in slices.items()}
            return shapes, {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _integer(config: Mapping[str, Any], name: str, what: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < (0 if default == 0 else 1):
        raise InputError(f"{what}: {CONFIG} must hold {name} as a positive integer, it holds {value!r}")
    return value


def _flag(config: Mapping[str, Any], name: str, what: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{what}: {CONFIG} must hold {name} as true or false, it holds {value!r}")
    return value


def select(groups: Sequence[tuple[CoderFolder, ...]], hookpoints: Sequence[str]) -> list[tuple[CoderFolder, ...]]:
    """Return from each group the coders at the hookpoints asked for, all when none is asked for.

    Hookpoints are in any spelling, globs allowed. A lone coder whose folder names no hookpoint is always kept: it is
    for the caller to say where it sits. Raises NotFoundError naming the near ones for a hookpoint that no group has.
    """
    from exegete.subjects.names import expand

    if not hookpoints:
        return list(groups)
    known = [[p.hookpoint for p in group if p.hookpoint is not None] for group in groups]
    wanted: list[set[str | None]] = [set() if names else {None} for names in known]
    for pattern in hookpoints:
        matched = not all(known)
        for names, chosen in zip(known, wanted, strict=True):
            with contextlib.suppress(NotFoundError):
                chosen.update(name for name, _ in expand(pattern, names))
                matched = True
        if not matched:
            expand(pattern, list(dict.fromkeys(name for names in known for name in names)))  # raises, with near names
    return [tuple(p for p in group if p.hookpoint in chosen) for group, chosen in zip(groups, wanted, strict=True)]
