"""From a store to example sets: the only part of examples that sees the store."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

import numpy as np

from exegete.config import ExampleConfig
from exegete.errors import InputError, MismatchError
from exegete.examples.negatives import draw_silent
from exegete.examples.select import STRATA, Draw, draw
from exegete.examples.split import CODES, CorpusLike
from exegete.examples.windows import Frame, activations, centred, fires_per_window, frame, ordered
from exegete.store.store import Store
from exegete.streams import stream
from exegete.tokens import TokenTable
from exegete.types import Array, Example, ExampleSet, Firings, LatentId, Rows, Skipped, Split
from exegete.views import SplitData

_BLOCK: Final = 64
_SILENT: Final = STRATA.index("silent")


class RowSource(CorpusLike, Protocol):
    """What selecting needs of a corpus."""

    @property
    @abstractmethod
    def table(self) -> TokenTable:
        """The token-bytes table."""


class FiringSource(Protocol):
    """What selecting needs of a store."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the coder."""

    @property
    @abstractmethod
    def corpus(self) -> RowSource:
        """The documents and segments of the rows that the firings lie in."""

    @abstractmethod
    def rows(self, numbers: Array, /) -> Rows:
        """Return the rows of these numbers; the mask leaves out all positions at which this store has no firings."""

    @abstractmethod
    def firings(self, index: int, /) -> Firings:
        """Return all firings of one latent."""

    @abstractmethod
    def block(self, start: int, stop: int, /) -> list[Firings]:
        """Return all firings of latents ``start`` to ``stop`` (exclusive)."""


@final
class StoreData(SplitData):
    """A store whose text is split by document.

    A row that holds documents of several splits belongs to each of them, with the text of the others taken out of its
    documents and its mask. A document that a cut divides (``split_segments`` cuts only when there are few documents)
    counts as one document per segment from here on, numbered after all others: no two splits share a document.
    ``store`` and ``segment_split`` are what it was made from, ``folder`` where the store lies on disk, None when it
    does not.
    """

    def __init__(self, store: FiringSource, segment_split: Array) -> None:
        """Take a store and what ``split_segments`` returned. Raises MismatchError when they do not fit."""
        segments = np.asarray(store.corpus.segments)
        if segment_split.shape != segments.shape[:1]:
            raise MismatchError(
                f"a split of shape {segment_split.shape} does not fit a corpus of {len(segments)} segments"
            )
        self.store: Final = store
        self.segment_split: Final = segment_split
        self.folder: Final = store.folder.resolve() if isinstance(store, Store) else None
        n_rows = int(segments[-1, 0]) + 1 if len(segments) else 0
        self._segments = segments
        self._cut = _divided(segments[:, 3], segment_split)
        self._numbers = {split: np.unique(segments[segment_split == code, 0]) for split, code in CODES.items()}
        self._shared = {split: self._shares(split, n_rows) for split in CODES}
        self._places = {split: _inverse(numbers, n_rows) for split, numbers in self._numbers.items()}
        self._rows: dict[Split, Rows] = {}
        self._frames: dict[tuple[Split, int, int], tuple[Frame, Array]] = {}
        self._held: tuple[tuple[int, ...], list[Firings]] = ((), [])

    @property
    def name(self) -> str:
        """The name of the coder."""
        return self.store.name

    @property
    def tokens(self) -> TokenTable:
        """The token-bytes table."""
        return self.store.corpus.table

    def numbers(self, split: Split) -> Array:
        """Return the number in the corpus of each row that holds text of a split, int64, ascending."""
        return self._numbers[split]

    def rows(self, split: Split) -> Rows:
        """Return the rows that hold text of a split, in corpus order. Made once and kept (9 bytes per token).

        Text of other splits keeps its tokens but has document −1 and does not count.
        """
        if split not in self._rows:
            numbers = self._numbers[split]
            rows = self.store.rows(numbers)
            mine = self.segment_split == CODES[split]
            named = np.isin(numbers, self._segments[mine & self._cut, 0]) | self._shared[split][numbers]
            if named.any():
                documents, mask = rows.documents.copy(), rows.mask.copy()
                documents[named] = self._owners(split, numbers[named], rows.length)
                mask[named] &= documents[named] >= 0
                rows = Rows(tokens=rows.tokens, documents=documents, mask=mask)
            self._rows[split] = rows
        return self._rows[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        """Return the firings of each latent in the split's text; ``Firings.rows`` index into ``rows(split)``."""
        places = self._places[split]
        owners = self.rows(split).documents if self._shared[split].any() else None
        parts = []
        for whole in self._fetch(tuple(int(i) for i in indices)):
            rows = places[whole.rows]
            here = np.flatnonzero(rows >= 0)
            if owners is not None:
                here = here[owners[rows[here], np.asarray(whole.positions)[here]] >= 0]
            parts.append(
                Firings(
                    latent=whole.latent,
                    rows=rows[here],
                    positions=np.asarray(whole.positions)[here],
                    values=np.asarray(whole.values)[here],
                )
            )
        return parts

    def frame(self, split: Split, window: int, seed: int) -> tuple[Frame, Array]:
        """Return the frame of a split and its lookup. Made once and kept (4 bytes per token)."""
        key = (split, window, seed)
        if key not in self._frames:
            tiled = frame(self.rows(split), window, seed=seed, numbers=self._numbers[split])
            self._frames[key] = (tiled, tiled.lookup())
        return self._frames[key]

    def _shares(self, split: Split, n_rows: int) -> Array:
        """Return which rows hold text of other splits, or of none, beside that of a split, bool [n_rows]."""
        mine = self.segment_split == CODES[split]
        found = np.zeros((2, n_rows), dtype=bool)
        for side, chosen in enumerate((mine, ~mine)):
            found[side, self._segments[chosen, 0]] = True
        shared: Array = found[0] & found[1]
        return shared

    def _owners(self, split: Split, numbers: Array, length: int) -> Array:
        """Return the document of every position of some rows as a split sees it, int32 [rows, length]."""
        which = np.flatnonzero(np.isin(self._segments[:, 0], numbers))
        row, start, stop, document = self._segments[which].T
        document = np.where(self._cut[which], len(self.store.corpus.documents) + which, document)
        # Each segment adds its document where it starts and takes it back where it stops.
        change = np.where(self.segment_split[which] == CODES[split], document + 1, 0).astype(np.int32)
        place = np.searchsorted(numbers, row)
        steps = np.zeros((len(numbers), length + 1), dtype=np.int32)
        steps[place, start] += change
        steps[place, stop] -= change
        np.cumsum(steps, axis=1, out=steps)
        owners: Array = steps[:, :length]
        owners -= 1
        return owners

    def _fetch(self, indices: tuple[int, ...]) -> list[Firings]:
        """Read whole latents, runs of neighbours at once; the last answer is kept, as every split asks for it."""
        if self._held[0] != indices:
            found: list[Firings] = []
            for start, stop in _runs(indices):
                one = stop == start + 1
                found.extend([self.store.firings(start)] if one else self.store.block(start, stop))
            self._held = (indices, found)
        return self._held[1]


def select(
    data: StoreData, index: int, *, config: ExampleConfig | None = None, seed: int = 0, coder: str | None = None
) -> ExampleSet | Skipped:
    """Return the examples of one latent, or why it has none; see ``select_many``."""
    return select_many(data, [index], config, seed, coder=coder)[0]


def select_many(
    data: StoreData,
    indices: Sequence[int],
    config: ExampleConfig | None = None,
    seed: int = 0,
    *,
    coder: str | None = None,
) -> list[ExampleSet | Skipped]:
    """Return the examples of each latent, or why it has none, in the order asked for.

    All windows come from the frames of the train and test rows; only train windows are centred on firings when
    ``config.centred`` asks for it. Firing train windows are drawn by ``config.strategy``, strongest first in the set;
    firing test windows always by quantiles, so that every decile is judged; silent test windows at random. Test
    windows stand in random order. A window fires when any position of it has a positive value; one that holds none
    but values of 0 or below is neither firing nor silent. The draws of a latent depend on the seed and its name
    alone. ``coder`` is the name in the latents' ids, by default the store's.

    Raises InputError when the frame of a split is empty: the rows are shorter than a window.
    """
    settings = ExampleConfig() if config is None else config
    job = _Job(data, settings, seed, data.name if coder is None else coder)
    chosen: list[ExampleSet | Skipped] = []
    for start in range(0, len(indices), _BLOCK):
        chosen.extend(job.block(indices[start : start + _BLOCK]))
    return chosen


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The windows drawn of one latent in one split, as arrays with one entry per window."""

    split: Split
    row: Array
    start: Array
    fires: Array
    stratum: Array
    probability: Array
    activations: Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What was drawn of one latent."""

    latent: LatentId
    maximum: float
    firing_rate: float
    train: _Part
    test: _Part


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Fired:
    """The firings of one latent in one split, by window.

    ``windows``, with their peaks and maxima, fire; ``touched`` are all windows that hold any recorded value.
    """

    places: Array
    values: Array
    touched: Array
    windows: Array
    peaks: Array
    maxima: Array


@final
class _Job:
    """One call of ``select_many``."""

    def __init__(self, data: StoreData, config: ExampleConfig, seed: int, coder: str) -> None:
        self._data, self._config, self._seed, self._coder = data, config, seed, coder
        self._train, self._train_lookup = self._framed("train")
        self._test, self._test_lookup = self._framed("test")

    def _framed(self, split: Split) -> tuple[Frame, Array]:
        tiled, lookup = self._data.frame(split, self._config.window, self._seed)
        if not len(tiled):
            raise InputError(
                f"no {split} row holds a window of {self._config.window} tokens of one document; "
                f"set examples.window lower, or give longer documents"
            )
        return tiled, lookup

    def block(self, indices: Sequence[int]) -> list[ExampleSet | Skipped]:
        """Select for some latents at once: their tokens are gathered together."""
        train, test = self._data.firings(indices, "train"), self._data.firings(indices, "test")
        plans = [self._plan(*latent) for latent in zip(indices, train, test, strict=True)]
        drawn = [plan for plan in plans if isinstance(plan, _Plan)]
        shown = self._examples([plan.train for plan in drawn])
        judged = self._examples([plan.test for plan in drawn])
        return [
            plan
            if isinstance(plan, Skipped)
            else ExampleSet(
                latent=plan.latent,
                examples=(*next(shown), *next(judged)),
                maximum=plan.maximum,
                firing_rate=plan.firing_rate,
                frame=len(self._test),
                seed=self._seed,
                table=self._data.tokens,
            )
            for plan in plans
        ]

    def _plan(self, index: int, train: Firings, test: Firings) -> _Plan | Skipped:
        config = self._config
        latent = LatentId(coder=self._coder, index=int(index))
        shown = _by_window(train, self._train, self._train_lookup)
        judged = _by_window(test, self._test, self._test_lookup)
        if not ((shown.values > 0).any() or (judged.values > 0).any()):
            return Skipped(latent=latent, stage="select", reason="dead", have=0, need=1)
        silent = len(self._test) - len(judged.touched)
        for reason, have, need in (
            ("too few firing train windows", len(shown.windows), config.min_train),
            ("too few firing test windows", len(judged.windows), config.min_test),
            ("too few silent test windows", silent, config.min_test),
        ):
            if have < max(need, 1):
                return Skipped(latent=latent, stage="select", reason=reason, have=have, need=max(need, 1))
        rng = stream(self._seed, latent, "select")
        return _Plan(
            latent=latent,
            maximum=float(shown.values.max()),
            firing_rate=len(judged.windows) / len(self._test),
            train=self._train_part(shown, rng),
            test=self._test_part(judged, rng),
        )

    def _train_part(self, fired: _Fired, rng: np.random.Generator) -> _Part:
        tiled, config = self._train, self._config
        if config.centred:
            row, start = centred(tiled, fired.windows, fired.peaks)
            dense = activations(fired.places, fired.values, row * tiled.length + start, tiled.window)
            maxima = dense.max(axis=1)
        else:
            row, start, maxima = tiled.row[fired.windows], tiled.start[fired.windows], fired.maxima
        drawn = draw(maxima, config.n_train, config.strategy, rng)
        strongest = np.argsort(-maxima[drawn.chosen], kind="stable")
        return self._part("train", tiled, fired, row[drawn.chosen], start[drawn.chosen], drawn, strongest)

    def _test_part(self, fired: _Fired, rng: np.random.Generator) -> _Part:
        tiled, config = self._test, self._config
        firing = draw(fired.maxima, config.n_test, "quantiles", rng)
        silent, probability = draw_silent(fired.touched, len(tiled), config.n_negatives, rng)
        drawn = Draw(
            chosen=np.concatenate([fired.windows[firing.chosen], silent]),
            stratum=np.concatenate([firing.stratum, np.full(len(silent), _SILENT)]),
            probability=np.concatenate([firing.probability, np.full(len(silent), probability)]),
        )
        order = rng.permutation(len(drawn))
        return self._part("test", tiled, fired, tiled.row[drawn.chosen], tiled.start[drawn.chosen], drawn, order)

    def _part(
        self, split: Split, tiled: Frame, fired: _Fired, row: Array, start: Array, drawn: Draw, order: Array
    ) -> _Part:
        row, start, stratum = row[order], start[order], drawn.stratum[order]
        return _Part(
            split=split,
            row=row,
            start=start,
            fires=stratum != _SILENT,
            stratum=stratum,
            probability=drawn.probability[order],
            activations=activations(fired.places, fired.values, row * tiled.length + start, tiled.window),
        )

    def _examples(self, parts: list[_Part]) -> Iterator[list[Example]]:
        """Yield the examples of each part; all parts are of one split."""
        if not parts:
            return
        split = parts[0].split
        rows, numbers = self._data.rows(split), self._data.numbers(split)
        row, start = np.concatenate([p.row for p in parts]), np.concatenate([p.start for p in parts])
        tokens = rows.tokens[row[:, None], start[:, None] + np.arange(self._config.window)]
        places = numbers[row].tolist()
        documents = rows.documents[row, start].tolist()
        at = 0
        for part in parts:
            here = slice(at, at + len(part.row))
            at = here.stop
            columns = (
                places[here],
                part.start.tolist(),
                part.fires.tolist(),
                part.stratum.tolist(),
                part.probability.tolist(),
                documents[here],
            )
            yield [
                Example(
                    split=split,
                    fires=fires,
                    stratum=STRATA[stratum],
                    row=place,
                    start=first,
                    tokens=shown,
                    activations=values,
                    document=document,
                    inclusion_probability=probability,
                )
                for place, first, fires, stratum, probability, document, shown, values in zip(
                    *columns, tokens[here], part.activations, strict=True
                )
            ]


def _by_window(firings: Firings, tiled: Frame, lookup: Array) -> _Fired:
    places, values = ordered(firings.rows, firings.positions, firings.values, tiled.length)
    touched, peaks, maxima = fires_per_window(places, values, lookup)
    fires = maxima > 0
    return _Fired(
        places=places,
        values=values,
        touched=touched,
        windows=touched[fires],
        peaks=peaks[fires],
        maxima=maxima[fires],
    )


def _divided(owners: Array, split: Array) -> Array:
    """Return which segments are of documents that lie in more than one split, bool [n_segments]."""
    found = np.zeros((len(CODES), int(owners.max(initial=-1)) + 1), dtype=bool)
    for code in CODES.values():
        found[code, owners[split == code]] = True
    divided: Array = (found.sum(axis=0) > 1)[owners]
    return divided


def _inverse(numbers: Array, n: int) -> Array:
    """Return the place of each of n rows among ``numbers``, −1 where it is not there."""
    places = np.full(n, -1, dtype=np.int64)
    places[numbers] = np.arange(len(numbers))
    return places


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield maximal runs of consecutive indices as (start, stop)."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], indices[i - 1] + 1
            start = i
