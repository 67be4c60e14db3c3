"""Detection and fuzzing in rounds: asked only until a latent's question is settled."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from exegete.errors import LLMError
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient, SimulatedJudge
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, LatentId, LLMReply, Score


def block(world: Any, judge: Any, words: range, **options: Any) -> list[tuple[Explanation, Any]]:
    return [(world.explanation(w), dataclasses.replace(world.view(w, **options), llm=judge)) for w in words]


def pick(scoring: Scoring, metric: str, control: str = "none") -> Score:
    (found,) = [s for s in scoring.scores if s.metric == metric and s.control == control]
    return found


def judge_of(world: Any, hits: float, false_alarms: float) -> SimulatedJudge:
    return SimulatedJudge(world.table, true_positive_rate=hits, false_positive_rate=false_alarms, seed=2)


@pytest.mark.parametrize("scorer", [DetectionScorer, FuzzingScorer])
@pytest.mark.parametrize(("hits", "false_alarms", "expected"), [(0.97, 0.03, 1.0), (0.6, 0.45, 0.0)])
def test_clear_latents_are_settled_with_few_judgements(
    world: Any, scorer: Any, hits: float, false_alarms: float, expected: float
) -> None:
    judge = judge_of(world, hits, false_alarms)
    items = block(world, judge, range(1, 13), n_fire=100, n_silent=100, donors=(20, 21))
    scorings = list(scorer(certify=0.8).score(items))
    assert {s.explanation.latent.index for s in scorings} == set(range(1, 13))
    decided = Counter(pick(s, "certified").value for s in scorings)
    assert decided[expected] >= 11
    asked = [len(s.judgements["none"]) for s in scorings]
    assert np.mean(asked) < 80
    for scoring, n in zip(scorings, asked, strict=True):
        assert scoring.scores[0].metric == "balanced_accuracy"
        assert scoring.scores[0].n_total == n == scoring.detail["judgements"]
        assert len(scoring.judgements["other_latent"]) == 2 * n
        assert json.loads(json.dumps(scoring.detail)) == scoring.detail
        assert not [s for s in scoring.scores if s.metric.startswith(("population_", "sensitivity_"))]
        assert pick(scoring, "balanced_accuracy", "other_latent").n_total == 2 * n


def test_judgements_are_of_the_windows_they_are_said_of_each_once_and_both_classes(world: Any) -> None:
    judge = judge_of(world, 1.0, 0.0)
    (item,) = block(world, judge, range(3, 4), n_fire=60, n_silent=60, donors=(5, 6))
    (scoring,) = DetectionScorer(certify=0.8, per_request=4).score([item])
    own = scoring.judgements["none"]
    by_place = {(e.row, e.start): e for e in item[1].examples.part("test")}
    assert len({(j.row, j.start) for j in own}) == len(own) < 60
    for j in own:
        assert j.truth == by_place[j.row, j.start].fires == j.prediction
    assert sum(j.truth for j in own) * 2 == len(own)
    first = scoring.judgements["other_latent"][: len(own)]
    assert [(j.row, j.start) for j in first] == [(j.row, j.start) for j in own]
    assert [j.prediction for j in first] == [5 in by_place[j.row, j.start].tokens for j in first]


def test_rounds_take_what_they_need_for_the_width_that_was_asked_for(world: Any) -> None:
    judge = judge_of(world, 0.9, 0.1)
    scorings = list(DetectionScorer(stop_when=0.2, controls="none").score(
        block(world, judge, range(1, 5), n_fire=150, n_silent=150)))  # fmt: skip
    for scoring in scorings:
        score = pick(scoring, "balanced_accuracy")
        assert 20 < score.n_total < 300
        assert (score.high - score.low) / 2 <= 0.2
        assert score.low <= 0.9 <= score.high
        assert set(scoring.judgements) == {"none"}


def test_an_executed_rule_can_be_judged_in_rounds_too(world: Any) -> None:
    view = world.view(3, n_fire=60, n_silent=60, donors=(5, 6))
    (scoring,) = FuzzingScorer(kind="active", certify=0.8).score([(world.explanation(3), view)])
    assert pick(scoring, "certified").value == 1.0
    assert pick(scoring, "certified").scorer == "fuzzing_active"
    assert len(scoring.judgements["none"]) < 60
    assert sum(j.truth for j in scoring.judgements["none"]) * 2 == len(scoring.judgements["none"])


def test_failures_are_counted_and_made_up_for(world: Any) -> None:
    judge, lost = judge_of(world, 1.0, 0.0), 0

    class Losing(ScriptedClient):  # type: ignore[misc]
        async def reply(self, request: Any) -> LLMReply:
            nonlocal lost
            self.requests.append(request)
            if len(self.requests) % 3 == 0:
                lost += len(read_question(request.messages).excerpts)
                return LLMReply(text=None, finish="error", error="HTTP 500")
            return await judge.reply(request)

    (item,) = block(world, Losing([]), range(3, 4), n_fire=80, n_silent=80)
    (scoring,) = DetectionScorer(certify=0.8, controls="none").score([item])
    score = pick(scoring, "balanced_accuracy")
    assert score.n_failed == lost > 0
    assert score.value == 1.0
    assert pick(scoring, "certified").value == 1.0


def test_nothing_answered_is_nothing_decided(world: Any) -> None:
    client = ScriptedClient(lambda r: LLMReply(text=None, finish="error", error="gone"))
    (item,) = block(world, client, range(3, 4), n_fire=10, n_silent=10)
    (scoring,) = DetectionScorer(certify=0.8, controls="none").score([item])
    assert math.isnan(pick(scoring, "balanced_accuracy").value)
    assert math.isnan(pick(scoring, "certified").value)
    assert {j.status for j in scoring.judgements["none"]} == {"failed"}


def test_failed_explanations_and_empty_blocks_and_dead_servers(world: Any) -> None:
    failed = Explanation(latent=LatentId(coder="c", index=4), text=None, status="failed", explainer={})
    (scoring,) = DetectionScorer(certify=0.8).score([(failed, world.view(4))])
    assert (scoring.explanation, scoring.scores) == (failed, ())
    assert list(DetectionScorer(certify=0.8).score([])) == []
    dead = ScriptedClient(lambda r: (_ for _ in ()).throw(LLMError("no such model")))
    with pytest.raises(LLMError, match="no such model"):
        list(DetectionScorer(certify=0.8).score(block(world, dead, range(3, 5))))


def test_the_same_block_gives_the_same_scorings(world: Any) -> None:
    def run() -> list[Any]:
        items = block(world, judge_of(world, 0.85, 0.2), range(1, 7), n_fire=60, n_silent=60, donors=(20, 21))
        found = DetectionScorer(certify=0.8).score(items, concurrency=3)
        return sorted((str(s.explanation.latent), str(s.scores), s.judgements["none"]) for s in found)

    assert run() == run()
