"""The report's first page: controls first, then scores against their null, curves, executed rules, latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from exegete.analysis.curves import stratum_text
from exegete.analysis.plots import Dot, Line, Strip, comparison, curves, differences, dots, histogram
from exegete.analysis.rendering import direction, flattened, raw
from exegete.analysis.shapes import (
    BASELINES,
    HEADLINE,
    NULL,
    ROLE_TEXT,
    CoderSummary,
    Contrast,
    ExecutedSummary,
    ExplainerSummary,
    RunSummary,
    ScorerSummary,
)
from exegete.analysis.summary import ranking
from exegete.analysis.text import bracket, number, percent, small
from exegete.metrics import Interval
from exegete.results import Results, ScoreColumn
from exegete.types import Explanation, LatentId

N_EXTREMES = 10
N_PICTURED = 8  # trained coders with figures of their own; the tables hold all
Pages = Mapping[LatentId, str]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Figures of one coder and explainer under one heading."""

    name: str
    figures: list[dict[str, Any]]


def index_context(
    results: Results,
    summary: RunSummary,
    explanations: Mapping[int, Explanation],
    pages: Pages,
) -> dict[str, Any]:
    """Return what the template of the first page needs; ``pages`` maps latents to their pages."""
    meta = results.meta()
    pictured = {c.name for c in summary.trained()[:N_PICTURED]}
    groups = [(c, e) for c in summary.coders for e in c.explainers if c.base in pictured]
    own = [(c, e) for c, e in groups if c.role == "trained"]
    title = str(meta.get("title") or (meta.get("config") or {}).get("subject") or "exegete run")
    return {
        "title": title,
        "subtitle": _subtitle(meta, summary),
        "claims": _claims(summary.contrasts),
        "differences": raw(_differences(summary)),
        "contrasts": [_contrast_row(c) for c in summary.contrasts],
        "roles": {c.role for c in summary.coders},
        "comparisons": [_comparisons(results, summary, c, e) for c, e in own],
        "n_unpictured": len(summary.trained()) - len(pictured),
        "cards": _cards(meta, summary),
        "coders": summary.coders,
        "scorer_rows": _scorer_rows(summary),
        "histograms": [g for g in (_histograms(results, c, e) for c, e in own) if g.figures],
        "curve_groups": [g for g in (_curves(c, e) for c, e in own) if g.figures],
        "executed_groups": [g for g in (_executed_figures(c, e) for c, e in own) if g.figures],
        "executed_rows": _executed_rows(summary),
        "baseline_keys": list(BASELINES),
        "baseline_names": list(BASELINES.values()),
        "extremes": [g for g in (_extremes(results, c, e, explanations, pages) for c, e in own) if g],
        **_latent_table(results, summary, explanations, pages),
        "skipped_rows": [(c.name, *entry) for c in summary.coders for entry in c.skipped],
        "status_rows": [
            (c.name, e.name, ", ".join(f"{n:,} {status}" for status, n in e.statuses))
            for c in summary.coders
            for e in c.explainers
        ],
        "corpus": flattened(meta.get("corpus") or (meta.get("config") or {}).get("corpus") or {}),
        "manifest": [(name, flattened(value)) for name, value in meta.items() if name != "title"],
    }


def _subtitle(meta: Mapping[str, Any], summary: RunSummary) -> str:
    n = sum(c.n_explained for c in summary.trained())
    explainers = sorted({e.name for c in summary.coders for e in c.explainers})
    text = f"{n:,} latents of {len(summary.trained())} coder(s) explained"
    return f"{text} by {', '.join(explainers)}" if explainers else text


_CONTROL = {"random-coder": "a random-init coder", "random-subject": "the re-randomised subject"}


def _claims(contrasts: Sequence[Contrast]) -> list[dict[str, str]]:
    """Return the contrasts in words, whatever their sign: one sentence for each control and quantity."""
    claims = []
    wanted = [c for c in contrasts if c.quantity.endswith((" lift", " auprc"))]
    for role, quantity in dict.fromkeys((c.role, c.quantity) for c in wanted):
        mine = [c for c in wanted if (c.role, c.quantity) == (role, quantity)]
        if len(mine) == 1:
            claims.append(_claim(mine[0]))
            continue
        ways = [direction(c.difference) for c in mine]
        above, below = ways.count("above"), ways.count("below")
        text = (
            f"{_upper(_quantity(quantity))}, against {_CONTROL[role]}: higher on {above} of {len(mine)} trained "
            f"coders, lower on {below}, not told apart on {len(mine) - above - below}."
        )
        whole = "above" if above == len(mine) else "below" if below > above else ""
        claims.append({"text": text, "direction": whole})
    return claims


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _claim(c: Contrast) -> dict[str, str]:
    way = direction(c.difference)
    verb = {"above": "higher than", "below": "lower than"}.get(way, "not told apart from")
    text = (
        f"{c.coder}: the median {_quantity(c.quantity)} is {number(c.trained.value)}, {verb} {number(c.null.value)} on "
        f"{_CONTROL[c.role]} (difference {bracket(c.difference, sign=True)})."
    )
    return {"text": text, "direction": way}


def _quantity(quantity: str) -> str:
    return (
        "held-out AUPRC of executed rules" if quantity == "executed auprc" else f"{quantity} over shuffled explanations"
    )


def _differences(summary: RunSummary) -> str:
    """Return the opening figure: every trained coder minus each of its controls; nothing without controls."""
    rows: dict[tuple[str, str], dict[str, Interval]] = {}
    for c in summary.contrasts:
        name = c.quantity.replace("auprc", "AUPRC")
        if name.endswith((" lift", " AUPRC", " entropy")):
            rows.setdefault((c.coder, c.role), {}).setdefault(name, c.difference)
    quantities = list(dict.fromkeys(name for found in rows.values() for name in found))
    labelled = [(f"{coder} − {ROLE_TEXT[role]}", role, found) for (coder, role), found in sorted(rows.items())]
    return differences(labelled, quantities) if labelled else ""


def _contrast_row(c: Contrast) -> dict[str, Any]:
    return {
        "coder": c.coder,
        "quantity": c.quantity.replace("auprc", "AUPRC"),
        "explainer": c.explainer,
        "role_text": ROLE_TEXT[c.role],
        "trained": c.trained,
        "null": c.null,
        "difference": c.difference,
    }


def _comparisons(results: Results, summary: RunSummary, coder: CoderSummary, explainer: ExplainerSummary) -> _Group:
    """Return the opening figures of a trained coder: each quantity on it and on its nulls."""
    family = [(c, e) for c in summary.coders if c.base == coder.name for e in c.explainers if e.name == explainer.name]
    figures: list[dict[str, Any]] = []
    for scorer in [s.scorer for s in explainer.scorers]:
        strips = []
        for c, e in family:
            found = e.scorer(scorer)
            if found is not None:
                values = results.score_column(c.name, scorer, HEADLINE, explainer=e.key).value
                nulls = results.score_column(c.name, scorer, HEADLINE, control=NULL, explainer=e.key).value
                strips.append(_strip(c, values, nulls, found.median))
        caption = f"Balanced accuracy per latent; the dashed line is chance. {_lift_words(family, scorer)}"
        judge = next(s.judge for s in explainer.scorers if s.scorer == scorer)
        figures.append(_figure(scorer.capitalize(), comparison(strips, (0.0, 1.0), chance=0.5), caption, judge))
    executed = [(c, e) for c, e in family if e.executed is not None]
    if executed:
        strips = []
        for c, e in executed:
            assert e.executed is not None
            values = results.score_column(c.name, "execution", "auprc", explainer=e.key).value
            strips.append(_strip(c, values, np.zeros(0), e.executed.metric("auprc")))
        rates = ", ".join(
            f"{ROLE_TEXT[c.role]} {small(e.executed.metric('base_rate').value)}" for c, e in executed if e.executed
        )
        figures.append(_figure("Executed rules, AUPRC", comparison(strips, (0.0, 1.0)), f"Median base rates: {rates}."))
    entropies = {c.name: _entropies(results, c.name) for c, _ in family}
    top = max((float(v.max()) for v in entropies.values() if len(v)), default=0.0)
    if top > 0:
        strips = [_strip(c, entropies[c.name], np.zeros(0), c.entropy) for c, _ in family]
        caption = "Entropy in bits of the tokens a latent fires on: low means few tokens, which a label names easily."
        figures.append(_figure("Token entropy", comparison(strips, (0.0, math.ceil(top))), caption))
    name = coder.name if len(coder.explainers) == 1 else f"{coder.name}, {explainer.name}"
    return _Group(name=name, figures=figures)


def _entropies(results: Results, coder: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the token entropy of the selected latents, as the summary counts them."""
    stats = results.latents(coder, selected=True) or [s for s in results.latents(coder) if s.count]
    values = np.array([s.token_entropy for s in stats], dtype=np.float64)
    return values[np.isfinite(values)]


def _strip(coder: CoderSummary, values: Any, nulls: Any, median: Interval) -> Strip:
    return Strip(label=ROLE_TEXT[coder.role], role=coder.role, values=values, nulls=nulls, median=median)


def _lift_words(family: Sequence[tuple[CoderSummary, ExplainerSummary]], scorer: str) -> str:
    lifts = [(c, found) for c, e in family if (found := e.scorer(scorer)) is not None]
    words = "; ".join(f"{ROLE_TEXT[c.role]} {bracket(found.lift, sign=True)}" for c, found in lifts)
    return f"Paired lift over own null: {words}."


def _figure(title: str, svg: str, caption: str, judge: str = "") -> dict[str, Any]:
    return {"title": title, "svg": raw(svg), "caption": caption, "judge": judge}


def _cards(meta: Mapping[str, Any], summary: RunSummary) -> list[tuple[str, str]]:
    trained = summary.trained()
    corpus = meta.get("corpus") or {}
    scorers = [s for c in summary.coders for e in c.explainers for s in e.scorers]
    failed, total = sum(s.n_failed for s in scorers), sum(s.n_total for s in scorers)
    cards = [
        ("trained coders", f"{len(trained):,}"),
        ("control coders", f"{len(summary.coders) - len(trained):,}"),
        ("latents explained", f"{sum(c.n_explained for c in trained):,}"),
        ("latents skipped", f"{sum(c.n_skipped for c in trained):,}"),
        ("judgements", f"{total:,}"),
        ("of them failed", f"{failed:,} ({percent(failed / total)})" if total else "0"),
    ]
    tokens = corpus.get("tokens") if isinstance(corpus, Mapping) else None
    return [("corpus tokens", f"{tokens:,}"), *cards] if isinstance(tokens, int) else cards


def _scorer_rows(summary: RunSummary) -> list[dict[str, Any]]:
    return [
        {
            "coder": c.name,
            "role": c.role,
            "explainer": e.name,
            "s": s,
            "others": {"sensitivity": None, "specificity": None, **dict(s.others)},
        }
        for c in summary.coders
        for e in c.explainers
        for s in e.scorers
    ]


def _histograms(results: Results, coder: CoderSummary, explainer: ExplainerSummary) -> _Group:
    figures = []
    for s in explainer.scorers:
        values = results.score_column(coder.name, s.scorer, HEADLINE, explainer=explainer.key).value
        nulls = results.score_column(coder.name, s.scorer, HEADLINE, control=NULL, explainer=explainer.key).value
        svg = histogram(values, nulls, s.median, s.null_median, coder.role)
        caption = (
            f"{s.n:,} latents: median {bracket(s.median)}; null mean {number(s.null_mean.value)}, median "
            f"{bracket(s.null_median)}, exactly 0.5 in {percent(s.ties.value)}. "
            f"Paired lift {bracket(s.lift, sign=True)}."
        )
        figures.append(_figure(s.scorer.capitalize(), svg, caption, s.judge))
    return _Group(name=_heading(coder, explainer), figures=figures)


def _heading(coder: CoderSummary, explainer: ExplainerSummary) -> str:
    return coder.name if len(coder.explainers) == 1 else f"{coder.name}, {explainer.name}"


def _curves(coder: CoderSummary, explainer: ExplainerSummary) -> _Group:
    figures = []
    for s in explainer.scorers:
        firing = [c for c in s.curves if c.truth]
        names = [name for name, _, _ in firing[0].points] if firing else []
        if len(names) < 2:
            continue
        lines = []
        for curve in sorted(firing, key=lambda c: c.control != "none"):
            points = {name: interval for name, _, interval in curve.points}
            missing = Interval(value=math.nan, low=math.nan, high=math.nan, method="", n=0)
            style, label = ("r-trained", "own explanation") if curve.control == "none" else ("null", "other latents’")
            lines.append(Line(label=label, style=style, points=tuple(points.get(n, missing) for n in names)))
        part = names[0].partition("_")[0]  # deciles of rank, or bins of value
        places = [stratum_text(n).removeprefix(f"{part} ") for n in names]
        svg = curves(lines, places, f"{part} of firing windows, 1 the strongest")
        figures.append(_figure(f"{s.scorer.capitalize()}: sensitivity", svg, _specificity_words(s), s.judge))
    if explainer.mass:
        line = Line(label="share of activation mass the rule covers", style="r-trained", points=explainer.mass)
        svg = curves([line], [str(d + 1) for d in range(len(explainer.mass))], "decile of firings, 1 the strongest")
        figures.append(
            _figure(
                "Executed rules: activation mass covered", svg, "Median over latents, the document in its row in view."
            )
        )
    return _Group(name=_heading(coder, explainer), figures=figures)


def _specificity_words(s: ScorerSummary) -> str:
    words = [
        f"{stratum_text(name)} {bracket(interval)}"
        for curve in s.curves
        if not curve.truth and curve.control == "none"
        for name, _, interval in curve.points
    ]
    return f"Mean over latents. Specificity: {'; '.join(words)}." if words else "Mean over latents."


def _executed_figures(coder: CoderSummary, explainer: ExplainerSummary) -> _Group:
    figures = []
    for part in explainer.thirds or ((explainer.executed,) if explainer.executed else ()):
        base = part.metric("base_rate").value
        rows = [Dot(label="rule", style="rule", interval=part.metric("auprc"))]
        rows += [Dot(label=BASELINES[name], style="other", interval=interval) for name, interval in part.baselines]
        low, high = part.rates
        lifts = dict(part.lifts)
        caption = f"{part.n:,} latents, firing rates {small(low)} to {small(high)}, median base rate {small(base)}."
        if "auprc_bigram" in lifts:
            caption += f" Rule − bigram, paired: {bracket(lifts['auprc_bigram'], sign=True)}."
        svg = dots(rows, base, f"median base rate {small(base)}")
        figures.append(_figure(part.name.capitalize(), svg, caption))
    return _Group(name=_heading(coder, explainer), figures=figures)


def _executed_rows(summary: RunSummary) -> list[dict[str, Any]]:
    rows = []
    for c in summary.coders:
        for e in c.explainers:
            parts: list[ExecutedSummary] = ([e.executed] if e.executed else []) + list(e.thirds)
            rows += [
                {
                    "name": _heading(c, e) if part.name == "all" else part.name,
                    "sub": part.name != "all",
                    "role": c.role,
                    "e": part,
                    "metrics": dict(part.metrics),
                    "baselines": dict(part.baselines),
                    "lifts": dict(part.lifts),
                }
                for part in parts
            ]
    return rows


def extremes(column: ScoreColumn, n: int = N_EXTREMES) -> tuple[list[int], list[int]]:
    """Return positions in a column of the best latents, best first, and of the worst, worst first; none in both."""
    known = np.flatnonzero(np.isfinite(column.value))
    order = known[np.argsort(-column.value[known], kind="stable")].tolist()
    n = min(n, (len(order) + 1) // 2)
    return order[:n], order[n:][::-1][:n]


def _extremes(
    results: Results,
    coder: CoderSummary,
    explainer: ExplainerSummary,
    explanations: Mapping[int, Explanation],
    pages: Pages,
) -> dict[str, Any] | None:
    by, column = ranking(results, coder.name, explainer)
    if not len(column):
        return None
    texts = {e.latent: e.text or "" for e in explanations.values() if e.latent.coder == coder.name}
    sides = []
    for title, positions in zip(("Best", "Worst"), extremes(column), strict=True):
        items = []
        for position in positions:
            latent = LatentId(coder=coder.name, index=int(column.index[position]))
            items.append(
                {
                    "name": str(latent),
                    "page": pages.get(latent),
                    "value": float(column.value[position]),
                    "text": _cut(texts.get(latent, "")),
                }
            )
        sides.append({"title": title, "latents": items})
    return {"name": _heading(coder, explainer), "by": by, "sides": sides}


def _cut(text: str, n: int = 240) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _latent_table(
    results: Results, summary: RunSummary, explanations: Mapping[int, Explanation], pages: Pages
) -> dict[str, Any]:
    """Return the rows of the table of all latents: one per explanation of a latent that has a page."""
    scorers = sorted({s.scorer for c in summary.coders for e in c.explainers for s in e.scorers})
    executed = any(e.executed for c in summary.coders for e in c.explainers)
    heads = [head for s in scorers for head in (s, f"{s} null")]
    wanted = [(s, HEADLINE, control) for s in scorers for control in ("none", NULL)]
    if executed:
        heads += ["AUPRC", "bigram AUPRC"]
        wanted += [("execution", "auprc", "none"), ("baseline", "auprc_bigram", "none")]
    rows, left_out = [], 0
    for place, coder in enumerate(summary.coders):
        rates = {s.latent.index: s for s in results.latents(coder.name, selected=True)}
        for explainer in coder.explainers:
            columns = []
            for scorer, metric, control in wanted:
                key = None if scorer == "baseline" else explainer.key
                found = results.score_column(coder.name, scorer, metric, control=control, explainer=key)
                columns.append(dict(zip(found.index.tolist(), found.value.tolist(), strict=True)))
            for explanation in results.explanations(coder.name, key=explainer.key).values():
                latent = explanation.latent
                if latent not in pages:
                    left_out += 1
                    continue
                stats = rates.get(latent.index)
                values = [(stats.rate, small) if stats else (math.nan, small)]
                values += [(stats.token_entropy, number) if stats else (math.nan, number)]
                values += [(column.get(latent.index, math.nan), number) for column in columns]
                rows.append(
                    {
                        "coder": place,
                        "name": str(latent),
                        "page": pages[latent],
                        "text": _cut(explanation.text or f"({explanation.status})"),
                        "cells": [("" if math.isnan(v) else f"{v:.6g}", show(v)) for v, show in values],
                    }
                )
    return {"latent_heads": ["rate", "entropy", *heads], "latent_rows": rows, "n_left_out": left_out}
