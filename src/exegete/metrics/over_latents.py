"""Scores of many latents as one number: macro means, and two sets of scores of the same latents side by side.

Each value is that of one latent; latents are taken as a sample of those like them. A score that is NaN is left out and
counted: ``Interval.n`` and ``Comparison.n`` are the latents that have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import numpy as np

from exegete.errors import InputError
from exegete.metrics.centres import mean_interval, median_interval
from exegete.metrics.inputs import Numbers, numbers, undefined
from exegete.metrics.interval import Interval
from exegete.types import Array

DRAWS: Final = 2000
"""Resamples of a bootstrap interval."""
EXCHANGES: Final = 9999
"""Random exchanges of a permutation test, where not all of them are tried."""
_AT_ONCE: Final = 1 << 22


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two scores of the same latents, a − b.

    ``mean`` with Student's t interval and ``median`` with its distribution-free one; ``p_mean`` of a permutation test
    that exchanges the two scores of a latent, ``p_median`` of Wilcoxon's signed-rank test, both two-sided; ``higher``
    is the share of latents with a > b, a tie counting half. ``n`` latents have both scores, ``n_missing`` lack one.
    """

    mean: Interval
    median: Interval
    p_mean: float
    p_median: float
    higher: float
    n: int
    n_missing: int


def macro_mean(
    values: Numbers,
    *,
    weights: Numbers | None = None,
    method: Literal["t", "bootstrap"] = "t",
    within: tuple[float, float] | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Return the mean over latents, or their mean weighted by ``weights`` (say, firing rates), with its interval.

    ``t``: Student's interval; weighted, the linearised variance of the ratio Σwx / Σw, with as many degrees of freedom
    as so unequal weights leave (Kish's (Σw)² / Σw², less 1). ``bootstrap``: percentiles over resampled latents, seeded.
    ``within`` is the range of the score: ``floor`` and ``ceiling`` then take every missing value at its worst and best.
    Raises InputError when lengths differ or a weight is negative or no number.
    """
    array = numbers(values)
    shares = np.ones(len(array)) if weights is None else numbers(weights)
    if shares.shape != array.shape:
        raise InputError(f"every latent has one weight, got {len(shares)} for {len(array)} latents")
    if not bool((shares >= 0.0).all()):
        raise InputError("weights are numbers of at least 0")
    if method not in ("t", "bootstrap"):
        raise InputError(f"method is t or bootstrap, got {method!r}")

    def interval(of: Array) -> Interval:
        known = ~np.isnan(of) & (shares > 0.0)
        if not known.any():
            return undefined(method)
        if method == "bootstrap":
            return _resampled(of[known], shares[known], level, draws, seed)
        return mean_interval(of[known], level=level) if weights is None else _weighted(of[known], shares[known], level)

    found, missing = interval(array), np.isnan(array)
    if within is None or not missing.any():
        return found
    worst, best = (interval(np.where(missing, end, array)) for end in within)
    return replace(found, floor=min(worst.low, found.low), ceiling=max(best.high, found.high))


def _weighted(values: Array, weights: Array, level: float) -> Interval:
    from scipy import special

    total, n = float(weights.sum()), len(values)
    value = float(weights @ values) / total
    freedom = total**2 / float(weights @ weights) - 1.0
    if n == 1 or freedom <= 0.0:
        return Interval(value=value, low=-math.inf, high=math.inf, method="weighted-t", n=n)
    spread = float((np.square(weights * (values - value))).sum()) * n / (n - 1)
    half = float(special.stdtrit(freedom, 0.5 + level / 2.0)) * math.sqrt(spread) / total
    return Interval(value=value, low=value - half, high=value + half, method="weighted-t", n=n)


def _resampled(values: Array, weights: Array, level: float, draws: int, seed: int) -> Interval:
    rng, n = np.random.default_rng(seed), len(values)
    value = float(weights @ values / weights.sum())
    step, found = max(_AT_ONCE // n, 1), []
    for at in range(0, draws, step):
        taken = rng.integers(n, size=(min(step, draws - at), n))
        found.append((weights[taken] * values[taken]).sum(axis=1) / weights[taken].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1.0 - level) / 2.0, (1.0 + level) / 2.0]).tolist()
    return Interval(value=value, low=min(low, value), high=max(high, value), method="bootstrap over latents", n=n)


def compare(a: Numbers, b: Numbers, *, level: float = 0.95, exchanges: int = EXCHANGES, seed: int = 0) -> Comparison:
    """Return two scores of the same latents side by side. Raises InputError when their lengths differ."""
    left, right = numbers(a), numbers(b)
    if left.shape != right.shape:
        raise InputError(f"every latent has two scores, got {len(left)} and {len(right)}")
    both = ~(np.isnan(left) | np.isnan(right))
    gaps = left[both] - right[both]
    p_mean, p_median = _p_values(gaps, exchanges, seed)
    return Comparison(
        mean=mean_interval(gaps, level=level),
        median=median_interval(gaps, level=level),
        p_mean=p_mean,
        p_median=p_median,
        higher=float((np.sign(gaps) + 1.0).mean() / 2.0) if len(gaps) else math.nan,
        n=len(gaps),
        n_missing=int((~both).sum()),
    )


def _p_values(gaps: Array, exchanges: int, seed: int) -> tuple[float, float]:
    """Return those of the permutation and the signed-rank test; 1 where no two scores differ, NaN without latents."""
    from scipy import stats

    if not len(gaps):
        return math.nan, math.nan
    if not gaps.any():
        return 1.0, 1.0
    exchanged = stats.permutation_test(
        (gaps,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=exchanges,
        batch=max(_AT_ONCE // len(gaps), 1),
        random_state=np.random.default_rng(seed),
    )
    return float(exchanged.pvalue), float(stats.wilcoxon(gaps).pvalue)
