"""The main job, stage by stage: collect → select → explain → score → report. Every stage resumes where it was stopped.

A latent is done with a stage only when its row is committed under the stage's key, which hashes the stage's own
options and the keys it rests on; so a new scorer leaves the store alone, and a change under existing output is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.donors import choose_donors
from exegete.errors import InputError, MismatchError
from exegete.explainers.explainer import Explainer, explainers
from exegete.files import RunLock, hash_json, read_json, write_json, write_text
from exegete.preparing import Prepared, prepare, text_of
from exegete.progress import Progress, Silent
from exegete.runs import FORMAT, Run
from exegete.scorers.scorer import scorers
from exegete.streams import stream
from exegete.types import ExampleSet, Explanation, LatentId, Skipped
from exegete.views import Donor, LatentView

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.llm.client import LLMClient
    from exegete.results import Results
    from exegete.store.corpus import Corpus, TextDocument
    from exegete.subjects import Subject

log = logging.getLogger(__name__)

RANDOM_CODER = "@random-coder"
RANDOM_SUBJECT = "@random-subject"
PAGES = 300  # latent pages per coder in a report; beyond, the best, the worst, and some evenly between
_BLOCK = 256  # latents in memory together; each is committed as soon as it is ready


@final
class Pipeline:
    """One run being made. Use as a context manager: it holds the run's lock."""

    def __init__(self, config: RunConfig, folder: str | Path, progress: Progress | None = None) -> None:
        self.config = config
        self.run = Run(Path(folder))
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
        self._guard(prepared)
        self._check_packing(prepared)
        self._collect_all(prepared, self._corpus(prepared.subject, documents))

    def collect_corpus(self, prepared: Prepared, corpus: Corpus) -> None:
        """Collect over a corpus built elsewhere, which is copied into the run."""
        from exegete.store.corpus import copy_corpus

        self._guard(prepared)
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
        from exegete.coders import random_coder

        return {
            name + RANDOM_CODER: random_coder(prepared.coders[name], self.config.seed, k=k, name=name + RANDOM_CODER)
            for name, k in firing.items()
        }

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
        wanted = self.config.latents
        alive = (store.counts >= max(1.0, wanted.min_rate * store.manifest.n_positions)).nonzero()[0]
        if wanted.indices:
            chosen = wanted.indices
        else:
            order = stream(self.config.seed, coder, "draw").permutation(alive)
            null = "@" in coder and wanted.null_count is not None
            chosen = tuple(int(i) for i in order[: wanted.null_count if null else wanted.count])
        known = {stats.latent.index for stats in results.latents(coder)}
        results.add_latents(store.stats([i for i in chosen if i not in known]))
        results.mark_selected(coder, chosen)
        results.put_meta(
            f"coder {coder}",
            {
                "width": store.width,
                "k": store.manifest.k,
                "alive": len(alive),
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
        explainer = explainers.make(self.config.explainer)
        _require_llm(explainer.needs, llm, f"explainer {self.config.explainer!r}")
        results = self.run.results(readonly=False)
        try:
            self._settle(results)
            for coder in self.run.coders():
                self._explain_coder(coder, explainer, results, llm)
        finally:
            results.close()

    def _explain_coder(self, coder: str, explainer: Explainer, results: Results, llm: LLMClient | None) -> None:
        spec = self._explain_spec(coder, llm)
        key = hash_json(spec)
        results.add_stage(key, "explain", spec)
        indices = self.draw(coder, results)
        done = results.done(key)
        left = [i for i in indices if LatentId(coder=coder, index=i) not in done]
        self._progress.start(f"explain {coder}", len(indices), "latents")
        self._progress.advance(len(indices) - len(left))
        data = self.run.data(coder, self.config) if left else None
        for start in range(0, len(left), _BLOCK):
            views = []
            for chosen in self.run.select(coder, left[start : start + _BLOCK], self.config):
                if isinstance(chosen, Skipped):
                    results.add_skip(chosen, key)
                    self._progress.advance(1)
                else:
                    views.append(self._view(chosen, data, llm))
            for explanation in explainer.explain(views, concurrency=self.config.llm.concurrency):
                results.add_explanation(explanation, key)
                self._progress.advance(1)
        self._progress.end()

    def _view(
        self, examples: ExampleSet, data: Any, llm: LLMClient | None, donors: tuple[Donor, ...] = ()
    ) -> LatentView:
        return LatentView(
            latent=examples.latent, tokens=data.tokens, examples=examples, data=data, donors=donors, llm=llm
        )

    # -- score -------------------------------------------------------------------------------------------------------

    def score(self, llm: LLMClient | None = None) -> None:
        """Score every explanation with every scorer, each beside its null."""
        results = self.run.results(readonly=False)
        try:
            self._settle(results)
            for coder in self.run.coders():
                explanations = results.explanations(coder=coder, key=self.explain_key(coder, llm))
                usable = {id_: e for id_, e in explanations.items() if e.status == "ok"}
                donors = None
                for name in self.config.scorers:
                    scorer = scorers.make(name)
                    _require_llm(scorer.needs, llm, f"scorer {name!r}")
                    spec = self._score_spec(coder, name, llm)
                    key = hash_json(spec)
                    results.add_stage(key, name, spec)
                    done = results.done(key)
                    left = {id_: e for id_, e in usable.items() if e.latent not in done}
                    self._progress.start(f"{name} {coder}", len(usable), "latents")
                    self._progress.advance(len(usable) - len(left))
                    if left and donors is None:
                        donors = choose_donors(
                            self.run.store(coder),
                            list(usable.values()),
                            count=self.config.donors,
                        )
                    self._score_block(results, coder, scorer, key, left, donors or {}, llm)
                    self._progress.end()
        finally:
            results.close()

    def _score_block(
        self,
        results: Results,
        coder: str,
        scorer: Any,
        key: str,
        left: Mapping[int, Explanation],
        donors: Mapping[LatentId, Any],
        llm: LLMClient | None,
    ) -> None:
        ids = {explanation.latent: id_ for id_, explanation in left.items()}
        waiting = list(left.values())
        data = self.run.data(coder, self.config) if waiting else None
        for start in range(0, len(waiting), _BLOCK):
            block = waiting[start : start + _BLOCK]
            chosen = self.run.select(coder, [e.latent.index for e in block], self.config)
            items = []
            for explanation, examples in zip(block, chosen, strict=True):
                if isinstance(examples, ExampleSet):
                    view = self._view(examples, data, llm, donors.get(explanation.latent, ()))
                    items.append((explanation, view))
            for scoring in scorer.score(items, concurrency=self.config.llm.concurrency):
                results.add_scoring(scoring, key, ids[scoring.explanation.latent])
                self._progress.advance(1)

    # -- report ------------------------------------------------------------------------------------------------------

    def report(self) -> Path:
        """Write ``report/index.html`` and return its path."""
        return report(self.run, self.config, self._progress)

    def _title(self) -> str:
        from exegete.demo import assets

        ours = Path(self.config.subject).is_relative_to(assets())
        return "The embedded default: a Python-code model" if ours else self.config.subject

    # -- keys and guards ---------------------------------------------------------------------------------------------

    def select_key(self, coder: str) -> str:
        """Identity of a coder's examples."""
        return hash_json(
            {
                "store": self.run.store(coder).manifest.key,
                "examples": self.config.to_dict()["examples"],
                "seed": self.config.seed,
            }
        )

    def explain_key(self, coder: str, llm: LLMClient | None) -> str:
        """Identity of a coder's explanations."""
        return hash_json(self._explain_spec(coder, llm))

    def _explain_spec(self, coder: str, llm: LLMClient | None) -> dict[str, Any]:
        explainer = explainers.make(self.config.explainer)
        asked = llm if "llm" in explainer.needs else None
        return {
            "coder": coder,
            "select": self.select_key(coder),
            "explainer": dict(explainer.spec),
            "llm": asked.name if asked else "none",
            "temperature": asked.temperature if asked else None,
        }

    def _score_spec(self, coder: str, scorer: str, llm: LLMClient | None) -> dict[str, Any]:
        return {
            "explain": self.explain_key(coder, llm),
            "scorer": dict(scorers.make(scorer).spec),
            "judge": llm.name if llm else "rule",
            "donors": self.config.donors,
        }

    def _settings(self) -> dict[str, Any]:
        """Return the settings that existing output rests on."""
        data = self.config.to_dict()
        under = {
            name: data[name] for name in ("subject", "coder", "hookpoints", "seed", "corpus", "collect", "examples")
        }
        under["collect"] = {
            k: v
            for k, v in under["collect"].items()
            if k in ("dtype", "coder_dtype", "compile", "batch_tokens", "sink_norm")
        }
        return under

    def _guard(self, prepared: Prepared | None = None) -> None:
        """Refuse a change of settings, subject or coders under existing output, with the difference."""
        path = self.run.folder / "manifest.json"
        if not path.is_file() or not self.run.coders():  # nothing rests on the settings yet
            return
        before = read_json(path)
        changed = list(_differences(before.get("settings", {}), self._settings()))
        if prepared is not None and not changed:
            hashes = {name: coder.hash for name, coder in prepared.coders.items()}
            known = {name: old for name, old in before.get("coders", {}).items() if name in hashes}
            now = {"subject": prepared.subject.hash, **{f"coder {name}": hashes[name] for name in known}}
            then = {"subject": before.get("subject", {}).get("hash"), **{f"coder {n}": old for n, old in known.items()}}
            changed = list(_differences(then, now))
        if changed:
            raise MismatchError(
                f"{self.run.folder} was made with other settings ({'; '.join(changed)}); "
                "use another folder, or the settings it was made with"
            )

    def _settle(self, results: Results) -> None:
        self._guard()
        write_text(self.run.folder / "config.yaml", self.config.to_yaml())
        results.put_meta("config", self.config.to_dict())
        results.put_meta("manifest", read_json(self.run.folder / "manifest.json"))
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
                "settings": self._settings(),
                "subject": {"name": prepared.subject.name, "hash": prepared.subject.hash},
                "coders": {name: coder.hash for name, coder in prepared.coders.items()},
                "versions": versions(),
            },
        )


def report(run: Run, config: RunConfig | None = None, progress: Progress | None = None) -> Path:
    """Write the report of a run from its results and stores; needs neither subject nor coders."""
    from exegete.analysis.report import write_report

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


def check_llm(llm: LLMClient | None) -> None:
    """Ask the language model's server whether it is there. Raises before anything is paid for."""
    if llm is not None:
        asyncio.run(llm.check())


def _require_llm(needs: frozenset[str], llm: LLMClient | None, who: str) -> None:
    if "llm" in needs and llm is None:
        raise InputError(f"{who} needs a language model; give one with --llm URL#MODEL")


def _check_folder(folder: Path) -> None:
    """Refuse to write a run into a folder that holds something else."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; a run needs a folder of its own")
    if folder.is_dir():
        ours = {"manifest.json", "config.yaml", "corpus", "store", "results.db", "report", "lock"}
        entries = {p.name for p in folder.iterdir()}
        if entries and not entries & ours:
            raise InputError(f"{folder} holds other files; a run needs a new or empty folder")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterable[str]:
    for name in sorted({*before, *now}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{where}{name}.")
        elif a != b:
            yield f"{where}{name}: {a!r} → {b!r}"


def run_pipeline(
    config: RunConfig,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    llm: LLMClient | None = None,
    documents: Sequence[TextDocument] | None = None,
) -> Run:
    """Run every stage and return the run; whatever is already there is not done again."""
    from exegete.llm.openai_api import client_from_spec

    client = llm or client_from_spec(config.llm.llm, config.llm)
    _require_llm(explainers.make(config.explainer).needs, client, f"explainer {config.explainer!r}")
    for name in config.scorers:
        _require_llm(scorers.make(name).needs, client, f"scorer {name!r}")
    check_llm(client)
    prepared = prepare(config, documents)
    with Pipeline(config, folder, progress) as pipeline:
        pipeline.collect(prepared, documents)
        pipeline.explain(client)
        pipeline.score(client)
        pipeline.report()
        return pipeline.run
