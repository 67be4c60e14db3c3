"""Mechanistic anomaly detection: does what a probe reads over the layers look other than usual when the model lies?

Each row is the vector of a probe's log-odds at all sites. What is usual is learned on test rows of one pool (Alice's
easy ones); then Alice's hard rows, usual too, are to be told from Bob's hard rows by how unusual they are. The
detectors are those of Mallen and Belrose (arXiv 2312.01037): Mahalanobis' distance, with or without that of the
variances alone taken away, and scikit-learn's isolation forest, local outlier factor and one-class support vector
machine with their usual settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import numpy as np

from exegete.elk.features import Extraction
from exegete.elk.intervals import DRAWS, resampled_statistic, weighted_aurocs
from exegete.elk.transfers import Transfers
from exegete.errors import InputError, MissingExtraError, unknown
from exegete.metrics import Interval
from exegete.types import Array

Detector = Literal["mahalanobis", "mahalanobis-diagonal", "isolation-forest", "local-outliers", "one-class-svm"]
DETECTORS: Final[tuple[Detector, ...]] = get_args(Detector)
_RIDGE: Final = 1e-6


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """How well one probe's log-odds over the sites tell Bob's hard rows from Alice's."""

    feature: str
    probe: str
    source: str
    detector: str
    normal: str
    anomalous: str
    sites: tuple[int, ...]
    n_usual: int
    auroc: Interval


def anomalies(
    found: Transfers,
    tested: Extraction,
    *,
    source: str = "AE",
    usual: str = "AE",
    normal: str = "AH",
    anomalous: str = "BH",
    detectors: Sequence[Detector] = ("mahalanobis",),
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Anomaly, ...]:
    """Return how well anomalies are detected by every probe that was fitted on ``source``.

    Raises NotFoundError for another detector, InputError for pools without rows, MissingExtraError for detectors of
    scikit-learn where that is not installed.
    """
    for detector in detectors:
        if detector not in DETECTORS:
            raise unknown("anomaly detector", detector, DETECTORS)
    facts = tested.facts
    pools = {name: facts.pool(name) for name in (usual, normal, anomalous)}
    short = [name for name, rows in pools.items() if rows.sum() < 2]
    if short:
        raise InputError(f"the pool {short[0]} has fewer than two rows to test on, too few for anomalies")
    kinds = dict.fromkeys((f, p) for f, p, s, _ in found.probes if s == source and p != "random")
    judged = pools[normal] | pools[anomalous]
    rows = []
    for feature, probe in kinds:
        sites = sorted(at for f, p, s, at in found.probes if (f, p, s) == (feature, probe, source))
        odds = np.stack(
            [found.probes[feature, probe, source, at].log_odds(tested.features[feature][at]) for at in sites], axis=1
        )
        for detector in detectors:
            made = _made(detector, seed)
            made.fit(odds[pools[usual]])
            scores = made.unusual(odds[judged])
            truth = pools[anomalous][judged]
            rows.append(
                Anomaly(
                    feature=feature,
                    probe=probe,
                    source=source,
                    detector=detector,
                    normal=normal,
                    anomalous=anomalous,
                    sites=tuple(sites),
                    n_usual=int(pools[usual].sum()),
                    auroc=_interval(truth, scores, facts.places[judged], draws, seed, level),
                )
            )
    return tuple(rows)


def _interval(truth: Array, scores: Array, place: Array, draws: int, seed: int, level: float) -> Interval:
    return resampled_statistic(
        lambda weights: weighted_aurocs(truth, scores, weights), place, draws=draws, seed=seed, level=level
    )


class _Detector(ABC):
    @abstractmethod
    def fit(self, x: Array) -> None:
        """Learn what is usual from rows [n, k]."""

    @abstractmethod
    def unusual(self, x: Array) -> Array:
        """Return how unusual rows are [n], the greater the more."""


@final
class Mahalanobis(_Detector):
    """The squared distance from the mean of the usual rows, in units of their covariance.

    Args:
        less_diagonal: Take away the distance in units of the variances alone, so that what counts is how the sites go
            together.
    """

    def __init__(self, *, less_diagonal: bool = False) -> None:
        self._less = less_diagonal
        self._mean: Array = np.zeros(0)
        self._precision: Array = np.zeros((0, 0))
        self._variances: Array = np.zeros(0)

    def fit(self, x: Array) -> None:
        """See ``_Detector``. A millionth of the mean variance is added to each, so that equal columns do no harm."""
        self._mean = x.mean(axis=0)
        covariance = np.atleast_2d(np.cov(x, rowvar=False))
        ridge = _RIDGE * max(float(np.trace(covariance)) / len(covariance), np.finfo(np.float64).tiny)
        covariance = covariance + ridge * np.eye(len(covariance))
        self._variances = np.diag(covariance).copy()
        self._precision = np.linalg.inv(covariance)

    def unusual(self, x: Array) -> Array:
        """See ``_Detector``."""
        away = x - self._mean
        found: Array = np.einsum("ni,ij,nj->n", away, self._precision, away)
        return found - (away**2 / self._variances).sum(axis=1) if self._less else found


@final
class _Learned(_Detector):
    """A detector of scikit-learn."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def fit(self, x: Array) -> None:
        self._model.fit(x)

    def unusual(self, x: Array) -> Array:
        found: Array = -self._model.score_samples(x)
        return found


def _made(detector: Detector, seed: int) -> _Detector:
    if detector.startswith("mahalanobis"):
        return Mahalanobis(less_diagonal=detector.endswith("diagonal"))
    try:
        from sklearn.ensemble import IsolationForest
        from sklearn.neighbors import LocalOutlierFactor
        from sklearn.svm import OneClassSVM
    except ImportError:
        raise MissingExtraError(f"the detector {detector}", "elk") from None
    if detector == "isolation-forest":
        return _Learned(IsolationForest(random_state=seed % (1 << 32)))
    if detector == "one-class-svm":
        return _Learned(OneClassSVM())
    return _Learned(LocalOutlierFactor(novelty=True))
