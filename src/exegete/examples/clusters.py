"""Near-duplicate windows: which windows stand for one another. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.examples.draws import starts_of
from exegete.examples.fired import Fired
from exegete.examples.keys import mixed
from exegete.store.duplicates import window_clusters
from exegete.types import Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """The windows of one split, those that are near-duplicates of one another together.

    ``number`` [windows of the frame] int32: the cluster of each window, −1 for those of other splits; clusters are
    numbered in the order of their first windows. ``members`` int64: the windows of the split, cluster by cluster, and
    ``offsets`` [clusters + 1] where each cluster begins.
    """

    number: Array
    members: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def single(self) -> bool:
        """Whether no window has a near-duplicate."""
        return len(self) == len(self.members)


def clusters(windows: Array, n: int, tokens_of: Callable[[Array], Array], threshold: float) -> Clusters:
    """Gather near-duplicates among ``windows`` [k] of a frame of n.

    ``tokens_of`` gives the tokens [some, window] of some windows. ``threshold`` is the Jaccard similarity from which on
    two windows are near-duplicates; with 0 every window stays alone.
    """
    number = np.full(n, -1, np.int32)
    if threshold and len(windows):
        heads = window_clusters(lambda start, stop: tokens_of(windows[start:stop]), len(windows), threshold)
        number[windows] = np.unique(heads, return_inverse=True)[1]
    else:
        number[windows] = np.arange(len(windows))
    own = number[windows]
    sizes = np.bincount(own) if len(own) else np.zeros(0, np.int64)
    return Clusters(number=number, members=windows[np.argsort(own, kind="stable")], offsets=starts_of(sizes))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Firing windows of a block of latents, one for all its near-duplicates; by latent and then by window.

    ``latent``, ``window`` and ``peak`` [u] int64 and ``maximum`` [u] float32 are as in Fired, ``multiplicity`` [u]
    int64 says how many firing windows a unit stands for; ``offsets`` [m + 1] where each latent's units begin.
    """

    latent: Array
    window: Array
    peak: Array
    maximum: Array
    multiplicity: Array
    offsets: Array


def units(fired: Fired, known: Clusters, keys: Array) -> Units:
    """Let one firing window stand for all of its cluster in which a latent fires, drawn at random by ``keys`` [m]."""
    kept = fired.maximum > 0
    multiplicity: Array = np.ones(len(fired), np.int64)
    if not known.single:
        number = known.number[fired.window]
        several = np.flatnonzero(kept & (known.offsets[number + 1] - known.offsets[number] > 1))
        latent, window = fired.latent[several], fired.window[several]
        order = np.lexsort((mixed(keys[latent] ^ window.astype(np.uint64)), number[several], latent))
        cluster = latent[order] * len(known) + number[several][order]
        first = np.flatnonzero(np.diff(cluster, prepend=-1))
        kept[several] = False
        kept[several[order[first]]] = True
        multiplicity[several[order[first]]] = np.diff(first, append=len(order))
    chosen = slice(None) if kept.all() else np.flatnonzero(kept)
    latent = fired.latent[chosen]
    return Units(
        latent=latent,
        window=fired.window[chosen],
        peak=fired.peak[chosen],
        maximum=fired.maximum[chosen],
        multiplicity=multiplicity[chosen],
        offsets=starts_of(np.bincount(latent, minlength=len(fired.offsets) - 1)),
    )
