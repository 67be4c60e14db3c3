"""The frame — the tiling of rows into windows — and what fires in a window. Arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.types import Array, Rows


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Non-overlapping windows of one length over rows, in order of (row, start).

    ``row``, ``start``, ``document`` [windows]: where each window lies; ``first`` and ``last`` [windows]: the stretch
    of counted positions that it was cut from (``last`` is one past its end); ``n_rows`` and ``length``: the rows'
    shape.
    """

    row: Array
    start: Array
    document: Array
    first: Array
    last: Array
    window: int
    n_rows: int
    length: int

    def __len__(self) -> int:
        return len(self.row)

    def lookup(self) -> Array:
        """Return the window that each position belongs to, int32 [n_rows * length], −1 where there is none."""
        owner = np.full(self.n_rows * self.length, -1, dtype=np.int32)
        base = self.row * self.length + self.start
        numbers = np.arange(len(self), dtype=np.int32)
        for offset in range(self.window):
            owner[base + offset] = numbers
        return owner


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


def frame(rows: Rows, window: int, *, seed: int, numbers: Array | None = None) -> Frame:
    """Tile every stretch of the rows into windows, from an offset that the seed draws.

    The offset is a hash of the seed, the row's number in its corpus (``numbers`` [rows], by default its place in
    ``rows``) and the stretch's first position, so it does not depend on which other rows are given. It is uniform
    over 0 … window − 1, or over fewer where the stretch would else lose its only window; what is left at both ends is
    in no window, nor is a stretch shorter than a window. Raises InputError when ``window`` is not positive or
    ``numbers`` does not fit.
    """
    if window < 1:
        raise InputError(f"a window has at least one token, got {window}")
    identities = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    if identities.shape != (len(rows),):
        raise InputError(f"every row has one number, got shape {identities.shape} for {len(rows)} rows")
    row, first, last = stretches(rows)
    long = last - first >= window
    row, first, last = row[long], first[long], last[long]
    choices = np.minimum(window, last - first - window + 1).astype(np.uint64)
    offset = (_hash(seed, identities[row], first) % choices).astype(np.int64)
    count = (last - first - offset) // window
    which = np.repeat(np.arange(len(row)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    start = (first + offset)[which] + window * nth
    return Frame(
        row=row[which],
        start=start,
        document=rows.documents[row[which], start],
        first=first[which],
        last=last[which],
        window=window,
        n_rows=len(rows),
        length=rows.length,
    )


def ordered(rows: Array, positions: Array, values: Array, length: int) -> tuple[Array, Array]:
    """Return firings as flat places (row * length + position, ascending, int64) and their values."""
    places = rows.astype(np.int64) * length + positions
    if (places[1:] < places[:-1]).any():
        order = np.argsort(places, kind="stable")
        return places[order], values[order]
    return places, values


def fires_per_window(places: Array, values: Array, lookup: Array) -> tuple[Array, Array, Array]:
    """Return the frame windows that hold any firing, ascending, with the place and value of each one's strongest.

    ``places`` and ``values`` are what ``ordered`` returns, ``lookup`` is the frame's. Of equal values the first
    counts.
    """
    owner = lookup[places]
    inside = owner >= 0
    owner, places, values = owner[inside], places[inside], values[inside]
    if not len(owner):
        return owner.astype(np.int64), places, values
    begins = np.concatenate([[0], np.flatnonzero(owner[1:] != owner[:-1]) + 1])
    maxima = np.maximum.reduceat(values, begins)
    counts = np.diff(np.append(begins, len(owner)))
    hits = np.flatnonzero(values == np.repeat(maxima, counts))
    peaks = hits[np.searchsorted(hits, begins)]
    return owner[begins].astype(np.int64), places[peaks], maxima


def centred(frame: Frame, windows: Array, peaks: Array) -> tuple[Array, Array]:
    """Return row and start of a window centred on the peak of each given frame window, every such window once.

    ``peaks`` are flat places. The peak stands at position ``window // 2``, or nearer to an edge where its stretch
    ends. Centred windows may overlap one another.
    """
    start = peaks % frame.length - frame.window // 2
    start = np.clip(start, frame.first[windows], frame.last[windows] - frame.window)
    places = np.unique(frame.row[windows] * frame.length + start)
    return places // frame.length, places % frame.length


def activations(places: Array, values: Array, base: Array, window: int) -> Array:
    """Return the activations in windows that begin at flat places ``base`` [n], float32 [n, window]; 0 where silent.

    Read from the firings themselves, not through the frame, so what is said of a window is checked independently.
    """
    low, high = np.searchsorted(places, base), np.searchsorted(places, base + window)
    count = high - low
    which = np.repeat(np.arange(len(base)), count)
    firing = np.arange(len(which)) + np.repeat(low - (np.cumsum(count) - count), count)
    dense = np.zeros((len(base), window), dtype=np.float32)
    dense[which, places[firing] - base[which]] = values[firing]
    return dense


def _hash(seed: int, identities: Array, first: Array) -> Array:
    """Return 64 well-mixed bits per stretch (splitmix64 over seed, row and first position)."""
    mixed = np.full(len(identities), seed % 2**64, dtype=np.uint64)
    for part in (identities, first):
        mixed = _mix(mixed ^ part.astype(np.uint64))
    return mixed


def _mix(bits: Array) -> Array:
    mixed: Array = bits + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
