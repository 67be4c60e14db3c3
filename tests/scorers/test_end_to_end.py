"""The whole language-model path over HTTP, against a judge of known error rates and servers that break."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exegete.config import LLMConfig
from exegete.explainers.default import DefaultExplainer
from exegete.llm.calling import Caller
from exegete.llm.client import LLMClient
from exegete.llm.limits import Limits
from exegete.llm.local_server import serve
from exegete.llm.open import client_from_spec
from exegete.llm.openai_api import OpenAIBackend
from exegete.llm.openai_endpoint import parse_spec
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient, SimulatedJudge, known_windows
from exegete.rules import render
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.types import Explanation, LatentId, LLMReply, LLMRequest, Score
from exegete.views import Donor, LatentView

HITS, FALSE_ALARMS = 0.85, 0.25
MAIN = {"balanced_accuracy", "sensitivity", "specificity", "f1"}
THEORY = (HITS + 1 - FALSE_ALARMS) / 2


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXEGETE_CACHE", str(tmp_path))


def given(view: LatentView, llm: Any, donors: tuple[Donor, ...] | None = None) -> LatentView:
    chosen = view.donors if donors is None else donors
    return LatentView(latent=view.latent, tokens=view.tokens, examples=view.examples, donors=chosen, llm=llm)


def table_of(scores: Any) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in scores}


def null_theory(scorer: Any, view: LatentView) -> float:
    """What the donors' balanced accuracies average to on these very windows.

    Not quite a half: windows that hold the latent's own word have less room for a donor's.
    """
    accuracies = []
    for donor in view.donors:
        word = donor.explanation.latent.index
        rates: dict[bool, list[float]] = {True: [], False: []}
        for question in scorer.questions(view):
            here = question.item.tokens == word
            marks = question.item.marks
            fits = here.any() if marks is None else here[marks].all()
            rates[question.example.fires].append(HITS if fits else FALSE_ALARMS)
        accuracies.append((np.mean(rates[True]) + 1 - np.mean(rates[False])) / 2)
    return float(np.mean(accuracies))


def test_explain_detect_and_fuzz_over_http_give_what_theory_says(world: Any) -> None:
    judge = SimulatedJudge(world.table, true_positive_rate=HITS, false_positive_rate=FALSE_ALARMS, seed=3)
    with serve(judge) as server:
        client = client_from_spec(server.spec, LLMConfig(timeout=20.0))
        view = given(world.view(3, donors=(5, 6, 7), n_fire=60, n_silent=60), client)
        (explanation,) = DefaultExplainer().explain([view])
        assert (explanation.status, explanation.text) == ("ok", 'the text " w03"')
        for scorer in (DetectionScorer(), FuzzingScorer()):
            (scoring,) = scorer.score([(explanation, view)])
            found = table_of(scoring.scores)
            own, null = found["balanced_accuracy", "none"], found["balanced_accuracy", "other_latent"]
            assert (own.n_total, own.n_failed) == (120, 0)
            assert (null.n_total, null.n_failed) == (360, 0)
            assert own.low <= THEORY <= own.high
            assert abs(null.value - null_theory(scorer, view)) < 0.11  # four standard errors of three donors' mean
            assert own.low > null.high


@pytest.mark.parametrize("kind", [DetectionScorer, FuzzingScorer])
@pytest.mark.parametrize(("hits", "false_alarms"), [(1.0, 0.0), (0.9, 0.1), (0.7, 0.4), (0.5, 0.5)])
def test_a_judge_of_known_rates_yields_the_balanced_accuracy_of_theory(
    world: Any, kind: Any, hits: float, false_alarms: float
) -> None:
    view = world.view(4, n_fire=150, n_silent=150)
    explanation = world.explanation(4, text=render_of(world, 4), program=False)
    judge = SimulatedJudge(
        world.table,
        true_positive_rate=hits,
        false_positive_rate=false_alarms,
        windows=known_windows([view.examples], world.table),
        seed=7,
    )
    (scoring,) = kind().score([(explanation, given(view, judge))])
    found = table_of(scoring.scores)
    for metric, theory in (
        ("balanced_accuracy", (hits + 1 - false_alarms) / 2),
        ("sensitivity", hits),
        ("specificity", 1 - false_alarms),
    ):
        score = found[metric, "none"]
        error = np.sqrt((hits * (1 - hits) + false_alarms * (1 - false_alarms)) / 150)
        assert abs(score.value - theory) <= 4 * error
        assert score.low <= score.value <= score.high
        assert score.n_scored == 300


def render_of(world: Any, word: int) -> str:
    from exegete.rules.language import Clause, Rule, TokenAt

    return render(Rule((Clause((TokenAt(0, (word,)),), 0.9, 1.0),)), world.table)


def test_the_interval_covers_theory_about_as_often_as_it_says(world: Any) -> None:
    view = world.view(4, n_fire=50, n_silent=50)
    covered = 0
    for seed in range(40):
        judge = SimulatedJudge(
            true_positive_rate=0.8,
            false_positive_rate=0.3,
            seed=seed,
            predicates={"w": lambda text, spans: " w04" in text},
        )
        (scoring,) = DetectionScorer().score([(world.explanation(4, text="w", program=False), given(view, judge))])
        score = table_of(scoring.scores)["balanced_accuracy", "none"]
        covered += score.low <= 0.75 <= score.high
    assert covered >= 34  # at 95 %, fewer than 34 of 40 has a chance of 1 in 300


@pytest.mark.parametrize("scorer", [DetectionScorer(), FuzzingScorer()])
def test_the_nulls_interval_covers_what_donors_average_to_about_as_often_as_it_says(world: Any, scorer: Any) -> None:
    covered = 0
    for seed in range(40):
        judge = SimulatedJudge(true_positive_rate=HITS, false_positive_rate=FALSE_ALARMS, seed=seed)
        view = given(world.view(3, donors=(5, 6, 7, 8, 9), n_fire=30, n_silent=30, seed=seed), judge)
        (scoring,) = scorer.score([(world.explanation(3), view)])
        null = table_of(scoring.scores)["balanced_accuracy", "other_latent"]
        covered += null.low <= null_theory(scorer, view) <= null.high
    assert covered >= 34


def test_a_known_rule_text_is_judged_the_same_by_judge_and_execution(world: Any) -> None:
    view = world.view(4, donors=(5, 6, 7))
    told = {w: world.explanation(w, text=render_of(world, w)) for w in (4, 5, 6, 7)}
    donors = tuple(Donor(explanation=told[w], rank=i) for i, w in enumerate((5, 6, 7)))
    judge = SimulatedJudge(
        world.table,
        true_positive_rate=1.0,
        false_positive_rate=0.0,
        windows=known_windows([view.examples], world.table),
    )
    for kind in (DetectionScorer, FuzzingScorer):
        (asked,) = kind().score([(told[4], given(view, judge, donors))])
        (executed,) = kind().score([(told[4], given(view, None, donors))])
        assert asked.judgements == executed.judgements
        assert str(asked.scores) == str(executed.scores)


def test_an_explanation_without_a_predicate_gets_a_coin(world: Any) -> None:
    judge = SimulatedJudge(world.table, true_positive_rate=1.0, false_positive_rate=0.0)
    view = given(world.view(4, n_fire=150, n_silent=150), judge)
    (scoring,) = DetectionScorer().score([(world.explanation(4, text="something vague", program=False), view)])
    score = table_of(scoring.scores)["balanced_accuracy", "none"]
    assert score.low <= 0.5 <= score.high


# -- servers that break -----------------------------------------------------------------------------------------------


@contextmanager
def broken_server(status: int, body: bytes, wait: float = 0.0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(wait)
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}#toy"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "wait", "state"),
    [
        (500, b"{}", 0.0, "failed"),
        (200, b"<html>not a model</html>", 0.0, "failed"),
        (200, b'{"choices": []}', 0.0, "failed"),
        (200, b"{}", 1.0, "failed"),
        (200, b'{"choices": [{"finish_reason": "stop", "message": {"content": "I think so."}}]}', 0.0, "unparsed"),
        (200, b'{"choices": [{"finish_reason": "content_filter", "message": {"content": "[1, 1]"}}]}', 0.0, "refused"),
        (
            200,
            b'{"choices": [{"finish_reason": "length", "message": {"content": "<think> [1, 1, 1, 1, 1]"}}]}',
            0.0,
            "unparsed",
        ),
    ],
)
def test_a_broken_server_makes_counts_and_never_scores(
    world: Any, status: int, body: bytes, wait: float, state: str
) -> None:
    with broken_server(status, body, wait) as spec:
        endpoint = parse_spec(spec)
        assert endpoint is not None
        client = Caller(OpenAIBackend(endpoint, timeout=0.3 if wait else 10.0), retries=0)
        view = given(world.view(3, donors=(5, 6), n_fire=5, n_silent=5), client)
        (explanation,) = DefaultExplainer().explain([view])
        assert (explanation.status, explanation.text) == (state, None)
        told = world.explanation(3, program=False)
        (scoring,) = DetectionScorer().score([(told, view)])
    for score in scoring.scores:
        assert math.isnan(score.value)
        assert score.n_scored == 0
        if score.metric in MAIN:
            assert score.n_failed == score.n_total == (10 if score.control == "none" else 20)
    judged = [j for part in scoring.judgements.values() for j in part]
    assert {(j.prediction, j.status) for j in judged} == {(None, state)}


MOODS = ("fine", "late", "prose", "wrong length", "refused", "failing")
STATES = {"prose": "unparsed", "wrong length": "unparsed", "refused": "refused", "failing": "failed"}


class Moody(LLMClient):
    """A judge that is right, but whose server has a mood for every question and keeps to it."""

    name = "moody"

    def __init__(self, world: Any) -> None:
        self.judge = SimulatedJudge(world.table, true_positive_rate=1.0, false_positive_rate=0.0)
        self.asked: dict[str, tuple[str, str, int]] = {}
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()

    async def reply(self, request: LLMRequest) -> LLMReply:
        question = read_question(request.messages)
        text = str((question.kind, question.explanation, question.excerpts))
        mood = MOODS[zlib.crc32(text.encode()) % len(MOODS)]
        with self.lock:
            self.asked[text] = (question.kind, mood, len(question.excerpts))
            self.attempts[text] += 1
            if mood == "failing" or (mood == "late" and self.attempts[text] < 3):
                return LLMReply(text=None, finish="error", error="out of memory")
        said = await self.judge.reply(request)
        text = {"prose": "I would say so.", "wrong length": "[1, 0, 1, 0, 1, 0, 1]"}.get(mood, str(said.text))
        return LLMReply(text=text, finish="refused" if mood == "refused" else "stop")

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def test_whatever_a_server_does_every_latent_and_every_window_ends_in_a_counted_state(world: Any) -> None:
    moody = Moody(world)
    with serve(moody) as server:
        endpoint = parse_spec(server.spec)
        assert endpoint is not None
        client = Caller(OpenAIBackend(endpoint), limits=Limits(8), retries=3, backoff=0.01)
        views = {w: given(world.view(w, donors=(20, 21), n_fire=13, n_silent=13), client) for w in range(1, 9)}
        explained = {e.latent.index: e for e in DefaultExplainer().explain(list(views.values()))}
        states = Counter(STATES.get(mood, "ok") for kind, mood, _ in moody.asked.values())
        assert sorted(explained) == sorted(views)
        assert Counter(e.status for e in explained.values()) == states
        assert len(states) > 2
        for scorer in (DetectionScorer(), FuzzingScorer()):
            moody.asked.clear()
            items = [(world.explanation(w, program=False), view) for w, view in views.items()]
            found = {s.explanation.latent.index: s for s in scorer.score(items)}
            assert sorted(found) == sorted(views)
            windows: Counter[str] = Counter()
            for _, mood, n in moody.asked.values():
                windows[STATES.get(mood, "ok")] += n
            judged = [j for scoring in found.values() for part in scoring.judgements.values() for j in part]
            assert Counter(j.status for j in judged) == windows
            assert sum(windows.values()) == 8 * 3 * 26
            for scoring in found.values():
                for score in scoring.scores:
                    if score.metric in MAIN:
                        assert score.n_scored + score.n_failed == (26 if score.control == "none" else 52)
            assert all(
                j.prediction == j.truth for s in found.values() for j in s.judgements["none"] if j.status == "ok"
            )


def test_an_explanation_taken_early_gives_back_its_connections(world: Any) -> None:
    with serve(ScriptedClient(lambda request: "[EXPLANATION]: x")) as server:
        client = client_from_spec(server.spec, LLMConfig())
        views = [given(world.view(word), client) for word in (3, 4, 5)]
        for _ in range(2):
            explanation = next(iter(DefaultExplainer().explain(views)))
            assert isinstance(explanation, Explanation)
            assert explanation.latent in {LatentId(coder="c", index=i) for i in (3, 4, 5)}
