"""One pass over a batch: the streams at all sites, once, and what is computed from them a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from exegete.errors import InputError
from exegete.subjects.readout import Readout, read_out
from exegete.subjects.sites import n_blocks, residuals
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.lens.states import StateReader
    from exegete.lens.text import Batch
    from exegete.subjects import Subject

_PASS_TOKENS = 1 << 13  # of one forward pass, at most
_PASS_ENTRIES = 1 << 28  # of streams held at once: 1 GiB in float32, where one row does not take more
_CPU_ENTRIES, _GPU_ENTRIES = 1 << 24, 1 << 27  # most logits of one piece


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some predictions: what lenses read at them, and what they are held against.

    ``hidden`` [n, d] float32 by site, ``states`` [n, numbers] by site; ``target`` [n, V] float32, the log probabilities
    of the model itself; ``labels`` [n], the tokens that follow; ``documents`` [n], whose they are.
    """

    hidden: Mapping[int, torch.Tensor]
    states: Mapping[int, torch.Tensor]
    target: torch.Tensor
    labels: torch.Tensor
    documents: Array

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def read_pieces(
    subject: Subject,
    batch: Batch,
    sites: Sequence[int],
    *,
    states: StateReader | None = None,
) -> Iterator[Piece]:
    """Yield the predictions of a batch in pieces; each row goes through the model once.

    ``states`` has the states read as well, in a second pass token by token. Raises InputError when a stream or logit is
    not finite, or when rows are longer than the model reads.
    """
    readout, last = read_out(subject), n_blocks(subject) - 1
    length = batch.tokens.shape[1]
    require_room(subject, length)
    step = piece_size(subject, readout)
    most = min(_PASS_TOKENS, _PASS_ENTRIES // ((len(sites) + 1) * int(readout.unembedding.shape[1])))
    for part in batch.pieces(most if states is None else min(most, states.rows * length)):
        keep = part.keep.to(subject.device)
        streams = residuals(subject, part.tokens, tuple(dict.fromkeys((*sites, last))))
        hidden = {site: stream[keep.to(stream.device)].to(subject.device) for site, stream in streams.items()}
        del streams
        labels = part.labels.to(subject.device)
        for places, read in [(torch.arange(len(part)), {})] if states is None else states.blocks(part):
            for start in range(0, len(places), step):
                cut = slice(start, start + step)
                chosen = places[cut]
                here = chosen.to(subject.device)
                target = readout.logits(hidden[last][here]).log_softmax(dim=-1)
                if not bool(torch.isfinite(target).all()):
                    raise InputError(f"the logits of {subject.name} hold NaN or infinity; load it in float32")
                yield Piece(
                    hidden={site: hidden[site][here] for site in sites},
                    states={site: state[cut] for site, state in read.items()},
                    target=target,
                    labels=labels[here],
                    documents=part.documents[chosen.numpy()],
                )


def require_room(subject: Subject, length: int) -> None:
    """Raise InputError for texts longer than the positions that a model says it has, where it says so."""
    most = subject.context
    if most is not None and length > most:
        raise InputError(f"{subject.name} reads up to {most} tokens at once, got {length}; give shorter texts or rows")


def piece_size(subject: Subject, readout: Readout) -> int:
    """Return how many predictions are worked on at once, so that their logits stay within bounds."""
    most = _CPU_ENTRIES if subject.device.type == "cpu" else _GPU_ENTRIES
    return max(1, most // int(readout.unembedding.shape[0]))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return −log p(label) in nats [n], of logits or log probabilities [n, V]."""
    return torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")


def divergence(target: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return KL(target ‖ p) in nats [n], of log probabilities [n, V]."""
    return (target.exp() * (target - log_p)).sum(dim=-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats [n], of log probabilities [n, V]."""
    return -(log_p.exp() * log_p).sum(dim=-1)
