"""What judging in rounds is tried on: latents whose judge is right in a known share of the test frame.

A latent's frame holds windows of both classes in documents; every window has the chance that the judge is right on it,
and the balanced accuracy θ over the frame, strata mixed as drawn, is what a test decides about. Windows are drawn as
exegete draws them: without replacement from every stratum, at most three of a document where the supply allows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from scipy import optimize, special

from exegete.types import STRATA, Array, LatentId, Windows

PER_DOCUMENT = 3
Over = Literal["frame", "documents"]


@final
@dataclass(frozen=True, kw_only=True)
class Judging:
    """How judges err: where the balanced accuracy lies, and what it hangs on.

    ``apart`` is specificity − sensitivity; ``falling`` how far sensitivity falls from the first to the last decile;
    ``correlation`` the intraclass correlation of right answers within a document, of both classes; ``over`` says what
    has the given balanced accuracy: each latent's frame as it is, or frames on average over documents drawn anew.
    ``frame`` is the number of windows of a class in the frame, ``drawn`` of those that are drawn.
    """

    name: str
    apart: float = 0.0
    falling: float = 0.0
    correlation: float = 0.0
    documents: int = 40
    over: Over = "frame"
    frame: int = 1000
    drawn: int = 100
    fixed: bool = False
    """Whether the judge's answers are properties of the windows: asked again it says the same, and the frame holds an
    exact number of right ones."""


@final
@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The windows of one latent as drawn, and on which of them the judge is right, bool [n]."""

    windows: Windows
    right: Array


@functools.cache
def _strata(n: int, frame: int) -> tuple[Array, Array, Array]:
    """Return class, stratum and how many are drawn: deciles of firing windows, two kinds of silent ones."""
    decile = np.array([STRATA.index(f"decile_{i}") for i in range(10)])
    kinds = np.array([STRATA.index("silent"), STRATA.index("same_token")])
    fires = np.arange(2 * frame) < frame
    stratum = np.concatenate([np.resize(decile, frame), np.resize(kinds, frame)])
    wanted = np.zeros(len(STRATA), np.int64)
    wanted[decile], wanted[kinds] = n // 10, n // 2
    return fires, stratum, wanted


@functools.cache
def _spread(mean: float, correlation: float) -> tuple[float, float]:
    """Return centre and deviation on the logit scale of rates of this mean that give this intraclass correlation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()

    def missed(at: Array) -> list[float]:
        rates = special.expit(at[0] + np.exp(at[1]) * nodes)
        found = float(weights @ rates)
        variance = float(weights @ np.square(rates)) - found**2
        return [found - mean, variance - correlation * mean * (1.0 - mean)]

    centre, log_deviation = optimize.fsolve(missed, [special.logit(mean), np.log(0.8)])
    return float(centre), float(np.exp(log_deviation))


def rates(
    judging: Judging, level: float, rng: np.random.Generator, effects: Array | None = None
) -> tuple[Array, Array]:
    """Return of every window of a frame its document [2·frame] and the chance that the judge is right [2·frame].

    ``effects`` [documents] are standard normal, how easy each document is; drawn unless they are given.
    """
    fires, stratum, _ = _strata(judging.drawn, judging.frame)
    document = rng.integers(judging.documents, size=len(fires))
    easy = rng.standard_normal(judging.documents) if effects is None else effects
    slope = judging.falling * (0.5 - np.arange(10) / 9.0)
    hit, rejected = level - judging.apart / 2.0, level + judging.apart / 2.0
    chance = np.empty(len(fires))
    for rate, of in [*((hit + slope[i], fires & (stratum == i)) for i in range(10)), (rejected, ~fires)]:
        if judging.correlation:
            centre, deviation = _spread(round(float(rate), 6), judging.correlation)
            chance[of] = special.expit(centre + deviation * easy[document[of]])
        else:
            chance[of] = rate
    if judging.over == "frame":
        for _ in range(30):  # as near as the ends of the range allow
            chance = np.clip(chance + level - chance.mean(), 0.0, 1.0)
    return document, chance


def answers(judging: Judging, level: float, chance: Array, rng: np.random.Generator) -> Array:
    """Return on which windows of a frame the judge is right."""
    if not judging.fixed:
        return rng.random(len(chance)) < chance
    right = np.zeros(len(chance), bool)
    right[rng.permutation(len(chance))[: round(level * len(chance))]] = True
    return right


def draw(judging: Judging, document: Array, rng: np.random.Generator) -> Array:
    """Return which windows of a frame are drawn, ascending."""
    _, stratum, wanted = _strata(judging.drawn, judging.frame)
    order = rng.permutation(len(document))
    group = stratum[order] * judging.documents + document[order]
    by_group = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    nth = np.empty(len(order), np.int64)
    nth[by_group] = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    ranked = np.lexsort((np.arange(len(order)), nth >= PER_DOCUMENT, stratum[order]))
    begins = np.searchsorted(stratum[order][ranked], np.arange(len(STRATA)))
    place = np.arange(len(order)) - begins[stratum[order][ranked]]
    chosen: Array = np.sort(order[ranked[place < wanted[stratum[order][ranked]]]])
    return chosen


def drawn_windows(judging: Judging, which: Array, document: Array) -> Windows:
    """Return windows of a frame as columns; what stands in them does not matter here."""
    fires, stratum, _ = _strata(judging.drawn, judging.frame)
    n = len(which)
    return Windows(
        split=np.full(n, 2, np.int8),
        stratum=stratum[which].astype(np.int8),
        row=which.astype(np.int64),
        start=np.zeros(n, np.int64),
        document=document[which].astype(np.int64),
        fires=fires[which],
        multiplicity=np.ones(n, np.int64),
        probability=np.full(n, 0.5),
        tokens=np.zeros((n, 1), np.uint32),
        activations=fires[which, None].astype(np.float32),
    )


def latent(judging: Judging, level: float, rng: np.random.Generator, effects: Array | None = None) -> Drawn:
    """Return one latent with balanced accuracy ``level``."""
    document, chance = rates(judging, level, rng, effects)
    right = answers(judging, level, chance, rng)
    which = draw(judging, document, rng)
    return Drawn(windows=drawn_windows(judging, which, document), right=right[which])


def name_of(index: int) -> LatentId:
    """Return the name of a simulated latent."""
    return LatentId(coder="simulated", index=index)
