"""Given directions as latents: probes, steering vectors, the rows of any matrix.

The file holds ``directions`` [n, d] and may hold ``bias`` [n] (a probe's intercept) and ``threshold`` [n]. Latent i has
the value x · direction_i + bias_i where that is positive and above its threshold; latent n + i, there unless ``signs``
is ``positive``, has the opposite value likewise. Each direction is decoded on its own: without a bias, value times
decoder row is the projection of x on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from exegete.coders import weights
from exegete.coders.activations import Activation, JumpReLU, ReLU
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import Signs
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.types import Side

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIXES = (".npy", *weights.SUFFIXES)
"""Endings of the files that can be read."""


def direction_coder(
    directions: torch.Tensor,
    hookpoint: str,
    *,
    name: str,
    bias: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    signs: Signs = "both",
    unit: bool = False,
    side: Side = "output",
) -> LinearCoder:
    """Return directions as a coder.

    Args:
        directions: [n, d], or one direction [d].
        hookpoint: Where they are read, in any spelling.
        name: What its store and latents are called.
        bias: [n] added to the products, None for zeros.
        threshold: [n] that values must exceed, none of them negative; None for zero.
        signs: ``both``: width 2 n, latent n + i is the opposite of direction i; ``positive``: width n.
        unit: Measure along directions of length 1; bias and threshold are divided with them, so that the same fire.
        side: The side of the module that is read.

    Raises:
        InputError: When shapes do not fit together, a direction is zero, or numbers are not finite.
    """
    what = f"coder {name!r}"
    rows = directions[None] if directions.ndim == 1 else directions
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what}: directions are [n, d], got shape {list(directions.shape)}")
    n = len(rows)
    given = {"directions": rows, "bias": bias, "threshold": threshold}
    parts = {part: tensor.double() for part, tensor in given.items() if tensor is not None}
    for part, tensor in parts.items():
        if part != "directions" and tensor.shape != (n,):
            raise InputError(f"{what}: {part} has shape {list(tensor.shape)}, expected {[n]}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{what}: {part} holds NaN or infinity")
    if threshold is not None and bool((threshold < 0).any()):
        raise InputError(f"{what}: a threshold is not negative; latents fire on positive values only")
    if signs not in ("positive", "both"):
        raise InputError(f"{what} has the signs {signs!r}; allowed: positive, both")
    lengths = parts["directions"].norm(dim=1)
    if bool((lengths == 0).any()):
        raise InputError(f"{what}: direction {int((lengths == 0).nonzero()[0])} is zero; leave it out")
    if unit:
        parts = {p: t / (lengths[:, None] if t.ndim == 2 else lengths) for p, t in parts.items()}
    encoder, shift = parts["directions"], parts.get("bias", torch.zeros(n, dtype=torch.float64))
    decoder = encoder / encoder.square().sum(dim=1, keepdim=True)
    signed = (1.0, -1.0) if signs == "both" else (1.0,)
    activation: Activation = ReLU()
    if "threshold" in parts:
        activation = JumpReLU(torch.cat([parts["threshold"]] * len(signed)).float())
    return LinearCoder(
        name=name,
        hookpoint=hookpoint,
        encoder=torch.cat([sign * encoder for sign in signed]).float(),
        encoder_bias=torch.cat([sign * shift for sign in signed]).float(),
        decoder=torch.cat([sign * decoder for sign in signed]).float(),
        decoder_bias=torch.zeros(rows.shape[1]),
        activation=activation,
        side=side,
    )


def load_directions(
    path: str | Path, hookpoint: str, *, name: str, signs: Signs = "both", unit: bool = False, side: Side = "output"
) -> LinearCoder:
    """Return the directions in a file as a coder; see ``direction_coder`` and the module for what the file holds.

    Raises NotFoundError when there is no such file, InputError when it is of another kind or holds something else,
    CorruptError when it is damaged.
    """
    held = read_directions(path)
    return direction_coder(
        held["directions"],
        hookpoint,
        name=name,
        bias=held.get("bias"),
        threshold=held.get("threshold"),
        signs=signs,
        unit=unit,
        side=side,
    )


def read_directions(path: str | Path) -> Mapping[str, torch.Tensor]:
    """Return ``directions`` and, where a file has them, ``bias`` and ``threshold``. Raises as ``load_directions``."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise NotFoundError(f"there is no file {str(path)!r} with directions")
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} is no file of directions that can be read; readable are {', '.join(SUFFIXES)}")
    held = _array(file) if file.suffix == ".npy" else weights.tensors(file)
    if not held and file.suffix in (".pt", ".pth", ".bin"):
        held = _bare(file)
    if "directions" not in held and len(held) == 1:
        held = {"directions": next(iter(held.values()))}
    unknown = held.keys() - {"directions", "bias", "threshold"}
    if "directions" not in held or unknown:
        raise InputError(
            f"{file} holds {', '.join(sorted(held)) or 'no tensors'}; a file of directions holds one tensor, or "
            f"directions with or without bias and threshold"
        )
    for name, tensor in held.items():
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise InputError(f"{file}: {name} is of type {tensor.dtype}, which are no real numbers")
    return held


def _array(file: Path) -> dict[str, torch.Tensor]:
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{file} holds {array.dtype}, which are no real numbers")
    return {"directions": torch.from_numpy(array.astype(np.float64))}


def _bare(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensor of a PyTorch file that is nothing but a tensor; reading it as a table has vetted it."""
    tensor = torch.load(file, map_location="cpu", weights_only=True)
    return {"directions": tensor} if isinstance(tensor, torch.Tensor) else {}
