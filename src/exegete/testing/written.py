"""What a subject writes whose next token depends on its last one alone, and what a reader takes from that.

Such text is a Markov chain: how many tokens of a kind are to be expected in it is a sum over powers of one matrix, with
nothing drawn. How far single texts scatter around that is simulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.scorers.intervention_effects import STEPS
from exegete.types import Array

_LEAST: Final = 1e-30  # so small a number may be drawn as 0
WRITTEN: Final = 150
"""Pairs of texts written after each token, clean and edited, of which simulated draws take some."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """Tokens that a reader takes for covered in edited text more than in clean text, after each of ``tokens`` [m].

    ``expected`` [strengths, m, rungs] are the numbers to be expected at each of three ``strengths``, ``off``
    [m, pairs, rungs] how far those of single pairs of texts lie from them.
    """

    tokens: Array
    strengths: Array
    expected: Array
    off: Array

    def gains(self, strengths: Array, places: Array, shares: Array) -> Array:
        """Return the expected numbers at these strengths [draws], prompts ending in the tokens at ``places`` [ends].

        ``shares`` [draws, ends] say how many of them do; the numbers are [draws, rungs].
        """
        weights = np.ones((len(strengths), 3))
        for i in range(3):
            for j in {0, 1, 2} - {i}:  # the parabola through all three
                weights[:, i] *= (strengths - self.strengths[j]) / (self.strengths[i] - self.strengths[j])
        found: Array = np.einsum("ds,smr,dm->dr", weights, self.expected[:, places], shares)
        return found

    def scatter(self, places: Array, counts: Array, rng: np.random.Generator) -> Array:
        """Return how far means over so many prompts [draws, ends] lie from what is expected [draws, rungs]."""
        found = np.empty((len(counts), self.off.shape[2]))
        for draw, row in enumerate(counts):
            which = np.repeat(places, row)
            found[draw] = self.off[which, rng.integers(self.off.shape[1], size=len(which))].mean(axis=0)
        return found


def written_after(
    tokens: Array, clean: Array, edited: Iterable[tuple[float, Array]], *, taken: Array, ends: Array, seed: int
) -> Written:
    """Return what is written after tokens [m], by the chances of every next token [ids, ids], clean and edited.

    ``edited`` gives three strengths, each with its matrix; pairs are written at the middle one. ``taken`` [rungs, ids]
    are the chances that a reader takes a token for covered. A text ends before a token that ``ends`` [ids] it.
    """
    strengths, expected = [], []
    off = np.empty(0)
    plain = _expected(tokens, clean, taken, ends)
    for strength, chances in edited:
        strengths.append(strength)
        expected.append(_expected(tokens, chances, taken, ends) - plain)
        if len(strengths) == 2:
            off = _pairs(tokens, clean, chances, taken, ends, np.random.default_rng(seed))
            off -= off.mean(axis=1, keepdims=True)
    return Written(tokens=tokens, strengths=np.array(strengths), expected=np.array(expected), off=off)


def _expected(tokens: Array, chances: Array, taken: Array, ends: Array) -> Array:
    """Return the expected number of tokens taken in a text after each token [m, rungs]."""
    counted = np.where(ends[:, None], 0.0, taken.T).astype(np.float32)
    left = np.zeros_like(counted)
    for _ in range(STEPS - 1):
        left = np.where(ends[:, None], np.float32(0.0), chances @ (counted + left))
    found: Array = (chances[tokens] @ (counted + left)).astype(np.float64)
    return found


def _pairs(tokens: Array, clean: Array, edited: Array, taken: Array, ends: Array, rng: np.random.Generator) -> Array:
    """Return tokens taken in edited less in clean text, of pairs written after each token [m, pairs, rungs].

    As the scorer has it: both texts meet the same noise, and a reader takes tokens alike while the texts are the same.
    """
    n = len(tokens) * WRITTEN
    at = np.repeat(tokens, WRITTEN)
    last = [at, at]
    going = [np.ones(n, bool), np.ones(n, bool)]
    same = np.ones(n, bool)
    found = np.zeros((n, len(taken)))
    for _ in range(STEPS):
        noise = -np.log(np.maximum(rng.standard_exponential((n, clean.shape[1]), dtype=np.float32), _LEAST))
        last = [(np.log(chances[at]) + noise).argmax(axis=1) for chances, at in zip((clean, edited), last, strict=True)]
        going = [on & ~ends[at] for on, at in zip(going, last, strict=True)]
        same &= last[0] == last[1]
        first, second = rng.random((2, n, len(taken)))
        for sign, on, at, u in zip(
            (-1.0, 1.0), going, last, (first, np.where(same[:, None], first, second)), strict=True
        ):
            found += sign * (on[:, None] & (u < taken[:, at].T))
    return found.reshape(len(tokens), WRITTEN, len(taken))
