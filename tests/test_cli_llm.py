"""The commands that have to do with language models and other tools: plan, llm, status, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import exegete as ex
from exegete.cli import main
from exegete.config import RunConfig, merge
from exegete.errors import InputError, LLMError
from exegete.llm.local_server import serve
from exegete.llm.scripted import ScriptedClient
from exegete.pipeline import Pipeline
from exegete.preparing import prepare


@pytest.fixture(scope="module")
def collected(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-llm") / "run"
    base: dict[str, Any] = {
        "subject": str(toy_folder / "model"),
        "coder": [str(toy_folder / "coders")],
        "hookpoints": ["layers.0"],
        "corpus": {"text": [str(toy_folder / "text.jsonl")], "row_length": 64},
        "collect": {"batch_tokens": 512, "threads": 1},
        "examples": {"window": 8, "n_train": 6, "n_test": 5, "n_negatives": 5, "min_train": 2, "min_test": 2},
        "latents": {"count": 4},
    }
    settings = RunConfig.from_dict(base)
    with Pipeline(settings, folder) as pipeline:
        pipeline.collect(prepare(settings))
    return folder


def usable(run: ex.Run) -> list[int]:
    """Latents with enough windows of either kind; the toy's differ from machine to machine."""
    chosen = run.select("layers.0", range(run.store("layers.0").width))
    return [found.latent.index for found in chosen if isinstance(found, ex.ExampleSet)]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(list(arguments)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    return error


def test_a_plan_of_a_run_counts_stages_tokens_and_money(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(collected), "--explainer", "default", "--llm", "openai/gpt-4o-mini"]
    text = out(capsys, *arguments)
    assert ["layers.0", "explain", "4", "of", "4"] in [line.split()[:5] for line in text.splitlines()]
    assert "at list" in text
    found = json.loads(out(capsys, *arguments, "--json"))
    assert [s["stage"] for s in found["stages"]] == ["explain", "detection", "fuzzing"]
    enough, detection, fuzzing = (s["requests"] for s in found["stages"])
    assert 1 <= enough <= 4  # latents with enough windows
    # Of each (5 + 5) windows, 5 a request, for its own explanation and those of the others that are no near neighbours:
    # never five donors.
    assert 2 * enough <= detection == fuzzing <= 2 * enough * enough
    assert found["total"]["dollars"]["batch"] == pytest.approx(found["total"]["dollars"]["list"] / 2)
    plan = ex.plan(ex.open_run(collected), explainer="default", llm={"llm": "openai/gpt-4o-mini"})
    assert plan.total.requests == found["total"]["requests"]


def test_a_plan_before_collecting_says_what_it_assumes(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(
        capsys,
        *("plan", str(toy_folder / "model"), str(toy_folder / "coders"), "--text", str(toy_folder / "text.jsonl")),
        *("--max-tokens", "10k", "--explainer", "default", "--llm", "http://127.0.0.1:9/v1#m", "--latents", "7"),
    )
    assert "10,000 tokens, 1 pass(es) through the subject, 2 coder(s)" in text
    assert ["layers.0", "explain", "7", "of", "7", "1.0"] in [line.split()[:6] for line in text.splitlines()]
    assert "price: not known" in text
    assert "nothing is collected yet" in text
    assert "no language model" in out(capsys, "plan", str(toy_folder / "model"), str(toy_folder / "coders"))


def test_a_tokenizer_makes_the_plan_exact(
    collected: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(collected), "--explainer", "default", "--llm", "http://127.0.0.1:9/v1#m", "--json"]
    estimated = json.loads(out(capsys, *arguments))
    exact = json.loads(out(capsys, *arguments, "--llm-tokenizer", str(toy_folder / "model")))
    assert (estimated["exact"], exact["exact"]) == (False, True)
    assert exact["total"]["prompt_tokens"] != estimated["total"]["prompt_tokens"]
    assert "no tokenizer" in refused(capsys, *arguments, "--llm-tokenizer", str(toy_folder))


def test_a_language_model_is_asked_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(ScriptedClient(["ready"] * 50)) as server:
        text = out(capsys, "llm", server.spec)
        found = json.loads(out(capsys, "llm", server.spec, "--json"))
    assert "chat: yes" in text
    assert "price: not known" in text
    assert found["chat"] is True
    assert found["schema"] is False
    assert "no language model" in refused(capsys, "llm", "none")
    assert "unknown language model" in refused(capsys, "llm", "nonsense")


def test_a_budget_without_a_price_and_bad_arguments_are_refused(
    collected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(collected)
    unpriced = refused(capsys, "explain", run, "--explainer", "default", "--llm", "http://127.0.0.1:9/v1#m",
                       "--budget", "1")  # fmt: skip
    assert "budget_tokens" in unpriced
    assert "per_request" in refused(capsys, "score", run, "--scorers", "detection:per_reqest=1")
    assert "NAME:ARGUMENT=VALUE" in refused(capsys, "score", run, "--scorers", "detection:5")


def test_which_windows_are_shown_may_change_until_something_is_explained(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(collected, run)
    out(capsys, "explain", str(run), "-q", "--n-train", "4", "--strategy", "importance")
    assert ex.open_run(run).config.examples.n_train == 4
    assert "examples.n_train: 4 → 5" in refused(capsys, "explain", str(run), "-q", "--n-train", "5")
    out(capsys, "score", str(run), "-q")
    out(capsys, "report", str(run))


def test_scorers_take_arguments_after_a_colon(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(collected)
    out(capsys, "explain", run, "-q")
    out(capsys, "score", run, "-q", "--scorers", "fuzzing:threshold=0.5")
    results = ex.open_run(collected).results()
    try:
        specs = [spec["scorer"] for stage, spec in results.stages().values() if stage == "fuzzing"]
    finally:
        results.close()
    assert [spec["args"]["threshold"] for spec in specs] == [0.5]


def test_a_run_is_exported_by_command_and_from_python(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out(capsys, "export", str(collected), "--to", "delphi", "--out", str(tmp_path / "a"))
    ex.export_run(ex.open_run(collected), to="delphi", out=tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "latents").rglob("*.safetensors"))
    assert names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert "empty" in refused(capsys, "export", str(collected), "--to", "delphi", "--out", str(tmp_path / "a"))
    assert "unknown coder" in refused(
        capsys, "export", str(collected), "--to", "delphi", "--out", str(tmp_path / "c"), "--coders", "no"
    )


def test_a_run_takes_its_language_model_as_plans_do(toy_folder: Path, tmp_path: Path) -> None:
    base = {"subject": str(toy_folder / "model"), "coder": [str(toy_folder / "coders")], "explainer": "default"}
    config = RunConfig.from_dict({**base, "latents": {"count": 3, "min_rate": 0.5}, "llm": {"retries": 0}})
    for llm in ("http://127.0.0.1:9/v1#m", {"llm": "http://127.0.0.1:9/v1#m"}):
        with pytest.raises(LLMError, match=r"127\.0\.0\.1:9"):
            ex.run(config, out=tmp_path / "run", llm=llm)


def test_changes_of_a_run_are_laid_over_its_settings(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A group with one change had all its other settings reset.
    seen: list[RunConfig] = []
    monkeypatch.setattr("exegete.api.run_pipeline", lambda config, out, llm=None: seen.append(config))
    ex.run(RunConfig.from_dict({"latents": {"count": 3, "min_rate": 0.5}}), out=tmp_path, latents={"count": 4})
    assert (seen[0].latents.count, seen[0].latents.min_rate) == (4, 0.5)


def test_a_client_given_by_name_is_ended(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr("exegete.llm.calling.Caller.end", lambda self: ended.append(self.name))
    run = ex.open_run(collected)
    view = run.latent("layers.0", usable(run)[0])
    with serve(ScriptedClient(lambda request: "[EXPLANATION]: x")) as server:
        assert ex.explain(view, explainer="default", llm=server.spec).text == "x"
        assert ended == [server.spec]


def test_plans_lay_changes_over_a_configuration(toy_folder: Path) -> None:
    base = {"subject": str(toy_folder / "model"), "coder": [str(toy_folder / "coders")], "explainer": "default"}
    few = ex.plan(RunConfig.from_dict(base), llm={"llm": "openai/gpt-4o-mini"}, latents={"count": 20})
    many = ex.plan(RunConfig.from_dict(merge(base, {"latents": {"count": 40}})), llm={"llm": "openai/gpt-4o-mini"})
    assert many.total.requests == 2 * few.total.requests


def test_a_score_is_the_metric_asked_for(collected: Path) -> None:
    run = ex.open_run(collected)
    views = [run.latent("layers.0", index) for index in usable(run)]
    explained = [(ex.explain(view, explainer="rule"), view) for view in views]
    explanation, view = next((e, v) for e, v in explained if e.status == "ok")
    assert ex.score(explanation, view).metric == "balanced_accuracy"
    assert ex.score(explanation, view, metric="f1").metric == "f1"
    with pytest.raises(InputError, match="unknown metric of detection 'f2'"):
        ex.score(explanation, view, metric="f2")


def test_in_a_running_loop_as_of_a_notebook_calls_work_and_fail_as_elsewhere(collected: Path) -> None:
    import asyncio

    run = ex.open_run(collected)
    index = usable(run)[0]

    async def cell() -> None:
        view = run.latent("layers.0", index)
        with serve(ScriptedClient(["[EXPLANATION]: words"] * 9)) as server:
            explanation = ex.explain(view, explainer="default", llm=server.spec)
            assert explanation.text == "words"
            with pytest.raises(InputError, match="log probabilities"):
                ex.score(explanation, view, scorer="detection", llm=server.spec, probabilities=True)
        with pytest.raises(InputError, match="language model"):
            ex.score(explanation, view, scorer="detection")

    asyncio.run(cell())


def requests_of(capsys: pytest.CaptureFixture[str], collected: Path, *more: str) -> int:
    asked = ["plan", str(collected), "--explainer", "default", "--llm", "openai/gpt-4o-mini", "--json"]
    found = json.loads(out(capsys, *asked, "--scorers", "detection", *more))
    return int(next(s["requests"] for s in found["stages"] if s["stage"] == "detection"))


def test_nulls_are_chosen_on_the_command_line(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = requests_of(capsys, collected, "--controls", "none")
    assert requests_of(capsys, collected, "--controls", "empty") == 2 * none
    assert requests_of(capsys, collected, "--controls", "shuffled_words", "empty") == 3 * none
    assert requests_of(capsys, collected, "--controls", "shuffled_words", "--controls", "empty") == 3 * none
    whole = requests_of(capsys, collected, "--controls", "all")
    assert whole == requests_of(capsys, collected, "--controls", "other_latent", "shuffled_words", "empty") > 3 * none
    run = str(collected)
    assert "choose from 'other_latent'" in refused(capsys, "score", run, "--controls", "nonsense")
    assert "each alone" in refused(capsys, "score", run, "--controls", "none", "empty")
    assert "names each null once" in refused(capsys, "score", run, "--controls", "empty", "empty")


def test_scoring_without_nulls_and_in_rounds_prints_what_came_of_it(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(collected, run, ignore=shutil.ignore_patterns("results.db*"))
    out(capsys, "explain", str(run), "-q")
    text = out(capsys, "score", str(run), "-q", "--scorers", "detection", "--controls", "none", "--certify", "0.8")
    opened = ex.open_run(run)
    assert {str(name) for name in opened.table("scores")["control"]} == {"none"}
    (found,) = ex.stopped(opened)
    assert (found.scorer, found.certify, found.stop_when, found.plumbing) == ("detection", 0.8, None, False)
    assert found.judgements <= 10 * len(found.latents)
    assert sum(found.decisions) == len(found.latents)
    assert f"{found.judgements:,} judgements, " in text
    assert f"the {found.fixed_test:,} of a fixed test of equal errors" in text
    assert "with --certify 0.8" in out(capsys, "report", str(run), "-q")
    page = opened.report_path.read_text()
    assert "Judged only as much as needed" in page
    assert "null mean" not in page  # without nulls no figure speaks of them
    again = out(capsys, "score", str(run), "-q", "--scorers", "detection", "--certify", "none")
    assert "--certify" not in again
    assert ex.stopped(ex.open_run(run)) == ()


def test_a_plan_says_who_answers_and_what_early_stopping_comes_to_at_most(
    collected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", str(collected), "--explainer", "default", "--llm", "openai/gpt-4o-mini", "--scorers"]
    found = json.loads(
        out(capsys, *asked, "surprisal", "intervention", "intervention:faithful=true", "embedding", "--json")
    )
    by = {s["stage"]: (s["by"], s["requests"]) for s in found["stages"]}
    assert by["surprisal"] == by["intervention"] == ("by the subject, in this process", 0)
    assert by["embedding"] == ("by the embedder, in this process", 0)
    assert by["intervention:faithful=true"][1] > 0
    assert found["total"]["requests"] == by["explain"][1] + by["intervention:faithful=true"][1]
    text = out(capsys, *asked, "surprisal")
    assert "by the subject, in this process" in text
    served = json.loads(out(capsys, *asked, "surprisal", "--reader", "http://127.0.0.1:9/v1#base", "--json"))
    (reading,) = [s for s in served["stages"] if s["stage"] == "surprisal"]
    assert reading["by"] == "by http://127.0.0.1:9/v1#base"
    assert reading["requests"] > 0
    assert served["total"]["requests"] == by["explain"][1]

    fixed = json.loads(out(capsys, *asked, "detection", "--json"))
    early = json.loads(out(capsys, *asked, "detection", "--stop-when", "0.2", "--json"))
    (bound,) = [s for s in early["stages"] if s["stage"] == "detection"]
    assert bound["requests"] == next(s["requests"] for s in fixed["stages"] if s["stage"] == "detection")
    assert 0 < bound["expected"]["requests"] <= bound["requests"]
    assert "expected" not in fixed["total"]
    assert "Beta(6, 2.2)" in " ".join(early["remarks"])
