"""Trials of the intruder test: which windows of a latent stand together, and which other is put among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np

from exegete.examples.render import active_tokens, transplant_marks
from exegete.streams import stream
from exegete.types import Array, Windows
from exegete.views import LatentView

Kind = Literal["default", "internal", "decile"]
KINDS: Final[tuple[Kind, ...]] = ("default", "internal", "decile")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Windows to be shown together, as places among the test windows in the order shown; ``intruder`` is one of them.

    ``stratum`` is a place in STRATA: that of the windows which are no intruders.
    """

    places: tuple[int, ...]
    intruder: int
    stratum: int

    @property
    def answer(self) -> int:
        """Where the intruder stands among them, from 0."""
        return self.places.index(self.intruder)


def deal(view: LatentView, windows: Windows, kind: Kind, n: int) -> list[Trial]:
    """Return the trials of ``n`` of these windows that a latent has enough windows for; no window is in two of them.

    n − 1 firing windows of one stratum, from different documents as far as possible, and an intruder: ``default``, a
    silent window; ``internal``, a firing window of another stratum, drawn at random; ``decile``, one of the stratum
    half of all strata away. Who stands where is drawn, from the latent's own stream.
    """
    rng = stream(view.examples.seed, view.latent, "intruder", kind)
    strata = sorted(set(windows.stratum[windows.fires].tolist()))
    if kind != "default" and len(strata) < 2:
        return []
    firing = [rng.permutation(np.flatnonzero(windows.fires & (windows.stratum == s))) for s in strata]
    silent = rng.permutation(np.flatnonzero(~windows.fires)).tolist()
    groups, left = [], []
    for places in firing:
        # Where intruders fire too, every trial of a stratum leaves one of its windows to intrude elsewhere.
        count = len(places) // (n - 1 if kind == "default" else n)
        groups.append(_grouped(places[: count * (n - 1)], windows.document, count))
        left.append(places[count * (n - 1) :].tolist())
    trials = []
    turns = max(map(len, groups), default=0)
    # One distance for all trials of a round: each stratum then gives one intruder for the one it gets.
    away = [len(strata) // 2] * turns if kind == "decile" else rng.integers(1, max(len(strata), 2), turns).tolist()
    for at, turn, group in _rounds(groups):
        pool = silent if kind == "default" else left[(at + away[turn]) % len(strata)]
        if not pool:
            continue
        intruder = int(pool.pop())
        places = rng.permutation([*group, intruder])
        trials.append(Trial(places=tuple(map(int, places)), intruder=intruder, stratum=strata[at]))
    return trials


def _rounds(groups: Sequence[Sequence[Array]]) -> Iterator[tuple[int, int, Array]]:
    """Yield the groups of all strata, the first of each before the second of any, with their stratum and round."""
    for turn in range(max(map(len, groups), default=0)):
        for at, those in enumerate(groups):
            if turn < len(those):
                yield at, turn, those[turn]


def _grouped(places: Array, document: Array, count: int) -> list[Array]:
    """Return windows in so many groups of one size: those of one document are dealt to different ones in turn."""
    order = places[np.argsort(document[places], kind="stable")]
    return [order[i::count] for i in range(count)]


def marked(view: LatentView, windows: Windows, threshold: float) -> Array:
    """Return the marks of all windows, bool [windows, length].

    Firing windows are marked where their activation exceeds ``threshold`` of their maximum, silent ones with the
    pattern of a firing one.
    """
    shown, fires = active_tokens(windows.activations, threshold), windows.fires
    if fires.any() and not fires.all():
        rng = stream(view.examples.seed, view.latent, "intruder", "marks")
        hidden = view.tokens.is_special[windows.tokens[~fires]]
        starts = windows.start
        shown[~fires] = transplant_marks(shown[fires], starts[fires], starts[~fires], rng, hidden)
    return shown
