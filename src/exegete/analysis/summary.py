"""The numbers of a run: every score beside its null, the nulls that collect anew beside the trained coder.

All medians and intervals are over latents (each latent counts once, whatever its number of examples); intervals are
95 %. The claim shown is the paired lift, the median over latents of (score − its own null); a lift over shuffled
explanations is the weakest null in the field, so contrasts with a random-init coder and a re-randomised subject come
first.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any, final

import numpy as np
import numpy.typing as npt

from exegete.analysis.across import agreements, collided, judge_name, output_latents, retests
from exegete.analysis.certify import certify
from exegete.analysis.curves import judged_curves
from exegete.analysis.lifts import llm_lifts
from exegete.analysis.shapes import (
    BASELINES,
    EXECUTED,
    EXECUTED_METRICS,
    HEADLINE,
    NULL,
    ROLES,
    SCALES,
    THIRDS,
    CoderSummary,
    Contrast,
    ExecutedSummary,
    ExplainerSummary,
    RunSummary,
    ScorerSummary,
    split_name,
)
from exegete.analysis.stopping import stopped
from exegete.analysis.text import table_text
from exegete.files import canonical_json
from exegete.metrics import difference_of_medians, mean_interval, median_interval, paired_lift, share_of_ties
from exegete.metrics.over_latents import macro_mean
from exegete.results import Results
from exegete.results_columns import ScoreColumn
from exegete.results_rows import plain

__all__ = ["ranking", "summarise", "summary_json", "table_text"]

Floats = npt.NDArray[np.float64]


def summarise(results: Results) -> RunSummary:
    """Return the numbers of a run, read from one state of its database."""
    with results.snapshot():
        latents = _Latents(results)
        names = sorted(results.coders(), key=lambda n: (split_name(n)[0], ROLES.index(split_name(n)[1])))
        coders = tuple(_coder(results, latents, name) for name in names)
        contrasts = tuple(
            contrast
            for coder in coders
            if coder.role != "trained" and coder.base in names
            for contrast in _contrasts(results, latents, coder)
        )
        own = [(c, e) for c in coders if c.role == "trained" for e in c.explainers]
        return RunSummary(
            coders=coders,
            contrasts=contrasts,
            agreements=tuple(a for c, e in own for a in agreements(results, c, e)),
            llm_lifts=tuple(lift for c in coders if c.role == "trained" for lift in llm_lifts(results, c)),
            certified=tuple(
                certify(results, c.name, scorer=s.scorer, explainer=e.key)
                for c, e in own
                for s in e.measured
                if s.metric == HEADLINE and s.curves
            ),
            collisions=tuple(found for c, e in own for found in collided(results, c, e)),
            retests=tuple(retest for c, e in own for retest in retests(results, c, e)),
            stopped=stopped(results),
            output_latents=tuple(latent for c, e in own for latent in output_latents(results, c, e)),
        )


def ranking(results: Results, coder: str, explainer: ExplainerSummary) -> tuple[str, ScoreColumn]:
    """Return what latents are ranked by, best first to worst: executed AUPRC, or else the first scorer's accuracy."""
    if explainer.executed is not None:
        return "executed AUPRC", results.score_column(coder, "execution", "auprc", explainer=explainer.key)
    scorer, metric = "detection", HEADLINE
    if explainer.measured:
        scorer, metric = explainer.measured[0].scorer, explainer.measured[0].metric
    column = results.score_column(coder, scorer, metric, explainer=explainer.key, plumbing=False)
    return f"{scorer} {metric.replace('_', ' ')}", column


@final
class _Latents:
    """Counts of all latents by coder, and which are alive under the run's own threshold."""

    def __init__(self, results: Results) -> None:
        table = results.table("latents")
        coder = np.array(table["coder"], dtype=object)
        config = results.get_meta("config") or {}
        least = float((config.get("latents") or {}).get("min_rate") or 0.0)
        self._rows: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for name in sorted(set(table["coder"])):
            mine = coder == name
            columns = ("idx", "rate", "token_entropy", "selected", "count")
            self._rows[name] = {column: table[column][mine] for column in columns}
            self._rows[name]["alive"] = (self._rows[name]["rate"] >= least) & (self._rows[name]["count"] > 0)

    def count(self, coder: str, what: str | None = None) -> int:
        """Return how many latents of a coder there are, or are ``alive`` or ``selected``."""
        rows = self._rows.get(coder)
        return 0 if rows is None else len(rows["idx"]) if what is None else int(rows[what].sum())

    def entropy(self, coder: str) -> Floats:
        """Return the token entropy of the selected latents, of all alive ones when none is marked as selected."""
        rows = self._rows.get(coder)
        if rows is None:
            return np.zeros(0)
        chosen = rows["selected"] if rows["selected"].any() else rows["alive"]
        return np.asarray(rows["token_entropy"][chosen], dtype=np.float64)

    def rates(self, coder: str, indices: npt.NDArray[np.int64]) -> Floats:
        """Return the firing rate of each latent, NaN when it is not in the table."""
        rows = self._rows.get(coder)
        known = {} if rows is None else dict(zip(rows["idx"].tolist(), rows["rate"].tolist(), strict=True))
        return np.array([known.get(i, np.nan) for i in indices.tolist()], dtype=np.float64)


def _coder(results: Results, latents: _Latents, name: str) -> CoderSummary:
    base, role = split_name(name)
    # Counts over the whole coder; the table of latents may hold only those that were drawn.
    about = results.get_meta(f"coder {name}") or {}
    skips = Counter((s.stage, s.reason) for s in results.skips(name))
    explainers = tuple(_explainer(results, latents, name, key, kind) for key, kind in results.explainers(name))
    explained = {e.latent for e in results.explanations(name).values() if e.status == "ok"}
    return CoderSummary(
        name=name,
        base=base,
        role=role,
        n_latents=int(about.get("width", latents.count(name))),
        n_alive=int(about.get("alive", latents.count(name, "alive"))),
        n_selected=latents.count(name, "selected"),
        n_explained=len(explained),
        skipped=tuple((stage, reason, n) for (stage, reason), n in sorted(skips.items())),
        entropy=median_interval(_finite(latents.entropy(name))),
        fvu=float((about.get("quality") or {}).get("fvu", math.nan)),
        l0=float((about.get("quality") or {}).get("l0", math.nan)),
        warnings=tuple(about.get("warnings") or ()),
        explainers=explainers,
    )


def _explainer(results: Results, latents: _Latents, coder: str, key: str, name: str) -> ExplainerSummary:
    explanations = results.explanations(coder, key=key)
    statuses = Counter(e.status for e in explanations.values())
    kinds = [(scorer, metric) for scorer, metric in results.headlines() if scorer not in EXECUTED]
    scorers = [_scorer(results, latents, coder, key, *kind, plumbing) for plumbing in (False, True) for kind in kinds]
    executed = results.score_column(coder, "execution", "auprc", explainer=key)
    present = executed.index[np.isfinite(executed.value)]
    mass = [results.score_column(coder, "execution", f"mass_decile_{d}", explainer=key) for d in range(10)]
    return ExplainerSummary(
        key=key,
        name=name,
        statuses=tuple(sorted(statuses.items())),
        scorers=tuple(s for s in scorers if s.n + s.n_unscored),
        executed=_executed(results, latents, coder, key, "all", present) if len(present) else None,
        thirds=_thirds(results, latents, coder, key, present),
        mass=tuple(median_interval(_finite(m.value)) for m in mass) if any(len(m) for m in mass) else (),
    )


def _scorer(
    results: Results, latents: _Latents, coder: str, key: str, scorer: str, metric: str, plumbing: bool
) -> ScorerSummary:
    def column(name: str, control: str = "none") -> ScoreColumn:
        return results.score_column(coder, scorer, name, control=control, explainer=key, plumbing=plumbing)

    stored = results.scored()
    controls = [c for s, m, c in stored if (s, m) == (scorer, metric) and c != "none"]
    control = NULL if NULL in controls or not controls else controls[0]
    score, null = column(metric), column(metric, control)
    values, nulls = _finite(score.value), _finite(null.value)
    names = [m for s, m, c in stored if s == scorer and c == "none" and m != metric]
    others = [(name, column(name)) for name in names]
    judged = metric == HEADLINE and len(score) > 0
    within = (SCALES[metric].low, SCALES[metric].high) if metric in SCALES else None
    weights = np.nan_to_num(latents.rates(coder, score.index))
    return ScorerSummary(
        scorer=scorer,
        metric=metric,
        null=control if len(null) else "",
        plumbing=plumbing,
        judge=judge_name(results.scored_with(coder, scorer, key, plumbing=plumbing)),
        n=len(values),
        n_unscored=len(score) - len(values),
        n_failed=int(score.n_failed.sum()),
        n_total=int(score.n_total.sum()),
        few_documents=sum("few_documents" in flags for flags in score.flags),
        median=median_interval(values),
        mean=macro_mean(score.value, within=within),
        weighted=macro_mean(score.value, weights=weights, within=within),
        null_mean=mean_interval(nulls),
        null_median=median_interval(nulls),
        ties=share_of_ties(nulls),
        lift=paired_lift(*_paired(score, null)).median,
        others=tuple((name, median_interval(_identified(found))) for name, found in others if len(found)),
        curves=judged_curves(results, coder, scorer, key, ("none", NULL), plumbing=plumbing) if judged else (),
    )


def _executed(
    results: Results, latents: _Latents, coder: str, key: str, name: str, indices: npt.NDArray[np.int64]
) -> ExecutedSummary:
    rule = results.score_column(coder, "execution", "auprc", explainer=key)
    rates = latents.rates(coder, indices)
    metrics, baselines, lifts = [], [], []
    for metric in EXECUTED_METRICS:
        column = results.score_column(coder, "execution", metric, explainer=key)
        metrics.append((metric, median_interval(_among(column, indices))))
    for metric in BASELINES:
        column = results.score_column(coder, "baseline", metric)
        if len(column):
            ours, theirs = _paired(rule, column, indices)
            baselines.append((metric, median_interval(_among(column, indices))))
            lifts.append((metric, paired_lift(ours, theirs).median))
    known = _finite(rates)
    return ExecutedSummary(
        name=name,
        n=len(indices),
        rates=(float(known.min()), float(known.max())) if len(known) else (float("nan"), float("nan")),
        metrics=tuple(metrics),
        baselines=tuple(baselines),
        lifts=tuple(lifts),
    )


def _thirds(
    results: Results, latents: _Latents, coder: str, key: str, indices: npt.NDArray[np.int64]
) -> tuple[ExecutedSummary, ...]:
    """Return the executed summary by thirds of firing rate; none below nine latents."""
    rates = latents.rates(coder, indices)
    if len(indices) < 9 or not np.isfinite(rates).all():
        return ()
    parts = np.array_split(indices[np.argsort(rates, kind="stable")], 3)
    return tuple(
        _executed(results, latents, coder, key, name, np.sort(part)) for name, part in zip(THIRDS, parts, strict=True)
    )


def _contrasts(results: Results, latents: _Latents, null: CoderSummary) -> list[Contrast]:
    found: list[Contrast] = []

    def add(explainer: str, quantity: str, trained: Floats, other: Floats) -> None:
        if len(trained) and len(other):
            found.append(
                Contrast(
                    coder=null.base,
                    role=null.role,
                    explainer=explainer,
                    quantity=quantity,
                    trained=median_interval(trained),
                    null=median_interval(other),
                    difference=difference_of_medians(trained, other),
                )
            )

    keys = {name: key for key, name in results.explainers(null.base)}
    for there in null.explainers:
        here = keys.get(there.name)
        if here is None:
            continue
        for s in there.measured:
            pairs = [_lifts(results, coder, s, key) for coder, key in ((null.base, here), (null.name, there.key))]
            add(there.name, s.scorer, pairs[0][0], pairs[1][0])
            add(there.name, f"{s.scorer} lift", pairs[0][1], pairs[1][1])
        for metric in ("auprc",):
            values = [
                _finite(results.score_column(coder, "execution", metric, explainer=key).value)
                for coder, key in ((null.base, here), (null.name, there.key))
            ]
            add(there.name, f"executed {metric}", values[0], values[1])
    add("", "token entropy", _finite(latents.entropy(null.base)), _finite(latents.entropy(null.name)))
    return found


def _lifts(results: Results, coder: str, scorer: ScorerSummary, key: str) -> tuple[Floats, Floats]:
    """Return a coder's scores, and score minus own null for each latent that has both."""
    name, metric = scorer.scorer, scorer.metric
    score = results.score_column(coder, name, metric, explainer=key, plumbing=False)
    null = results.score_column(coder, name, metric, control=scorer.null or NULL, explainer=key, plumbing=False)
    both, beside = _paired(score, null)
    return _finite(score.value), both - beside


def _identified(column: ScoreColumn) -> Floats:
    """Return the values of a metric that the judgements pin down."""
    known = np.array(["not_identified" not in flags for flags in column.flags], dtype=bool)
    return _finite(column.value[known])


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _among(column: ScoreColumn, indices: npt.NDArray[np.int64]) -> Floats:
    return _finite(column.value[np.isin(column.index, indices)])


def _paired(
    ours: ScoreColumn, theirs: ScoreColumn, indices: npt.NDArray[np.int64] | None = None
) -> tuple[Floats, Floats]:
    """Return the values of two metrics over the latents that have both, in order of latent."""
    shared, here, there = np.intersect1d(ours.index, theirs.index, assume_unique=True, return_indices=True)
    a, b = ours.value[here], theirs.value[there]
    keep = np.isfinite(a) & np.isfinite(b)
    if indices is not None:
        keep &= np.isin(shared, indices)
    return a[keep], b[keep]


def plain_summary(summary: RunSummary) -> dict[str, Any]:
    """Return the summary as JSON data, numbers that are not finite made None."""
    data: dict[str, Any] = plain(asdict(summary))
    return data


def summary_json(summary: RunSummary) -> str:
    """Return the summary as canonical JSON."""
    return canonical_json(plain_summary(summary))
