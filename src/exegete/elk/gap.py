"""The share of a performance gap that a probe recovers (PGR; Mallen and Belrose, arXiv 2312.01037).

(AUROC − floor) / (ceiling − floor), all against the truth: the floor is logistic regression at the last site fitted on
Bob's rows to Bob's labels and tested on the target pool, the ceiling the same fitted on Alice's rows and tested on
Alice's rows that are as hard as the target's. All three are resampled together, by base example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.elk.features import Extraction
from exegete.elk.intervals import DRAWS, bootstrap, resampled, weighted_aurocs
from exegete.elk.transfers import RULES, Rule, Transfers
from exegete.metrics import Interval
from exegete.types import Array

_BOUNDS: Final = ("last", "lr")
_CEILINGS: Final = {"B": "A", "BH": "AH", "BE": "AE"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The gap that one probe recovers in one transfer, at the site that a rule chose.

    The four intervals are of the same draws of base examples.
    """

    feature: str
    probe: str
    source: str
    target: str
    rule: Rule
    site: int
    auroc: Interval
    floor: Interval
    ceiling: Interval
    share: Interval


def recovered(
    found: Transfers, tested: Extraction, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[Recovered, ...]:
    """Return the recovered gap of every transfer to Bob's rows whose floor and ceiling were fitted.

    That takes logistic regression (``lr`` on ``last``) fitted on ``A`` and on ``B``. The share is NaN where the ceiling
    is not above the floor.
    """
    bounds = [site for feature, probe, pool, site in found.probes if (feature, probe, pool) == (*_BOUNDS, "B")]
    if not bounds or ("last", "lr", "A", max(bounds)) not in found.probes:
        return ()
    last = max(bounds)
    weights = resampled(tested.facts.places, draws, seed)
    counted = np.concatenate([np.ones((1, weights.shape[1])), weights])
    rows = []
    for (feature, probe, source, target), sites in found.sites.items():
        if target not in _CEILINGS:
            continue
        floor = _drawn(found, tested, counted, ("last", "lr", "B", last), target)
        ceiling = _drawn(found, tested, counted, ("last", "lr", "A", last), _CEILINGS[target])
        for rule in RULES:
            if rule in sites:
                own = _drawn(found, tested, counted, (feature, probe, source, sites[rule]), target)
                rows.append(
                    Recovered(
                        feature=feature,
                        probe=probe,
                        source=source,
                        target=target,
                        rule=rule,
                        site=sites[rule],
                        auroc=_interval(own, tested, target, level),
                        floor=_interval(floor, tested, target, level),
                        ceiling=_interval(ceiling, tested, _CEILINGS[target], level),
                        share=_interval(share(own, floor, ceiling), tested, target, level),
                    )
                )
    return tuple(rows)


def share(own: Array, floor: Array, ceiling: Array) -> Array:
    """Return (own − floor) / (ceiling − floor), NaN where the ceiling is not above the floor."""
    gap = ceiling - floor
    found: Array = np.divide(own - floor, gap, out=np.full(np.shape(gap), np.nan), where=gap > 0)
    return found


def mean_share(aurocs: Sequence[float], floors: Sequence[float], ceilings: Sequence[float]) -> float:
    """Return the recovered gap over several models or sets: of their mean AUROCs, as published, not of mean ratios."""
    if not aurocs:
        return math.nan
    means = [np.array([float(np.mean(values))]) for values in (aurocs, floors, ceilings)]
    return float(share(*means)[0])


def _interval(drawn: Array, tested: Extraction, target: str, level: float) -> Interval:
    """Return the interval of a value [0] and what resampling made of it [1:]."""
    pool = tested.facts.pool(target)
    bases = len(np.unique(tested.facts.base[pool]))
    return bootstrap(float(drawn[0]), drawn[1:], int(pool.sum()), bases, level=level)


def _drawn(found: Transfers, tested: Extraction, weights: Array, name: tuple[str, str, str, int], target: str) -> Array:
    feature, probe, source, site = name
    pool = tested.facts.pool(target)
    made = found.probes[feature, probe, source, site]  # type: ignore[index]
    scores = made.log_odds(tested.features[feature][site][pool])  # type: ignore[index]
    return weighted_aurocs(tested.facts.alice[pool], scores, weights[:, pool])
