"""The Python face of the pipeline: the calls of the design's section 6b, with the command line's names and defaults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exegete.config import CollectConfig, CorpusConfig, ExampleConfig, LLMConfig, RunConfig, merge
from exegete.errors import InputError, unknown
from exegete.explainers.explainer import explainers
from exegete.pipeline import Pipeline, check_llm, run_pipeline
from exegete.preparing import Prepared
from exegete.runs import Run, example_config
from exegete.scorers.scorer import scorers
from exegete.scoring import flagged, only_checks
from exegete.types import ExampleSet, Explanation, Score, Skipped
from exegete.views import Donor, LatentView, Near

if TYPE_CHECKING:
    from exegete.analysis.shapes import Certified, Stopped
    from exegete.coders.coder import SparseCoder
    from exegete.llm.client import LLMClient
    from exegete.llm.reader import Reader
    from exegete.planning import Plan
    from exegete.scorers.simulation_records import SimulationResults
    from exegete.store.corpus import Corpus
    from exegete.store.store import Store
    from exegete.subjects import Subject


def run(
    config: str | Path | RunConfig,
    *,
    out: str | Path | None = None,
    llm: str | Mapping[str, Any] | LLMClient | None = None,
    **changes: Any,
) -> Run:
    """Run every stage of a configuration (a YAML path or a RunConfig) and return the run.

    ``out`` is the run folder, by default the YAML file's name without its ending, beside it. ``changes`` are settings
    laid over the configuration, nested as in the YAML; ``llm`` is such a group of settings too, or a language model by
    name, or a client. Raises InputError before any work starts when something is missing or does not fit.
    """
    if isinstance(llm, str | Mapping):
        changes, llm = {**changes, "llm": {"llm": llm} if isinstance(llm, str) else dict(llm)}, None
    if isinstance(config, RunConfig):
        if out is None:
            raise InputError("a run needs a folder; give one with out=…")
        return run_pipeline(RunConfig.from_dict(merge(config.to_dict(), changes)), out, llm=llm)
    path = Path(config)
    return run_pipeline(RunConfig.from_yaml(path, changes), out or path.with_suffix(""), llm=llm)


def load_corpus(
    text: str | Sequence[str], *, tokenizer: Any, folder: str | Path | None = None, **settings: Any
) -> Corpus:
    """Tokenize text into rows and return the corpus.

    ``text`` and the ``settings`` (``row_length``, ``max_tokens``, ``column``, ``bos``, ``packing``, ``chat`` …) are
    those of the configuration's ``corpus`` group. Without a ``folder`` the rows lie in a temporary one that goes
    with the returned object. Raises InputError when there is no text.
    """
    from exegete.store.corpus import build_corpus
    from exegete.store.sources import text_documents
    from exegete.subjects.pieces import token_table

    allowed = {f.name for f in dataclasses.fields(CorpusConfig)} - {"text"}
    for name in settings:
        if name not in allowed:
            raise unknown("corpus setting", name, allowed)
    patterns = (text,) if isinstance(text, str) else tuple(text)
    config = CorpusConfig(text=patterns, **settings)
    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="exegete-corpus-"))
    documents = text_documents(patterns, column=config.column)
    corpus = build_corpus(place, documents, tokenizer, config, table=token_table(tokenizer))
    if folder is None:
        weakref.finalize(corpus, shutil.rmtree, place, ignore_errors=True)
    return corpus


def collect(
    subject: Subject,
    coders: Mapping[str, SparseCoder],
    corpus: Corpus,
    *,
    out: str | Path,
    seed: int = 0,
    nulls: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Collect the firings of named coders over a corpus into a run folder and return the run.

    ``settings`` are those of the configuration's ``collect`` group. Raises MismatchError when the folder holds output
    of other settings, or a coder does not fit the subject.
    """
    from exegete.coders import fit_coder

    options = dataclasses.replace(CollectConfig(), **settings)
    fitted = {name: fit_coder(coder, subject, other_model=options.other_model) for name, coder in coders.items()}
    config = RunConfig(
        subject=subject.name,
        coder=tuple(coders),
        nulls=tuple(nulls),
        seed=seed,
        corpus=corpus.config,
        collect=options,
        examples=ExampleConfig(window=min(ExampleConfig().window, corpus.row_length - 1)),
    )
    with Pipeline(config, out) as pipeline:
        pipeline.collect_corpus(Prepared(subject=subject, coders=fitted), corpus)
        return pipeline.run


def select(store: Store, index: int, *, seed: int = 0, **settings: Any) -> ExampleSet | Skipped:
    """Return the examples of one latent, or why it has none. ``settings`` are those of the ``examples`` group.

    Raises InputError for kinds of negatives that rest on more than the store (near_miss, neighbours by direction): they
    are those of a run, ``run.latent(coder, index)``.
    """
    from exegete.examples import StoreData, select_many, split_segments
    from exegete.hard_negatives import proxies_of

    config = example_config(**settings)
    split = split_segments(store.corpus, seed=seed, test_share=config.test_share, duplicates=config.duplicates)
    whole = RunConfig(seed=seed, corpus=store.corpus.config, examples=config)
    proxies = proxies_of(store, whole, [index])
    chosen = select_many(StoreData(store, split), [index], config=config, coder=store.name, seed=seed, proxies=proxies)[
        0
    ]
    return dataclasses.replace(chosen, table=store.corpus.table) if isinstance(chosen, ExampleSet) else chosen


def plan(config: str | Path | RunConfig | Run, **changes: Any) -> Plan:
    """Return what a run will ask of its language model and what that costs; nothing is run or sent.

    ``config`` is a YAML path, a configuration, or a run, whose own latents are then planned for; ``changes`` are
    settings laid over it, nested as in the YAML.
    """
    from exegete.planner import plan as planned

    if isinstance(config, Run):
        return planned(RunConfig.from_dict(merge(config.config.to_dict(), changes)), config)
    if isinstance(config, RunConfig):
        return planned(RunConfig.from_dict(merge(config.to_dict(), changes)))
    return planned(RunConfig.from_yaml(Path(config), changes))


def export_run(run: Run, *, to: str, out: str | Path, coders: Sequence[str] | None = None) -> Path:
    """Write a run in a form that other tools read and return the new folder; ``to`` is ``delphi`` or ``openai``.

    Raises InputError for another form and when the folder exists already.
    """
    from exegete.export import export_run as exported

    return exported(run, to=to, out=Path(out), coders=coders)


def load_simulations(path: str | Path) -> SimulationResults:
    """Read a file of simulations of OpenAI's neuron explainer, or one that ``export_run`` wrote (``openai``).

    The scores in it are computed anew from its predictions and activations, by the explainer's formulas. Raises
    CorruptError when it is none.
    """
    from exegete.scorers.simulation_records import load_results, rescored

    return rescored(load_results(Path(path)))


def certify(
    run: Run,
    coder: str,
    *,
    scorer: str = "detection",
    level: float = 0.7,
    rate: float = 0.05,
    correction: Literal["e-bh", "by", "bh"] = "e-bh",
    worst: bool = False,
) -> Certified:
    """Return the latents of a coder whose balanced accuracy is certified to be above ``level``, strongest first.

    At most a share ``rate`` of them is expected not to be. Raises NotFoundError when the scorer has measured nothing of
    the coder, InputError for values that make no test.
    """
    from exegete.analysis.certify import certify as certified

    results = run.results()
    try:
        return certified(results, coder, scorer=scorer, level=level, rate=rate, correction=correction, worst=worst)
    finally:
        results.close()


def stopped(run: Run, coder: str | None = None, *, scorer: str | None = None) -> tuple[Stopped, ...]:
    """Return what came of the scorers that judged each latent only as much as needed (``certify``, ``stop_when``).

    Of each coder, explaining stage and scorer, or of those named: which latents were decided to lie above or below,
    and the judgements that it took beside those of a fixed number. Empty where every window was judged.
    """
    from exegete.analysis.stopping import stopped as found

    results = run.results()
    try:
        return found(results, coder, scorer=scorer)
    finally:
        results.close()


def explain(
    what: LatentView | ExampleSet,
    *,
    explainer: str = "rule",
    llm: str | LLMClient | None = None,
    **args: Any,
) -> Explanation:
    """Explain one latent, given as a view (``run.latent``) or, for what needs no more, as examples (``select``).

    ``args`` go to the explainer. Raises InputError when the explainer needs something that is not there.
    """
    with _viewed(what, llm) as view:
        (explanation,) = explainers.make(explainer, args).explain([view])
    return explanation


async def explain_async(what: LatentView | ExampleSet, **options: Any) -> Explanation:
    """Do what ``explain`` does without blocking the event loop."""
    return await asyncio.to_thread(explain, what, **options)


def score(
    explanation: Explanation,
    what: LatentView | ExampleSet,
    *,
    scorer: str = "detection",
    metric: str | None = None,
    llm: str | LLMClient | None = None,
    donors: Sequence[Explanation] = (),
    near: Sequence[Explanation] = (),
    subject: Subject | None = None,
    coder: SparseCoder | None = None,
    reader: str | Reader | None = None,
    **args: Any,
) -> Score:
    """Score one explanation and return one of the scorer's metrics, by default its first.

    ``donors`` are explanations of other latents, ``near`` those of the nearest latents, nearest first; ``subject`` and
    ``coder`` are for scorers that run them; ``reader`` gives log probabilities, by name or made (by default ``llm``
    where it gives them, else the subject); ``args`` go to the scorer. A rule explanation is judged by its own program
    when no language model is given. Raises InputError when the scorer needs something that is not there, or has no such
    metric.
    """
    made = scorers.make(scorer, args)
    made.check()
    with _viewed(what, llm) as view:
        beside: dict[str, Any] = {"subject": subject or view.subject, "coder": coder or view.coder}
        if donors:
            beside["donors"] = tuple(Donor(explanation=e, rank=i) for i, e in enumerate(donors))
        if near:
            beside["near"] = tuple(Near(explanation=e, similarity=1.0 / (i + 1)) for i, e in enumerate(near))
        if "reader" in made.needs:
            beside["reader"] = _reader(reader, view, beside["subject"])
        view = dataclasses.replace(view, **beside)
        if made.needs & {"logprobs", "prompt_logprobs"}:
            check_llm(view.llm, {f"scorer {scorer!r}": made.needs})
        found = list(made.score([(explanation, view)]))
        checks = only_checks(made, explanation, view)
        checked = [flagged(scoring, "plumbing") if checks else scoring for scoring in found]
        scores = [s for scoring in checked for s in scoring.scores if s.control == "none"]
    if not scores:
        raise InputError(f"scorer {scorer!r} has nothing to say of this explanation (status {explanation.status!r})")
    named = {s.metric: s for s in scores}
    if metric is None:
        return scores[0]
    if metric not in named:
        raise unknown(f"metric of {scorer}", metric, named)
    return named[metric]


async def score_async(explanation: Explanation, what: LatentView | ExampleSet, **options: Any) -> Score:
    """Do what ``score`` does without blocking the event loop."""
    return await asyncio.to_thread(score, explanation, what, **options)


def _reader(reader: str | Reader | None, view: LatentView, subject: Subject | None) -> Reader:
    from exegete.llm.reading import reader_from_spec

    if reader is None and view.reader is not None:
        return view.reader
    if reader is not None and not isinstance(reader, str):
        return reader
    return reader_from_spec(
        reader or "auto", LLMConfig(), subject=None if subject is None else lambda: subject, llm=view.llm
    )


@contextlib.contextmanager
def _viewed(what: LatentView | ExampleSet, llm: str | LLMClient | None) -> Iterator[LatentView]:
    """Yield the view of a latent with a language model; one that was given by name is ended with the block."""
    from exegete.llm.open import client_from_spec

    made = client_from_spec(llm, LLMConfig(llm=llm)) if isinstance(llm, str) else None
    try:
        yield _view(what, llm if not isinstance(llm, str) else made)
    finally:
        if made is not None:
            made.end()


def _view(what: LatentView | ExampleSet, client: LLMClient | None) -> LatentView:
    if isinstance(what, LatentView):
        return dataclasses.replace(what, llm=client) if client is not None else what
    if what.table is None:
        raise InputError("these examples do not say what their tokens stand for; get them from exegete.select")
    return LatentView(latent=what.latent, tokens=what.table, examples=what, llm=client)
