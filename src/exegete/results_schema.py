"""The tables of a run's results, as numbered migrations that are only ever added to.

A database says its format twice: ``PRAGMA user_version`` is the number of the last migration, and the table
``migrations`` lists each applied one with the hash of its statements. Never edit a migration that has been released;
add another one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from exegete.errors import BusyError, CorruptError, InputError
from exegete.files import fault_point, hash_json

APPLICATION_ID = 0x45584547  # "EXEG", so that `file` and we can tell a results database from any other


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One step from a format to the next: a name for people, and SQL statements run in one transaction."""

    name: str
    statements: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Identity of the statements."""
        return hash_json(list(self.statements))


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        name="explanations, judgements, scores, skips",
        statements=(
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
            "CREATE TABLE stages (key TEXT PRIMARY KEY, stage TEXT NOT NULL, spec TEXT NOT NULL) WITHOUT ROWID",
            """CREATE TABLE done (
                key TEXT NOT NULL, coder TEXT NOT NULL, idx INTEGER NOT NULL,
                PRIMARY KEY (key, coder, idx)) WITHOUT ROWID""",
            """CREATE TABLE latents (
                coder TEXT NOT NULL, idx INTEGER NOT NULL, count INTEGER NOT NULL, rate REAL NOT NULL, maximum REAL,
                mean REAL, sum_squares REAL, token_entropy REAL, histogram BLOB NOT NULL, edges BLOB NOT NULL,
                top_tokens TEXT NOT NULL, selected INTEGER NOT NULL,
                PRIMARY KEY (coder, idx)) WITHOUT ROWID""",
            """CREATE TABLE explanations (
                id INTEGER PRIMARY KEY, key TEXT NOT NULL, coder TEXT NOT NULL, idx INTEGER NOT NULL,
                status TEXT NOT NULL, text TEXT, explainer TEXT NOT NULL, program TEXT, prompt_hash TEXT NOT NULL,
                examples TEXT NOT NULL, detail TEXT NOT NULL, created REAL NOT NULL,
                UNIQUE (key, coder, idx))""",
            """CREATE TABLE judgements (
                explanation INTEGER NOT NULL REFERENCES explanations (id), key TEXT NOT NULL, scorer TEXT NOT NULL,
                control TEXT NOT NULL, n INTEGER NOT NULL, packed BLOB NOT NULL,
                PRIMARY KEY (explanation, scorer, control, key)) WITHOUT ROWID""",
            """CREATE TABLE scores (
                id INTEGER PRIMARY KEY, key TEXT NOT NULL, coder TEXT NOT NULL, idx INTEGER NOT NULL,
                explanation INTEGER REFERENCES explanations (id), scorer TEXT NOT NULL, metric TEXT NOT NULL,
                control TEXT NOT NULL, value REAL, low REAL, high REAL, method TEXT NOT NULL,
                n_total INTEGER NOT NULL, n_scored INTEGER NOT NULL, n_failed INTEGER NOT NULL,
                CHECK (n_scored + n_failed = n_total))""",
            "CREATE INDEX scores_by_metric ON scores (coder, scorer, metric, control, idx)",
            "CREATE INDEX scores_by_explanation ON scores (explanation)",
            """CREATE TABLE skips (
                key TEXT NOT NULL, coder TEXT NOT NULL, idx INTEGER NOT NULL, stage TEXT NOT NULL,
                reason TEXT NOT NULL, have INTEGER NOT NULL, need INTEGER NOT NULL,
                PRIMARY KEY (key, coder, idx)) WITHOUT ROWID""",
        ),
    ),
    Migration(
        name="where in a document a latent fires",
        statements=(
            "ALTER TABLE latents ADD COLUMN first_share REAL NOT NULL DEFAULT 0",
            "ALTER TABLE latents ADD COLUMN last_share REAL NOT NULL DEFAULT 0",
        ),
    ),
    Migration(
        name="bounds for failures, flags, what else scorers found",
        statements=(
            "ALTER TABLE scores ADD COLUMN floor REAL",
            "ALTER TABLE scores ADD COLUMN ceiling REAL",
            "ALTER TABLE scores ADD COLUMN n_documents INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE scores ADD COLUMN flags TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE scores ADD COLUMN n_needed INTEGER",
            """CREATE TABLE details (
                explanation INTEGER NOT NULL REFERENCES explanations (id), key TEXT NOT NULL, scorer TEXT NOT NULL,
                data TEXT NOT NULL,
                PRIMARY KEY (explanation, scorer, key)) WITHOUT ROWID""",
        ),
    ),
)


def check_format(database: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """Return how many migrations a database has had, 0 for an empty file.

    Raises CorruptError when it is another program's database or its history differs from ours, InputError when it
    was written by a newer exegete.
    """
    applied = int(database.execute("PRAGMA user_version").fetchone()[0])
    owner = int(database.execute("PRAGMA application_id").fetchone()[0])
    n_tables = int(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if applied == 0 and n_tables == 0:
        return 0
    if owner != APPLICATION_ID:
        raise CorruptError(f"{path} is a database, but not exegete's results")
    if applied > len(migrations):
        raise InputError(
            f"{path} has format {applied}, written by a newer exegete; this one reads up to {len(migrations)}: "
            "upgrade exegete"
        )
    history = database.execute("SELECT hash FROM migrations ORDER BY number").fetchall()
    if [row[0] for row in history] != [m.hash for m in migrations[:applied]]:
        raise CorruptError(f"{path} was made by migrations other than this exegete's; its history does not match")
    return applied


def migrate(database: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring a database to the present format, one transaction for each missing migration."""
    for number in range(check_format(database, path, migrations) + 1, len(migrations) + 1):
        migration = migrations[number - 1]
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise BusyError(f"{path} is being written by another process: {error}") from error
        try:
            database.execute(
                "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, "
                "hash TEXT NOT NULL)"
            )
            for statement in migration.statements:
                database.execute(statement)
            database.execute("INSERT INTO migrations VALUES (?, ?, ?)", (number, migration.name, migration.hash))
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {number}")
            fault_point("before commit migration")
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        fault_point("after commit migration")
