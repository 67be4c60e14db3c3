"""Which of their firing windows are taken of a block of latents, and with what probability. Arrays in, arrays out.

Windows are ranked by their maximum, strongest first; equal maxima are ordered at random. ``decile_0`` is the strongest
tenth of the ranks and ``decile_9`` the weakest (arXiv 2410.13928, section 3.2 and Tab. A5). ``bin_0`` holds the windows
above nine tenths of the strongest maximum, ``bin_9`` those up to one tenth of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

import numpy as np

from exegete.config import Strategy
from exegete.errors import unknown
from exegete.examples.draws import allocate, draw_places, draw_spread, spread, starts_of
from exegete.examples.keys import mixed, nth
from exegete.types import STRATA, Array

PARTS: Final = 10
_DECILE, _BIN = STRATA.index("decile_0"), STRATA.index("bin_0")
_KNOWN: Final = ("top", "random", "quantiles", "bins", "mix", "importance")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The windows of a block of latents, strongest first.

    ``order`` [n] are the windows, latent by latent; ``maxima`` [n] float32 theirs, positive; ``offsets`` [m + 1] where
    each latent's windows begin; ``keys`` [m] uint64 decide the draws.
    """

    order: Array
    maxima: Array
    offsets: Array
    keys: Array

    @property
    def sizes(self) -> Array:
        """Windows of each latent [m]."""
        return np.diff(self.offsets)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What was drawn, by latent and then strongest first within each part of the strategy.

    ``latent`` [n] are places in the block; ``chosen`` [n] windows, none twice for a latent; ``stratum`` [n] places in
    STRATA; ``probability`` [n] is the chance that the draw takes the window.
    """

    latent: Array
    chosen: Array
    stratum: Array
    probability: Array

    def __len__(self) -> int:
        return len(self.chosen)


def rank(maxima: Array, windows: Array, offsets: Array, keys: Array) -> Ranked:
    """Rank the windows of every latent by their maxima [n] (positive float32).

    ``windows`` [n] are their numbers: which of equal maxima comes first is a hash of the latent's key and of them.
    """
    latent, place = spread(np.diff(offsets))
    # Bits of positive floats are ordered as the floats are. Below them as many bits of a hash as the place leaves free.
    own = np.array([max(int(n) - 1, 0).bit_length() for n in np.diff(offsets)], np.uint64)[latent]
    tied = mixed(keys[latent] ^ windows.astype(np.uint64)) >> np.uint64(32) >> own << own
    bits = np.asarray(maxima, np.float32).view(np.uint32).astype(np.uint64)
    packed = (np.uint64(0xFFFFFFFF) - bits) << np.uint64(32) | tied | place.astype(np.uint64)
    bounds = offsets.tolist()
    for start, stop in pairwise(bounds):
        packed[start:stop].sort()
    order = (packed & ((np.uint64(1) << own) - np.uint64(1))).astype(np.int64) + offsets[latent]
    return Ranked(order=order, maxima=maxima[order], offsets=offsets, keys=keys)


def draw(ranked: Ranked, n: int, strategy: Strategy, document: Array | None = None) -> Draw:
    """Draw ``n`` of each latent's windows, or all when there are no more.

    With ``document`` [windows] (int, at least 0), the documents they lie in, ``random``, ``quantiles`` and ``bins``
    spread those drawn of one part over documents (``draw_spread``); a window's probability is then not n / N but
    min(m, c) / m · n / N', where m of the part's windows lie in its document. ``importance`` keeps its own draw, with
    probabilities proportional to the maxima whatever the document, and so do ``top`` and ``mix``, which are no samples
    to judge by.

    ``top`` takes the strongest, with probability 1: it is no draw, and says nothing about the other windows.
    ``random`` takes each window with probability n / N. ``quantiles`` takes equal parts of the ten rank deciles and
    ``bins`` of the ten equally wide bins of value, as far as they go; a window of part h has probability n_h / N_h.
    ``mix`` takes the strongest half of n (rounded up) as ``top`` does and the rest by ``quantiles`` among the windows
    that are left; its deciles are those of the windows left. ``importance`` takes each window with a probability
    proportional to its maximum, or for certain where that would pass 1. Raises NotFoundError for another strategy.
    """
    sizes = ranked.sizes
    wanted = np.minimum(n, sizes)
    if strategy == "top" or n < 1:
        return _first(ranked, wanted)
    if strategy == "random":
        parts = _Parts(sizes=sizes[:, None], given=wanted[:, None], skipped=np.zeros_like(wanted))
        return _parts(ranked, parts, STRATA.index("random"), document)
    if strategy == "quantiles":
        return _parts(ranked, _quantiles(ranked, wanted, np.zeros_like(wanted)), _DECILE, document)
    if strategy == "bins":
        return _parts(ranked, _bins(ranked, wanted), _BIN, document)
    if strategy == "mix":
        half = (wanted + 1) // 2
        return _merged(_first(ranked, half), _parts(ranked, _quantiles(ranked, wanted - half, half), _DECILE, None))
    if strategy == "importance":
        return _importance(ranked, n)
    raise unknown("strategy", strategy, _KNOWN)


def chosen_for_certain(ranked: Ranked, latent: Array, places: Array, stratum: int) -> Draw:
    """Return windows taken with probability 1: of each ``latent`` those at ``places`` of its ranking."""
    return Draw(
        latent=latent,
        chosen=ranked.order[ranked.offsets[latent] + places],
        stratum=np.full(len(latent), stratum),
        probability=np.ones(len(latent)),
    )


def deciles(places: Array, n: Array) -> Array:
    """Return the decile of each rank among n: ten parts whose sizes differ by one at most, strongest first."""
    return places * PARTS // np.maximum(n, 1)


def inclusion(sizes: Array, n: int) -> Array:
    """Return the chances that are proportional to ``sizes`` (positive, descending) and sum to n; none exceeds 1.

    They are min(1, c·size): the largest whose share of what is left would pass 1 are taken for certain, one after
    another. With no more than n of them all are 1.
    """
    chances: Array = np.ones(len(sizes))
    left = np.arange(min(n, len(sizes)))
    tails = np.cumsum(sizes[::-1], dtype=np.float64)[::-1]
    fits = np.flatnonzero((n - left) * sizes[left] < tails[left])
    if len(sizes) > n:
        certain = fits[0] if len(fits) else n - 1  # none where the last outweighs all others in float64
        chances[certain:] = sizes[certain:] * (n - certain) / tails[certain]
    return chances


def systematic(chances: Array, start: float) -> Array:
    """Return a sample whose size is the sum of the chances, a whole number, and that takes each with its chance.

    The chances lie end to end, and what the points ``start``, ``start`` + 1 … hit is taken; ``start`` is uniform in
    [0, 1) (systematic sampling with probabilities proportional to size: Madow 1949).
    """
    certain = int((chances == 1.0).argmin()) if (chances < 1.0).any() else len(chances)
    ends = np.cumsum(chances[certain:])
    points = start + np.arange(round(float(ends[-1])) if len(ends) else 0)
    hit = np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)
    return np.concatenate([np.arange(certain), certain + hit])


def _first(ranked: Ranked, wanted: Array) -> Draw:
    return chosen_for_certain(ranked, *spread(wanted), STRATA.index("top"))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Ranges of ranks, ``sizes`` [m, parts] of each latent, that follow one another after ``skipped`` [m].

    ``given`` [m, parts] are drawn of them.
    """

    sizes: Array
    given: Array
    skipped: Array


def _quantiles(ranked: Ranked, wanted: Array, skipped: Array) -> _Parts:
    """Return equal parts of the deciles of all but the first ``skipped`` windows.

    With fewer than ten wanted, equal parts of as many strata, so that no window has no chance.
    """
    total = ranked.sizes - skipped
    parts = np.clip(wanted, 1, PARTS)[:, None]
    # Rank i is in part i * parts // total.
    edges = -(-np.minimum(np.arange(PARTS + 1), parts) * total[:, None] // parts)
    sizes = np.diff(edges, axis=1)
    return _Parts(sizes=sizes, given=allocate(wanted, sizes), skipped=skipped)


def _bins(ranked: Ranked, wanted: Array) -> _Parts:
    """Return equal parts of the bins; with fewer than ten wanted there are as many, wider ones."""
    m = len(wanted)
    parts = np.clip(wanted, 1, PARTS)
    latent = np.repeat(np.arange(m), ranked.sizes)
    part = _binned(ranked, latent, np.arange(len(latent)), parts[latent])
    sizes = np.bincount(latent * PARTS + part, minlength=m * PARTS).reshape(m, PARTS)
    return _Parts(sizes=sizes, given=allocate(wanted, sizes), skipped=np.zeros_like(wanted))


def _binned(ranked: Ranked, latent: Array, at: Array, parts: Array | int) -> Array:
    """Return in which of equally wide parts of 0 … the strongest maximum the maxima ``at`` these places lie."""
    strongest = ranked.maxima[ranked.offsets[latent]].astype(np.float64)
    above = np.ceil(ranked.maxima[at].astype(np.float64) * parts / strongest).astype(np.int64)
    binned: Array = parts - np.maximum(above, 1)
    return binned


def _parts(ranked: Ranked, among: _Parts, label: int, document: Array | None) -> Draw:
    """Draw from ranges of ranks, spread over documents if these are given."""
    sizes, given = among.sizes.reshape(-1), among.given.reshape(-1)
    parts = among.sizes.shape[1]
    keys = nth(ranked.keys[:, None], np.arange(parts)[None, :]).reshape(-1)
    before = np.cumsum(among.sizes, axis=1) - among.sizes
    firsts = (before + (ranked.offsets[:-1] + among.skipped)[:, None]).reshape(-1)  # where each range begins
    if document is None:
        which, place = draw_places(keys, sizes, given)
        chance = (given / np.maximum(sizes, 1))[which]
    else:
        which, place, chance = _spread(keys, sizes, given, ranked.order, document)
    latent, at = which // parts, firsts[which] + place
    ranks = before.reshape(-1)[which] + place
    stratum = np.full(len(at), label)
    if label == _DECILE:
        stratum += deciles(ranks, among.sizes.sum(axis=1)[latent])
    elif label == _BIN:
        stratum += _binned(ranked, latent, at, PARTS)
    return Draw(latent=latent, chosen=ranked.order[at], stratum=stratum, probability=chance)


def _spread(keys: Array, sizes: Array, given: Array, order: Array, document: Array) -> tuple[Array, Array, Array]:
    """Draw from ranges of all ranks, which follow one another, spread over documents; ``order`` is as in Ranked.

    Returns range, place in it and probability, by range and then place.
    """
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    which = np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes)
    own = which[ranks]
    # Windows lie latent by latent, and mostly document by document, as the text does; few ranges sort in linear time.
    grouped = np.argsort(own, kind="stable")
    own, lies = own[grouped], document[grouped]
    begins = np.ones(len(own), bool)
    np.logical_or(own[1:] != own[:-1], lies[1:] != lies[:-1], out=begins[1:])
    if ((lies[1:] < lies[:-1]) & (own[1:] == own[:-1])).any():
        again = np.lexsort((lies, own))
        grouped, own, lies = grouped[again], own[again], lies[again]
        np.logical_or(own[1:] != own[:-1], lies[1:] != lies[:-1], out=begins[1:])
    begin = np.flatnonzero(begins)
    bounds = starts_of(sizes)
    group, nth_of, chance = draw_spread(keys, np.diff(begin, append=len(own)), np.searchsorted(begin, bounds), given)
    at = ranks[grouped[begin[group] + nth_of]]
    taken = np.argsort(at)
    at = at[taken]
    drawn = which[at].astype(np.int64)
    return drawn, at - bounds[drawn], chance[taken]


def _importance(ranked: Ranked, n: int) -> Draw:
    starts = (nth(ranked.keys, np.zeros(len(ranked.keys))) >> np.uint64(11)).astype(np.float64) / 2.0**53
    bounds = ranked.offsets.tolist()
    latents, places, chances = [], [], []
    for latent, (low, high) in enumerate(pairwise(bounds)):
        chance = inclusion(ranked.maxima[low:high].astype(np.float64), n)
        hit = systematic(chance, starts[latent])
        latents.append(np.full(len(hit), latent))
        places.append(low + hit)
        chances.append(chance[hit])
    nothing = np.zeros(0, np.int64)
    at = np.concatenate([nothing, *places])
    return Draw(
        latent=np.concatenate([nothing, *latents]),
        chosen=ranked.order[at],
        stratum=np.full(len(at), STRATA.index("importance")),
        probability=np.concatenate([np.zeros(0), *chances]),
    )


def _merged(one: Draw, other: Draw) -> Draw:
    """Return two draws as one, by latent."""
    order = np.argsort(np.concatenate([one.latent, other.latent]), kind="stable")
    joined = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])[order]
        for name in ("latent", "chosen", "stratum", "probability")
    }
    return Draw(**joined)
