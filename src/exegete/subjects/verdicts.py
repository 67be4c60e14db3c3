"""What a subject's own code does right: a trial, once for each subject, whose verdict decides how it is run.

Models of many families carry their state wrongly from one call to the next in some cases, and give plausible logits
all the same: Mamba, FalconMamba and Jamba forget the recurrent state when several tokens follow a prefill, but not the
convolution's; RWKV mixes up the rows of a batch in single steps; RecurrentGemma forgets its convolution. So nothing is
taken for granted: cached ways are compared with whole passes on fixed tokens.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch

from exegete.errors import InputError
from exegete.subjects.edits import paused
from exegete.subjects.memories import Memory, called
from exegete.subjects.memories_families import begin
from exegete.subjects.readout import Readout, trial_tokens
from exegete.subjects.subject import Subject

Route = Literal["chunks", "steps", "whole"]
"""How tokens are fed after others: several at once, one by one, or all again from the beginning."""
_EXACT, _HALF = 1e-4, 0.05  # of the largest logit, in float32 and below
_ROWS, _PREFILL, _LENGTH = 3, 5, 9
_FAILURES = (
    *(RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError),
    *(StopIteration, InputError),
)
_VERDICTS: weakref.WeakKeyDictionary[Subject, Verdict] = weakref.WeakKeyDictionary()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How exactly a subject carries its state: greatest differences of logits from whole passes, ∞ where it failed.

    Attributes:
        family: Model type of transformers.
        readout_error: Final norm and head on the output of the last block, against the model's logits.
        steps_error: A prefill, then single steps, one row at a time.
        chunk_error: A prefill, then several tokens at once, as the model has them.
        batch_error: Single steps of several rows, as the model has them.
        mended_error: Single steps of several rows as they are run here, known mistakes of the model's code mended.
        mended_chunk_error: Several tokens at once as they are run here.
        bound: Errors up to here count as exact: 10⁻⁴ of the largest logit in float32, 0.05 of it in half floats.
        chunks: Whether several tokens after a prefill are exact, as the model has them.
        steps: Whether single steps of one row are.
        batched: Whether single steps of several rows are, as the model has them.
        route: How tokens are fed after others.
        components: The components of the state, in order of their first block; none for nothing but attention.
        layers: The blocks that carry a state.
    """

    family: str
    readout_error: float
    steps_error: float
    chunk_error: float
    batch_error: float
    mended_error: float
    mended_chunk_error: float
    bound: float
    chunks: bool
    steps: bool
    batched: bool
    route: Route
    components: tuple[str, ...]
    layers: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether single steps of several rows, as they are run here, are exact."""
        return self.mended_error <= self.bound


def verdict(subject: Subject) -> Verdict:
    """Return how exactly a subject carries its state; tried out once for each subject."""
    if subject not in _VERDICTS:
        with paused():  # by whoever asks first, perhaps under an edit
            _VERDICTS[subject] = _tried(subject)
    return _VERDICTS[subject]


@torch.no_grad()
def _tried(subject: Subject) -> Verdict:
    tokens = trial_tokens(subject, _ROWS, _LENGTH)
    whole: torch.Tensor = called(subject.model, tokens, use_cache=False)["logits"].float()
    largest = float(whole.abs().max())
    exact = subject.dtype in (torch.float32, torch.float64)
    bound = (_EXACT if exact else _HALF) * max(largest, 1e-3)
    steps = _error(lambda: [torch.cat([_stepped(subject, row[None]) for row in tokens])], whole)
    batch = _error(lambda: _batched(subject, tokens, mended=False), whole)
    mended = _error(lambda: _batched(subject, tokens, mended=True), whole)
    chunk = _error(lambda: _chunked(subject, tokens, mended=False), whole)
    mended_chunk = _error(lambda: _chunked(subject, tokens, mended=True), whole)

    def carries(error: float) -> bool:
        """In half floats a forgotten state may differ by less than the bound, though by more than steps do."""
        return error <= bound and (exact or error <= 4 * mended)

    together = mended <= bound
    components, blocks = _carried(subject, tokens)
    return Verdict(
        family=str(subject.model.config.model_type),
        readout_error=_readout_error(subject),
        steps_error=steps,
        chunk_error=chunk,
        batch_error=batch,
        mended_error=mended,
        mended_chunk_error=mended_chunk,
        bound=bound,
        chunks=carries(chunk),
        steps=steps <= bound,
        batched=batch <= bound,
        route="whole" if not together else "chunks" if carries(mended_chunk) else "steps",
        components=components if together else (),
        layers=blocks if together else (),
    )


def _error(run: Callable[[], Sequence[torch.Tensor]], whole: torch.Tensor) -> float:
    """Return the greatest difference of some last logits from those of whole passes, in any of several trials."""
    try:
        trials = [found.float() for found in run()]
    except _FAILURES:
        return math.inf  # a cache of a kind of its own
    wanted = [whole[:, -found.shape[1] :] for found in trials]
    if any(found.shape != want.shape for found, want in zip(trials, wanted, strict=True)):
        return math.inf
    errors = [float((found - want).abs().max()) for found, want in zip(trials, wanted, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _begun(subject: Subject, rows: int, *, mended: bool = True) -> Memory:
    memory = begin(subject, rows, mended=mended)
    if memory is None:
        raise NotImplementedError
    return memory


def _one_by_one(memory: Memory, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([memory.feed(tokens[:, at : at + 1]) for at in range(tokens.shape[1])], dim=1)


def _stepped(subject: Subject, row: torch.Tensor) -> torch.Tensor:
    memory = _begun(subject, 1, mended=False)
    memory.feed(row[:, :_PREFILL])
    return _one_by_one(memory, row[:, _PREFILL:])


def _chunked(subject: Subject, tokens: torch.Tensor, *, mended: bool) -> list[torch.Tensor]:
    """Return the last logits of every row in one go, and in two."""
    found = []
    for between in (_LENGTH, _PREFILL + 2):
        memory = _begun(subject, len(tokens), mended=mended)
        memory.feed(tokens[:, :_PREFILL])
        parts = [tokens[:, _PREFILL:between], tokens[:, between:]]
        found.append(torch.cat([memory.feed(part) for part in parts if part.shape[1]], dim=1))
    return found


def _batched(subject: Subject, tokens: torch.Tensor, *, mended: bool) -> list[torch.Tensor]:
    """Return the last logits of every row by steps: from nothing, and twice on copies after a prefill.

    The copies hold rows in another order and one of them twice; the second copy shows whether the first changed what
    both began from.
    """
    memory = _begun(subject, len(tokens), mended=mended)
    memory.feed(tokens[:, :_PREFILL])
    rows = torch.tensor([1, 0, 1, 2], device=tokens.device)
    order = [1, 0, 3]  # where rows 0, 1 and 2 are in the copy
    found = [_one_by_one(memory.copied(rows), tokens[rows, _PREFILL:])[order] for _ in range(2)]
    return [*found, _one_by_one(_begun(subject, len(tokens), mended=mended), tokens)]


def _carried(subject: Subject, tokens: torch.Tensor) -> tuple[tuple[str, ...], tuple[int, ...]]:
    try:
        memory = _begun(subject, len(tokens))
        memory.feed(tokens)
    except _FAILURES:
        return (), ()
    names = memory.names()
    return tuple(dict.fromkeys(name for i in sorted(names) for name in names[i])), tuple(sorted(names))


def _readout_error(subject: Subject) -> float:
    try:
        return Readout(subject).error
    except _FAILURES:
        return math.inf
