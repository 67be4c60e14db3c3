"""What a run's summary holds, and the names under which scores are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from exegete.analysis.curves import Curve
from exegete.metrics import Interval

NULL = "other_latent"
HEADLINE = "balanced_accuracy"
ROLES = ("trained", "random-coder", "random-subject")
ROLE_TEXT = {"trained": "trained", "random-coder": "random coder", "random-subject": "random subject"}
EXECUTED = ("execution", "baseline")
"""Scorers without a judge, which have a table of their own."""
EXECUTED_METRICS = ("auprc", "precision", "recall", "f1", "pearson", "base_rate")
BASELINES = {
    "auprc_bigram": "smoothed bigram table",
    "auprc_token": "best single token",
    "auprc_token_set": "best 12-token set",
    "auprc_unigram": "graded unigram",
}
THIRDS = ("rarest third", "middle third", "most frequent third")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The range of a metric, and what chance gives where that is known."""

    low: float
    high: float
    chance: float | None


SCALES: Mapping[str, Scale] = {
    "balanced_accuracy": Scale(low=0.0, high=1.0, chance=0.5),
    "auroc": Scale(low=0.0, high=1.0, chance=0.5),
    "accuracy": Scale(low=0.0, high=1.0, chance=None),
    "pearson": Scale(low=-1.0, high=1.0, chance=0.0),
}
"""Metrics with bounds; others are pictured over the range of their values."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSummary:
    """One scorer over the latents of a coder: its headline metric, the null of that, and the paired lift.

    ``judge`` is who judged; ``null`` is the control beside it, empty where it has none; ``plumbing`` says that its
    numbers check the pipeline and measure nothing. ``n`` latents have a score, ``n_unscored`` have none because every
    judgement failed; ``n_failed`` of ``n_total`` judgements failed; ``few_documents`` of the scores rest on fewer than
    20 documents of a class; ``mean`` is the macro mean over latents, ``weighted`` that by their firing rates; ``ties``
    the share of nulls that are exactly 0.5; ``others`` are the medians of the scorer's other metrics.
    """

    scorer: str
    metric: str
    null: str
    plumbing: bool
    judge: str
    n: int
    n_unscored: int
    n_failed: int
    n_total: int
    few_documents: int
    median: Interval
    mean: Interval
    weighted: Interval
    null_mean: Interval
    null_median: Interval
    ties: Interval
    lift: Interval
    others: tuple[tuple[str, Interval], ...]
    curves: tuple[Curve, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedSummary:
    """Executed rules on all held-out tokens, over some latents of a coder.

    ``rates`` is the range of their firing rates; ``metrics`` and ``baselines`` are medians; ``lifts`` the median of
    (rule − baseline) over the same latents, in AUPRC.
    """

    name: str
    n: int
    rates: tuple[float, float]
    metrics: tuple[tuple[str, Interval], ...]
    baselines: tuple[tuple[str, Interval], ...]
    lifts: tuple[tuple[str, Interval], ...]

    def metric(self, name: str) -> Interval:
        """Return the median of one metric."""
        return dict(self.metrics)[name]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainerSummary:
    """What one explaining stage achieved on one coder.

    ``statuses`` counts explanations by status; ``executed`` is None when nothing was executed, ``thirds`` splits the
    same latents by firing rate; ``mass`` is the share of activation mass that the rules cover per decile of firings.
    """

    key: str
    name: str
    statuses: tuple[tuple[str, int], ...]
    scorers: tuple[ScorerSummary, ...]
    executed: ExecutedSummary | None
    thirds: tuple[ExecutedSummary, ...]
    mass: tuple[Interval, ...]

    def scorer(self, name: str) -> ScorerSummary | None:
        """Return the summary of one scorer, None when it was not run."""
        return next((s for s in self.scorers if s.scorer == name and not s.plumbing), None)

    @property
    def measured(self) -> tuple[ScorerSummary, ...]:
        """The scorers whose numbers are measurements."""
        return tuple(s for s in self.scorers if not s.plumbing)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderSummary:
    """One coder: how many latents there are, are alive, were selected, explained and skipped, and what came of it.

    ``base`` is the trained coder that a null belongs to, its own name for a trained one; ``role`` one of ``ROLES``;
    ``skipped`` counts by (stage, reason); ``entropy`` is the median token entropy of the selected latents in bits;
    ``fvu`` and ``l0`` were measured on the first rows, NaN where they could not be; ``warnings`` say what looked wrong.
    """

    name: str
    base: str
    role: str
    n_latents: int
    n_alive: int
    n_selected: int
    n_explained: int
    skipped: tuple[tuple[str, str, int], ...]
    entropy: Interval
    fvu: float
    l0: float
    warnings: tuple[str, ...]
    explainers: tuple[ExplainerSummary, ...]

    @property
    def n_skipped(self) -> int:
        """Latents skipped at any stage."""
        return sum(n for _, _, n in self.skipped)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A quantity on a trained coder and on one of its nulls; ``difference`` is trained − null, whatever its sign."""

    coder: str
    role: str
    explainer: str
    quantity: str
    trained: Interval
    null: Interval
    difference: Interval


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two scorers rank the same ``n`` latents: Spearman's correlation, with Fisher's interval."""

    coder: str
    explainer: str
    left: str
    right: str
    n: int
    spearman: Interval


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMLift:
    """What a language model's explanations add to rules, paired over the ``n`` latents that have both.

    ``over_english`` is (its text, judged) − (the rule's English, by the same judge), None where that was not judged;
    ``over_rule`` is (its text, judged) − (the rule, executed on the same windows). ``n_unlike`` latents have both but
    are left out, as the two were asked about other windows or marks; for ``n_partial`` of the n some answers failed,
    so that one side rests on fewer windows.
    """

    coder: str
    explainer: str
    scorer: str
    judge: str
    n: int
    over_english: Interval | None
    over_rule: Interval | None
    n_unlike: int = 0
    n_partial: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLatent:
    """A latent whose explanation tells what it does rather than where it fires: causal score high, detection low."""

    coder: str
    index: int
    intervention: float
    detection: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retest:
    """How far intervention scores come again with other samples: the ICC over latents, in one condition (``kl_1``)."""

    coder: str
    explainer: str
    scorer: str
    condition: str
    icc: Interval


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collision:
    """Latents of a coder, by index, whose explanations do not tell each other apart."""

    coder: str
    explainer: str
    latents: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """The latents among ``n`` whose balanced accuracy is certified to be above ``level`` at false-discovery ``rate``.

    ``latents`` are (index, score, evidence), strongest first; the evidence is an e-value, or a p-value where the
    ``correction`` is ``by`` or ``bh``.
    """

    coder: str
    scorer: str
    level: float
    rate: float
    correction: str
    n: int
    latents: tuple[tuple[int, float, float], ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedLatent:
    """One latent that was judged until it was enough.

    ``certified`` says whether its balanced accuracy was decided to be at least the level (True) or at most the level
    less the margin (False); None where it stayed undecided, or nothing was to be certified. ``judgements`` were used,
    its nulls' not counted; the test of equal errors with a number fixed beforehand takes ``fixed_test``. ``half_width``
    is that of its interval, NaN for none, for which a fixed number would take ``fixed_width`` judgements.
    """

    index: int
    certified: bool | None
    judgements: int
    fixed_test: int | None
    half_width: float
    fixed_width: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """What came of a scorer that judged each latent until it was enough, for ``certify`` or ``stop_when`` or both."""

    coder: str
    explainer: str
    scorer: str
    judge: str
    plumbing: bool
    certify: float | None
    margin: float
    stop_when: float | None
    latents: tuple[StoppedLatent, ...]

    @property
    def decisions(self) -> tuple[int, int, int]:
        """How many latents were decided to be above, to be below, and stayed undecided."""
        said = [latent.certified for latent in self.latents]
        return said.count(True), said.count(False), said.count(None)

    @property
    def judgements(self) -> int:
        """Judgements of all latents, their nulls' not counted."""
        return sum(latent.judgements for latent in self.latents)

    @property
    def fixed_test(self) -> int:
        """Judgements that the fixed test of equal errors takes for all latents; 0 where nothing was to be certified."""
        return sum(latent.fixed_test or 0 for latent in self.latents)

    @property
    def narrow(self) -> int:
        """How many latents have an interval as narrow as was asked for."""
        return sum(self.stop_when is not None and one.half_width <= self.stop_when for one in self.latents)

    @property
    def fixed_width(self) -> tuple[int, int]:
        """Judgements used, and those of fixed numbers for the same widths, over the latents that have an interval."""
        those = [(one.judgements, one.fixed_width) for one in self.latents if one.fixed_width is not None]
        return sum(used for used, _ in those), sum(fixed for _, fixed in those)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Everything the report and the terminal table print."""

    coders: tuple[CoderSummary, ...]
    contrasts: tuple[Contrast, ...]
    agreements: tuple[Agreement, ...] = ()
    llm_lifts: tuple[LLMLift, ...] = ()
    output_latents: tuple[OutputLatent, ...] = ()
    retests: tuple[Retest, ...] = ()
    collisions: tuple[Collision, ...] = ()
    certified: tuple[Certified, ...] = ()
    stopped: tuple[Stopped, ...] = ()

    def trained(self) -> tuple[CoderSummary, ...]:
        """Return the coders that are no nulls."""
        return tuple(c for c in self.coders if c.role == "trained")


def split_name(name: str) -> tuple[str, str]:
    """Return the trained coder's name and the role of a coder's name ``BASE@ROLE``."""
    base, _, role = name.rpartition("@")
    return (base, role) if base and role in ROLES else (name, "trained")
