"""What a validation found, as lines for a terminal and as a page of the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from exegete.testing.faults import Fault
from exegete.testing.figures import (
    COVERED,
    ORDERED,
    PASSING,
    REACHED,
    Share,
    bias_of,
    checked_metrics,
    coverage_of,
    needed,
    ordering_of,
    passes,
    rows_of,
    sanity_of,
    true_falls,
)
from exegete.testing.gaps import KINDS, WRONG
from exegete.testing.instruments import GAP
from exegete.testing.validation import Examined, Validation
from exegete.testing.worlds import DAMAGED

COMMAND: Final = "exegete validate --scorers all --page docs/validation.md"
VERDICTS: Final = ("met", "open", "not met")
MOST_OFF: Final = 3.0
"""Monte-Carlo standard errors that the order of near pairs may lie off what is predicted."""
HARD: Final = "same token or neighbour"
Table = tuple[Sequence[str], list[Sequence[str]]]


def validation_lines(validation: Validation) -> list[str]:
    """Return the figures of a validation as plain lines."""
    lines = []
    for title, (head, rows) in _tables(validation):
        lines += [title, *_columns([head, *rows]), ""]
    return lines[:-1]


def validation_page(validation: Validation) -> str:
    """Return a validation as a page of Markdown."""
    parts = [_opening(validation)]
    for title, (head, rows) in _tables(validation):
        parts.append(f"## {title}\n\n{_EXPLAINED[title]}\n\n{_markdown(head, rows)}\n")
    return "\n".join(parts)


def _opening(v: Validation) -> str:
    tpr, fpr = v.evidence.true_positive_rate, v.evidence.false_positive_rate
    return f"""# Scorers against known truth

*Made by `{COMMAND}`; nothing on this page is written by hand.*

{v.latents} latents whose truth is a program over tokens ({", ".join(v.kinds)}) are planted in the standard library's
text, two siblings at a time, and their firings written into a store: {v.test_windows:,} test windows of
{v.test_documents} documents. Each has a ladder of explanations that can be executed, its rungs: its own program
(*exact*), one that fires elsewhere too (*broad*), one that misses much (*narrow*), one half of a union (*half*), the
program of its sibling, which overlaps it (*sibling*), and that of an unrelated latent (*random*). Every scorer then
runs as it would in a run, from selecting windows to intervals, with a simulated judge in place of a language model:
what fits is called fitting with probability {tpr:g}, what does not with {fpr:g}. Simulated readers and embedders put
evidence of the same strength on texts. A judge sees the window alone, as language models do, so that even exact
explanations of latents that depend on what stands before it score below the best.

The *true* score of a rung is computed by executing its program over every test window, each counting as often as it is
drawn on average; silent windows are of three kinds (same token, neighbour, random) in equal parts. {v.rounds} draws
were judged, with seed {v.seed} and those after it, each of {v.n} firing and {v.n} silent windows a latent, or of all
there are. `fuzzing_active` makes both classes of the firing windows, and gets twice as many of them; `discrimination`
leaves out those on which a neighbour fires too, and gets so many more, up to five times; `generation` gets {v.n} texts
that are to fit and {v.n} that are not; `intervention` {v.n} prompts. What takes long is run on one latent of three.

Shares stand with Wilson's 95 % interval in brackets, which takes what it counts for independent. A goal is *met* where
that interval lies above it, *not met* where it lies below, and *open* where it holds the goal: of fewer than 73 that
all came out right nobody can tell whether 95 % would.
"""


def _goal(share: float) -> str:
    return f"{100 * share:.0f} %"


_EXPLAINED: Final = {
    "Bias and coverage": "*Bias* is the mean difference of scores from the true ones, with its standard error; "
    "*spread* how far single scores lie around them (standard deviation); *coverage* how often the 95 % interval "
    "held the true score, over all latents, rungs and draws. The goal is that of every interval here: at least "
    f"{_goal(COVERED)}. *AUROC* is the chance that a firing window gets more evidence than a silent one. The true "
    "score of an intruder test is that of the trials as they were dealt. Intervention runs on a subject without "
    "layers, in which every latent makes the tokens it fires on likelier and the next token depends on the last "
    "alone. So the probability that tokens gain (`intervention_tokens`) is computed by hand, and so is how many "
    "covered tokens are to be expected in what it writes. The reader of `intervention` takes tokens of a text for "
    "covered by the explanation as often as the judge does, and each is worth one nat (unit of log probability) to "
    "it. Nothing of this is simulated but how often each prompt is drawn, for which prompts are drawn 300 times. "
    "Where all prompts of a latent end in the same token, nothing scatters, and an interval has no width; such are "
    "not among those counted.",
    "Order of the ladder": "How often two rungs of a latent come out in the order of their true scores. *Far* pairs "
    f"differ by {GAP:g} at least (discrimination: by 16 % of all bits, as {GAP:g} is 16 % of the way from chance to "
    f"a perfect balanced accuracy; intervention in nats: by {GAP:g} of each of 8 tokens). The goal is "
    f"{_goal(ORDERED)} of them; *by pair* says of how many pairs of rungs it is met, open, and not met; they are "
    "listed at the end of the page. For *near* pairs the predicted share comes from simulated draws of the windows "
    "and a judge's errors. The last columns are the difference from it in Monte-Carlo standard errors, and whether "
    "it is within 3 of them.",
    "Power": "The share of far pairs in the right order by the number of windows of each class (texts of each kind, "
    "prompts), measured / predicted.",
    "Sanity checks": "In which share of latents the first metric of a scorer falls when half of what the exact "
    "explanation fits is taken away (*missing*), and when as much that is wrong is added (*added*), measured and "
    f"true. A scorer passes where both measured shares are above {_goal(PASSING)}. *Needed* says with how many "
    "windows of each class it would, from the simulated draws. What is added are as many windows as the explanation "
    "fits, from anywhere: of a latent that fires in 2 % of windows they are 2 % of the silent ones, which is little "
    "beside what the judge itself takes for fitting by mistake.",
    "Sanity checks by metric": "The same for every metric as measured. Metrics of the firing windows alone "
    "(sensitivity, recall) cannot see what is added, those of the silent ones alone (specificity) cannot see what "
    "is missing; precision, purity and what is reweighted to how rarely a latent fires rest on the few silent "
    "windows that are wrongly called fitting, and scatter more than they fall.",
    "Hard negatives": "The share of latents in which the true balanced accuracy of a wrong explanation lies at "
    f"least {GAP:g} below the exact one's, by the kind of silent windows it is judged on. The goal is "
    f"{_goal(REACHED)} for broad and sibling explanations on windows with the same token or of neighbours.",
    "What discrimination adds": "The share of latents of which discrimination tells the wrong explanation from the "
    "exact one by its bits, all latents wearing the same rung; and the same share of those latents whose gap in "
    f"balanced accuracy on random silent windows is below {GAP:g}.",
    "Faults of a judge": "Detection by judges with one fault each, with 1 and with 5 examples in a request: the "
    "bias, how often the interval held the true score, and how often the bounds widened for failures did. A reply "
    "that cannot be read is asked for once more. *Position bias* moves the first example of a request towards a yes "
    "and the last towards a no; with *cross-talk* the examples of a request draw each other along.",
    "Every pair of rungs": "How often each pair of rungs, where far apart, came out in the right order, by scorer; "
    f"the goal is {_goal(ORDERED)}. *Predicted* is from simulated draws.",
}


def _tables(v: Validation) -> Iterable[tuple[str, Table]]:
    explained = rows_of(v.examined, explained=True)
    yield "Bias and coverage", _bias(v.examined)
    if explained:
        yield "Order of the ladder", _order(explained)
        yield "Power", _power(explained)
        yield "Sanity checks", _sanity(explained)
        yield "Sanity checks by metric", _by_metric(explained)
    yield "Hard negatives", _negatives(v)
    yield "What discrimination adds", _added(v)
    yield "Faults of a judge", _faults(v.faults)
    if explained:
        yield "Every pair of rungs", _every_pair(explained)


def _bias(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        bias, held = bias_of(one.full), coverage_of(one.full)
        value = f"{bias.value:+.4f} ± {bias.error:.4f}" if held.n else "–"
        spread = f"{bias.spread:.3f}" if held.n else "–"
        told = [_within(held), f"{held.n}", _goal(COVERED), held.verdict(COVERED)]
        rows.append((one.name, one.headline, value, spread, *told))
    return ("scorer", "metric", "bias", "spread", "coverage", "intervals", "goal", "coverage goal"), rows


def _order(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        found = ordering_of(one, one.full)
        verdicts = [share.verdict(ORDERED) for _, _, share, _ in found.pairs]
        right = found.right
        rows.append(
            (
                one.name,
                f"{right.n}",
                _within(right),
                _goal(ORDERED),
                right.verdict(ORDERED) if right.n else "–",
                " / ".join(str(verdicts.count(verdict)) for verdict in VERDICTS),
                f"{found.near.n}",
                _percent(found.near.value),
                _percent(found.near_predicted),
                f"{found.deviation:+.1f}",
                "met" if abs(found.deviation) <= MOST_OFF else "not met",
            )
        )
    by_pair = "by pair: " + " / ".join(VERDICTS)
    far = ("far pairs", "right", "goal", "order", by_pair)
    return ("scorer", *far, "near pairs", "right", "predicted", "difference", "within 3"), rows


def _every_pair(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        for first, second, share, predicted in ordering_of(one, one.full).pairs:
            told = [_within(share), f"{share.n}", _percent(predicted), _goal(ORDERED), share.verdict(ORDERED)]
            rows.append((one.name, f"{first}, {second}", *told))
    return ("scorer", "rungs", "right", "pairs", "predicted", "goal", "order"), rows


def _power(examined: Sequence[Examined]) -> Table:
    sizes = sorted({trials.n for one in examined for trials in one.trials})
    rows: list[Sequence[str]] = []
    for one in examined:
        by_size = {trials.n: ordering_of(one, trials) for trials in one.trials}
        cells = [f"{_percent(by_size[n].right.value)} / {_percent(by_size[n].predicted)}" for n in sizes]
        rows.append((one.name, *cells))
    return ("scorer", *(f"n = {n}" for n in sizes)), rows


def _sanity(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        found, true = sanity_of(one.full, one.headline), true_falls(one.full)
        cells = []
        for how in DAMAGED:
            cells.append(f"{_percent(found[how].share.value)} / {_percent(true[how].share.value)}")
            cells.append(_count(needed(one.full, how)))
        passed = passes(found)
        rows.append((one.name, one.headline, *cells, "yes" if passed else "no", "" if passed else _why(one)))
    head = ("missing: measured / true", "needed", "added: measured / true", "needed", "passes", "if not, why")
    return ("scorer", "metric", *head), rows


def _why(one: Examined) -> str:
    """Return in one sentence why a headline score does not pass both checks."""
    found, true, spread = sanity_of(one.full, one.headline), true_falls(one.full), bias_of(one.full).spread
    said = []
    for how, name in zip(DAMAGED, ("what is missing", "what is added"), strict=True):
        if found[how].share.value > PASSING:
            continue
        if how in one.blind:
            said.append(f"it does not see {name}, since {one.blind[how]}")
        elif true[how].share.value <= PASSING:
            said.append(f"in {_percent(1 - true[how].share.value)} of latents {name} does not lower the true score")
        else:
            fall = f"{name} lowers the true score by {true[how].mean:.3f} on average"
            said.append(f"{fall}, while single scores scatter by {spread:.3f}")
    return "; ".join(said)


def _by_metric(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        passing: dict[tuple[bool, ...], list[str]] = {}
        for metric in checked_metrics(one.full):
            found = sanity_of(one.full, metric)
            key = tuple(found[how].share.value > PASSING for how in DAMAGED)
            shares = " / ".join(f"{100 * found[how].share.value:.0f}" for how in DAMAGED)
            passing.setdefault(key, []).append(f"{metric} ({shares})")
        kinds = ((True, True), (True, False), (False, True), (False, False))
        rows.append((one.name, *(", ".join(passing.get(kind, ["–"])) for kind in kinds)))
    return ("scorer", "both (missing / added, %)", "missing only", "added only", "neither"), rows


def _negatives(v: Validation) -> Table:
    rows: list[Sequence[str]] = []
    for rung in WRONG:
        shares = {kind: v.gaps.reached(kind, rung) for kind in KINDS}
        share, n = shares[HARD]
        told = Share.of(round(share * n), n).verdict(REACHED) if n and rung in ("broad", "sibling") else ""
        rows.append((rung, *(_of(share, n) for share, n in shares.values()), told))
    return ("explanation", *KINDS, f"goal of {_goal(REACHED)}"), rows


def _added(v: Validation) -> Table:
    rows: list[Sequence[str]] = []
    for rung in WRONG:
        rows.append((rung, _of(*v.gaps.told_apart(rung)), _of(*v.gaps.added("random", rung))))
    return ("explanation", "told apart", "where random silent windows do not"), rows


def _faults(faults: Sequence[Fault]) -> Table:
    rows: list[Sequence[str]] = [
        (f.name, f"{f.per_request}", f"{f.bias:+.4f}", _percent(f.covered), _percent(f.bounded), _percent(f.failed))
        for f in faults
    ]
    return ("fault", "examples in a request", "bias", "covered", "widened", "failed"), rows


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _within(share: Share) -> str:
    return "–" if not share.n else f"{_percent(share.value)} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def _count(n: float) -> str:
    return f"{n:.2g}" if n < 100 else f"{round(n, 1 - math.floor(math.log10(n))):,.0f}" if math.isfinite(n) else "–"


def _of(share: float, n: int) -> str:
    return f"{_percent(share)} of {n}" if n else "–"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
