"""TransformerLens hooks around the MLP that no module of a Hugging Face model outputs, and what to read instead.

``hook_resid_mid`` is the input of the norm before the MLP. ``ln2.hook_normalized`` of a model with RMSNorm is that
input divided by its root mean square, *before* the norm's gain (TransformerLens's ``RMSNorm``), whereas the MLP reads
it after the gain: a coder of it reads the input of the norm and norms it itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from exegete.coders.linear import InputNorm
from exegete.errors import InputError
from exegete.types import Side

LENS = re.compile(r"^blocks\.(\d+)\.(.+)$")
_EPSILON = 1e-6
_UNSCALED = (
    "trained on the MLP's input before the norm's gain: reads the input of {where}, divided by its root mean square"
)


@final
@dataclass(frozen=True, slots=True)
class _Family:
    """Names of one family of models; ``epsilon`` is that of its RMSNorm, None where it has LayerNorm."""

    pattern: re.Pattern[str]
    norm: str
    mlp: str
    epsilon: float | None


_FAMILIES = (
    _Family(re.compile(r"gemma-?[23]"), "layers.{}.pre_feedforward_layernorm", "layers.{}.mlp", 1e-6),
    _Family(re.compile(r"llama-?_?3"), "layers.{}.post_attention_layernorm", "layers.{}.mlp", 1e-5),
    _Family(re.compile(r"gpt-oss"), "layers.{}.post_attention_layernorm", "layers.{}.mlp", 1e-5),
    _Family(re.compile(r"qwen-?[23]"), "layers.{}.post_attention_layernorm", "layers.{}.mlp", 1e-6),
    _Family(re.compile(r"gpt-?2"), "h.{}.ln_2", "h.{}.mlp", None),
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What to read for one hook: point, norm, and what a user should know. ``hookpoint`` is None where unknown."""

    hookpoint: str | None
    side: Side
    input_norm: InputNorm = "none"
    norm_epsilon: float = _EPSILON
    notes: tuple[str, ...] = ()


def reading(hook: str, layer: int, model: str | None) -> Reading:
    """Return what to read for a hook, written without ``blocks.L.``, of a model known by name.

    Raises InputError for ``ln2.hook_normalized`` of a model with LayerNorm, which means different things in different
    versions of TransformerLens.
    """
    family = next((f for f in _FAMILIES if model and f.pattern.search(model.lower())), None)
    norm = family.norm.format(layer) if family else None
    if hook in ("hook_resid_mid", "hook_mlp_in"):
        notes = () if norm else ("reads the residual stream before the MLP: name the norm in front of the MLP",)
        return Reading(hookpoint=norm, side="input", notes=notes)
    if hook == "ln2.hook_normalized":
        if family and family.epsilon is None:
            raise InputError(f"{hook!r} of {model} depends on how TransformerLens folded its norms; it cannot be read")
        return Reading(
            hookpoint=norm,
            side="input",
            input_norm="rms_norm",
            norm_epsilon=_EPSILON if family is None or family.epsilon is None else family.epsilon,
            notes=(_UNSCALED.format(where=norm or "its hookpoint, which must be the RMSNorm in front of the MLP"),),
        )
    if hook == "mlp.hook_out":
        return Reading(hookpoint=(family.mlp if family else "layers.{}.mlp").format(layer), side="output")
    return Reading(hookpoint=f"blocks.{layer}.{hook}", side="output")


def lens_reading(hook: str, model: str | None) -> Reading:
    """Return what to read for a full TransformerLens name such as ``blocks.8.hook_resid_post``. As ``reading``."""
    match = LENS.match(hook)
    return reading(match[2], int(match[1]), model) if match else Reading(hookpoint=hook, side="output")
