"""Every scorer run over latents of known truth: what it says beside what it must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np

from exegete.errors import InputError, unknown
from exegete.llm.scripted import Evidence
from exegete.progress import Progress, Silent
from exegete.streams import stream
from exegete.testing.acting import Stage
from exegete.testing.contrasts import Discriminating
from exegete.testing.faults import Fault, measure_faults
from exegete.testing.gaps import Gaps, measure_gaps
from exegete.testing.generating import Generating
from exegete.testing.instruments import Instrument, Known, Scores, detection, fuzzing
from exegete.testing.intervening import intervened
from exegete.testing.intruding import Intruding
from exegete.testing.latents import RUNGS
from exegete.testing.ranked import Embedded, ExampleEmbedded, Surprised
from exegete.testing.responses import order_power
from exegete.testing.settings import Round
from exegete.testing.simulating import Simulating
from exegete.testing.worlds import DAMAGED, World, make_world
from exegete.types import Array

ALL: Final = "all"
DRAWS: Final = 500
"""Simulated draws behind each predicted power."""
FRACTIONS: Final = (0.25, 0.5)
"""Parts of n at which power is measured besides n itself, on half of the latents."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trials:
    """What one instrument said of all latents with n windows a class.

    Rows are latents, round by round. ``expected`` [rows, rungs] are the true headline scores, ``value``, ``low`` and
    ``high`` what came out; ``power`` [rows, rungs, rungs] is how often each rung is predicted to come out above each
    other; ``metrics`` are the values of all metrics [rows, rungs].
    """

    n: int
    rungs: tuple[str, ...]
    expected: Array
    value: Array
    low: Array
    high: Array
    power: Array
    metrics: dict[str, Array]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examined:
    """One instrument over the testbed: its trials at each n, the largest last.

    ``gap`` is what true scores have to differ by to be told apart; without an explanation there is no ladder.
    ``blind`` says why the headline score need not fall, by what is done to an explanation.
    """

    name: str
    headline: str
    gap: float
    explained: bool
    trials: tuple[Trials, ...]
    blind: Mapping[str, str] = field(default_factory=dict)

    @property
    def full(self) -> Trials:
        """The trials with the most windows."""
        return self.trials[-1]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validation:
    """What the testbed found, and with what."""

    latents: int
    kinds: tuple[str, ...]
    n: int
    rounds: int
    seed: int
    evidence: Evidence
    test_windows: int
    test_documents: int
    examined: tuple[Examined, ...]
    gaps: Gaps
    faults: tuple[Fault, ...]


INSTRUMENTS: Final[Mapping[str, Callable[[Evidence], list[Instrument]]]] = {
    "detection": detection,
    "fuzzing": fuzzing,
    "surprisal": lambda evidence: [Surprised(evidence)],
    "embedding": lambda evidence: [Embedded(evidence)],
    "example_embedding": lambda evidence: [ExampleEmbedded(evidence)],
    "simulation": lambda evidence: [Simulating(evidence, how) for how in ("all_at_once", "whole_window")],
    "intruder": lambda evidence: [Intruding(evidence, kind) for kind in ("default", "internal", "decile")],
    "intervention": lambda evidence: intervened(evidence, Stage()),
    "generation": lambda evidence: [Generating(evidence, Stage())],
    "discrimination": lambda evidence: [Discriminating(evidence)],
}
"""What is validated under the name of a scorer."""


def instruments_of(scorers: Sequence[str], evidence: Evidence) -> list[Instrument]:
    """Return the instruments of these scorers, of all with ``all``. Raises NotFoundError for an unknown one."""
    names = list(dict.fromkeys(name for given in scorers for name in (INSTRUMENTS if given == ALL else (given,))))
    if not names:
        raise InputError(f"name the scorers to validate: {ALL}, or some of {', '.join(INSTRUMENTS)}")
    for name in names:
        if name not in INSTRUMENTS:
            raise unknown("scorer with a testbed", name, (ALL, *INSTRUMENTS))
    return [made for name in names for made in INSTRUMENTS[name](evidence)]


def validate(
    scorers: Sequence[str] = (ALL,),
    *,
    latents: int = 32,
    n: int = 100,
    rounds: int = 2,
    seed: int = 0,
    evidence: Evidence = Evidence(),  # noqa: B008 - frozen
    world: World | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Run scorers with simulated judges over planted latents and their ladders of explanations.

    ``n`` firing and n silent windows are drawn of each latent, by another draw in each round, and judged with the error
    rates of ``evidence``; power is measured with fewer windows too. ``world`` takes the place of planting ``latents``.
    Raises InputError for sizes that make no testbed, NotFoundError for a scorer that is not in it.
    """
    if latents < 4 or n < 10 or rounds < 1:
        raise InputError(f"a testbed has 4 latents, 10 windows and 1 round at least, got {latents}, {n} and {rounds}")
    instruments = instruments_of(scorers, evidence)
    sizes = sorted({size for size in (max(10, round(n * part)) for part in FRACTIONS) if size < n})
    told = progress or Silent()
    told.start("validate", (len(sizes) + rounds) * len(instruments) + 2, "runs")
    here = make_world(latents, seed=seed) if world is None else world
    found: list[list[Trials]] = [[] for _ in instruments]
    for size, number in [(size, 0) for size in sizes] + [(n, number) for number in range(rounds)]:
        made = Round(here, seed + number, size)
        rungs = RUNGS if size < n else (*RUNGS, *DAMAGED)
        part = 1 if size == n else 2
        for place, instrument in enumerate(instruments):
            found[place].append(_trials(instrument, made.only(part * instrument.every), rungs))
            told.advance(1)
    gaps = measure_gaps(made, evidence)
    told.advance(1)
    faults = measure_faults(made, evidence)
    told.advance(1)
    told.end()
    return Validation(
        latents=len(here.latents),
        kinds=tuple(dict.fromkeys(latent.kind for latent in here.latents)),
        n=n,
        rounds=rounds,
        seed=seed,
        evidence=evidence,
        test_windows=len(made.frame),
        test_documents=made.frame.n_documents,
        examined=tuple(_examined(*pair) for pair in zip(instruments, found, strict=True)),
        gaps=gaps,
        faults=faults,
    )


def _trials(instrument: Instrument, made: Round, rungs: tuple[str, ...]) -> Trials:
    """Run one instrument over all latents of a round."""
    if not instrument.explained:
        rungs = rungs[:1]
    made = made.drawing([instrument.wanted(setting) for setting in made.settings])
    known: list[Known] = []
    for setting in made.settings:
        rng = stream(made.seed, "power", instrument.name, made.n, setting.latent)
        known.append(instrument.known(setting, rungs, DRAWS, rng))
    measured = instrument.measured(made, rungs, made.seed)
    scores = [[measured[setting.latent, rung] for rung in rungs] for setting in made.settings]
    return Trials(
        n=made.n,
        rungs=rungs,
        expected=np.array([k.expected for k in known]),
        power=np.array([order_power(k.drawn) for k in known]),
        value=_column(scores, instrument.headline, "value"),
        low=_column(scores, instrument.headline, "low"),
        high=_column(scores, instrument.headline, "high"),
        metrics={metric: _column(scores, metric, "value") for metric in _metrics(scores)},
    )


def _metrics(scores: Sequence[Sequence[Scores]]) -> list[str]:
    """Return the metrics that the first rung of every latent has, in the order of the first latent."""
    return [metric for metric in scores[0][0] if all(metric in row[0] for row in scores)]


def _column(scores: Sequence[Sequence[Scores]], metric: str, field: str) -> Array:
    """Return a field of a metric's scores [latents, rungs], NaN where a latent has none."""
    return np.array([[getattr(cell[metric], field) if metric in cell else np.nan for cell in row] for row in scores])


def _examined(instrument: Instrument, trials: Sequence[Trials]) -> Examined:
    """Return an instrument's trials, those with equally many windows as one."""
    sizes = sorted({trial.n for trial in trials})
    return Examined(
        name=instrument.name,
        headline=instrument.headline,
        gap=instrument.gap,
        explained=instrument.explained,
        blind=instrument.blind,
        trials=tuple(_joined([trial for trial in trials if trial.n == size]) for size in sizes),
    )


def _joined(trials: Sequence[Trials]) -> Trials:
    """Return trials of several rounds as one, round after round."""
    shared = [metric for metric in trials[0].metrics if all(metric in trial.metrics for trial in trials)]
    columns = ("expected", "value", "low", "high", "power")
    return Trials(
        n=trials[0].n,
        rungs=trials[0].rungs,
        **{name: np.concatenate([getattr(trial, name) for trial in trials]) for name in columns},
        metrics={metric: np.concatenate([trial.metrics[metric] for trial in trials]) for metric in shared},
    )
