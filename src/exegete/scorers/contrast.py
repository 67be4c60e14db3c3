"""Telling one explanation from others on the same windows: p(own), bits, and clusters of those that are not told apart.

Exactly one of k + 1 latents fires in a window. With equal chances for all beforehand, and a judge that says of each
explanation by itself how probable it is to fit, Bayes' rule gives p(own) = odds(own) / (odds(own) + Σ odds(other)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np

from exegete.errors import InputError
from exegete.metrics import Interval
from exegete.metrics.clustered import Mean
from exegete.metrics.inputs import undefined
from exegete.metrics.proportions import score_bounds
from exegete.types import Array

SURE: Final = 0.01
"""P(yes) is taken to lie at least this far from 0 and from 1: of no window is a judge surer."""
TOLD_APART: Final = 0.75
"""Two explanations collide where the right one is the likelier in a smaller share of the windows that either fits; two
of the same words are at a half."""
_TIED: Final = 1e-9  # log odds of equal verdicts may differ by rounding


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrast:
    """How an explanation stands against k others on n windows that are its own latent's.

    ``own`` [n] and ``others`` [k, n] are log odds that the explanation fits, NaN where the judge did not say.
    """

    own: Array
    others: Array

    def __post_init__(self) -> None:
        if self.others.ndim != 2 or not len(self.others) or self.others.shape[1:] != self.own.shape:
            raise InputError(f"log odds are [n] and [k, n], k at least 1; got {self.own.shape}, {self.others.shape}")

    @property
    def most(self) -> float:
        """Bits of an explanation that is always told from the others: log2(k + 1)."""
        return math.log2(len(self.others) + 1)

    def lowest(self, surest: float) -> float:
        """Bits where the own is taken for wrong and all others for right, each with P(yes) ``surest`` from 0 or 1."""
        worst = 2.0 * math.log(surest / (1.0 - surest))
        return self.most + (worst - float(np.logaddexp(worst, math.log(len(self.others))))) / math.log(2.0)

    @property
    def bits(self) -> Array:
        """log2(k + 1) + log2 p(own) of every window [n]; NaN where any of the k + 1 is missing."""
        found: Array = self.most - np.log1p(np.exp(self.others - self.own).sum(axis=0)) / math.log(2.0)
        return found

    @property
    def credit(self) -> Array:
        """1 where the own explanation is the likeliest, 1/m where it is one of m, else 0 [n]; NaN where bits are."""
        behind = (self.others < self.own - _TIED).sum(axis=0)
        level = (np.abs(self.others - self.own) <= _TIED).sum(axis=0)
        found = np.where(behind + level == len(self.others), 1.0 / (1.0 + level), 0.0)
        return np.where(np.isnan(self.bits), np.nan, found)

    def against(self, other: int) -> Array:
        """Return 1 where the own explanation is likelier than another, ½ where as likely, else 0 [n].

        NaN where the judge did not say, and where neither fits: that speaks against both, and not of their likeness.
        """
        theirs = self.others[other]
        apart = self.own - theirs
        found = np.where(np.abs(apart) <= _TIED, 0.5, (apart > 0).astype(np.float64))
        return np.where(np.maximum(self.own, theirs) > 0, found, np.nan)


def log_odds(yes: Array) -> Array:
    """Return the log odds of P(yes) [n], cut to SURE from 0 and 1; NaN stays NaN."""
    cut = np.clip(yes, SURE, 1.0 - SURE)
    found: Array = np.log(cut) - np.log1p(-cut)
    return found


def mean_bits(bits: Array, document: Array, most: float, lowest: float) -> Interval:
    """Return mean bits over windows [n], between ``lowest`` and ``most``, with an interval clustered by document.

    Bits lean far to the left: one window taken for another's outweighs many. So the interval is a score interval, as
    Wilson's, of where the mean lies in its range, for as many windows as have CR2's variance, with Student's quantile
    and Satterthwaite's degrees of freedom. To the standard error is added, in quadrature, what half the range makes of
    one window among n: equal windows are no proof that no other kind comes. NaN are left out, and count as ``lowest``
    in ``floor`` and as ``most`` in ``ceiling``.
    """
    return _with_missing(bits, document, (lowest, most))


def mean_credit(credit: Array, document: Array) -> Interval:
    """Return the mean of credits in 0 … 1 over windows [n] with an interval as that of ``mean_bits``.

    NaN are left out, and count as 0 in ``floor`` and as 1 in ``ceiling``.
    """
    return _with_missing(credit, document, (0.0, 1.0))


def mean_difference(own: Array, others: Sequence[Array], document: Array, most: float, lowest: float) -> Interval:
    """Return mean bits less the mean over other explanations' bits, window by window [n].

    A window counts where the own bits are known, and any other's. The interval is Student's, clustered as that of
    ``mean_bits``; a difference leans to neither side.
    """
    beside = np.stack(others) if others else np.full((1, len(own)), np.nan)
    known = ~np.isnan(beside)
    sums, counts = np.where(known, beside, 0.0).sum(axis=0), known.sum(axis=0)
    apart = own - np.divide(sums, counts, out=np.full(len(own), np.nan), where=counts > 0)
    span = most - lowest
    found = _mean(apart, document, span)
    if found is None:
        return undefined("cr2-t")
    low, high = max(-span, found.value - found.half), min(span, found.value + found.half)
    return found.interval(low, high, "cr2-t")


def collisions(details: Mapping[str, Mapping[str, Any]], *, told_apart: float = TOLD_APART) -> list[tuple[str, ...]]:
    """Return clusters of latents whose explanations do not tell each other apart, largest first.

    ``details`` map latents, in text form, to what the discrimination scorer told of each. Two latents are joined when
    either's windows were judged by the other's explanation, and the right one was the likelier in a share below
    ``told_apart`` of those that any of the two fits: in both directions where both were judged.
    """
    apart: dict[tuple[str, str], bool] = {}
    for latent, detail in details.items():
        for other in detail.get("near", ()):
            share = other["told_apart"]
            if share is not None:
                apart[latent, str(other["latent"])] = share >= told_apart
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for (a, b), differs in apart.items():
        if not differs and not apart.get((b, a), False):
            parent[root(a)] = root(b)
    clusters: dict[str, list[str]] = {}
    for name in sorted(parent):
        clusters.setdefault(root(name), []).append(name)
    return sorted((tuple(c) for c in clusters.values() if len(c) > 1), key=lambda c: (-len(c), c))


def _mean(values: Array, document: Array, span: float) -> Mean | None:
    """Return the mean of the values that are known, which lie in a range of ``span``, one unseen window added."""
    known = ~np.isnan(values)
    found = Mean.of(values[known], document[known])
    return None if found is None else replace(found, variance=found.variance + (span / 2.0 / found.n) ** 2)


def _with_missing(values: Array, document: Array, bounds: tuple[float, float]) -> Interval:
    found, missing = _bounded(values, document, bounds), np.isnan(values)
    if not missing.any():
        return found
    worst, best = (_bounded(np.where(missing, fill, values), document, bounds) for fill in bounds)
    return replace(found, floor=worst.low, ceiling=best.high)


def _bounded(values: Array, document: Array, bounds: tuple[float, float]) -> Interval:
    """Return the mean of values between bounds with its score interval."""
    lowest, highest = bounds
    span = highest - lowest
    found = _mean(values, document, span)
    if found is None:
        return undefined("cr2-score")
    share = min(max((found.value - lowest) / span, 0.0), 1.0)
    if math.isinf(found.quantile):
        return found.interval(lowest, highest, "cr2-score")
    spread = share * (1.0 - share) * span * span
    low, high = score_bounds(share, spread / found.variance if spread > 0 else found.n, found.quantile)
    return found.interval(lowest + span * max(low, 0.0), lowest + span * min(high, 1.0), "cr2-score")
