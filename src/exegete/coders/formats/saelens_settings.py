"""SAELens's ``cfg.json``: the nested one of version 6 and later, and the flat ones before.

What version 6 writes and what it does to older settings is followed: ``hook_point`` is ``hook_name``,
``activation_fn_str`` is ``activation_fn``, a missing architecture is ``standard``, ``topk`` as activation function is
the architecture, and ``normalize_activations: true`` is ``expected_average_only_in``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from exegete.coders.coder import Point
from exegete.coders.formats.format import flag, integer, text
from exegete.coders.formats.hooks import Reading, lens_reading
from exegete.coders.linear import InputNorm
from exegete.errors import CorruptError, InputError
from exegete.types import Side

CONFIG = "cfg.json"
NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")
_INPUT_NORMS: dict[str, InputNorm] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Where the residual stream is read or written: what a model with centred writing weights has no mean in.
_STREAM = re.compile(r"(?:^|\.)hook_(?:resid_(?:pre|mid|post)|attn_(?:in|out)|mlp_(?:in|out)|out|embed|pos_embed)$")
# TransformerLens centres the writing weights of models with LayerNorm and of no others.
_LAYER_NORMED = re.compile(
    r"(?:distil)?gpt-?2|gpt-?neo|gpt-?j|pythia|opt-\d|bloom|tiny-?stories|phi-[12](?!\d)|stablelm-base|santacoder"
    r"|(?:gelu|solu|attn-only)-\d",
    re.IGNORECASE,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What one of SAELens's architectures is: how its latents fire, and whether it predicts another point."""

    activation: str
    transcoder: bool = False
    skip: bool = False


ARCHITECTURES = {
    "standard": Architecture(activation="relu"),
    "gated": Architecture(activation="gated"),
    "jumprelu": Architecture(activation="jumprelu"),
    "topk": Architecture(activation="topk"),
    "batchtopk": Architecture(activation="batchtopk"),
    "matryoshka_batchtopk": Architecture(activation="batchtopk"),
    "transcoder": Architecture(activation="relu", transcoder=True),
    "skip_transcoder": Architecture(activation="relu", transcoder=True, skip=True),
    "jumprelu_transcoder": Architecture(activation="jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": Architecture(activation="jumprelu", transcoder=True, skip=True),
}
"""Every architecture that is read, by SAELens's name."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A ``cfg.json`` of any version.

    ``norm`` is one of ``NORMS``; ``scale`` is what inputs are multiplied by under ``expected_average_only_in``, None
    where the settings do not say. ``rescale``: pre-activations are multiplied by the decoder norms and the values
    divided by them. ``tuned``: the values are multiplied by learnt factors before decoding. ``centred``: it was made
    on activations without their mean, as those of a model whose writing weights are centred. ``hookpoint`` and
    ``side`` are what to read, ``input_norm`` and ``norm_epsilon`` what to do to each input first. ``notes`` is what a
    user should know of how it was made.
    """

    architecture: Architecture
    d_in: int
    d_out: int
    width: int
    k: int | None
    subtract: bool
    norm: str
    scale: float | None
    rescale: bool
    tuned: bool
    centred: bool
    hookpoint: str | None
    side: Side
    input_norm: InputNorm
    norm_epsilon: float
    target: Point | None
    base_model: str | None
    notes: tuple[str, ...]


def place_hookpoint(config: Mapping[str, Any]) -> str | None:
    """Return what the coder of these settings reads, None when they name nothing that can be read."""
    found = _flat(config)
    try:
        return _read(found, "hook_name", "the settings").hookpoint
    except InputError:
        return None


def parse(config: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of one coder; ``where`` names their file.

    Raises InputError for an architecture or a way to read activations that is not supported, and for values that
    cannot be; CorruptError for metadata that are none.
    """
    if not isinstance(config.get("metadata", {}), dict):
        raise CorruptError(f"{where} holds metadata that are no settings")
    found = _flat(config)
    name, architecture = _architecture(found, where)
    d_in, width = integer(found, "d_in", where), integer(found, "d_sae", where)
    norm = _norm(found, where, architecture)
    subtract = flag(found, "apply_b_dec_to_input", where, not architecture.transcoder)
    if subtract and architecture.transcoder:
        raise InputError(f"{where}: a transcoder cannot subtract its decoder bias; set apply_b_dec_to_input to false")
    _require_all_heads(found, where)
    read = _read(found, "hook_name", where)
    if read.input_norm != "none" and not architecture.transcoder:
        raise InputError(f"{where} has an autoencoder of {found['hook_name']}, which no module outputs; it is not read")
    centred, notes = _made(found, where)
    return Settings(
        architecture=architecture,
        d_in=d_in,
        d_out=integer(found, "d_out", where, d_in) if architecture.transcoder else d_in,
        width=width,
        k=_k(found, where) if architecture.activation == "topk" else None,
        subtract=subtract,
        norm=norm,
        scale=_scale(found, where) if norm == "expected_average_only_in" else None,
        rescale=architecture.activation in ("topk", "batchtopk")
        and flag(found, "rescale_acts_by_decoder_norm", where, architecture.activation == "batchtopk"),
        tuned=flag(found, "finetuning_scaling_factor", where),
        centred=centred,
        hookpoint=read.hookpoint,
        side=read.side,
        input_norm=_INPUT_NORMS.get(norm, read.input_norm),
        norm_epsilon=read.norm_epsilon,
        target=_target(found, where) if architecture.transcoder else None,
        base_model=text(found, "model_name", where),
        notes=(*_trained(found, name), *read.notes, *notes),
    )


def positive(value: Any, name: str, where: str) -> float:
    """Return a positive finite number. Raises InputError for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise InputError(f"{where} must hold {name} as a positive number, it holds {value!r}")
    return float(value)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in one table under today's names; what is null is left out."""
    metadata = config.get("metadata")
    outer = {_OLD_NAMES.get(key, key): value for key, value in config.items() if key != "metadata"}
    both = {**metadata, **outer} if isinstance(metadata, dict) else outer
    return {key: value for key, value in both.items() if value is not None}


def _architecture(found: Mapping[str, Any], where: str) -> tuple[str, Architecture]:
    name = found.get("architecture", "standard")
    activation = found.get("activation_fn") or "relu"
    # Before version 6 the activation function was chosen beside the architecture; later settings do not have it.
    if name in ("standard", "topk") and activation == "topk":
        name = "topk"
    elif name == "standard" and activation != "relu":
        raise InputError(f"{where} has the activation function {activation!r}; allowed: relu, topk")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{where} has the architecture {name!r}, which is not read; read are {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def _norm(found: Mapping[str, Any], where: str, architecture: Architecture) -> str:
    norm = found.get("normalize_activations")
    if norm is None or norm is False:
        return "none"
    if norm is True:
        return "expected_average_only_in"
    if norm not in NORMS:
        raise InputError(f"{where} has normalize_activations {norm!r}; allowed: {', '.join(NORMS)}")
    if architecture.transcoder and norm not in ("none", "expected_average_only_in"):
        # A transcoder's output is not normed, so what SAELens would have undone after decoding is undefined.
        raise InputError(f"{where} has a transcoder with normalize_activations {norm}, which is not read")
    return str(norm)


def _scale(found: Mapping[str, Any], where: str) -> float | None:
    for name in ("norm_scaling_factor", "scaling_factor"):
        if found.get(name) is not None:
            return positive(found[name], name, where)
    return None


def _k(found: Mapping[str, Any], where: str) -> int:
    options = found.get("activation_fn_kwargs")
    if found.get("k") is None and isinstance(options, dict):
        return integer(options, "k", f"activation_fn_kwargs of {where}")
    return integer(found, "k", where)


def _require_all_heads(found: Mapping[str, Any], where: str) -> None:
    shape = found.get("reshape_activations", "none")
    if shape not in (None, "none", "hook_z"):
        raise InputError(f"{where} has reshape_activations {shape!r}; allowed: none, hook_z")
    for name in ("hook_head_index", "hook_head_index_out"):
        if found.get(name) is not None:
            raise InputError(
                f"{where} has {name} {found[name]!r}: a coder of one attention head is not read, only one of all heads"
            )


def _read(found: Mapping[str, Any], key: str, where: str) -> Reading:
    """Return what to read for the hook under a key, or for the Hugging Face module under the key's other spelling."""
    name = text(found, key, where)
    if name:
        return lens_reading(name, text(found, "model_name", where))
    module = text(found, f"hf_{key}", where)
    before, _, last = (module or "").rpartition(".")
    side: Side = "input" if last == "input" else "output"
    return Reading(hookpoint=before if before and last in ("input", "output") else module, side=side)


def _target(found: Mapping[str, Any], where: str) -> Point:
    read = _read(found, "hook_name_out", where)
    if not read.hookpoint or read.input_norm != "none":
        raise InputError(
            f"{where} holds a transcoder and does not say what it predicts; add hook_name_out to its metadata, such as "
            f"blocks.3.hook_mlp_out"
        )
    return read.hookpoint, read.side


def _made(found: Mapping[str, Any], where: str) -> tuple[bool, tuple[str, ...]]:
    """Return whether it was made on centred activations, and what a user should know of how it was made."""
    notes = []
    options = found.get("model_from_pretrained_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError(f"{where} must hold model_from_pretrained_kwargs as settings, it holds {options!r}")
    centred = options.get("center_writing_weights") is True and bool(
        _STREAM.search(text(found, "hook_name", where) or "")
    )
    if centred and not _LAYER_NORMED.search(text(found, "model_name", where) or ""):
        centred = False
        notes.append("made with centred writing weights, which are taken to change nothing: its model has no LayerNorm")
    changed = sorted(str(name) for name, value in options.items() if value is True and name != "center_writing_weights")
    if changed:
        notes.append(f"made on a model changed by {', '.join(changed)}, whose activations may differ")
    if isinstance(found.get("context_size"), int):
        notes.append(f"made on rows of {found['context_size']} tokens")
    if isinstance(found.get("prepend_bos"), bool):
        notes.append(f"made {'with' if found['prepend_bos'] else 'without'} a beginning-of-sequence token in every row")
    if found.get("exclude_special_tokens"):
        notes.append("made without the activations of special tokens")
    positions = found.get("seqpos_slice")
    if isinstance(positions, list) and any(p is not None for p in positions):
        notes.append(f"made on the positions [{':'.join('' if p is None else str(p) for p in positions)}] of every row")
    return centred, tuple(notes)


def _trained(found: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Say that a coder fires by thresholds where it was trained with a number of latents per batch."""
    trained = found.get("training_architecture", name)
    if trained not in ("batchtopk", "matryoshka_batchtopk"):
        return ()
    details = found.get("training_architecture_details")
    k = details.get("k") if isinstance(details, dict) else found.get("k")
    mean = f" for {k} latents on average" if isinstance(k, (int, float)) else ""
    return (f"trained as {trained}{mean}; fires above its threshold",)
