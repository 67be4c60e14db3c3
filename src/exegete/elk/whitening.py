"""Wide vectors on few whitened principal components, found in the space of the rows where that is the smaller one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.types import Array

_SMALLEST: Final = 1e-10


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whitening:
    """x ↦ (x − ``mean``) @ ``into``, whose columns [d, r] give components of variance 1."""

    mean: Array
    into: Array

    def __call__(self, x: Array) -> Array:
        """Return vectors [..., d] as components [..., r]."""
        found: Array = (x - self.mean) @ self.into
        return found


def fit_whitening(x: Array, rank: int) -> Whitening:
    """Return the first ``rank`` principal components of vectors [n, d], each divided by its standard deviation.

    With fewer rows than dimensions the eigenvectors are those of the n × n inner products. Components whose variance is
    below 10⁻¹⁰ of the greatest are left out.
    """
    from scipy.linalg import eigh

    mean = x.mean(axis=0)
    centred = x - mean
    n, d = x.shape
    dual = n < d
    products = centred @ centred.T if dual else centred.T @ centred
    few = max(0, len(products) - rank)
    values, vectors = eigh(products, subset_by_index=(few, len(products) - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > max(float(values[0]), 0.0) * _SMALLEST
    values, vectors = values[kept], vectors[:, kept]
    axes = centred.T @ vectors / np.sqrt(values) if dual else vectors
    return Whitening(mean=mean, into=axes * np.sqrt(n / values))
