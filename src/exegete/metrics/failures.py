"""What had failed might have said anything: the bounds that hold whatever it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, Observed
from exegete.types import Array

FEW: Final = 20
"""Fewer documents than this that hold windows of either class are flagged ``few_documents``."""


def answered(observed: Observed) -> Observed:
    """Return the judgements that say yes or no."""
    return observed.take(observed.prediction != FAILED)


def scored(observed: Observed) -> Observed:
    """Return the judgements with a score."""
    return observed.take(~np.isnan(observed.score))


def all_answered(observed: Observed, *, right: bool) -> Observed:
    """Return the judgements with every failed prediction right, or wrong."""
    prediction = np.where(observed.prediction == FAILED, observed.truth == right, observed.prediction)
    return replace(observed, prediction=prediction.astype(np.int8))


def all_scored(observed: Observed, *, right: bool) -> Observed:
    """Return the judgements with every missing score beyond all others at the right end, or at the wrong one."""
    beyond = np.where(observed.truth == right, math.inf, -math.inf)
    return replace(observed, score=np.where(np.isnan(observed.score), beyond, observed.score))


def widened(
    found: Mapping[str, Interval], worst: Mapping[str, Interval], best: Mapping[str, Interval]
) -> dict[str, Interval]:
    """Return intervals with the lower bounds of the worst case as floors and the upper ones of the best as ceilings."""
    return {name: replace(interval, floor=worst[name].low, ceiling=best[name].high) for name, interval in found.items()}


def marked(interval: Interval, n_documents: int, fewest: int | None = None) -> Interval:
    """Return an interval that says on how many documents it rests, flagged ``few_documents`` where they are few.

    ``fewest`` is how many of them hold windows of the class, firing or silent, that lies in fewer: a metric of both
    classes errs as the one does that lies in few, however many documents the other lies in. Without it the interval is
    of one class, and all ``n_documents`` count.
    """
    counted = n_documents if fewest is None else fewest
    return replace(interval, n_documents=n_documents, flags=("few_documents",) if counted < FEW else ())


def rests_on(interval: Interval, truth: Array, document: Array, *, classes: Sequence[bool] = (True, False)) -> Interval:
    """Return an interval marked with the documents [n] of windows (or tokens) that fire or not (``truth``, bool [n]).

    Few documents of a class flag it where the metric is of that class: of ``classes``, those that are there at all.
    Raises ValueError where none is.
    """
    held = {which: np.unique(document[truth == which]) for which in (True, False)}
    fewest = min(len(held[which]) for which in classes if len(held[which]))
    return marked(interval, len(np.union1d(held[True], held[False])), fewest)
