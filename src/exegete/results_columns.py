"""One metric over the latents of a coder as arrays, and which judgements are measurements."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreColumn:
    """One metric over the latents of a coder, ordered by latent.

    ``index`` [n], ``value``, ``low``, ``high`` [n] (NaN when nothing could be scored), ``n_total``, ``n_failed`` [n];
    ``flags`` of each, joined by spaces.
    """

    index: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    n_total: npt.NDArray[np.int64]
    n_failed: npt.NDArray[np.int64]
    flags: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)


def score_column(
    database: sqlite3.Connection,
    coder: str,
    scorer: str,
    metric: str,
    *,
    control: str,
    explainer: str | None,
    plumbing: bool | None,
) -> ScoreColumn:
    """Return one metric of a coder: what ``Results.score_column`` says."""
    sql = (
        "SELECT idx, value, low, high, n_total, n_failed, flags, key, id FROM scores "
        "WHERE coder = ? AND scorer = ? AND metric = ? AND control = ?"
    )
    values: tuple[str, ...] = (coder, scorer, metric, control)
    if explainer is not None:
        sql += " AND explanation IN (SELECT id FROM explanations WHERE key = ? AND coder = ?)"
        values += (explainer, coder)
    if plumbing is not None:
        sql += f" AND {'' if plumbing else 'NOT '}instr(flags, 'plumbing')"
    rows = database.execute(f"{sql} ORDER BY idx, id", values).fetchall()
    if explainer is not None and rows:  # one judge and one set of settings, never a mixture
        newest = max(rows, key=lambda row: row[8])[7]
        rows = [row for row in rows if row[7] == newest]
    latest = {row[0]: row[:7] for row in rows}
    index, value, low, high, n_total, n_failed, flags = zip(*latest.values(), strict=True) if latest else ((),) * 7
    return ScoreColumn(
        index=np.array(index, dtype=np.int64),
        value=np.array(value, dtype=np.float64),
        low=np.array(low, dtype=np.float64),
        high=np.array(high, dtype=np.float64),
        n_total=np.array(n_total, dtype=np.int64),
        n_failed=np.array(n_failed, dtype=np.int64),
        flags=tuple(flags),
    )


def newest_key(
    database: sqlite3.Connection, coder: str, scorer: str, explainer: str, plumbing: bool | None
) -> str | None:
    """Return the key under which a scorer last scored the explanations of a stage, None where it has not.

    ``plumbing`` asks for scores that are plumbing checks, or for those that are none.
    """
    sql = (
        "SELECT key FROM scores WHERE coder = ? AND scorer = ? AND explanation IN "
        "(SELECT id FROM explanations WHERE key = ? AND coder = ?)"
    )
    if plumbing is not None:
        sql += f" AND {'' if plumbing else 'NOT '}instr(flags, 'plumbing')"
    row = database.execute(f"{sql} ORDER BY id DESC LIMIT 1", (coder, scorer, explainer, coder)).fetchone()
    return None if row is None else str(row[0])


def latest_first(table: str) -> str:
    """Return the order in which rows of judgements or details that share an explanation and a scorer count.

    Measurements stand before plumbing checks, then what was scored last before what was scored earlier; ``table`` is
    the name or alias of the table.
    """
    scored = f"FROM scores s WHERE s.explanation = {table}.explanation AND s.key = {table}.key"
    checks = f"EXISTS (SELECT 1 {scored} AND instr(s.flags, 'plumbing'))"
    return f"{checks}, (SELECT max(s.id) {scored}) DESC, {table}.key"


def only_plumbing(plumbing: bool | None, table: str = "j") -> str:
    """Return the condition that rows of explanations ``e`` are plumbing checks, or are none; ``table`` is their alias.

    They are judgements, or details.
    """
    if plumbing is None:
        return ""
    flagged = (
        f"SELECT 1 FROM scores s WHERE s.key = {table}.key AND s.explanation = e.id AND s.scorer = {table}.scorer "
        "AND instr(s.flags, 'plumbing')"
    )
    return f" AND {'' if plumbing else 'NOT '}EXISTS ({flagged})"
