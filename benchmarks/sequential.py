"""What judging in rounds costs, and whether what it says holds: tables on stdout, kept in results/sequential.md.

    python -m benchmarks.sequential [--latents 1000] [--lists 40] [--save]

Costs of the test are exact (chances carried from pair to pair); everything else is simulated with the rounds that ship,
on latents whose balanced accuracy is known. Takes about two minutes on one core with the numbers above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, repeat

import numpy as np
from benchmarks.machine import RESULTS, describe, save_section
from benchmarks.sequential_setting import Drawn, Judging, latent, name_of
from scipy import stats

from exegete.metrics import Observed
from exegete.metrics.certified import certified, e_value, p_value
from exegete.metrics.sequential import Operating, RatioTest, fixed_pairs, operating, pair_means
from exegete.scorers.sequential import Outcome, Rounds, Stopping, Tested, drawn_order, half_width, round_pairs
from exegete.types import Array

TEST = RatioTest(level=0.8)
POPULATION = stats.beta(6, 2.2)
CELLS = 200
"""Values of balanced accuracy that stand for the population, each in the middle of its part of 0…1."""
PLAIN = Judging(name="answers independent, both classes alike")
JUDGINGS = (
    PLAIN,
    Judging(name="specificity .3 above sensitivity", apart=0.3),
    Judging(name="sensitivity falls by .4 over deciles", falling=0.4),
    Judging(name="120 windows of a class in the frame, answers fixed", frame=120, fixed=True),
    *(
        Judging(name=f"documents differ, ICC .1, {n} documents in the frame", correlation=0.1, documents=n)
        for n in (10, 20, 40)
    ),
    *(
        Judging(name=f"the same, over documents drawn anew, {n}", correlation=0.1, documents=n, over="documents")
        for n in (10, 20, 40)
    ),
)


def schedule(pairs: int, per_request: int) -> list[int]:
    """Return how many pairs are judged after each round, up to all there are."""
    done = accumulate(repeat(0), lambda n, _: n + round_pairs(n, per_request))
    found: list[int] = []
    for n in done:
        if n >= pairs:
            return [*found, pairs]
        if n:
            found.append(n)
    raise AssertionError("rounds go on for ever")


def over_population(test: RatioTest, per_request: int, pairs: int = 100) -> Operating:
    """Return how a test does on average over the population."""
    values = (np.arange(CELLS) + 0.5) / CELLS
    weights = POPULATION.pdf(values)
    weights /= weights.sum()
    rounds = schedule(pairs, per_request)
    each = [operating(test, v, v, rounds) for v in values.tolist()]
    return Operating(
        certified=float(weights @ [o.certified for o in each]),
        rejected=float(weights @ [o.rejected for o in each]),
        judgements=float(weights @ [o.judgements for o in each]),
    )


def run_rounds(stopping: Stopping, drawn: Sequence[Drawn], *, per_request: int = 5) -> list[Outcome]:
    """Judge latents in rounds, all as one block."""
    tested = [Tested(seed=0, latent=name_of(i), windows=d.windows) for i, d in enumerate(drawn)]
    rounds = Rounds(stopping, tested, per_request=per_request)
    while asked := rounds.draw():
        for place, which in asked:
            rounds.tell(place, (drawn[place].right[which] == drawn[place].windows.fires[which]).tolist())
    return [rounds.outcome(place) for place in range(len(drawn))]


def observed(drawn: Drawn) -> Observed:
    """Return all drawn windows as judged."""
    windows = drawn.windows
    return Observed(
        truth=windows.fires,
        prediction=(drawn.right == windows.fires).astype(np.int8),
        score=np.full(len(windows), np.nan),
        stratum=windows.stratum,
        document=windows.document,
        probability=windows.probability,
        multiplicity=windows.multiplicity,
        activation=windows.activations.max(axis=1).astype(np.float64),
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_value() -> str:
    """Say what certifying costs at each balanced accuracy."""
    fixed, rounds = 2 * fixed_pairs(TEST), schedule(100, 5)
    rows = []
    for value in (0.5, 0.6, 0.65, 0.7, 0.725, 0.75, 0.8, 0.85, 0.9, 0.95):
        o = operating(TEST, value, value, rounds)
        rows.append(
            [f"{value:g}", f"{o.judgements:.1f}", f"{1 - o.judgements / fixed:+.0%}", f"{o.certified:.3f}",
             f"{o.rejected:.3f}", f"{abs(1 - o.certified - o.rejected):.3f}"]
        )  # fmt: skip
    head = ["balanced accuracy", "judgements", "saved", "certified", "turned down", "undecided after 200"]
    return f"The fixed test of the same errors takes {fixed} judgements.\n\n" + table(head, rows)


def by_request() -> str:
    """Say what certifying costs over the population, for levels, margins and sizes of requests."""
    rows = []
    cases = [(0.8, 0.15, 1), (0.8, 0.15, 5), (0.8, 0.15, 10), (0.7, 0.15, 5), (0.9, 0.15, 5), (0.8, 0.1, 5)]
    for level, margin, per_request in cases:
        test = RatioTest(level=level, margin=margin)
        pairs = max(100, 2 * fixed_pairs(test))
        fixed, o = 2 * fixed_pairs(test), over_population(test, per_request, pairs)
        rows.append(
            [f"{level:g}", f"{margin:g}", str(per_request), str(fixed), f"{o.judgements:.1f}",
             f"{1 - o.judgements / fixed:.1%}", f"{o.certified:.3f}", f"{o.rejected:.3f}"]
        )  # fmt: skip
    head = ["certify", "margin", "windows per request", "fixed test", "judgements", "saved", "certified", "turned down"]
    return table(head, rows)


def a_block(n: int, seed: int = 1) -> str:
    """Say what a block of latents costs in simulation, with the budget of the fixed test shared among them."""
    rng = np.random.default_rng(seed)
    values = POPULATION.rvs(n, random_state=rng)
    drawn = [latent(PLAIN, value, rng) for value in values]
    outcomes = run_rounds(Stopping(certify=TEST.level), drawn)
    asked = np.array([len(o.asked) for o in outcomes])
    fixed = 2 * fixed_pairs(TEST)
    right = np.array([o.certified == bool(v >= TEST.level) for o, v in zip(outcomes, values, strict=True)])
    clear = (values <= TEST.null) | (values >= TEST.level)
    undecided = np.array([o.certified is None for o in outcomes])
    return (
        f"{n} latents as one block: {asked.mean():.1f} judgements a latent ({1 - asked.mean() / fixed:.1%} fewer than "
        f"{fixed}), {np.mean(asked > fixed):.1%} of latents went on beyond {fixed} with what others had left, "
        f"{undecided.mean():.1%} ended undecided; of the latents outside the margin {np.mean(right[clear]):.1%} were "
        f"decided rightly and {np.mean(~right[clear] & ~undecided[clear]):.1%} wrongly."
    )


def share(values: Array) -> str:
    """Write a share with its standard error."""
    mean = float(np.mean(values))
    return f"{mean:.3f} ± {np.sqrt(max(mean * (1 - mean), 1e-9) / len(values)):.3f}"


def settled(judging: Judging, level: float, n: int, rng: np.random.Generator) -> list[tuple[bool | None, int]]:
    """Return the decisions about n latents that may spend all their windows, and the judgements each takes.

    In rounds the first pair past a bound decides and the round is paid for, so the decision can be read off at once.
    """
    rounds, found = np.array(schedule(judging.drawn, 5)), []
    for index in range(n):
        drawn = latent(judging, level, rng)
        order = drawn_order(Tested(seed=0, latent=name_of(index), windows=drawn.windows))
        right, fires = drawn.right[order], drawn.windows.fires[order]
        pairs = pair_means(right[fires], right[~fires])
        ratios, (down, up) = TEST.log_ratios(pairs), TEST.bounds()
        crossed = np.flatnonzero((ratios <= down) | (ratios >= up))
        end = int(crossed[0]) + 1 if len(crossed) else judging.drawn
        found.append((TEST.decide(pairs)[0], 2 * int(rounds[np.searchsorted(rounds, end)])))
    return found


def errors(judging: Judging, n: int, seed: int = 2) -> tuple[Array, Array, Array]:
    """Return of n latents on either border which were certified and turned down, and the judgements of both."""
    rng = np.random.default_rng(seed)
    bad, good = (settled(judging, level, n, rng) for level in (TEST.null, TEST.level))
    return (
        np.array([decision is True for decision, _ in bad]),
        np.array([decision is False for decision, _ in good]),
        np.array([asked for _, asked in (*bad, *good)]),
    )


def misses(
    judging: Judging, n: int, seed: int = 3, width: float = 0.1, level: float = 0.8
) -> tuple[Array, list[Outcome]]:
    """Return which intervals at stopping leave out the balanced accuracy they are of, and the outcomes."""
    rng = np.random.default_rng(seed)
    outcomes = run_rounds(Stopping(stop_when=width), [latent(judging, level, rng) for _ in range(n)])
    found = [o.figures["balanced_accuracy"] for o in outcomes]
    return np.array([not i.low <= level <= i.high for i in found]), outcomes


def evidence(judging: Judging, n: int, seed: int = 4, level: float = 0.8) -> tuple[Array, Array]:
    """Return e-values and p-values of latents exactly at the level that is to be certified, all windows judged."""
    rng = np.random.default_rng(seed)
    judged = [observed(latent(judging, level, rng)) for _ in range(n)]
    return np.array([e_value(o, level) for o in judged]), np.array([p_value(o, level) for o in judged])


def by_judging(n: int) -> str:
    """Say whether errors, intervals and evidence hold for judges that err in different ways."""
    rows = []
    for judging in JUDGINGS:
        wrong, lost, asked = errors(judging, n)
        missed, _ = misses(judging, n // 4)
        e, p = evidence(judging, n)
        rows.append(
            [judging.name, share(wrong), share(lost), f"{asked.mean():.0f}", share(missed),
             f"{e.mean():.2f} ± {e.std() / np.sqrt(n):.2f}", share(e >= 20), share(p <= 0.05), share(p <= 0.01)]
        )  # fmt: skip
    head = ["judge", "certified at .65", "turned down at .80", "judgements", "interval misses .80", "mean e at .80",
            "e ≥ 20", "p ≤ .05", "p ≤ .01"]  # fmt: skip
    return table(head, rows)


def of_lists(judging: Judging, lists: int, m: int = 100, q: float = 0.1, seed: int = 5) -> list[list[float]]:
    """Return false-discovery rate and power of e-BH, BY and BH over lists of m latents that share their documents.

    Half are at the level, .8, half at .9; an easy document is easy for all of them.
    """
    rng = np.random.default_rng(seed)
    found = np.zeros((lists, 3, 2))
    for number in range(lists):
        effects = rng.standard_normal(judging.documents)
        judged = [observed(latent(judging, 0.9 if i % 2 else 0.8, rng, effects)) for i in range(m)]
        e, p = [e_value(o, 0.8) for o in judged], [p_value(o, 0.8) for o in judged]
        made = (
            certified(range(m), q=q, e_values=e),
            certified(range(m), q=q, p_values=p, correction="by"),
            certified(range(m), q=q, p_values=p, correction="bh"),
        )
        for place, names in enumerate(made):
            false = sum(1 for i in names if i % 2 == 0)
            found[number, place] = false / max(len(names), 1), (len(names) - false) / (m / 2)
    means: list[list[float]] = found.mean(axis=0).tolist()
    return means


def by_list(lists: int) -> str:
    """Say whether lists keep their false-discovery rate when latents share documents."""
    shared = Judging(name="", correlation=0.1, documents=20)
    cases = [
        ("answers independent", PLAIN),
        ("documents differ, ICC .1, 20 in the frame", shared),
        ("the same, over documents drawn anew", replace(shared, over="documents")),
    ]
    rows = []
    for name, judging in cases:
        rows.append([name, *(f"{fdr:.3f} / {power:.2f}" for fdr, power in of_lists(judging, lists))])
    return table(["judge", "e-BH", "BY", "BH"], rows)


def of_widths(n: int) -> str:
    """Say what an interval that holds whenever one stops costs beside a fixed number of judgements."""
    rows = []
    for level in (0.65, 0.8, 0.9):
        for width in (0.12, 0.1, 0.08):
            judging = replace(PLAIN, frame=2000, drawn=300)
            missed, outcomes = misses(judging, n, width=width, level=level)
            asked = np.mean([len(o.asked) for o in outcomes])
            fixed = np.mean([o.detail["fixed_width"] for o in outcomes])
            reached = np.mean([half_width(o.figures["balanced_accuracy"]) for o in outcomes])
            rows.append(
                [f"{level:g}", f"{width:g}", f"{reached:.3f}", f"{asked:.0f}", f"{fixed:.0f}",
                 f"{asked / fixed:.2f}", share(missed)]
            )  # fmt: skip
    head = ["balanced accuracy", "±h", "reached", "judgements", "fixed number", "times", "misses"]
    return table(head, rows)


def about(latents: int, lists: int) -> str:
    """Say what was measured, and how the tables are read."""
    return f"""`python -m benchmarks.sequential --latents {latents} --lists {lists} --save`; {describe()}

Costs by balanced accuracy and over the population are exact; all else is simulated, with requests of five windows. A
pair is one firing and one silent window. *What holds for which judge* is of latents exactly on a border of the
test ({TEST.null:g}, where certifying is an error, and {TEST.level:g}, where turning down is), with all 200 windows to
spend; the interval is that of `--stop-when 0.1`; e- and p-values are of all 200 windows of latents exactly at
{TEST.level:g}. By design the errors are at most .05, intervals miss at most .05, the mean e-value is at most 1, e
passes 20 with a chance of at most .05, and p-values are at most uniform. Where documents differ this holds over the
frame that the windows were drawn from, which is what a score is about. It does not hold over documents drawn anew, the
less the fewer the frame has; below 20 a score carries `few_documents`."""


def main() -> None:
    """Print the tables, and keep them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1000, help="simulated latents a cell")
    parser.add_argument("--lists", type=int, default=40, help="simulated certified lists a row")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/sequential.md")
    given = parser.parse_args()
    file = RESULTS / "sequential.md"
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Judging in rounds", lambda: about(given.latents, given.lists)),
        (f"Certifying at {TEST.level:g} against {TEST.null:g}, errors .05", by_value),
        ("Certifying over latents like Beta(6, 2.2)", lambda: by_request() + "\n\n" + a_block(given.latents)),
        ("What holds for which judge", lambda: by_judging(given.latents)),
        ("Certified lists at q = .1: false-discovery rate / power", lambda: by_list(given.lists)),
        ("Intervals that hold whenever one stops", lambda: of_widths(given.latents // 20)),
    ]
    for title, body in sections:
        text = body()
        print(f"\n# {title}\n\n{text}", flush=True)
        if given.save:
            save_section(file, title, text)


if __name__ == "__main__":
    main()
