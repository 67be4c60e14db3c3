"""What was read of a model behind each row, ready for probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from exegete.elk.facts import Facts, Feature
from exegete.types import Array


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Extraction:
    """Features of rows: ``features[kind][site or block]``, arrays float32 as ``extraction`` says.

    ``log_odds`` [n] are the model's own, of the first tokens of the true answer against the false one.
    ``subject`` and ``data`` are the hashes of the model and of the rows.
    """

    subject: str
    data: str
    facts: Facts
    log_odds: Array
    features: Mapping[Feature, Mapping[int, Array]]

    def __len__(self) -> int:
        return len(self.facts)

    def take(self, rows: Array) -> Extraction:
        """Return the rows of a mask or of indices."""
        return Extraction(
            subject=self.subject,
            data=self.data,
            facts=self.facts.take(rows),
            log_odds=self.log_odds[rows],
            features={kind: {at: x[rows] for at, x in sites.items()} for kind, sites in self.features.items()},
        )
