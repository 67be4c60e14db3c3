"""A run folder opened: its configuration, corpus, stores and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.config import ExampleConfig, RunConfig
from exegete.errors import InputError, NotFoundError, unknown
from exegete.files import read_json
from exegete.types import ExampleSet, LatentId, Skipped
from exegete.views import Donor, LatentView

if TYPE_CHECKING:
    from exegete.examples.build import StoreData
    from exegete.llm.client import LLMClient
    from exegete.results import Results
    from exegete.store.corpus import Corpus
    from exegete.store.store import Store

FORMAT = 1


@final
class Run:
    """One run folder. Opening it reads nothing but its manifest; parts are opened when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data: dict[tuple[str, float], StoreData] = {}

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
        key = (coder, settings.examples.test_share)
        if key not in self._data:
            store = self.store(coder)
            split = split_segments(store.corpus, seed=settings.seed, test_share=settings.examples.test_share)
            self._data[key] = StoreData(store, split)
        return self._data[key]

    def select(self, coder: str, indices: Sequence[int], config: RunConfig | None = None) -> list[ExampleSet | Skipped]:
        """Return the examples of each latent, or why it has none."""
        from exegete.examples import select_many

        settings = config or self.config
        return select_many(
            self.data(coder, settings), indices, config=settings.examples, coder=coder, seed=settings.seed
        )

    def latent(
        self, coder: str, index: int, *, llm: LLMClient | None = None, donors: tuple[Donor, ...] = ()
    ) -> LatentView:
        """Return one latent as explainers and scorers see it. Raises InputError when it has too few examples."""
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
            llm=llm,
        )

    def examples_of(self, config: RunConfig | None = None) -> Callable[[LatentId], ExampleSet | None]:
        """Return a function from a latent to its examples (None when it was skipped), for the report."""

        def find(latent: LatentId) -> ExampleSet | None:
            chosen = self.select(latent.coder, [latent.index], config)[0]
            return None if isinstance(chosen, Skipped) else chosen

        return find


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
