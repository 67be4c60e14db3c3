"""Silent windows to judge beside the firing ones: kinds that divide the test frame, and draws from each.

The units are near-duplicate clusters with at least one window in which the latent may be called silent: of such windows
one, drawn at random, stands for all. A unit is of the first kind that any of its silent windows is of, and lies in the
document of the window that stands for it. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.examples.clusters import Clusters
from exegete.examples.draws import PER_DOCUMENT, allocate, draw_spread, spread, starts_of
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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """The documents that the clusters of a split lie in, numbered from 0 in any order.

    ``document`` [windows of the frame] int64 is that of each window, 0 for those of other splits; ``n`` how many there
    are. ``settled`` are the clusters that lie in one document, document by document, of which each begins at one of
    ``starts`` [n + 1]; ``home`` are these documents. ``place`` [clusters] is each one's place among them, −1 for those
    that lie in several documents, which are ``wandering``.
    """

    document: Array
    n: int
    settled: Array
    starts: Array
    home: Array
    place: Array
    wandering: Array


def homes(known: Clusters, document: Array | None) -> Homes:
    """Return where clusters lie, by the document [windows of the frame] (int, at least 0) of each window.

    Where no document could have too many units, and without documents, all are one: draws need not be spread.
    """
    number: Array = np.zeros(len(known.number), np.int64)
    sizes = np.diff(known.offsets)
    if document is not None and len(known):
        seen = np.zeros(int(document[known.members].max()) + 1, bool)
        seen[document[known.members]] = True
        own = (np.cumsum(seen) - 1)[document[known.members]]
        if np.bincount(own).max() > PER_DOCUMENT:
            number[known.members] = own
    own = number[known.members]
    home = own[known.offsets[:-1]]
    apart = (
        np.bincount(np.repeat(np.arange(len(known)), sizes)[own != np.repeat(home, sizes)], minlength=len(known)) > 0
    )
    settled = np.flatnonzero(~apart)
    settled = settled[np.argsort(home[settled], kind="stable")]
    n = int(own.max(initial=0)) + 1
    place: Array = np.full(len(known), -1, np.int64)
    place[settled] = np.arange(len(settled))
    return Homes(
        document=number,
        n=n,
        settled=settled,
        starts=starts_of(np.bincount(home[settled], minlength=n)),
        home=home[settled],
        place=place,
        wandering=np.flatnonzero(apart),
    )


def draw_silent(
    touched: Array,
    barred: Array,
    kinds: Sequence[Array | None],
    known: Clusters,
    n: int,
    keys: Array,
    where: Homes | None = None,
) -> Silent:
    """Draw n silent windows for each of m latents, in equal parts from ``kinds``, without replacement.

    Windows of latents are given as latent * W + window, ascending and distinct, with W windows in the frame:
    ``touched`` are those in which a latent has any firing, ``barred`` those that may not be drawn (they hold all that
    are touched), ``kinds`` the windows of each kind: the first that claims a unit has it, and the last may be None,
    for all others.
    ``keys`` [m] uint64 decide the draws. What one kind lacks the others make up for. The window that stands for a unit
    is decided first; those drawn of a kind are then spread over documents, by ``where`` (``draw_spread``).
    """
    m, width, count = len(keys), len(known.number), len(known)
    where = homes(known, None) if where is None else where
    claimed, owned = _full(barred, known, width), []
    for windows in kinds:
        found = _NONE if windows is None else _clusters_of(_without(windows, barred), known, width)
        owned.append(_without(found, claimed))
        claimed = _united(claimed, owned[-1])
    sizes = np.stack([_counted(codes, count, m) for codes in owned], axis=1)
    if kinds[-1] is None:
        sizes[:, -1] = count - _counted(claimed, count, m)
    given = allocate(np.full(m, n), sizes)
    standing = _Standing(barred, known, nth(keys, np.full(m, len(kinds))))
    parts = []
    for kind, codes in enumerate(owned):
        own = nth(keys, np.full(m, kind))
        if kinds[kind] is None:
            part = _drawn_of_rest(claimed, given[:, kind], where, standing, own)
        else:
            part = _drawn_of(codes, given[:, kind], where, standing, own)
        parts.append((*part, np.full(len(part[0]), kind)))
    latent, cluster, probability, kind_of = (np.concatenate([part[i] for part in parts]) for i in range(4))
    order = np.lexsort((cluster, kind_of, latent))
    latent, cluster = latent[order], cluster[order]
    window, multiplicity = standing.of(latent, cluster)
    return Silent(
        latent=latent,
        window=window,
        kind=kind_of[order],
        probability=probability[order],
        multiplicity=multiplicity,
        sizes=sizes,
        unused=count - _counted(_full(touched, known, width), count, m) - sizes.sum(axis=1),
    )


def _drawn_of(codes: Array, given: Array, where: Homes, standing: _Standing, keys: Array) -> tuple[Array, Array, Array]:
    """Draw ``given`` [m] of the clusters of each latent, latent * clusters + cluster, ascending.

    Returns latents, clusters and probabilities.
    """
    m, count = len(keys), len(where.place)
    latent, cluster = np.divmod(codes, count)
    home = latent * where.n + where.document[standing.of(latent, cluster)[0]]
    if (home[1:] < home[:-1]).any():
        order = np.argsort(home, kind="stable")
        home, cluster = home[order], cluster[order]
    begin = np.flatnonzero(np.diff(home, prepend=-1))
    starts = np.searchsorted(home[begin], np.arange(m + 1) * where.n)
    group, place, chance = draw_spread(keys, np.diff(begin, append=len(home)), starts, given)
    at = begin[group] + place
    return home[at] // where.n, cluster[at], chance


def _drawn_of_rest(
    claimed: Array, given: Array, where: Homes, standing: _Standing, keys: Array
) -> tuple[Array, Array, Array]:
    """Draw ``given`` [m] of the clusters of each latent that are not ``claimed``, as ``_drawn_of`` does."""
    m, count, n, held = len(keys), len(where.place), where.n, len(where.settled)
    owner = claimed // count
    taken = where.place[claimed - owner * count]
    if len(where.wandering):
        owner, taken = owner[taken >= 0], taken[taken >= 0]
    codes = owner * held + taken
    if (codes[1:] < codes[:-1]).any():
        codes.sort()
        owner, taken = np.divmod(codes, held)
    counts = np.bincount(owner * n + where.home[taken], minlength=m * n).reshape(m, n)
    settled = (np.diff(where.starts) - counts).reshape(-1)
    free = ~_within((np.arange(m)[:, None] * count + where.wandering).reshape(-1), claimed)
    wanderer = np.repeat(np.arange(m), len(where.wandering))[free]
    wandering = np.tile(where.wandering, m)[free]
    home = wanderer * n + where.document[standing.of(wanderer, wandering)[0]]
    sizes = settled + np.bincount(home, minlength=m * n) if len(home) else settled
    group, place, chance = draw_spread(keys, sizes, np.arange(m + 1) * n, given)
    latent, document = np.divmod(group, n)
    # A document's free settled clusters come first, then the wandering ones that came to it.
    begin = where.starts[document]
    firsts = starts_of(np.bincount(owner, minlength=m))
    before = begin - (np.searchsorted(codes, latent * held + begin) - firsts[latent])
    extra = place - settled[group]
    own = extra < 0
    cluster = np.zeros(len(group), np.int64)
    cluster[own] = where.settled[_nth_free(owner, taken, firsts, latent[own], (before + place)[own], held)]
    if not own.all():
        wanted = np.zeros(m * n, bool)
        wanted[group[~own]] = True
        came = np.flatnonzero(wanted[home])
        came = came[np.argsort(home[came], kind="stable")]
        cluster[~own] = wandering[came[np.searchsorted(home[came], group[~own]) + extra[~own]]]
    return latent, cluster, chance


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


def _nth_free(owner: Array, taken: Array, firsts: Array, latent: Array, place: Array, count: int) -> Array:
    """Return which of ``count`` is at this place among those that are not ``taken`` from the latent.

    Those of each ``owner`` are ascending and begin at ``firsts``.
    """
    # The k-th free one is k plus the number of taken ones before it.
    free_before = taken - (np.arange(len(taken)) - firsts[owner])
    before = np.searchsorted(owner * (count + 1) + free_before, latent * (count + 1) + place, side="right")
    free: Array = place + before - firsts[latent]
    return free


@final
class _Standing:
    """Which window stands for a cluster: one of those that are not barred, drawn at random for each latent."""

    def __init__(self, barred: Array, known: Clusters, keys: Array) -> None:
        self._barred, self._known, self._keys = barred, known, keys
        # Clusters of several windows of which some are barred, as latent * clusters + cluster.
        self._partly = _NONE
        if not known.single:
            codes = _coded(barred, known, len(known.number))
            self._partly = np.unique(codes[(np.diff(known.offsets) > 1)[codes % len(known)]])

    def of(self, latent: Array, cluster: Array) -> tuple[Array, Array]:
        """Return the window of each cluster, and how many it stands for; of none are all windows barred."""
        known = self._known
        begin = known.offsets[cluster]
        if known.single:
            return known.members[begin], np.ones(len(begin), np.int64)
        multiplicity = known.offsets[cluster + 1] - begin
        several = np.flatnonzero(multiplicity > 1)
        drawn = np.zeros(len(begin), np.uint64)
        drawn[several] = nth(self._keys[latent[several]], cluster[several])
        window = known.members[begin + (drawn % multiplicity.astype(np.uint64)).astype(np.int64)]
        partly = several[_within(latent[several] * len(known) + cluster[several], self._partly)]
        if len(partly):
            which, place = spread(multiplicity[partly])
            members = known.members[begin[partly][which] + place]
            free = ~_within(latent[partly][which] * len(known.number) + members, self._barred)
            which, members = which[free], members[free]
            counts = np.bincount(which, minlength=len(partly))
            place = (drawn[partly] % counts.astype(np.uint64)).astype(np.int64)
            window[partly] = members[starts_of(counts)[:-1] + place]
            multiplicity[partly] = counts
        return window, multiplicity
