"""Simulated latents whose true population metrics are known, drawn with exegete's own draws.

A test frame of windows lies in documents; some windows are near-duplicates of others, and of them one stands for all.
Firing windows come from ten deciles of activation, silent ones from three kinds of very different size. A judge with a
set rate of yes in every decile and kind answers, alike within documents where ``icc`` says so. The target is what the
metric would be with the judge's expected answers on the whole frame; what documents add is part of its noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from scipy import special

from exegete.examples.clusters import Clusters
from exegete.examples.draws import spread, starts_of
from exegete.examples.keys import latent_keys
from exegete.examples.negatives import draw_silent
from exegete.examples.select import deciles, draw, rank
from exegete.metrics import FrameCounts, Observed
from exegete.metrics.observed import FAILED
from exegete.types import STRATA, Array, LatentId

KINDS: Final = ("same_token", "neighbour", "silent")
SHARES: Final = (0.02, 0.05)
"""Shares of the frame that are of the first two kinds; the third has the rest."""
FIRING: Final = 500
BLOCK: Final = 25
STEEPNESS: Final = 1.5
_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the latents of one cell share.

    ``n`` windows of each class are judged; ``rate`` of the frame's units fire. The judge says yes to a firing window
    with chance ``sensitivity`` on average, more by ``slope`` in the strongest decile and less in the weakest, and to a
    silent one with the chance of its kind, ``alarms``. ``documents`` hold the frame, 0 for one for each window.
    One unit in ten is ``copies`` near-duplicate windows. A wrong answer is missing with chance ``failing``.
    """

    n: int
    rate: float
    sensitivity: float = 0.8
    slope: float = 0.0
    alarms: tuple[float, float, float] = (0.2, 0.1, 0.02)
    documents: int = 0
    icc: float = 0.0
    copies: int = 1
    failing: float = 0.0

    @property
    def name(self) -> str:
        """The cell in a table."""
        parts = [f"n {self.n}", f"rate {self.rate:g}", f"alarms {'/'.join(f'{a:g}' for a in self.alarms)}"]
        if self.sensitivity != 0.8 or self.slope:
            parts.append(f"sensitivity {self.sensitivity:g}±{self.slope:g}")
        if self.documents:
            parts.append(f"{self.documents} documents, ICC {self.icc:g}")
        if self.copies > 1:
            parts.append(f"{self.copies} copies")
        if self.failing:
            parts.append(f"{self.failing:.0%} of wrong answers missing")
        return ", ".join(parts)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The judgements of one explanation, the frame they were drawn from, and what the metrics are in expectation."""

    observed: Observed
    frame: FrameCounts
    targets: dict[str, float]


def simulate(cell: Cell, count: int, seed: int) -> Iterator[Latent]:
    """Yield ``count`` latents of a cell."""
    rng = np.random.default_rng(seed)
    units = round(FIRING / cell.rate)
    sizes = np.where(np.arange(units) % 10 == 3, cell.copies, 1)
    known = Clusters(
        number=np.repeat(np.arange(units), sizes).astype(np.int32),
        members=np.arange(sizes.sum()),
        offsets=starts_of(sizes),
    )
    for first in range(0, count, BLOCK):
        yield from _block(cell, known, min(BLOCK, count - first), seed * 1_000_003 + first, rng)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Units of a frame that were drawn of one latent, or all that fire: columns [n]."""

    unit: Array
    stratum: Array
    probability: Array
    chance: Array
    strength: Array


def _block(cell: Cell, known: Clusters, m: int, seed: int, rng: np.random.Generator) -> Iterator[Latent]:
    """Yield m latents of one frame, in which each fires elsewhere."""
    units, width = len(known), len(known.number)
    kind = np.searchsorted(np.cumsum(SHARES), rng.random(units), side="right")
    document = np.arange(units) if not cell.documents else rng.integers(cell.documents, size=units)
    firing = np.concatenate([np.sort(rng.choice(units, FIRING, replace=False)) for _ in range(m)])
    latent = np.repeat(np.arange(m), FIRING)
    strength = rng.lognormal(0.0, 0.7, size=m * FIRING)
    keys = latent_keys(seed, [LatentId(coder="simulated", index=i) for i in range(m)])
    ranked = rank(strength.astype(np.float32), firing, np.arange(m + 1) * FIRING, keys[:, 0])
    decile = np.empty(m * FIRING, np.int64)
    decile[ranked.order] = np.tile(deciles(np.arange(FIRING), np.full(FIRING, FIRING)), m)
    hit = (cell.sensitivity + cell.slope * np.linspace(1.0, -1.0, 10))[decile]
    shown = draw(ranked, cell.n, "quantiles")
    which, window = _windows(firing, known)
    touched = latent[which] * width + window
    kinds = [(np.arange(m)[:, None] * width + np.flatnonzero(kind[known.number] == k)).ravel() for k in range(2)]
    silent = draw_silent(touched, touched, [*kinds, None], known, cell.n, keys[:, 1])
    sizes = np.diff(known.offsets)
    everywhere = np.bincount(kind, weights=sizes, minlength=len(KINDS))
    codes, alarms = np.array([STRATA.index(name) for name in KINDS]), np.array(cell.alarms)
    for i in range(m):
        mine, other = shown.latent == i, silent.latent == i
        chosen, of_kind = shown.chosen[mine], silent.kind[other]
        drawn = _Unit(
            unit=np.concatenate([firing[chosen], known.number[silent.window[other]]]),
            stratum=np.concatenate([shown.stratum[mine], codes[of_kind]]),
            probability=np.concatenate([shown.probability[mine], silent.probability[other]]),
            chance=np.concatenate([hit[chosen], alarms[of_kind]]),
            strength=np.concatenate([strength[chosen], np.zeros(len(of_kind))]),
        )
        own = latent == i
        held = everywhere - np.bincount(kind[firing[own]], weights=sizes[firing[own]], minlength=len(KINDS))
        yield Latent(
            observed=_judged(cell, drawn, sizes, document, rng),
            frame=FrameCounts(
                windows=width,
                firing=int(sizes[firing[own]].sum()),
                silent=dict(zip(KINDS, silent.sizes[i].tolist(), strict=True)),
            ),
            targets=expected(hit[own], sizes[firing[own]], strength[own], alarms, held),
        )


def _judged(cell: Cell, drawn: _Unit, sizes: Array, document: Array, rng: np.random.Generator) -> Observed:
    truth = drawn.strength > 0.0
    score = _scores(cell, truth, drawn.chance, document[drawn.unit], rng)
    prediction = (score > 0.5).astype(np.int8)
    missing = ((prediction == 1) != truth) & (rng.random(len(truth)) < cell.failing)
    return Observed(
        truth=truth,
        prediction=np.where(missing, FAILED, prediction).astype(np.int8),
        score=np.where(missing, np.nan, score),
        stratum=drawn.stratum.astype(np.int8),
        document=document[drawn.unit],
        probability=drawn.probability,
        multiplicity=sizes[drawn.unit],
        activation=drawn.strength,
    )


def _windows(units: Array, known: Clusters) -> tuple[Array, Array]:
    """Return all windows of some units, as places in these and windows."""
    which, place = spread(np.diff(known.offsets)[units])
    return which, known.offsets[units[which]] + place


def _scores(cell: Cell, truth: Array, chance: Array, document: Array, rng: np.random.Generator) -> Array:
    """Return P(yes) [n], above one half with these chances."""
    own = rng.normal(size=(int(document.max()) + 1, 2))[document, truth.astype(np.int64)] if cell.icc else 0.0
    noise = np.sqrt(cell.icc) * own + np.sqrt(1.0 - cell.icc) * rng.normal(size=len(truth))
    return np.asarray(special.expit(STEEPNESS * (special.ndtri(chance) + noise)))


def expected(hit: Array, copies: Array, strength: Array, alarms: Array, held: Array) -> dict[str, float]:
    """Return the metrics of a judge's expected answers on a whole frame.

    ``hit`` [units] are the chances of yes to firing units that stand for ``copies`` [units] windows of this
    ``strength``; ``alarms`` [kinds] those of silent windows, of which there are ``held`` [kinds].
    """
    firing, quiet = float(copies.sum()), float(held.sum())
    hits, false = float(copies @ hit), float(held @ alarms)
    near, far = special.ndtri(hit), special.ndtri(alarms)
    line = np.linspace(8.0, -8.0, 8001)
    levels, which = np.unique(near, return_inverse=True)
    passing = np.bincount(which, weights=copies) @ special.ndtr(levels[:, None] - line)
    precision = passing / (passing + held @ special.ndtr(far[:, None] - line))
    area = float(np.diff(passing) @ (precision[1:] + precision[:-1]) / 2.0 / firing)
    moments = [special.expit(STEEPNESS * (np.concatenate([near, far])[:, None] + _POINTS)) ** p for p in (1, 2)]
    first, second = (m @ _WEIGHTS / _WEIGHTS.sum() for m in moments)
    weight = np.concatenate([copies, held]) / (firing + quiet)
    activation = np.concatenate([strength, np.zeros(len(held))])
    x, y = weight @ first, weight @ activation
    spread_x, spread_y = weight @ second - x * x, weight @ activation**2 - y * y
    return {
        "population_precision": hits / (hits + false),
        "population_recall": hits / firing,
        "population_f1": 2.0 * hits / (firing + hits + false),
        "population_specificity": 1.0 - false / quiet,
        "population_auprc": area,
        "population_pearson": float((weight @ (first * activation) - x * y) / np.sqrt(spread_x * spread_y)),
    }
