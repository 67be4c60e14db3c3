"""Which kinds of scores there are and how many latents have them, from a few places of an index, not from every row."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

_MOST = 2**63 - 1  # no latent has this index; without one the database would look at each row of a kind to leave it
_NEXT = (
    "SELECT coder, scorer, metric, control, idx, id FROM scores "
    f"WHERE (coder, scorer, metric, control, idx) > (?, ?, ?, ?, {_MOST}) "
    "ORDER BY coder, scorer, metric, control, idx, id LIMIT 1"
)
_OLDEST = "SELECT min(id) FROM scores WHERE coder = ? AND scorer = ? AND metric = ? AND control = 'none'"
_LATENTS = (
    "SELECT count(*) FROM (SELECT DISTINCT idx FROM scores "
    "WHERE coder = ? AND scorer = ? AND metric = ? AND control = 'none')"
)
_STATUSES = "SELECT coder, status, count(*) FROM explanations GROUP BY coder, status"
_SKIPS = (
    "SELECT coder, reason, count(*) FROM (SELECT DISTINCT coder, idx, stage, reason, have, need FROM skips) "
    "GROUP BY coder, reason"
)
_EXPLAINERS = "SELECT key, coder, min(id) FROM explanations GROUP BY key, coder"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreKind:
    """One metric of one scorer under one control, of one coder: the latent of lowest index, and its oldest row."""

    coder: str
    scorer: str
    metric: str
    control: str
    index: int
    id: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoderCounts:
    """How far a coder is: explanations by status, latents scored by scorer, latents skipped by reason."""

    explanations: dict[str, int] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def score_kinds(database: sqlite3.Connection) -> list[ScoreKind]:
    """Return every kind of score that is stored, sorted; each takes one look into an index, however many latents."""
    found: list[ScoreKind] = []
    last = ("", "", "", "")
    while (row := database.execute(_NEXT, last).fetchone()) is not None:
        last = row[:4]
        coder, scorer, metric, control, index, id_ = row
        found.append(ScoreKind(coder=coder, scorer=scorer, metric=metric, control=control, index=index, id=id_))
    return found


def first_kinds(kinds: Sequence[ScoreKind]) -> dict[tuple[str, str], ScoreKind]:
    """Return, by (coder, scorer), the metric that a scorer stores first, as told by its latent of lowest index.

    A scorer stores all its metrics of a latent together and in the same order, the headline first.
    """
    found: dict[tuple[str, str], ScoreKind] = {}
    for kind in kinds:
        if kind.control == "none":
            best = found.setdefault((kind.coder, kind.scorer), kind)
            if (kind.index, kind.id) < (best.index, best.id):
                found[kind.coder, kind.scorer] = kind
    return found


def headlines(database: sqlite3.Connection, kinds: Sequence[ScoreKind]) -> list[tuple[str, str]]:
    """Return every (scorer, metric) whose metric is the first that its scorer stores, in the order first stored."""
    oldest: dict[str, tuple[int, str]] = {}
    for (coder, scorer), kind in first_kinds(kinds).items():
        (id_,) = database.execute(_OLDEST, (coder, scorer, kind.metric)).fetchone()
        oldest[scorer] = min(oldest.get(scorer, (id_, kind.metric)), (id_, kind.metric))
    return [(scorer, metric) for scorer, (_, metric) in sorted(oldest.items(), key=lambda item: item[1])]


def coder_counts(database: sqlite3.Connection, kinds: Sequence[ScoreKind]) -> dict[str, CoderCounts]:
    """Return how far each coder is; a latent counts as scored when it has its scorer's first metric."""
    found: dict[str, CoderCounts] = {}
    for coder, status, n in database.execute(_STATUSES):
        found.setdefault(coder, CoderCounts()).explanations[status] = n
    for (coder, scorer), kind in sorted(first_kinds(kinds).items()):
        (n,) = database.execute(_LATENTS, (coder, scorer, kind.metric)).fetchone()
        found.setdefault(coder, CoderCounts()).scored[scorer] = n
    for coder, reason, n in database.execute(_SKIPS):
        found.setdefault(coder, CoderCounts()).skipped[reason] = n
    return found


def explaining_stages(database: sqlite3.Connection, coder: str | None) -> list[tuple[str, str]]:
    """Return the key of every stage that explained a coder, or any, and its explainer's spec as JSON, oldest first."""
    oldest: dict[str, int] = {}
    for key, of, id_ in database.execute(_EXPLAINERS):
        if coder in (None, of):
            oldest[key] = min(oldest.get(key, id_), id_)
    spec = "SELECT explainer FROM explanations WHERE id = ?"
    in_order = sorted(oldest.items(), key=lambda item: item[1])
    return [(key, str(database.execute(spec, (id_,)).fetchone()[0])) for key, id_ in in_order]
