"""Test–retest: how much of the spread of intervention scores over latents would come again with other samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from exegete.errors import InputError
from exegete.metrics import Interval
from exegete.metrics.inputs import undefined
from exegete.types import Array


def reliability(details: Iterable[Mapping[str, Any]]) -> dict[str, Interval]:
    """Return the ICC of the score in each condition (``kl_1`` and so on) over the latents that were retested.

    ``details`` are those of scorings; latents without all of their retests in a condition are left out of it.
    """
    found: dict[str, list[Sequence[float]]] = {}
    for detail in details:
        for name, means in detail.get("retest", {}).items():
            if all(mean is not None for mean in means):
                found.setdefault(name, []).append(means)
    return {name: icc(np.array(rows, np.float64)) for name, rows in sorted(found.items())}


def icc(values: Array, *, level: float = 0.95) -> Interval:
    """Return the intraclass correlation of ``values`` [latents, seeds], ICC(1,1), with its exact F interval.

    It is the share of the variance of one seed's scores that lies between latents: (MSB − MSW) / (MSB + (k − 1) MSW)
    of a one-way analysis of variance, k seeds (Shrout and Fleiss 1979, case 1; interval on p. 424 there). Negative
    where seeds differ more than latents do. NaN for fewer than two latents, or where nothing differs at all. Raises
    InputError unless there are at least two seeds.
    """
    from scipy import special

    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(f"an ICC is of [latents, seeds], at least two seeds, got shape {values.shape}")
    n, k = values.shape
    means = values.mean(axis=1)
    within = float(((values - means[:, None]) ** 2).sum()) / max(1, n * (k - 1))
    between = k * float(((means - means.mean()) ** 2).sum()) / max(1, n - 1)
    if n < 2 or between + (k - 1) * within == 0:
        return undefined("ICC(1,1)")
    if within == 0:
        return Interval(value=1.0, low=1.0, high=1.0, method="ICC(1,1)", n=n)
    ratio, tail = between / within, 0.5 + level / 2.0
    above = float(special.fdtri(n - 1, n * (k - 1), tail))
    below = float(special.fdtri(n * (k - 1), n - 1, tail))
    value, low, high = ((f - 1) / (f + k - 1) for f in (ratio, ratio / above, ratio * below))
    return Interval(value=value, low=min(low, value), high=max(high, value), method="ICC(1,1)", n=n)
