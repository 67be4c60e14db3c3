from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete import results_schema
from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.files import fault_hook
from exegete.results import Results
from exegete.results_packing import pack, unpack, unpack_columns
from exegete.results_schema import MIGRATIONS, Migration, migrate
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, Judgement, LatentId, LatentStats, Score, Skipped

NASTY = "<b>&\"'\n\0 ' OR 1=1; DROP TABLE scores; -- \u202eשלום \U0001f9ff"


def latent(index: int = 1, coder: str = "layers.3") -> LatentId:
    return LatentId(coder=coder, index=index)


def stats(index: int = 1, coder: str = "layers.3", **changes: Any) -> LatentStats:
    values: dict[str, Any] = {
        "latent": latent(index, coder),
        "count": 12,
        "rate": 0.003,
        "maximum": 4.5,
        "mean": 1.25,
        "sum_squares": 30.0,
        "histogram": np.array([0, 5, 7], dtype=np.int64),
        "edges": np.array([0.5, 1.0, 2.0, 4.0]),
        "top_tokens": ((17, 9), (3, 3)),
        "token_entropy": 0.8,
    }
    return LatentStats(**{**values, **changes})


def explanation(index: int = 1, coder: str = "layers.3", **changes: Any) -> Explanation:
    values: dict[str, Any] = {
        "latent": latent(index, coder),
        "text": f"fires on {index}",
        "status": "ok",
        "explainer": {"name": "rule", "args": {"clauses": 3}},
        "prompt_hash": "abcd",
        "examples": ((1, 32), (7, 0)),
        "program": {"clauses": [{"tokens": [1, 2]}]},
        "detail": {"score": 0.25, "steps": [1, 2]},
    }
    return Explanation(**{**values, **changes})


def score(index: int = 1, coder: str = "layers.3", **changes: Any) -> Score:
    values: dict[str, Any] = {
        "latent": latent(index, coder),
        "scorer": "detection",
        "metric": "balanced_accuracy",
        "value": 0.8,
        "low": 0.7,
        "high": 0.9,
        "method": "wilson",
        "n_total": 10,
        "n_scored": 8,
        "n_failed": 2,
    }
    return Score(**{**values, **changes})


JUDGEMENTS = (
    Judgement(row=3, start=0, document=1, stratum="decile_0", truth=True, prediction=True, probability=0.75),
    Judgement(row=1 << 40, start=32, document=-1, stratum="silent", truth=False, prediction=True),
    Judgement(row=4, start=64, document=2, stratum="decile_0", truth=True, prediction=None, status="refused"),
    Judgement(row=4, start=96, document=2, stratum="silent", truth=False, prediction=False, probability=0.1),
)


def scoring(index: int = 1, coder: str = "layers.3", value: float = 0.8) -> Scoring:
    return Scoring(
        explanation=explanation(index, coder),
        scores=(
            score(index, coder, value=value, low=value, high=value),
            score(index, coder, control="other_latent", value=0.5, low=0.4, high=0.6),
            score(index, coder, scorer="baseline", metric="auprc_token", value=0.3, low=0.3, high=0.3),
        ),
        judgements={"none": JUDGEMENTS, "other_latent": JUDGEMENTS[:2]},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "results.db"


def write_run(path: Path, n: int = 4, order: int = 1) -> None:
    """What a pipeline does: skip what is done, in one of two orders."""
    with Results.open(path) as results:
        results.add_stage("k1", "explain", {"name": "rule"})
        results.add_latents([stats(i) for i in range(n)])
        results.mark_selected("layers.3", range(n))
        done = results.done("k1")
        for i in range(n)[::order]:
            if latent(i) in done:
                continue
            if i == 2:
                results.add_skip(Skipped(latent=latent(i), stage="select", reason="rare", have=3, need=10), "k1")
            else:
                results.add_explanation(explanation(i), "k1")
        ids = {e.latent: id_ for id_, e in results.explanations(key="k1").items()}
        scored = results.done("k2")
        for one in sorted(ids, reverse=order < 0):
            if one not in scored:
                results.add_scoring(scoring(one.index), "k2", ids[one])


# -- round trips ------------------------------------------------------------------------------------------------------


def test_latent_counts_round_trip(path: Path) -> None:
    silent = stats(9, token_entropy=math.nan, mean=math.nan, count=0, top_tokens=())
    with Results.open(path) as results:
        results.add_latents([stats(1), silent], selected=[latent(1)])
        one, nine = results.latents("layers.3")
        for name in ("latent", "count", "rate", "maximum", "mean", "sum_squares", "top_tokens", "token_entropy"):
            assert getattr(one, name) == getattr(stats(1), name)
        np.testing.assert_array_equal(one.histogram, stats(1).histogram)
        np.testing.assert_array_equal(one.edges, stats(1).edges)
        assert one.histogram.dtype == np.int64
        assert math.isnan(nine.token_entropy)
        assert math.isnan(nine.mean)
        assert [s.latent.index for s in results.latents(selected=True)] == [1]
        assert [s.latent.index for s in results.latents(selected=False)] == [9]
        assert results.latents("other") == []


def test_adding_counts_again_replaces_them_and_keeps_the_selection(path: Path) -> None:
    with Results.open(path) as results:
        results.add_latents([stats(1), stats(2)])
        results.mark_selected("layers.3", np.array([1, 77]))
        results.add_latents([stats(1, count=99)])
        assert [(s.latent.index, s.count) for s in results.latents(selected=True)] == [(1, 99)]
        results.mark_selected("layers.3", [2])
        assert [s.latent.index for s in results.latents(selected=True)] == [2]


@pytest.mark.parametrize(
    "made",
    [
        explanation(),
        explanation(text=None, status="refused", program=None, examples=()),
        explanation(text=NASTY, detail={NASTY: NASTY}, explainer={"name": NASTY, "args": {}}),
        explanation(text="half a pair \ud83d"),
        explanation(coder="layers.3@random-coder"),
    ],
)
def test_explanations_round_trip(path: Path, made: Explanation) -> None:
    with Results.open(path) as results:
        id_ = results.add_explanation(made, "k")
        assert results.explanations() == {id_: made}
        assert results.done("k") == {made.latent}


def test_numpy_and_infinite_numbers_in_a_detail_become_plain(path: Path) -> None:
    detail = {"a": np.float32(0.5), "b": np.int64(3), "c": math.nan, "d": -math.inf, "e": np.array([1.0, math.nan])}
    with Results.open(path) as results:
        id_ = results.add_explanation(explanation(np.int64(4), detail=detail), "k")  # type: ignore[arg-type]
        assert results.explanations()[id_].detail == {"a": 0.5, "b": 3, "c": None, "d": None, "e": [1.0, None]}
        assert results.done("k") == {latent(4)}


def test_an_ok_explanation_stays_and_a_failed_one_is_replaced(path: Path) -> None:
    with Results.open(path) as results:
        id_ = results.add_explanation(explanation(text=None, status="failed"), "k")
        assert results.done("k") == {latent()}
        assert results.done("k", failed=False) == set()
        assert results.add_explanation(explanation(text="first"), "k") == id_
        assert results.done("k", failed=False) == {latent()}
        assert results.add_explanation(explanation(text="second"), "k") == id_
        assert [e.text for e in results.explanations().values()] == ["first"]
        other = results.add_explanation(explanation(text="third"), "another key")
        assert other != id_
        assert list(results.explanations(key="another key")) == [other]


def test_scorings_round_trip_with_their_judgements(path: Path) -> None:
    with Results.open(path) as results:
        id_ = results.add_explanation(explanation(), "k1")
        results.add_scoring(scoring(), "k2", id_)
        own, null, baseline = results.scores()
        assert own == score(value=0.8, low=0.8, high=0.8, explanation=id_)
        assert (null.control, null.value, null.explanation) == ("other_latent", 0.5, id_)
        assert baseline.explanation is None
        assert results.judgements(id_, "detection") == JUDGEMENTS
        assert results.judgements(id_, "detection", "other_latent") == JUDGEMENTS[:2]
        assert results.judgements(id_, "fuzzing") == ()
        assert results.done("k2") == {latent()}


def test_a_score_that_is_undefined_is_null_inside_and_nan_outside(path: Path) -> None:
    nothing = score(value=math.nan, low=math.nan, high=math.nan, n_total=3, n_scored=0, n_failed=3)
    with Results.open(path) as results:
        id_ = results.add_explanation(explanation(), "k1")
        results.add_scoring(Scoring(explanation=explanation(), scores=(nothing,), judgements={}), "k2", id_)
        (found,) = results.scores()
        assert math.isnan(found.value)
        assert (found.n_total, found.n_failed) == (3, 3)
        assert np.isnan(results.score_column("layers.3", "detection", "balanced_accuracy").value).all()
    raw = sqlite3.connect(path)
    assert raw.execute("SELECT value, low, high FROM scores").fetchone() == (None, None, None)
    raw.close()


def test_infinite_bounds_round_trip(path: Path) -> None:
    with Results.open(path) as results:
        wide = score(low=-math.inf, high=math.inf)
        results.add_scoring(Scoring(explanation=explanation(), scores=(wide,), judgements={}), "k2", None)
        (found,) = results.scores()
        assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_scoring_is_stored_once(path: Path) -> None:
    with Results.open(path) as results:
        id_ = results.add_explanation(explanation(), "k1")
        results.add_scoring(scoring(value=0.8), "k2", id_)
        results.add_scoring(scoring(value=0.1), "k2", id_)
        assert [s.value for s in results.scores(control="none", scorer="detection")] == [0.8]
        results.add_scoring(scoring(value=0.6), "k3", id_)
        column = results.score_column("layers.3", "detection", "balanced_accuracy")
        assert column.value.tolist() == [0.6]  # the latest scoring counts


def test_judgements_without_scorer_or_explanation_are_refused(path: Path) -> None:
    with Results.open(path) as results:
        with pytest.raises(InputError, match="name of their scorer"):
            results.add_scoring(scoring(), "k2", None)
        bare = Scoring(explanation=explanation(), scores=(), judgements={"none": JUDGEMENTS})
        id_ = results.add_explanation(explanation(), "k1")
        with pytest.raises(InputError, match="name of their scorer"):
            results.add_scoring(bare, "k2", id_)
        assert results.done("k2") == set()
        results.add_scoring(bare, "k2", id_, scorer="fuzzing")
        assert results.judgements(id_, "fuzzing") == JUDGEMENTS


def test_a_score_of_an_explanation_that_is_not_there_is_refused_whole(path: Path) -> None:
    with Results.open(path) as results:
        with pytest.raises(sqlite3.IntegrityError):
            results.add_scoring(scoring(), "k2", 12345)
        assert results.scores() == []
        assert results.done("k2") == set()


def test_skips_meta_and_stages_round_trip(path: Path) -> None:
    gone = Skipped(latent=latent(), stage="select", reason=NASTY, have=3, need=10)
    with Results.open(path) as results:
        results.add_skip(gone, "k1")
        results.add_skip(gone, "k1")
        assert results.skips() == results.skips("layers.3") == [gone]
        assert results.skips("other") == []
        assert results.done("k1") == {latent()}
        results.put_meta("corpus", {"tokens": 3, NASTY: [1.5, None, NASTY]})
        results.put_meta("corpus", {"tokens": 4})
        assert results.get_meta("corpus") == {"tokens": 4}
        assert results.get_meta("other", 7) == 7
        assert results.meta() == {"corpus": {"tokens": 4}}
        results.add_stage("k1", "explain", {"name": "rule"})
        assert results.stages() == {"k1": ("explain", {"name": "rule"})}
        results.mark_done("k9", [latent(5), latent(5)])
        assert results.done("k9") == {latent(5)}


def test_filters_and_columns_agree_with_one_another(path: Path) -> None:
    write_run(path, 6)
    with Results.open(path, readonly=True) as results:
        for index in (0, 5):
            assert {s.latent.index for s in results.scores(index=index)} == {index}
        assert len(results.scores(coder="layers.3", control="other_latent")) == 5
        assert results.scores(metric="no such metric") == []
        column = results.score_column("layers.3", "detection", "balanced_accuracy", explainer="k1")
        assert column.index.tolist() == [0, 1, 3, 4, 5]
        assert len(column) == 5
        assert column.n_failed.tolist() == [2] * 5
        assert len(results.score_column("layers.3", "detection", "balanced_accuracy", explainer="k0")) == 0
        assert results.scored() == [
            ("baseline", "auprc_token", "none"),
            ("detection", "balanced_accuracy", "none"),
            ("detection", "balanced_accuracy", "other_latent"),
        ]
        assert results.explainers() == [("k1", "rule")]
        assert results.coders() == ("layers.3",)
        judged = list(results.judgement_columns("layers.3", "detection", explainer="k1"))
        assert [one.index for one, _ in judged] == [0, 1, 3, 4, 5]
        assert judged[0][1].strata == ("decile_0", "silent")


def test_trained_coders_come_before_nulls(path: Path) -> None:
    with Results.open(path) as results:
        results.add_latents([stats(1, "a@random-coder"), stats(1, "b"), stats(1, "a")])
        assert results.coders() == ("a", "b", "a@random-coder")


def test_tables_are_columns(path: Path) -> None:
    write_run(path)
    with Results.open(path, readonly=True) as results:
        scores = results.table("scores")
        assert Counter(len(column) for column in scores.values()) == {9: len(scores)}
        assert scores["explanation"].tolist().count(-1) == 3
        assert scores["value"].dtype == np.float64
        latents = results.table("latents")
        assert latents["selected"].dtype == bool
        assert latents["idx"].tolist() == [0, 1, 2, 3]
        assert results.table("explanations")["status"] == ["ok"] * 3
        assert results.table("skips")["reason"] == ["rare"]
        assert results.table("done")["key"].count("k2") == 3
        assert results.table("stages")["stage"] == ["explain"]
        assert results.table("meta") == {"key": [], "value": []}
        judged = results.table("judgements")
        assert {len(column) for column in judged.values()} == {3 * 6}
        assert judged["prediction"][:4].tolist() == [1, 1, -1, 0]
        assert judged["status"][2] == "refused"
        assert judged["control"][4] == "other_latent"
        with pytest.raises(NotFoundError, match=r"unknown table 'score'.*scores"):
            results.table("score")


def test_an_empty_database_has_empty_tables(path: Path) -> None:
    with Results.open(path) as results:
        for name in ("latents", "scores", "judgements", "explanations"):
            assert {len(column) for column in results.table(name).values()} == {0}
        assert results.canonical_rows() == []


# -- packing ----------------------------------------------------------------------------------------------------------

judgement = st.builds(
    lambda status, truth, prediction, probability, stratum, row, start: Judgement(
        row=row,
        start=start,
        document=start - 5,
        stratum=stratum,
        truth=truth,
        prediction=prediction if status == "ok" else None,
        probability=probability,
        status=status,
    ),
    st.sampled_from(["ok", "unparsed", "refused", "failed"]),
    st.booleans(),
    st.booleans(),
    st.none() | st.floats(0, 1),
    st.text(st.characters(exclude_categories=()), max_size=5),
    st.integers(0, 2**62),
    st.integers(0, 2**31 - 1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(judgement, max_size=12))
def test_packed_judgements_come_back_equal(judged: list[Judgement]) -> None:
    assert unpack(pack(judged)) == tuple(judged)
    columns = unpack_columns(pack(judged))
    assert [columns.strata[s] for s in columns.stratum.tolist()] == [j.stratum for j in judged]


def test_packing_is_compact() -> None:
    many = [JUDGEMENTS[i % 2] for i in range(200)]
    assert len(pack(many)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"EXJ",
        b"XXX\x01" + zlib.compress(b""),
        pack(JUDGEMENTS)[:-3],
        b"EXJ\x03" + pack(JUDGEMENTS)[4:],
        b"EXJ\x02" + zlib.compress(zlib.decompress(pack(JUDGEMENTS)[4:]) + b"x"),
        b"EXJ\x02" + zlib.compress(zlib.decompress(pack(JUDGEMENTS[1:2])[4:])[:-17] + b"\xff" + bytes(16)),
        b"EXJ\x01" + zlib.compress(b"\xff" * 40),
    ],
)
def test_damaged_judgements_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        unpack(data)


# -- opening and migrating --------------------------------------------------------------------------------------------


def test_released_migrations_are_never_edited() -> None:
    # Add a line for a new migration; never change a line that is here.
    released = ["eaf89c93d3902f08", "e5431e399d83c9db", "ab3b72b9775539da"]
    assert [m.hash for m in MIGRATIONS] == released


def test_an_older_format_is_upgraded_and_keeps_its_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(path)
    before = Results.open(path, readonly=True).canonical_rows()
    added = (*MIGRATIONS, Migration(name="notes", statements=("CREATE TABLE notes (text TEXT)",)))
    monkeypatch.setattr("exegete.results_connection.MIGRATIONS", added)
    monkeypatch.setattr(
        "exegete.results_connection.check_format", lambda d, p: results_schema.check_format(d, p, added)
    )
    monkeypatch.setattr("exegete.results_connection.migrate", lambda d, p: migrate(d, p, added))
    with pytest.raises(InputError, match="has format 3 and this exegete reads 4; upgrade it with"):
        Results.open(path, readonly=True)
    Results.open(path).close()
    raw = sqlite3.connect(path)
    assert raw.execute("SELECT number, name FROM migrations ORDER BY 1").fetchall()[3:] == [(4, "notes")]
    assert raw.execute("PRAGMA user_version").fetchone() == (4,)
    raw.close()
    assert Results.open(path, readonly=True).canonical_rows() == before
    monkeypatch.undo()
    with pytest.raises(InputError, match="format 4, written by a newer exegete; this one reads up to 3"):
        Results.open(path)
    with pytest.raises(InputError, match="newer"):
        Results.open(path, readonly=True)


def test_a_rewritten_history_is_refused(path: Path) -> None:
    Results.open(path).close()
    raw = sqlite3.connect(path)
    raw.execute("UPDATE migrations SET hash = 'other'")
    raw.commit()
    raw.close()
    with pytest.raises(CorruptError, match="history does not match"):
        Results.open(path)


def test_a_migration_that_fails_leaves_nothing(path: Path) -> None:
    path.parent.mkdir(parents=True)
    database = sqlite3.connect(path, isolation_level=None)
    broken = (Migration(name="broken", statements=("CREATE TABLE a (x)", "CREATE TABLE a (x)")),)
    with pytest.raises(sqlite3.OperationalError):
        migrate(database, path, broken)
    assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    database.close()


def test_other_files_are_refused(path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are no results"):
        Results.open(path, readonly=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(NotFoundError, match="no results yet"):
        Results.open(path, readonly=True)
    path.write_bytes(b"this is no database at all " * 100)
    for readonly in (False, True):
        with pytest.raises(CorruptError, match="not a readable database"):
            Results.open(path, readonly=readonly)
    path.unlink()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE theirs (x)")
    raw.commit()
    raw.close()
    with pytest.raises(CorruptError, match="not exegete's"):
        Results.open(path)


def test_settings_of_the_connection(path: Path) -> None:
    with Results.open(path) as results:
        asked = {
            name: results._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "application_id")
        }
    assert asked == {
        "journal_mode": "wal",
        "synchronous": 1,
        "foreign_keys": 1,
        "busy_timeout": 30_000,
        "application_id": 0x45584547,
    }


# -- transactions and readers -----------------------------------------------------------------------------------------


def write_half(results: Results) -> None:
    with results.transaction():
        results.add_explanation(explanation(), "k")
        results.add_scoring(scoring(), "k2", 12345)


def test_a_full_disk_is_said_in_a_line(path: Path) -> None:
    with Results.open(path) as results:
        results._database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(InputError, match=r"cannot be written: database or disk is full; is the disk full\?"):
            results.put_meta("long", "x" * 1_000_000)
        assert results.meta() == {}


def test_a_transaction_is_whole_or_nothing(path: Path) -> None:
    with Results.open(path) as results:
        with pytest.raises(sqlite3.IntegrityError):
            write_half(results)
        assert results.explanations() == {}
        with results.transaction():
            for i in range(3):
                results.add_explanation(explanation(i), "k")
        assert len(results.explanations()) == 3


def test_batching_commits_once(path: Path) -> None:
    seen: Counter[str] = Counter()
    with Results.open(path) as results, fault_hook(lambda name: seen.update([name])):
        with results.transaction():
            for i in range(50):
                results.add_scoring(scoring(i), "k2", results.add_explanation(explanation(i), "k1"))
        assert seen == {"before commit results": 1, "after commit results": 1}
        results.put_meta("a", 1)
        assert seen["before commit results"] == 2


def test_a_reader_works_beside_a_writer_and_a_snapshot_stands_still(path: Path) -> None:
    with Results.open(path) as writer:
        writer.add_explanation(explanation(1), "k")
        with Results.open(path, readonly=True) as reader:
            with writer.transaction():
                writer.add_explanation(explanation(2), "k")
                assert len(reader.explanations()) == 1
            assert len(reader.explanations()) == 2
            with reader.snapshot():
                assert len(reader.explanations()) == 2
                writer.add_explanation(explanation(3), "k")
                with reader.snapshot():
                    assert len(reader.explanations()) == 2
                with pytest.raises(InputError, match="for reading only"):
                    reader.put_meta("a", 1)
            assert len(reader.explanations()) == 3


def test_a_reader_cannot_write(path: Path) -> None:
    write_run(path)
    with Results.open(path, readonly=True) as reader, pytest.raises(InputError, match="for reading only"):
        reader.put_meta("a", 1)


# -- interrupted and whole runs ---------------------------------------------------------------------------------------


def test_canonical_rows_forget_ids_times_and_order(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    write_run(path)
    write_run(other, order=-1)
    with Results.open(path) as a, Results.open(other) as b:
        assert [e.latent for e in a.explanations().values()] == [e.latent for e in b.explanations().values()]
        assert list(a.explanations()) != list(b.explanations())
        assert a.canonical_rows() == b.canonical_rows()
        b.put_meta("manifest", {"made": "now"})
        assert a.canonical_rows() == b.canonical_rows()
        assert {json.loads(line)[0] for line in a.canonical_rows()} == {
            "latents",
            "explanations",
            "scores",
            "skips",
            "done",
            "stages",
            "judgements",
        }
        b.add_skip(Skipped(latent=latent(9), stage="select", reason="rare", have=1, need=2), "k1")
        assert a.canonical_rows() != b.canonical_rows()


def test_an_exception_at_any_fault_point_is_made_good_by_running_again(path: Path, tmp_path: Path) -> None:
    points: list[str] = []
    with fault_hook(points.append):
        write_run(path, 3)
    expected = Results.open(path, readonly=True).canonical_rows()
    assert set(points) == {
        "before commit migration",
        "after commit migration",
        "before commit results",
        "after commit results",
    }
    for stop in range(len(points)):
        again = tmp_path / f"{stop}.db"
        left = stop

        def interrupt(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt(name)

        with fault_hook(interrupt), pytest.raises(KeyboardInterrupt):
            write_run(again, 3)
        write_run(again, 3)
        with Results.open(again, readonly=True) as results:
            assert results.canonical_rows() == expected


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_results import write_run
from exegete.files import fault_hook
from exegete.results import Results
folder = Path(sys.argv[2])
points = []
with fault_hook(points.append):
    write_run(folder / "whole.db", 3)
expected = Results.open(folder / "whole.db", readonly=True).canonical_rows()
for stop in range(len(points)):
    path = folder / f"killed-{stop}.db"
    child = os.fork()
    if child == 0:
        seen = []
        def kill(name):
            seen.append(name)
            if len(seen) > stop:
                os.kill(os.getpid(), 9)
        with fault_hook(kill):
            write_run(path, 3)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    write_run(path, 3)
    assert Results.open(path, readonly=True).canonical_rows() == expected, points[stop]
print(len(points))
"""


def test_a_kill_at_any_fault_point_is_made_good_by_running_again(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
