"""Erasing which answer a vector belongs to: LEACE for a concept of two values (Belrose et al., arXiv 2306.03819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.types import Array

_TOLERANCE: Final = 1e-9


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eraser:
    """x ↦ x − ((x − mean) · ``read``) ``write``: after it no linear function of x predicts the concept at all."""

    mean: Array
    read: Array
    write: Array

    def __call__(self, x: Array) -> Array:
        """Return vectors [..., d] without the concept."""
        erased: Array = x - ((x - self.mean) @ self.read)[..., None] * self.write
        return erased

    @property
    def projection(self) -> Array:
        """The linear part P [d, d]: x ↦ P (x − mean) + mean."""
        found: Array = np.eye(len(self.mean)) - np.outer(self.write, self.read)
        return found


def fit_eraser(x: Array, z: Array) -> Eraser:
    """Return the eraser of a concept ``z`` [n] of two values from vectors ``x`` [n, d].

    Of all maps after which covariances with z are 0 it moves x least, measured in the Mahalanobis norm of x. With one
    column of covariances σ = Cov(x, z) it is x − (x − mean)ᵀ Σ⁺σ / (σᵀΣ⁺σ) · σ, Σ the covariance of x. Where x says
    nothing of z already, nothing is erased.
    """
    mean = x.mean(axis=0)
    centred, target = x - mean, z - z.mean()
    sigma = centred.T @ target / len(x)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    kept = values > max(float(values[-1]), 0.0) * _TOLERANCE * len(values)
    read = vectors[:, kept] @ ((vectors[:, kept].T @ sigma) / values[kept])
    strength = float(sigma @ read)
    if strength <= np.finfo(np.float64).tiny:
        return Eraser(mean=mean, read=np.zeros_like(mean), write=np.zeros_like(mean))
    return Eraser(mean=mean, read=read / strength, write=sigma)


def pair_eraser(pairs: Array) -> Eraser:
    """Return the eraser of which answer was given, from the vectors of both answers [n, 2, d]."""
    flat = pairs.reshape(-1, pairs.shape[-1])
    return fit_eraser(flat, np.tile([0.0, 1.0], len(pairs)))
