"""Probes that need no labels to find a direction, only pairs of answers of which one is true: CCS, CRC and VINC.

Labels come in afterwards alone, to say which way is true and how steep the log-odds are (Platt's scaling).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Literal, final, get_args

import numpy as np

from exegete.elk.leace import Eraser, pair_eraser
from exegete.elk.probes import Probe, check_labels, expit, minimised
from exegete.elk.whitening import Whitening, fit_whitening
from exegete.errors import InputError, unknown
from exegete.types import Array

Norm = Literal["leace", "mean", "mean-scale"]
_RESTARTS: Final = 10
_DECAY: Final = 0.01


class PairProbe(Probe, ABC):
    """A direction in the space of pairs; the score is that of the true answer minus that of the false one.

    Args:
        rank: As in ``probes.Linear``, of both answers' vectors together.
        shared: As in ``probes.Linear``.
    """

    on_pair, learns = True, False

    def __init__(self, *, rank: int | None = None, shared: Whitening | None = None) -> None:
        self._rank, self._shared = rank, shared
        self._folded: tuple[Array, float] | None = None
        self._scale, self._bias = 1.0, 0.0

    def fit(self, x: Array, y: Array) -> None:
        """See ``Probe``; the labels are not looked at."""
        if x.ndim != 3 or x.shape[1] != 2:
            raise InputError(f"this probe reads vectors [n, 2, d], got shape {x.shape}")
        pairs = x.astype(np.float64)
        self._folded = None
        if self._rank is None or pairs.shape[2] <= self._rank:
            self._find(pairs)
        else:
            whitening = self._shared or fit_whitening(pairs.reshape(-1, pairs.shape[2]), self._rank)
            self._find(whitening(pairs))
            self._folded = self._in_vectors(whitening)
        self._shared = None

    def _in_vectors(self, whitening: Whitening) -> tuple[Array, float]:
        """Return weights [2, d] and bias of the score in the space of the vectors, so that no probe holds components.

        Every score is linear in both answers' vectors, so that it is known by what it gives of each component alone.
        """
        r = whitening.into.shape[1]
        origin = float(self._score(np.zeros((1, 2, r)))[0])
        alone = (self._score(np.eye(2 * r).reshape(2 * r, 2, r)) - origin).reshape(2, r)
        weights = alone @ whitening.into.T
        return weights, origin - float((weights @ whitening.mean).sum())

    def resolve_sign(self, x: Array, y: Array) -> None:
        """See ``Probe``: fits scale and bias of the log-odds."""
        check_labels(y)
        self._scale, self._bias = platt(self.raw(x), y)

    def log_odds(self, x: Array) -> Array:
        """See ``Probe``."""
        found: Array = self._scale * self.raw(x) + self._bias
        return found

    def raw(self, x: Array) -> Array:
        """Return the scores [n] before any label was seen."""
        pairs = x.astype(np.float64)
        if self._folded is None:
            return self._score(pairs)
        weights, bias = self._folded
        found: Array = np.einsum("nkd,kd->n", pairs, weights) + bias
        return found

    @abstractmethod
    def _find(self, pairs: Array) -> None:
        """Find the direction."""

    @abstractmethod
    def _score(self, pairs: Array) -> Array:
        """Return scores [n] of pairs [n, 2, d]."""


@final
class ContrastConsistent(PairProbe):
    """CCS (Burns et al., arXiv 2212.03827): p(true answer) and 1 − p(false answer) agree, and are not both ½.

    The mean of (p₁ − (1 − p₀))² + min(p₀, p₁)², plus ½ · decay · ‖θ‖², from several random beginnings by L-BFGS; the
    one with the least loss is kept.

    Args:
        norm: What is done about which answer is which: LEACE, each answer's mean taken away, or its scale too.
        restarts: Beginnings.
        decay: Of the weights and the bias.
        seed: Of the beginnings.
        rank: As in ``PairProbe``.
        shared: As in ``PairProbe``.
    """

    def __init__(
        self,
        *,
        norm: Norm = "leace",
        restarts: int = _RESTARTS,
        decay: float = _DECAY,
        seed: int = 0,
        rank: int | None = None,
        shared: Whitening | None = None,
    ) -> None:
        super().__init__(rank=rank, shared=shared)
        if norm not in get_args(Norm):
            raise unknown("norm", norm, get_args(Norm))
        if restarts < 1:
            raise InputError(f"there is at least one beginning, got {restarts}")
        self._norm, self._restarts, self._decay, self._seed = norm, restarts, decay, seed
        self._prepared: Callable[[Array], Array] = lambda pairs: pairs
        self.loss = np.inf
        self._theta: Array = np.zeros(0)

    def _find(self, pairs: Array) -> None:
        self._prepared = _prepared(pairs, self._norm)
        negative, positive = self._prepared(pairs).transpose(1, 0, 2)
        draw = np.random.default_rng(self._seed)
        bound = 1.0 / np.sqrt(pairs.shape[2])
        for _ in range(self._restarts):
            theta, _ = minimised(
                lambda theta: self._both(theta, negative, positive), draw.uniform(-bound, bound, pairs.shape[2] + 1)
            )
            value = _ccs(theta, negative, positive)[0]
            if value < self.loss:
                self.loss, self._theta = value, theta

    def _both(self, theta: Array, negative: Array, positive: Array) -> tuple[float, Array]:
        value, gradient = _ccs(theta, negative, positive)
        return value + 0.5 * self._decay * float(theta @ theta), gradient + self._decay * theta

    def _score(self, pairs: Array) -> Array:
        scores = self._prepared(pairs) @ self._theta[:-1]
        found: Array = scores[:, 1] - scores[:, 0]
        return found


def _ccs(theta: Array, negative: Array, positive: Array) -> tuple[float, Array]:
    """Return the loss of CCS and its gradient in (weights, bias)."""
    w, b = theta[:-1], theta[-1]
    p0, p1 = expit(negative @ w + b), expit(positive @ w + b)
    consistency, least = p0 + p1 - 1.0, np.minimum(p0, p1)
    value = float((consistency**2 + least**2).mean())
    slope0 = (2 * consistency + 2 * least * (p0 < p1)) * p0 * (1 - p0) / len(p0)
    slope1 = (2 * consistency + 2 * least * (p0 >= p1)) * p1 * (1 - p1) / len(p0)
    return value, np.append(negative.T @ slope0 + positive.T @ slope1, slope0.sum() + slope1.sum())


def _prepared(pairs: Array, norm: Norm) -> Callable[[Array], Array]:
    if norm == "leace":
        return pair_eraser(pairs)
    means = pairs.mean(axis=0)
    scale = np.ones(pairs.shape[1:]) if norm == "mean" else np.maximum(pairs.std(axis=0), 1e-12)
    if norm == "mean-scale":
        # One scale for each answer, so that directions keep their meaning: the root mean square over all dimensions.
        scale = np.sqrt((scale**2).mean(axis=1, keepdims=True))
    return lambda x: (x - means) / scale


@final
class ContrastPrincipal(PairProbe):
    """CRC: which answer it is erased, then the first principal component of the differences of both answers."""

    def __init__(self, *, rank: int | None = None, shared: Whitening | None = None) -> None:
        super().__init__(rank=rank, shared=shared)
        self._eraser: Eraser | None = None
        self._axis: Array = np.zeros(0)

    def _find(self, pairs: Array) -> None:
        self._eraser = pair_eraser(pairs)
        clean = self._eraser(pairs)
        differences = clean[:, 1] - clean[:, 0]
        centred = differences - differences.mean(axis=0)
        self._axis = np.linalg.svd(centred, full_matrices=False)[2][0]

    def _score(self, pairs: Array) -> Array:
        assert self._eraser is not None  # fit comes first
        clean = self._eraser(pairs)
        found: Array = (clean[:, 1] - clean[:, 0]) @ self._axis
        return found


@final
class VarianceInvariance(PairProbe):
    """VINC: the direction along which the two answers vary against one another, and one claim's wordings do not.

    The first eigenvector of P (variance · V − (1 − covariance) · I − covariance · C) Pᵀ, with V the mean covariance of
    either answer over claims, I that over the wordings of one claim, C the symmetric cross-covariance of both answers,
    and P the erasure of which answer it is. With one wording of each claim I is 0.

    Args:
        variance: Weight of V.
        covariance: Weight of C, from 0 to 1.
        groups: Numbers [n] of the claims that the fitted rows are wordings of; None where each row is its own.
        rank: As in ``PairProbe``.
        shared: As in ``PairProbe``.
    """

    def __init__(
        self,
        *,
        variance: float = 0.0,
        covariance: float = 0.5,
        groups: Array | None = None,
        rank: int | None = None,
        shared: Whitening | None = None,
    ) -> None:
        super().__init__(rank=rank, shared=shared)
        if not 0 <= covariance <= 1:
            raise InputError(f"the weight of the covariance lies between 0 and 1, got {covariance}")
        self._weights, self._groups = (variance, covariance), groups
        self._axis: Array = np.zeros(0)
        self._eraser: Eraser | None = None

    def _find(self, pairs: Array) -> None:
        variance, covariance = self._weights
        groups = np.arange(len(pairs)) if self._groups is None else np.unique(self._groups, return_inverse=True)[1]
        if len(groups) != len(pairs):
            raise InputError(f"there are {len(pairs)} rows and {len(groups)} numbers of claims")
        counts = np.bincount(groups).astype(np.float64)
        centres = np.zeros((len(counts), *pairs.shape[1:]))
        np.add.at(centres, groups, pairs)
        centres /= counts[:, None, None]
        within = _invariance(pairs - centres[groups], counts[groups])
        negative, positive = (centres - centres.mean(axis=0)).transpose(1, 0, 2)
        n = len(centres)
        cross = negative.T @ positive / n
        between = (negative.T @ negative + positive.T @ positive) / (2 * n)
        objective = variance * between - (1 - covariance) * within - covariance * (cross + cross.T) / 2
        self._eraser = pair_eraser(pairs)
        p = self._eraser.projection
        objective = p @ objective @ p.T
        self._axis = np.linalg.eigh((objective + objective.T) / 2)[1][:, -1]

    def _score(self, pairs: Array) -> Array:
        assert self._eraser is not None  # fit comes first
        scores = self._eraser(pairs) @ self._axis
        found: Array = scores[:, 1] - scores[:, 0]
        return found


def _invariance(away: Array, counts: Array) -> Array:
    """Return the mean covariance over the wordings of one claim, of claims with several."""
    several = counts > 1
    d = away.shape[2]
    if not several.any():
        return np.zeros((d, d))
    weights = 1.0 / (counts[several] - 1)
    claims = float((1.0 / counts[several]).sum())
    flat = away[several]
    found: Array = np.einsum("n,nkd,nke->de", weights, flat, flat) / (2 * claims)
    return found


def platt(scores: Array, y: Array) -> tuple[float, float]:
    """Return scale and bias of the log-odds scale · score + bias that fit labels best; the scale is not regularised.

    Where scores separate the labels the scale stops at 10 standard deviations' worth.
    """
    spread = float(scores.std())
    if spread <= 0:
        return 1.0, 0.0
    unit, signs = (scores - scores.mean()) / spread, np.where(y, 1.0, -1.0)

    def loss(theta: Array) -> tuple[float, Array]:
        margin = signs * (theta[0] * unit + theta[1])
        slope = -signs * expit(-margin) / len(y)
        return (
            float(np.logaddexp(0.0, -margin).mean() + 1e-4 * theta[0] ** 2),
            np.array([slope @ unit + 2e-4 * theta[0], slope.sum()]),
        )

    (scale, bias), _ = minimised(loss, np.zeros(2))
    return float(scale / spread), float(bias - scale * scores.mean() / spread)
