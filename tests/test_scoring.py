"""What scoring asks for before it begins, and what it gives scorers beside examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from exegete.analysis.summary import summarise
from exegete.cli import main
from exegete.cli.options import build_parser, given
from exegete.config import RunConfig
from exegete.errors import ConfigError, InputError
from exegete.llm.reading import check_reader
from exegete.llm.scripted import ScriptedClient
from exegete.pipeline import Pipeline, run_pipeline
from exegete.planner import plan
from exegete.runs import Run
from exegete.scoring import check_scorers
from exegete.types import LLMReply, LLMRequest


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
        (stage,) = plan(settings, where).stages
        assert stage.stage == "discrimination"
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
