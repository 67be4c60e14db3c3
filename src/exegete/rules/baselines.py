"""What a rule has to beat: the best token, the best twelve tokens, and graded tables that nobody can read.

Everything is fitted on the train split and measured as average precision over all counted test positions. What lies
before a document's first token in a row counts as a token of its own in bigrams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.rules.evaluate import average_precision_of_blocks, context_of, find_sorted, flat_firings
from exegete.rules.execute import TokenContext
from exegete.rules.language import MAX_TOKENS
from exegete.types import Array
from exegete.views import SplitData

PRIOR = 2.0  # positions' worth of prior a table entry starts with: the base rate, or the unigram entry for bigrams


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineMetrics:
    """Held-out average precision of four predictors.

    ``token``: the one token with the best train F1. ``token_set``: the twelve tokens of highest smoothed train
    precision, yes or no. ``unigram``: P(fires | token), smoothed towards the base rate. ``bigram``: P(fires | token
    before, token), smoothed towards the unigram table.
    """

    token: float
    token_set: float
    unigram: float
    bigram: float


@final
class _Tables:
    """Counts that all latents share."""

    def __init__(self, data: SplitData) -> None:
        self.train = context_of(data, "train")
        self.test = context_of(data, "test")
        self.ids = self.train.none + 1
        self.n_train = np.bincount(_counted(self.train, self.train.flat), minlength=self.ids)
        self.n_test = np.bincount(_counted(self.test, self.test.flat), minlength=self.ids)
        self.pairs, self.n_pairs_test = np.unique(_counted(self.test, self._codes(self.test)), return_counts=True)
        train_pairs, counts = np.unique(_counted(self.train, self._codes(self.train)), return_counts=True)
        where, known = find_sorted(self.pairs, train_pairs)
        self.n_pairs_train = np.where(known, counts[where] if len(counts) else 0, 0)

    def _codes(self, context: TokenContext) -> Array:
        return context.place(1).astype(np.int64) * self.ids + context.flat

    def count_pairs(self, context: TokenContext, flat: Array) -> Array:
        """Return how many of the flat positions fall on each test pair."""
        codes = context.place(1)[flat].astype(np.int64) * self.ids + context.flat[flat]
        where, known = find_sorted(codes, self.pairs)
        return np.bincount(where[known], minlength=len(self.pairs))


def _counted(context: TokenContext, values: Array) -> Array:
    return values if context.mask is None else values[context.mask]


def baseline_auprc(data: SplitData, indices: Sequence[int]) -> Mapping[int, BaselineMetrics | None]:
    """Measure the four baselines of every latent. None for a latent that never fires in one of the splits."""
    shared = _Tables(data)
    wanted = list(indices)
    found: dict[int, BaselineMetrics | None] = {}
    pairs = zip(wanted, data.firings(wanted, "train"), data.firings(wanted, "test"), strict=True)
    for index, train, test in pairs:
        fitted, truth = flat_firings(train, shared.train)[0], flat_firings(test, shared.test)[0]
        found[index] = _measure(shared, fitted, truth) if len(fitted) and len(truth) else None
    return found


def _measure(shared: _Tables, fitted: Array, truth: Array) -> BaselineMetrics:
    f_train = np.bincount(shared.train.flat[fitted], minlength=shared.ids)
    f_test = np.bincount(shared.test.flat[truth], minlength=shared.ids)
    base = len(fitted) / shared.train.n_counted
    unigram = (f_train + PRIOR * base) / (shared.n_train + PRIOR)
    f1 = f_train / (shared.n_train + len(fitted))
    best = np.zeros(shared.ids)
    best[f1.argmax()] = 1
    chosen = np.zeros(shared.ids)
    # tokens that never fired are not in the set, however little was seen of them
    chosen[np.lexsort((-f_train, -np.where(f_train > 0, unigram, -1.0)))[:MAX_TOKENS]] = 1
    chosen[f_train == 0] = 0
    current = (shared.pairs % shared.ids).astype(np.int64)
    f_pairs = shared.count_pairs(shared.train, fitted)
    bigram = (f_pairs + PRIOR * unigram[current]) / (shared.n_pairs_train + PRIOR)
    return BaselineMetrics(
        token=_graded(best, shared.n_test, f_test),
        token_set=_graded(chosen, shared.n_test, f_test),
        unigram=_graded(unigram, shared.n_test, f_test),
        bigram=_graded(bigram, shared.n_pairs_test, shared.count_pairs(shared.test, truth)),
    )


def _graded(scores: Array, sizes: Array, hits: Array) -> float:
    levels, block = np.unique(scores, return_inverse=True)
    blocks = np.bincount(block, weights=sizes, minlength=len(levels))[::-1]
    return average_precision_of_blocks(blocks, np.bincount(block, weights=hits, minlength=len(levels))[::-1])
