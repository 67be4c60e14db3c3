"""Drawing without replacement from many strata at once. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exegete.examples.keys import nth
from exegete.types import Array

_CROWDED = 4  # of a stratum with fewer members for each one wanted, all are given a key


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
