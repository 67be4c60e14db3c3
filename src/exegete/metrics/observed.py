"""The judgements of one explanation as columns, and the frame they were drawn from: what per-latent metrics work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.types import STRATA, Array, ExampleSet, Judgement, Windows

FAILED = -1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Judgements as columns [n].

    ``truth`` bool; ``prediction`` int8, 1 yes, 0 no, −1 none; ``score`` float64, P(yes) or the verdict that is a
    number, NaN for none; ``stratum`` int8, a place in STRATA; ``document`` and ``multiplicity`` int64; ``probability``
    float64, the inclusion probability; ``activation`` float64. Raises InputError when the columns differ in length.
    """

    truth: Array
    prediction: Array
    score: Array
    stratum: Array
    document: Array
    probability: Array
    multiplicity: Array
    activation: Array

    def __post_init__(self) -> None:
        if any(getattr(self, f.name).shape != self.truth.shape for f in fields(self)) or self.truth.ndim != 1:
            raise InputError("columns of judgements differ in length")

    @classmethod
    def of(cls, judgements: Iterable[Judgement]) -> Observed:
        """Return judgements as columns; ``score`` is P(yes) where there is one, else the value."""
        given = list(judgements)
        scores = [j.value if j.probability is None else j.probability for j in given]
        return cls(
            truth=np.array([j.truth for j in given], bool),
            prediction=np.array([FAILED if j.prediction is None else int(j.prediction) for j in given], np.int8),
            score=np.array([np.nan if s is None else s for s in scores], np.float64),
            stratum=np.array([STRATA.index(j.stratum) for j in given], np.int8),
            document=np.array([j.document for j in given], np.int64),
            probability=np.array([j.inclusion_probability for j in given], np.float64),
            multiplicity=np.array([j.multiplicity for j in given], np.int64),
            activation=np.array([j.activation for j in given], np.float64),
        )

    @classmethod
    def of_windows(
        cls,
        windows: Windows,
        *,
        prediction: Array | None = None,
        score: Array | None = None,
        truth: Array | None = None,
        activation: Array | None = None,
        place: Array | None = None,
    ) -> Observed:
        """Return what was said of windows, in their order, as columns; or of units [t] that lie in them.

        ``place`` [t] says in which window each unit lies. ``truth`` and ``activation`` are those of the windows, and
        ``prediction`` and ``score`` are missing everywhere, where they are not given.
        """
        at = slice(None) if place is None else place
        fires = windows.fires[at]
        return cls(
            truth=fires if truth is None else truth,
            prediction=np.full(len(fires), FAILED, np.int8) if prediction is None else prediction.astype(np.int8),
            score=np.full(len(fires), np.nan) if score is None else score.astype(np.float64),
            stratum=windows.stratum[at],
            document=windows.document[at],
            probability=windows.probability[at],
            multiplicity=windows.multiplicity[at],
            activation=windows.strongest[at] if activation is None else activation,
        )

    def take(self, which: Array | slice) -> Observed:
        """Return the judgements of a mask or of indices."""
        return Observed(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def weight(self) -> Array:
        """How many windows of the frame each stands for, float64 [n]."""
        return np.divide(self.multiplicity, self.probability)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FrameCounts:
    """The test frame of a latent in windows: all of them, those that fire, and the sizes of the silent strata.

    ``silent`` maps the silent strata to their sizes (near-duplicates counted once), ``unused`` windows are of none.
    """

    windows: int
    firing: int
    silent: Mapping[str, int]
    unused: int = 0

    @classmethod
    def of(cls, examples: ExampleSet) -> FrameCounts:
        """Return the counts of a latent's frame."""
        sizes = dict(examples.strata)
        unused = sizes.pop("unused", 0)
        firing = round(examples.firing_rate * examples.frame)
        if not sizes:
            sizes = {"silent": examples.frame - firing}
        return cls(windows=examples.frame, firing=firing, silent=sizes, unused=unused)
