"""What a validation amounts to: bias, coverage, how often ladders are ordered rightly, and sanity checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal, final

import numpy as np

from exegete.metrics import wilson
from exegete.testing.latents import RUNGS
from exegete.testing.validation import Examined, Trials
from exegete.testing.worlds import DAMAGED
from exegete.types import Array

PAIRS: Final = tuple(combinations(RUNGS, 2))
ORDERED: Final = 0.95
"""The share of far pairs that is to come out in the right order, at 100 windows of each class."""
COVERED: Final = 0.93
"""How often 95 % intervals are to hold the true score at least, at 50 windows of each class or more."""
REACHED: Final = 0.8
"""The share of latents in which broad and sibling explanations are to be told from exact ones on hard windows."""
Verdict = Literal["met", "not met", "open"]
_SAME: Final = 1e-9
_RARE: Final = 1e-3
_EVEN: Final = 0.52  # so often a score falls by chance alone, among the draws that are simulated
PASSING: Final = 0.9
"""A metric passes a sanity check when it falls in more latents than this share of them (as Oikarinen et al. 2025)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share with Wilson's 95 % interval, of n."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: float, n: int) -> Share:
        """Return hits out of n."""
        found = wilson(hits, n)
        return cls(value=found.value, low=found.low, high=found.high, n=n)

    def verdict(self, goal: float) -> Verdict:
        """Return whether a goal is met: not to be told where it lies within the interval."""
        if self.low >= goal:
            return "met"
        return "not met" if self.high < goal else "open"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """The mean difference from the true scores, its standard error over latents and draws, and their spread."""

    value: float
    error: float
    spread: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ordering:
    """How often two rungs come out in the order of their true scores, ties counting half.

    Of pairs at least the wanted gap apart: the share ``right``, what was ``predicted``, and both for each pair of rungs
    (``pairs``). Of nearer ones: ``near`` and what was predicted of them, and the difference of the two in Monte-Carlo
    standard errors, latents being independent and the pairs of one not.
    """

    right: Share
    predicted: float
    pairs: tuple[tuple[str, str, Share, float], ...]
    near: Share
    near_predicted: float
    deviation: float


def bias_of(trials: Trials) -> Bias:
    """Return the bias of a headline score over all latents and rungs; NaN where nothing could be scored."""
    off = trials.value - trials.expected
    known = ~np.isnan(off)
    if not known.any():
        return Bias(value=math.nan, error=math.nan, spread=math.nan)
    some = known.any(axis=1)
    means = np.where(known, off, 0.0).sum(axis=1)[some] / known.sum(axis=1)[some]
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Bias(value=float(means.mean()), error=error, spread=float(off[known].std()))


def coverage_of(trials: Trials) -> Share:
    """Return how often the 95 % interval held the true score, of all intervals there were.

    Without those of no width: all answers were alike, and nothing tells how far they may lie from the truth.
    """
    known = (trials.high - trials.low > _SAME) & ~np.isnan(trials.expected)
    held = known & (trials.low <= trials.expected) & (trials.expected <= trials.high)
    return Share.of(int(held.sum()), int(known.sum()))


def ordering_of(examined: Examined, trials: Trials) -> Ordering:
    """Return how well one instrument orders ladders."""
    right, predicted, gap = _pairs(trials)
    known = ~np.isnan(right) & ~np.isnan(gap)
    far = known & (gap >= examined.gap)
    near = known & (gap < examined.gap) & (gap > 0)
    by_pair = tuple(
        (*pair, _share(right[:, i], far[:, i]), _mean(predicted[:, i], far[:, i]))
        for i, pair in enumerate(PAIRS)
        if far[:, i].any()
    )
    off = np.where(near, right - predicted, 0.0).sum(axis=1)
    error = math.sqrt(float(off @ off))
    return Ordering(
        right=_share(right, far),
        predicted=_mean(predicted, far),
        pairs=by_pair,
        near=_share(right, near),
        near_predicted=_mean(predicted, near),
        deviation=float(off.sum()) / error if error else 0.0,
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """In which share of latents a metric falls when an explanation is damaged, and by how much on average."""

    share: Share
    mean: float


def sanity_of(trials: Trials, metric: str) -> dict[str, Fall]:
    """Return how a metric falls when the exact explanation is damaged, by how it is damaged."""
    return _falls(trials, trials.metrics[metric])


def true_falls(trials: Trials) -> dict[str, Fall]:
    """Return the same of the true headline score."""
    return _falls(trials, trials.expected)


def _falls(trials: Trials, values: Array) -> dict[str, Fall]:
    exact = values[:, trials.rungs.index("exact")]
    found = {}
    for how in DAMAGED:
        fall = exact - values[:, trials.rungs.index(how)]
        fall = fall[~np.isnan(fall)]
        share = Share.of(int((fall > _SAME).sum()), len(fall))
        found[how] = Fall(share=share, mean=float(fall.mean()) if len(fall) else math.nan)
    return found


def needed(trials: Trials, how: str) -> float:
    """Return with how many windows of each class the headline score would pass a check, infinite where with no number.

    From the chance that each latent's score falls with as many as there are: as the number grows, its normal quantile
    does with the square root.
    """
    from scipy.special import ndtr, ndtri

    chance = trials.power[:, trials.rungs.index("exact"), trials.rungs.index(how)]
    chance = chance[~np.isnan(trials.expected[:, trials.rungs.index(how)])]
    if not len(chance) or (chance > _EVEN).mean() <= PASSING:
        return math.inf
    quantiles = ndtri(np.clip(chance, _RARE, 1.0 - _RARE))
    sizes = trials.n * np.geomspace(0.1, 1000.0, 401)
    passing = [float(ndtr(quantiles * math.sqrt(size / trials.n)).mean()) > PASSING for size in sizes.tolist()]
    return float(sizes[passing.index(True)]) if any(passing) else math.inf


def passes(found: dict[str, Fall]) -> bool:
    """Whether a metric passes both sanity checks."""
    return all(fall.share.value > PASSING for fall in found.values())


def checked_metrics(trials: Trials) -> list[str]:
    """Return the metrics that sanity checks are about: no counts of what failed, and no parts of a curve."""
    if not set(DAMAGED) <= set(trials.rungs):
        return []
    parts = ("_decile_", "sensitivity_", "specificity_", "auroc_")
    skipped = ("outside_mass", "ece", "brier", "base_rate")
    return [m for m in trials.metrics if m not in skipped and not any(part in m for part in parts)]


def _pairs(trials: Trials) -> tuple[Array, Array, Array]:
    """Return of every pair of rungs whether it was ordered rightly, the predicted chance, and the gap [rows, pairs]."""
    places = [(trials.rungs.index(a), trials.rungs.index(b)) for a, b in PAIRS]
    first, second = (np.array(part) for part in zip(*places, strict=True))
    gap = trials.expected[:, first] - trials.expected[:, second]
    told = trials.value[:, first] - trials.value[:, second]
    won = np.where(np.isnan(told), np.nan, (told > 0) + 0.5 * (told == 0))
    power = trials.power[:, first, second]
    above = gap >= 0
    return np.where(above, won, 1 - won), np.where(above, power, 1 - power), np.abs(gap)


def _share(right: Array, which: Array) -> Share:
    return Share.of(float(np.where(which, right, 0.0).sum()), int(which.sum()))


def _mean(values: Array, which: Array) -> float:
    return float(values[which].mean()) if which.any() else math.nan


def rows_of(examined: Sequence[Examined], *, explained: bool) -> list[Examined]:
    """Return the instruments that judge explanations, or those that need none."""
    return [one for one in examined if one.explained == explained]
