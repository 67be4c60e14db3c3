"""Silent windows to judge beside the firing ones: kinds that divide the test frame, and draws from each.

The units are near-duplicate clusters with at least one window in which the latent may be called silent: of such windows
one, drawn at random, stands for all. A unit is of the first kind that any of its silent windows is of. Arrays in,
arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.examples.clusters import Clusters
from exegete.examples.draws import allocate, draw_places, spread, starts_of
from exegete.examples.keys import nth
from exegete.types import Array

_NONE: Final = np.zeros(0, np.int64)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """Silent windows of a block of m latents, and what they were drawn from.

    ``latent`` [n], ``window`` [n], ``kind`` [n] (which of the kinds asked for), ``probability`` [n] and
    ``multiplicity`` [n] tell what was drawn, by latent; ``sizes`` [m, kinds] are the units of each kind in the test
    frame, ``unused`` [m] those of none.
    """

    latent: Array
    window: Array
    kind: Array
    probability: Array
    multiplicity: Array
    sizes: Array
    unused: Array


def draw_silent(
    touched: Array,
    barred: Array,
    kinds: Sequence[Array | None],
    known: Clusters,
    n: int,
    keys: Array,
) -> Silent:
    """Draw n silent windows for each of m latents, in equal parts from ``kinds``, without replacement.

    Windows of latents are given as latent * W + window, ascending and distinct, with W windows in the frame:
    ``touched`` are those in which a latent has any firing, ``barred`` those that may not be drawn (they hold all that
    are touched), ``kinds`` the windows of each kind: the first that claims a unit has it, and the last may be None,
    for all others.
    ``keys`` [m] uint64 decide the draws. What one kind lacks the others make up for.
    """
    m, width, count = len(keys), len(known.number), len(known)
    claimed, owned = _full(barred, known, width), []
    for windows in kinds:
        found = _NONE if windows is None else _clusters_of(_without(windows, barred), known, width)
        owned.append(_without(found, claimed))
        claimed = _united(claimed, owned[-1])
    sizes = np.stack([_counted(codes, count, m) for codes in owned], axis=1)
    if kinds[-1] is None:
        sizes[:, -1] = count - _counted(claimed, count, m)
    given = allocate(np.full(m, n), sizes)
    parts = []
    for kind, codes in enumerate(owned):
        latent, place = draw_places(nth(keys, np.full(m, kind)), sizes[:, kind], given[:, kind])
        if kinds[kind] is None:
            cluster = _nth_free(claimed, latent, place, m, count)
        else:
            cluster = codes[starts_of(sizes[:, kind])[latent] + place] % count
        parts.append((latent, cluster, np.full(len(latent), kind)))
    latent, cluster, kind_of = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order = np.argsort(latent, kind="stable")
    latent, cluster, kind_of = latent[order], cluster[order], kind_of[order]
    window, multiplicity = _representatives(latent, cluster, barred, known, nth(keys, np.full(m, len(kinds))))
    return Silent(
        latent=latent,
        window=window,
        kind=kind_of,
        probability=(given / np.maximum(sizes, 1))[latent, kind_of],
        multiplicity=multiplicity,
        sizes=sizes,
        unused=count - _counted(_full(touched, known, width), count, m) - sizes.sum(axis=1),
    )


def _full(windows: Array, known: Clusters, width: int) -> Array:
    """Return the clusters, as latent * clusters + cluster, of which all windows are given."""
    codes = _coded(windows, known, width)
    if known.single:
        return codes
    codes, counts = np.unique(codes, return_counts=True)
    whole: Array = codes[counts == np.diff(known.offsets)[codes % len(known)]]
    return whole


def _clusters_of(windows: Array, known: Clusters, width: int) -> Array:
    """Return the clusters, as latent * clusters + cluster, of which any window is given."""
    codes = _coded(windows, known, width)
    return codes if known.single else np.unique(codes)


def _coded(windows: Array, known: Clusters, width: int) -> Array:
    latent = windows // width
    codes: Array = latent * len(known) + known.number[windows - latent * width]
    return codes


def _counted(codes: Array, count: int, m: int) -> Array:
    """Return how many codes, latent * count + something, there are of each latent."""
    return np.bincount(codes // count, minlength=m)


def _within(values: Array, ascending: Array) -> Array:
    """Return which values are among ascending ones."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    found: Array = ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values
    return found


def _without(values: Array, ascending: Array) -> Array:
    others: Array = values[~_within(values, ascending)]
    return others


def _united(one: Array, other: Array) -> Array:
    """Return the members of two disjoint ascending arrays, ascending."""
    return np.sort(np.concatenate([one, other])) if len(other) else one


def _nth_free(taken: Array, latent: Array, place: Array, m: int, count: int) -> Array:
    """Return the cluster at this place among those that are not ``taken`` from the latent."""
    owner, cluster = np.divmod(taken, count)
    starts = starts_of(np.bincount(owner, minlength=m))
    # The k-th free cluster is k plus the number of taken clusters before it.
    free_before = cluster - (np.arange(len(taken)) - starts[owner])
    before = np.searchsorted(owner * (count + 1) + free_before, latent * (count + 1) + place, side="right")
    free: Array = place + before - starts[latent]
    return free


def _representatives(latent: Array, cluster: Array, barred: Array, known: Clusters, keys: Array) -> tuple[Array, Array]:
    """Return of each cluster one window that is not barred, drawn at random, and how many there are."""
    window = known.members[known.offsets[cluster]]
    multiplicity: Array = np.ones(len(window), np.int64)
    sizes = known.offsets[cluster + 1] - known.offsets[cluster]
    several = np.flatnonzero(sizes > 1)
    if len(several):
        which, place = spread(sizes[several])
        members = known.members[known.offsets[cluster[several]][which] + place]
        free = ~_within(latent[several][which] * len(known.number) + members, barred)
        which, members = which[free], members[free]
        counts = np.bincount(which, minlength=len(several))
        drawn = nth(keys[latent[several]], cluster[several])
        place = (drawn % counts.astype(np.uint64)).astype(np.int64)
        window[several] = members[starts_of(counts)[:-1] + place]
        multiplicity[several] = counts
    return window, multiplicity
