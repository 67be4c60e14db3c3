"""What a validation found, as lines for a terminal and as a page of the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from exegete.testing.faults import Fault
from exegete.testing.figures import (
    PASSING,
    Share,
    bias_of,
    checked_metrics,
    coverage_of,
    ordering_of,
    passes,
    rows_of,
    sanity_of,
)
from exegete.testing.gaps import KINDS, WRONG
from exegete.testing.instruments import GAP
from exegete.testing.validation import Examined, Validation
from exegete.testing.worlds import DAMAGED

COMMAND: Final = "exegete validate --scorers all --page docs/validation.md"
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
{v.test_documents} documents. Each has a ladder of explanations that can be executed: its own program (*exact*), one
that fires elsewhere too (*broad*), one that misses much (*narrow*), one half of a union (*half*), the program of its
sibling, which overlaps it (*sibling*), and that of an unrelated latent (*random*). Every scorer then runs as it would
in a run, from selecting windows to intervals, with a simulated judge in place of a language model: what fits is called
fitting with probability {tpr:g}, what does not with {fpr:g}. Simulated readers and embedders put evidence of the same
strength on texts. A judge sees the window alone, as language models do, so that even exact explanations of latents
that depend on what stands before it score below the best.

The *true* score of a rung is computed by executing its program over every test window, silent windows of three kinds
(same token, neighbour, random) in equal parts. {v.rounds} draws of {v.n} firing and {v.n} silent windows a latent were
judged, with seed {v.seed} and those after it.
"""


_EXPLAINED: Final = {
    "Bias and coverage": "The mean difference from the true score with its standard error, the spread of single scores "
    "around it, and how often the 95 % interval held it, over all latents, rungs and draws (with Wilson's interval). "
    "The true score of an intruder test is that of the trials as they were dealt. Intervention runs on a subject "
    "without layers in which every latent makes the tokens it fires on likelier, so that the effect of an edit can be "
    "computed by hand; its true score is that over all prompts.",
    "Order of the ladder": f"How often two rungs of a latent come out in the order of their true scores. *Far* pairs "
    f"differ by {GAP:g} at least (discrimination: by 16 % of all bits, as {GAP:g} is 16 % of the way from chance to a "
    "perfect balanced accuracy); *lowest* is the pair of rungs least often right. For *near* pairs the predicted share "
    "comes from simulated draws of the frame, and the last column is the difference in Monte-Carlo standard errors.",
    "Power": "The share of far pairs in the right order by the number of windows of each class, measured / predicted.",
    "Sanity checks": f"In how many latents a metric falls when half of what the exact explanation fits is taken away, "
    "and when as much that is wrong is added; in brackets by how much, on average. A metric passes above "
    f"{PASSING:.0%} in both. What is added fits few silent windows where a latent fires rarely, so that a judge's own "
    "false positives may hide it at this number of windows.",
    "Hard negatives": f"The share of latents in which the true balanced accuracy of a wrong explanation lies at least "
    f"{GAP:g} below the exact one's, by the kind of silent windows it is judged on.",
    "What discrimination adds": "The share of latents of which discrimination tells the wrong explanation from the "
    "exact one by its bits, all latents wearing the same rung; and the same share of those latents whose gap in "
    f"balanced accuracy on random silent windows is below {GAP:g}.",
    "Faults of a judge": "Detection by judges with one fault each, with 1 and with 5 examples in a request: the bias, "
    "how often the interval held the true score, and how often the bounds widened for failures did. A reply that "
    "cannot be read is asked for once more.",
}


def _tables(v: Validation) -> Iterable[tuple[str, Table]]:
    explained = rows_of(v.examined, explained=True)
    yield "Bias and coverage", _bias(v.examined)
    if explained:
        yield "Order of the ladder", _order(explained)
        yield "Power", _power(explained)
        yield "Sanity checks", _sanity(explained)
    yield "Hard negatives", _negatives(v)
    yield "What discrimination adds", _added(v)
    yield "Faults of a judge", _faults(v.faults)


def _bias(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        bias, held = bias_of(one.full), coverage_of(one.full)
        value = f"{bias.value:+.4f} ± {bias.error:.4f}" if held.n else "–"
        spread = f"{bias.spread:.3f}" if held.n else "–"
        rows.append((one.name, one.headline, value, spread, _within(held), f"{held.n}"))
    return ("scorer", "metric", "bias", "spread", "coverage", "intervals"), rows


def _order(examined: Sequence[Examined]) -> Table:
    rows: list[Sequence[str]] = []
    for one in examined:
        found = ordering_of(one, one.full)
        first, second, lowest = found.lowest
        rows.append(
            (
                one.name,
                f"{found.right.n}",
                _percent(found.right.value),
                f"{first}, {second}: {_percent(lowest.value)} of {lowest.n}",
                f"{found.near.n}",
                _percent(found.near.value),
                _percent(found.near_predicted),
                f"{found.deviation:+.1f}",
            )
        )
    head = ("scorer", "far pairs", "right", "lowest", "near pairs", "right", "predicted", "difference")
    return head, rows


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
        for metric in checked_metrics(one.full):
            found = sanity_of(one.full, metric)
            shares = [f"{_percent(found[how].share.value)} ({found[how].mean:+.3f})" for how in DAMAGED]
            rows.append((one.name, metric, *shares, "yes" if passes(found) else "no"))
    return ("scorer", "metric", "half missing", "as much wrong added", "passes"), rows


def _negatives(v: Validation) -> Table:
    rows: list[Sequence[str]] = []
    for rung in WRONG:
        shares = [v.gaps.reached(kind, rung) for kind in KINDS]
        rows.append((rung, *(_of(share, n) for share, n in shares)))
    return ("explanation", *KINDS), rows


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


def _of(share: float, n: int) -> str:
    return f"{_percent(share)} of {n}" if n else "–"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
