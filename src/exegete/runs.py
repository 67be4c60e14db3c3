"""A run folder opened: its configuration, corpus, stores and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.config import ExampleConfig, Negative, RunConfig
from exegete.errors import InputError, NotFoundError, unknown
from exegete.files import hash_json, read_json
from exegete.streams import stream
from exegete.types import Array, ExampleSet, LatentId, Skipped
from exegete.views import Donor, LatentView, Near

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.examples import StoreData
    from exegete.examples.proxy import Proxy
    from exegete.llm.client import LLMClient
    from exegete.llm.reader import Reader
    from exegete.results import Results
    from exegete.store.corpus import Corpus
    from exegete.store.store import Store
    from exegete.subjects import Subject

FORMAT = 1


@final
class Run:
    """One run folder. Opening it reads nothing but its manifest; parts are opened when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data: dict[tuple[str, int, float, float], StoreData] = {}
        self._proxies: dict[tuple[str, ...], dict[Negative, Proxy]] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def corpus_folder(self) -> Path:
        """Where the token rows lie."""
        return self.folder / "corpus"

    @property
    def store_folder(self) -> Path:
        """Where the stores lie, one folder per coder."""
        return self.folder / "store"

    @property
    def report_path(self) -> Path:
        """The report's first page."""
        return self.folder / "report" / "index.html"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run was made with: configuration, hashes, package versions."""
        return dict(read_json(self.folder / "manifest.json"))

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the latest command on this run."""
        return RunConfig.from_yaml(self.folder / "config.yaml")

    @cached_property
    def corpus(self) -> Corpus:
        """The token rows."""
        from exegete.store.corpus import open_corpus

        return open_corpus(self.corpus_folder)

    def coders(self) -> tuple[str, ...]:
        """Return the names of the coders collected, nulls last."""
        found = [p.parent.name for p in self.store_folder.glob("*/manifest.json")]
        return tuple(sorted(found, key=lambda name: ("@" in name, name)))

    def store(self, coder: str) -> Store:
        """Open the store of a coder. Raises NotFoundError naming the coders there are."""
        from exegete.store.store import Store

        if coder not in self.coders():
            raise unknown("coder", coder, self.coders())
        return Store.open(self.store_folder / coder)

    def results(self, *, readonly: bool = True) -> Results:
        """Open the results database."""
        from exegete.results import Results

        return Results.open(self.folder / "results.db", readonly=readonly)

    def table(self, name: str) -> dict[str, Any]:
        """Return a table of the results as columns, ready for pandas or polars."""
        results = self.results()
        try:
            return results.table(name)
        finally:
            results.close()

    def data(self, coder: str, config: RunConfig | None = None) -> StoreData:
        """Return rows and firings of a coder by split. Kept, so that all latents of the coder share them."""
        from exegete.examples import StoreData, split_segments

        settings = config or self.config
        examples = settings.examples
        key = (coder, settings.seed, examples.test_share, examples.duplicates)
        if key not in self._data:
            store = self.store(coder)
            split = split_segments(
                store.corpus, seed=settings.seed, test_share=examples.test_share, duplicates=examples.duplicates
            )
            self._data[key] = StoreData(store, split)
        return self._data[key]

    def select(self, coder: str, indices: Sequence[int], config: RunConfig | None = None) -> list[ExampleSet | Skipped]:
        """Return the examples of each latent, or why it has none."""
        from exegete.examples import select_many

        settings = config or self.config
        return select_many(
            self.data(coder, settings),
            indices,
            config=settings.examples,
            coder=coder,
            seed=settings.seed,
            proxies=self._hard(coder, indices, settings),
        )

    def preview(
        self, coder: str, indices: Sequence[int], config: RunConfig | None = None
    ) -> list[ExampleSet | Skipped]:
        """Return what ``select`` does; random silent windows while what hard ones are made from is not there yet."""
        settings = config or self.config
        try:
            return self.select(coder, indices, settings)
        except InputError:  # any other that is wrong is so of random ones too
            return self.select(coder, indices, with_random_negatives(settings))

    def _hard(self, coder: str, indices: Sequence[int], settings: RunConfig) -> Mapping[Negative, Proxy]:
        """Return what finds the kinds of hard negatives; made once for all latents that a run interprets."""
        from exegete.hard_negatives import proxies_of, rules_in

        if settings.examples.negatives == ("random",):
            return {}
        store = self.store(coder)
        wanted = drawn(store, coder, settings)
        latents = wanted if set(indices) <= set(wanted) else tuple(dict.fromkeys(map(int, indices)))
        key = (coder, settings.hash, hash_json(latents))
        if key not in self._proxies:
            rules = None
            if "near_miss" in settings.examples.negatives and (self.folder / "results.db").is_file():
                results = self.results()
                try:
                    rules = rules_in(results, coder)
                finally:
                    results.close()
            made = proxies_of(store, settings, latents, rules=rules, embeddings=self.corpus_folder / "embeddings")
            self._proxies = {key: made}  # those of one coder at a time: an index of text is large
        return self._proxies[key]

    def latent(
        self,
        coder: str,
        index: int,
        *,
        llm: LLMClient | None = None,
        donors: tuple[Donor, ...] = (),
        near: tuple[Near, ...] = (),
        reader: Reader | None = None,
        subject: Subject | None = None,
        weights: SparseCoder | None = None,
    ) -> LatentView:
        """Return one latent as explainers and scorers see it. Raises InputError when it has too few examples.

        What is given beside stands in the view as it is; ``weights`` is the coder itself, loaded.
        """
        data = self.data(coder)
        chosen = self.select(coder, [index])[0]
        if isinstance(chosen, Skipped):
            raise InputError(
                f"latent {coder}/{index} cannot be interpreted: {chosen.reason} (has {chosen.have}, needs "
                f"{chosen.need})"
            )
        return LatentView(
            latent=LatentId(coder=coder, index=index),
            tokens=data.tokens,
            examples=chosen,
            data=data,
            donors=donors,
            near=near,
            llm=llm,
            reader=reader,
            subject=subject,
            coder=weights,
        )

    def examples_of(self, config: RunConfig | None = None) -> Callable[[LatentId], ExampleSet | None]:
        """Return a function from a latent to its examples (None when it was skipped), for the report."""

        def find(latent: LatentId) -> ExampleSet | None:
            chosen = self.preview(latent.coder, [latent.index], config)[0]
            return None if isinstance(chosen, Skipped) else chosen

        return find


def with_random_negatives(config: RunConfig) -> RunConfig:
    """Return the settings with random silent windows; the train windows stay the same."""
    return dataclasses.replace(config, examples=dataclasses.replace(config.examples, negatives=("random",)))


def drawn(store: Store, coder: str, config: RunConfig) -> tuple[int, ...]:
    """Return the latents of a coder to interpret: those named, or a seeded uniform draw from all alive ones."""
    if config.latents.indices:
        return config.latents.indices
    order = stream(config.seed, coder, "draw").permutation(alive(store, config))
    null = "@" in coder and config.latents.null_count is not None
    return tuple(int(i) for i in order[: config.latents.null_count if null else config.latents.count])


def alive(store: Store, config: RunConfig) -> Array:
    """Return the latents that fire often enough to be interpreted, ascending."""
    found: Array = (store.counts >= max(1.0, config.latents.min_rate * store.manifest.n_positions)).nonzero()[0]
    return found


def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises NotFoundError when there is none, InputError when it is of a newer format."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise NotFoundError(f"{folder} is not a run folder (it has no manifest.json); make one with: exegete run")
    run = Run(folder)
    if int(run.manifest.get("format", 0)) > FORMAT:
        raise InputError(f"{folder} was written by a newer exegete (format {run.manifest['format']}); upgrade exegete")
    return run


def example_config(**changes: Any) -> ExampleConfig:
    """Return the example settings with some changed, names checked."""
    known = {f.name for f in dataclasses.fields(ExampleConfig)}
    for name in changes:
        if name not in known:
            raise unknown("example setting", name, known)
    return dataclasses.replace(ExampleConfig(), **changes)
