from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from exegete.errors import ConfigError, InputError
from exegete.llm.backend import Capabilities
from exegete.llm.protocol import read_question
from exegete.llm.protocol_simulation import simulate_prompt
from exegete.llm.scripted import ScriptedClient, SimulatedJudge
from exegete.metrics import Observed
from exegete.planning import CountingClient, count_bytes, count_parts
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.scorers.scorer import Scoring
from exegete.scorers.simulation import SimulationScorer
from exegete.scorers.simulation_scores import (
    calibrate,
    correlation,
    correlation_lift,
    explained,
    population_correlation,
)
from exegete.scorers.simulators import Tokens
from exegete.tokens import TokenTable
from exegete.types import Array, LLMReply, LLMRequest, Score, TokenLogprob, Windows
from exegete.views import LatentView

WORD = " w03"
Numbers = Sequence[float] | Array


def observed(score: Numbers, activation: Numbers, document: Numbers, weight: Numbers | None = None) -> Observed:
    n = len(score)
    return Observed(
        truth=np.array(activation) > 0,
        prediction=np.full(n, -1, np.int8),
        score=np.array(score, np.float64),
        stratum=np.zeros(n, np.int8),
        document=np.array(document, np.int64),
        probability=np.ones(n),
        multiplicity=np.ones(n, np.int64) if weight is None else np.array(weight, np.int64),
        activation=np.array(activation, np.float64),
    )


def scores_of(scoring: Scoring) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in scoring.scores}


def with_llm(view: LatentView, client: Any) -> LatentView:
    return replace(view, llm=client)


def one(scorer: SimulationScorer, world: Any, view: LatentView, word: int, **options: Any) -> Scoring:
    (scoring,) = scorer.score([(world.explanation(word, **options), view)])
    return scoring


def shown(view: LatentView, windows: Windows) -> tuple[Tokens, Array, Array]:
    """Return the tokens of windows, which of them hold the word of latent 3, and their activations."""
    tokens = Tokens.of(windows, view.tokens)
    return tokens, np.array([text.endswith(WORD) for text in tokens.texts]), tokens.activation


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_the_population_correlation_counts_every_token_as_often_as_its_weight_says() -> None:
    rng = np.random.default_rng(0)
    x, y, w = rng.random(60), rng.random(60), rng.integers(1, 5, 60)
    d = np.arange(60) // 3
    found = population_correlation(observed(x, y, d, w))
    assert found.value == pytest.approx(stats.pearsonr(np.repeat(x, w), np.repeat(y, w)).statistic)
    assert found.n_documents == 20
    assert found.low < found.value < found.high
    # with equal weights it is the jackknife of the plain correlation
    plain, same = correlation(observed(x, y, d)), population_correlation(observed(x, y, d))
    assert (same.value, same.low, same.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_the_lift_of_a_correlation_is_a_jackknife_of_the_difference() -> None:
    rng = np.random.default_rng(1)
    y, d = rng.random(40), np.arange(40) // 4
    ours, theirs = y + rng.normal(0, 0.3, 40), [rng.random(40), y - rng.random(40)]
    found = correlation_lift(observed(ours, y, d), [observed(t, y, d) for t in theirs])

    def difference(keep: Array) -> float:
        return float(
            stats.pearsonr(ours[keep], y[keep]).statistic
            - np.mean([stats.pearsonr(t[keep], y[keep]).statistic for t in theirs])
        )

    left = np.array([difference(d != i) for i in range(10)])
    half = stats.t.ppf(0.975, 9) * math.sqrt(9 / 10 * ((left - left.mean()) ** 2).sum())
    value = difference(d >= 0)
    assert (found.value, found.low, found.high) == pytest.approx((value, value - half, value + half))
    assert found.flags == ("few_documents",)
    assert math.isnan(correlation_lift(observed(ours, y, d), []).value)


def test_missing_predictions_widen_the_bounds_of_a_lift() -> None:
    rng = np.random.default_rng(2)
    y, d = rng.random(60), np.arange(60)
    ours = y.copy()
    ours[:5] = np.nan
    found = correlation_lift(observed(ours + rng.normal(0, 0.1, 60), y, d), [observed(rng.random(60), y, d)])
    assert found.n == 55
    assert found.floor < found.low
    assert found.ceiling > found.high


def test_another_that_predicts_nothing_takes_no_lift_away() -> None:
    rng = np.random.default_rng(3)
    y, document = rng.random(200), np.repeat(np.arange(20), 10)
    own, other = (observed(y + rng.random(200), y, document) for _ in range(2))
    silent = observed(np.full(200, np.nan), y, document)
    alone, beside = correlation_lift(own, [other]), correlation_lift(own, [silent, other])
    assert (beside.value, beside.low, beside.high, beside.n) == (alone.value, alone.low, alone.high, 200)
    assert math.isnan(correlation_lift(own, [silent]).value)


def test_missing_predictions_widen_the_bounds_of_what_is_over_the_frame_and_in_units() -> None:
    rng = np.random.default_rng(4)
    y, document = rng.random(200), np.repeat(np.arange(20), 10)
    x = y + rng.random(200) / 2
    lost = np.where(np.arange(200) % 4 == 0, np.nan, x)
    found = population_correlation(observed(lost, y, document))
    assert found.value == pytest.approx(stats.pearsonr(lost[~np.isnan(lost)], y[~np.isnan(lost)]).statistic)
    assert -1.0 <= found.floor < found.low < found.high < found.ceiling <= 1.0
    for one_of in explained(observed(lost, y, document)).values():
        assert one_of.floor == -math.inf
        assert one_of.ceiling > one_of.high
    whole = population_correlation(observed(x, y, document))
    assert (whole.floor, whole.ceiling) == (whole.low, whole.high)


def test_a_constant_prediction_tells_nothing_and_is_no_missing_score() -> None:
    y, d = np.arange(30.0), np.arange(30)
    for find in (correlation, population_correlation):
        found = find(observed(np.zeros(30), y, d))
        assert (found.value, found.method, found.n) == (0.0, "constant prediction", 30)
        assert found.low == pytest.approx(-math.tanh(1.959964 / math.sqrt(27)))
        assert math.isnan(find(observed(y, np.zeros(30), d)).value)
        assert math.isnan(find(observed([], [], [])).value)
    lift = correlation_lift(observed(y, y, d), [observed(np.zeros(30), y, d)])
    assert lift.value == 1.0


def test_explained_deviation_is_the_reference_formula_with_a_jackknife() -> None:
    y, x, d = np.array([0.0, 2.0, 4.0, 0.0]), np.array([1.0, 2.0, 3.0, 0.0]), [0, 0, 1, 1]
    found = explained(observed(x, y, d))
    assert found["rsquared"].value == pytest.approx(1 - 2 / 20)
    assert found["absolute_dev_explained"].value == pytest.approx(1 - 2 / 6)
    left = np.array([1 - 1 / 16, 1 - 1 / 4])
    half = stats.t.ppf(0.975, 1) * math.sqrt(0.5 * ((left - left.mean()) ** 2).sum())
    assert found["rsquared"].low == pytest.approx(0.9 - half)
    assert found["rsquared"].high == 1.0
    assert math.isnan(explained(observed(x, np.zeros(4), d))["rsquared"].value)


def test_a_calibration_is_a_line_that_never_falls() -> None:
    rng = np.random.default_rng(3)
    x = rng.random(50)
    y = 3.0 * x + rng.normal(0, 0.1, 50) + 1.0
    line = LinearRegression().fit(x[:, None], y)
    assert calibrate(x, y) == pytest.approx((line.intercept_, line.coef_[0]))
    assert calibrate(x, -y) == pytest.approx((-y.mean(), 0.0))
    assert calibrate(np.ones(3), np.array([1.0, 2.0, 3.0])) == (2.0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        calibrate(np.zeros(0), np.zeros(0))


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_tokens_are_shown_whole_and_special_ones_not_at_all(world: Any) -> None:
    table = TokenTable([b"<bos>", b" a", b"\xc3", b"\xa9"], [0])
    windows = Windows.of([world.example("test", [0, 2, 3, 1], [0.0, 3.0, 1.0, 2.0], 5)])
    tokens = Tokens.of(windows, table)
    assert tokens.texts == ("é", " a")
    assert tokens.column.tolist() == [2, 3]
    assert tokens.first.tolist() == [0, 3]
    assert tokens.activation.tolist() == [3.0, 2.0]  # a character is as active as the strongest of its bytes
    assert tokens.by_window() == [("é", " a")]


# -- executed rules ---------------------------------------------------------------------------------------------------


def test_a_rule_is_simulated_by_its_matches(world: Any) -> None:
    view = world.view(3, donors=[4, 5, 6])
    scoring = one(SimulationScorer(), world, view, 3)
    judged = scoring.judgements["none"]
    windows = view.examples.part("test")
    tokens, hits, y = shown(view, windows)
    assert len(judged) == len(tokens) > 58 * world.window  # of all windows: executing costs nothing
    assert {j.value for j in judged} == {0.0, 1.0}
    assert y.sum() == pytest.approx(windows.activations.sum())
    assert [j.activation for j in judged] == pytest.approx(y)
    assert [j.value == 1.0 for j in judged] == hits.tolist()
    assert all(j.prediction is None and j.truth == (j.activation > 0) for j in judged)
    assert [(j.row, j.start) for j in judged[:2]] == [(windows.row[0], 0), (windows.row[0], 1)]
    scores = scores_of(scoring)
    fires = windows.fires[tokens.window]
    assert scoring.scores[0].metric == "pearson"
    own = scores["pearson", "none"]
    assert own.value == pytest.approx(stats.pearsonr(hits[fires], y[fires]).statistic)
    assert own.n_total == own.n_scored == fires.sum()
    assert scores["pearson_all", "none"].value == pytest.approx(stats.pearsonr(hits, y).statistic)
    assert scores["population_pearson", "none"].value == pytest.approx(scores["pearson_all", "none"].value)
    assert scores["rsquared", "none"].value == pytest.approx(
        1 - ((y[fires] - hits[fires]) ** 2).sum() / (y[fires] ** 2).sum()
    )
    assert scoring.detail == {"form": "executed"}


def test_the_null_of_a_simulation_is_that_of_its_donors_on_the_same_tokens(world: Any) -> None:
    scoring = one(SimulationScorer(donors=3), world, world.view(3, donors=[4, 5, 6, 7]), 3)
    scores = scores_of(scoring)
    null, lift = scores["pearson", "other_latent"], scores["pearson_lift", "other_latent"]
    assert null.method == "t over 3 donors"
    assert abs(null.value) < 0.1
    assert lift.value == pytest.approx(scores["pearson", "none"].value - null.value)
    assert lift.low > 0.3
    assert len(scoring.judgements["other_latent"]) == 3 * len(scoring.judgements["none"])
    few = scores_of(one(SimulationScorer(donors=1), world, world.view(3, donors=[4]), 3))
    assert math.isnan(few["pearson", "other_latent"].value)
    assert few["pearson_lift", "other_latent"].flags == ("few_donors",)


def test_a_rule_predicts_the_mean_activation_of_its_most_precise_clause(world: Any) -> None:
    rule = Rule((Clause((TokenAt(0, (3,)),), 0.9, 2.5), Clause((TokenAt(0, (4,)),), 0.1, 0.5)))
    explanation = replace(world.explanation(3), program=rule.to_json())
    (scoring,) = SimulationScorer(controls="none").score([(explanation, world.view(3))])
    tokens, _, _ = shown(world.view(3), world.view(3).examples.part("test"))
    expected = [{"w03": 2.5, "w04": 0.5}.get(text[-3:], 0.0) for text in tokens.texts]
    assert [j.value for j in scoring.judgements["none"]] == expected
    assert set(scoring.judgements) == {"none"}


def test_a_free_text_cannot_be_executed(world: Any) -> None:
    with pytest.raises(InputError, match="free text"):
        one(SimulationScorer(), world, world.view(3), 3, program=False)
    failed = replace(world.explanation(3), text=None, status="unparsed")
    (scoring,) = SimulationScorer().score([(failed, world.view(3))])
    assert scoring.scores == ()


# -- language models --------------------------------------------------------------------------------------------------


def levels(request: LLMRequest) -> str:
    """Answer for the word that latent 3 fires on."""
    question = read_question(request.messages)
    if question.kind == "simulate_token":
        return "6" if question.tokens[-1].endswith(WORD) else "0"
    active = [{"token": i, "level": 6} for i, t in enumerate(question.tokens, 1) if t.endswith(WORD)]
    return json.dumps({"active": active})


def echoed(request: LLMRequest) -> LLMReply:
    """Give log probabilities at every question mark: half the mass on 8 where the word stands."""
    assert request.prompt is not None
    assert request.prompt_logprobs
    question = read_question(request.prompt)
    assert request.prompt == simulate_prompt(question.explanation, question.tokens)
    head, *lines = request.prompt.split("\t?")
    found = [TokenLogprob(token=head, logprob=None)]
    before = len(lines) - len(question.tokens)
    for i, line in enumerate(lines):
        here = i >= before and question.tokens[i - before].endswith(WORD)
        p = {"8": 0.4, "0": 0.4} if here else {"0": 0.9}
        alternatives = {t: math.log(q) for t, q in p.items()} | {"?": math.log(0.1)}
        found.append(TokenLogprob(token="\t", logprob=-0.1))
        found.append(TokenLogprob(token="?", logprob=math.log(0.1), alternatives=alternatives))
        found.append(TokenLogprob(token=line, logprob=-1.0))
    return LLMReply(text="", finish="length", prompt_logprobs=tuple(found))


@pytest.mark.parametrize(
    ("how", "can", "reply", "level", "requests"),
    [
        ("auto", Capabilities(), levels, 6.0, 8),
        ("whole_window", Capabilities(prompt_logprobs=True), levels, 6.0, 8),
        ("token_by_token", Capabilities(), levels, 6.0, 0),
        ("auto", Capabilities(prompt_logprobs=True), echoed, 4.0, 8),
        ("all_at_once", Capabilities(prompt_logprobs=True), echoed, 4.0, 8),
    ],
)
def test_a_language_model_is_asked_in_the_form_it_can_answer(
    world: Any, how: Any, can: Capabilities, reply: Callable[[LLMRequest], Any], level: float, requests: int
) -> None:
    client = ScriptedClient(reply, capabilities=can)
    view = with_llm(world.view(3, n_fire=8, n_silent=5), client)
    scorer = SimulationScorer(how=how, controls="none")
    scoring = one(scorer, world, view, 3, program=False)
    windows = view.examples.part("test", fires=True)
    tokens, hits, y = shown(view, windows)
    assert len(client.requests) == (requests or len(tokens))  # firing windows only, as in the paper
    assert [j.value for j in scoring.judgements["none"]] == np.where(hits, level, 0.0).tolist()
    expected = stats.pearsonr(hits, y).statistic
    assert scores_of(scoring)["pearson", "none"].value == pytest.approx(expected)
    assert "rsquared" not in {s.metric for s in scoring.scores}
    assert {r.stage for r in client.requests} == {"simulation"}
    assert ("outside_mass" in scoring.detail) == (reply is echoed)


def test_calibration_is_fitted_outside_the_test_windows(world: Any) -> None:
    client = ScriptedClient(levels)
    view = with_llm(world.view(3, n_fire=8, n_silent=0), client)
    scoring = one(SimulationScorer(calibrate=True, controls="none"), world, view, 3)
    train = view.examples.part("train", fires=True)
    assert len(client.requests) == 8 + len(train)
    _, hits, y = shown(view, train)
    intercept, slope = calibrate(np.where(hits, 6.0, 0.0), y)
    assert scoring.detail["calibration"] == pytest.approx({"intercept": intercept, "slope": slope})
    _, hits, true = shown(view, view.examples.part("test", fires=True))
    predicted = intercept + slope * np.where(hits, 6.0, 0.0)
    found = scores_of(scoring)["rsquared", "none"].value
    assert found == pytest.approx(1 - ((true - predicted) ** 2).sum() / (true**2).sum())


def test_what_cannot_be_read_is_asked_for_once_more_and_then_a_status(world: Any) -> None:
    answers: Iterator[str | LLMReply] = iter(
        ["hm", '{"active": []}', "hm", "still no", LLMReply(text=None, finish="error", error="x")]
    )
    client = ScriptedClient(lambda request: next(answers))
    view = with_llm(world.view(3, n_fire=3, n_silent=0), client)
    (scoring,) = SimulationScorer(controls="none").score([(world.explanation(3), view)], concurrency=1)
    assert len(client.requests) == 5
    statuses = [j.status for j in scoring.judgements["none"]]
    assert sorted(set(statuses)) == ["failed", "ok", "unparsed"]
    score = scores_of(scoring)["pearson", "none"]
    assert (score.n_total, score.n_scored) == (len(statuses), statuses.count("ok"))
    assert score.value == 0.0
    nothing = ScriptedClient(lambda request: LLMReply(text="", finish="refused"))
    (scoring,) = SimulationScorer(controls="none").score([(world.explanation(3), replace(view, llm=nothing))])
    assert {j.status for j in scoring.judgements["none"]} == {"refused"}
    assert math.isnan(scores_of(scoring)["pearson", "none"].value)


def test_a_server_without_prompt_logprobs_leaves_all_at_once_unread(world: Any) -> None:
    client = ScriptedClient(lambda request: LLMReply(text="x", finish="length"))
    view = with_llm(world.view(3, n_fire=3, n_silent=0), client)
    scoring = one(SimulationScorer(how="all_at_once", controls="none"), world, view, 3)
    assert {j.status for j in scoring.judgements["none"]} == {"unparsed"}
    assert SimulationScorer(how="all_at_once").needs == {"examples", "donors", "llm", "prompt_logprobs"}


def test_arguments_are_checked_and_stand_in_the_spec() -> None:
    wrongs: list[dict[str, Any]] = [{"how": "x"}, {"judge": "x"}, {"windows": "x"}, {"donors": -1}, {"controls": "x"}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            SimulationScorer(**wrong)
    with pytest.raises(ConfigError, match="not asked"):
        SimulationScorer(how="whole_window", judge="rule")
    scorer = SimulationScorer(how="token_by_token", windows="all", calibrate=True, controls="all", donors=1)
    assert SimulationScorer(**scorer.spec["args"]).spec == scorer.spec
    assert SimulationScorer().needs == {"examples", "donors"}
    assert SimulationScorer(controls="none", judge="llm").needs == {"examples", "llm"}


@pytest.mark.parametrize("how", ["whole_window", "token_by_token", "all_at_once"])
def test_a_judge_that_never_errs_simulates_what_the_rule_says(world: Any, how: Any) -> None:
    judge = SimulatedJudge(
        world.table, true_positive_rate=1.0, false_positive_rate=0.0, prompt_logprobs=how == "all_at_once"
    )
    view = with_llm(world.view(3, n_fire=10, n_silent=0), judge)
    scorer = SimulationScorer(how=how, controls="none")
    assert scorer.plumbing(view)
    tokens, hits, y = shown(view, view.examples.part("test", fires=True))
    found = scores_of(one(scorer, world, view, 3, program=False))["pearson", "none"]
    assert found.n_scored == len(tokens)
    assert found.value == pytest.approx(stats.pearsonr(hits, y).statistic, abs=0.05)


def test_a_plan_counts_one_request_per_window_and_reads_the_answers(world: Any) -> None:
    client = CountingClient("planned", 0.0, count_bytes, lambda request: count_parts(request, count_bytes), 10)
    view = with_llm(world.view(3, donors=[4, 5, 6], n_fire=8, n_silent=4), client)
    scoring = one(SimulationScorer(), world, view, 3)
    asked = client.asked["simulation"]
    assert asked.requests == 3 * 8  # its own explanation and two donors', firing windows only
    assert asked.shared_tokens > asked.prompt_tokens / 2
    assert {j.status for j in scoring.judgements["none"]} == {"ok"}
