"""Which latents are certified: evidence that a latent's balanced accuracy is above a level, and the list it makes.

The null of a latent is that the judge's balanced accuracy over the test frame, strata mixed as drawn, is at most τ. It
does not say how the errors divide between sensitivity s and specificity c: all (s, c) with s + c ≤ 2τ are of it.

- The *e-value* is what bets on right answers have made of 1, ∏(1 + λ(xᵢ − τ)) ∏(1 + μ(yⱼ − τ)) over the answers of
  either class (1 right, 0 wrong), with λ times the firing windows equal to μ times the silent ones, averaged over sizes
  of bets. As 1 + z ≤ exp z, its mean is at most exp(λn(s + c − 2τ)) ≤ 1 under every null, in whatever way rates differ
  between strata; and no greater for draws without replacement (Hoeffding 1963, theorem 4). The list of e-values (e-BH:
  Wang and Ramdas 2022) keeps its false-discovery rate whatever the dependence among latents, and latents share
  documents, so it is the default.
- The *p-value* is exact for two binomial counts: the chance of evidence as strong, at the worst division of the errors.
  Benjamini and Yekutieli's list (2001) holds under any dependence as well; Benjamini and Hochberg's (1995) under
  independence or positive dependence.

The p-value is of a fixed number of judgements. The e-value also holds for judgements in rounds, stopped for whatever
reason, as both classes then come in step and the bets stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal, TypeVar

import numpy as np

from exegete.errors import InputError
from exegete.metrics.failures import all_answered, answered
from exegete.metrics.observed import Observed
from exegete.metrics.sequential import BETS, SHARES
from exegete.types import Array

T = TypeVar("T")
Correction = Literal["by", "bh"]
_DIVISIONS: Final = 257
_BISECTIONS: Final = 50
_LOG_MOST: Final = 700.0
_TIE: Final = 1e-9


def e_value(observed: Observed, level: float, *, worst: bool = False) -> float:
    """Return the e-value of the null that balanced accuracy is at most ``level``; 1 where a class has no answer.

    What failed is left out or, for the ``worst`` case, counted as wrong. Bets on the smaller class go up to all there
    is to lose, those on the larger one are smaller in proportion. Raises InputError unless 0 < level < 1.
    """
    hits, rejected = _right(observed, worst)
    _checked(level)
    least = min(len(hits), len(rejected))
    if not least:
        return 1.0
    logs = np.zeros(BETS)
    for right in (hits, rejected):
        bets, k = SHARES * least / (len(right) * level), int(right.sum())
        logs += k * np.log1p(bets * (1.0 - level)) + (len(right) - k) * np.log1p(-bets * level)
    top = float(logs.max())
    return math.exp(min(top + math.log(float(np.exp(logs - top).mean())), _LOG_MOST))


def p_value(observed: Observed, level: float, *, worst: bool = False) -> float:
    """Return the exact p-value of the null that balanced accuracy is at most ``level``; 1 where a class has no answer.

    The unconditional test of two binomial counts: outcomes are ordered by their likelihood ratio against the null, and
    the p-value is the greatest chance, over 257 divisions of 2·level into sensitivity and specificity, of outcomes as
    extreme. As the ordering rises with either count, no other member of the null gives more. Strata that are drawn in
    proportion vary less than binomial counts. What failed is treated as in ``e_value``.
    """
    hits, rejected = _right(observed, worst)
    _checked(level)
    if not (len(hits) and len(rejected)):
        return 1.0
    return _tail(int(hits.sum()), len(hits), int(rejected.sum()), len(rejected), level)


def certified(
    latents: Sequence[T],
    *,
    q: float,
    e_values: Sequence[float] | None = None,
    p_values: Sequence[float] | None = None,
    correction: Correction = "by",
) -> list[T]:
    """Return the latents whose null is rejected at false-discovery rate ``q``, strongest evidence first.

    From e-values by e-BH: the k greatest, for the largest k whose smallest is at least n / (kq). From p-values by
    ``correction``. Raises InputError unless there is one list of evidence, a value for each latent, and 0 < q < 1.
    """
    given = e_values if e_values is not None else p_values
    if given is None or (e_values is not None and p_values is not None):
        raise InputError("a certified list rests on e_values or on p_values, one of them")
    if len(given) != len(latents):
        raise InputError(f"every latent has one value, got {len(given)} for {len(latents)} latents")
    if not 0.0 < q < 1.0:
        raise InputError(f"a false-discovery rate lies between 0 and 1, got {q}")
    values = np.asarray(given, np.float64)
    taken = _e_bh(values, q) if p_values is None else _corrected(values, q, correction)
    return [latents[i] for i in taken.tolist()]


def _e_bh(e_values: Array, q: float) -> Array:
    """Return which e-values are rejected, greatest first."""
    if not bool((e_values >= 0.0).all()):
        raise InputError("e-values are numbers of at least 0")
    order = np.argsort(-e_values, kind="stable")
    n = len(order)
    enough = np.flatnonzero(e_values[order] * np.arange(1, n + 1) * q >= n)
    return order[: enough[-1] + 1] if len(enough) else order[:0]


def _corrected(p_values: Array, q: float, correction: Correction) -> Array:
    """Return which p-values are rejected, smallest first."""
    from scipy import stats

    if correction not in ("by", "bh"):
        raise InputError(f"correction is by or bh, got {correction!r}")
    if not bool(((p_values >= 0.0) & (p_values <= 1.0)).all()):
        raise InputError("p-values lie between 0 and 1")
    if not len(p_values):
        return np.zeros(0, np.int64)
    adjusted = stats.false_discovery_control(p_values, method=correction)
    order = np.argsort(p_values, kind="stable")
    kept: Array = order[adjusted[order] <= q]
    return kept


def _right(observed: Observed, worst: bool) -> tuple[Array, Array]:
    """Return of firing and of silent windows which were answered rightly."""
    known = all_answered(observed, right=False) if worst else answered(observed)
    right = (known.prediction == 1) == known.truth
    return right[known.truth], right[~known.truth]


def _checked(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise InputError(f"a level to be certified lies between 0 and 1, got {level}")


@lru_cache(maxsize=1 << 16)
def _tail(hits: int, firing: int, rejected: int, silent: int, level: float) -> float:
    """Return the greatest chance under the null of outcomes at least as far above it."""
    from scipy import special

    ratios = _ratios(firing, silent, level)
    if ratios[hits, rejected] <= 0.0:
        return 1.0
    # Ratios rise along every row, so the outcomes as extreme are those from some count on.
    least = (ratios < ratios[hits, rejected] * (1.0 - _TIE)).sum(axis=1)
    s = np.linspace(max(0.0, 2.0 * level - 1.0), min(1.0, 2.0 * level), _DIVISIONS)[:, None]
    c = np.clip(2.0 * level - s, 0.0, 1.0)
    counts = np.arange(firing + 1)
    choices = special.gammaln(firing + 1) - special.gammaln(counts + 1) - special.gammaln(firing - counts + 1)
    chance = np.exp(choices + special.xlogy(counts, s) + special.xlogy(firing - counts, 1.0 - s))
    above = np.where(least > silent, 0.0, special.bdtrc(least - 1.0, silent, c))  # of a count of at least `least`
    above = np.where(least == 0, 1.0, above)
    return min(float((chance * above).sum(axis=1).max()), 1.0)


@lru_cache(maxsize=32)
def _ratios(firing: int, silent: int, level: float) -> Array:
    """Return for every outcome [firing + 1, silent + 1] its log likelihood ratio against the null, 0 within it."""
    from scipy import special

    hits = np.arange(firing + 1)[:, None] + np.zeros(silent + 1)
    rejected = np.zeros((firing + 1, 1)) + np.arange(silent + 1)
    s, c = hits / firing, rejected / silent
    s0 = nearest_null(s, c, firing, silent, level)
    c0 = 2.0 * level - s0

    def divergence(counts: Array, n: int, rate: Array, null: Array) -> Array:
        found: Array = special.xlogy(counts, rate / null) + special.xlogy(n - counts, (1.0 - rate) / (1.0 - null))
        return found

    with np.errstate(divide="ignore", invalid="ignore"):  # where the nearest null is the outcome itself, at an end
        ratio = divergence(hits, firing, s, s0) + divergence(rejected, silent, c, c0)
    return np.where(s + c > 2.0 * level + _TIE, ratio, 0.0)


def nearest_null(s: Array, c: Array, firing: int, silent: int, level: float) -> Array:
    """Return the sensitivity of the null nearest to rates above it, in likelihood, on the line s₀ + c₀ = 2·level.

    There the likelihoods of the two counts fall equally fast: firing·(s − s₀) / (s₀(1 − s₀)) is
    silent·(c − c₀) / (c₀(1 − c₀)). The first falls with s₀ and the second rises, so halving finds it.
    """
    low = np.full(np.shape(s), max(0.0, 2.0 * level - 1.0))
    high = np.full(np.shape(s), min(1.0, 2.0 * level))
    for _ in range(_BISECTIONS):
        s0 = (low + high) / 2.0
        c0 = 2.0 * level - s0
        more = firing * (s - s0) * c0 * (1.0 - c0) > silent * (c - c0) * s0 * (1.0 - s0)
        low, high = np.where(more, s0, low), np.where(more, high, s0)
    found: Array = (low + high) / 2.0
    return found
