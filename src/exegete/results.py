"""What a run found: one SQLite database with explanations, judgements, scores and skips.

The journal is a write-ahead log, so readers never wait for the writer nor it for them. ``synchronous`` is NORMAL: a
killed process loses nothing that was committed; a power cut may lose the latest commits, never a part of one, and
whatever is lost is done again, since a stage is done for a latent only when its mark was committed together with its
rows. All SQL is parameterised; foreign text is stored as it is and escaped where it is shown.

A ``Results`` belongs to the thread that opened it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.errors import BusyError, InputError
from exegete.files import fault_point
from exegete.results_carrying import carry_over
from exegete.results_columns import ScoreColumn, latest_first, newest_key, only_plumbing, score_column
from exegete.results_connection import marks, opened, where_of
from exegete.results_kinds import CoderCounts, ScoreKind, coder_counts, explaining_stages, headlines, score_kinds
from exegete.results_packing import JudgementColumns, pack, unpack, unpack_columns
from exegete.results_rows import (
    EXPLANATION,
    SCORE,
    SKIP,
    STATS,
    explanation_from,
    explanation_row,
    from_json,
    score_from,
    score_row,
    skip_from,
    skip_row,
    stats_from,
    stats_row,
    to_json,
)
from exegete.results_tables import canonical_rows, columnar
from exegete.types import Explanation, Judgement, LatentId, LatentStats, Score, Skipped

if TYPE_CHECKING:
    from exegete.scorers.scorer import Scoring

_DISK_ERRORS = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})


@final
class Results:
    """The results database of one run. Open it with ``Results.open``; use it as a context manager or ``close`` it."""

    def __init__(self, database: sqlite3.Connection, path: Path, *, readonly: bool = False) -> None:
        self._database = database
        self.path = path
        self._readonly = readonly
        self._depth = 0
        self._reading = False
        self._kinds: list[ScoreKind] | None = None  # as long as one state is read

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False) -> Results:
        """Open a run's results, made or migrated when writing.

        Raises NotFoundError when there is nothing to read, CorruptError when the file is damaged or not ours,
        InputError when its format is newer than this exegete's (or older, and only reading was asked for).
        """
        return cls(opened(path, readonly), path, readonly=readonly)

    def close(self) -> None:
        """Close the database; the write-ahead log is folded into it by the last to close."""
        self._database.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything written inside together, or nothing of it. Inner transactions join the outer one.

        Raises BusyError when another process keeps the database locked, InputError when it cannot be written.
        """
        if self._readonly or self._reading:
            raise InputError(f"{self.path} is open for reading only")
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise BusyError(f"{self.path} cannot be written: {error}") from error
        self._depth = 1
        try:
            yield
            fault_point("before commit results")
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _DISK_ERRORS:
                raise InputError(f"{self.path} cannot be written: {error}; is the disk full?") from error
            raise
        finally:
            self._depth = 0
        fault_point("after commit results")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the database inside, whatever a writer commits meanwhile."""
        if self._depth or self._reading:
            yield
            return
        self._database.execute("BEGIN")
        self._reading = True
        try:
            yield
        finally:
            self._reading, self._kinds = False, None
            self._database.execute("ROLLBACK")

    # ---------------------------------------------------------------- writing

    def put_meta(self, key: str, value: Any) -> None:
        """Store JSON data under a name, replacing what was there."""
        with self.transaction():
            self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

    def add_stage(self, key: str, stage: str, spec: Any) -> None:
        """Say what a stage key stands for: the stage's name and the options that the key is the hash of."""
        with self.transaction():
            self._database.execute("INSERT OR IGNORE INTO stages VALUES (?, ?, ?)", (key, stage, to_json(spec)))

    def add_latents(self, stats: Iterable[LatentStats], *, selected: Collection[LatentId] = ()) -> None:
        """Store the counts of latents, replacing those that were there; ``selected`` ones are to be interpreted.

        What was selected before stays so; ``mark_selected`` sets a coder's selection exactly.
        """
        chosen = frozenset(selected)
        rows = (stats_row(s, s.latent in chosen) for s in stats)
        update = ", ".join(f"{name} = excluded.{name}" for name in STATS.split(", ")[2:])
        with self.transaction():
            self._database.executemany(
                f"INSERT INTO latents ({STATS}, selected) VALUES ({marks(14)}) ON CONFLICT (coder, idx) DO UPDATE SET "
                f"{update}, selected = max(selected, excluded.selected)",
                rows,
            )

    def mark_selected(self, coder: str, indices: Iterable[int]) -> None:
        """Make these the latents of a coder that are to be interpreted. Unknown ones are passed over."""
        with self.transaction():
            self._database.execute("UPDATE latents SET selected = 0 WHERE coder = ? AND selected", (coder,))
            self._database.executemany(
                "UPDATE latents SET selected = 1 WHERE coder = ? AND idx = ?", ((coder, int(i)) for i in indices)
            )

    def add_explanation(self, explanation: Explanation, key: str) -> int:
        """Store an explanation and mark its stage done; return its id.

        One per (key, latent): an explanation whose status is ``ok`` stays as it is, any other is replaced, so that a
        failed call can be tried again.
        """
        latent = explanation.latent
        with self.transaction():
            found = self._database.execute(
                "SELECT id, status FROM explanations WHERE key = ? AND coder = ? AND idx = ?",
                (key, latent.coder, int(latent.index)),
            ).fetchone()
            if found is not None and found[1] == "ok":
                return int(found[0])
            cursor = self._database.execute(
                f"INSERT OR REPLACE INTO explanations (id, key, created, {EXPLANATION}) VALUES ({marks(12)})",
                (None if found is None else found[0], key, time.time(), *explanation_row(explanation)),
            )
            self._mark(key, latent)
            return int(found[0]) if found is not None else int(cursor.lastrowid or 0)

    def add_scoring(
        self,
        scoring: Scoring,
        key: str,
        explanation_id: int | None,
        *,
        scorer: str | None = None,
        final: bool = True,
    ) -> None:
        """Store the scores and judgements of one explanation and mark the stage done, in one transaction.

        With ``final=False`` the stage is not marked: calls failed that may be made again, and what is stored now is
        replaced then.

        Scores of the scorer ``baseline`` belong to the latent alone, and so do all when ``explanation_id`` is None.
        ``scorer`` names whose judgements these are; by default the scorer of the first score. What a (key, latent)
        stored once is not stored again.
        """
        latent = scoring.explanation.latent
        name = scorer or next((s.scorer for s in scoring.scores if s.scorer != "baseline"), None)
        if (scoring.judgements or scoring.detail) and (name is None or explanation_id is None):
            raise InputError(f"{latent}: judgements need the name of their scorer and the id of their explanation")
        with self.transaction():
            where = (key, latent.coder, int(latent.index))
            marked = "SELECT 1 FROM done WHERE key = ? AND coder = ? AND idx = ?"
            if self._database.execute(marked, where).fetchone() or (final and not self._mark(key, latent)):
                return
            self._database.execute("DELETE FROM scores WHERE key = ? AND coder = ? AND idx = ?", where)
            self._database.executemany(
                f"INSERT INTO scores (key, {SCORE}) VALUES ({marks(19)})",
                [
                    (key, *score_row(score, None if score.scorer == "baseline" else explanation_id))
                    for score in scoring.scores
                ],
            )
            self._database.executemany(
                "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (explanation_id, key, name, control, len(judgements), pack(judgements))
                    for control, judgements in sorted(scoring.judgements.items())
                ],
            )
            if scoring.detail:
                self._database.execute(
                    "INSERT OR REPLACE INTO details VALUES (?, ?, ?, ?)",
                    (explanation_id, key, name, to_json(scoring.detail)),
                )

    def carry_over(
        self, scorer: str, key: str, olds: Collection[str], nearest: Mapping[int, Sequence[str]]
    ) -> tuple[set[int], set[int]]:
        """Store under a key what stands under ``olds`` of each explanation that was held against ``nearest``, by id.

        Returns the ids of explanations of which that was so, and of those that were held against others.
        """
        with self.transaction():
            return carry_over(self._database, scorer, key, olds, nearest)

    def add_skip(self, skipped: Skipped, key: str) -> None:
        """Store that a latent dropped out of a stage, and mark the stage done for it."""
        with self.transaction():
            self._database.execute(
                f"INSERT OR REPLACE INTO skips (key, {SKIP}) VALUES ({marks(7)})",
                (key, *skip_row(skipped)),
            )
            self._mark(key, skipped.latent)

    def mark_done(self, key: str, latents: Iterable[LatentId]) -> None:
        """Mark a stage done for latents for which it stores nothing else."""
        with self.transaction():
            for latent in latents:
                self._mark(key, latent)

    # ---------------------------------------------------------------- reading

    def get_meta(self, key: str, default: Any = None) -> Any:
        """Return the JSON data stored under a name, or the default."""
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else from_json(row[0])

    def meta(self) -> dict[str, Any]:
        """Return everything stored with ``put_meta``, ordered by name."""
        return {key: from_json(value) for key, value in self._database.execute("SELECT * FROM meta ORDER BY key")}

    def stages(self) -> dict[str, tuple[str, Any]]:
        """Return what each described stage key stands for: the stage's name and its options."""
        rows = self._database.execute("SELECT key, stage, spec FROM stages ORDER BY key")
        return {key: (stage, from_json(spec)) for key, stage, spec in rows}

    def done(self, key: str, *, failed: bool = True) -> set[LatentId]:
        """Return the latents for which a stage is done.

        With ``failed=False`` those whose explanation failed (status ``failed``) are left out, to be tried again.
        """
        sql = "SELECT coder, idx FROM done WHERE key = ?"
        values: tuple[str, ...] = (key,)
        if not failed:
            sql += " EXCEPT SELECT coder, idx FROM explanations WHERE key = ? AND status = 'failed'"
            values = (key, key)
        return {LatentId(coder=coder, index=index) for coder, index in self._database.execute(sql, values)}

    def coders(self) -> tuple[str, ...]:
        """Return the names of the coders that anything is known of, nulls last."""
        rows = self._database.execute(
            "SELECT coder FROM latents UNION SELECT coder FROM explanations UNION SELECT coder FROM skips "
            "UNION SELECT coder FROM scores"
        )
        return tuple(sorted((row[0] for row in rows), key=lambda name: ("@" in name, name)))

    def latents(self, coder: str | None = None, *, selected: bool | None = None) -> list[LatentStats]:
        """Return the counts of latents: of one coder or all, and all or only the selected (or unselected) ones."""
        where, values = where_of(coder=coder, selected=None if selected is None else int(selected))
        sql = f"SELECT {STATS} FROM latents{where} ORDER BY coder, idx"
        return [stats_from(row) for row in self._database.execute(sql, values)]

    def explanations(self, coder: str | None = None, *, key: str | None = None) -> dict[int, Explanation]:
        """Return explanations by id, ordered by latent, then id."""
        where, values = where_of(coder=coder, key=key)
        sql = f"SELECT id, {EXPLANATION} FROM explanations{where} ORDER BY coder, idx, id"
        return {row[0]: explanation_from(row[1:]) for row in self._database.execute(sql, values)}

    def explainers(self, coder: str | None = None) -> list[tuple[str, str]]:
        """Return the (key, explainer's name) of every explaining stage that stored something, oldest first."""
        found = explaining_stages(self._database, coder)
        return [(key, str(from_json(spec).get("name", ""))) for key, spec in found]

    def scores(
        self,
        *,
        coder: str | None = None,
        index: int | None = None,
        explanation: int | None = None,
        scorer: str | None = None,
        metric: str | None = None,
        control: str | None = None,
        key: str | None = None,
    ) -> list[Score]:
        """Return the scores that match every filter given, ordered by latent, then in the order stored."""
        where, values = where_of(
            coder=coder,
            idx=index,
            explanation=explanation,
            scorer=scorer,
            metric=metric,
            control=control,
            key=key,
        )
        sql = f"SELECT {SCORE} FROM scores{where} ORDER BY coder, idx, id"
        return [score_from(row) for row in self._database.execute(sql, values)]

    def score_column(
        self,
        coder: str,
        scorer: str,
        metric: str,
        *,
        control: str = "none",
        explainer: str | None = None,
        plumbing: bool | None = None,
    ) -> ScoreColumn:
        """Return one metric of a coder as arrays; ``explainer`` is the key of the explaining stage, None for any.

        When the explanations of a stage were scored more than once, by another judge or with other settings, what was
        scored last counts, alone. ``plumbing`` takes only scores that are plumbing checks, or only those that are none.
        """
        return score_column(
            self._database, coder, scorer, metric, control=control, explainer=explainer, plumbing=plumbing
        )

    def scored(self) -> list[tuple[str, str, str]]:
        """Return every (scorer, metric, control) that occurs, sorted."""
        return sorted({(kind.scorer, kind.metric, kind.control) for kind in self._score_kinds()})

    def headlines(self) -> list[tuple[str, str]]:
        """Return every (scorer, metric) whose metric is the first that its scorer stores, in the order first stored."""
        return headlines(self._database, self._score_kinds())

    def counts(self) -> dict[str, CoderCounts]:
        """Return how far each coder is: how many latents are explained, scored and skipped, counted by the database."""
        return coder_counts(self._database, self._score_kinds())

    def scored_with(
        self, coder: str, scorer: str, explainer: str, *, plumbing: bool | None = None
    ) -> Mapping[str, Any]:
        """Return the options with which a scorer last scored the explanations of a stage; empty where not known.

        ``plumbing`` is as for ``score_column``.
        """
        key = newest_key(self._database, coder, scorer, explainer, plumbing)
        spec = None if key is None else self.stages().get(key, ("", {}))[1]
        return spec if isinstance(spec, Mapping) else {}

    def judgements(self, explanation_id: int, scorer: str, control: str = "none") -> tuple[Judgement, ...]:
        """Return the judgements of one explanation by one scorer under one control; none when there are none.

        Where there are several, measurements count before plumbing checks, then the latest.
        """
        packed = self._packed(explanation_id, scorer, control)
        return () if packed is None else unpack(packed)

    def detail(self, explanation_id: int, scorer: str) -> dict[str, Any]:
        """Return what else a scorer found of one explanation, chosen as for ``judgements``; else nothing."""
        sql = f"SELECT data FROM details d WHERE explanation = ? AND scorer = ? ORDER BY {latest_first('d')} LIMIT 1"
        row = self._database.execute(sql, (explanation_id, scorer)).fetchone()
        return {} if row is None else dict(from_json(row[0]))

    def details(
        self, coder: str, scorer: str, *, explainer: str | None = None, plumbing: bool | None = None
    ) -> dict[int, dict[str, Any]]:
        """Return what else a scorer found of each latent of a coder, by index; measured and the latest as for one.

        ``plumbing`` takes only those of scores that ``score_column`` counts: plumbing checks, or none of them.
        """
        newest = None
        if explainer is not None and plumbing is not None:
            newest = newest_key(self._database, coder, scorer, explainer, plumbing)
        where, values = where_of(**{"e.coder": coder, "d.scorer": scorer, "e.key": explainer, "d.key": newest})
        sql = f"SELECT e.idx, d.data FROM details d JOIN explanations e ON e.id = d.explanation{where}"
        order = f"{only_plumbing(plumbing, 'd')} ORDER BY e.idx, {latest_first('d')}"
        found: dict[int, str] = {}
        for index, data in self._database.execute(sql + order, values):
            found.setdefault(index, data)
        return {index: dict(from_json(data)) for index, data in found.items()}

    def judgement_columns(
        self,
        coder: str,
        scorer: str,
        *,
        control: str = "none",
        explainer: str | None = None,
        plumbing: bool | None = None,
    ) -> Iterator[tuple[LatentId, JudgementColumns]]:
        """Yield the judgements of each latent as arrays, ordered by latent.

        Of an ``explainer`` that was judged more than once they are those that ``score_column`` counts; ``plumbing`` is
        as there.
        """
        newest = None if explainer is None else newest_key(self._database, coder, scorer, explainer, plumbing)
        where, values = where_of(
            **{"e.coder": coder, "scorer": scorer, "control": control, "e.key": explainer, "j.key": newest}
        )
        sql = (
            "SELECT e.coder, e.idx, j.packed FROM judgements j JOIN explanations e ON e.id = j.explanation"
            f"{where}{only_plumbing(plumbing)} ORDER BY e.idx, e.id, j.key"
        )
        for name, index, packed in self._database.execute(sql, values):
            yield LatentId(coder=name, index=index), unpack_columns(packed)

    def skips(self, coder: str | None = None) -> list[Skipped]:
        """Return the latents that dropped out, ordered by latent, then stage; each once, however often it was tried."""
        where, values = where_of(coder=coder)
        sql = f"SELECT DISTINCT {SKIP} FROM skips{where} ORDER BY coder, idx, stage, reason"
        return [skip_from(row) for row in self._database.execute(sql, values)]

    def table(self, name: str) -> dict[str, Any]:
        """Return a whole table as columns: numbers as arrays, text as lists. Raises NotFoundError on another name.

        NULL is NaN in a column of floats, −1 in one of integers, None in one of texts. ``judgements`` has one row
        per judgement.
        """
        return columnar(self._database, name)

    def canonical_rows(self) -> list[str]:
        """Return everything found, sorted and without ids and times: equal for an interrupted and a whole run.

        What ``put_meta`` stored is left out, since a manifest may say when it was made.
        """
        return canonical_rows(self._database)

    # ---------------------------------------------------------------- private

    def _score_kinds(self) -> list[ScoreKind]:
        if not self._reading:
            return score_kinds(self._database)
        self._kinds = score_kinds(self._database) if self._kinds is None else self._kinds
        return self._kinds

    def _mark(self, key: str, latent: LatentId) -> bool:
        """Mark a stage done for a latent; return whether it was not yet."""
        cursor = self._database.execute(
            "INSERT OR IGNORE INTO done VALUES (?, ?, ?)", (key, latent.coder, int(latent.index))
        )
        return cursor.rowcount == 1

    def _packed(self, explanation_id: int, scorer: str, control: str) -> bytes | None:
        row = self._database.execute(
            "SELECT packed FROM judgements j WHERE explanation = ? AND scorer = ? AND control = ? "
            f"ORDER BY {latest_first('j')} LIMIT 1",
            (explanation_id, scorer, control),
        ).fetchone()
        return None if row is None else bytes(row[0])
