"""The figures of the report's first page: scores beside nulls, curves over deciles, executed rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from exegete.analysis.curves import stratum_text
from exegete.analysis.plots import Dot, Line, Strip, comparison, curves, dots, histogram
from exegete.analysis.rendering import raw
from exegete.analysis.shapes import (
    BASELINES,
    NULL,
    ROLE_TEXT,
    SCALES,
    CoderSummary,
    ExplainerSummary,
    RunSummary,
    Scale,
    ScorerSummary,
)
from exegete.analysis.text import bracket, metric_text, number, percent, small
from exegete.metrics import Interval
from exegete.metrics.inputs import undefined
from exegete.results import Results

_MANY = 5  # strata of silent windows that are named one by one


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Figures of one coder and explainer under one heading."""

    name: str
    figures: list[dict[str, Any]]


def comparisons(results: Results, summary: RunSummary, coder: CoderSummary, explainer: ExplainerSummary) -> Group:
    """Return the opening figures of a trained coder: each quantity on it and on its nulls."""
    family = [(c, e) for c in summary.coders if c.base == coder.name for e in c.explainers if e.name == explainer.name]
    figures: list[dict[str, Any]] = []
    for s in explainer.measured:
        strips = []
        for c, e in family:
            found = e.scorer(s.scorer)
            if found is not None:
                strips.append(_strip(c, *_values(results, c, e, found), found.median))
        scale = scale_of(s.metric, [v for strip in strips for v in (strip.values, strip.nulls)])
        chance = "; the dashed line is chance" if scale.chance is not None else ""
        caption = f"{_upper(metric_text(s.metric))} per latent{chance}. {_lift_words(family, s.scorer)}"
        svg = comparison(strips, (scale.low, scale.high), chance=scale.chance)
        figures.append(_figure(scorer_text(s.scorer), svg, caption, s.judge))
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
    return Group(name=name, figures=figures)


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


def histograms(results: Results, coder: CoderSummary, explainer: ExplainerSummary, *, plumbing: bool = False) -> Group:
    """Return the distribution of every scorer over the latents of a coder, its null behind it."""
    figures = []
    for s in explainer.scorers:
        if s.plumbing != plumbing:
            continue
        values, nulls = _values(results, coder, explainer, s)
        scale = scale_of(s.metric, [values, nulls])
        svg = histogram(values, nulls, s.median, s.null_median, coder.role, (scale.low, scale.high))
        ties = f", exactly 0.5 in {percent(s.ties.value)}" if scale.chance == 0.5 else ""
        beside = (
            f"; null mean {number(s.null_mean.value)}, median {bracket(s.null_median)}{ties}. "
            f"Paired lift {bracket(s.lift, sign=True)}"
            if s.null
            else ""
        )
        caption = f"{_upper(metric_text(s.metric))}, {s.n:,} latents: median {bracket(s.median)}{beside}."
        figures.append(_figure(scorer_text(s.scorer), svg, caption, s.judge))
    return Group(name=heading(coder, explainer), figures=figures)


def heading(coder: CoderSummary, explainer: ExplainerSummary) -> str:
    """Return the heading of a coder and an explainer."""
    return coder.name if len(coder.explainers) == 1 else f"{coder.name}, {explainer.name}"


def sensitivities(coder: CoderSummary, explainer: ExplainerSummary) -> Group:
    """Return the curves of every judged scorer, from the strongest to the weakest firings."""
    figures = []
    for s in explainer.measured:
        firing = [c for c in s.curves if c.truth]
        names = [name for name, _, _ in firing[0].points] if firing else []
        if len(names) < 2:
            continue
        lines = []
        for curve in sorted(firing, key=lambda c: c.control != "none"):
            points = {name: interval for name, _, interval in curve.points}
            missing = undefined("")
            style, label = ("r-trained", "own explanation") if curve.control == "none" else ("null", "other latents’")
            lines.append(Line(label=label, style=style, points=tuple(points.get(n, missing) for n in names)))
        part = names[0].partition("_")[0]  # deciles of rank, or bins of value
        places = [stratum_text(n).removeprefix(f"{part} ") for n in names]
        svg = curves(lines, places, f"{part} of firing windows, 1 the strongest")
        figures.append(_figure(f"{scorer_text(s.scorer)}: sensitivity", svg, _specificity_words(s), s.judge))
    if explainer.mass:
        line = Line(label="share of activation mass the rule covers", style="r-trained", points=explainer.mass)
        svg = curves([line], [str(d + 1) for d in range(len(explainer.mass))], "decile of firings, 1 the strongest")
        figures.append(
            _figure(
                "Executed rules: activation mass covered", svg, "Median over latents, the document in its row in view."
            )
        )
    return Group(name=heading(coder, explainer), figures=figures)


def _specificity_words(s: ScorerSummary) -> str:
    points = [p for curve in s.curves if not curve.truth and curve.control == "none" for p in curve.points]
    words = [f"{stratum_text(name)} {bracket(interval)}" for name, _, interval in points]
    if len(points) > _MANY:  # windows that fire, wrongly marked: one number for every decile says little more
        values = [interval.value for _, _, interval in points]
        words = [f"{number(min(values))} to {number(max(values))} over {len(points)} strata"]
    return f"Mean over latents. Specificity: {'; '.join(words)}." if words else "Mean over latents."


def executed_figures(coder: CoderSummary, explainer: ExplainerSummary) -> Group:
    """Return executed rules beside what needs no rule, by thirds of firing rate."""
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
    return Group(name=heading(coder, explainer), figures=figures)


def scorer_text(scorer: str) -> str:
    """Return a scorer's name for people."""
    return _upper(scorer.replace("_", " "))


def scale_of(metric: str, values: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> Scale:
    """Return the range of a metric and what chance gives; where it has no bounds, that of the values, with 0 in it."""
    if metric in SCALES:
        return SCALES[metric]
    known = np.concatenate([np.zeros(1), *values])
    known = known[np.isfinite(known)]
    low, high = float(known.min()), float(known.max())
    return Scale(low=low, high=high if high > low else low + 1.0, chance=0.0)


def _values(results: Results, coder: CoderSummary, explainer: ExplainerSummary, s: ScorerSummary) -> tuple[Any, Any]:
    """Return a scorer's headline and its null over the latents of a coder."""
    own, null = (
        results.score_column(
            coder.name, s.scorer, s.metric, control=control, explainer=explainer.key, plumbing=s.plumbing
        ).value
        for control in ("none", s.null or NULL)
    )
    return own, null


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
