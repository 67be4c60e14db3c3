"""The main job, stage by stage: collect → select → explain → score → report. Every stage resumes where it was stopped.

A latent is done with a stage only when its row is committed under the stage's key, which hashes the stage's own
options and the keys it rests on; so a new scorer leaves the store alone, and a change under existing output is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.errors import InputError
from exegete.explainers.explainer import explainers
from exegete.files import RunLock, read_json, write_json, write_text
from exegete.keys import Keys, key_of, refuse_changes, settings_under
from exegete.llm.client import run_to_end
from exegete.preparing import RANDOM_CODER, RANDOM_SUBJECT, Loader, Prepared, prepare, text_of
from exegete.progress import Progress, Silent
from exegete.runs import FORMAT, Run, alive, drawn, with_random_negatives
from exegete.scorers.scorer import make_scorer
from exegete.scoring import ScoreStage, at_once, block_size, check_scorers, require_llm
from exegete.types import ExampleSet, LatentId, Skipped
from exegete.views import LatentView, Need

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.llm.client import LLMClient
    from exegete.results import Results
    from exegete.store.corpus import Corpus, TextDocument
    from exegete.subjects import Subject

log = logging.getLogger(__name__)

PAGES = 300  # latent pages per coder in a report; beyond, the best, the worst, and some evenly between


@final
class Pipeline:
    """One run being made. Use as a context manager: it holds the run's lock."""

    def __init__(self, config: RunConfig, folder: str | Path, progress: Progress | None = None) -> None:
        self.config = config
        self.run = Run(Path(folder))
        self._keys = Keys(self.run, config)
        self._loader = Loader(config, self.run)
        self._progress = progress or Silent()
        self._lock = RunLock(self.run.folder)

    def __enter__(self) -> Pipeline:
        _check_folder(self.run.folder)
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    # -- collect -----------------------------------------------------------------------------------------------------

    def collect(self, prepared: Prepared, documents: Iterable[TextDocument] | None = None) -> None:
        """Build the corpus and collect the firings of every coder, and of the nulls that were asked for.

        ``documents`` replaces the text named by the configuration. Raises MismatchError when the folder holds output
        of other settings.
        """
        refuse_changes(self.run, self.config, prepared)
        self._loader.use(prepared)
        self._check_packing(prepared)
        self._collect_all(prepared, self._corpus(prepared.subject, documents))

    def collect_corpus(self, prepared: Prepared, corpus: Corpus) -> None:
        """Collect over a corpus built elsewhere, which is copied into the run."""
        from exegete.store.corpus import copy_corpus

        refuse_changes(self.run, self.config, prepared)
        self._check_packing(prepared)
        self._collect_all(prepared, copy_corpus(corpus, self.run.corpus_folder))

    def _check_packing(self, prepared: Prepared) -> None:
        """Refuse a subject that mixes packed documents before the corpus is built and the manifest written."""
        import torch

        if self.config.corpus.packing and self.config.corpus.attend == "document" and prepared.coders:
            point = next(iter(prepared.coders.values())).point
            two = torch.tensor([[0, 0, 1, 1]])  # two documents in one row
            prepared.subject.capture(torch.zeros_like(two), None, [point], two)

    def _collect_all(self, prepared: Prepared, corpus: Corpus) -> None:
        self._write_manifest(prepared)
        wanted = "random_coder" in self.config.nulls
        fixed = {name: coder.k for name, coder in prepared.coders.items() if coder.k is not None}
        random = self._random(prepared, fixed) if wanted else {}
        self._collect(prepared.subject, {**prepared.coders, **random}, corpus)
        if wanted and len(fixed) < len(prepared.coders):  # how many fire is known only now
            firing = {name: self._firing(name) for name in prepared.coders if name not in fixed}
            self._collect(prepared.subject, self._random(prepared, firing), corpus)
        if "random_subject" in self.config.nulls:
            from exegete.subjects import randomised

            nulls = {name + RANDOM_SUBJECT: coder for name, coder in prepared.coders.items()}
            self._collect(randomised(prepared.subject, self.config.seed), nulls, corpus)

    def _firing(self, name: str) -> int:
        """Return how many latents of a collected coder fire at a position, rounded, at least 1."""
        manifest = self.run.store(name).manifest
        return max(1, round(manifest.n_firings / max(manifest.n_positions, 1)))

    def _random(self, prepared: Prepared, firing: Mapping[str, int]) -> dict[str, SparseCoder]:
        """Return a random coder for each of the named ones, with as many latents firing."""
        names = {name: name + RANDOM_CODER for name in firing}
        return {null: self._loader.random(null, prepared.coders[name], firing[name]) for name, null in names.items()}

    def _corpus(self, subject: Subject, documents: Iterable[TextDocument] | None) -> Corpus:
        from exegete.store.corpus import build_corpus

        return build_corpus(
            self.run.corpus_folder,
            text_of(self.config) if documents is None else documents,
            subject.tokenizer,
            self.config.corpus,
            table=subject.token_table(),
        )

    def _collect(self, subject: Subject, coders: Mapping[str, SparseCoder], corpus: Corpus) -> None:
        from exegete.collecting import collect_firings

        stage = f"collect {', '.join(coders)}"
        done = 0

        def report(rows: int, total: int) -> None:
            nonlocal done
            if done == 0:
                self._progress.start(stage, total * corpus.row_length, "tokens")
            self._progress.advance((rows - done) * corpus.row_length)
            done = rows

        try:
            settings = dataclasses.replace(self.config.collect, batch_tokens=self._batch_tokens())
            collect_firings(subject, coders, corpus, self.run.store_folder, settings, progress=report)
        finally:
            self._progress.end()

    def _batch_tokens(self) -> int | None:
        """Return the batch size of the run: as told, or that of its stores, so that nulls share one plan."""
        wanted = self.config.collect.batch_tokens
        plans = [self.run.store(name).manifest.batch_plan for name in self.run.coders()]
        return wanted if wanted is not None or not plans else plans[0]["rows"] * plans[0]["row_length"]

    # -- select and explain ------------------------------------------------------------------------------------------

    def draw(self, coder: str, results: Results) -> tuple[int, ...]:
        """Return the latents to interpret: a seeded uniform draw from all alive ones, the same however often asked."""
        store = self.run.store(coder)
        chosen = drawn(store, coder, self.config)
        known = {stats.latent.index for stats in results.latents(coder)}
        results.add_latents(store.stats([i for i in chosen if i not in known]))
        results.mark_selected(coder, chosen)
        results.put_meta(
            f"coder {coder}",
            {
                "width": store.width,
                "k": store.manifest.k,
                "alive": len(alive(store, self.config)),
                "dead": int((store.counts == 0).sum()),
                "firings": int(store.counts.sum()),
                "positions": store.manifest.n_positions,
                "quality": dict(store.manifest.quality),
                "warnings": list(store.manifest.warnings),
                "excluded": len(store.excluded),
                "subject": store.manifest.subject,
            },
        )
        return chosen

    def explain(self, llm: LLMClient | None = None) -> None:
        """Explain the drawn latents of every coder; what cannot be explained becomes a Skipped row."""
        require_llm(explainers.from_text(self.config.explainer).needs, llm, f"explainer {self.config.explainer!r}")
        results = self.run.results(readonly=False)
        try:
            self._settle(results)
            for coder in self.run.coders():
                self._explain_coder(coder, self.config.explainer, results, llm)
        finally:
            results.close()

    def _explain_coder(self, coder: str, name: str, results: Results, llm: LLMClient | None) -> None:
        explainer = explainers.from_text(name)
        spec = self._keys.explain(coder, llm, name)
        key = key_of(spec)
        results.add_stage(key, "explain", spec)
        indices = self.draw(coder, results)
        done = results.done(key, failed=False)  # a call that failed is made again
        left = [i for i in indices if LatentId(coder=coder, index=i) not in done]
        self._progress.start(f"explain {coder}", len(indices), "latents")
        self._progress.advance(len(indices) - len(left))
        data = self.run.data(coder, self.config) if left else None
        # Explainers see train windows only, which are the same whatever is judged.
        shown = with_random_negatives(self.config)
        block = block_size(llm if "llm" in explainer.needs else None)
        for start in range(0, len(left), block):
            views = []
            for chosen in self.run.select(coder, left[start : start + block], shown):
                if isinstance(chosen, Skipped):
                    results.add_skip(chosen, key)
                    self._progress.advance(1)
                else:
                    views.append(self._view(chosen, data, llm))
            for explanation in explainer.explain(views, concurrency=at_once(llm, self.config)):
                results.add_explanation(explanation, key)
                self._progress.advance(1)
        self._progress.end()

    def _view(self, examples: ExampleSet, data: Any, llm: LLMClient | None) -> LatentView:
        return LatentView(latent=examples.latent, tokens=data.tokens, examples=examples, data=data, llm=llm)

    # -- score -------------------------------------------------------------------------------------------------------

    def score(self, llm: LLMClient | None = None) -> None:
        """Score every explanation with every scorer, each beside its nulls."""
        check_scorers(self.config)  # before these settings become the run's
        results = self.run.results(readonly=False)

        def explain_rules(coder: str) -> None:
            self._explain_coder(coder, "rule", results, None)

        try:
            self._settle(results)
            ScoreStage(self.run, self.config, self._loader, self._progress, explain_rules).score(results, llm)
        finally:
            results.close()

    # -- report ------------------------------------------------------------------------------------------------------

    def report(self) -> Path:
        """Write ``report/index.html`` and return its path."""
        return report(self.run, self.config, self._progress)

    def _title(self) -> str:
        from exegete.demo import title

        return title(self.config.subject) or self.config.subject

    # -- the run's own files -----------------------------------------------------------------------------------------

    def _settle(self, results: Results) -> None:
        refuse_changes(self.run, self.config)
        for coder in self.run.coders():
            known = self.run.store(coder).manifest
            if not known.complete:
                raise InputError(
                    f"the firings of {coder} are not all collected ({known.row_stop:,} rows so far); finish with "
                    "exegete collect or run"
                )
        write_text(self.run.folder / "config.yaml", self.config.to_yaml())
        manifest = {**read_json(self.run.folder / "manifest.json"), "settings": settings_under(self.config)}
        write_json(self.run.folder / "manifest.json", manifest)
        results.put_meta("config", self.config.to_dict())
        results.put_meta("manifest", manifest)
        results.put_meta("title", self._title())
        corpus = self.run.corpus
        results.put_meta(
            "corpus",
            {
                "source": ", ".join(corpus.config.text),
                "documents": corpus.manifest.n_documents,
                "rows": corpus.n_rows,
                "tokens": corpus.n_tokens,
            },
        )

    def _write_manifest(self, prepared: Prepared) -> None:
        write_text(self.run.folder / "config.yaml", self.config.to_yaml())
        write_json(
            self.run.folder / "manifest.json",
            {
                "format": FORMAT,
                "settings": settings_under(self.config),
                "subject": {"name": prepared.subject.name, "hash": prepared.subject.hash},
                "coders": {name: coder.hash for name, coder in prepared.coders.items()},
                "versions": versions(),
            },
        )


def report(run: Run, config: RunConfig | None = None, progress: Progress | None = None) -> Path:
    """Write the report of a run from its results and stores; needs neither subject nor coders."""
    from exegete.analysis.report import write_report

    if (run.folder / "results.db").is_file():
        run.results(readonly=False).close()  # those of an older exegete are brought to today's format
    results = run.results()
    shown = progress or Silent()
    find = run.examples_of(config)

    def examples_of(latent: LatentId) -> ExampleSet | None:
        shown.advance(1)
        return find(latent)

    try:
        explained = [len(results.explanations(coder)) for coder in results.coders()]
        shown.start("report", sum(min(n, PAGES) for n in explained), "latents")
        return write_report(results, run.corpus.table, examples_of, run.folder / "report", max_latent_pages=PAGES)
    finally:
        shown.end()
        results.close()


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    names = ("exegete", "torch", "numpy", "scipy", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_llm(llm: LLMClient | None, users: Mapping[str, frozenset[Need]] = MappingProxyType({})) -> None:
    """Ask the language model's server whether it is there, and can do what its users need.

    ``users`` names who asks it, each with its needs. Raises before anything of the run is paid for.
    """
    if llm is None:
        return

    async def ask() -> None:
        try:
            await llm.check()
            for need, what in (("logprobs", "tokens"), ("prompt_logprobs", "a prompt's tokens")):
                asking = next((who for who, needs in users.items() if need in needs), None)
                if asking is not None and not getattr(await llm.capabilities(), need):
                    raise InputError(
                        f"{asking} needs the log probabilities of {what}, and {llm.name} gives none; take another "
                        "language model, or leave out what asks for them"
                    )
        finally:
            await llm.close()

    run_to_end(ask)


def users_of_llm(config: RunConfig, *, explaining: bool = True, scoring: bool = True) -> dict[str, frozenset[Need]]:
    """Return which explainer and scorers of a configuration there are, and what each needs."""
    users: dict[str, frozenset[Need]] = {}
    if explaining:
        users[f"explainer {config.explainer!r}"] = explainers.from_text(config.explainer).needs
    if scoring:
        users |= {f"scorer {name!r}": make_scorer(name, config).needs for name in config.scorers}
    return users


def _check_folder(folder: Path) -> None:
    """Refuse to write a run into a folder that holds something else."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; a run needs a folder of its own")
    if folder.is_dir():
        ours = {"manifest.json", "config.yaml", "corpus", "store", "results.db", "report", "lock", "ledger.db"}
        entries = {p.name for p in folder.iterdir()}
        if entries and not entries & ours:
            raise InputError(f"{folder} holds other files; a run needs a new or empty folder")


def run_pipeline(
    config: RunConfig,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    llm: LLMClient | None = None,
    documents: Sequence[TextDocument] | None = None,
) -> Run:
    """Run every stage and return the run; whatever is already there is not done again."""
    _check_folder(Path(folder))
    with language_model(config, folder, llm) as client:
        check_scorers(config)
        users = users_of_llm(config)
        for who, needs in users.items():
            require_llm(needs, client, who)
        check_llm(client, users)
        prepared = prepare(config, documents)
        with Pipeline(config, folder, progress) as pipeline:
            pipeline.collect(prepared, documents)
            pipeline.explain(client)
            pipeline.score(client)
            pipeline.report()
            return pipeline.run


@contextlib.contextmanager
def language_model(config: RunConfig, folder: str | Path, llm: LLMClient | None = None) -> Iterator[LLMClient | None]:
    """Yield the language model of a configuration, with the ledger of a run; None where there is none.

    One that is given as ``llm`` is the caller's to end.
    """
    from exegete.llm.open import client_from_spec

    client = llm or client_from_spec(config.llm.llm, config.llm, folder=Path(folder))
    try:
        yield client
    finally:
        if client is not None and llm is None:
            client.end()
