"""What a subject is: its sizes, where it can be read, what it carries from token to token, and how exactly it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, final

import torch

from exegete.errors import InputError
from exegete.subjects.sites import n_blocks, site_point
from exegete.subjects.subject import Subject
from exegete.subjects.verdicts import Verdict, verdict

_TOKENS = 5
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hookpoints:
    """Hookpoints that differ only in numbers.

    Attributes:
        pattern: The glob that stands for them, ``layers.*.mlp``.
        count: How many there are.
        d: Size of the output of the first one that a pass runs; None where none puts out activations per token.
    """

    pattern: str
    count: int
    d: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectInfo:
    """What a subject is.

    Attributes:
        name: What it was loaded by.
        family: Model type of transformers.
        architecture: Class of the model.
        parameters: Numbers in its weights, shared ones once.
        dtype: Of the weights.
        device: Where token ids go.
        vocabulary: Rows of the embedding.
        tokens: Tokens that the tokenizer knows.
        context: The most tokens of a row that the model was made for; None where nothing limits it.
        blocks: Number of blocks L: sites go from −1 to L − 1; None for a model without a list of blocks.
        d: Size of the residual stream, None likewise.
        hookpoints: Where it can be read, in the model's order.
        verdict: How exactly it carries its state; None where it was not tried.
    """

    name: str
    family: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    vocabulary: int
    tokens: int
    context: int | None
    blocks: int | None
    d: int | None
    hookpoints: tuple[Hookpoints, ...]
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, errors of what failed as None."""
        found = asdict(self)
        if self.verdict is not None:
            trial = asdict(self.verdict).items()
            found["verdict"] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in trial}
        return found


def inspect_subject(subject: Subject, *, tried: bool = True) -> SubjectInfo:
    """Return what a subject is; ``tried`` also has it run beside itself, token by token against whole passes."""
    model = subject.model
    try:
        blocks: int | None = n_blocks(subject)
    except InputError:
        blocks = None
    groups = _grouped(subject.hookpoints())
    sizes = _sizes(subject, [name for names in groups.values() for name in names])
    found = tuple(
        Hookpoints(pattern=pattern, count=len(names), d=next((sizes[name] for name in names if name in sizes), None))
        for pattern, names in groups.items()
    )
    return SubjectInfo(
        name=subject.name,
        family=str(model.config.model_type),
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        dtype=str(subject.dtype).removeprefix("torch."),
        device=str(subject.device),
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        tokens=len(subject.tokenizer),
        context=subject.context,
        blocks=blocks,
        d=None if blocks is None else subject.d(*site_point(subject, 0)),
        hookpoints=found,
        verdict=verdict(subject) if tried else None,
    )


def _grouped(hookpoints: Sequence[str]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in hookpoints:
        found.setdefault(_NUMBER.sub("*", name), []).append(name)
    return found


@torch.no_grad()
def _sizes(subject: Subject, names: Sequence[str]) -> dict[str, int]:
    """Return the last dimension of what each module puts out per token, in one pass over a few."""
    base = subject.model.base_model
    found: dict[str, int] = {}

    def note(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if torch.is_tensor(first) and first.is_floating_point() and _per_token(first):
            found.setdefault(name, int(first.shape[-1]))

    modules = dict(base.named_modules())
    handles = [modules[name].register_forward_hook(partial(note, name)) for name in names]
    try:
        base(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long, device=subject.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _per_token(output: torch.Tensor) -> bool:
    """Whether a tensor is [1, tokens, d]; experts see rows flattened, [tokens, d]."""
    return tuple(output.shape[:-1]) in ((1, _TOKENS), (_TOKENS,))
