"""One latent's page: explanation, scores beside their nulls, firings, and windows with what the judges said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exegete.analysis.curves import stratum_text
from exegete.analysis.plots import Line, curves, firing_histogram, interval_bar
from exegete.analysis.rendering import flattened, raw
from exegete.analysis.shapes import BASELINES, NULL, ROLE_TEXT, split_name
from exegete.analysis.text import PLUMBING, metric_text, number, small
from exegete.analysis.visible import visible_token
from exegete.metrics import Interval
from exegete.results import Results
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, Judgement, LatentId, LatentStats, Score

if TYPE_CHECKING:
    from markupsafe import Markup

N_TRAIN, N_FIRING, N_SILENT = 16, 24, 16
_SIGNS = re.compile(r"\n|\t|\r| {2,}")
Judged = Mapping[tuple[int, int], Sequence[tuple[str, Judgement]]]


def latent_context(
    results: Results,
    latent: LatentId,
    explanations: Mapping[int, Explanation],
    stats: LatentStats | None,
    examples: ExampleSet | None,
    table: TokenTable,
    judges: Mapping[str, str],
) -> dict[str, Any]:
    """Return what the template of a latent's page needs; ``judges`` maps scorers to who judged."""
    judged: dict[tuple[int, int], list[tuple[str, Judgement]]] = {}
    scores = results.scores(coder=latent.coder, index=latent.index)
    for id_ in explanations:
        for scorer in sorted({s.scorer for s in scores if s.explanation == id_}):
            for judgement in results.judgements(id_, scorer):
                judged.setdefault((judgement.row, judgement.start), []).append((scorer, judgement))
    base, role = split_name(latent.coder)
    return {
        "name": str(latent),
        "role_text": "" if role == "trained" else f"control of {base}: {ROLE_TEXT[role]}",
        "explanations": [
            {**_explained(id_, e, scores, judges), "details": _details(results, id_, judges)}
            for id_, e in explanations.items()
        ],
        "plumbing": PLUMBING,
        "stats": [] if stats is None else _facts(stats, examples),
        "histogram": None if stats is None else raw(firing_histogram(stats.histogram.tolist(), stats.edges.tolist())),
        "tokens": [] if stats is None else _top_tokens(stats, table),
        "has_examples": examples is not None,
        **({} if examples is None else _windows(examples, judged, table)),
    }


def _details(results: Results, id_: int, judges: Mapping[str, str]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = [(scorer, results.detail(id_, scorer)) for scorer in sorted(judges)]
    return [(scorer, flattened(data)) for scorer, data in found if data]


def _explained(
    id_: int, explanation: Explanation, scores: Sequence[Score], judges: Mapping[str, str]
) -> dict[str, Any]:
    own = [s for s in scores if s.explanation == id_ or s.scorer == "baseline"]
    # Of several, measurements count before plumbing checks, and then the latest.
    mine = {(s.scorer, s.metric, s.control): s for s in sorted(own, key=lambda s: not s.plumbing)}
    rows, mass = [], {}
    for (scorer, metric, control), score in mine.items():
        decile = re.fullmatch(r"mass_decile_(\d)", metric)
        if decile and control == "none":
            mass[int(decile[1])] = _interval(score)
        elif control == "none":
            rows.append(_score_row(score, _beside(mine, scorer, metric)))
    scorers = sorted({scorer for scorer, _, _ in mine} & set(judges))
    covered = [Line(label="share of mass", style="rule", points=tuple(mass[d] for d in sorted(mass)))]
    return {
        "text": explanation.text,
        "status": explanation.status,
        "explainer": str(explanation.explainer.get("name", "explainer")),
        "judges": sorted({judges[scorer] for scorer in scorers}),
        "rows": rows,
        "mass": raw(curves(covered, [str(d + 1) for d in sorted(mass)], "decile, 1 the strongest")) if mass else None,
        "program": None
        if explanation.program is None
        else json.dumps(explanation.program, sort_keys=True, ensure_ascii=True),
    }


def _beside(mine: Mapping[tuple[str, str, str], Score], scorer: str, metric: str) -> Score | None:
    """Return the null of a score: other latents' explanations, or the first other control that it has."""
    found = {control: score for (s, m, control), score in mine.items() if (s, m) == (scorer, metric)}
    return found.get(NULL) or next((score for control, score in found.items() if control != "none"), None)


def _score_row(score: Score, null: Score | None) -> dict[str, Any]:
    baseline = score.scorer == "baseline"
    beside = None if null is None else _interval(null)
    return {
        "scorer": "no rule" if baseline else score.scorer,
        "metric": f"AUPRC, {BASELINES.get(score.metric, score.metric)}" if baseline else metric_text(score.metric),
        "tiny": score.metric == "base_rate",
        "score": _interval(score),
        "null": beside,
        "lift": score.value - beside.value if beside else math.nan,
        "bar": raw(interval_bar(_interval(score), beside)),
        "n_scored": score.n_scored,
        "n_failed": score.n_failed,
        "method": score.method,
        "flags": score.flags,
        "needed": score.n_needed,
        "widened": (score.floor, score.ceiling) if score.n_failed and math.isfinite(score.floor) else None,
    }


def _interval(score: Score) -> Interval:
    return Interval(value=score.value, low=score.low, high=score.high, method=score.method, n=score.n_scored)


def _facts(stats: LatentStats, examples: ExampleSet | None) -> list[tuple[str, str]]:
    facts = [
        ("firings", f"{stats.count:,}"),
        ("firing rate per token", small(stats.rate)),
        ("largest activation", small(stats.maximum)),
        ("mean activation", small(stats.mean)),
        ("token entropy", f"{number(stats.token_entropy, 2)} bits"),
    ]
    if examples is not None:
        facts.append(("firing rate per test window", small(examples.firing_rate)))
        facts.append(("test windows in the frame", f"{examples.frame:,}"))
        if len(examples.strata) > 1:
            sizes = ", ".join(f"{stratum_text(name)} {size:,}" for name, size in examples.strata)
            facts.append(("silent ones, by kind (near-duplicates once)", sizes))
    return facts


def _top_tokens(stats: LatentStats, table: TokenTable) -> list[dict[str, Any]]:
    most = max((count for _, count in stats.top_tokens), default=1)
    return [
        {"text": _token_text(table, token), "count": count, "width": f"{100 * count / most:.1f}"}
        for token, count in stats.top_tokens[:12]
    ]


def _token_text(table: TokenTable, token: int) -> str:
    return visible_token(table.texts[token]) if token < len(table) else f"token {token}"


def _windows(examples: ExampleSet, judged: Judged, table: TokenTable) -> dict[str, Any]:
    train = sorted(examples.part("train", fires=True), key=_strongest)
    firing = sorted(examples.part("test", fires=True), key=_strongest)
    silent = sorted(examples.part("test", fires=False), key=_strongest)
    shown = _spread(train, N_TRAIN)
    firing_shown = _wrong_first(firing, judged, N_FIRING)
    silent_shown = _wrong_first(silent, judged, N_SILENT)
    scale = examples.maximum
    return {
        "maximum": scale,
        "train": [_window(e, scale, judged, table) for e in shown],
        "firing": [_window(e, scale, judged, table) for e in firing_shown],
        "silent": [_window(e, scale, judged, table) for e in silent_shown],
        "train_note": f"{len(shown)} of {len(train)} firing windows, from the strongest to the weakest",
        "firing_note": f"{len(firing_shown)} of {len(firing)}",
        "silent_note": f"{len(silent_shown)} of {len(silent)}",
    }


def _strongest(example: Example) -> tuple[float, int, int]:
    return (-example.maximum, example.row, example.start)


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """Return n examples evenly spread over an order, its first one included."""
    return [examples[i * len(examples) // n] for i in range(n)] if len(examples) > n else list(examples)


def _wrong_first(examples: Sequence[Example], judged: Judged, n: int) -> list[Example]:
    """Return n examples in order: up to half wrongly judged ones, the others spread over the rest."""
    wrong = [e for e in examples if any(_is_wrong(j) for _, j in judged.get((e.row, e.start), ()))]
    taken = {(e.row, e.start) for e in _spread(wrong, n // 2)}
    rest = [e for e in examples if (e.row, e.start) not in taken]
    taken |= {(e.row, e.start) for e in _spread(rest, n - len(taken))}
    return [e for e in examples if (e.row, e.start) in taken]


def _is_wrong(judgement: Judgement) -> bool:
    return judgement.prediction is not None and judgement.prediction != judgement.truth


def _window(example: Example, maximum: float, judged: Judged, table: TokenTable) -> dict[str, Any]:
    stratum = stratum_text(example.stratum)
    strength = f"{example.maximum:.2f} · {stratum}" if example.fires else stratum
    alike = f" · one of {example.multiplicity} alike" if example.multiplicity > 1 else ""
    return {
        "parts": _parts(example, maximum, table),
        "marks": [_mark(scorer, j) for scorer, j in judged.get((example.row, example.start), ())],
        "note": f"{strength}{alike} · row {example.row}:{example.start}",
    }


def _mark(scorer: str, judgement: Judgement) -> dict[str, str]:
    truth = "fires" if judgement.truth else "does not fire"
    if judgement.prediction is None:
        return {"style": "failed", "text": f"{scorer} ?", "title": f"{judgement.status}; it {truth}"}
    said = "yes" if judgement.prediction else "no"
    odds = "" if judgement.probability is None else f" (P(yes) {judgement.probability:.2f})"
    right = not _is_wrong(judgement)
    return {
        "style": "ok" if right else "wrong",
        "text": f"{scorer} {'✓' if right else '✗'}",
        "title": f"judge said {said}{odds}; it {truth}",
    }


def _parts(example: Example, maximum: float, table: TokenTable) -> list[dict[str, Any]]:
    """Return a window as runs of text: each firing token by itself, silent ones joined."""
    tokens = example.tokens.tolist()
    texts = table.spans(tokens)
    parts: list[dict[str, Any]] = []
    quiet = ""
    for i, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        value = float(example.activations[i])
        if token in table.special:
            text = table.texts[token]
        if value <= 0:
            quiet += text
            continue
        if quiet:
            parts.append({"level": 0, "html": signs(quiet)})
            quiet = ""
        level = max(1, min(10, math.ceil(10 * value / maximum))) if maximum > 0 else 1
        shown = text or table.texts[token]
        title = f"{value:.3f} · token {token}"
        parts.append({"level": level, "peak": i == example.peak, "title": title, "html": signs(shown)})
    if quiet:
        parts.append({"level": 0, "html": signs(quiet)})
    return parts


def signs(text: str) -> Markup:
    """Return text as HTML, escaped, with newlines, tabs and repeated spaces as faint signs."""
    from markupsafe import Markup, escape

    from exegete.analysis.visible import visible

    parts: list[str] = []
    at = 0
    for found in _SIGNS.finditer(text):
        parts.append(str(escape(visible(text[at : found.start()]))))
        sign = {"\n": "↵", "\t": "→", "\r": "␍"}.get(found[0], "·" * len(found[0]))
        parts.append(f"<i>{sign}</i>")
        at = found.end()
    parts.append(str(escape(visible(text[at:]))))
    return Markup("".join(parts))
