"""Drawing without replacement from many strata at once. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from exegete.examples.keys import mixed, nth
from exegete.types import Array

PER_DOCUMENT: Final = 3
"""Test windows of one document in a stratum at most, while other documents have enough."""
_CROWDED: Final = 4  # of a stratum with fewer members for each one wanted, all are given a key


def starts_of(sizes: Array | Sequence[int]) -> Array:
    """Return where each part begins when parts of these sizes follow one another, and where the last ends [n + 1]."""
    starts: Array = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def spread(sizes: Array) -> tuple[Array, Array]:
    """Return for parts of these sizes, member by member, the part it is of and its place in that part."""
    which = np.repeat(np.arange(len(sizes)), sizes)
    return which, np.arange(len(which)) - starts_of(sizes)[which]


def allocate(wanted: Array, sizes: Array) -> Array:
    """Share numbers ``wanted`` [m] among strata of ``sizes`` [m, strata], as equally as they allow.

    What remains goes to the first strata. A stratum gives no more than it has; what it lacks the others make up for.
    Gives everything when more is wanted than there is.
    """
    given: Array = np.zeros(sizes.shape, np.int64)
    left = np.minimum(wanted, sizes.sum(axis=1))
    while left.any():
        room = given < sizes
        share = left // np.maximum(room.sum(axis=1), 1)
        # Once fewer are left than strata have room, the first of these take one each.
        last = (np.cumsum(room, axis=1) <= left[:, None]).astype(np.int64)
        added = np.where(room, np.minimum(sizes - given, np.where(share[:, None] > 0, share[:, None], last)), 0)
        given += added
        left = left - added.sum(axis=1)
    return given


def draw_places(keys: Array, sizes: Array, wanted: Array) -> tuple[Array, Array]:
    """Draw ``wanted`` [s] of the ``sizes`` [s] members of every stratum, without replacement, or all of them.

    Every set of so many members has the same chance. Returns stratum and place in it, ascending. What is drawn from a
    stratum is a function of its key (uint64), size and wanted number.
    """
    wanted = np.minimum(wanted, sizes)
    crowded = sizes <= _CROWDED * wanted
    parts = [_by_key(keys, sizes, np.where(crowded, wanted, 0)), _by_trial(keys, sizes, np.where(crowded, 0, wanted))]
    stratum, place = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    order = np.lexsort((place, stratum))
    return stratum[order], place[order]


def draw_spread(keys: Array, sizes: Array, starts: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """Draw ``wanted`` [s] members of every stratum, no more than a few of any of the documents they lie in.

    Documents [d] have ``sizes`` members each, which may be 0, and lie stratum by stratum; ``starts`` [s + 1] says where
    those of each begin. Of every document in a stratum at most c members are kept, all sets of so many alike, and of
    what is kept in the stratum (N) so many are drawn as are ``wanted`` (n, no more than there are). c is the least
    number from PER_DOCUMENT on with which N reaches n; a document of m members gives each with probability
    min(m, c) / m · n / N. Returns document [n] and place in it, ascending, and that probability. What is drawn
    from a stratum is a function of its key (uint64), sizes and wanted number.
    """
    kept = np.minimum(sizes, PER_DOCUMENT)
    ends = starts_of(kept)
    short = np.flatnonzero(np.diff(ends[starts]) < wanted)
    if len(short):
        stratum, place = spread(np.diff(starts)[short])
        at = starts[short][stratum] + place
        kept[at] = np.minimum(sizes[at], _caps(sizes[at], stratum, wanted[short])[stratum])
        ends = starts_of(kept)
    held = np.diff(ends[starts])
    # Which of its members a document keeps need not be drawn for them all: any it keeps is any of its members.
    stratum, slot = draw_places(keys, held, wanted)
    document = np.searchsorted(ends, ends[starts[stratum]] + slot, side="right") - 1
    first = np.flatnonzero(np.diff(document, prepend=-1))
    counts = np.diff(first, append=len(document))
    own = nth(mixed(~keys[stratum[first]]), document[first] - starts[stratum[first]])
    place = np.repeat((mixed(own) % sizes[document[first]].astype(np.uint64)).astype(np.int64), counts)
    several = np.flatnonzero(counts > 1)
    if len(several):
        found = draw_places(own[several], sizes[document[first[several]]], counts[several])[1]
        place[np.repeat(counts > 1, counts)] = found
    return document, place, kept[document] / sizes[document] * (wanted / np.maximum(held, 1))[stratum]


def _caps(sizes: Array, stratum: Array, wanted: Array) -> Array:
    """Return the least c of each stratum with which its documents, c members of each at most, hold those wanted.

    PER_DOCUMENT is known to be too few, and as many as are wanted are enough.
    """
    low, high = np.full(len(wanted), PER_DOCUMENT), wanted
    while (high - low > 1).any():
        middle = (low + high) // 2
        # Sums of whole numbers below 2^53 are exact.
        held = np.bincount(stratum, np.minimum(sizes, middle[stratum]), len(wanted))
        low, high = np.where(held < wanted, middle, low), np.where(held < wanted, high, middle)
    return high


def _by_key(keys: Array, sizes: Array, wanted: Array) -> tuple[Array, Array]:
    """Give every member a random key and take those with the least."""
    stratum, place = spread(np.where(wanted > 0, sizes, 0))
    order = np.lexsort((nth(keys[stratum], place), stratum))
    taken = order[place < wanted[stratum]]  # members lie stratum by stratum, before the sorting and after
    return stratum[taken], place[taken]


def _by_trial(keys: Array, sizes: Array, wanted: Array) -> tuple[Array, Array]:
    """Draw members with replacement until enough different ones have come."""
    trials = 2 * wanted
    while True:
        stratum, number = spread(trials)
        place = (nth(keys[stratum], number) % np.maximum(sizes, 1).astype(np.uint64)[stratum]).astype(np.int64)
        new = _firsts(stratum, place)
        stratum, place = stratum[new], place[new]
        found = np.bincount(stratum, minlength=len(sizes))
        short = found < wanted
        if not short.any():
            among = np.arange(len(stratum)) - starts_of(found)[stratum]
            kept = among < wanted[stratum]
            return stratum[kept], place[kept]
        trials = np.where(short, 2 * trials, trials)


def _firsts(stratum: Array, place: Array) -> Array:
    """Return which pairs come for the first time, ascending."""
    order = np.lexsort((place, stratum))
    stratum, place = stratum[order], place[order]
    repeated = (stratum[1:] == stratum[:-1]) & (place[1:] == place[:-1])
    first: Array = order[np.concatenate([[True], ~repeated])[: len(order)]]
    first.sort()
    return first
