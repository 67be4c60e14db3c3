"""From a store to example sets: which windows are shown and judged, latent by latent, a block of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final, final

import numpy as np

from exegete.config import NEGATIVES, ExampleConfig, Negative
from exegete.errors import InputError
from exegete.examples.clusters import Units, units
from exegete.examples.data import StoreData
from exegete.examples.diverse import candidates, farthest_first
from exegete.examples.draws import spread
from exegete.examples.fired import Block, Gathered, Recorded, gathered
from exegete.examples.keys import latent_keys, mixed
from exegete.examples.negatives import Silent, draw_silent, homes
from exegete.examples.proxy import Proxy
from exegete.examples.select import Draw, chosen_for_certain, draw, rank
from exegete.examples.split import CODES
from exegete.examples.windows import activations, centred
from exegete.store.reading import runs
from exegete.types import STRATA, Array, ExampleSet, LatentId, Skipped, Split, Windows

__all__ = ["StoreData", "select", "select_many"]

_BLOCK: Final = 64
_FIRINGS: Final = 1 << 24  # of a block, unless one latent alone has more; they take some 80 bytes each
_PAIRS: Final = 1 << 26  # (latent, test window) pairs of a block at most, where lists may be that long
_TRAIN, _TEST, _SILENT, _ORDER = range(4)  # which of a latent's keys decides what
_ALL_BITS: Final = np.uint64(0xFFFFFFFF)


def select(
    data: StoreData,
    index: int,
    *,
    config: ExampleConfig | None = None,
    seed: int = 0,
    coder: str | None = None,
    proxies: Mapping[Negative, Proxy] = MappingProxyType({}),
) -> ExampleSet | Skipped:
    """Return the examples of one latent, or why it has none; see ``select_many``."""
    return select_many(data, [index], config, seed, coder=coder, proxies=proxies)[0]


def select_many(
    data: StoreData,
    indices: Sequence[int],
    config: ExampleConfig | None = None,
    seed: int = 0,
    *,
    coder: str | None = None,
    proxies: Mapping[Negative, Proxy] = MappingProxyType({}),
) -> list[ExampleSet | Skipped]:
    """Return the examples of each latent, or why it has none, in the order asked for.

    All windows come from the frame; only train windows are centred on firings when ``config.centred`` asks for it.
    Firing train windows are drawn by ``config.strategy``, strongest first in the set; firing test windows by
    ``config.test_strategy``; silent test windows in equal parts from the kinds of ``config.negatives``, of which each
    but ``random`` needs its proxy. Of one document no more than PER_DOCUMENT (3) test windows are drawn in a stratum
    while the others have enough; ``importance`` keeps its own probabilities instead, and train windows are not spread
    over documents. Test windows stand in random order. A window fires when any position of it has a positive value;
    one that holds none but values of 0 or below is neither firing nor silent. Of near-duplicate windows one, drawn at
    random, stands for all. The draws of a latent depend on the seed and its name alone. ``coder`` is the name in the
    latents' ids, by default the store's.

    Raises InputError when a split has no window, as the rows are shorter, or a kind of negatives no proxy.
    """
    settings = ExampleConfig() if config is None else config
    job = _Job(data, settings, seed, data.name if coder is None else coder, proxies)
    chosen: list[ExampleSet | Skipped] = []
    for start, stop in runs(data.counts(indices), _FIRINGS, job.size):
        chosen.extend(job.block([int(i) for i in indices[start:stop]]))
    return chosen


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """The windows drawn of a block of latents in one split, as columns with one entry per window.

    ``latent`` [n] are places in the block, ``place`` [n] flat places where the windows begin, ``window`` [n] the frame
    windows behind them; the others are as in Windows.
    """

    latent: Array
    place: Array
    window: Array
    fires: Array
    stratum: Array
    probability: Array
    multiplicity: Array


@final
class _Job:
    """One call of ``select_many``."""

    def __init__(
        self, data: StoreData, config: ExampleConfig, seed: int, coder: str, proxies: Mapping[Negative, Proxy]
    ) -> None:
        self._data, self._config, self._seed, self._coder = data, config, seed, coder
        self._kinds = tuple(kind for kind in NEGATIVES if kind in config.negatives)
        if len(self._kinds) < max(len(config.negatives), 1):
            raise InputError(f"negatives are some of {', '.join(NEGATIVES)}, each once; got {list(config.negatives)}")
        missing = [kind for kind in self._kinds if kind != "random" and kind not in proxies]
        if missing:
            raise InputError(
                f"negatives of kind {missing[0]} need a proxy that finds them, got {sorted(proxies) or 'none'}; "
                f"give one in proxies, or take {missing[0]} out of examples.negatives"
            )
        self._proxies = proxies
        self._strata = np.array([STRATA.index("silent" if kind == "random" else kind) for kind in self._kinds])
        self._frame = data.frame(config.window, seed, keep_bos=config.keep_bos)
        self._lookup = data.lookup(self._frame)
        self._counted("train")
        self._n_test = self._counted("test")
        self._known = {split: data.clusters(split, self._frame, config.duplicates) for split in ("train", "test")}
        self._homes = homes(self._known["test"], self._frame.document)
        plain = self._kinds == ("random",) and config.silent == "window"
        longest = self._homes.n + len(self._homes.wandering) if plain else self._n_test
        self.size: Final = max(1, min(_BLOCK, _PAIRS // max(longest, 1)))

    def _counted(self, split: Split) -> int:
        count = int(np.count_nonzero(self._frame.split == CODES[split]))
        if not count:
            raise InputError(
                f"no {split} row holds a window of {self._config.window} tokens of one document; "
                f"set examples.window lower, or give longer documents"
            )
        return count

    def block(self, indices: list[int]) -> list[ExampleSet | Skipped]:
        """Select for some latents at once."""
        latents = [LatentId(coder=self._coder, index=i) for i in indices]
        keys = latent_keys(self._seed, latents)
        recorded = self._data.recorded(indices)
        found = gathered(recorded, self._frame.split, self._lookup)
        train = units(found.train, self._known["train"], keys[:, _TRAIN])
        test = units(found.test, self._known["test"], keys[:, _TEST])
        silent = self._silent(indices, found, keys[:, _SILENT])
        have = np.stack(
            [found.alive, np.diff(train.offsets), np.diff(test.offsets), silent.sizes.sum(axis=1)], axis=1
        ).tolist()
        skips = [self._skip(latent, *counts) for latent, counts in zip(latents, have, strict=True)]
        rates = np.bincount(found.test.latent[found.test.maximum > 0], minlength=len(indices)) / self._n_test
        shown, judged = self._shown(train, keys[:, _TRAIN]), self._judged(test, silent, keys[:, _TEST])
        windows = self._windows(recorded, shown, judged, keys[:, _ORDER])
        return [
            ExampleSet(
                latent=latent,
                examples=examples,
                maximum=float(found.strongest[at]),
                firing_rate=float(rates[at]),
                frame=self._n_test,
                seed=self._seed,
                strata=self._sizes(silent, at),
                keep_bos=self._config.keep_bos,
                table=self._data.tokens,
            )
            if skip is None
            else skip
            for at, (latent, skip, examples) in enumerate(zip(latents, skips, windows, strict=True))
        ]

    def _skip(self, latent: LatentId, alive: int, train: int, test: int, silent: int) -> Skipped | None:
        """Return why a latent is left out, or None when it has enough of everything."""
        config = self._config
        for reason, have, need in (
            ("dead", alive, 1),
            ("too few firing train windows", train, config.min_train),
            ("too few firing test windows", test, config.min_test),
            ("too few silent test windows", silent, config.min_test),
        ):
            if have < max(need, 1):
                return Skipped(latent=latent, stage="select", reason=reason, have=have, need=max(need, 1))
        return None

    def _sizes(self, silent: Silent, at: int) -> tuple[tuple[str, int], ...]:
        names = [STRATA[stratum] for stratum in self._strata]
        sizes = list(zip(names, silent.sizes[at].tolist(), strict=True))
        unused = int(silent.unused[at])
        return (*sizes, ("unused", unused)) if unused else tuple(sizes)

    def _shown(self, found: Units, keys: Array) -> _Chosen:
        """Draw the train windows."""
        config, tiled = self._config, self._frame
        place = centred(tiled, found.window, found.peak) if config.centred else tiled.places(found.window)
        ranked = rank(found.maximum, found.window, found.offsets, keys)
        if config.strategy == "diverse":
            latent, places = candidates(ranked.sizes)
            compared = self._data.tokens_at(place[ranked.order[ranked.offsets[latent] + places]], config.window)
            far = _farthest(compared, latent, config.n_train)
            drawn = chosen_for_certain(ranked, latent[far], places[far], STRATA.index("diverse"))
        else:
            drawn = draw(ranked, config.n_train, config.strategy)
        return _chosen(found, place, drawn)

    def _judged(self, found: Units, silent: Silent, keys: Array) -> _Chosen:
        """Draw the firing test windows, and put the silent ones beside them."""
        config, tiled = self._config, self._frame
        ranked = rank(found.maximum, found.window, found.offsets, keys)
        drawn = draw(ranked, config.n_test, config.test_strategy, self._homes.document[found.window])
        firing = _chosen(found, tiled.places(found.window), drawn)
        mute = _Chosen(
            latent=silent.latent,
            place=tiled.places(silent.window),
            window=silent.window,
            fires=np.zeros(len(silent.latent), bool),
            stratum=self._strata[silent.kind],
            probability=silent.probability,
            multiplicity=silent.multiplicity,
        )
        return _together(firing, mute)

    def _silent(self, indices: list[int], found: Gathered, keys: Array) -> Silent:
        """Draw the silent test windows."""
        width = len(self._frame)
        touched = found.test.latent * width + found.test.window
        barred = touched if self._config.silent == "window" else self._of_documents(found, touched)
        kinds: list[Array | None] = []
        block = Block(
            indices=np.array(indices, np.int64),
            data=self._data,
            frame=self._frame,
            train=found.train,
            test=found.test,
        )
        for kind in self._kinds:
            if kind == "random":
                kinds.append(None)
                continue
            kinds.append(self._found(kind, block))
        return draw_silent(touched, barred, kinds, self._known["test"], self._config.n_negatives, keys, self._homes)

    def _found(self, kind: Negative, block: Block) -> Array:
        """Return the windows of a kind, as latent * windows + window."""
        offsets, windows = self._proxies[kind].windows(block)
        latent = spread(np.diff(offsets))[0]
        fits = len(offsets) == len(block) + 1 and len(latent) == len(windows)
        codes: Array = latent * len(self._frame) + windows if fits else latent
        if not fits or (np.diff(codes) < 1).any() or (self._frame.split[windows] != CODES["test"]).any():
            raise InputError(
                f"the proxy of {kind} negatives gave windows that are not those of the test split, ascending and "
                f"distinct for each latent; mend its windows method"
            )
        return codes

    def _of_documents(self, found: Gathered, touched: Array) -> Array:
        """Return all test windows of documents in which a latent has any firing, as latent * windows + window."""
        width = len(self._frame)
        windows = self._frame.numbers(CODES["test"])
        documents = self._frame.document[windows]
        order = np.argsort(documents, kind="stable")
        windows, documents = windows[order], documents[order]
        strays = self._data.documents_at(found.stray_place)
        stride = int(max(documents.max(), strays.max(initial=0))) + 1
        within = touched // width * stride + self._frame.document[touched % width]
        pairs = np.unique(np.concatenate([within, found.stray_latent * stride + strays]))
        latent, document = np.divmod(pairs, stride)
        low = np.searchsorted(documents, document)
        which, place = spread(np.searchsorted(documents, document, side="right") - low)
        return np.sort(latent[which] * width + windows[low[which] + place])

    def _windows(self, recorded: Recorded, shown: _Chosen, judged: _Chosen, keys: Array) -> Iterator[Windows]:
        """Yield the windows of each latent: train ones strongest first, then test ones in random order."""
        tiled, span = self._frame, self._frame.n_rows * self._frame.length
        both = _together(shown, judged)
        at = np.repeat(np.arange(len(keys)) * span, np.diff(recorded.offsets))
        at += recorded.places
        values = activations(at, recorded.values, both.latent * span + both.place, tiled.window)
        test = np.arange(len(both.latent)) >= len(shown.latent)
        hashed = mixed(keys[both.latent] ^ both.window.astype(np.uint64))
        strength = (_ALL_BITS - values.max(axis=1).view(np.uint32)) << np.uint64(32) | hashed >> np.uint64(32)
        order = np.lexsort((np.where(test, hashed, strength), both.latent * 2 + test))
        row, start = np.divmod(both.place[order], tiled.length)
        columns = Windows(
            split=np.where(test, CODES["test"], CODES["train"]).astype(np.int8)[order],
            fires=both.fires[order],
            stratum=both.stratum[order].astype(np.int8),
            row=row,
            start=start,
            document=tiled.document[both.window[order]].astype(np.int64),
            probability=both.probability[order],
            multiplicity=both.multiplicity[order],
            tokens=self._data.tokens_at(both.place[order], tiled.window),
            activations=values[order],
        )
        bounds = np.searchsorted(both.latent[order], np.arange(len(keys) + 1)).tolist()
        return (columns[start:stop] for start, stop in pairwise(bounds))


def _chosen(found: Units, places: Array, drawn: Draw) -> _Chosen:
    """Return what was drawn of firing windows that begin at these places."""
    return _Chosen(
        latent=drawn.latent,
        place=places[drawn.chosen],
        window=found.window[drawn.chosen],
        fires=np.ones(len(drawn), bool),
        stratum=drawn.stratum,
        probability=drawn.probability,
        multiplicity=found.multiplicity[drawn.chosen],
    )


def _together(one: _Chosen, other: _Chosen) -> _Chosen:
    columns = (f.name for f in dataclasses.fields(_Chosen))
    return _Chosen(**{name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in columns})


def _farthest(tokens: Array, latent: Array, n: int) -> Array:
    """Return which windows are taken of each latent's, which lie one latent after another."""
    bounds = np.flatnonzero(np.diff(latent, prepend=-1, append=-1)).tolist()
    parts = [start + farthest_first(tokens[start:stop], n) for start, stop in pairwise(bounds)]
    return np.concatenate([np.zeros(0, np.int64), *parts])
