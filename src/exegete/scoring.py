"""The scoring stage: every explanation by every scorer, each beside its nulls.

What a scorer holds an explanation against is chosen among all that are explained, and stored with its scores: the
detail's ``donors`` are the latents whose explanations the null's are, and ``near`` those contrasted. Where more has
been explained since a contrast was scored, the latents whose nearest are still the same keep their scores, under the
new key too, and nothing is asked of a language model again; the others are scored anew, which is said, and what was
paid for stays stored under the old key.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from exegete.config import RunConfig
from exegete.donors import choose_donors, choose_near
from exegete.errors import ConfigError, InputError
from exegete.keys import Keys, held_against_others, key_of
from exegete.llm.client import LLMClient
from exegete.preparing import Loader
from exegete.progress import Progress
from exegete.runs import Run, drawn
from exegete.scorers.scorer import Scorer, Scoring, make_scorer
from exegete.types import Explanation, LatentId, Skipped
from exegete.views import Donor, LatentView, Near, Need

if TYPE_CHECKING:
    from exegete.results import Results

_log = logging.getLogger(__name__)

ANY = 1 << 20  # requests under way at once
BLOCK = 256  # latents in memory together; each is committed as soon as it is ready
BATCHED = 1024  # where requests wait for a day in files, which several latents may share


@final
@dataclass(slots=True)
class _Beside:
    """What the scorers of one coder need beside examples; each part is made when the first scorer needs it."""

    negatives: bool = False
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
                spec = self._keys.score(name, llm, explained, among=[e.latent.index for e in usable.values()])
                key = key_of(spec)
                results.add_stage(key, scorer.label, spec)
                done = results.done(key)
                left = {id_: e for id_, e in usable.items() if e.latent not in done}
                self._progress.start(f"{name} {coder}", len(usable), "latents")
                self._progress.advance(len(usable) - len(left))
                if left:
                    self._ready(coder, scorer, list(usable.values()), beside, llm)
                    left = self._still_left(results, scorer, spec, left, beside)
                    self._score_left(results, coder, scorer, key, left, beside, llm, _of_no_model(spec, results))
                self._progress.end()

    def _still_left(
        self,
        results: Results,
        scorer: Scorer,
        spec: Mapping[str, Any],
        left: Mapping[int, Explanation],
        beside: _Beside,
    ) -> dict[int, Explanation]:
        """Take over what was scored among fewer explained latents and still holds; return what is left to score."""
        olds = held_against_others(spec, results.stages())
        if not olds or beside.near is None:
            return dict(left)
        most = near_of(scorer)
        nearest = {
            id_: [str(near.explanation.latent) for near in beside.near.get(e.latent, ())[:most]]
            for id_, e in left.items()
        }
        kept, changed = results.carry_over(scorer.label, key_of(spec), olds, nearest)
        self._progress.advance(len(kept))
        if changed:
            _log.warning(
                "%s: more is explained now, and %d latents have other nearest ones than when they were scored; they "
                "are scored anew beside their earlier scores, the other %d keep theirs",
                scorer.label,
                len(changed),
                len(kept),
            )
        return {id_: e for id_, e in left.items() if id_ not in kept}

    def _ready(
        self,
        coder: str,
        scorer: Scorer,
        explanations: Sequence[Explanation],
        beside: _Beside,
        llm: LLMClient | None,
    ) -> None:
        """Make what a scorer needs beside examples."""
        store = self._run.store(coder)
        if not beside.negatives:
            self._ready_negatives(coder)
            beside.negatives = True
        if "donors" in scorer.needs and beside.donors is None:
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
        of_no_model: bool,
    ) -> None:
        ids = {explanation.latent: id_ for id_, explanation in left.items()}
        waiting = list(left.values())
        data = self._run.data(coder, self._config)
        size = block_size(llm)
        loaded = {name: part for name, part in beside.loaded.items() if name in scorer.needs}
        donors = beside.donors if beside.donors is not None and "donors" in scorer.needs else {}
        near = beside.near if beside.near is not None and "near" in scorer.needs else {}
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
                    donors=donors.get(latent, ()),
                    near=near.get(latent, ()),
                    llm=llm,
                    **loaded,
                )
                items.append((explanation, view))
            views = {explanation.latent: view for explanation, view in items}
            # A reader of this process fails at what it can never read; a server's calls may be made again.
            final = "reader" in scorer.needs and "llm" not in scorer.needs and loaded["reader"].final
            for scoring in scorer.score(items, concurrency=at_once(llm, self._config)):
                latent = scoring.explanation.latent
                checks = of_no_model or only_checks(scorer, scoring.explanation, views[latent])
                found = with_donors(flagged(scoring, "plumbing") if checks else scoring, scorer, views[latent])
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


def only_checks(scorer: Scorer, explanation: Explanation, view: LatentView) -> bool:
    """Return whether a score shows only that the pipeline works: of what it is, or of what it is held against.

    That is so where who judges is no model of natural language, and where any explanation was made up.
    """
    held = (explanation, *(d.explanation for d in view.donors), *(n.explanation for n in view.near))
    return scorer.plumbing(view) or any(map(made_up, held))


def made_up(explanation: Explanation) -> bool:
    """Return whether an explanation says of itself that a simulated or scripted model gave it."""
    return bool(explanation.detail.get("simulated")) or _names_fake(explanation.detail.get("model"))


def _of_no_model(spec: Mapping[str, Any], results: Results) -> bool:
    """Return whether a simulated model stands for what the explanations judged rest on."""
    return _names_fake(results.stages().get(spec["explain"], ("", {}))[1].get("llm"))


def _names_fake(model: Any) -> bool:
    return str(model or "").startswith(("simulated", "scripted"))


def with_donors(scoring: Scoring, scorer: Scorer, view: LatentView) -> Scoring:
    """Return a scoring whose detail says which latents the null's explanations are of, most like in rate first."""
    if not view.donors or not scoring.scores:
        return scoring
    taken = scorer.spec.get("args", {}).get("donors")  # by those that take fewer than there are
    donors = [d.explanation.latent.index for d in sorted(view.donors, key=lambda donor: donor.rank)][:taken]
    return dataclasses.replace(scoring, detail={**scoring.detail, "donors": donors})


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
