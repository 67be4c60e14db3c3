"""Directions from two sets of activations, in float64: mean difference, discriminant, regression, components.

``positive`` and ``negative`` are [n, d] with a pair in each row. None of them ever forms a [d, d] matrix where n is
smaller than d, so that they work on recurrent states of millions of numbers as long as the rows fit.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from exegete.errors import InputError, unknown

Method = Literal["mean", "lda", "logistic", "pca-diff", "pca-center"]
Shrinkage = float | Literal["auto"]
_ROUNDING = 1e-5  # of differences of float32 activations
_RANK = 1e-12  # of the rows' size: what is smaller is no direction that they span
_STEPS, _CLOSE, _SMALLEST = 100, 1e-10, 1e-9  # of Newton's method: at most, when it has arrived, when it is stuck


def check_options(*, shrinkage: Shrinkage = "auto", penalty: float = 1.0) -> None:
    """Raise InputError for a shrinkage that is neither ``auto`` nor in 0 … 1, and for a penalty not above 0."""
    if shrinkage != "auto" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise InputError(f"shrinkage is auto or a number from 0 to 1, got {shrinkage}")
    if not (math.isfinite(penalty) and penalty > 0):
        raise InputError(f"the penalty of a logistic regression is a number above 0, got {penalty}")


def direction_of(
    positive: torch.Tensor,
    negative: torch.Tensor,
    method: Method,
    *,
    shrinkage: Shrinkage = "auto",
    penalty: float = 1.0,
) -> torch.Tensor:
    """Return the direction [d] float64 from negative to positive. Raises NotFoundError for another method."""
    match method:
        case "mean":
            return mean_difference(positive, negative)
        case "lda":
            return discriminant(positive, negative, shrinkage)
        case "logistic":
            return logistic(positive, negative, penalty)
        case "pca-diff" | "pca-center":
            return principal(positive, negative, centred=method == "pca-diff")
        case _:
            raise unknown("method", method, get_args(Method))


def mean_difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return mean(positive) − mean(negative), not normalised: contrastive activation addition (arXiv 2312.06681)."""
    return positive.double().mean(dim=0) - negative.double().mean(dim=0)


def discriminant(positive: torch.Tensor, negative: torch.Tensor, shrinkage: Shrinkage = "auto") -> torch.Tensor:
    """Return Σ⁻¹ (mean(positive) − mean(negative)), Σ the shrunk covariance within the two classes.

    It is the ``coef_`` of scikit-learn's LinearDiscriminantAnalysis with the solver lsqr. The covariance of a class is
    (1 − s) C + s · mean(diag C) · 1; with ``auto``, s is Ledoit and Wolf's (2004, lemma 3.2 and section 3.3), found and
    applied on columns scaled to variance 1. Σ is a diagonal plus products of the centred rows, so its inverse takes one
    [n, n] system (Woodbury). Without shrinkage it is the pseudo-inverse, within what the rows span.

    Raises InputError for a shrinkage that is neither ``auto`` nor in 0 … 1, and for fewer than two rows in a class.
    """
    check_options(shrinkage=shrinkage)
    classes = [positive.double(), negative.double()]
    if min(len(rows) for rows in classes) < 2:
        raise InputError("a covariance takes at least two pairs; use the method mean, or give more")
    total = sum(len(rows) for rows in classes)
    diagonal = torch.zeros(positive.shape[1], dtype=torch.float64, device=positive.device)
    spread = []
    for rows in classes:
        centred = rows - rows.mean(dim=0)
        share = len(rows) / total
        scale = torch.ones_like(diagonal)
        if shrinkage == "auto":
            scale = centred.square().mean(dim=0).sqrt()
            scale = torch.where(scale > 0, scale, 1.0)
        scaled = centred / scale
        s = _ledoit_wolf(scaled) if shrinkage == "auto" else float(shrinkage)
        diagonal += share * s * scaled.square().mean(dim=0).mean() * scale.square()
        spread.append(centred * (share * (1 - s) / len(rows)) ** 0.5)
    return _solved(diagonal, torch.cat(spread), mean_difference(positive, negative))


def principal(positive: torch.Tensor, negative: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """Return the first principal component of the differences within pairs, of length 1.

    ``centred`` takes their mean out first, otherwise they are taken as they are: pca_diff and pca_center of repeng. It
    points to where more positives lie than their negatives; at a tie, along the mean difference.

    Raises InputError when the differences are all alike (or all zero), so that there is no component.
    """
    differences = positive.double() - negative.double()
    rows = differences - differences.mean(dim=0) if centred else differences
    size = float(rows.norm())
    if not size > _ROUNDING * float(differences.norm()):
        how = "pca-center or mean" if centred else "other pairs"
        raise InputError(f"the differences of the pairs do not vary, so they have no principal component; use {how}")
    _, _, components = torch.linalg.svd(rows, full_matrices=False)
    found: torch.Tensor = components[0]
    along = differences @ found
    votes = int((along > 0).sum()) - int((along < 0).sum())
    return -found if votes < 0 or (votes == 0 and float(along.sum()) < 0) else found


def logistic(positive: torch.Tensor, negative: torch.Tensor, penalty: float = 1.0) -> torch.Tensor:
    """Return the weights w of a logistic regression that tells the positives from the negatives.

    They minimise Σ −log p(class) + penalty/2 · |w|², with an intercept that is not penalised: the ``coef_`` of
    scikit-learn's LogisticRegression with C = 1 / penalty. (The aggregator of steering-vectors is one with penalty 1
    and without an intercept, at length 1.) Found by Newton's method within what the rows span, where w lies.

    Raises InputError for a penalty that is not above 0, and for classes whose rows are all alike.
    """
    check_options(penalty=penalty)
    rows = torch.cat([positive, negative]).double()
    middle = rows.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(rows - middle, full_matrices=False)
    axes = axes[sizes > _RANK * float(rows.norm())]
    if not len(axes):
        raise InputError("the texts of both classes are read alike, so nothing tells them apart; use other pairs")
    inputs = torch.cat([(rows - middle) @ axes.T, torch.ones_like(rows[:, :1])], dim=1)
    inputs *= torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).to(rows)[:, None]  # so all belong > 0
    ridge = torch.full_like(inputs[0], penalty)
    ridge[-1] = 0.0

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-inputs @ weights).sum() + (ridge * weights**2).sum() / 2

    weights = torch.zeros_like(ridge)
    for _ in range(_STEPS):
        wrong = torch.sigmoid(-inputs @ weights)
        slope = ridge * weights - inputs.T @ wrong
        curvature = inputs.T @ ((wrong * (1 - wrong))[:, None] * inputs) + torch.diag(ridge)
        step = torch.linalg.lstsq(curvature, slope[:, None]).solution[:, 0]
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > _SMALLEST:
            size /= 2
        weights = weights - size * step if size > _SMALLEST else weights
        if size <= _SMALLEST or float(step.norm()) <= _CLOSE * float(weights.norm()):
            break
    found: torch.Tensor = weights[:-1] @ axes
    return found


def _ledoit_wolf(rows: torch.Tensor) -> float:
    """Return Ledoit and Wolf's shrinkage of centred rows [n, d], by products of rows only."""
    n, d = rows.shape
    squares = rows.square().sum(dim=1)
    products = rows @ rows.T if n <= d else rows.T @ rows
    mean = float(squares.sum()) / (n * d)
    distance = float(products.square().sum()) / n**2
    error = (float(squares.square().sum()) / n - distance) / (d * n)
    spread = (distance - d * mean**2) / d
    error = min(error, spread)
    return 0.0 if error <= 0 else error / spread


def _solved(diagonal: torch.Tensor, rows: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return (diag(diagonal) + rowsᵀ rows)⁻¹ b, by the smaller of the two systems."""
    n, d = rows.shape
    if float(diagonal.min()) <= 0:
        inverse: torch.Tensor = torch.linalg.pinv(rows)
        found = inverse @ (inverse.T @ b)
    elif d <= n:
        found = torch.linalg.solve(torch.diag(diagonal) + rows.T @ rows, b)
    else:
        inner = torch.eye(n, dtype=rows.dtype, device=rows.device) + (rows / diagonal) @ rows.T
        found = b / diagonal - (rows / diagonal).T @ torch.linalg.solve(inner, rows @ (b / diagonal))
    return found
