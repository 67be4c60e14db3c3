"""What a simulated judge feels about a text: a number whose sign is its verdict, with known error rates.

The evidence is normal with standard deviation 1, and its mean depends on whether the explanation fits: Φ⁻¹ of the rate
at which such a text is called fitting. Positive evidence is a yes. Verdicts, P(yes), and what simulated readers and
embedders give all follow from it, so that every scorer meets the same known errors.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

import numpy as np

from exegete.errors import InputError
from exegete.types import Array

_NORMAL = NormalDist()
_LEAST = 1e-9  # a rate of 0 or 1 is evidence of six standard deviations


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Error rates: what fits is called fitting at ``true_positive_rate``, what does not at ``false_positive_rate``.

    ``calibration`` multiplies the log odds of P(yes): 1 is calibrated where both kinds are equally frequent and equally
    often mistaken, above 1 overconfident, below 1 underconfident. Raises InputError for what is no rate.
    """

    true_positive_rate: float = 0.9
    false_positive_rate: float = 0.1
    calibration: float = 1.0

    def __post_init__(self) -> None:
        for rate in (self.true_positive_rate, self.false_positive_rate):
            if not 0.0 <= rate <= 1.0:
                raise InputError(f"a rate lies in [0, 1], got {rate}")
        if not (math.isfinite(self.calibration) and self.calibration > 0):
            raise InputError(f"calibration is above 0, got {self.calibration}")

    def rate(self, fits: bool | None) -> float:
        """Return how often such a text is called fitting; what is not understood is a coin."""
        if fits is None:
            return 0.5
        return self.true_positive_rate if fits else self.false_positive_rate

    def mean(self, fits: bool | None) -> float:
        """Return the mean evidence for such a text."""
        return quantile(self.rate(fits))

    def means(self, fits: Array) -> Array:
        """Return the mean evidence for each text, float64 of the shape of ``fits`` (bool)."""
        return np.where(fits, self.mean(True), self.mean(False))

    @property
    def separation(self) -> float:
        """How many standard deviations lie between what fits and what does not."""
        return self.mean(True) - self.mean(False)

    @property
    def steepness(self) -> float:
        """By how much the log odds rise with each deviation where P(yes) is calibrated; never 0."""
        return max(abs(self.separation), 0.01)

    def at(self, uniform: float, fits: bool | None, shift: float = 0.0) -> float:
        """Return the evidence that a uniform number in [0, 1) stands for, moved by ``shift`` deviations."""
        return self.mean(fits) - quantile(uniform) + shift

    def probability(self, evidence: float) -> float:
        """Return P(yes) of a judge with this evidence."""
        return 1.0 / (1.0 + math.exp(-max(-40.0, min(40.0, self.calibration * self.steepness * evidence))))

    def auroc(self, positive: float, negative: float) -> float:
        """Return the AUROC of the evidence, given the shares of positives and of negatives that the explanation fits.

        Positives and negatives are mixtures of what fits and what does not, so it is a sum of four terms.
        """
        above = _NORMAL.cdf(self.separation / math.sqrt(2.0))
        right, wrong = positive * (1 - negative), (1 - positive) * negative
        return right * above + wrong * (1 - above) + (1 - right - wrong) / 2


def uniform(seed: int, *names: object) -> float:
    """Return a number in [0, 1) that is a hash of the seed and the names, whatever was drawn before."""
    key = "|".join([str(seed), *map(str, names)]).encode(errors="surrogatepass")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2.0**53


def quantile(probability: float) -> float:
    """Return the standard normal quantile; 0 and 1 give about six deviations."""
    return _NORMAL.inv_cdf(min(max(probability, _LEAST), 1.0 - _LEAST))
