"""circuit-tracer's transcoder sets: ``config.yaml`` beside ``layer_0.safetensors``, ``layer_1.safetensors`` and so on.

Settings name TransformerLens hooks without ``blocks.L.``. The skip connection is applied as x · W_skipᵀ; sets that were
converted from other formats may hold it transposed, so the coder is marked for ``orientation.oriented`` to check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from exegete.coders.activations import JumpReLU, ReLU, TopK
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, beside, integer, require_shapes, text
from exegete.coders.formats.hooks import Reading, reading
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError, NotFoundError

if TYPE_CHECKING:
    import torch

CONFIG = "config.yaml"
_LAYER = re.compile(r"^layer_(\d+)\.safetensors$")
_CROSS_LAYER = re.compile(r"^W_(?:enc|dec)_\d+\.safetensors$")
_THRESHOLD = "activation_function.threshold"
_ACTIVATIONS = ("relu", "jump_relu", "jumprelu", "topk")
_QWEN = re.compile(r"qwen3-(\d+(?:\.\d+)?)b-transcoders")
_NOTE = "W_skip is applied as x · W_skipᵀ; whether its file holds it so is checked on real activations"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Hooks:
    """What the settings of a set say: the model, and where its coder of one layer reads and what it predicts."""

    model: str | None
    read: Reading
    write: Reading


@final
class CircuitTracer(CoderFormat):
    """ReLU, JumpReLU and TopK transcoders of every layer, with or without a skip connection."""

    name = "circuit-tracer"

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        """Return every layer's file beside settings, else what inspecting will refuse: a set of another kind."""
        found: list[Place] = []
        for here, files in _folders(repository, folder).items():
            config = beside(here, CONFIG)
            settings = _settings(repository, here)
            layers = [f for f in files if _LAYER.match(f)]
            if settings is None and (config in repository or not layers or beside(here, "cfg.json") in repository):
                continue
            label = here.rpartition("/")[2]
            if settings is not None and (not layers or settings.get("model_kind") == "cross_layer_transcoder"):
                found.append(Place(folder=here, files=(config,), hookpoint=None, label=label))
                continue
            for file in layers:
                # The settings are no file of any one coder: all layers share them.
                hookpoint = _hookpoint(settings, file)
                found.append(Place(folder=here, files=(beside(here, file),), hookpoint=hookpoint, label=label))
        return tuple(found)

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        """Return what settings and header say. Raises InputError or CorruptError."""
        config = _required(repository, place)
        where = repository.where(beside(place.folder, CONFIG))
        (path,) = place.files
        hooks = _hooks(config, where, _layer(path))
        header = repository.header(path)
        first = header["W_enc"].shape if "W_enc" in header else ()
        if len(first) != 2 or "log_thresholds" in header:
            names = ", ".join(sorted(header)) or "nothing"
            raise CorruptError(
                f"{repository.where(path)} is no transcoder [width, d_in] that can be read: it has {names}"
            )
        width, d_in = first
        last = header["W_dec"].shape[-1:] if "W_dec" in header else ()
        d_out = last[0] if last else d_in
        activation = _activation(config, where, _THRESHOLD in header)
        k = integer(config, "k", where) if activation == "topk" else None
        if k is not None:
            TopK(k).check(where, width)
        skip = "W_skip" in header
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (width, d_in),
            "b_enc": (width,),
            "W_dec": (width, d_out),
            "b_dec": (d_out,),
            **({"W_skip": (d_out, d_in)} if skip else {}),
            **({_THRESHOLD: (width,)} if activation == "jumprelu" else {}),
        }
        require_shapes(repository.where(path), header, shapes, "its W_enc")
        read, write = hooks.read, hooks.write
        return CoderInfo(
            format=self.name,
            architecture=f"{activation}{' skip' if skip else ''} transcoder",
            path=repository.where(path),
            hookpoint=read.hookpoint,
            side=read.side,
            target=(write.hookpoint, write.side) if write.hookpoint else None,
            d_in=d_in,
            d_out=d_out,
            width=width,
            k=k,
            threshold="per latent" if activation == "jumprelu" else None,
            base_model=hooks.model,
            dtype=header["W_enc"].dtype,
            notes=(*read.notes, *((_NOTE,) if skip else ())),
        )

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> LinearCoder:
        """Load one coder. Raises InputError or CorruptError."""
        info = self.inspect(repository, place)
        (path,) = place.files
        read = _hooks(_required(repository, place), info.path, _layer(path)).read
        if info.target is None:
            raise InputError(f"{info.path} does not say what it predicts (feature_output_hook)")
        skip, jump = " skip" in info.architecture, info.threshold is not None
        optional = (*(("W_skip",) if skip else ()), *((_THRESHOLD,) if jump else ()))
        held = repository.tensors(path, ("W_enc", "b_enc", "W_dec", "b_dec", *optional))
        return LinearCoder(
            name=name,
            hookpoint=hookpoint,
            encoder=held["W_enc"],
            encoder_bias=held["b_enc"],
            decoder=held["W_dec"],
            decoder_bias=held["b_dec"],
            activation=JumpReLU(held[_THRESHOLD]) if jump else TopK(info.k) if info.k else ReLU(),
            side=info.side,
            target=info.target,
            input_norm=read.input_norm,
            norm_epsilon=read.norm_epsilon,
            skip=held.get("W_skip"),
            skip_undecided=skip and info.d_in == info.d_out,
            base_model=info.base_model,
        ).to(device, dtype)


def _folders(repository: Repository, folder: str) -> dict[str, list[str]]:
    """Return the folders that may be a set, with the names of their files."""
    found: dict[str, list[str]] = {}
    for path in repository.under(folder):
        here, _, file = path.rpartition("/")
        if file == CONFIG or _LAYER.match(file) or _CROSS_LAYER.match(file):
            found.setdefault(here, []).append(file)
    return found


def _settings(repository: Repository, folder: str) -> Mapping[str, Any] | None:
    """Return the settings of a set, None where there are none or those of something else."""
    path = beside(folder, CONFIG)
    if path not in repository:
        return _unwritten(repository)
    try:
        config = repository.yaml(path)
    except CorruptError:
        return None
    return config if isinstance(config, dict) and {"feature_input_hook", "model_kind"} & config.keys() else None


def _unwritten(repository: Repository) -> Mapping[str, Any] | None:
    """Return settings for the one published set that has none; second-hand, from SAELens."""
    match = _QWEN.search(repository.name.lower())
    if not match:
        return None
    return {
        "model_kind": "transcoder_set",
        "model_name": f"Qwen/Qwen3-{match[1]}B",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }


def _required(repository: Repository, place: Place) -> Mapping[str, Any]:
    """Return the settings of a coder that can be read. Raises InputError or CorruptError."""
    path = beside(place.folder, CONFIG)
    config, where = _settings(repository, place.folder), repository.where(path)
    if config is None:
        if path in repository:
            raise CorruptError(f"{where} does not hold the settings of a transcoder set")
        raise NotFoundError(f"there is no {where}, only weights; copy the settings as well")
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise InputError(
            f"{where} is of kind {kind!r}; only a transcoder_set can be read, whose coders write to one layer each"
        )
    if place.files == (path,):
        listed = config.get("transcoders")
        first = f": load those themselves, such as {listed[0]}" if isinstance(listed, list) and listed else ""
        raise NotFoundError(f"{where} has no layer_N.safetensors beside it, its coders lie elsewhere{first}")
    return config


def _hooks(config: Mapping[str, Any], where: str, layer: int) -> _Hooks:
    model = text(config, "model_name", where)
    read, write = text(config, "feature_input_hook", where), text(config, "feature_output_hook", where)
    if read is None or write is None:
        raise InputError(f"{where} must hold feature_input_hook and feature_output_hook, such as hook_mlp_out")
    return _Hooks(model=model, read=reading(read, layer, model), write=reading(write, layer, model))


def _hookpoint(config: Mapping[str, Any] | None, file: str) -> str | None:
    try:
        return _hooks(config or {}, "", _layer(file)).read.hookpoint
    except InputError:
        return None


def _layer(path: str) -> int:
    match = _LAYER.match(path.rpartition("/")[2])
    return int(match[1]) if match else 0


def _activation(config: Mapping[str, Any], where: str, thresholds: bool) -> str:
    name = text(config, "activation", where, "jump_relu" if thresholds else "relu")
    if name not in _ACTIVATIONS or (name.startswith("jump") != thresholds):
        held = "with" if thresholds else "without"
        allowed = ", ".join(_ACTIVATIONS)
        raise InputError(f"{where} has the activation {name!r}, its weights are {held} thresholds; allowed: {allowed}")
    return name.replace("_", "")
