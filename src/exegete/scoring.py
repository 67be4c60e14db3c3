"""The scoring stage: every explanation by every scorer, each beside its nulls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.donors import choose_donors, choose_near
from exegete.errors import ConfigError, InputError
from exegete.files import hash_json
from exegete.keys import Keys
from exegete.llm.client import LLMClient
from exegete.preparing import Loader
from exegete.progress import Progress
from exegete.runs import Run, drawn
from exegete.scorers.scorer import Scorer, Scoring, make_scorer
from exegete.types import Explanation, LatentId, Skipped
from exegete.views import Donor, LatentView, Near, Need

if TYPE_CHECKING:
    from exegete.results import Results

ANY = 1 << 20  # requests under way at once
BLOCK = 256  # latents in memory together; each is committed as soon as it is ready
BATCHED = 1024  # where requests wait for a day in files, which several latents may share


@final
@dataclass(slots=True)
class _Beside:
    """What the scorers of one coder need beside examples; each part is made when the first scorer needs it."""

    donors: Mapping[LatentId, tuple[Donor, ...]] | None = None
    near: Mapping[LatentId, tuple[Near, ...]] | None = None
    loaded: dict[str, Any] = field(default_factory=dict)


@final
class ScoreStage:
    """Scores the explanations of a run. ``explain_rules`` makes the rules of a coder, for near misses of them."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        loader: Loader,
        progress: Progress,
        explain_rules: Callable[[str], None],
    ) -> None:
        self._run, self._config, self._loader, self._progress = run, config, loader, progress
        self._explain_rules = explain_rules
        self._keys = Keys(run, config)
        self._near = 0  # how many near latents the scorer that takes most of them wants

    def score(self, results: Results, llm: LLMClient | None) -> None:
        """Score what is explained and not yet scored. Raises InputError when a scorer lacks something."""
        made = check_scorers(self._config)
        for name, scorer in made.items():
            require_llm(scorer.needs, llm, f"scorer {name!r}")
        self._near = max(map(near_of, made.values()), default=0)
        for coder in self._run.coders():
            explained = self._keys.explained(coder, llm, results)
            explanations = results.explanations(coder=coder, key=explained)
            usable = {id_: e for id_, e in explanations.items() if e.status == "ok"}
            beside = _Beside()
            for name, scorer in made.items():
                spec = self._keys.score(name, llm, explained)
                key = hash_json(spec)
                results.add_stage(key, scorer.label, spec)
                done = results.done(key)
                left = {id_: e for id_, e in usable.items() if e.latent not in done}
                self._progress.start(f"{name} {coder}", len(usable), "latents")
                self._progress.advance(len(usable) - len(left))
                if left:
                    self._ready(coder, results, scorer, list(usable.values()), beside, llm)
                    self._score_left(results, coder, scorer, key, left, beside, llm, self._of_no_model(spec, results))
                self._progress.end()

    def _of_no_model(self, spec: Mapping[str, Any], results: Results) -> bool:
        """Return whether the explanations judged were made up by a simulated model."""
        made_by = results.stages().get(spec["explain"], ("", {}))[1]
        return str(made_by.get("llm", "")).startswith(("simulated", "scripted"))

    def _ready(
        self,
        coder: str,
        results: Results,
        scorer: Scorer,
        explanations: Sequence[Explanation],
        beside: _Beside,
        llm: LLMClient | None,
    ) -> None:
        """Make what a scorer needs beside examples."""
        store = self._run.store(coder)
        if beside.donors is None:
            self._ready_negatives(coder)
            beside.donors = choose_donors(store, explanations, count=self._config.donors)
        if "near" in scorer.needs and beside.near is None:
            beside.near = choose_near(store, explanations, count=self._near)
        for need, load in (
            ("subject", lambda: self._loader.subject(coder)),
            ("coder", lambda: self._loader.coder(coder)),
            ("reader", lambda: self._loader.reader(llm)),
        ):
            if need in scorer.needs and need not in beside.loaded:
                beside.loaded[need] = load()

    def _ready_negatives(self, coder: str) -> None:
        """Find and keep what the configured kinds of silent windows are made from."""
        from exegete.hard_negatives import find_neighbours

        store = self._run.store(coder)
        find_neighbours(store, self._config, drawn(store, coder, self._config), lambda: self._loader.coder(coder))
        if "near_miss" in self._config.examples.negatives:
            self._explain_rules(coder)

    def _score_left(
        self,
        results: Results,
        coder: str,
        scorer: Scorer,
        key: str,
        left: Mapping[int, Explanation],
        beside: _Beside,
        llm: LLMClient | None,
        made_up: bool,
    ) -> None:
        ids = {explanation.latent: id_ for id_, explanation in left.items()}
        waiting = list(left.values())
        data = self._run.data(coder, self._config)
        size = block_size(llm)
        loaded = {name: part for name, part in beside.loaded.items() if name in scorer.needs}
        for start in range(0, len(waiting), size):
            block = waiting[start : start + size]
            chosen = self._run.select(coder, [e.latent.index for e in block], self._config)
            items: list[tuple[Explanation, LatentView]] = []
            for explanation, examples in zip(block, chosen, strict=True):
                if isinstance(examples, Skipped):  # of the kinds asked for there may be fewer windows than of all
                    results.add_skip(examples, key)
                    self._progress.advance(1)
                    continue
                latent = explanation.latent
                view = LatentView(
                    latent=latent,
                    tokens=data.tokens,
                    examples=examples,
                    data=data,
                    donors=(beside.donors or {}).get(latent, ()),
                    near=(beside.near or {}).get(latent, ()),
                    llm=llm,
                    **loaded,
                )
                items.append((explanation, view))
            plumbing = made_up or any(scorer.plumbing(view) for _, view in items[:1])
            # A reader of this process fails at what it can never read; a server's calls may be made again.
            final = "reader" in scorer.needs and "llm" not in scorer.needs and loaded["reader"].final
            for scoring in scorer.score(items, concurrency=at_once(llm, self._config)):
                found = flagged(scoring, "plumbing") if plumbing else scoring
                latent = scoring.explanation.latent
                if scoring.reason and not scoring.scores:
                    results.add_skip(
                        Skipped(latent=latent, stage=scorer.label, reason=scoring.reason, have=0, need=1), key
                    )
                else:
                    failed = any(j.status == "failed" for given in scoring.judgements.values() for j in given)
                    results.add_scoring(found, key, ids[latent], scorer=scorer.label, final=final or not failed)
                self._progress.advance(1)


def check_scorers(config: RunConfig) -> dict[str, Scorer]:
    """Return the scorers that a configuration names. Raises InputError for what is wrong, before any work starts.

    Scorers that store their scores under one name have one set of arguments: a report could show only one of them.
    """
    from exegete.llm.reading import check_reader

    made = {name: make_scorer(name, config) for name in config.scorers}
    labels: dict[str, str] = {}
    for name, scorer in made.items():
        other = labels.setdefault(scorer.label, name)
        if made[other].spec != scorer.spec:
            raise ConfigError(
                f"scorers {other!r} and {name!r} both store their scores as {scorer.label!r}; score with one of them"
            )
        if "reader" in scorer.needs:
            check_reader(config.scoring.reader)
        scorer.check()
    return made


def near_of(scorer: Scorer) -> int:
    """Return how many of the nearest latents a scorer takes."""
    return int(scorer.spec.get("args", {}).get("near", 0)) if "near" in scorer.needs else 0


def flagged(scoring: Scoring, flag: str) -> Scoring:
    """Return a scoring whose scores all carry a flag."""
    scores = tuple(dataclasses.replace(s, flags=tuple(sorted({*s.flags, flag}))) for s in scoring.scores)
    return dataclasses.replace(scoring, scores=scores)


def at_once(llm: LLMClient | None, config: RunConfig) -> int:
    """Return how many requests may be under way: all of a block where a client takes any number."""
    return ANY if llm is not None and llm.unlimited else config.llm.concurrency


def block_size(llm: LLMClient | None) -> int:
    """Return how many latents are worked on together."""
    return BATCHED if llm is not None and llm.unlimited else BLOCK


def require_llm(needs: frozenset[Need], llm: LLMClient | None, who: str) -> None:
    """Raise InputError where a language model is needed and none is there."""
    if "llm" in needs and llm is None:
        raise InputError(f"{who} needs a language model; give one with --llm URL#MODEL")
