"""What a judge is worth at a latent's true firing rate: metrics reweighted from the drawn windows to the test frame.

A judge that is right on nine in ten windows of either class has a precision of 0.9 % when one window in a thousand
fires. So every silent stratum's rate of false positives enters with its share of the frame, and the intervals come from
simulation of how the frame may look (``reweighting``), never from a bootstrap, which takes none of n for none of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from exegete.metrics import failures
from exegete.metrics.inputs import clamped, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, FrameCounts, Observed
from exegete.metrics.population_ranked import auprc, pearson
from exegete.metrics.reweighting import Options, Parts, Sampled, alarms, half_width, quantile
from exegete.types import Array

METHOD: Final = "post-stratified-beta"
_TIMES: Final = np.geomspace(1.2, 1e6, 60)
"""How many times as many judgements are tried where there are too few."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Windows of the frame: ``hits`` fire and are judged yes, ``alarms`` are silent and judged yes; numbers or [draws].

    ``firing`` fire, ``quiet`` are silent.
    """

    hits: Array
    alarms: Array
    firing: float
    quiet: float


def _precision(totals: Totals) -> Array:
    called = totals.hits + totals.alarms
    precision: Array = np.divide(totals.hits, called, out=np.zeros_like(called), where=called > 0.0)
    return precision


def _recall(totals: Totals) -> Array:
    return np.asarray(totals.hits / totals.firing)


def _f1(totals: Totals) -> Array:
    return np.asarray(2.0 * totals.hits / (totals.firing + totals.hits + totals.alarms))


def _specificity(totals: Totals) -> Array:
    return np.asarray(1.0 - totals.alarms / totals.quiet)


_RATES: Final[dict[str, Callable[[Totals], Array]]] = {
    "population_precision": _precision,
    "population_recall": _recall,
    "population_f1": _f1,
    "population_specificity": _specificity,
}
_CALLED: Final = ("population_precision", "population_f1")
"""Those that false positives in a large stratum can bring down to nothing."""


def population(
    observed: Observed, frame: FrameCounts, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Return population_precision, _recall, _f1, _specificity, _auprc and _pearson: metrics over the whole test frame.

    ``observed`` are the judgements of one explanation, drawn from ``frame``; the target is what the metric would be
    with the judge's expected verdicts on all windows of the frame. The rates are there when there are predictions, the
    area under the precision-recall curve when there are scores; Pearson's correlation with the activation is that of
    the score, or of the verdict where there is none. A metric that the data leave undefined is NaN with ``n`` 0.

    The values are post-stratified: weighted shares, unbiased for recall and specificity. One thing is added: a silent
    stratum in which none of n was judged yes enters precision, F1 and the area with the median of what its rate may be,
    0.2275 / n, times its share of the silent windows, so that none of n never says precision 1. Silent windows of which
    none was answered (``frame.unused`` among them) count as the others do in the value, and as all wrong or all right
    in the interval.

    Where the relative half-width of precision, F1 or the area exceeds 1 — half the interval's width over the value, or
    over the interval's geometric centre where that is less — the value is ``not_identified``: ``low`` still bounds it
    from below, and about ``n_needed`` judgements in the same mix would be enough if the rates are as they seem (None
    where no number would be). ``floor`` and ``ceiling`` are the bounds had failed firing windows been judged no and
    failed silent ones yes, and the reverse. The interval is a function of ``seed``; its bounds are quantiles of
    ``draws`` simulations. Where fewer than 20 documents hold firing windows, or silent ones, what needs that class is
    flagged ``few_documents``; where one holds all firing windows, the area and the correlation have the whole range.
    Raises InputError when a silent window is of a stratum that the frame has not.
    """
    known, scored = observed.prediction != FAILED, ~np.isnan(observed.score)
    options, sampled = Options(draws=draws, seed=seed, level=level), Sampled(observed, frame)
    found: dict[str, Interval] = {}
    if known.any() or not scored.any():
        found |= sampled.metrics(known, failures.all_answered, lambda o, cut: _rates(o, cut, options))
    if not scored.any():

        def of_verdict(these: Observed, cut: Parts) -> dict[str, Interval]:
            return {"population_pearson": pearson(these, cut, these.prediction.astype(np.float64), options)}

        return found | sampled.metrics(known, failures.all_answered, of_verdict)

    def of_score(these: Observed, cut: Parts) -> dict[str, Interval]:
        nearest = np.clip(these.score, np.nanmin(observed.score), np.nanmax(observed.score))  # of those beyond all
        return {
            "population_auprc": auprc(these, cut, options),
            "population_pearson": pearson(these, cut, nearest, options),
        }

    return found | sampled.metrics(scored, failures.all_scored, of_score)


def _rates(observed: Observed, cut: Parts, options: Options) -> dict[str, Interval]:
    found = dict.fromkeys(_RATES, undefined(METHOD))
    if not cut.whole:
        return found
    yes = (observed.prediction == 1).astype(np.float64)
    called = any(yes[part.places].any() for part in cut.all)
    hits = np.asarray(cut.firing.size * cut.firing.mean(yes))
    plain, seen = (
        Totals(hits=hits, alarms=np.asarray(one), firing=cut.firing.size, quiet=cut.quiet)
        for one in alarms(cut, yes, options.level)
    )
    low, high = _simulated(cut, yes, options)
    for metric, rate in _RATES.items():
        if metric == "population_precision" and not called:
            continue
        value = min(max(float(rate(seen if metric in _CALLED else plain)), 0.0), 1.0)
        below = quantile(rate(low), options.low)
        above = quantile(rate(high), options.high)
        interval = clamped(value, below, above, METHOD, cut.answered)
        if metric in _CALLED and half_width(interval) > 1.0:
            needed = _needed(cut, seen, rate, options)
            interval = replace(interval, flags=("not_identified",), n_needed=needed)
        found[metric] = interval
    return found


def _simulated(cut: Parts, yes: Array, options: Options) -> tuple[Totals, Totals]:
    """Return draws of the totals for the low side and for the high side."""
    rng, draws, level = np.random.default_rng(options.seed), options.draws, options.level
    rate, n = cut.firing.mean(yes), cut.firing.effective(yes, level)
    found, missed = n * rate, n * (1.0 - rate)
    few, many = (cut.firing.size * rng.beta(found + a, missed + 1.0 - a, size=draws) for a in (0.25, 0.75))
    sizes = np.array([part.size for part in cut.silent])
    rates = np.array([part.mean(yes) for part in cut.silent])
    counts = np.array([part.effective(yes, level) for part in cut.silent])
    # A Beta variable is the share of one gamma variable in the sum of two; the unseen window goes to either.
    said = rng.standard_gamma((counts * rates)[:, None], size=(len(sizes), draws))
    unsaid = rng.standard_gamma((counts * (1.0 - rates))[:, None], size=(len(sizes), draws))
    unseen = rng.standard_exponential((len(sizes), draws))
    together = said + unsaid + unseen
    most, fewest = sizes @ ((said + unseen) / together) + cut.unknown, sizes @ (said / together)
    low, high = (
        Totals(hits=hits, alarms=false, firing=cut.firing.size, quiet=cut.quiet)
        for hits, false in ((few, most), (many, fewest))
    )
    return low, high


def _needed(cut: Parts, totals: Totals, rate: Callable[[Totals], Array], options: Options) -> int | None:
    """Return how many judgements in the same mix would identify a metric if the rates are as they seem.

    The false positives are taken for one Poisson count, in which one stands for as many windows as it does in the
    stratum where it stands for most.
    """
    from scipy import special

    false, hits = float(totals.alarms) * (1.0 - cut.unknown / cut.quiet), float(totals.hits)
    if false <= 0.0 or hits <= 0.0:
        return None
    each = max(part.size / len(part) for part in cut.silent) / _TIMES
    count = false / each
    fewest, most = special.gammaincinv(count, options.low), special.gammainccinv(count + 1.0, options.low)
    same = np.full(len(_TIMES), hits)
    low = rate(replace(totals, hits=same, alarms=each * most + cut.unknown))
    high = rate(replace(totals, hits=same, alarms=each * fewest))
    enough = np.flatnonzero((high - low) / 2.0 <= np.minimum(float(rate(totals)), np.sqrt(low * high)))
    return math.ceil(cut.answered * float(_TIMES[enough[0]])) if len(enough) else None
