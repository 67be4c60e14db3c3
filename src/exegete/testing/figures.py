"""What a validation amounts to: bias, coverage, how often ladders are ordered rightly, and sanity checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, final

import numpy as np

from exegete.metrics import wilson
from exegete.testing.latents import RUNGS
from exegete.testing.validation import Examined, Trials
from exegete.testing.worlds import DAMAGED
from exegete.types import Array

PAIRS: Final = tuple(combinations(RUNGS, 2))
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

    Of pairs at least the wanted gap apart: the share ``right``, what was ``predicted``, and the pair of rungs with the
    lowest share. Of nearer ones: ``near`` and what was predicted of them, and the difference of the two in Monte-Carlo
    standard errors, latents being independent and the pairs of one not.
    """

    right: Share
    predicted: float
    lowest: tuple[str, str, Share]
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
    """Return how often the 95 % interval held the true score, of all intervals there were."""
    known = ~np.isnan(trials.low) & ~np.isnan(trials.expected)
    held = known & (trials.low <= trials.expected) & (trials.expected <= trials.high)
    return Share.of(int(held.sum()), int(known.sum()))


def ordering_of(examined: Examined, trials: Trials) -> Ordering:
    """Return how well one instrument orders ladders."""
    right, predicted, gap = _pairs(trials)
    known = ~np.isnan(right) & ~np.isnan(gap)
    far = known & (gap >= examined.gap)
    near = known & (gap < examined.gap) & (gap > 0)
    by_pair = [(*pair, _share(right[:, i], far[:, i])) for i, pair in enumerate(PAIRS) if far[:, i].any()]
    off = np.where(near, right - predicted, 0.0).sum(axis=1)
    error = math.sqrt(float(off @ off))
    return Ordering(
        right=_share(right, far),
        predicted=_mean(predicted, far),
        lowest=min(by_pair, key=lambda found: found[2].value, default=(*PAIRS[0], Share.of(0, 0))),
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
    values = trials.metrics[metric]
    exact = values[:, trials.rungs.index("exact")]
    found = {}
    for how in DAMAGED:
        fall = exact - values[:, trials.rungs.index(how)]
        fall = fall[~np.isnan(fall)]
        share = Share.of(int((fall > 0).sum()), len(fall))
        found[how] = Fall(share=share, mean=float(fall.mean()) if len(fall) else math.nan)
    return found


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
