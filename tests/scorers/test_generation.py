from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from exegete.coders.load import load_coder
from exegete.errors import ConfigError, InputError
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.metrics import FrameCounts
from exegete.scorers.generation import GenerationScorer, Measured, measure, natural, parse_texts
from exegete.scorers.scorer import Scoring
from exegete.subjects import load_subject
from exegete.types import LLMReply, LLMRequest, Score
from exegete.views import Donor, LatentView


@pytest.fixture(scope="module")
def ran(toy_folder: Path) -> tuple[Any, Any]:
    subject = load_subject(str(toy_folder / "model"))
    return subject, load_coder(str(toy_folder / "coders"), hookpoint="layers.0")


def test_a_latent_is_measured_as_when_each_text_is_read_alone(ran: tuple[Any, Any]) -> None:
    subject, coder = ran
    texts = ["the cat sat on a mat", "x", "def ( 1 ) \n and then", "", "home home home home home home home"]
    fired = 0
    for index in range(12):
        found = measure(subject, coder, index, texts)
        for text, measured in zip(texts, found, strict=True):
            ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
            begin = [] if subject.bos is None else [subject.bos]
            tokens = torch.tensor([[*begin, *ids]])
            if not ids:
                assert measured == Measured(activation=0.0, token="")
                continue
            states = subject.capture(tokens, None, [coder.point])[coder.point][0]
            assert measured is not None
            code = coder.encode(states[len(begin) :])
            values = ((code.indices == index) * code.values).sum(dim=1)
            assert measured.activation == pytest.approx(max(0.0, float(values.max())), abs=1e-5)
            if measured.activation > 0:
                fired += 1
                assert measured.token == subject.token_table().texts[ids[int(values.argmax())]]
    assert fired > 5
    assert measure(subject, coder, 0, []) == []


def test_a_text_longer_than_the_subject_reads_is_missing_and_not_silent(ran: tuple[Any, Any]) -> None:
    subject, coder = ran
    positions = subject.model.config.max_position_embeddings
    long, short = "home " * (positions + 1), "the cat sat on a mat"
    assert measure(subject, coder, 0, [long, short, long]) == [None, *measure(subject, coder, 0, [short]), None]


# -- scores, with latents that are known -----------------------------------------------------------------------------


@pytest.fixture
def by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent n fires on the word wn, the stronger the longer the text."""

    def fires(subject: Any, coder: Any, index: int, texts: Sequence[str]) -> list[Measured]:
        word = f"w{index:02d}"
        return [
            Measured(activation=float(len(t)) if word in t else 0.0, token=word if word in t else "") for t in texts
        ]

    monkeypatch.setattr("exegete.scorers.generation.measure", fires)


def writes(share: int) -> Callable[[LLMRequest], str]:
    """Write texts of which so many hold the word of the explanation, and one that should not holds it too."""

    def reply(request: LLMRequest) -> str:
        question = read_question(request.messages)
        word = question.explanation.rpartition("w")[2][:2]
        n, m = question.wanted
        fitting = [f"text {i} of w{word}" if i < share else f"text {i} of nothing, w{word[0]}" for i in range(n)]
        other = [f"other {i}" + (f" w{word}" if i == 0 else "") for i in range(m)]
        return json.dumps({"fitting": fitting, "other": other})

    return reply


def view_of(world: Any, client: ScriptedClient, donors: Sequence[int] = ()) -> LatentView:
    view: LatentView = world.view(3, donors=donors)
    nobody: Any = object()  # what a latent does is patched
    return replace(view, llm=client, subject=nobody, coder=nobody)


def wilson(k: int, n: int) -> tuple[float, float]:
    low, high = stats.binomtest(k, n).proportion_ci(method="wilson")
    return float(low), float(high)


def scores_of(scoring: Scoring) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in scoring.scores}


def one(scorer: GenerationScorer, world: Any, view: LatentView) -> Scoring:
    (scoring,) = scorer.score([(world.explanation(3, text="the word w03"), view)])
    return scoring


@pytest.mark.usefixtures("by_word")
def test_shares_of_written_texts_are_what_the_latent_says(world: Any) -> None:
    client = ScriptedClient(writes(7))
    scoring = one(GenerationScorer(controls="none"), world, view_of(world, client))
    scores = scores_of(scoring)
    share = scores["share_firing", "none"]
    assert scoring.scores[0] is share
    low, high = wilson(7, 10)
    assert (share.value, share.low, share.high) == pytest.approx((0.7, low, high))
    assert (share.n_total, share.n_documents, share.flags) == (10, 10, ("few_documents",))
    assert scores["specificity", "none"].value == pytest.approx(0.9)
    assert scores["balanced_accuracy", "none"].value == pytest.approx(0.8)
    judged = scoring.judgements["none"]
    assert [j.prediction for j in judged] == [True] * 10 + [False] * 10
    assert [j.truth for j in judged] == [True] * 7 + [False] * 3 + [True] + [False] * 9
    assert len(client.requests) == 1
    first = scoring.detail["texts"][0]
    assert first == {"text": "text 0 of w03", "fits": True, "activation": 13.0, "token": "w03"}
    assert len(scoring.detail["texts"]) == 20


@pytest.mark.usefixtures("by_word")
def test_clarity_stands_written_texts_against_natural_ones_at_their_weight(world: Any) -> None:
    view = view_of(world, ScriptedClient(writes(7)))
    found = natural(view)
    windows = view.examples.part("test")
    assert len(found) == len(windows)
    frame = FrameCounts.of(view.examples)
    # half of the windows drawn fire, and a tenth of the frame
    assert (found > 0).mean() == pytest.approx(frame.firing / frame.windows, abs=1 / len(found))
    scores = scores_of(one(GenerationScorer(controls="none"), world, view))
    written = np.array([13.0] * 7 + [0.0] * 3)
    above = (written[:, None] > found).mean() + 0.5 * (written[:, None] == found).mean()
    assert scores["clarity", "none"].value == pytest.approx(2 * above - 1)


@pytest.mark.usefixtures("by_word")
def test_the_null_is_what_other_explanations_make_of_the_latent(world: Any) -> None:
    client = ScriptedClient(writes(9))
    view = view_of(world, client)
    texts = ["the word w04", "the word w05", "the word w06"]
    donors = tuple(Donor(explanation=world.explanation(4 + i, text=text), rank=i) for i, text in enumerate(texts))
    scoring = one(GenerationScorer(donors=2), world, replace(view, donors=donors))
    scores = scores_of(scoring)
    null, lift = scores["share_firing", "other_latent"], scores["share_firing_lift", "other_latent"]
    assert (null.value, null.method, null.n_total) == (0.0, "t over 2 donors", 20)
    assert lift.value == pytest.approx(0.9)
    # Newcombe's interval of 9 of 10 against 0 of 20
    (low, high), (_, above) = wilson(9, 10), wilson(0, 20)
    assert (lift.low, lift.high) == pytest.approx((0.9 - math.hypot(0.9 - low, above), 0.9 + high - 0.9))
    explanation = world.explanation(3, text="the word w03")
    assert client.requests == GenerationScorer(donors=2).planned(explanation, replace(view, donors=donors))
    assert len(client.requests) == 3
    assert len(scoring.judgements["other_latent"]) == 40
    one_donor = scores_of(one(GenerationScorer(), world, replace(view, donors=donors[:1])))
    assert one_donor["share_firing_lift", "other_latent"].flags == ("few_documents", "few_donors")
    none = scores_of(one(GenerationScorer(), world, view))
    assert math.isnan(none["share_firing_lift", "other_latent"].value)


@pytest.mark.usefixtures("by_word")
def test_missing_texts_are_counted_and_never_silent(world: Any) -> None:
    answer = json.dumps({"fitting": ["w03", "w03", "  ", 3, "w03 again"], "other": ["x", "y", "z"]})
    scoring = one(
        GenerationScorer(fitting=4, other=2, controls="none"), world, view_of(world, ScriptedClient([answer]))
    )
    scores = scores_of(scoring)
    share = scores["share_firing", "none"]
    assert (share.value, share.n_total, share.n_scored, share.n_failed) == (1.0, 4, 2, 2)
    assert share.floor == pytest.approx(wilson(2, 4)[0])
    assert [j.status for j in scoring.judgements["none"]] == ["ok", "ok", "unparsed", "unparsed", "ok", "ok"]
    assert scores["specificity", "none"].n_failed == 0
    clear, both = scores["clarity", "none"], scores["balanced_accuracy", "none"]
    assert (clear.n_total, clear.n_scored, clear.n_failed) == (4, 2, 2)
    assert clear.floor < clear.low <= clear.value  # the missing ones silent
    assert (both.n_total, both.n_failed, both.value) == (6, 2, 1.0)
    assert both.floor == pytest.approx(0.75 - math.hypot(0.5 - wilson(2, 4)[0], 1 - wilson(2, 2)[0]) / 2)


@pytest.mark.usefixtures("by_word")
@pytest.mark.parametrize(
    ("replies", "status", "asked"),
    [
        (["no", "no"], "unparsed", 2),
        ([LLMReply(text=None, finish="error", error="x")], "failed", 1),
        ([LLMReply(text="", finish="refused")], "refused", 1),
    ],
)
def test_a_model_that_does_not_write_gives_no_score(world: Any, replies: Any, status: str, asked: int) -> None:
    client = ScriptedClient(replies)
    scoring = one(GenerationScorer(controls="none"), world, view_of(world, client))
    assert {j.status for j in scoring.judgements["none"]} == {status}
    assert all(math.isnan(s.value) for s in scoring.scores)
    assert scores_of(scoring)["share_firing", "none"].n_failed == 10
    assert len(client.requests) == asked


def test_texts_are_read_from_the_last_object() -> None:
    first, last = '{"fitting": ["a"], "other": []}', '{"fitting": ["b {x}"], "other": ["c\nd"]}'
    assert parse_texts(f"so: {first} or rather\n{last}", 1, 1) == ("b {x}", "c\nd")
    assert parse_texts(first, 2, 1) == ("a", None, None)
    for broken in ("", "{", '{"fitting": [], "other": []}', '{"fitting": "a", "other": []}', "[" * 9999 + "{"):
        assert parse_texts(broken, 1, 1) is None


def test_arguments_are_checked_and_what_is_missing_is_named(world: Any) -> None:
    wrongs: list[dict[str, Any]] = [{"fitting": 0}, {"other": -1}, {"donors": -1}, {"max_tokens": 0}, {"controls": "x"}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            GenerationScorer(**wrong)
    scorer = GenerationScorer(fitting=3, other=0, controls="all")
    assert GenerationScorer(**scorer.spec["args"]).spec == scorer.spec
    assert scorer.needs == {"examples", "llm", "subject", "coder", "donors"}
    with pytest.raises(InputError, match="subject="):
        one(scorer, world, world.view(3))
    failed = replace(world.explanation(3), text=None, status="unparsed")
    (scoring,) = scorer.score([(failed, world.view(3))])
    assert scoring.scores == ()
