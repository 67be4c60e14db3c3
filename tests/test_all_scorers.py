"""Every scorer at once on the embedded default: all of them in the report, each with an interval and a null."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import exegete as ex
from exegete.analysis.summary import summarise, table_text
from exegete.analysis.text import PLUMBING
from exegete.cli import main
from exegete.demo import demo_config
from exegete.runs import Run

SCORERS = ("detection", "fuzzing", "embedding", "surprisal", "intervention", "simulation", "intruder")
LLM_JUDGED = {"detection", "fuzzing", "simulation", "intruder"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("all")
    config = demo_config(
        {
            "hookpoints": ["layers.2"],
            "nulls": [],
            "corpus": {"max_tokens": 80_000},
            "latents": {"count": 4, "min_rate": 0.01},
            "examples": {"n_test": 50, "n_negatives": 20, "min_test": 50},
        }
    )
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    named = [f"{name}:targets=1,n_score=10,seeds=2" if name == "intervention" else name for name in SCORERS]
    options = ["--llm", "simulated:tpr=0.95,fpr=0.05", "--scorers", *named, "--quiet"]
    assert main(["run", str(path), "--out", str(folder / "run"), *options]) == 0
    return ex.open_run(folder / "run")


def test_every_scorer_is_in_the_report_with_an_interval_and_a_null(run: Run) -> None:
    with run.results() as results:
        (coder,) = summarise(results).coders
        scores = results.scores()
    (explainer,) = coder.explainers
    found = {s.scorer: s for s in explainer.scorers}
    assert set(found) == set(SCORERS)
    for name, summary in found.items():
        assert summary.n, f"{name} scored nothing"
        assert summary.null, f"{name} stands beside no null"
        assert math.isfinite(summary.null_mean.value) or summary.n < 2, name
        own = [s for s in scores if (s.scorer, s.metric, s.control) == (name, summary.metric, "none")]
        known = [s for s in own if math.isfinite(s.value)]
        assert all(s.floor <= s.low <= s.value <= s.high <= s.ceiling for s in known), name
        assert all(s.method for s in known), name
        lifted = {s.metric for s in scores if s.scorer == name and s.control == summary.null}
        assert {summary.metric, f"{summary.metric}_lift"} <= lifted, name


def test_plumbing_checks_are_badged_and_stay_out_of_headlines(run: Run) -> None:
    with run.results() as results:
        summary = summarise(results)
        flagged = {s.scorer for s in results.scores() if s.plumbing}
    (explainer,) = summary.coders[0].explainers
    # The shipped model reads Python alone; MiniLM, which embeds, was trained on natural language.
    assert flagged == LLM_JUDGED | {"surprisal", "intervention"}
    assert [s.scorer for s in explainer.measured] == ["embedding"]
    assert summary.certified == ()
    assert {a.left for a in summary.agreements} | {a.right for a in summary.agreements} <= {"embedding"}
    text = table_text(summary)
    head, _, tail = text.partition(PLUMBING.capitalize())
    assert not re.search(r"\b(detection|surprisal|intervention|intruder)\b", head)
    assert all(name in tail for name in flagged)
    page = run.report_path.read_text()
    assert page.count(PLUMBING) >= len(flagged)
    table = re.search(r'<table id="scorers">.*?</table>', page, re.DOTALL)
    assert table is not None
    assert not any(name in table[0] for name in flagged)


def test_what_is_exported_holds_no_plumbing_check(run: Run, tmp_path: Path) -> None:
    made = ex.export_run(run, to="delphi", out=tmp_path / "delphi")
    assert list((made / "explanations").iterdir())
    assert not (made / "scores").exists()


def test_a_second_run_has_nothing_to_do(run: Run) -> None:
    with run.results() as results:
        before = results.canonical_rows()
    assert main(["score", str(run.folder), "--quiet"]) == 0
    with run.results() as results:
        assert results.canonical_rows() == before
