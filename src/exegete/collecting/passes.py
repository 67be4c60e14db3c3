"""Forward passes over batches of rows, and what they give to every store that still lacks them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import numpy as np

from exegete.coders.coder import Point
from exegete.collecting.job import Gathering
from exegete.errors import InputError
from exegete.files import fault_point
from exegete.store.token_rows import Corpus
from exegete.tokens import TokenTable
from exegete.types import Side

if TYPE_CHECKING:
    import torch


class ReadableSubject(Protocol):
    """What collecting asks of a subject; ``exegete.subjects.Subject`` is one."""

    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of config and weights."""

    @abstractmethod
    def token_table(self) -> TokenTable:
        """Return the bytes of every token id."""

    @abstractmethod
    def d(self, hookpoint: str, side: Side) -> int:
        """Return the size of the activations at a hookpoint."""

    @abstractmethod
    def to(self, device: str | torch.device) -> ReadableSubject:
        """Return the subject on a device; it may be this one, moved."""

    @abstractmethod
    def capture(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        points: Sequence[Point],
        documents: torch.Tensor | None = None,
    ) -> dict[Point, torch.Tensor]:
        """Return the activations [rows, length, d] at each point; ``documents`` cuts attention between them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows read through the subject: the corpus's mask [rows, length], and activations and their norms by point."""

    start: int
    mask: torch.Tensor
    activations: dict[Point, torch.Tensor]
    norms: dict[Point, torch.Tensor]

    def counted(self, point: Point, limit: float) -> torch.Tensor:
        """Return where firings count [rows, length]: the corpus's mask without positions longer than ``limit``."""
        return self.mask & (self.norms[point] <= limit)

    def inputs(self, point: Point, counted: torch.Tensor) -> torch.Tensor:
        """Return the activations [n, d] at the counted positions, in order; not copied where all count."""
        flat = self.activations[point].flatten(0, 1)
        if bool(counted.all()):
            return flat
        return flat.index_select(0, counted.flatten().nonzero().squeeze(1).to(flat.device))


def read(subject: ReadableSubject, corpus: Corpus, start: int, stop: int, points: Sequence[Point]) -> Batch:
    """Take rows through the subject. Raises InputError naming the first row with activations that are not finite."""
    import torch

    rows = corpus.rows(slice(start, stop))
    tokens = torch.from_numpy(rows.tokens.astype(np.int64)).to(subject.device)
    attention = torch.from_numpy((rows.documents >= 0).astype(np.int64)).to(subject.device)
    mask = torch.from_numpy(rows.mask).to(subject.device)
    if corpus.attend == "document":
        documents = torch.from_numpy(rows.documents).to(subject.device)
        captured = subject.capture(tokens, attention, points, documents)
    else:
        captured = subject.capture(tokens, attention, points)
    norms = {}
    for point, values in captured.items():
        length = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).to(mask.device)
        if not bool((length.isfinite() | ~mask).all()):
            _require_finite(point, values, mask, start)
        norms[point] = length
    fault_point("batch captured")
    return Batch(start=start, mask=mask, activations=captured, norms=norms)


def run(
    gatherings: Sequence[Gathering],
    subject: ReadableSubject,
    corpus: Corpus,
    batches: Sequence[int],
    n_rows: int,
    advance: Callable[[int], None],
    *,
    behind: bool,
) -> None:
    """Take batches (their first rows, ascending) through the subject once, for every store that lacks them.

    ``advance`` is called with the rows of each batch when it is done. ``behind``: build shards in a thread of its own
    while the next batch is computed, at most two batches behind.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1)) if behind else None
        waiting: list[Future[None]] = []
        for start in batches:
            stop = min(start + n_rows, len(corpus))
            active = [g for g in gatherings if start in g.missing]
            with _memory(n_rows):
                batch = read(subject, corpus, start, stop, list(dict.fromkeys(g.coder.point for g in active)))
                steps = [_prepared(gathering, batch) for gathering in active]
            for step in steps:
                _do(pool, waiting, step)
            while len(waiting) > 2 * len(gatherings):
                waiting.pop(0).result()
            advance(stop - start)
        for future in waiting:
            future.result()
        for gathering in gatherings:
            gathering.end()


@contextlib.contextmanager
def _memory(n_rows: int) -> Iterator[None]:
    """Say what to do when a device runs out of memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the device ran out of memory with batches of {n_rows} rows; free some, or collect into a new folder with "
            "a smaller collect.batch_tokens"
        ) from error


def _prepared(gathering: Gathering, batch: Batch) -> Callable[[], None]:
    """Encode a batch for one store and return what is left to do on the CPU."""
    point = gathering.coder.point
    counted = batch.counted(point, gathering.limit)
    x = batch.inputs(point, counted)
    code = gathering.encode(batch.start, x) if len(x) else None
    where = counted.cpu().numpy()
    excluded = np.flatnonzero(batch.mask.cpu().numpy().reshape(-1) & ~where.reshape(-1))
    start = batch.start  # what waits must not hold the batch's activations
    return lambda: gathering.add(start, where, excluded, code)


def _do(pool: Executor | None, waiting: list[Future[None]], step: Callable[[], None]) -> None:
    if pool is None:
        step()
    else:
        waiting.append(pool.submit(step))


def _require_finite(point: Point, activations: torch.Tensor, mask: torch.Tensor, start: int) -> None:
    finite = activations.isfinite().all(dim=-1).to(mask.device) | ~mask
    if not bool(finite.all()):
        row = start + int((~finite).any(dim=1).nonzero()[0, 0])
        raise InputError(
            f"the {point[1]} of {point[0]!r} holds NaN or infinity in row {row}; load the subject in float32"
        )
