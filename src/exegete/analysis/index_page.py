"""The report's first page: controls first, then scores against their null, curves, executed rules, latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exegete.analysis.across import matrix
from exegete.analysis.index_figures import comparisons, executed_figures, heading, histograms, sensitivities
from exegete.analysis.plots import differences
from exegete.analysis.rendering import direction, flattened, raw
from exegete.analysis.shapes import (
    BASELINES,
    ROLE_TEXT,
    SCALES,
    Agreement,
    CoderSummary,
    Contrast,
    ExecutedSummary,
    ExplainerSummary,
    RunSummary,
    Stopped,
    split_name,
)
from exegete.analysis.summary import ranking
from exegete.analysis.text import (
    NONE,
    NULL_TEXT,
    PLUMBING,
    bracket,
    certified_line,
    metric_text,
    number,
    percent,
    small,
)
from exegete.metrics import Interval
from exegete.results import Results
from exegete.results_columns import ScoreColumn
from exegete.types import Explanation, LatentId

N_EXTREMES = 10
N_PICTURED = 8  # trained coders with figures of their own; the tables hold all
Pages = Mapping[LatentId, str]


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
        "comparisons": [comparisons(results, summary, c, e) for c, e in own],
        "n_unpictured": len(summary.trained()) - len(pictured),
        "cards": _cards(meta, summary),
        "coders": summary.coders,
        "scorer_rows": _scorer_rows(summary, plumbing=False),
        "plumbing_rows": _scorer_rows(summary, plumbing=True),
        "plumbing": PLUMBING,
        "plumbing_figures": [g for g in (histograms(results, c, e, plumbing=True) for c, e in own) if g.figures],
        "agreements": [(*group, *matrix(found)) for group, found in _grouped(summary.agreements).items()],
        "llm_lifts": summary.llm_lifts,
        "retests": summary.retests,
        "collisions": [
            [(i, pages.get(LatentId(coder=one.coder, index=i))) for i in one.latents]
            for one in summary.collisions[:N_EXTREMES]
        ],
        "n_collisions": len(summary.collisions),
        "stopped": [_stopped_row(one) for one in summary.stopped if not one.plumbing],
        "plumbing_stopped": [_stopped_row(one) for one in summary.stopped if one.plumbing],
        "certified": [certified_line(one) for one in summary.certified],
        "output_latents": [(o, pages.get(LatentId(coder=o.coder, index=o.index))) for o in summary.output_latents],
        "histograms": [g for g in (histograms(results, c, e) for c, e in own) if g.figures],
        "curve_groups": [g for g in (sensitivities(c, e) for c, e in own) if g.figures],
        "executed_groups": [g for g in (executed_figures(c, e) for c, e in own) if g.figures],
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
    coders = len(summary.trained())
    text = f"{n:,} latents of {coders} coder{'' if coders == 1 else 's'} explained"
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


def _cards(meta: Mapping[str, Any], summary: RunSummary) -> list[tuple[str, str]]:
    trained = summary.trained()
    corpus = meta.get("corpus") or {}
    scorers = [s for c in summary.coders for e in c.explainers for s in e.measured]
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


def _grouped(found: Sequence[Agreement]) -> dict[tuple[str, str], list[Agreement]]:
    groups: dict[tuple[str, str], list[Agreement]] = {}
    for one in found:
        groups.setdefault((one.coder, one.explainer), []).append(one)
    return groups


def _scorer_rows(summary: RunSummary, *, plumbing: bool) -> list[dict[str, Any]]:
    return [
        {
            "coder": c.name,
            "role": c.role,
            "explainer": e.name,
            "s": s,
            "metric": metric_text(s.metric),
            "null": NULL_TEXT.get(s.null, s.null.replace("_", " ")),
            "halves": s.ties.value if s.metric in SCALES and SCALES[s.metric].chance == 0.5 else math.nan,
            "others": {"sensitivity": None, "specificity": None, **dict(s.others)},
            "more": [
                (f"{metric_text(s.metric)}, mean over latents", s.mean),
                (f"{metric_text(s.metric)}, mean weighted by firing rate", s.weighted),
                *((metric_text(n), found) for n, found in s.others if n not in ("sensitivity", "specificity")),
            ],
        }
        for c in summary.coders
        for e in c.explainers
        for s in e.scorers
        if s.plumbing == plumbing
    ]


def _stopped_row(one: Stopped) -> dict[str, Any]:
    """Return a row of the table of what was judged only as much as needed."""
    asked, decided, narrow = [], [], []
    if one.certify is not None:
        asked.append(f"≥ {one.certify:g} or ≤ {one.certify - one.margin:g}")
        saved = percent(1 - one.judgements / one.fixed_test) if one.fixed_test else NONE
        decided = [*(f"{n:,}" for n in (*one.decisions, one.fixed_test)), saved]
    if one.stop_when is not None:
        asked.append(f"within ±{one.stop_when:g}")
        narrow = [f"{one.narrow:,}", f"{one.fixed_width[1]:,}"]
    role = split_name(one.coder)[1]
    return {"one": one, "role": role, "asked": asked, "decided": decided, "narrow": narrow}


def _executed_rows(summary: RunSummary) -> list[dict[str, Any]]:
    rows = []
    for c in summary.coders:
        for e in c.explainers:
            parts: list[ExecutedSummary] = ([e.executed] if e.executed else []) + list(e.thirds)
            rows += [
                {
                    "name": heading(c, e) if part.name == "all" else part.name,
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
    return {"name": heading(coder, explainer), "by": by, "sides": sides}


def _cut(text: str, n: int = 240) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _latent_table(
    results: Results, summary: RunSummary, explanations: Mapping[int, Explanation], pages: Pages
) -> dict[str, Any]:
    """Return the rows of the table of all latents: one per explanation of a latent that has a page."""
    measured = [s for c in summary.coders for e in c.explainers for s in e.measured]
    nulls = {s.scorer: s.null for s in measured if s.null}
    scorers = sorted({(s.scorer, s.metric, nulls.get(s.scorer, "")) for s in measured})
    executed = any(e.executed for c in summary.coders for e in c.explainers)
    heads = [head for s, _, null in scorers for head in (s, *((f"{s} null",) if null else ()))]
    wanted = [(s, m, control) for s, m, null in scorers for control in ("none", *((null,) if null else ()))]
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
                found = results.score_column(coder.name, scorer, metric, control=control, explainer=key, plumbing=False)
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
