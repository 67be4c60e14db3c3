"""What a subject makes of contrasts: residual stream and recurrent state where they are read, from one pass each.

A text is read up to the last token that is wanted, never further, and texts are batched by that length: nothing is
padded, and the state is the one after that token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from exegete.errors import InputError
from exegete.progress import Progress, Silent
from exegete.steering.questions import Contrast, ReadAt, Tokens
from exegete.subjects import Subject
from exegete.subjects.edits import Edit, edited
from exegete.subjects.names import Point
from exegete.subjects.recurrent_state import State
from exegete.subjects.running import Running
from exegete.subjects.sites import site_point

TOKENS_AT_ONCE = 8192


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """Activations of some texts: ``pair`` [n] and ``positive`` [n] say whose; ``residual`` by site [n, d] float32."""

    pair: torch.Tensor
    positive: torch.Tensor
    residual: dict[int, torch.Tensor]
    state: State


def record(
    subject: Subject,
    contrasts: Sequence[Contrast],
    *,
    sites: Sequence[int],
    state: bool,
    read: ReadAt,
    progress: Progress | None = None,
) -> Iterator[Recorded]:
    """Yield what is read of the texts of contrasts, batch by batch; a batch may hold one text of a pair.

    Args:
        subject: The model.
        contrasts: Pairs of token sequences.
        sites: Where the residual stream is read.
        state: Whether the recurrent state is wanted.
        read: Which tokens; several are averaged in the residual stream, the state is that after the last of them.
        progress: How far it is.

    Raises:
        InputError: For no contrasts, a pair whose text has no such token (by its number), or a state that the subject
            does not carry.
    """
    if not contrasts:
        raise InputError("there are no pairs to make a vector of")
    texts = [
        _text(subject, contrast, i, positive, read)
        for i, contrast in enumerate(contrasts)
        for positive in (True, False)
    ]
    told = progress or Silent()
    told.start("record", len(texts), "texts")
    for batch in _batches(texts):
        yield _read(subject, batch, sites, state=state)
        told.advance(len(batch))
    told.end()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    pair: int
    positive: bool
    tokens: Tokens
    first: int


def _text(subject: Subject, contrast: Contrast, pair: int, positive: bool, read: ReadAt) -> _Text:
    tokens = contrast.positive if positive else contrast.negative
    try:
        first, end = read.span(tokens, contrast.shared, subject)
    except InputError as error:
        raise InputError(f"pair {pair + 1}, {'positive' if positive else 'negative'}: {error}") from None
    return _Text(pair=pair, positive=positive, tokens=tokens[:end], first=first)


def _batches(texts: Sequence[_Text]) -> Iterator[list[_Text]]:
    for length in sorted({len(text.tokens) for text in texts}):
        same = [text for text in texts if len(text.tokens) == length]
        size = max(1, TOKENS_AT_ONCE // length)
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _read(subject: Subject, batch: Sequence[_Text], sites: Sequence[int], *, state: bool) -> Recorded:
    tokens = torch.tensor([text.tokens for text in batch], device=subject.device)
    wanted = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, text in enumerate(batch):
        wanted[row, text.first :] = True
    points = {site: site_point(subject, site) for site in sites}
    readings = {point: _Reading(point) for point in points.values()}
    carried = State({})
    if state:
        running = Running.start(subject, tokens, edits=list(readings.values()), where=wanted.to(subject.device))
        carried = running.state()
        if not carried.layers:
            raise InputError(f"{subject.name} carries no recurrent state; leave out the state")
    elif points:
        # Capturing ends the pass at the deepest site; what is kept of the sites is only what is read of them.
        with edited(subject, list(readings.values()), wanted.to(subject.device)):
            subject.capture(tokens, None, [points[max(points)]])
    return Recorded(
        pair=torch.tensor([text.pair for text in batch]),
        positive=torch.tensor([text.positive for text in batch]),
        residual={site: readings[point].mean(len(batch)) for site, point in points.items()},
        state=State({i: {n: v.cpu() for n, v in part.items()} for i, part in carried.parts.items()}),
    )


@final
class _Reading(Edit):
    """Changes nothing and keeps what it was shown, so that one pass gives residual stream and state."""

    def __init__(self, point: Point) -> None:
        self.target, self.source = point, None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def change(self, y: torch.Tensor, x: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        self._seen.append((y.float().cpu(), rows.cpu()))
        return torch.zeros_like(y)

    def mean(self, rows: int) -> torch.Tensor:
        """Return the mean of each row [rows, d]."""
        values, places = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        sums = torch.zeros((rows, values.shape[1])).index_add_(0, places, values)
        return sums / torch.bincount(places, minlength=rows)[:, None]
