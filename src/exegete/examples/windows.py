"""The frame — the tiling of rows into windows — and what lies in a window. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.errors import InputError
from exegete.examples.draws import spread
from exegete.examples.keys import mixed
from exegete.types import SPLITS, Array, Rows


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Non-overlapping windows of one length over all rows, in order of (row, start); a window's number is its place.

    ``row`` [windows] int64, ``start`` and ``document`` int32: where each window lies; ``split`` int8: its place in
    SPLITS, −1 where it is of none; ``first`` and ``last`` int32: the stretch of positions that it was cut from
    (``last`` is one past its end). ``n_rows`` and ``length``: the rows' shape. ``seed`` and ``keep_bos``: how it was
    made.
    """

    row: Array
    start: Array
    document: Array
    split: Array
    first: Array
    last: Array
    window: int
    n_rows: int
    length: int
    seed: int
    keep_bos: bool = False

    def __len__(self) -> int:
        return len(self.row)

    def numbers(self, split: int) -> Array:
        """Return the windows of a split (its place in SPLITS), ascending."""
        return np.flatnonzero(self.split == split)

    def places(self, windows: Array) -> Array:
        """Return the flat place (row * length + position) at which each of these windows begins, int64."""
        return self.row[windows] * self.length + self.start[windows]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Which window each position of all rows is in, in one or two bytes a position.

    ``nth`` [n_rows * length]: which of its row's windows it is in; from ``limit`` on it is in none, and ``nth`` is
    ``limit`` more than its split's place in SPLITS, or than 3 where it has none. ``base`` [n_rows] int64: the number
    of each row's first window.
    """

    nth: Array
    base: Array
    limit: int

    def windows(self, rows: Array, places: Array) -> Array:
        """Return the window of each position, int64; −1 less its split's code where it is in none."""
        nth = self.nth[places]
        return np.where(nth < self.limit, self.base[rows] + nth, np.int64(self.limit - 1) - nth)


OUTSIDE: Final = len(SPLITS)
"""Code of positions that are of no split."""


def stretches(rows: Rows) -> tuple[Array, Array, Array]:
    """Return row, first position and one past the last of every stretch that windows may be cut from.

    A stretch is a longest run of counted positions (``mask``) of one document in one row, so no window holds BOS,
    another special token, padding or a position that a store leaves out, and none crosses a document.
    """
    counted = rows.mask & (rows.documents >= 0)
    joined = counted[:, 1:] & counted[:, :-1] & (rows.documents[:, 1:] == rows.documents[:, :-1])
    begins, ends = counted.copy(), counted.copy()
    begins[:, 1:] &= ~joined
    ends[:, :-1] &= ~joined
    row, first = np.nonzero(begins)
    return row, first, np.nonzero(ends)[1] + 1


def frame(
    rows: Rows, window: int, *, seed: int, numbers: Array | None = None, special: Sequence[int] | None = None
) -> Frame:
    """Tile every stretch of the rows into windows, from an offset that the seed draws; their split is left open.

    The offset is a hash of the seed, the row's number in its corpus (``numbers`` [rows], by default its place in
    ``rows``) and the stretch's first position, so it does not depend on which other rows are given. It is uniform
    over 0 … window − 1, or over fewer where the stretch would else lose its only window; what is left at both ends is
    in no window, nor is a stretch shorter than a window. With ``special`` tokens a stretch begins with those that
    stand right before it in its document, though not with so many that a window could hold nothing else. Raises
    InputError when ``window`` is not positive or ``numbers`` does not fit.
    """
    if window < 1:
        raise InputError(f"a window has at least one token, got {window}")
    identities = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    if identities.shape != (len(rows),):
        raise InputError(f"every row has one number, got shape {identities.shape} for {len(rows)} rows")
    row, first, last = stretches(rows)
    if special is not None:
        first = first - _before(rows, row, first, special, window - 1)
    long = last - first >= window
    row, first, last = row[long], first[long], last[long]
    choices = np.minimum(window, last - first - window + 1).astype(np.uint64)
    offset = (_hash(seed, identities[row], first) % choices).astype(np.int64)
    which, place = spread((last - first - offset) // window)
    start = (first + offset)[which] + window * place
    return Frame(
        row=identities[row[which]].astype(np.int64),
        start=start.astype(np.int32),
        document=rows.documents[row[which], start].astype(np.int32),
        split=np.full(len(start), -1, np.int8),
        first=first[which].astype(np.int32),
        last=last[which].astype(np.int32),
        window=window,
        n_rows=len(rows),
        length=rows.length,
        seed=seed,
        keep_bos=special is not None,
    )


def joined(pieces: Sequence[Frame]) -> Frame:
    """Return the frame of rows that were tiled piece by piece, in order."""
    return replace(
        pieces[0],
        row=np.concatenate([piece.row for piece in pieces]),
        start=np.concatenate([piece.start for piece in pieces]),
        document=np.concatenate([piece.document for piece in pieces]),
        split=np.concatenate([piece.split for piece in pieces]),
        first=np.concatenate([piece.first for piece in pieces]),
        last=np.concatenate([piece.last for piece in pieces]),
        n_rows=sum(piece.n_rows for piece in pieces),
    )


def lookup(whole: Frame, segments: Array, codes: Array) -> Lookup:
    """Return which window each position is in; ``codes`` are the splits of ``segments`` (row, start, stop, document).

    ``whole`` is the frame of all rows, numbered from 0.
    """
    counts = np.bincount(whole.row, minlength=whole.n_rows)
    limit = int(counts.max(initial=0))
    kind = np.uint8 if limit + OUTSIDE < 256 else np.uint16
    begin = segments[:, 0] * whole.length
    # The positions of each segment and of what lies between two.
    cuts = np.stack([begin + segments[:, 1], begin + segments[:, 2]], axis=1).reshape(-1)
    told = np.full(len(cuts) + 1, limit + OUTSIDE, kind)
    told[1::2] = limit + np.where(codes < 0, OUTSIDE, codes.astype(np.int64))
    held = np.repeat(told, np.diff(cuts, prepend=0, append=whole.n_rows * whole.length))
    base = np.cumsum(counts) - counts
    places = whole.places(np.arange(len(whole)))
    own = (np.arange(len(whole)) - base[whole.row]).astype(kind)
    for offset in range(whole.window):
        held[places + offset] = own
    return Lookup(nth=held, base=base, limit=limit)


def centred(frame: Frame, windows: Array, peaks: Array) -> Array:
    """Return the flat place at which a window centred on the peak of each given frame window begins.

    ``peaks`` are flat places. The peak stands at position ``window // 2``, or nearer to an edge where its stretch
    ends. Centred windows may overlap one another, but no two of different frame windows are the same.
    """
    start = peaks % frame.length - frame.window // 2
    start = np.clip(start, frame.first[windows], frame.last[windows] - frame.window)
    places: Array = frame.row[windows] * frame.length + start
    return places


def activations(places: Array, values: Array, base: Array, window: int) -> Array:
    """Return the activations in windows that begin at flat places ``base`` [n], float32 [n, window]; 0 where silent.

    Read from the firings themselves, not through the frame, so what is said of a window is checked independently.
    """
    low, high = np.searchsorted(places, base), np.searchsorted(places, base + window)
    which, place = spread(high - low)
    firing = low[which] + place
    dense = np.zeros((len(base), window), dtype=np.float32)
    dense[which, places[firing] - base[which]] = values[firing]
    return dense


def _before(rows: Rows, row: Array, first: Array, special: Sequence[int], most: int) -> Array:
    """Return how many special tokens of the same document stand right before each stretch, at most ``most``."""
    marks = np.isin(rows.tokens, np.array(special, np.int64))
    count: Array = np.zeros(len(row), np.int64)
    for back in range(1, most + 1):
        at = first - back
        held = (count == back - 1) & (at >= 0)
        held &= marks[row, at] & ~rows.mask[row, at] & (rows.documents[row, at] == rows.documents[row, first])
        if not held.any():
            break
        count += held
    return count


def _hash(seed: int, identities: Array, first: Array) -> Array:
    """Return 64 well-mixed bits per stretch, from seed, row and first position."""
    bits = np.full(len(identities), seed % 2**64, dtype=np.uint64)
    for part in (identities, first):
        bits = mixed(bits ^ part.astype(np.uint64))
    return bits
