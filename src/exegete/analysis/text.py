"""The summary as plain text for a terminal, at most 120 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from exegete.analysis.shapes import BASELINES, ROLE_TEXT, Certified, CoderSummary, Contrast, RunSummary, Stopped
from exegete.analysis.visible import visible_line
from exegete.metrics import Interval

WIDTH = 120
_NAME = 30  # columns for the name of a coder
NONE = "–"
PLUMBING = "plumbing check, not a measurement"
NULL_TEXT = {"other_latent": "other latents", "random_direction": "random direction"}
_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "pearson": "Pearson",
    "icc": "ICC",
    "ece": "ECE",
    "kl": "KL",
}


def number(value: float, digits: int = 3) -> str:
    """Return a number as the report and the table print it; a dash when there is none."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isnan(value):
        return NONE
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) != 0 else text.lstrip("-")


def signed(value: float, digits: int = 3) -> str:
    """Return a difference with its sign."""
    text = number(value, digits)
    return f"+{text}" if math.isfinite(value) and value > 0 and float(text) != 0 else text


def small(value: float) -> str:
    """Return a rate or share that may be tiny: 0.0213, or 2.1e−05."""
    if not math.isfinite(value):
        return NONE
    return f"{value:.1e}".replace("-", "−") if 0 < abs(value) < 1e-3 else number(value, 4)


def bracket(interval: Interval, *, sign: bool = False, digits: int = 3) -> str:
    """Return ``0.812 [0.790, 0.834]``."""
    if not math.isfinite(interval.value):
        return NONE
    form = signed if sign else number
    return f"{form(interval.value, digits)} [{form(interval.low, digits)}, {form(interval.high, digits)}]"


def percent(share: float) -> str:
    """Return a share in per cent."""
    return NONE if not math.isfinite(share) else f"{number(100 * share, 1)} %"


def metric_text(name: str) -> str:
    """Return a metric's name for people."""
    return " ".join(_METRICS.get(word, word) for word in name.split("_"))


def table_text(summary: RunSummary) -> str:
    """Return the tables of a run: controls first, then latents, scores against the null, executed rules."""
    if not summary.coders:
        return "no results yet"
    parts = [
        *_controls(summary.contrasts),
        *_latents(summary.coders),
        *_scores(summary.coders, plumbing=False),
        *_certified(summary.certified),
        *_stopped([one for one in summary.stopped if not one.plumbing]),
        *_executed(summary.coders),
        *_scores(summary.coders, plumbing=True),
        *_stopped([one for one in summary.stopped if one.plumbing]),
    ]
    return "\n".join(parts).rstrip()


def _controls(contrasts: Sequence[Contrast]) -> list[str]:
    if not contrasts:
        return ["No random-coder or random-subject control in this run: the only null below is other latents'", ""]
    rows = [
        (
            f"{_short(c.coder)} {c.explainer}".strip(),
            c.quantity,
            ROLE_TEXT[c.role],
            bracket(c.trained, digits=2),
            bracket(c.null, digits=2),
            bracket(c.difference, sign=True, digits=2),
        )
        for c in contrasts
    ]
    heads = ("coder", "quantity (median over latents)", "against", "trained", "null", "trained − null")
    return _table("Trained against nulls that collect anew (95 % intervals)", heads, rows, left=3)


def _latents(coders: Sequence[CoderSummary]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for coder in coders:
        rows.append(
            (
                _short(coder.name),
                f"{coder.n_latents:,}",
                f"{coder.n_alive:,}",
                f"{coder.n_selected:,}",
                f"{coder.n_explained:,}",
                f"{coder.n_skipped:,}",
                number(coder.fvu, digits=3),
                number(coder.l0, digits=1),
                bracket(coder.entropy, digits=2),
            )
        )
    heads = ("coder", "latents", "alive", "selected", "explained", "skipped", "FVU", "L0", "token entropy, bits")
    lines = _table("Latents", heads, rows)
    for coder in coders:
        for warning in coder.warnings:
            lines.insert(-1, f"  warning: {_short(coder.name)} {visible_line(warning)}")
        for stage, reason, n in coder.skipped:
            lines.insert(-1, f"  {_short(coder.name)}: {n:,} skipped at {stage}: {visible_line(reason)}"[:WIDTH])
    return lines


def _certified(found: Sequence[Certified]) -> list[str]:
    lines = [certified_line(one) for one in found]
    return [*lines, ""] if lines else []


def certified_line(one: Certified) -> str:
    """Return how many latents of a coder are certified, and for what."""
    return (
        f"{_short(one.coder)}: {len(one.latents):,} of {one.n:,} latents certified above {one.level:g} by "
        f"{visible_line(one.scorer)} ({one.correction}, false-discovery rate {one.rate:g})"
    )


def certified_text(found: Sequence[Certified]) -> str:
    """Return certified lists: how many latents of each coder, and which."""
    lines = []
    for one in found:
        lines.append(certified_line(one))
        kind = "e-value" if one.correction == "e-bh" else "p-value"
        lines += [f"  {index:>8}  {number(score)}  {kind} {value:.3g}" for index, score, value in one.latents]
    return "\n".join(lines)


def _stopped(found: Sequence[Stopped]) -> list[str]:
    return [stopped_text(found), ""] if found else []


def stopped_text(found: Sequence[Stopped]) -> str:
    """Return what came of judging only as much as needed: of each scorer its decisions and its cost."""
    lines = []
    for one in found:
        asked = [f"--certify {one.certify:g}"] if one.certify is not None else []
        asked += [f"--stop-when {one.stop_when:g}"] if one.stop_when is not None else []
        note = f" ({PLUMBING})" if one.plumbing else ""
        lines.append(
            f"{_short(one.coder)} {visible_line(one.explainer)}, {visible_line(one.scorer)} with {' '.join(asked)}: "
            f"{len(one.latents):,} latents{note}"
        )
        lines += [f"  {line}" for line in (*_certify_lines(one), *_width_lines(one))]
    return "\n".join(lines)


def _certify_lines(one: Stopped) -> list[str]:
    if one.certify is None:
        return []
    above, below, undecided = one.decisions
    share = 1 - one.judgements / one.fixed_test if one.fixed_test else math.nan
    than = f"{percent(abs(share))} {'more' if share < 0 else 'fewer'} than"
    return [
        f"{above:,} at least {one.certify:g}, {below:,} at most {one.certify - one.margin:g}, {undecided:,} undecided",
        f"{one.judgements:,} judgements, {than} the {one.fixed_test:,} of a fixed test of equal errors",
    ]


def _width_lines(one: Stopped) -> list[str]:
    if one.stop_when is None:
        return []
    used, fixed = one.fixed_width
    return [
        f"{one.narrow:,} with an interval within ±{one.stop_when:g} that holds at any time",
        f"{used:,} judgements; numbers fixed beforehand take {fixed:,} for the same widths",
    ]


def _scores(coders: Sequence[CoderSummary], *, plumbing: bool) -> list[str]:
    """Return the table of scores beside their nulls: those that are measurements, or those that only check."""
    rows = [
        (
            f"{_short(coder.name)} {explainer.name}",
            s.scorer,
            metric_text(s.metric),
            f"{s.n:,}",
            bracket(s.median, digits=2),
            number(s.null_mean.value),
            bracket(s.lift, sign=True, digits=2),
        )
        for coder in coders
        for explainer in coder.explainers
        for s in explainer.scorers
        if s.plumbing == plumbing
    ]
    if not rows:
        return []
    heads = ("coder", "scorer", "metric", "n", "median score", "null mean", "lift over null")
    title = "Scores beside their nulls (medians over latents)"
    return _table(f"{PLUMBING.capitalize()}: {title}" if plumbing else title, heads, rows, left=3)


def _executed(coders: Sequence[CoderSummary]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    names = ("auprc_bigram", "auprc_token", "auprc_token_set", "auprc_unigram")
    for coder in coders:
        for explainer in coder.explainers:
            parts = ([explainer.executed] if explainer.executed else []) + list(explainer.thirds)
            for part in parts:
                baselines = dict(part.baselines)
                lifts = dict(part.lifts)
                bigram = lifts.get("auprc_bigram")
                rows.append(
                    (
                        _short(coder.name) if part.name == "all" else f"  {part.name}",
                        f"{part.n:,}",
                        small(part.metric("base_rate").value),
                        bracket(part.metric("auprc"), digits=2),
                        *(number(baselines[n].value) if n in baselines else NONE for n in names),
                        NONE if bigram is None else bracket(bigram, sign=True, digits=2),
                    )
                )
    if not rows:
        return []
    heads = ("coder", "n", "base rate", "rule", *(_HEADS[n] for n in names), "rule − bigram")
    return _table("Median held-out AUPRC of the rules and of what needs no rule", heads, rows)


_HEADS = {"auprc_bigram": "bigram", "auprc_token": "token", "auprc_token_set": "12-set", "auprc_unigram": "unigram"}
assert set(_HEADS) == set(BASELINES)


def _short(name: str, width: int = _NAME) -> str:
    """Return a coder's name cut in its middle to fit."""
    shown = visible_line(name)
    if len(shown) <= width:
        return shown
    tail = width // 2
    return f"{shown[: width - tail - 1]}…{shown[-tail:]}"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return an aligned table: the first ``left`` columns to the left, the others to the right.

    The first column gives way, cut in the middle, when the table would be too wide.
    """
    widths = [max(len(heads[i]), *(len(row[i]) for row in rows)) for i in range(len(heads))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - len(gap) * (len(widths) - 1)))

    def line(cells: Sequence[str]) -> str:
        cut = (_short(cells[0], widths[0]), *cells[1:])
        padded = enumerate(zip(cut, widths, strict=True))
        return gap.join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in padded)

    rule = gap.join("─" * w for w in widths)
    return [title, line(heads).rstrip(), rule, *(line(row).rstrip() for row in rows), ""]
