"""What a language model's explanations add to rules, over latents for which both were asked about the same items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from exegete.analysis.across import judge_name, shared
from exegete.analysis.shapes import HEADLINE, CoderSummary, ExplainerSummary, LLMLift, ScorerSummary
from exegete.metrics import Interval, paired_lift
from exegete.results import Results
from exegete.results_columns import ScoreColumn
from exegete.types import Array

EXECUTED: Final = "executed rule"
_WHO: Final = frozenset({"judge", "per_request", "probabilities", "max_tokens", "controls"})
_STOPS: Final = ("certify", "stop_when")
_Stages = Mapping[str, tuple[str, Any]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """Scores of rules: of the items wanted, and the latents [n] that have scores of other items only."""

    column: ScoreColumn
    unlike: Array


def llm_lifts(results: Results, coder: CoderSummary) -> tuple[LLMLift, ...]:
    """Return what each language model's explanations of a coder add to the rules of the same latents.

    Only latents count for which both were asked about the same items: windows drawn alike, marked alike, all of them
    asked about. The others are counted.
    """
    rules = [e for e in coder.explainers if e.executed is not None or e.name == "rule"]
    stages = results.stages()
    found = []
    for explainer in coder.explainers:
        for s in explainer.measured:
            if explainer not in rules and s.metric == HEADLINE and s.judge != EXECUTED:
                lift = _lift(results, stages, coder.name, explainer, s, [rule.key for rule in rules])
                if lift.n or lift.n_unlike:
                    found.append(lift)
    return tuple(found)


def _lift(
    results: Results, stages: _Stages, coder: str, explainer: ExplainerSummary, s: ScorerSummary, rules: list[str]
) -> LLMLift:
    own = results.score_column(coder, s.scorer, s.metric, explainer=explainer.key, plumbing=False)
    wanted = items_of(stages, results.scored_with(coder, s.scorer, explainer.key, plumbing=False))
    by: dict[str, Interval] = {}
    unlike = partial = 0
    for rule in rules:
        for judge, name in (("english", s.judge), ("rule", EXECUTED)):
            beside = _judged_by(results, stages, coder, s, rule, name, wanted)
            unlike = max(unlike, len(np.intersect1d(own.index, beside.unlike)))
            pairs = shared(own, beside.column)
            if len(pairs[0]):
                by[judge] = paired_lift(*pairs).mean
                partial = max(partial, _partial(own, beside.column))
    return LLMLift(
        coder=coder,
        explainer=explainer.name,
        scorer=s.scorer,
        judge=s.judge,
        n=max((i.n for i in by.values()), default=0),
        over_english=by.get("english"),
        over_rule=by.get("rule"),
        n_unlike=unlike,
        n_partial=partial,
    )


def items_of(stages: _Stages, spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what decides which items a scoring stage's options ask about; stages with equal ones ask about the same.

    None where that is not known, or where asking may have stopped before the last of them.
    """
    scorer = spec.get("scorer") or {}
    args = {name: value for name, value in (scorer.get("args") or {}).items() if name not in _WHO}
    explained = stages.get(str(spec.get("explain")), ("", {}))[1]
    known = isinstance(explained, Mapping) and "select" in explained
    if not known or any(args.get(name) is not None for name in _STOPS):
        return None
    args = {name: value for name, value in args.items() if name not in (*_STOPS, "margin")}
    if scorer.get("name") == "fuzzing" and args.get("threshold") is None:
        # Stored before whoever judged was asked about the same marks: a rule was, wherever the latent fires.
        args["threshold"] = 0.0 if judge_name(spec) == EXECUTED else 0.3
    return {"scorer": scorer.get("name"), "select": explained["select"], **args}


def _judged_by(
    results: Results,
    stages: _Stages,
    coder: str,
    s: ScorerSummary,
    explainer: str,
    judge: str,
    wanted: Mapping[str, Any] | None,
) -> _Beside:
    """Return the scores of a stage's explanations by one judge, named as the summary names it."""
    alike, others = {}, set()
    for key, (_, spec) in stages.items():
        if not isinstance(spec, Mapping) or spec.get("explain") != explainer or judge_name(spec) != judge:
            continue
        like = wanted is not None and items_of(stages, spec) == wanted
        for score in results.scores(coder=coder, scorer=s.scorer, metric=s.metric, control="none", key=key):
            if not score.plumbing and like:
                alike[score.latent.index] = score
            elif not score.plumbing:
                others.add(score.latent.index)
    index = np.array(sorted(alike), np.int64)
    scores = [alike[i] for i in index.tolist()]
    values = np.array([score.value for score in scores], np.float64)
    return _Beside(
        column=ScoreColumn(
            index=index,
            value=values,
            low=values,
            high=values,
            n_total=np.array([score.n_total for score in scores], np.int64),
            n_failed=np.array([score.n_failed for score in scores], np.int64),
        ),
        unlike=np.array(sorted(others - set(alike)), np.int64),
    )


def _partial(left: ScoreColumn, right: ScoreColumn) -> int:
    """Return for how many latents with both scores one of them lacks answers."""
    _, here, there = np.intersect1d(left.index, right.index, assume_unique=True, return_indices=True)
    known = np.isfinite(left.value[here]) & np.isfinite(right.value[there])
    return int((known & ((left.n_failed[here] > 0) | (right.n_failed[there] > 0))).sum())
