"""Runs with a language model over HTTP: killed anywhere and begun again, sharing kept replies, within a budget."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import pytest

from exegete.config import RunConfig, merge
from exegete.errors import BudgetError
from exegete.keys import Keys
from exegete.llm.client import LLMClient
from exegete.llm.local_server import LocalServer, serve
from exegete.llm.open import client_from_spec
from exegete.llm.protocol import read_question
from exegete.llm.spending import read_totals
from exegete.pipeline import Pipeline
from exegete.preparing import prepare
from exegete.runs import Run, open_run
from exegete.types import LLMReply, LLMRequest

CHILD = """
import os, sys
from exegete.cli import main
from exegete.files import fault_hook
run, name, nth, *options = sys.argv[1:]
seen = 0
def hook(point):
    global seen
    seen += point == name
    if seen == int(nth) and point == name:
        os._exit(137)
with fault_hook(hook):
    for stage in ("explain", "score"):
        code = main([stage, run, *options])
        if code:
            sys.exit(code)
"""
POINTS = (
    "lease taken",
    "request reserved",
    "reply received",
    "before commit reply",
    "after commit reply",
    "reply stored",
    "reply settled",
    "before commit results",
    "after commit results",
)


@final
class Answers(LLMClient):
    """Explains with a fixed text and judges by a hash of the excerpts; remembers what it was asked."""

    def __init__(self, delay: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self._delay = delay
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "answers"

    async def reply(self, request: LLMRequest) -> LLMReply:
        with self._lock:
            self.asked[json.dumps([dict(m) for m in request.messages], sort_keys=True)] += 1
        time.sleep(self._delay)
        question = read_question(request.messages)
        if question.kind == "explain":
            text = f"[EXPLANATION]: {hashlib.blake2b(repr(question.excerpts).encode(), digest_size=4).hexdigest()}"
        else:
            bits = [hashlib.blake2b(e.text.encode(), digest_size=1).digest()[0] & 1 for e in question.excerpts]
            text = json.dumps({"verdicts": bits})
        return LLMReply(text=text, finish="stop", prompt_tokens=200, completion_tokens=20)

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def settings(toy: Path, **changes: Any) -> RunConfig:
    base = {
        "subject": str(toy / "model"),
        "coder": [str(toy / "coders")],
        "hookpoints": ["layers.0"],
        "explainer": "default",
        "scorers": ["detection", "fuzzing"],
        "donors": 2,
        "corpus": {"text": [str(toy / "text.jsonl")], "row_length": 64},
        "collect": {"batch_tokens": 512, "threads": 1},
        "examples": {"window": 8, "n_train": 6, "n_test": 5, "n_negatives": 5, "min_train": 2, "min_test": 2},
        "latents": {"count": 4},
        "llm": {"concurrency": 4},
    }
    return RunConfig.from_dict(merge(base, changes))


@pytest.fixture(scope="module")
def collected(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "run"
    config = settings(toy_folder)
    with Pipeline(config, folder) as pipeline:
        pipeline.collect(prepare(config))
    return folder


@contextlib.contextmanager
def copied(collected: Path, folder: Path, delay: float = 0.0) -> Iterator[tuple[Path, Answers, LocalServer]]:
    shutil.copytree(collected, folder / "run")
    answers = Answers(delay)
    with serve(answers) as server:
        yield folder / "run", answers, server


def child(run: Path, spec: str, cache: Path, *, point: str = "", nth: int = 0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "EXEGETE_CACHE": str(cache)}
    command = [sys.executable, "-c", CHILD, str(run), point, str(nth), "--llm", spec, "-q"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[bytes]) -> int:
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 137, -signal.SIGKILL), output.decode()
    return process.returncode


def stored(cache: Path) -> int:
    path = cache / "replies.db"
    if not path.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM replies").fetchone()[0])


def rows(run: Path) -> list[str]:
    results = open_run(run).results()
    try:
        return results.canonical_rows()
    finally:
        results.close()


@pytest.fixture(scope="module")
def whole(collected: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[str]]:
    """How many different requests an undisturbed run sends, and what it finds."""
    folder = tmp_path_factory.mktemp("whole")
    with copied(collected, folder) as (run, answers, server):
        assert finished(child(run, server.spec, folder / "cache")) == 0
        assert set(answers.asked.values()) == {1}
        assert stored(folder / "cache") == len(answers.asked)
        return len(answers.asked), without_server(rows(run))


def without_server(found: list[str]) -> list[str]:
    """Results without the port of the server, which is part of the model's name, and the keys that hash it."""
    return sorted(re.sub(r"[0-9a-f]{16,}|127\.0\.0\.1:\d+", "…", row) for row in found)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing_and_pays_for_nothing_twice(
    point: str, collected: Path, whole: tuple[int, list[str]], tmp_path: Path
) -> None:
    everything, expected = whole
    cache = tmp_path / "cache"
    with copied(collected, tmp_path) as (run, answers, server):
        assert finished(child(run, server.spec, cache, point=point, nth=3)) == 137
        kept = stored(cache)
        first = Counter(answers.asked)
        answers.asked.clear()
        assert finished(child(run, server.spec, cache)) == 0
        assert sum(answers.asked.values()) == len(answers.asked) <= everything - kept
        assert len(first | answers.asked) == everything
        assert without_server(rows(run)) == expected
        check_ledger(run, first, answers.asked)


def check_ledger(run: Path, *asked: Counter[str]) -> None:
    """No request that was sent is missing on the ledger; those of which nothing came back count at their worst."""
    totals = read_totals(run / "ledger.db")
    requests = sum(t.requests for t in totals if t.outcome != "cached")
    assert requests >= sum(sum(counter.values()) for counter in asked)


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_loses_nothing_and_pays_for_nothing_twice(
    seed: int, collected: Path, whole: tuple[int, list[str]], tmp_path: Path
) -> None:
    everything, expected = whole
    cache = tmp_path / "cache"
    wanted = random.Random(seed).randrange(2, everything - 1)
    with copied(collected, tmp_path, delay=0.02) as (run, answers, server):
        process = child(run, server.spec, cache)
        while sum(answers.asked.values()) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert finished(process) == -signal.SIGKILL
        kept = stored(cache)
        answers.asked.clear()
        assert finished(child(run, server.spec, cache)) == 0
        assert sum(answers.asked.values()) == len(answers.asked) <= everything - kept
        assert without_server(rows(run)) == expected


def test_two_runs_at_once_pay_for_no_request_twice(
    collected: Path, whole: tuple[int, list[str]], tmp_path: Path
) -> None:
    everything, expected = whole
    other = tmp_path / "other"
    shutil.copytree(collected, other)
    with copied(collected, tmp_path, delay=0.01) as (run, answers, server):
        both = [child(folder, server.spec, tmp_path / "cache") for folder in (run, other)]
        assert [finished(process) for process in both] == [0, 0]
        assert len(answers.asked) == everything
        assert set(answers.asked.values()) == {1}
        assert without_server(rows(run)) == without_server(rows(other)) == expected
        totals = [total for folder in (run, other) for total in read_totals(folder / "ledger.db")]
        assert sum(total.requests for total in totals if total.outcome == "stop") == everything


def test_a_run_stops_at_its_budget_and_goes_on_with_more(
    collected: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXEGETE_CACHE", str(tmp_path / "cache"))
    with copied(collected, tmp_path) as (run, answers, server):
        config = settings(toy_folder, llm={"llm": server.spec, "budget_tokens": 9_000})
        client = client_from_spec(server.spec, config.llm, folder=run)
        with Pipeline(config, run) as pipeline:
            pipeline.explain(client)
            with pytest.raises(BudgetError, match="budget"):
                pipeline.score(client)
        sent = sum(answers.asked.values())
        totals = read_totals(run / "ledger.db")
        assert sent > 4
        paid = [total for total in totals if total.outcome != "cached"]
        assert sum(total.prompt_tokens + total.completion_tokens for total in paid) <= 9_000
        more = settings(toy_folder, llm={"llm": server.spec, "budget_tokens": 10_000_000})
        client = client_from_spec(server.spec, more.llm, folder=run)
        with Pipeline(more, run) as pipeline:
            pipeline.explain(client)
            pipeline.score(client)
        assert set(answers.asked.values()) == {1}


@final
class Moody(LLMClient):
    """Answers as ``Answers`` does, but its first explanations are prose, and the one after them fails."""

    def __init__(self, unparsed: int, name: str = "moody") -> None:
        self.answers, self._name, self._unparsed, self._seen = Answers(), name, unparsed, 0

    @property
    def name(self) -> str:
        return self._name

    async def reply(self, request: LLMRequest) -> LLMReply:
        reply = await self.answers.reply(request)
        if "[EXPLANATION]" not in (reply.text or ""):
            return reply
        self._seen += 1
        if self._seen <= 2 * self._unparsed:  # asked for once more
            return LLMReply(text="prose", finish="stop", prompt_tokens=1, completion_tokens=1)
        if self._unparsed and self._seen == 2 * self._unparsed + 1:
            return LLMReply(text=None, finish="error", error="HTTP 500")
        return reply

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def statuses(run: Path) -> Counter[str]:
    return Counter(map(str, open_run(run).table("explanations")["status"]))


def test_a_failed_explanation_is_tried_again_and_a_plan_knows_what_is_never_scored(
    collected: Path, toy_folder: Path, tmp_path: Path
) -> None:
    from exegete.planner import plan

    shutil.copytree(collected, tmp_path / "run")
    client = Moody(1)
    config = settings(toy_folder, llm={"llm": "http://127.0.0.1:9/v1#moody", "concurrency": 1}, donors=5)
    client._name = config.llm.llm
    with Pipeline(config, tmp_path / "run") as pipeline:
        pipeline.explain(client)
        ok = statuses(tmp_path / "run")["ok"]  # a latent of a toy may have too few windows to be explained
        assert statuses(tmp_path / "run") == {"ok": ok, "unparsed": 1, "failed": 1}
        found = plan(config, Run(tmp_path / "run"))
        assert {s.stage: s.left for s in found.stages} == {"explain": 1, "detection": ok + 1, "fuzzing": ok + 1}
        asked = sum(client.answers.asked.values())
        pipeline.explain(client)
        assert statuses(tmp_path / "run") == {"ok": ok + 1, "unparsed": 1}
        pipeline.score(client)
        # The explanations judge one another, and no near one: nobody has five donors.
        assert sum(client.answers.asked.values()) - asked == found.total.requests <= 1 + 2 * 2 * (ok + 1) ** 2
    assert plan(config, Run(tmp_path / "run")).total.requests == 0


def test_another_model_than_the_one_that_explained_may_judge(collected: Path, toy_folder: Path, tmp_path: Path) -> None:
    # It said "nothing is explained yet".
    shutil.copytree(collected, tmp_path / "run")
    config = settings(toy_folder, scorers=["detection"])
    with Pipeline(config, tmp_path / "run") as pipeline:
        pipeline.explain(Moody(0, "strong"))
        pipeline.score(Moody(0, "cheap"))
        first = len(pipeline.run.table("scores")["value"])
        pipeline.score(Moody(0, "cheap"))
        assert len(pipeline.run.table("scores")["value"]) == first > 0
        pipeline.explain(Moody(0, "cheap"))  # its own go first where it has any
        pipeline.score(Moody(0, "cheap"))
        assert len(pipeline.run.table("scores")["value"]) == 2 * first


def test_a_change_of_the_judges_temperature_is_a_change_of_its_scores(collected: Path, toy_folder: Path) -> None:
    config = settings(toy_folder, explainer="rule")
    keys = Keys(Run(collected), config)
    cold = client_from_spec("http://127.0.0.1:9#m", config.llm)
    warm = client_from_spec("http://127.0.0.1:9#m", settings(toy_folder, llm={"temperature": 1.0}).llm)
    assert cold is not None
    assert warm is not None
    assert keys.score("detection", cold, "x") != keys.score("detection", warm, "x")
    cold.end()
    warm.end()


def test_the_plan_counts_what_the_run_then_asks(
    collected: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exegete.planner import plan

    monkeypatch.setenv("EXEGETE_CACHE", str(tmp_path / "cache"))
    with copied(collected, tmp_path) as (run, answers, server):
        config = settings(toy_folder, llm={"llm": server.spec})
        found = plan(config, Run(run))
        client = client_from_spec(server.spec, config.llm, folder=run)
        with Pipeline(config, run) as pipeline:
            pipeline.explain(client)
            assert sum(answers.asked.values()) == sum(s.asked.requests for s in found.stages if s.stage == "explain")
            pipeline.score(client)
        assert sum(answers.asked.values()) == found.total.requests
        assert plan(config, Run(run)).total.requests == 0
