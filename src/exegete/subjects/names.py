"""Hookpoint names: the canonical spelling, and the other spellings that are understood.

Canonical is the Hugging Face module name relative to the base model, with a side: ``layers.3`` (output) is the
residual stream after layer 3, ``layers.3.mlp`` (input) what its MLP reads. Also understood:

- the same with the prefix of the whole model: ``model.layers.3``, ``transformer.h.3``, ``gpt_neox.layers.3``;
- globs, segment by segment: ``layers.*`` names the layers only, ``layers.*.mlp`` their MLPs;
- TransformerLens: ``blocks.3.hook_resid_post`` and the like, a glob for the number included;
- Neuronpedia sources: ``10-gemmascope-res-16k``, with or without ``gemma-2-2b/`` before it.

``hook_resid_pre`` of layer L is the output of layer L − 1, as in TransformerLens, and for L = 0 the input of layer 0.
Where a model norms a branch before adding it (Gemma 2, OLMo 2), ``hook_mlp_out`` and ``hook_attn_out`` are the outputs
of those norms. Neuronpedia's ``res-jb`` sets read ``hook_resid_pre``; its ``att`` sets read the flattened heads
(``hook_z``), except Llama Scope's, which read ``hook_attn_out``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from exegete.errors import InputError, NotFoundError, unknown
from exegete.types import Side

Point = tuple[str, Side]
"""A hookpoint and the side of its module."""

PREFIXES = ("model", "transformer", "gpt_neox", "backbone", "rwkv", "base_model", "language_model")
_STACK = re.compile(r"^((?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks))\.(\d+)(?:\.|$)")
_OTHER_SENSES = re.compile(r"(?:^|[._])(?:vision|visual|audio|speech|encoder|vae)")
_LENS = re.compile(r"^blocks\.([^.]+)\.(hook_\w+|(?:mlp|attn|ln2)\.hook_\w+)$")
_SOURCE = re.compile(r"^(?:[\w.-]+/)?(\d+)-([\w.-]+)$")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "shared_transformer.feed_forward", "shared_mlp")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "mixer", "linear_attn", "temporal_block")
_MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "value", "w2", "proj_down", "fc2", "fc_out", "output_linear")
_SHARED = ("shared_expert", "shared_experts")
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "pre_ff_layernorm")
_HEADS_OUT = ("o_proj", "c_proj", "dense", "out_proj", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "embeddings", "word_embeddings")
LENS_HOOKS = (
    "hook_resid_pre",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
    "mlp.hook_in",
    "mlp.hook_post",
    "hook_resid_mid",
    "attn.hook_z",
)
"""TransformerLens hooks that have a Hugging Face counterpart, after ``blocks.L.``."""


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return the sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name))


def expand(pattern: str, known: Sequence[str], *, side: Side = "output", prefix: str = "") -> tuple[Point, ...]:
    """Return the hookpoints that a name or glob stands for, in natural layer order.

    Args:
        pattern: What was given, in any spelling.
        known: Canonical names that exist, module names or the folders of a coder repository.
        side: The side of spellings that do not fix one; TransformerLens and Neuronpedia spellings do.
        prefix: Name of the base model inside the whole model.

    Raises:
        NotFoundError: When nothing matches, with the nearest names.
    """
    names = set(known)
    for spelling in _spellings(pattern, known, prefix):
        if spelling in names:
            return ((spelling, side),)
        found = sorted((n for n in known if _glob(n, spelling)), key=natural) if _is_glob(spelling) else []
        if found:
            return tuple((n, side) for n in dict.fromkeys(found))
    translated = _lens(pattern, known) or _source(pattern, known)
    if translated:
        return translated
    if pattern.endswith("ln2.hook_normalized"):
        raise NotFoundError(
            f"no module has the activations of TransformerLens's {pattern!r}, the normed residual stream without the "
            f"norm's gain; the MLP reads it with the gain: mlp.hook_in"
        )
    if re.search(r"(?:^|\.)hook_\w+$", pattern):
        allowed = ["hook_embed", *(f"blocks.L.{hook}" for hook in LENS_HOOKS)]
        raise NotFoundError(
            f"no hookpoint of this model is TransformerLens's {pattern!r}; understood are {', '.join(allowed)}, "
            f"with L a layer of the model"
        )
    raise unknown("hookpoint", pattern, known)


def _spellings(pattern: str, known: Sequence[str], prefix: str) -> Iterable[str]:
    """Yield the pattern as given, without a prefix of the whole model, and inside a wrapper such as a vision model."""
    yield pattern
    for before in (prefix, *PREFIXES):
        if before and pattern.startswith(f"{before}."):
            yield pattern.removeprefix(f"{before}.")
    stack = _stack(known)
    if stack and "." in stack:
        yield f"{stack.rpartition('.')[0]}.{pattern}"


def _is_glob(pattern: str) -> bool:
    return any(c in pattern for c in "*?[")


def _glob(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _stack(known: Iterable[str]) -> str | None:
    """Return the name of the list of layers of the language model, ``layers`` or ``h`` or ``language_model.layers``."""
    stacks = dict.fromkeys(match[1] for match in map(_STACK.match, known) if match)
    return next((s for s in stacks if not _OTHER_SENSES.search(s)), next(iter(stacks), None))


def layers(known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the language model's layers in order, ``layers.0`` first; empty when it has no such list."""
    stack = _stack(known)
    return tuple(f"{stack}.{layer}" for layer in _layers(known, stack)) if stack else ()


def neurons(name: str, known: Sequence[str]) -> str:
    """Return the down projection of an MLP, whose input is the MLP's neurons after the nonlinearity (and the gate).

    ``name`` is canonical: a layer, its MLP (or the norm of the MLP's output, which is what ``hook_mlp_out`` names in
    some models), or the down projection itself. The expert that a mixture always runs counts when it is named.

    Raises InputError when there is none, or a mixture of experts, whose neurons differ from token to token.
    """
    names = set(known)
    match = _STACK.match(name)
    layer = f"{match[1]}.{match[2]}" if match else ""
    whole = name in (layer, f"{layer}.post_feedforward_layernorm")
    found = [mlp for mlp in _mlps(layer, names) if whole or mlp == name or name in _outs(mlp, names)]
    if found and not (whole and _mixtures(layer, names)):
        return _outs(found[0], names)[0]
    mixtures = _mixtures(layer, names) if whole else _mixtures(name, names)
    if mixtures:
        raise InputError(
            f"{mixtures[0]!r} is a mixture of experts, whose neurons differ from token to token; "
            f"name a layer with a dense MLP, or read the output of {mixtures[0]!r}"
        )
    if any(_mlps(each, names) for each in layers(known)):
        raise InputError(f"{name!r} holds no MLP; name a layer that has one, such an MLP, or its down projection")
    raise InputError(f"{name!r} holds no MLP, nor does any layer of this model; name a hookpoint and its side instead")


def _mlps(layer: str, names: set[str]) -> list[str]:
    """Return the MLPs of one layer that have one set of neurons, those that are not its main one last."""
    inner = [f"{layer}.{mlp}" for mlp in _MLP]
    inner += [f"{layer}.mixer"] if f"{layer}.mixer.up_proj" in names else []  # the MLP layers of Nemotron-H
    inner += [layer] if f"{layer}.fc1" in names else []  # OPT's lies in the layer itself
    inner += [f"{layer}.{mlp}.{shared}" for mlp in _MLP for shared in _SHARED]
    return [mlp for mlp in inner if _outs(mlp, names)]


def _outs(mlp: str, names: set[str]) -> list[str]:
    return [f"{mlp}.{out}" for out in _MLP_OUT if f"{mlp}.{out}" in names]


def _mixtures(at: str, names: set[str]) -> list[str]:
    """Return the mixtures of experts at or directly in a module."""
    return [m for m in (at, *(f"{at}.{mlp}" for mlp in _MLP)) if f"{m}.experts" in names]


def _layers(known: Iterable[str], stack: str) -> list[int]:
    matches = (match for match in map(_STACK.match, known) if match and match[1] == stack)
    return sorted({int(match[2]) for match in matches})


def _lens(pattern: str, known: Sequence[str]) -> tuple[Point, ...]:
    """Translate a TransformerLens name; nothing when it is none or has no counterpart here."""
    if pattern == "hook_embed":
        names = [n for n in known if n.rpartition(".")[2] in _EMBEDDINGS and not _OTHER_SENSES.search(n)]
        return ((names[0], "output"),) if names else ()
    match = _LENS.match(pattern)
    stack = _stack(known)
    if not match or stack is None:
        return ()
    layers = _layers(known, stack)
    if match[2] == "hook_resid_pre" and layers and match[1].isdecimal():
        layers.append(layers[-1] + 1)  # Neuronpedia and SAELens call the last output the input of a layer after it
    chosen = [layer for layer in layers if fnmatch.fnmatchcase(str(layer), match[1])]
    found = (_hook(stack, layer, match[2], set(known)) for layer in chosen)
    return tuple(dict.fromkeys(point for point in found if point))


def _source(pattern: str, known: Sequence[str]) -> tuple[Point, ...]:
    """Translate a Neuronpedia source id; nothing when it is none."""
    match = _SOURCE.match(pattern)
    stack = _stack(known)
    if not match or stack is None:
        return ()
    parts = match[2].partition("__")[0].split("-")
    if "res" in parts:
        hook = "hook_resid_pre" if parts[:2] == ["res", "jb"] else "hook_resid_post"
    elif "mlp" in parts:
        hook = "hook_mlp_out"
    elif "att" in parts:
        hook = "hook_attn_out" if parts[0].startswith("llamascope") else "attn.hook_z"
    elif "transcoder" in parts:
        hook = "mlp.hook_in"
    else:
        return ()
    point = _hook(stack, int(match[1]), hook, set(known))
    return (point,) if point else ()


def _hook(stack: str, layer: int, hook: str, known: set[str]) -> Point | None:
    """Return the point of one TransformerLens hook at one layer, None when the model has no such module."""
    here = f"{stack}.{layer}"
    normed = f"{here}.post_feedforward_layernorm" in known
    candidates: list[str] = []
    side: Side = "output"
    if hook == "hook_resid_post":
        candidates = [here]
    elif hook == "hook_resid_pre" and layer > 0:
        candidates = [f"{stack}.{layer - 1}"]
    elif hook == "hook_resid_pre":
        candidates, side = [here], "input"
    elif hook == "hook_mlp_out":
        candidates = [f"{here}.{m}" for m in (("post_feedforward_layernorm",) if normed else _MLP)]
    elif hook == "hook_attn_out":
        candidates = [f"{here}.{m}" for m in (("post_attention_layernorm",) if normed else _ATTENTION)]
    elif hook == "hook_resid_mid":
        candidates, side = (
            [f"{here}.{m}" for m in _BEFORE_MLP if not (normed and m == "post_attention_layernorm")],
            "input",
        )
    elif hook == "mlp.hook_in":
        candidates, side = [f"{here}.{m}" for m in _MLP], "input"
    elif hook == "mlp.hook_post" and not _mixtures(here, known):
        candidates, side = [f"{here}.{m}.{out}" for m in _MLP for out in _MLP_OUT], "input"
    elif hook == "attn.hook_z":
        candidates, side = [f"{here}.{m}.{out}" for m in _ATTENTION for out in _HEADS_OUT], "input"
    return next(((name, side) for name in candidates if name in known), None)
