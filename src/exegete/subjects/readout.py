"""Reading out: a residual stream → logits, by the model's own final norm and head, with what it does to logits after.

What comes after the last block is found by watching one pass, not by names, and is only accepted when it gives the
model's own logits on a fixed batch. The scales and soft caps that families put on their logits are in their configs.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
import torch

from exegete.errors import InputError
from exegete.subjects.edits import paused
from exegete.subjects.names import layers
from exegete.subjects.subject import Subject

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings c of c · tanh(logits / c): Gemma, RecurrentGemma, xLSTM."""
_TIMES = ("lm_head_multiplier", "logit_scale")
_OVER = ("logits_scaling",)
"""Settings that logits are multiplied with (Falcon-H1, Cohere) and divided by (Granite)."""
_CLOSE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF = 0.05  # of the largest logit, as _CLOSE is
_FOUND: weakref.WeakKeyDictionary[Subject, Readout] = weakref.WeakKeyDictionary()


@final
class Readout:
    """What a model makes of the output of its last block. Made by ``read_out``.

    Attributes:
        norm: The modules between the last block and the head, in order; the final norm in most families.
        error: The greatest difference between the logits it gives and the model's own, on a fixed batch.
    """

    def __init__(self, subject: Subject) -> None:
        text = subject.model.config.get_text_config()
        self._head: Any = _head(subject)
        self._caps = [float(cap) for cap in (getattr(text, name, None) for name in _CAPS) if cap][:1]
        self._scale = _scale(text)
        tokens = trial_tokens(subject, 3, 8)
        last, tail, logits = _watched(subject, tokens)
        self.norm = torch.nn.Sequential(*tail)
        self._dtype = last.dtype
        with torch.no_grad():
            found = self.logits(last)
        wanted = logits.float()
        self.error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
        self.largest = float(wanted.abs().max())

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] float32 of residual streams ``h`` [..., d], differentiable in ``h``."""
        x = self.norm(h.to(self._place, self._dtype))
        weight = self.unembedding
        logits: torch.Tensor = self._head(x.to(weight.device, weight.dtype)).float() * self._scale
        for cap in self._caps:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def unembedding(self) -> torch.Tensor:
        """The unembedding matrix [V, d], in the model's dtype."""
        found: torch.Tensor = self._head.weight
        return found

    @cached_property
    def hash(self) -> str:
        """Hash of the unembedding in float32, 64 hex digits: the ``unembed_hash`` of the tuned-lens package.

        It hashes how NumPy prints the matrix with one decimal: its corners, so it tells models apart, no more.
        """
        matrix = self.unembedding.detach().float().cpu().numpy()
        with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False, floatmode="maxprec", sign="-"):
            return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()

    @property
    def _place(self) -> torch.device:
        own: torch.Tensor = next(self.norm.parameters(), self.unembedding)
        return own.device if own.device.type != "meta" else self.unembedding.device


def read_out(subject: Subject) -> Readout:
    """Return how a subject reads out its residual stream; found once for each subject.

    Raises InputError when the model has no head, or computes its logits in a way that is not understood.
    """
    if subject not in _FOUND:
        with paused():
            found = Readout(subject)
        bound = _CLOSE.get(subject.dtype, _HALF) * max(found.largest, 1.0)
        if not found.error <= bound:
            raise InputError(
                f"the logits of {subject.name} are not its final norm and head on its last block: they differ by up to "
                f"{found.error:.3g}, {bound:.3g} is allowed; lenses cannot read this family"
            )
        _FOUND[subject] = found
    return _FOUND[subject]


def trial_tokens(subject: Subject, rows: int, length: int) -> torch.Tensor:
    """Return the same tokens [rows, length] every time, for trying a subject out."""
    vocabulary = int(subject.model.get_input_embeddings().weight.shape[0])
    return ((torch.arange(rows * length).reshape(rows, length) * 37 + 11) % vocabulary).to(subject.device)


def _head(subject: Subject) -> torch.nn.Module:
    head: torch.nn.Module | None = subject.model.get_output_embeddings()
    if head is None:
        raise InputError(f"{subject.name} has no language-model head to read logits from")
    return head


def _scale(text: Any) -> float:
    scale = 1.0
    for name in _TIMES:
        scale *= float(getattr(text, name, None) or 1.0)
    for name in _OVER:
        scale /= float(getattr(text, name, None) or 1.0)
    return scale


def _watched(subject: Subject, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.nn.Module], torch.Tensor]:
    """Return the output of the last block, the modules that it goes through one after another, and the logits.

    Candidates are the modules beside the list of blocks and beside what holds it. One is on the way when it reads
    exactly what the one before it gave.
    """
    names = layers(subject.hookpoints())
    if not names:
        raise InputError(f"{subject.name} has no list of blocks to read out")
    base: torch.nn.Module = subject.model.base_model
    stack = names[0].split(".")[:-1]
    beside: list[torch.nn.Module] = []
    for depth in range(len(stack)):
        holder = base.get_submodule(".".join(stack[:depth]))
        beside += [child for name, child in holder.named_children() if name != stack[depth]]
    seen: list[torch.Tensor] = []
    tail: list[torch.nn.Module] = []

    def last_block(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((output if torch.is_tensor(output) else output[0]).detach().clone())

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reads = next((a for a in args if torch.is_tensor(a)), None)
        if seen and reads is not None and torch.is_tensor(output) and torch.equal(reads, seen[-1].to(reads)):
            tail.append(module)
            seen.append(output.detach().clone())

    handles = [base.get_submodule(names[-1]).register_forward_hook(last_block)]
    handles += [module.register_forward_hook(after) for module in beside]
    try:
        with torch.no_grad():
            logits: torch.Tensor = subject.model(input_ids=tokens, use_cache=False)["logits"]
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], tail, logits
