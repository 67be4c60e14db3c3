"""E6: every family with tiny random weights: what its own code does right, and what the one interface makes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from exegete.subjects import (
    AddState,
    Running,
    StateVector,
    Subject,
    load_subject,
    n_blocks,
    residuals,
    site_point,
    verdict,
)
from exegete.testing import FAMILIES, toy_subject_model

KNOWN: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(
        ("llama", "gpt_neox", "mamba2", "recurrent_gemma", "zamba2", "falcon_h1", "qwen3_next", "lfm2"), frozenset()
    ),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), frozenset({"several"})),
    "rwkv": frozenset({"batch"}),
    "bamba": frozenset({"several", "steps", "batch"}),
}
"""The thirteen families measured beforehand, and what transformers 5.23 was found to do wrong in each: several tokens
after a prefill, single steps, single steps of several rows. RecurrentGemma's several tokens were not measured."""
UNMEASURED: Final = frozenset({("recurrent_gemma", "several")})
LINEAR: Final[Mapping[str, tuple[str, str, str]]] = {
    "mamba": ("ssm", "", "output"),
    "falcon_mamba": ("ssm", "", "output"),
    "jamba": ("ssm", "mamba", "output"),
    "mamba2": ("ssm", "mixer.norm", "input"),
    "rwkv": ("num", "attention", "output"),
    "recurrent_gemma": ("lru", "temporal_block", "output"),
    "qwen3_next": ("kv", "linear_attn.norm", "input"),
    "xlstm": ("kv", "mlstm_layer.multihead_norm", "input"),
}
"""A component of the state, and a module of block 0 with a side, where the next step is an affine function of it."""


def conformance_study(families: Sequence[str] = tuple(FAMILIES)) -> dict[str, Any]:
    """Return what was measured of each family that the installed transformers has."""
    from transformers import CONFIG_MAPPING

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            if family in CONFIG_MAPPING:
                made = toy_subject_model(family, Path(folder) / family)
                found[family] = _measured(load_subject(str(made), device="cpu"), family)
    return {"families": found, "absent": [family for family in families if family not in found]}


def _measured(subject: Subject, family: str) -> dict[str, Any]:
    found, ids = verdict(subject), _tokens()
    run = (found.mended_error, found.mended_chunk_error if found.route == "chunks" else 0.0)
    wrong = {"several": not found.chunks, "steps": not found.steps, "batch": not found.batched}
    return {
        "blocks": n_blocks(subject),
        "readout_error": found.readout_error,
        "steps_error": _finite(found.steps_error),
        "chunk_error": _finite(found.chunk_error),
        "batch_error": _finite(found.batch_error),
        "mended_error": _finite(max(run)),
        "bound": found.bound,
        "route": found.route,
        "wrong": [name for name, is_wrong in wrong.items() if is_wrong],
        "components": list(found.components),
        "layers": list(found.layers),
        "listed": _listed(subject, ids),
        "copies": _copies(subject, ids) if found.layers else None,
        "linear": unevenness(subject, *LINEAR[family]) if family in LINEAR else None,
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _tokens() -> torch.Tensor:
    return torch.randint(1, 400, (3, 10), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def _listed(subject: Subject, ids: torch.Tensor) -> str:
    """Return where in ``hidden_states`` the output of block k is: ``k``, ``k+1``, or ``nowhere``."""
    states = subject.model(input_ids=ids, use_cache=False, output_hidden_states=True).get("hidden_states")
    if not states:
        return "nowhere"
    first = residuals(subject, ids, (0,))[0]
    at = [k for k, h in enumerate(states) if h.shape == first.shape and torch.allclose(h.float(), first, atol=1e-5)]
    return {0: "k", 1: "k+1"}.get(at[0], "nowhere") if at else "nowhere"


def _copies(subject: Subject, ids: torch.Tensor) -> bool:
    """Return whether an edited copy leaves what it was copied from as it was, and a zero edit changes no bit."""
    running = Running.start(subject, ids[:, :6])
    state = running.state()
    vector = state.rows([0]).mean() - state.rows([1]).mean()
    plain = running.copy().feed(ids[:, 6:8])
    edited, nothing = running.copy(), running.copy()
    edited.edit(AddState(vector, 2.0))
    nothing.edit(AddState(vector, 0.0))
    changed = not torch.equal(edited.feed(ids[:, 6:8]), plain)
    return changed and torch.equal(nothing.feed(ids[:, 6:8]), plain) and torch.equal(running.feed(ids[:, 6:8]), plain)


def unevenness(subject: Subject, component: str, inner: str, side: str) -> float:
    """Return how far twice an edit of block 0 is from two times what it does to the next step, at a point inside."""
    ids, name = _tokens(), site_point(subject, 0)[0] + (f".{inner}" if inner else "")
    running = Running.start(subject, ids[:, :6])
    held = running.state()[0][component]
    vector = StateVector({0: {component: held.std(dim=0) + held[0]}})

    def given(multiplier: float) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = (*args, *kwargs.values())[0] if side == "input" else output
            caught.append(value[0] if isinstance(value, tuple) else value)

        copied = running.copy()
        copied.edit(AddState(vector, multiplier))
        handle = subject.model.base_model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        try:
            copied.feed(ids[:, 6:7])
        finally:
            handle.remove()
        return caught[0].double()

    base, once, twice = (given(m) for m in (0.0, 1.0, 2.0))
    return float(((twice - base) - 2 * (once - base)).norm() / (once - base).norm())
