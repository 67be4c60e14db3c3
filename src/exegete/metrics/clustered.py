"""Sums over classes, clustered by document: their variance by CR2 and its degrees of freedom.

Every per-latent metric here is, to first order, a sum of class means: of the firing and of the silent windows' answers
(sensitivity, specificity), of half of each (balanced accuracy), or of their placements among the other class (AUROC).
Each class mean is one over strata whose shares were fixed by the draw. As a regression on one indicator per stratum,
clustered by document, its variance is that of Bell and McCaffrey (2002, "CR2"), unbiased when windows are independent,
with Satterthwaite's degrees of freedom (Pustejovsky and Tipton 2018). All rows of a stratum are equal, so that both
have closed forms linear in the number of windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.metrics.failures import marked
from exegete.metrics.interval import Interval
from exegete.types import Array

SILENT: Final = 0
FIRING: Final = 1
SMALLEST: Final = 8
"""Strata with fewer windows are taken together: the mean of so few hides what they differ by."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """How the windows [n] of two classes lie in documents and strata.

    ``klass`` [n] is FIRING or SILENT, ``group`` [n] and ``place`` [n] are numbers of strata and documents; ``sizes``
    [documents, groups] counts the windows of each, and ``of_class`` [groups, 2] is 1 where a stratum is of a class.
    """

    klass: Array
    group: Array
    place: Array
    sizes: Array
    of_class: Array

    @classmethod
    def of(cls, truth: Array, document: Array, stratum: Array | None = None) -> Documents:
        """Return how windows of these truths (bool), documents and strata [n] lie; without strata a class is one."""
        klass = truth.astype(np.int64)
        known, place = np.unique(document, return_inverse=True)
        keys, group = np.unique(klass if stratum is None else _together(klass, stratum, place), return_inverse=True)
        sizes = np.bincount(place * len(keys) + group, minlength=len(known) * len(keys))
        of_class = np.zeros((len(keys), 2))
        of_class[group, klass] = 1.0
        return cls(klass=klass, group=group, place=place, sizes=sizes.reshape(len(known), len(keys)), of_class=of_class)

    @property
    def n(self) -> int:
        """Number of documents."""
        return len(self.sizes)

    @property
    def totals(self) -> Array:
        """Windows of each class [2]."""
        totals: Array = np.bincount(self.klass, minlength=2)
        return totals

    @property
    def held(self) -> Array:
        """Documents that hold windows of each class [2]."""
        held: Array = np.count_nonzero(self.sizes @ self.of_class, axis=0)
        return held

    @property
    def fewest(self) -> int:
        """Documents that hold windows of the class that lies in fewer, of the classes that there are."""
        return int(self.held[self.totals > 0].min())

    @property
    def repeat(self) -> bool:
        """Whether any document holds more than one of the windows."""
        return self.n < len(self.place)

    def means(self, values: Array) -> Array:
        """Return the means [2] of values [n] within classes; NaN for a class without windows."""
        sums, totals = np.bincount(self.klass, weights=values, minlength=2), self.totals
        means: Array = np.divide(sums, totals, out=np.full(2, np.nan), where=totals > 0)
        return means

    def shares(self, values: Array) -> Array:
        """Return what each document adds to the error of the class means of values [n], as CR2 has it [documents, 2].

        The sum over documents of the product of two columns estimates the (co)variance of these means.
        """
        means = np.bincount(self.group, weights=values) / self.sizes.sum(axis=0)
        residuals = values - means[self.group]
        cells = self.place * self.sizes.shape[1] + self.group
        sums = np.bincount(cells, weights=residuals, minlength=self.sizes.size).reshape(self.sizes.shape)
        shares: Array = (sums * self._scales) @ self.of_class
        return shares

    @property
    def _scales(self) -> Array:
        """Return by what sums of residuals are multiplied [documents, groups]: (1 − m/n)^−½ over the class's windows.

        A document that holds a whole stratum says nothing about its error: its sum is 0, and so is its factor.
        """
        left = 1.0 - self.sizes / self.sizes.sum(axis=0)
        scales: Array = np.divide(1.0, np.sqrt(left), out=np.zeros_like(left), where=left > 0)
        scales /= self.of_class @ self.totals
        return scales

    def freedom(self, weights: Array) -> float:
        """Return Satterthwaite's degrees of freedom of the variance of weights [2] · class means.

        ``weights`` carry the classes' standard deviations too: the working model has independent windows. 0 where one
        document holds everything.
        """
        a = self._scales * (self.of_class @ weights)
        own = (a * a * self.sizes).sum(axis=1)
        joint = a * self.sizes / np.sqrt(self.sizes.sum(axis=0))
        lost = (joint * joint).sum(axis=1)
        trace = float((own - lost).sum())
        square = float(own @ own - 2.0 * (own @ lost) + ((joint.T @ joint) ** 2).sum())
        return trace * trace / square if square > 0 else 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean of ``n`` values: its variance by CR2, and the quantile of Student's t that its interval takes.

    The quantile is infinite where one document holds all values.
    """

    value: float
    variance: float
    quantile: float
    n: int
    n_documents: int

    @classmethod
    def of(cls, values: Array, document: Array, *, level: float = 0.95) -> Mean | None:
        """Return the mean of values [n] that lie in these documents [n]; None without any."""
        n = len(values)
        if not n:
            return None
        documents = Documents.of(np.ones(n, bool), document)
        shares = documents.shares(values)[:, FIRING]
        return cls(
            value=float(values.mean()),
            variance=float(shares @ shares),
            quantile=t_of(level, documents.freedom(np.eye(2)[FIRING])),
            n=n,
            n_documents=documents.n,
        )

    @property
    def half(self) -> float:
        """Half the width of Student's interval; infinite where one document holds all values."""
        return math.inf if math.isinf(self.quantile) else self.quantile * math.sqrt(self.variance)

    def interval(self, low: float, high: float, method: str) -> Interval:
        """Return the mean between these bounds, or between itself and one, marked with its documents."""
        low, high = min(low, self.value), max(high, self.value)
        return marked(Interval(value=self.value, low=low, high=high, method=method, n=self.n), self.n_documents)


def _together(klass: Array, stratum: Array, place: Array) -> Array:
    """Return numbers of strata [n] in which the small ones of each class are one, and none is small if it can be.

    A stratum that lies in one document is small, too: nothing else would tell how that document errs.
    """
    keys = (stratum.astype(np.int64) + 1) * 2 + klass
    documents = np.bincount(np.unique(keys * len(place) + place) // max(len(place), 1))
    small = (np.bincount(keys)[keys] < SMALLEST) | (documents[keys] < 2)
    keys[small] = klass[small]
    for one in (SILENT, FIRING):
        rest = keys == one
        others = keys[(klass == one) & ~rest]
        few = np.count_nonzero(rest) < SMALLEST or len(np.unique(place[rest])) < 2
        if rest.any() and few and len(others):
            keys[rest] = np.bincount(others).argmax()
    return keys


def t_of(level: float, freedom: float) -> float:
    """Return Student's two-sided quantile of a level; infinite without degrees of freedom."""
    from scipy import special

    return float(special.stdtrit(freedom, 0.5 + level / 2.0)) if freedom > 0 else float("inf")
