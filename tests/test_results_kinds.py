"""What there is and how much of it is told from an index, not from every row."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from exegete import results_kinds
from exegete.results import Results
from exegete.results_kinds import CoderCounts, score_kinds

N = 16_000  # latents; with two coders, two scorers and six kinds of scores each, 192,000 and some rows
_SCORE = (
    "INSERT INTO scores (key, coder, idx, explanation, scorer, metric, control, value, method, n_total, n_scored, "
    "n_failed) VALUES ('s', ?, ?, ?, ?, ?, ?, 0.5, 'wilson', 1, 1, 0)"
)
_EXPLANATION = (
    "INSERT INTO explanations (id, key, coder, idx, status, text, explainer, prompt_hash, examples, detail, created) "
    "VALUES (?, ?, ?, ?, ?, NULL, ?, '', '[]', '{}', 0)"
)
METRICS = ("balanced_accuracy", "auroc", "f1")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "results.db"
    Results.open(path).close()
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN")
    for place, coder in enumerate(("a", "b")):
        rows = (
            (place * N + i + 1, "k", coder, i, "failed" if i % 10 == 0 else "ok", '{"name":"rule"}') for i in range(N)
        )
        database.executemany(_EXPLANATION, rows)
        for scorer in ("fuzzing", "detection"):
            database.executemany(
                _SCORE,
                (
                    (coder, i, place * N + i + 1, scorer, metric, control)
                    for i in range(N)
                    for control in ("none", "other_latent")
                    for metric in METRICS
                ),
            )
    database.execute(_SCORE, ("a", 3, 4, "detection", "balanced_accuracy", "none"))  # scored twice, counted once
    database.execute(_SCORE, ("a", 3, None, "baseline", "auprc_token", "none"))
    for key in ("k", "l"):
        database.execute("INSERT INTO skips VALUES (?, 'b', 9, 'select', 'too few windows', 1, 2)", (key,))
    database.execute("COMMIT")
    database.close()
    return path


@pytest.fixture
def results(many: Path) -> Iterator[Results]:
    with Results.open(many, readonly=True) as opened:
        yield opened


def test_kinds_and_headlines_are_those_of_a_look_at_every_row(results: Results) -> None:
    rows = results._database.execute("SELECT DISTINCT scorer, metric, control FROM scores ORDER BY 1, 2, 3").fetchall()
    assert results.scored() == rows
    assert results.headlines() == [
        ("fuzzing", "balanced_accuracy"),
        ("detection", "balanced_accuracy"),
        ("baseline", "auprc_token"),
    ]


def test_counts_are_of_latents_each_once(results: Results) -> None:
    counts = results.counts()
    assert counts["a"] == CoderCounts(
        explanations={"failed": N // 10, "ok": N - N // 10},
        scored={"baseline": 1, "detection": N, "fuzzing": N},
        skipped={},
    )
    assert counts["b"].scored == {"detection": N, "fuzzing": N}
    assert counts["b"].skipped == {"too few windows": 1}


def test_the_first_metric_is_the_one_stored_first_and_not_the_first_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with Results.open(path) as results:
        for i in (5, 2, 7):
            for metric in ("bits", "accuracy"):
                results._database.execute(_SCORE, ("c", i, None, "late", metric, "none"))
        results._database.execute(_SCORE, ("c", 1, None, "later", "auroc", "none"))
        assert results.headlines() == [("late", "bits"), ("later", "auroc")]
        assert results.counts()["c"].scored == {"late": 3, "later": 1}


def test_few_rows_are_fetched_and_none_of_the_scores_is_read_whole(results: Results) -> None:
    class Counting:
        """A connection that keeps what was asked and counts the rows that came."""

        def __init__(self) -> None:
            self.asked: Counter[str] = Counter()
            self.rows = 0

        def execute(self, sql: str, values: tuple[object, ...] = ()) -> list[object]:
            self.asked[sql] += 1
            found = results._database.execute(sql, values).fetchall()
            self.rows += len(found)
            return Rows(found)

    class Rows(list[object]):
        def fetchone(self) -> object:
            return self[0] if self else None

    counting = Counting()
    kinds = score_kinds(counting)  # type: ignore[arg-type]
    results_kinds.headlines(counting, kinds)  # type: ignore[arg-type]
    results_kinds.coder_counts(counting, kinds)  # type: ignore[arg-type]
    results_kinds.explaining_stages(counting, None)  # type: ignore[arg-type]
    assert counting.rows < 100
    for sql in counting.asked:
        marks = ("",) * sql.count("?")
        plan = " ".join(row[-1] for row in results._database.execute(f"EXPLAIN QUERY PLAN {sql}", marks))
        if " scores " in sql:
            assert "COVERING INDEX scores_by_metric" in plan
            assert "SCAN scores" not in plan


def test_the_next_kind_is_found_by_one_look(results: Results) -> None:
    """The database must not walk over the rows of a kind to leave it: its own steps are counted."""
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    results._database.set_progress_handler(step, 100)  # every 100 instructions
    assert len(score_kinds(results._database)) == 25
    results._database.set_progress_handler(None, 0)
    assert steps < 100


def test_kinds_are_looked_for_once_while_one_state_is_read(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def look(database: sqlite3.Connection) -> list[results_kinds.ScoreKind]:
        nonlocal looks
        looks += 1
        return score_kinds(database)

    monkeypatch.setattr("exegete.results.score_kinds", look)
    with results.snapshot():
        for _ in range(3):
            results.scored()
            results.headlines()
    assert looks == 1
    results.scored()
    assert looks == 2
