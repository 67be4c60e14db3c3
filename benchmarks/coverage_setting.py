"""Simulated latents whose judge's expected score on the test frame is known: what coverage is measured on.

A latent has a test frame: firing windows in ten deciles and silent ones of three kinds, spread unevenly over documents.
Windows are drawn as exegete draws them: equal numbers of each stratum, without replacement, at most three of a document
in a stratum while there are others. A judge then answers, and gives a score, with set chances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, final

import numpy as np
from scipy import special

from exegete.metrics import Observed
from exegete.types import STRATA, Array

Effect = Literal["none", "apart", "able", "yes"]
DECILES: Final = tuple(STRATA.index(f"decile_{i}") for i in range(10))
KINDS: Final = tuple(STRATA.index(kind) for kind in ("same_token", "neighbour", "silent"))
CAP: Final = 3
FIRING_WINDOWS, SILENT_WINDOWS = 400, 1200


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the latents of one cell share.

    ``n`` windows are drawn of each class; ``documents`` hold the frame, 0 for a document of its own for every window;
    the judge is right about a window with chance ``value`` on average (and ranks windows with that AUROC), falling by
    ``slope`` from the mean to the last decile (and rising to the first) as far as there is room. ``icc`` is the
    correlation of its answers, and of its scores, within documents. Its ``effect``: ``apart`` for firing and silent
    windows, or one for both: some documents make it ``able``, or say ``yes`` more often.
    """

    n: int
    value: float
    documents: int = 0
    icc: float = 0.0
    slope: float = 0.0
    effect: Effect = "none"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The judgements of one explanation and what the metrics are of in expectation."""

    observed: Observed
    targets: dict[str, float]


def simulate(cell: Cell, rng: np.random.Generator) -> Latent:
    """Return the judgements of one latent of a cell."""
    firing = _drawn(cell, DECILES, FIRING_WINDOWS, 0, rng)
    silent = _drawn(cell, KINDS, SILENT_WINDOWS, FIRING_WINDOWS, rng)
    stratum, document = (np.concatenate(parts) for parts in zip(firing, silent, strict=True))
    truth = np.repeat([True, False], cell.n)
    chance = np.where(truth, _falling(cell, stratum, DECILES), _falling(cell, stratum, KINDS))
    right, score = _answers(cell, truth, chance, document, rng)
    observed = Observed(
        truth=truth, prediction=(right == truth).astype(np.int8), score=score, stratum=stratum.astype(np.int8),
        document=document, probability=np.ones(2 * cell.n), multiplicity=np.ones(2 * cell.n, np.int64),
        activation=np.where(truth, rng.gamma(2.0, size=2 * cell.n), 0.0),
    )  # fmt: skip
    return Latent(observed=observed, targets=_targets(cell, truth, chance, document))


def compare(latent: Latent, cell: Cell, n: int, rng: np.random.Generator) -> tuple[list[Observed], dict[str, float]]:
    """Return the judgements of n other explanations on the same windows, and what ``latent`` has over them.

    Each other explanation has, by the toss of a coin for every window, the latent's own verdict and score, or ones that
    are right by chance; so that what is compared is correlated.
    """
    own, others = latent.observed, []
    for _ in range(n):
        same = rng.random(len(own)) < 0.5
        others.append(
            replace(
                own,
                prediction=np.where(same, own.prediction, rng.random(len(own)) < 0.5).astype(np.int8),
                score=np.where(same, own.score, rng.normal(size=len(own))),
            )
        )
    hit, rejected = ((latent.targets[name] + 0.5) / 2.0 for name in ("sensitivity", "specificity"))
    chances = [_falling(cell, own.stratum[own.truth == fires], of) for fires, of in ((True, DECILES), (False, KINDS))]
    one_of_two = np.mean([special.ndtr(_distance(chance) / np.sqrt(2.0)).mean() for chance in chances])
    theirs = {
        "balanced_accuracy": (hit + rejected) / 2.0,
        "f1": 2.0 * hit / (2.0 + hit - rejected),
        "auroc": latent.targets["auroc"] / 4.0 + one_of_two / 2.0 + 0.125,
    }
    return others, {name: latent.targets[name] - float(value) for name, value in theirs.items()}


def _drawn(cell: Cell, strata: tuple[int, ...], size: int, first: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return stratum and document of the windows drawn of one class [n]."""
    within = np.arange(size) % len(strata)
    if cell.documents:
        shares = rng.gamma(2.0, size=cell.documents)  # documents differ in length
        document = rng.choice(cell.documents, size, p=shares / shares.sum())
    else:
        document = first + np.arange(size)
    order = rng.permutation(size)
    group = (within * (cell.documents or first + size) + document)[order]
    by_group = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    earlier = np.empty(size, np.int64)  # of a window's stratum and document
    earlier[by_group] = np.arange(size) - np.repeat(starts, np.diff(starts, append=size))
    order = order[np.argsort(np.maximum(earlier - CAP + 1, 0), kind="stable")]
    wanted = cell.n // len(strata) + (np.arange(len(strata)) < cell.n % len(strata))
    taken = np.concatenate([order[within[order] == h][:count] for h, count in enumerate(wanted)])
    return np.array(strata)[within[taken]], document[taken]


def _falling(cell: Cell, stratum: Array, strata: tuple[int, ...]) -> Array:
    """Return the chance of a right answer to windows of these strata: ``value`` in the mean of the strata."""
    slope = min(cell.slope, 0.8 * (1.0 - cell.value))
    place = np.zeros(len(STRATA))
    place[list(strata)] = np.linspace(1.0, -1.0, len(strata))
    return np.add(cell.value, slope * place[stratum])


def _answers(cell: Cell, truth: Array, chance: Array, document: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return whether the judge is right [n], and its scores [n]."""
    n = len(truth)
    noise = rng.normal(size=n)
    if not cell.icc:
        shift = _distance(chance)
        return rng.random(n) < chance, np.where(truth, shift, -shift) + noise
    effects = rng.normal(size=(int(document.max()) + 1, 2))  # of each document, for firing and for silent windows
    if cell.effect != "apart":
        effects[:, 1] = effects[:, 0] if cell.effect == "able" else -effects[:, 0]
    own = np.where(truth, effects[document, 0], effects[document, 1])
    spread = 1.0 / cell.icc - 1.0
    held = special.betaincinv(chance * spread, (1.0 - chance) * spread, special.ndtr(own))
    shift = _distance(chance)
    whole = np.sqrt(cell.icc) * own + np.sqrt(1.0 - cell.icc) * noise + shift
    return rng.random(n) < held, np.where(truth, whole, -whole)


def _distance(chance: Array) -> Array:
    """Return how far from 0 scores lie, so that two windows of these chances have this AUROC on average."""
    distance: Array = np.sqrt(0.5) * special.ndtri(chance)
    return distance


def _targets(cell: Cell, truth: Array, chance: Array, document: Array) -> dict[str, float]:
    """Return the judge's expected scores, document effects being part of its noise."""
    hit, rejected = float(chance[truth].mean()), float(chance[~truth].mean())
    shift = _distance(chance)
    apart = shift[truth][:, None] + shift[~truth]
    same = document[truth][:, None] == document[~truth]
    between = {"none": 0.0, "apart": 0.0, "able": 2.0, "yes": -2.0}[cell.effect] * cell.icc
    spread = np.sqrt(2.0 + np.where(same, between, 0.0))
    return {
        "sensitivity": hit,
        "specificity": rejected,
        "balanced_accuracy": (hit + rejected) / 2.0,
        "f1": 2.0 * hit / (1.0 + hit + 1.0 - rejected),
        "auroc": float(special.ndtr(apart / spread).mean()),
    }
