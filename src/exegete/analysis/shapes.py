"""What a run's summary holds, and the names under which scores are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from exegete.analysis.curves import Curve
from exegete.metrics import Interval

NULL = "other_latent"
HEADLINE = "balanced_accuracy"
ROLES = ("trained", "random-coder", "random-subject")
ROLE_TEXT = {"trained": "trained", "random-coder": "random coder", "random-subject": "random subject"}
JUDGED_METRICS = ("sensitivity", "specificity", "f1")
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
class ScorerSummary:
    """One scorer over the latents of a coder: balanced accuracy, its null, and the paired lift.

    ``judge`` is who judged; ``n`` latents have a score, ``n_unscored`` have none because every judgement failed;
    ``n_failed`` of ``n_total`` judgements failed; ``ties`` is the share of nulls that are exactly 0.5; ``others`` are
    the medians of the scorer's other metrics.
    """

    scorer: str
    judge: str
    n: int
    n_unscored: int
    n_failed: int
    n_total: int
    median: Interval
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
        return next((s for s in self.scorers if s.scorer == name), None)


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
class RunSummary:
    """Everything the report and the terminal table print."""

    coders: tuple[CoderSummary, ...]
    contrasts: tuple[Contrast, ...]

    def trained(self) -> tuple[CoderSummary, ...]:
        """Return the coders that are no nulls."""
        return tuple(c for c in self.coders if c.role == "trained")


def split_name(name: str) -> tuple[str, str]:
    """Return the trained coder's name and the role of a coder's name ``BASE@ROLE``."""
    base, _, role = name.rpartition("@")
    return (base, role) if base and role in ROLES else (name, "trained")
