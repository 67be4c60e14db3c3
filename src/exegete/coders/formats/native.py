"""exegete's own folder for one coder: ``coder.json`` (what it is) beside ``coder.safetensors`` (its weights).

``coder.json`` holds the format number, the kind (``linear`` or ``neurons``), the activation function with its numbers,
where it reads and what it reconstructs, its sizes, how the input is treated, the model it was made for, its name, its
content hash, and the hash of the weights as stored: the two differ where weights were stored in a narrower data type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final, get_args

from exegete.coders.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from exegete.coders.coder import Point, SparseCoder
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, beside, flag, integer, require_shapes, text
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import atomic_file, write_json
from exegete.types import Side

if TYPE_CHECKING:
    import torch

CONFIG = "coder.json"
WEIGHTS = "coder.safetensors"
FORMAT = 1
"""Number of the newest layout of the folder; older ones are read."""
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9_.@+=/-]")
_GATED = ("gate_bias", "scale", "magnitude_bias")
_PARAMETERS = {"topk": (), "groupmax": (), "relu": (), "jumprelu": ("threshold",), "gated": _GATED}
_ACTIVATIONS: dict[str, Callable[[int, Mapping[str, torch.Tensor]], Activation]] = {
    "topk": lambda k, t: TopK(k),
    "groupmax": lambda k, t: GroupMax(k),
    "relu": lambda k, t: ReLU(),
    "jumprelu": lambda k, t: JumpReLU(t["threshold"]),
    "gated": lambda k, t: Gated(*(t[name] for name in _GATED)),
}


def save_coder(coder: SparseCoder, folder: str | Path) -> Path:
    """Write a coder to a folder of its own, each file whole or not at all, settings last; return the folder.

    Weights keep their data type. What ``load_coder`` makes of the folder has the same hash and computes the same.

    Raises InputError for a coder that is neither linear nor made of neurons.
    """
    from safetensors.torch import save

    if isinstance(coder, LinearCoder):
        own, tensors = _linear_parts(coder)
    elif isinstance(coder, NeuronCoder):
        own, tensors = _neuron_parts(coder)
    else:
        raise InputError(f"coder {coder.name!r} is a {type(coder).__name__}; only linear coders and neurons are saved")
    settings = {
        **own,
        "format": FORMAT,
        "name": coder.name,
        "architecture": coder.architecture,
        "hookpoint": coder.hookpoint,
        "side": coder.side,
        "target": list(coder.target),
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "width": coder.width,
        "k": coder.k,
        "dtype": str(coder.dtype).removeprefix("torch."),
        "base_model": coder.base_model,
        "hash": coder.hash,
    }
    stored = _unshared(tensors)
    path = Path(folder)
    settings["weights"] = _built(settings, stored, str(path), content=None).hash
    with atomic_file(path / WEIGHTS) as stream:
        stream.write(save(stored))
    write_json(path / CONFIG, settings)
    return path


@final
class Native(CoderFormat):
    """Coders that exegete has written."""

    name = "exegete"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every folder with ``coder.safetensors``, or with settings of this format alone."""
        found: dict[str, Place] = {}
        for path in repository.under(folder):
            here, _, file = path.rpartition("/")
            if here not in found and (file == WEIGHTS or (file == CONFIG and _ours(repository, path))):
                found[here] = _place(repository, here)
        return tuple(found.values())

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        settings, where = _settings(repository, place)
        header = repository.header(place.files[1])
        require_shapes(repository.where(place.files[1]), header, _shapes(settings, where), f"its {CONFIG}")
        point, target = _points(settings, where)
        held = _held(settings, where)
        return CoderInfo(
            format=self.name,
            architecture=_architecture(settings, where),
            path=repository.where(place.folder),
            hookpoint=point[0],
            side=point[1],
            target=None if target == point else target,
            d_in=integer(settings, "d_in", where),
            d_out=integer(settings, "d_out", where),
            width=integer(settings, "width", where),
            k=_k(settings, where),
            threshold=_threshold(settings, where),
            base_model=text(settings, "base_model", where),
            dtype=header[held[0]].dtype if held else "",
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> SparseCoder:
        """Load one coder; weights other than those its settings were written for are refused.

        Raises InputError or CorruptError.
        """
        self.inspect(repository, place)
        settings, where = _settings(repository, place)
        held = _held(settings, where)
        tensors = repository.tensors(place.files[1], held) if held else {}
        coder = _built(settings, tensors, where, content=None)
        if coder.hash != text(settings, "weights", where):
            raise CorruptError(f"{repository.where(place.files[1])} holds other weights than {where} was written for")
        whole = _built(settings, tensors, where, content=text(settings, "hash", where))
        elsewhere = None if hookpoint == whole.hookpoint else (hookpoint, whole.side)
        return whole.placed(name=name, point=elsewhere).to(device, dtype)


def _linear_parts(coder: LinearCoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    settings = {
        "kind": "linear",
        "activation": coder.activation.name,
        "subtract_decoder_bias": coder.subtract_decoder_bias,
        "input_norm": coder.input_norm,
        "norm_epsilon": coder.norm_epsilon,
        "skip": coder.skip is not None,
        "skip_undecided": coder.skip_undecided,
    }
    tensors = {
        "encoder": coder.encoder,
        "encoder_bias": coder.encoder_bias,
        "decoder": coder.decoder,
        "decoder_bias": coder.decoder_bias,
        **({} if coder.skip is None else {"skip": coder.skip}),
        **coder.activation.tensors,
    }
    return settings, tensors


def _neuron_parts(coder: NeuronCoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    settings = {
        "kind": "neurons",
        "signs": coder.signs,
        "threshold": coder.threshold,
        "rotated": coder.rotation is not None,
    }
    return settings, {} if coder.rotation is None else {"rotation": coder.rotation}


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors on the CPU of which none shares memory with another, as safetensors wants them."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        found[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return found


def _built(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str, *, content: str | None
) -> LinearCoder | NeuronCoder:
    """Return the coder that settings and weights describe."""
    import torch

    point, target = _points(settings, where)
    name, base = text(settings, "name", where) or point[0], text(settings, "base_model", where)
    if settings["kind"] == "neurons":
        dtype = getattr(torch, str(settings.get("dtype")), None)
        return NeuronCoder(
            name=name,
            hookpoint=point[0],
            side=point[1],
            d=integer(settings, "d_in", where),
            k=_k(settings, where),
            rotation=tensors.get("rotation"),
            signs=settings.get("signs", "positive"),
            threshold=_real(settings, "threshold", where),
            base_model=base,
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
            content=content,
        )
    return LinearCoder(
        name=name,
        hookpoint=point[0],
        side=point[1],
        target=target,
        encoder=tensors["encoder"],
        encoder_bias=tensors["encoder_bias"],
        decoder=tensors["decoder"],
        decoder_bias=tensors["decoder_bias"],
        activation=_ACTIVATIONS[_activation(settings, where)](_k(settings, where) or 0, tensors),
        subtract_decoder_bias=flag(settings, "subtract_decoder_bias", where),
        input_norm=settings.get("input_norm", "none"),
        norm_epsilon=_real(settings, "norm_epsilon", where),
        skip=tensors.get("skip"),
        skip_undecided=flag(settings, "skip_undecided", where),
        base_model=base,
        content=content,
    )


def _settings(repository: Repository, place: Place) -> tuple[Mapping[str, Any], str]:
    """Return the settings of a place and what errors call them."""
    where = repository.where(place.files[0])
    for file in place.files:
        if file not in repository:
            raise NotFoundError(f"there is no {repository.where(file)}; a coder is {CONFIG} and {WEIGHTS}, copy both")
    settings = repository.settings(place.files[0])
    number = integer(settings, "format", where)
    if number > FORMAT:
        raise InputError(
            f"{where} was written by a newer exegete (format {number}, this one reads up to {FORMAT}); upgrade with: "
            f"pip install --upgrade exegete"
        )
    if settings.get("kind") not in ("linear", "neurons"):
        raise InputError(f"{where} has the kind {settings.get('kind')!r}; allowed: linear, neurons")
    return settings, where


def _held(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the names of the tensors that belong to a coder."""
    return tuple(_shapes(settings, where))


def _shapes(settings: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    d_in, d_out = integer(settings, "d_in", where), integer(settings, "d_out", where)
    width = integer(settings, "width", where)
    if settings["kind"] == "neurons":
        if (d_out, width) != (d_in, d_in * (2 if settings.get("signs") == "both" else 1)):
            raise CorruptError(f"{where} says {d_in} neurons are {width} latents of {d_out} dimensions")
        return {"rotation": (d_in, d_in)} if flag(settings, "rotated", where) else {}
    return {
        "encoder": (width, d_in),
        "encoder_bias": (width,),
        "decoder": (width, d_out),
        "decoder_bias": (d_out,),
        **({"skip": (d_out, d_in)} if flag(settings, "skip", where) else {}),
        **dict.fromkeys(_PARAMETERS[_activation(settings, where)], (width,)),
    }


def _activation(settings: Mapping[str, Any], where: str) -> str:
    name = text(settings, "activation", where)
    if name not in _ACTIVATIONS:
        raise InputError(f"{where} has the activation {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
    return name


def _k(settings: Mapping[str, Any], where: str) -> int | None:
    needed = settings.get("activation") in ("topk", "groupmax")
    return integer(settings, "k", where) if needed or settings.get("k") is not None else None


def _real(settings: Mapping[str, Any], name: str, where: str) -> float:
    value = settings.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{where} must hold {name} as a number, it holds {value!r}")
    return float(value)


def _points(settings: Mapping[str, Any], where: str) -> tuple[Point, Point]:
    """Return where a coder reads and what it reconstructs."""
    given = settings.get("target")
    pair = given if isinstance(given, list) and len(given) == 2 else [None, None]
    points: list[Point] = []
    for hookpoint, side in ((settings.get("hookpoint"), settings.get("side")), pair):
        if not isinstance(hookpoint, str) or side not in get_args(Side):
            raise InputError(
                f"{where} must hold hookpoint and side (input or output), and both of the target, as text; it holds "
                f"{hookpoint!r} and {side!r}"
            )
        points.append((hookpoint, "input" if side == "input" else "output"))
    return points[0], points[1]


def _architecture(settings: Mapping[str, Any], where: str) -> str:
    if settings["kind"] == "neurons":
        top = "" if _k(settings, where) is None else "topk "
        return f"{top}neurons{' rotated' if flag(settings, 'rotated', where) else ''}"
    point, target = _points(settings, where)
    skip = " skip" if flag(settings, "skip", where) else ""
    return f"{_activation(settings, where)}{skip}{'' if target == point else ' transcoder'}"


def _threshold(settings: Mapping[str, Any], where: str) -> str | None:
    if settings["kind"] == "neurons":
        threshold = _real(settings, "threshold", where)
        return f"{threshold:g}" if threshold else None
    return "per latent" if _activation(settings, where) == "jumprelu" else None


def _ours(repository: Repository, path: str) -> bool:
    """Tell whether settings are this format's."""
    try:
        data = repository.json(path)
    except CorruptError:
        return False
    return isinstance(data, dict) and {"format", "kind", "weights"} <= data.keys()


def _place(repository: Repository, folder: str) -> Place:
    config = beside(folder, CONFIG)
    hookpoint: str | None = None
    if config in repository and _ours(repository, config):
        said = repository.settings(config).get("hookpoint")
        hookpoint = said if isinstance(said, str) else None
    label = _UNNAMEABLE.sub("_", "/".join(part for part in folder.split("/") if part and part != hookpoint))
    return Place(folder=folder, files=(config, beside(folder, WEIGHTS)), hookpoint=hookpoint, label=label)
