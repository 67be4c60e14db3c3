"""Probes: linear readings of a model's vectors, each fitted, given a sign, and asked for log-odds.

Vectors are float64 [n, d] behind a statement, or [n, 2, d] behind its false and its true answer. Labels are bool [n].
Here are those that learn from labels; those that do without are in ``probes_pair``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, final

import numpy as np

from exegete.elk.whitening import Whitening, fit_whitening
from exegete.errors import InputError
from exegete.types import Array

L2: Final = 1e-3
_ITERATIONS: Final = 10_000
_DIMENSIONS: Final = 4096


class Probe(ABC):
    """A probe. ``on_pair`` says that it reads pairs [n, 2, d], ``learns`` that it is fitted on labels."""

    on_pair: bool
    learns: bool

    @abstractmethod
    def fit(self, x: Array, y: Array) -> None:
        """Fit to vectors and labels [n]; a probe that does not learn never looks at the labels."""

    @abstractmethod
    def resolve_sign(self, x: Array, y: Array) -> None:
        """Decide by labels which way is true; a probe that learns knows already."""

    @abstractmethod
    def log_odds(self, x: Array) -> Array:
        """Return the log-odds [n] that each row is true (or a score that grows with them)."""

    @property
    def direction(self) -> Array:
        """The direction [d] along which the log-odds grow, in the space of the vectors; of unit length.

        Raises InputError for probes that have no single one there.
        """
        raise InputError(
            f"{type(self).__name__} has no single direction in the residual stream; take lr, mean-diff or lda"
        )


class Linear(Probe, ABC):
    """A probe whose log-odds are x · weight + bias; where it is fitted after whitening, both are brought back.

    Args:
        on_pair: Reads pairs, laid one behind the other.
        rank: Fit on so many whitened principal components, where vectors have more dimensions; None on the vectors.
        shared: These components, where another probe found them on the same vectors already.
    """

    learns = True

    def __init__(self, *, on_pair: bool = False, rank: int | None = None, shared: Whitening | None = None) -> None:
        self.on_pair, self._rank, self._shared = on_pair, rank, shared
        self.weight: Array = np.zeros(0)
        self.bias = 0.0

    def fit(self, x: Array, y: Array) -> None:
        """See ``Probe``. Raises InputError for labels of one kind."""
        flat = self._flat(x)
        check_labels(y)
        if self._rank is not None and flat.shape[1] > self._rank:
            whitening = self._shared or fit_whitening(flat, self._rank)
            self._shared = None
            weight, bias = self._fitted(whitening(flat), y)
            # In the space of the vectors, so that no probe holds the components, which are many times its own size.
            self.weight = whitening.into @ weight
            self.bias = bias - float(whitening.mean @ self.weight)
        else:
            self.weight, self.bias = self._fitted(flat, y)

    def resolve_sign(self, x: Array, y: Array) -> None:
        """See ``Probe``: nothing to do."""

    def log_odds(self, x: Array) -> Array:
        """See ``Probe``."""
        found: Array = self._flat(x) @ self.weight + self.bias
        return found

    @property
    def direction(self) -> Array:
        """See ``Probe``."""
        if self.on_pair:
            return super().direction
        length = float(np.linalg.norm(self.weight))
        found: Array = self.weight / length if length > 0 else self.weight
        return found

    @abstractmethod
    def _fitted(self, x: Array, y: Array) -> tuple[Array, float]:
        """Return weight [d] and bias."""

    def _flat(self, x: Array) -> Array:
        wanted = 3 if self.on_pair else 2
        if x.ndim != wanted or (self.on_pair and x.shape[1] != 2):
            shape = "[n, 2, d]" if self.on_pair else "[n, d]"
            raise InputError(f"this probe reads vectors {shape}, got shape {x.shape}")
        return x.reshape(len(x), -1).astype(np.float64)


@final
class Logistic(Linear):
    """Logistic regression: the mean of −log p(label) plus l2 · ‖w‖², from 0 on, by L-BFGS.

    That is scikit-learn's with C = 1 / (2 · l2 · n).
    """

    def __init__(
        self, *, on_pair: bool = False, rank: int | None = None, shared: Whitening | None = None, l2: float = L2
    ) -> None:
        super().__init__(on_pair=on_pair, rank=rank, shared=shared)
        self._l2 = l2

    def _fitted(self, x: Array, y: Array) -> tuple[Array, float]:
        signs = np.where(y, 1.0, -1.0)

        def loss(theta: Array) -> tuple[float, Array]:
            w, b = theta[:-1], theta[-1]
            margin = signs * (x @ w + b)
            slope = -signs * expit(-margin) / len(y)
            value = float(np.logaddexp(0.0, -margin).mean() + self._l2 * (w @ w))
            return value, np.append(x.T @ slope + 2 * self._l2 * w, slope.sum())

        theta = minimised(loss, np.zeros(x.shape[1] + 1))[0]
        return theta[:-1], float(theta[-1])


@final
class MeanDifference(Linear):
    """The difference of the mean vectors of true and false rows, of length 1, without a bias."""

    def _fitted(self, x: Array, y: Array) -> tuple[Array, float]:
        difference = x[y].mean(axis=0) - x[~y].mean(axis=0)
        return difference / max(float(np.linalg.norm(difference)), np.finfo(np.float64).tiny), 0.0


@final
class Discriminant(Linear):
    """Linear discriminant analysis: Σ⁺ (mean of true − mean of false), Σ the covariance within the classes.

    Args:
        on_pair: Reads pairs.
        rank: As in ``Linear``.
        shared: As in ``Linear``.
        shrinkage: 0 takes Σ as it is, by its pseudo-inverse; up to 1 moves it to a multiple of the identity; None
            takes the share of Ledoit and Wolf (2004) for a sample of this size.
    """

    def __init__(
        self,
        *,
        on_pair: bool = False,
        rank: int | None = None,
        shared: Whitening | None = None,
        shrinkage: float | None = 0.0,
    ) -> None:
        super().__init__(on_pair=on_pair, rank=rank, shared=shared)
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise InputError(f"shrinkage lies between 0 and 1, got {shrinkage}")
        self._shrinkage = shrinkage

    def _fitted(self, x: Array, y: Array) -> tuple[Array, float]:
        means = [x[~y].mean(axis=0), x[y].mean(axis=0)]
        centred = x - np.stack(means)[y.astype(np.int64)]
        covariance = centred.T @ centred / len(x)
        d = len(covariance)
        if not d:  # every vector is the same, so whitening left no component
            return np.zeros(0), float(np.log(y.mean() / (1 - y.mean())))
        share = ledoit_wolf(centred) if self._shrinkage is None else self._shrinkage
        covariance = (1 - share) * covariance + share * float(np.trace(covariance)) / d * np.eye(d)
        weight = np.linalg.pinv(covariance, rcond=d * np.finfo(np.float32).eps, hermitian=True) @ (means[1] - means[0])
        prior = np.log(y.mean() / (1 - y.mean()))
        return weight, float(prior - weight @ (means[0] + means[1]) / 2)


@final
class RandomDirections(Probe):
    """Random directions, each with the sign that labels give it: what no probe should be below. One score for each.

    Args:
        count: How many.
        seed: Of the draw.
    """

    on_pair, learns = False, False

    def __init__(self, *, count: int = 1000, seed: int = 0) -> None:
        if count < 1:
            raise InputError(f"there is at least one random direction, got {count}")
        self._count, self._seed = count, seed
        self._signs: Array = np.ones(count)

    def fit(self, x: Array, y: Array) -> None:
        """See ``Probe``: nothing to do."""

    def resolve_sign(self, x: Array, y: Array) -> None:
        """See ``Probe``: turns every direction round that ranks true rows below false ones."""
        check_labels(y)
        self._signs = self._signs * np.where(column_aurocs(y, self.log_odds(x)) < 0.5, -1.0, 1.0)

    def log_odds(self, x: Array) -> Array:
        """Return a score for each row and direction [n, count].

        The directions are drawn again each time, some dimensions at a time: those of a state would not fit into memory.
        """
        draw = np.random.default_rng(self._seed)
        found: Array = np.zeros((len(x), self._count))
        for at in range(0, x.shape[1], _DIMENSIONS):
            part = x[:, at : at + _DIMENSIONS].astype(np.float64)
            found += part @ draw.standard_normal((part.shape[1], self._count))
        found *= self._signs
        return found


def column_aurocs(y: Array, scores: Array) -> Array:
    """Return the AUROC of each column of scores [n, k], ties counting half."""
    from scipy.stats import rankdata

    positives = int(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return np.full(scores.shape[1], np.nan)
    order = np.argsort(scores, axis=0)
    ranks = (y[order] * np.arange(1, len(y) + 1)[:, None]).sum(axis=0).astype(np.float64)
    in_order = np.take_along_axis(scores, order, axis=0)
    tied = (in_order[1:] == in_order[:-1]).any(axis=0)
    if tied.any():
        ranks[tied] = rankdata(scores[:, tied], axis=0)[y].sum(axis=0)
    found: Array = (ranks - positives * (positives + 1) / 2) / (positives * negatives)
    return found


def ledoit_wolf(centred: Array) -> float:
    """Return the share by which the covariance of centred rows [n, d] is best moved to a multiple of the identity."""
    n, d = centred.shape
    covariance = centred.T @ centred / n
    mu = float(np.trace(covariance)) / d
    away = float(((covariance - mu * np.eye(d)) ** 2).sum())
    squares = centred**2
    spread = float((squares.T @ squares / n - covariance**2).sum()) / n
    return 1.0 if away <= 0 else min(1.0, max(0.0, spread / away))


def check_labels(y: Array) -> None:
    """Raise InputError unless there are true and false labels."""
    if not y.any() or y.all():
        raise InputError(
            f"a probe needs rows of both labels; all {len(y)} are {'true' if len(y) and y[0] else 'false'}"
        )


def expit(x: Array) -> Array:
    """Return 1 / (1 + exp(−x)) of any x."""
    found: Array = 0.5 * (1.0 + np.tanh(x / 2.0))
    return found


def minimised(loss: Callable[[Array], tuple[float, Array]], start: Array) -> tuple[Array, float]:
    """Return where L-BFGS from ``start`` ends, and the loss there."""
    from scipy.optimize import minimize

    options = {"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x, np.float64), float(found.fun)
