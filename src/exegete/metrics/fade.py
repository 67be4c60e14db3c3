"""Clarity, responsiveness and purity of a description: how a latent's activations tell apart what it applies to.

After FADE (arXiv 2502.16994), which asks of a latent what other scorers ask of a judge: does its activation rank what
the description applies to above the rest? Responsiveness and purity are over the whole test frame, with the judge's
verdicts as labels and every drawn window standing for what it does there; FADE takes its sample as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from exegete.metrics import failures
from exegete.metrics.inputs import Numbers, clamped, numbers, undefined
from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, FrameCounts, Observed
from exegete.metrics.population_ranked import stepped
from exegete.metrics.ranking import auroc
from exegete.metrics.reweighting import Options, Parts, Sampled, alarms, drawn_from, frames, quantile, stretched
from exegete.types import Array

METHOD: Final = "post-stratified-dirichlet"
Statistic = Callable[[Array, Array, Array, float], Array]
"""Of the firing windows judged yes and no at or above each activation, strongest first [activations, …], of the silent
ones judged yes […], and of how many are silent."""


def clarity(positive: Numbers, natural: Numbers, *, level: float = 0.95) -> Interval:
    """Return 2·AUROC − 1 of the activations of texts written to fire a latent over those of natural windows.

    1 where every written text is above every natural one, 0 where they are alike. The interval is that of ``auroc``.
    """
    written, others = numbers(positive), numbers(natural)
    truth = np.arange(len(written) + len(others)) < len(written)
    found = auroc(truth, np.concatenate([written, others]), level=level)
    return replace(
        found,
        value=2.0 * found.value - 1.0,
        low=2.0 * found.low - 1.0,
        high=2.0 * found.high - 1.0,
        floor=2.0 * found.floor - 1.0,
        ceiling=2.0 * found.ceiling - 1.0,
    )


def responsiveness(
    observed: Observed, frame: FrameCounts | None = None, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return 2·AUROC − 1 of the activation between windows judged yes and windows judged no, over the test frame.

    Silent windows have activation 0, so that a latent which stays silent on most of what is judged yes is near 0.
    What was never seen, the interval and the bounds for failures are as in ``population``. Without a ``frame`` it is
    what the drawn windows' inclusion probabilities add up to.
    """
    return _graded(observed, frame, _gini, -1.0, Options(draws=draws, seed=seed, level=level))


def purity(
    observed: Observed, frame: FrameCounts | None = None, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the average precision of the activation as a ranking of windows by whether they are judged yes.

    The step sum of the share of yes among the windows at or above an activation, over the windows judged yes; equal
    activations, those of silent windows among them, are one block. Otherwise as ``responsiveness``.
    """
    return _graded(observed, frame, _average_precision, 0.0, Options(draws=draws, seed=seed, level=level))


def _graded(
    observed: Observed, frame: FrameCounts | None, statistic: Statistic, lowest: float, options: Options
) -> Interval:
    found = Sampled(observed, drawn_from(observed) if frame is None else frame).metrics(
        observed.prediction != FAILED,
        failures.all_answered,
        lambda these, cut: {"": _interval(these, cut, statistic, lowest, options)},
    )
    return found[""]


def _interval(observed: Observed, cut: Parts, statistic: Statistic, lowest: float, options: Options) -> Interval:
    yes = (observed.prediction == 1).astype(np.float64)
    said = [yes[part.places] for part in cut.all]
    if not cut.whole or not any(one.any() for one in said) or all(one.all() for one in said):
        return undefined(METHOD)
    part = cut.firing
    strengths = np.unique(-observed.activation[part.places])
    reached = -observed.activation[part.places] <= strengths[:, None]
    columns = np.concatenate([reached * said[0], reached * (1.0 - said[0])])
    said_yes, said_no = np.split(columns @ part.weight, 2)
    estimated = statistic(said_yes, said_no, np.asarray(alarms(cut, yes, options.level)[1]), cut.quiet)
    value = min(max(float(estimated), lowest), 1.0)
    firing, silent = frames(cut, yes, options)
    said_yes, said_no = np.split(firing.sums(columns), 2)
    fewest = sum((one.sums(yes[one.part.places][None])[0] for one in silent), np.zeros(options.draws))
    most = sum((one.unseen for one in silent), fewest) + cut.unknown
    low = quantile(statistic(said_yes, said_no, np.minimum(most, cut.quiet), cut.quiet), options.low)
    high = quantile(statistic(said_yes, said_no, fewest, cut.quiet), options.high)
    low, high = stretched(cut, value, low, high, lowest, options.level)
    return clamped(value, low, high, METHOD, cut.answered, lowest=lowest)


def _gini(yes: Array, no: Array, silent: Array, quiet: float) -> Array:
    rest = quiet - silent
    missed = no[-1] + rest
    above = missed - no
    above[1:] += np.diff(no, axis=0) / 2.0  # half of those it is level with
    above[0] += no[0] / 2.0
    gained = np.diff(yes, axis=0, prepend=np.zeros_like(yes[:1]))
    wins = np.einsum("b...,b...->...", gained, above) + silent * rest / 2.0
    return np.asarray(2.0 * wins / ((yes[-1] + silent) * missed) - 1.0)


def _average_precision(yes: Array, no: Array, silent: Array, quiet: float) -> Array:
    called = yes[-1] + silent
    return np.asarray((stepped(yes, no) + silent * called / (called + no[-1] + quiet - silent)) / called)
