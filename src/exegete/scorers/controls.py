"""Nulls beside a score: what the same judge says when it is given what should not fit, and how much better the own did.

``other_latent``
    The explanations of other latents that fire about as often. The null is the mean over these donors.
``shuffled_words``
    The explanation's own words in a random order: what the words alone are worth.
``empty``
    No explanation at all: what the judge makes of the windows by themselves.

Controls are judged on the same examples in the same order, so the lift (own − control) is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import numpy as np

from exegete import metrics
from exegete.errors import ConfigError
from exegete.metrics import Interval, Observed
from exegete.metrics.inputs import undefined
from exegete.streams import stream
from exegete.types import Explanation, LatentId, Score
from exegete.views import LatentView, Need

T = TypeVar("T")
OTHER_LATENT: Final = "other_latent"
SHUFFLED_WORDS: Final = "shuffled_words"
EMPTY: Final = "empty"
CONTROLS: Final = (OTHER_LATENT, SHUFFLED_WORDS, EMPTY)
LIFT: Final = "_lift"
"""What the name of a metric ends in where the value is own − control."""
MIN_DONORS: Final = 2
"""The mean over fewer donors has no interval."""


def named_controls(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return controls by name: ``all``, ``none``, one, several joined by ``+``, or a list of names.

    Raises ConfigError for an unknown name, or one given twice.
    """
    if isinstance(given, str):
        given = {"all": CONTROLS, "none": ()}.get(given, tuple(given.split("+")))
    names = tuple(given)
    unknown = [name for name in names if name not in CONTROLS]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"controls are of {', '.join(CONTROLS)}, each once, or all, or none; got {list(names)}")
    return names


def needs_of(controls: Sequence[str], donors: int = 1) -> frozenset[Need]:
    """Return what controls need of a view beside the explanation itself: donors, where any of them is asked."""
    return frozenset({"donors"}) if OTHER_LATENT in controls and donors else frozenset()


def with_text(explanation: Explanation) -> bool:
    """Return whether an explanation has a text: what a language model needs."""
    return explanation.text is not None


def panel(
    explanation: Explanation,
    view: LatentView,
    controls: Sequence[str],
    *,
    takes: Callable[[Explanation], bool] = with_text,
) -> list[tuple[str, Explanation]]:
    """Return what else to judge the latent's examples by: the name of each control, and an explanation.

    Donors come by rank, the others after them. Left out is what the judge does not take (texts without a program,
    where programs are executed), and a text that shuffling cannot change. Raises ConfigError for an unknown control.
    """
    found: list[tuple[str, Explanation]] = []
    names = named_controls(controls)
    if OTHER_LATENT in names:
        ranked = sorted(view.donors, key=lambda donor: donor.rank)
        found += [(OTHER_LATENT, d.explanation) for d in ranked if d.explanation.status == "ok"]
    if SHUFFLED_WORDS in names and explanation.text is not None:
        shuffled = shuffled_text(explanation.text, view.examples.seed, explanation.latent)
        if shuffled != explanation.text:
            found.append((SHUFFLED_WORDS, replace(explanation, text=shuffled, program=None)))
    if EMPTY in names and explanation.text is not None:
        found.append((EMPTY, replace(explanation, text="", program=None)))
    return [(name, other) for name, other in found if takes(other)]


def shuffled_text(text: str, seed: int, latent: LatentId) -> str:
    """Return the words of a text in a random order, drawn from the latent's own stream, one space between them.

    The order is another one wherever there are two different words.
    """
    words = text.split()
    if len(set(words)) < 2:
        return text
    rng = stream(seed, latent, SHUFFLED_WORDS)
    while True:
        order = [words[i] for i in rng.permutation(len(words))]
        if order != words:
            return " ".join(order)


def score_of(
    latent: LatentId,
    scorer: str,
    metric: str,
    interval: Interval,
    n_total: int,
    n_scored: int,
    control: str = "none",
) -> Score:
    """Return the score that an interval is of ``n_total`` judgements, ``n_scored`` of which it could use."""
    return Score(
        latent=latent,
        scorer=scorer,
        metric=metric,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        method=interval.method,
        n_total=n_total,
        n_scored=n_scored,
        n_failed=n_total - n_scored,
        control=control,
        floor=interval.floor,
        ceiling=interval.ceiling,
        n_documents=interval.n_documents,
        flags=interval.flags,
        n_needed=interval.n_needed,
    )


def over_donors(intervals: Sequence[Interval], bounds: tuple[float, float] = (0.0, 1.0)) -> Interval:
    """Return the mean of a metric over donors with Student's t interval over them, cut to the metric's ``bounds``.

    A donor whose metric is undefined (nothing answered) is left out. With fewer than two donors left there is no
    interval, so the value is NaN and the method says how many there were. ``floor`` and ``ceiling`` are the means of
    the donors' own, or the interval's bounds where those are wider.
    """
    found = [i for i in intervals if not math.isnan(i.value)]
    n = len(found)
    if n < MIN_DONORS:
        method = f"too few donors: {n} of at least {MIN_DONORS}"
        return undefined(method, n=n, flags=("few_donors",))
    mean = metrics.mean_interval([i.value for i in found])
    low, high = max(bounds[0], mean.low), min(bounds[1], mean.high)
    return Interval(
        value=mean.value,
        low=min(low, mean.value),
        high=max(high, mean.value),
        method=f"t over {n} donors",
        n=n,
        floor=float(np.mean([i.floor for i in found])),
        ceiling=float(np.mean([i.ceiling for i in found])),
        n_documents=max(i.n_documents for i in found),
    )


def control_score(
    latent: LatentId,
    scorer: str,
    metric: str,
    control: str,
    intervals: Sequence[Interval],
    *,
    n_total: int,
    n_scored: int,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Score:
    """Return a metric under a control: the mean over donors of ``other_latent``, else the one interval there is.

    ``n_total`` and ``n_scored`` count the judgements of all donors.
    """
    found = over_donors(intervals, bounds) if control == OTHER_LATENT or not intervals else intervals[0]
    return score_of(latent, scorer, metric, found, n_total, n_scored, control)


def lift_score(
    latent: LatentId, scorer: str, metric: str, control: str, own: Observed, others: Sequence[Observed]
) -> Score:
    """Return ``METRIC_lift``: own − control on the same examples, by ``metrics.paired``; the control's mean of donors.

    The interval is over examples, with these donors as they are. ``n_total`` are the own judgements, none where there
    is nothing to hold them against; ``n_scored`` those that the difference rests on.
    """
    found = of_donors(metrics.paired(own, others, metric), control, len(others))
    n_total = len(own) if others else 0
    return score_of(latent, scorer, metric + LIFT, found, n_total, min(found.n, n_total), control)


def of_donors(found: Interval, control: str, n: int) -> Interval:
    """Return what rests on ``n`` explanations of a control, flagged where these are too few donors."""
    if control != OTHER_LATENT or n >= MIN_DONORS:
        return found
    return replace(found, flags=tuple(dict.fromkeys((*found.flags, "few_donors"))))


def by_control(
    controls: Sequence[str], asked: Sequence[tuple[str, Explanation]], answers: Sequence[T]
) -> dict[str, list[T]]:
    """Return what a judge said of a panel, by control.

    A control of which the panel holds nothing is left out, but for ``other_latent``: that there are no donors is told.
    """
    found = {name: [answer for (of, _), answer in zip(asked, answers, strict=True) if of == name] for name in controls}
    return {name: said for name, said in found.items() if said or name == OTHER_LATENT}
