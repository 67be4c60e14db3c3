"""How often judges are right, by stratum: from the strongest firing windows to the silent ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt

from exegete.metrics import Interval, mean_interval
from exegete.results import Results


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Share of right judgements by stratum, as the mean over latents (each latent counts once).

    ``control`` is ``none`` or the null's name; ``truth`` says whether the strata are of windows to be named firing
    (then the share is the sensitivity) or not (the specificity); ``points`` are (stratum, latents, mean).
    """

    control: str
    truth: bool
    points: tuple[tuple[str, int, Interval], ...]


def judged_curves(
    results: Results, coder: str, scorer: str, explainer: str, controls: Sequence[str], *, plumbing: bool = False
) -> tuple[Curve, ...]:
    """Return the curves of one scorer, for firing and silent strata under each control. Failed judgements are out."""
    curves: list[Curve] = []
    for control in controls:
        shares: dict[tuple[bool, str], list[float]] = {}
        for _, columns in results.judgement_columns(
            coder, scorer, control=control, explainer=explainer, plumbing=plumbing
        ):
            judged = columns.prediction >= 0
            place = 2 * columns.stratum.astype(np.int64)[judged] + columns.truth[judged]
            right = (columns.prediction == columns.truth)[judged]
            n = np.bincount(place, minlength=2 * len(columns.strata))
            hits = np.bincount(place, weights=right, minlength=2 * len(columns.strata))
            for i in np.flatnonzero(n).tolist():
                shares.setdefault((bool(i % 2), columns.strata[i // 2]), []).append(float(hits[i] / n[i]))
        for truth in (True, False):
            names = sorted((name for t, name in shares if t == truth), key=stratum_order)
            points = tuple(
                (name, len(shares[truth, name]), _mean_share(np.array(shares[truth, name]))) for name in names
            )
            if points:
                curves.append(Curve(control=control, truth=truth, points=points))
    return tuple(curves)


def _mean_share(shares: npt.NDArray[np.float64]) -> Interval:
    """Return the mean of shares with its interval, which is of a share too."""
    found = mean_interval(shares)
    return replace(found, low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))


def stratum_text(name: str) -> str:
    """Return a stratum's name for people: ``decile_0`` and ``bin_0``, the strongest, are decile 1 and bin 1."""
    found = re.fullmatch(r"(decile|bin)_(\d+)", name)
    return f"{found[1]} {int(found[2]) + 1}" if found else name.replace("_", " ")


def stratum_order(name: str) -> tuple[str, int, str]:
    """Return a key that sorts decile_2 before decile_10."""
    found = re.fullmatch(r"(.*?)(\d+)", name)
    return (found[1], int(found[2]), name) if found else (name, -1, name)
