"""How far below its exact explanation a wrong one of a latent scores, by what it is set against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.llm.scripted import Evidence
from exegete.testing.contrasts import Discriminating
from exegete.testing.instruments import GAP
from exegete.testing.settings import Round, Setting
from exegete.types import STRATA, Array

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "random": (),
    "same token": ("same_token",),
    "neighbour": ("neighbour",),
    "same token or neighbour": ("same_token", "neighbour"),
    "all three": ("same_token", "neighbour", "silent"),
}
"""Silent windows that explanations are judged on, by the strata in equal parts; ``random`` ones are all there are."""
WRONG: Final = ("broad", "narrow", "half", "sibling", "random")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gaps:
    """True gaps of balanced accuracy between the exact explanation and each wrong one, over the latents of one frame.

    ``judged`` maps kinds of silent windows to [latents, wrong], NaN for a latent without such windows; ``told`` are the
    gaps in bits of discrimination [latents, wrong], ``wanted`` those that count as far apart there.
    """

    judged: Mapping[str, Array]
    told: Array
    wanted: float

    def reached(self, kind: str, rung: str) -> tuple[float, int]:
        """Return the share of latents whose gap is 0.08 at least, and of how many."""
        gaps = self.judged[kind][:, WRONG.index(rung)]
        return _share(gaps >= GAP, ~np.isnan(gaps))

    def told_apart(self, rung: str) -> tuple[float, int]:
        """Return the share of latents that discrimination tells the wrong explanation of from the exact one."""
        gaps = self.told[:, WRONG.index(rung)]
        return _share(gaps >= self.wanted, ~np.isnan(gaps))

    def added(self, kind: str, rung: str) -> tuple[float, int]:
        """Return the same share of the latents whose gap on these silent windows is below 0.08."""
        at = WRONG.index(rung)
        missed = (self.judged[kind][:, at] < GAP) & ~np.isnan(self.told[:, at])
        return _share(self.told[:, at] >= self.wanted, missed)


def measure_gaps(made: Round, evidence: Evidence) -> Gaps:
    """Return all true gaps for a judge with these error rates; nothing is drawn or judged."""
    rungs = ("exact", *WRONG)
    rng = np.random.default_rng(0)
    scores = [_accuracies(setting, rungs, evidence) for setting in made.settings]
    judged = {kind: np.array([found[kind][0] - found[kind][1:] for found in scores]) for kind in KINDS}
    instrument = Discriminating(evidence)
    bits = np.array([instrument.known(setting, rungs, 1, rng).expected for setting in made.settings])
    return Gaps(judged=judged, told=bits[:, :1] - bits[:, 1:], wanted=instrument.gap)


def _accuracies(setting: Setting, rungs: Sequence[str], evidence: Evidence) -> dict[str, Array]:
    """Return the balanced accuracy of each rung by kind of silent windows [rungs]; NaN where there are none."""
    whole = setting.whole.part("test")
    at = setting.round.frame.windows(whole.row, whole.start)
    fits = np.array([setting.claim(rung).anywhere[at] for rung in rungs])
    tpr, fpr = evidence.true_positive_rate, evidence.false_positive_rate

    def yes(which: Array) -> Array:
        found: Array = fpr + (tpr - fpr) * fits[:, which].mean(axis=1)
        return found

    sensitivity = yes(whole.fires)
    found = {}
    for kind, strata in KINDS.items():
        parts = [~whole.fires & (whole.stratum == STRATA.index(name)) for name in strata] or [~whole.fires]
        some = [1.0 - yes(part) for part in parts if part.any()]
        found[kind] = (sensitivity + np.mean(some, axis=0)) / 2.0 if some else np.full(len(rungs), np.nan)
    return found


def _share(reached: Array, known: Array) -> tuple[float, int]:
    n = int(known.sum())
    return (float((reached & known).sum()) / n if n else float("nan")), n
