"""What scoring asks for before it begins, and what it gives scorers beside examples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import exegete as ex
from exegete import scoring
from exegete.analysis.summary import summarise
from exegete.cli import main
from exegete.cli.options import build_parser, given
from exegete.config import RunConfig
from exegete.demo import assets
from exegete.errors import ConfigError, InputError
from exegete.llm.open import client_from_spec
from exegete.llm.reading import check_reader
from exegete.llm.scripted import ScriptedClient
from exegete.pipeline import Pipeline, report, run_pipeline
from exegete.planner import plan
from exegete.results_schema import MIGRATIONS, Migration, check_format, migrate
from exegete.runs import Run, open_run
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.scorer import make_scorer
from exegete.scoring import ScoreStage, check_scorers
from exegete.types import LatentId, LLMReply, LLMRequest
from exegete.views import Donor


def config(toy: Path, **changes: Any) -> RunConfig:
    base = RunConfig.from_dict(
        {
            "subject": str(toy / "model"),
            "coder": [str(toy / "coders")],
            "hookpoints": ["layers.0"],
            "scorers": ["detection"],
            "donors": 3,
            "corpus": {"text": [str(toy / "text.jsonl")], "row_length": 64},
            "collect": {"batch_tokens": 512, "threads": 1},
            "examples": {"window": 8, "n_train": 12, "n_test": 12, "n_negatives": 12, "min_train": 2, "min_test": 2},
            "latents": {"count": 6},
        }
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def run(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pipeline(config(toy_folder), tmp_path_factory.mktemp("scoring") / "run")


def score(run: Run, settings: RunConfig, llm: ScriptedClient | None = None) -> None:
    with Pipeline(settings, run.folder) as pipeline:
        pipeline.score(llm)


def test_two_scorers_of_one_name_are_refused_and_the_same_one_twice_is_not(toy_folder: Path) -> None:
    with pytest.raises(ConfigError, match="both store their scores as 'fuzzing'"):
        check_scorers(config(toy_folder, scorers=("fuzzing", "fuzzing:per_request=1")))
    assert len(check_scorers(config(toy_folder, scorers=("fuzzing", "fuzzing:kind=default")))) == 2
    assert len(check_scorers(config(toy_folder, scorers=("fuzzing", "fuzzing:kind=active,per_request=1")))) == 2


@pytest.mark.parametrize("known", ["auto", "subject", "hf/gpt2", "vllm/o/m", "http://h/v1#m", "openai/m", "simulated"])
def test_readers_of_a_known_form_pass(known: str) -> None:
    check_reader(known)


@pytest.mark.parametrize("wrong", ["nope", "subject/x", "none", "hf/", "", "http://user:secret@h/v1#m", "http://h/v1"])
def test_readers_of_no_known_form_are_refused_before_work_starts(wrong: str, toy_folder: Path, tmp_path: Path) -> None:
    base = config(toy_folder, scorers=("surprisal",))
    settings = dataclasses.replace(base, scoring=dataclasses.replace(base.scoring, reader=wrong))
    with pytest.raises(InputError) as found:
        run_pipeline(settings, tmp_path / "run")
    assert "secret" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_are_refused_do_not_become_those_of_the_run(run: Run, toy_folder: Path) -> None:
    before = (run.folder / "config.yaml").read_text()
    base = config(toy_folder, scorers=("surprisal",))
    with pytest.raises(InputError):
        score(run, dataclasses.replace(base, scoring=dataclasses.replace(base.scoring, reader="nope")))
    assert (run.folder / "config.yaml").read_text() == before


def test_a_scorer_gets_as_many_near_latents_as_it_asks_for(run: Run, toy_folder: Path) -> None:
    base = config(toy_folder, scorers=("discrimination:near=3",))
    score(run, dataclasses.replace(base, scoring=dataclasses.replace(base.scoring, near=1)))
    with run.results() as results:
        found = results.details("layers.0", "discrimination").values()
    assert 1 < max(len(detail["near"]) for detail in found) <= 3


def test_a_failed_null_is_asked_again(run: Run, toy_folder: Path) -> None:
    asked = 0

    def answer(request: LLMRequest) -> str | LLMReply:
        nonlocal asked
        asked += 1
        fails = broken and asked > 3  # a latent's own explanation is asked about first, with 24 windows in 1 request
        return LLMReply(text=None, finish="error", error="down") if fails else str([1] * 24)

    settings = config(toy_folder, scorers=("detection:per_request=24",), latents=run.config.latents)
    broken = True
    score(run, settings, ScriptedClient(answer))
    with run.results() as results:
        lacking = {s.latent for s in results.scores(scorer="detection") if s.plumbing and s.n_failed}
    assert lacking
    broken, asked = False, 0
    score(run, settings, ScriptedClient(answer))
    assert asked
    with run.results() as results:
        assert not any(s.n_failed for s in results.scores(scorer="detection") if s.plumbing)
        (coder,) = summarise(results).coders
    shown = {s.plumbing: s for s in coder.explainers[0].scorers if s.scorer == "detection"}
    assert shown[True].judge == "scripted"
    assert shown[False].judge == "executed rule"  # the measurement keeps its own judge
    asked = 0
    score(run, settings, ScriptedClient(answer))
    assert asked == 0


def test_plans_of_discrimination_count_requests_with_and_without_firings(run: Run, toy_folder: Path) -> None:
    settings = config(toy_folder, scorers=("discrimination",))
    settings = dataclasses.replace(settings, llm=dataclasses.replace(settings.llm, llm="simulated"))
    for where in (None, run):
        (stage,) = (stage for stage in plan(settings, where).stages if stage.stage == "discrimination")
        assert stage.asked.requests > 0


def test_a_plan_refuses_unknown_scorers_and_readers(toy_folder: Path) -> None:
    with pytest.raises(InputError, match="unknown scorer"):
        plan(config(toy_folder, scorers=("nope",)))
    base = config(toy_folder, scorers=("surprisal",))
    with pytest.raises(InputError, match="unknown reader"):
        plan(dataclasses.replace(base, scoring=dataclasses.replace(base.scoring, reader="nope")))


def test_none_takes_an_optional_setting_back(capsys: pytest.CaptureFixture[str]) -> None:
    options = build_parser().parse_args(["score", "RUN", "--certify", "none", "--stop-when", "0.1", "--budget", "None"])
    assert given(options) == {"scoring": {"certify": None, "stop_when": 0.1}, "llm": {"budget": None}}
    with pytest.raises(SystemExit):
        main(["score", "RUN", "--certify", "much"])
    assert "invalid float value: 'much'" in capsys.readouterr().err


def counted(asked: list[LLMRequest]) -> ScriptedClient:
    def answer(request: LLMRequest) -> str:
        asked.append(request)
        return str([1] * 24)

    return ScriptedClient(answer)


def test_more_explained_latents_do_not_mix_with_contrasts_among_fewer(
    run: Run, toy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    made = open_run(folder)

    def judged(count: int) -> int:
        asked: list[LLMRequest] = []
        base = config(toy_folder, scorers=("discrimination:near=2,per_request=24",))
        settings = dataclasses.replace(base, latents=dataclasses.replace(base.latents, count=count))
        with Pipeline(settings, folder) as pipeline:
            pipeline.explain(None)
            pipeline.score(counted(asked))
        return len(asked)

    def stored() -> dict[str, dict[int, dict[str, Any]]]:
        with made.results() as results:
            stages = results.stages().items()
            keys = [k for k, (name, spec) in stages if name == "discrimination" and spec["judge"] == "scripted"]
            owner = {i: e.latent.index for i, e in results.explanations("layers.0").items()}
            table = results.table("details")
            rows = zip(table["key"], table["explanation"], table["data"], strict=True)
            found: dict[str, dict[int, dict[str, Any]]] = {key: {} for key in keys}
            for key, explanation, data in rows:
                if key in found:
                    found[key][owner[int(explanation)]] = json.loads(data)
            return found

    assert judged(6) > 0
    (before,) = (found for key, found in stored().items())
    assert judged(6) == 0
    caplog.clear()
    again = judged(10)
    (key,) = set(stored()) - {k for k, found in stored().items() if found == before}
    after = stored()[key]
    assert before in stored().values()  # what was paid for is still there
    nearest = {i: [near["latent"] for near in detail["near"]] for i, detail in after.items()}
    earlier = {i: [near["latent"] for near in detail["near"]] for i, detail in before.items()}
    kept = {i for i, near in earlier.items() if nearest.get(i) == near}
    changed = set(earlier) - kept
    assert kept
    assert changed
    assert {after[i] == before[i] for i in kept} == {True}
    assert again > 0
    assert f"{len(changed)} latents have other nearest ones" in caplog.text
    with made.results() as results:
        (spec,) = (spec for k, (_, spec) in results.stages().items() if k == key)
        column = results.score_column("layers.0", "discrimination", "bits", explainer=spec["explain"], plumbing=True)
        assert set(column.index.tolist()) == set(after)  # of one contest, all of them
    assert judged(10) == 0


def test_scores_say_whose_explanations_their_null_is_of(run: Run) -> None:
    with run.results() as results:
        found = results.details("layers.0", "detection")
        explained = {e.latent.index for e in results.explanations("layers.0").values()}
    assert found
    for index, detail in found.items():
        assert 1 <= len(detail["donors"]) <= 3
        assert index not in detail["donors"]
        assert set(detail["donors"]) <= explained


def test_donors_are_looked_for_only_where_a_scorer_takes_them_and_negatives_always(
    run: Run, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    asked: list[str] = []

    def no_donors(*_: Any, **__: Any) -> dict[LatentId, tuple[Donor, ...]]:
        asked.append("donors")
        return {}

    monkeypatch.setattr(scoring, "choose_donors", no_donors)
    monkeypatch.setattr(ScoreStage, "_ready_negatives", lambda *_: asked.append("negatives"))
    monkeypatch.setattr(DetectionScorer, "needs", frozenset({"examples"}))
    for name, looked in (
        ("detection:per_request=2", ["negatives"]),
        ("fuzzing:per_request=2", ["negatives", "donors"]),
    ):
        asked.clear()
        score(open_run(tmp_path / "run"), config(toy_folder, scorers=(name,), latents=run.config.latents))
        assert asked == looked * len(run.coders())


def test_an_older_runs_results_are_upgraded_by_its_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    newer = (*MIGRATIONS, Migration(name="notes", statements=("CREATE TABLE notes (text TEXT)",)))
    monkeypatch.setattr("exegete.results_connection.MIGRATIONS", newer)
    monkeypatch.setattr("exegete.results_connection.check_format", lambda d, p: check_format(d, p, newer))
    monkeypatch.setattr("exegete.results_connection.migrate", lambda d, p: migrate(d, p, newer))
    made = open_run(tmp_path / "run")
    with pytest.raises(InputError, match="upgrade it with: exegete report RUN"):
        made.results()
    report(made)
    made.results().close()


def test_whether_a_score_is_a_measurement_is_asked_of_every_view(
    run: Run, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    with run.results() as results:
        odd = sorted({s.latent.index for s in results.scores(scorer="detection")})[1]
    monkeypatch.setattr(DetectionScorer, "plumbing", lambda self, view: view.latent.index == odd)
    settings = config(toy_folder, scorers=("detection:per_request=3",), latents=run.config.latents)
    score(open_run(tmp_path / "run"), settings)
    with open_run(tmp_path / "run").results() as results:
        (key,) = (
            k
            for k, (name, spec) in results.stages().items()
            if name == "detection" and spec["scorer"]["args"]["per_request"] == 3
        )
        found = results.scores(key=key)
    assert {s.latent.index for s in found if s.plumbing} == {odd}
    assert len({s.latent.index for s in found}) > 1


def test_scores_of_what_a_simulated_model_wrote_are_plumbing_checks_in_python_too(run: Run) -> None:
    view = run.latent("layers.0", run.table("explanations")["idx"][0])
    rule = ex.explain(view)
    assert not ex.score(rule, view).plumbing
    assert ex.score(dataclasses.replace(rule, detail={"model": "simulated:true_positive_rate=1"}), view).plumbing
    written = ex.explain(view, explainer="default", llm=ScriptedClient(lambda _: "[EXPLANATION]: x", name="gpt"))
    assert written.detail["simulated"] is True
    fitted = dataclasses.replace(rule, detail=written.detail)
    assert ex.score(fitted, view).plumbing
    null = dataclasses.replace(fitted, latent=LatentId(coder="layers.0", index=10**6))
    assert ex.score(rule, view, donors=[null]).plumbing


def test_a_judge_that_knows_no_natural_language_measures_nothing(run: Run) -> None:
    view = run.latent("layers.0", run.table("explanations")["idx"][0])
    llm = client_from_spec(f"hf/{assets() / 'model'}", run.config.llm)
    assert llm is not None
    assert not llm.natural
    for name in ("detection", "fuzzing", "simulation", "intruder", "discrimination"):
        scorer = make_scorer(name, run.config)
        assert scorer.plumbing(dataclasses.replace(view, llm=llm))
    assert not make_scorer("detection", run.config).plumbing(view)
    assert not make_scorer("detection:judge=rule", run.config).plumbing(dataclasses.replace(view, llm=llm))
    llm.end()
