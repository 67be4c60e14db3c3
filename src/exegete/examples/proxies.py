"""Four guesses at which silent windows are hard to judge: the same token, a neighbour, similar text, a near miss.

Each looks at the whole test frame, and prepares what all latents share when the first block asks for it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from exegete.config import Negative
from exegete.examples.draws import spread, starts_of
from exegete.examples.fired import Block, Fired
from exegete.examples.proxy import Proxy
from exegete.examples.similar import TextIndex
from exegete.examples.split import CODES
from exegete.rules.evaluate import context_of
from exegete.rules.execute import TokenContext, matches
from exegete.rules.language import Rule
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.examples.windows import Frame
    from exegete.store.neighbours import Neighbours

TOKENS: Final = 10
"""Most tokens by which a latent is known."""
SHARE: Final = 0.9
"""These tokens stop once they make up this share of the windows in which it fires."""
SIMILAR: Final = 1000
"""Windows that are similar, at most; and at most a tenth of the test frame."""

_CHUNK: Final = 1 << 16  # windows whose tokens are read at once
_HELD: Final = 1 << 24  # windows of neighbours that are kept, 128 MB


class _Prepared(Proxy, ABC):
    """A proxy with something that it makes once for a frame."""

    _of: Frame | None = None

    def windows(self, block: Block) -> tuple[Array, Array]:
        """Return the windows of this kind for every latent of a block, as ``Proxy`` says."""
        if self._of is not block.frame:
            self._prepare(block)
            self._of = block.frame
        return _joined(self._found(block))

    @abstractmethod
    def _prepare(self, block: Block) -> None:
        """Make what all latents over the frame of this block share."""

    @abstractmethod
    def _found(self, block: Block) -> Iterable[Array]:
        """Yield the windows for each latent, ascending and distinct."""


@final
class SameToken(_Prepared):
    """Windows with a token that the latent fires on.

    A latent's tokens are those on which it fires most strongly in its firing train windows, the most frequent first
    (equally frequent ones in the order of their ids), until they make up 90 % of these windows, and at most ten.
    """

    kind: Negative = "same_token"

    def __init__(self) -> None:
        self._holding: Any = None  # [test windows, tokens], sparse, by token
        self._test: Array = np.zeros(0, np.int64)

    def _prepare(self, block: Block) -> None:
        """List the test windows that hold each token: about 9 bytes for each different token of each window."""
        from scipy import sparse

        self._test = block.frame.numbers(CODES["test"])
        sizes, tokens = [], [np.zeros(0, np.int32)]
        for start in range(0, len(self._test), _CHUNK):
            held = np.sort(block.data.window_tokens(block.frame, self._test[start : start + _CHUNK]), axis=1)
            fresh = np.ones(held.shape, bool)
            np.not_equal(held[:, 1:], held[:, :-1], out=fresh[:, 1:])
            sizes.append(fresh.sum(axis=1))
            tokens.append(held[fresh].astype(np.int32))
        column = np.concatenate(tokens)
        starts = starts_of(np.concatenate(sizes)) if sizes else np.zeros(1, np.int64)
        shape = (len(self._test), len(block.data.tokens))
        self._holding = sparse.csr_matrix((np.ones(len(column), bool), column, starts), shape=shape).tocsc()

    def _found(self, block: Block) -> Iterable[Array]:
        latent, token = tokens_of(block)
        begin, end = self._holding.indptr[token], self._holding.indptr[token + 1]
        bounds = np.searchsorted(latent, np.arange(len(block) + 1)).tolist()
        for low, high in itertools.pairwise(bounds):
            pairs = zip(begin[low:high].tolist(), end[low:high].tolist(), strict=True)
            yield self._test[_union([self._holding.indices[b:e] for b, e in pairs], len(self._test))]


@final
class Neighbour(Proxy):
    """Windows in which any neighbour of the latent fires."""

    kind: Negative = "neighbour"

    def __init__(self, neighbours: Neighbours) -> None:
        """Take the neighbours of all latents that will be asked for."""
        self._neighbours = neighbours
        self._frame: Frame | None = None
        self._held: dict[int, Array] = {}

    def windows(self, block: Block) -> tuple[Array, Array]:
        """Return the windows of this kind for every latent of a block. Raises NotFoundError for one without a row."""
        near = self._neighbours.of(block.indices)
        if self._frame is not block.frame or sum(map(len, self._held.values())) > _HELD:
            self._frame, self._held = block.frame, {}
        self._read(block, np.unique(near[near >= 0]))
        n = len(block.frame)
        return _joined(_union([self._held[other] for other in own if other >= 0], n) for own in near.tolist())

    def _read(self, block: Block, latents: Array) -> None:
        """Keep the test windows in which each of these latents fires; those of a few are read at a time."""
        missing = [int(latent) for latent in latents if int(latent) not in self._held]
        for start in range(0, len(missing), len(block)):
            some = missing[start : start + len(block)]
            fired = block.data.block(some, block.frame).test
            for place, latent in enumerate(some):
                own = slice(*fired.offsets[place : place + 2].tolist())
                self._held[latent] = fired.window[own][fired.maximum[own] > 0]


@final
class Similar(_Prepared):
    """Windows whose text is most like the mean of the train windows in which the latent fires.

    The 1,000 most similar ones in which it does not fire, but no more than a tenth of the test frame. Of a test frame
    with more text than the index can search evenly spaced ones are searched; of very many firing train windows
    evenly spaced ones are averaged.
    """

    kind: Negative = "similar"

    def __init__(self, index: TextIndex) -> None:
        """Take what windows are compared by; it is filled with those of the frame."""
        self._index = index
        self._searched: Array = np.zeros(0, np.int64)
        self._most = 0

    def _prepare(self, block: Block) -> None:
        test = block.frame.numbers(CODES["test"])
        self._most = min(SIMILAR, max(1, len(test) // 10))
        self._searched = test[_evenly(len(test), max(1, self._index.most // block.frame.window))]
        self._index.fill(block.data.window_tokens(block.frame, self._searched))

    def _found(self, block: Block) -> Iterable[Array]:
        shown, offsets = self._shown(block.train)
        patterns = np.flatnonzero(np.diff(offsets))
        tokens = block.data.window_tokens(block.frame, shown)
        likeness = iter(self._index.likeness(tokens, np.append(offsets[:-1][patterns], offsets[-1])))
        for latent in range(len(block)):
            if offsets[latent + 1] == offsets[latent]:
                yield np.zeros(0, np.int64)
                continue
            own = slice(*block.test.offsets[latent : latent + 2].tolist())
            yield self._nearest(next(likeness), block.test.window[own])

    def _shown(self, train: Fired) -> tuple[Array, Array]:
        """Return the firing train windows that are averaged, and where those of each latent begin."""
        fires = train.maximum > 0
        window = train.window[fires]
        counts = np.bincount(train.latent[fires], minlength=len(train.offsets) - 1)
        latent, place = spread(np.minimum(counts, self._index.shown))
        taken = place * counts[latent] // np.minimum(counts, self._index.shown)[latent]
        return window[starts_of(counts)[latent] + taken], starts_of(np.minimum(counts, self._index.shown))

    def _nearest(self, likeness: Array, touched: Array) -> Array:
        """Return the windows most like a pattern; of equally like ones the first. Unlike ones never count."""
        bits = np.maximum(likeness, np.float32(0)).view(np.uint32).astype(np.uint64)
        bits[np.searchsorted(self._searched, touched[np.isin(touched, self._searched)])] = 0
        keys = bits << np.uint64(32) | np.arange(len(bits) - 1, -1, -1, dtype=np.uint64)
        keys = keys[bits > 0]
        if len(keys) > self._most:
            keys = np.partition(keys, len(keys) - self._most)[-self._most :]
        place = len(bits) - 1 - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return self._searched[np.sort(place)]


@final
class NearMiss(_Prepared):
    """Windows in which the latent's rule matches at any position that counts.

    The rule is executed on the rows, as it is where it is scored: it reads what stands before the window in its
    document. A latent without a rule has no such windows.
    """

    kind: Negative = "near_miss"

    def __init__(self, rules: Mapping[int, Rule]) -> None:
        """Take the rules by latent."""
        self._rules = rules
        self._context: TokenContext | None = None

    def _prepare(self, block: Block) -> None:
        self._context = context_of(block.data, "test")

    def _found(self, block: Block) -> Iterable[Array]:
        assert self._context is not None
        numbers, lookup = block.data.numbers("test"), block.data.lookup(block.frame)
        for index in block.indices.tolist():
            rule = self._rules.get(index)
            if rule is None:
                yield np.zeros(0, np.int64)
                continue
            row, column = np.divmod(matches(rule, self._context)[0], block.frame.length)
            window = lookup.windows(numbers[row], numbers[row] * block.frame.length + column)
            window = window[window >= 0]
            yield window[np.flatnonzero(np.diff(window, prepend=-1))]


def tokens_of(block: Block) -> tuple[Array, Array]:
    """Return the tokens by which each latent is known, as pairs (place in the block, token), by latent."""
    train, n = block.train, len(block.data.tokens)
    fires = train.maximum > 0
    token = block.data.tokens_at(train.peak[fires], 1)[:, 0].astype(np.int64)
    pairs, often = np.unique(train.latent[fires] * n + token, return_counts=True)
    latent, token = np.divmod(pairs, n)
    order = np.lexsort((token, -often, latent))
    latent, token, often = latent[order], token[order], often[order]
    before = np.cumsum(often) - often
    begins = np.searchsorted(latent, np.arange(len(block)))
    total = np.bincount(latent, weights=often, minlength=len(block))
    rank = np.arange(len(latent)) - begins[latent]
    kept = (rank < TOKENS) & (before - before[begins[latent]] < SHARE * total[latent])
    return latent[kept], token[kept]


def _evenly(n: int, most: int) -> Array:
    """Return evenly spaced places out of n, all of them where there are no more than ``most``."""
    return np.arange(min(n, most)) * n // max(1, min(n, most))


def _union(parts: list[Array], n: int) -> Array:
    """Return the numbers below n that are in any of the parts, ascending, each once."""
    if len(parts) == 1:
        return parts[0].astype(np.int64)
    if sum(map(len, parts)) < n // 16:
        return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
    found = np.zeros(n, bool)
    for part in parts:
        found[part] = True
    return np.flatnonzero(found)


def _joined(windows: Iterable[Array]) -> tuple[Array, Array]:
    """Return offsets and windows of all latents."""
    found = list(windows)
    return starts_of([len(own) for own in found]), np.concatenate([np.zeros(0, np.int64), *found])
