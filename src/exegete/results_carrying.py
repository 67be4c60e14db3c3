"""Scores that still hold under another key: stored under it too, without being made again."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence

from exegete.results_rows import SCORE, from_json


def nearest_under(
    database: sqlite3.Connection, explanation: int, scorer: str, keys: Collection[str]
) -> dict[str, list[str]]:
    """Return, by key, against which latents an explanation was held: those that a scorer's detail says."""
    sql = "SELECT key, data FROM details WHERE explanation = ? AND scorer = ?"
    told = {key: from_json(data) for key, data in database.execute(sql, (explanation, scorer)) if key in keys}
    return {key: [str(near["latent"]) for near in detail.get("near", ())] for key, detail in told.items()}


def carry(database: sqlite3.Connection, explanation: int, old: str, new: str) -> bool:
    """Store what was found of an explanation under one key under another too; return whether it was finished there."""
    found = database.execute("SELECT coder, idx FROM explanations WHERE id = ?", (explanation,)).fetchone()
    done = "SELECT 1 FROM done WHERE key = ? AND coder = ? AND idx = ?"
    if found is None or database.execute(done, (old, *found)).fetchone() is None:
        return False
    where = "FROM scores WHERE explanation = ? AND key = ?"
    database.execute(f"DELETE {where}", (explanation, new))
    database.execute(
        f"INSERT INTO scores (key, {SCORE}) SELECT ?, {SCORE} {where} ORDER BY id", (new, explanation, old)
    )
    for table, columns in (("judgements", "scorer, control, n, packed"), ("details", "scorer, data")):
        database.execute(
            f"INSERT OR REPLACE INTO {table} (explanation, key, {columns}) SELECT explanation, ?, {columns} "
            f"FROM {table} WHERE explanation = ? AND key = ?",
            (new, explanation, old),
        )
    database.execute("INSERT OR IGNORE INTO done VALUES (?, ?, ?)", (new, *found))
    return True


def carry_over(
    database: sqlite3.Connection, scorer: str, new: str, olds: Collection[str], nearest: Mapping[int, Sequence[str]]
) -> tuple[set[int], set[int]]:
    """Store under the key ``new`` what stands under ``olds`` of each explanation that was held against ``nearest``.

    Their order does not count: equally near ones may change places as more is explained. Returns the explanations of
    which that was so, and those that were held against others. Scores that are not of the explanation (baselines) are
    left out.
    """
    kept: set[int] = set()
    changed: set[int] = set()
    for explanation, wanted in nearest.items():
        before = nearest_under(database, explanation, scorer, olds)
        same = sorted(key for key, near in before.items() if sorted(near) == sorted(wanted))
        if any(carry(database, explanation, key, new) for key in same):
            kept.add(explanation)
        elif before and not same:
            changed.add(explanation)
    return kept, changed
