"""What had failed might have said anything: the bounds that hold whatever it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from exegete.metrics.interval import Interval
from exegete.metrics.observed import FAILED, Observed

FEW: Final = 20
"""Fewer documents than this are flagged ``few_documents``."""


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


def flags(n_documents: int) -> tuple[str, ...]:
    """Return what a score from so many documents is marked with."""
    return ("few_documents",) if n_documents < FEW else ()


def marked(interval: Interval, n_documents: int) -> Interval:
    """Return an interval that says on how many documents it rests, flagged where they are few."""
    return replace(interval, n_documents=n_documents, flags=flags(n_documents))
