"""What fires in the windows of the frame, for some latents at once. Arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np

from exegete.examples.draws import starts_of
from exegete.types import SPLITS, Array

if TYPE_CHECKING:
    from exegete.examples.data import StoreData
    from exegete.examples.windows import Frame, Lookup

_TRAIN: Final = SPLITS.index("train")
_TEST: Final = SPLITS.index("test")
_LOW: Final = np.uint64(0xFFFFFFFF)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """The windows of one split in which latents of a block have recorded values, by latent and then by window.

    ``latent`` [r] int64 is the place in the block, ``window`` [r] int64 the window of the frame, ``maximum`` [r]
    float32 the strongest value in it, ``peak`` [r] int64 the flat place (row * length + position) of the first of
    the strongest; ``offsets`` [m + 1] int64 says where each latent's runs begin. A window whose recorded values are
    all 0 or below (a maximum of 0) is here although it does not fire: it is not silent either.
    """

    latent: Array
    window: Array
    maximum: Array
    peak: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.latent)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some latents and where they fire: ``indices`` [m] int64; ``train`` and ``test`` are over windows of ``frame``.

    Made by ``StoreData.block``.
    """

    indices: Array
    data: StoreData
    frame: Frame
    train: Fired
    test: Fired

    def __len__(self) -> int:
        return len(self.indices)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """All firings of some latents [m], latent by latent in row order.

    ``rows`` [f] int64, ``places`` [f] int64 (row * length + position), ``values`` [f] float32; ``offsets`` [m + 1].
    """

    rows: Array
    places: Array
    values: Array
    offsets: Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Firings by window. ``train`` and ``test`` are those in windows of these splits.

    ``strongest`` [m] float32 is the strongest value in train text, in a window or not, at least 0; ``alive`` [m] says
    whether any value in train or test text is positive; ``stray_latent`` and ``stray_place`` are the firings in test
    text that is in no window.
    """

    train: Fired
    test: Fired
    strongest: Array
    alive: Array
    stray_latent: Array
    stray_place: Array


def gathered(recorded: Recorded, splits: Array, lookup: Lookup) -> Gathered:
    """Gather firings by window; ``splits`` are those of the frame's windows [windows] int8, ``lookup`` is its own."""
    m = len(recorded.offsets) - 1
    window = lookup.windows(recorded.rows, recorded.places)
    inside, outside = np.flatnonzero(window >= 0), np.flatnonzero(window < 0)
    runs = _runs(recorded, window, inside)
    code = splits[runs.window]
    train, test = _of(runs, code == _TRAIN, m), _of(runs, code == _TEST, m)
    latent = np.repeat(np.arange(m), np.diff(np.searchsorted(outside, recorded.offsets)))
    side, values = -1 - window[outside], recorded.values[outside]
    strongest = np.zeros((2, m), np.float32)
    for number, (fired, split) in enumerate(((train, _TRAIN), (test, _TEST))):
        np.maximum.at(strongest[number], latent[side == split], values[side == split])
        np.maximum.at(strongest[number], fired.latent, fired.maximum)
    stray = np.flatnonzero(side == _TEST)
    return Gathered(
        train=train,
        test=test,
        strongest=strongest[0],
        alive=strongest.max(axis=0) > 0,
        stray_latent=latent[stray],
        stray_place=recorded.places[outside[stray]],
    )


def _runs(recorded: Recorded, window: Array, inside: Array) -> Fired:
    """Return the windows of all splits in which anything is recorded; ``inside`` are the firings that lie in one."""
    window, values = window[inside], recorded.values[inside]
    begins = np.ones(len(inside), bool)
    np.not_equal(window[1:], window[:-1], out=begins[1:])
    firsts = np.searchsorted(inside, recorded.offsets)
    begins[firsts[firsts < len(inside)]] = True
    starts = np.flatnonzero(begins)
    if not len(starts):
        nothing = np.zeros(0, np.int64)
        return Fired(latent=nothing, window=nothing, maximum=values, peak=nothing, offsets=np.zeros_like(firsts))
    # The bits of floats that are not negative are ordered as the floats are; of equal ones the first comes out.
    bits = np.where(values > 0, values, np.float32(0)).view(np.uint32).astype(np.uint64)
    best = np.maximum.reduceat(bits << np.uint64(32) | (_LOW - np.arange(len(bits), dtype=np.uint64)), starts)
    peak = inside[(_LOW - (best & _LOW)).astype(np.int64)]
    offsets = np.searchsorted(starts, firsts)
    return Fired(
        latent=np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
        window=window[starts],
        maximum=(best >> np.uint64(32)).astype(np.uint32).view(np.float32),
        peak=recorded.places[peak],
        offsets=offsets,
    )


def _of(runs: Fired, chosen: Array, m: int) -> Fired:
    """Return some of the runs."""
    chosen = np.flatnonzero(chosen)
    latent = runs.latent[chosen]
    return Fired(
        latent=latent,
        window=runs.window[chosen],
        maximum=runs.maximum[chosen],
        peak=runs.peak[chosen],
        offsets=starts_of(np.bincount(latent, minlength=m)),
    )
