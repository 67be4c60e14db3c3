"""What scores must come out: exact expectations over a frame, and how estimates of them scatter from draw to draw.

A scorer that reads windows knows of an explanation only which of them it fits. So a frame is summed up by its strata
and, within each, how many windows each set of rungs fits; draws without replacement from that, and a judge's errors,
are then simulated many at a time, without any window. Of a document with many windows of a stratum only a few can be
drawn together (``examples.draws``), so each window counts as likely as it is to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.examples.draws import PER_DOCUMENT
from exegete.llm.scripted import Evidence
from exegete.types import Array


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """One stratum: ``firing`` or silent, ``drawn`` windows of it, and its windows by which rungs fit them.

    ``fits`` [cells, rungs] bool are the sets of rungs that occur, ``mass`` [cells] how many windows of each are drawn
    on average, ``counts`` [cells] how many of each there are to draw from, to the nearest whole window.
    """

    firing: bool
    drawn: int
    fits: Array
    mass: Array
    counts: Array

    @property
    def shares(self) -> Array:
        """The share of the windows drawn that each rung fits, on average [rungs]."""
        found: Array = self.mass @ self.fits / self.mass.sum()
        return found


def inclusion(document: Array, n: int) -> tuple[Array, int]:
    """Return how likely each window of a stratum is to be among n drawn, by document [m], and from how many n are."""
    _, place, sizes = np.unique(document, return_inverse=True, return_counts=True)
    most = PER_DOCUMENT
    while np.minimum(sizes, most).sum() < min(n, len(document)):
        most += 1
    kept = np.minimum(sizes, most)
    likely: Array = (kept / sizes)[place] * n / kept.sum()
    return likely, int(kept.sum())


def cells_of(
    fits: Array, stratum: Array, firing: Array, document: Array, drawn: Sequence[tuple[int, bool, int]]
) -> list[Cells]:
    """Return the strata of a frame whose windows [n], of these documents, the rungs fit as ``fits`` [rungs, n] says.

    ``drawn`` names the strata that windows are drawn from, as (stratum, firing, windows drawn). Raises InputError for
    one that the frame lacks.
    """
    found = []
    for name, fires, n in drawn:
        own = np.flatnonzero((stratum == name) & (firing == fires))
        if len(own) < n:
            raise InputError(f"{n} windows are drawn from a stratum of {len(own)}")
        cells, which = np.unique(fits[:, own].T, axis=0, return_inverse=True)
        likely, pool = inclusion(document[own], n)
        mass = np.bincount(which.ravel(), weights=likely, minlength=len(cells))
        found.append(Cells(firing=fires, drawn=n, fits=cells, mass=mass, counts=_whole(mass, pool)))
    return found


def _whole(mass: Array, total: int) -> Array:
    """Return whole numbers in proportion to mass that add up to a total: those with the largest remainders round up."""
    exact = mass / mass.sum() * total
    counts: Array = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def fitting(cells: Sequence[Cells], firing: bool) -> Array:
    """Return the expected share of the windows drawn of a class that each rung fits [rungs]."""
    own = [c for c in cells if c.firing == firing]
    found: Array = np.sum([c.drawn * c.shares for c in own], axis=0) / sum(c.drawn for c in own)
    return found


def draw_fitting(cells: Sequence[Cells], firing: bool, draws: int, rng: np.random.Generator) -> tuple[Array, int]:
    """Draw windows without replacement; return how many each rung fits [draws, rungs], and how many there are."""
    own = [c for c in cells if c.firing == firing]
    total = np.zeros((draws, own[0].fits.shape[1]), np.int64)
    for c in own:
        total += rng.multivariate_hypergeometric(c.counts, c.drawn, size=draws) @ c.fits
    return total, sum(c.drawn for c in own)


def expected_accuracy(cells: Sequence[Cells], evidence: Evidence) -> Array:
    """Return the balanced accuracy that a judge with such errors has over the frame, of each rung [rungs]."""
    tpr, fpr = evidence.true_positive_rate, evidence.false_positive_rate
    yes = [fpr + (tpr - fpr) * fitting(cells, firing) for firing in (True, False)]
    found: Array = (yes[0] + 1.0 - yes[1]) / 2.0
    return found


def drawn_accuracy(cells: Sequence[Cells], evidence: Evidence, draws: int, rng: np.random.Generator) -> Array:
    """Return the balanced accuracy of each rung in simulated draws [draws, rungs]."""
    rates = []
    for firing in (True, False):
        fits, n = draw_fitting(cells, firing, draws, rng)
        yes = rng.binomial(fits, evidence.true_positive_rate) + rng.binomial(n - fits, evidence.false_positive_rate)
        rates.append(yes / n)
    found: Array = (rates[0] + 1.0 - rates[1]) / 2.0
    return found


def expected_auroc(cells: Sequence[Cells], evidence: Evidence) -> Array:
    """Return the AUROC of the evidence over the frame, of each rung [rungs]."""
    positive, negative = fitting(cells, True), fitting(cells, False)
    return np.array([evidence.auroc(p, q) for p, q in zip(positive.tolist(), negative.tolist(), strict=True)])


def drawn_auroc(cells: Sequence[Cells], evidence: Evidence, draws: int, rng: np.random.Generator) -> Array:
    """Return the AUROC of each rung's evidence in simulated draws [draws, rungs]."""
    felt = []
    for firing in (True, False):
        fits, n = draw_fitting(cells, firing, draws, rng)
        means = evidence.means(np.arange(n) < fits[..., None])
        felt.append(means + rng.standard_normal(means.shape))
    positive, negative = felt
    order = np.concatenate([positive, negative], axis=-1).argsort(axis=-1)
    ranks = np.empty(order.shape)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(1.0, order.shape[-1] + 1.0), order.shape), axis=-1)
    m, n = positive.shape[-1], negative.shape[-1]
    found: Array = (ranks[..., :m].sum(axis=-1) - m * (m + 1) / 2) / (m * n)
    return found


def order_power(drawn: Array) -> Array:
    """Return how often each rung comes out above each other, ties counting half [rungs, rungs], from [draws, rungs]."""
    gap = drawn[:, :, None] - drawn[:, None, :]
    found: Array = ((gap > 0) + 0.5 * (gap == 0)).mean(axis=0)
    return found
