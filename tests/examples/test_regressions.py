"""Defects of released code, each with a test of its name, from a store to scores through public names alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exegete.config import ExampleConfig
from exegete.examples import StoreData, select_many, split_segments
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.metrics import auroc
from exegete.scorers import scorers
from exegete.types import ExampleSet, Explanation, LLMReply, TokenLogprob
from exegete.views import LatentView

CONFIG = ExampleConfig(window=8, n_train=20, n_test=30, n_negatives=30, min_train=5, min_test=5)
LATENTS = 12


@pytest.fixture(scope="module")
def store(make_store: Callable[..., Any]) -> Any:
    return make_store(lengths=[30, 64, 200, 126, 90] * 16, rates=[0.02, 0.05, 0.01] * (LATENTS // 3), seed=3)


def selected(store: Any, config: ExampleConfig = CONFIG, seed: int = 0) -> list[ExampleSet]:
    data = StoreData(store, split_segments(store.corpus, seed=seed, test_share=0.5))
    found = [s for s in select_many(data, range(LATENTS), config, seed) if isinstance(s, ExampleSet)]
    assert len(found) == LATENTS
    return found


def view_of(store: Any, examples: ExampleSet, llm: Any = None) -> LatentView:
    return LatentView(latent=examples.latent, tokens=store.corpus.table, examples=examples, llm=llm)


def scored(store: Any, examples: ExampleSet, reply: Any, **args: Any) -> tuple[Any, ScriptedClient]:
    client = ScriptedClient(reply)
    told = Explanation(latent=examples.latent, text="x", status="ok", explainer={"name": "x"})
    scorer = scorers.make("detection", args)
    (scoring,) = scorer.score([(told, view_of(store, examples, client))])
    return scoring, client


def score_of(scoring: Any, metric: str) -> Any:
    (found,) = [s for s in scoring.scores if s.metric == metric and s.control == "none"]
    return found


# Negatives were marked at three quarters of the window and cut where no positive could lie.


def test_positional_tell(store: Any) -> None:
    starts, marks, truth = [], [], []
    for examples in selected(store):
        questions = scorers.make("fuzzing", {"judge": "llm"}).questions(view_of(store, examples))  # type: ignore[attr-defined]
        fires = np.array([q.example.fires for q in questions])
        shown = np.stack([q.item.marks for q in questions])
        assert shown.any(axis=1).all()  # no window gives itself away by showing no mark
        assert sorted(map(tuple, shown[fires].tolist())) == sorted(map(tuple, shown[~fires].tolist()))
        starts.append([q.example.start for q in questions])
        marks.append(shown)
        truth.append(fires)
    label, placed, shown = np.concatenate(truth), np.concatenate(starts), np.concatenate(marks)
    for tell in (*shown.T, shown.sum(axis=1), shown.argmax(axis=1)):
        assert auroc(label, tell.astype(float)).value == 0.5
    for offset in (placed, placed % 8):  # where the windows themselves lie
        found = auroc(label, offset.astype(float), level=0.999)
        assert found.low <= 0.5 <= found.high


# Train and test examples overlapped by 20 to 40 %.


@pytest.mark.parametrize("centred", [False, True])
def test_overlap(store: Any, centred: bool) -> None:
    for examples in selected(store, dataclasses.replace(CONFIG, centred=centred)):
        train, test = examples.part("train"), examples.part("test")
        assert not set(train.document.tolist()) & set(test.document.tolist())
        seen = {(row, at) for row, start in zip(train.row, train.start, strict=True) for at in range(start, start + 8)}
        judged = [(row, at) for row, start in zip(test.row, test.start, strict=True) for at in range(start, start + 8)]
        assert not seen & set(judged)
        assert len(set(judged)) == len(judged)


# Negatives were drawn with replacement: the more were asked for, the more were the same.


@pytest.mark.parametrize("wanted", [30, 10_000])
def test_with_replacement(store: Any, wanted: int) -> None:
    config = dataclasses.replace(CONFIG, n_train=wanted, n_test=wanted, n_negatives=wanted)
    for examples in selected(store, config):
        windows = examples.windows
        places = list(zip(windows.row.tolist(), windows.start.tolist(), strict=True))
        assert len(set(places)) == len(places)
        silent = examples.part("test", fires=False)
        assert 30 <= len(silent) <= wanted
        if wanted == 10_000:  # all there are, each for certain
            assert set(silent.probability.tolist()) == {1.0}


# The last, shorter batch was thrown away, or filled up with wrong answers.


def test_short_last_batch(store: Any) -> None:
    examples = selected(store, dataclasses.replace(CONFIG, n_test=7, n_negatives=6, min_test=1))[0]
    scoring, client = scored(
        store, examples, lambda r: str([1] * len(read_question(r.messages).excerpts)), per_request=5
    )
    assert [len(read_question(r.messages).excerpts) for r in client.requests] == [5, 5, 3]
    assert {j.prediction for j in scoring.judgements["none"]} == {True}
    sensitivity = score_of(scoring, "sensitivity")
    assert (sensitivity.value, sensitivity.n_total, sensitivity.n_failed) == (1.0, 13, 0)


# bool("0") is True.


def test_string_zero_is_true(store: Any) -> None:
    scoring, _ = scored(
        store, selected(store)[0], lambda r: str(["0"] * len(read_question(r.messages).excerpts)).replace("'", '"')
    )
    assert {j.prediction for j in scoring.judgements["none"]} == {False}
    assert score_of(scoring, "sensitivity").value == 0.0
    assert score_of(scoring, "specificity").value == 1.0


# Where log probabilities were missing, P(yes) was 0.


def test_logprob_missing_is_zero(store: Any) -> None:
    def without(request: Any) -> LLMReply:
        n = len(read_question(request.messages).excerpts)
        return LLMReply(text=str([1] * n), finish="stop")

    def with_some(request: Any) -> LLMReply:
        n = len(read_question(request.messages).excerpts)
        given = TokenLogprob(token="1", logprob=None, alternatives={"1": math.log(0.7), "0": math.log(0.3)})
        bare = TokenLogprob(token="1", logprob=None)
        tokens = [TokenLogprob(token="[", logprob=None)]
        for i in range(n):
            tokens += [bare if i % 2 else given, TokenLogprob(token="," if i < n - 1 else "]", logprob=None)]
        return LLMReply(text="".join(t.token for t in tokens), finish="stop", logprobs=tuple(tokens))

    examples = selected(store)[0]
    scoring, _ = scored(store, examples, without, probabilities=True)
    assert {j.probability for j in scoring.judgements["none"]} == {None}
    assert {j.prediction for j in scoring.judgements["none"]} == {True}
    missing = score_of(scoring, "auroc")
    assert math.isnan(missing.value)
    assert (missing.n_scored, missing.n_failed) == (0, missing.n_total)
    assert math.isnan(score_of(scoring, "outside_mass").value)
    scoring, _ = scored(store, examples, with_some, probabilities=True)
    found = {None if j.probability is None else round(j.probability, 9) for j in scoring.judgements["none"]}
    assert found == {0.7, None}
    assert score_of(scoring, "auroc").value == 0.5  # of equal ones, whatever is missing
    assert score_of(scoring, "auroc").n_scored == 36  # three of each five
