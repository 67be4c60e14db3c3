"""An embedder whose cosines follow what explanations say of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.llm.scripted import Evidence
from exegete.scorers.embedders import Embedder
from exegete.types import Array


@final
class SimulatedEmbedder(Embedder):
    """Gives every explanation an axis of its own, and texts their evidence for each along these.

    ``explanations`` name the axes; ``fits`` [texts, axes] bool says which of them fit each of ``texts``. The cosine of
    an explanation and a text is the evidence for it, scaled; one axis more makes all vectors equally long. The draws
    are those of the seed.
    """

    def __init__(
        self, explanations: Sequence[str], texts: Sequence[str], fits: Array, evidence: Evidence, *, seed: int
    ) -> None:
        self._axes: Mapping[str, int] = {text: axis for axis, text in enumerate(explanations)}
        self._places: Mapping[str, int] = {text: place for place, text in enumerate(texts)}
        felt = np.random.default_rng(seed).standard_normal(fits.shape) + evidence.means(fits)
        longest = math.sqrt(float((felt * felt).sum(axis=1).max(initial=1.0)))
        scaled = felt / longest
        rest = np.sqrt(np.maximum(0.0, 1.0 - (scaled * scaled).sum(axis=1, keepdims=True)))
        self._vectors: Array = np.hstack([scaled, rest]).astype(np.float32)

    @property
    def name(self) -> str:
        """``simulated``."""
        return "simulated"

    @property
    def natural(self) -> bool:
        """Never: what it finds measures nothing."""
        return False

    def check(self) -> None:
        """It is always there."""

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Array:
        """Return the vectors of texts it was given. Raises InputError for any other."""
        known = self._axes if query else self._places
        unknown = [text for text in texts if text not in known]
        if unknown:
            raise InputError(f"the simulated embedder was not given {unknown[0]!r}")
        at = [known[text] for text in texts]
        if query:
            return np.eye(self._vectors.shape[1], dtype=np.float32)[at]
        return self._vectors[at]
