from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from exegete.errors import ConfigError, InputError
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient, SimulatedJudge
from exegete.scorers.contrast import (
    SURE,
    Contrast,
    collisions,
    log_odds,
    mean_bits,
    mean_credit,
    mean_difference,
)
from exegete.scorers.discrimination import DiscriminationScorer, shared
from exegete.scorers.scorer import Scoring, scorers
from exegete.tokens import TokenTable
from exegete.types import ExampleSet, Explanation, Firings, LatentId, LLMReply, Rows, Score, Split
from exegete.views import LatentView, Near, SplitData


class WindowRows(SplitData):
    """Every window of a set is a row of its own; a latent fires on the word of its index, with no exception."""

    def __init__(self, examples: ExampleSet, table: TokenTable) -> None:
        windows = examples.windows
        self._tokens = np.zeros((int(windows.row.max()) + 1, windows.tokens.shape[1]), np.uint32)
        self._tokens[windows.row] = windows.tokens
        self._table = table

    @property
    def tokens(self) -> TokenTable:
        return self._table

    def rows(self, split: Split) -> Rows:
        documents = np.repeat(np.arange(len(self._tokens), dtype=np.int32)[:, None], self._tokens.shape[1], axis=1)
        return Rows(tokens=self._tokens, documents=documents, mask=self._tokens != 0)

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            rows, positions = np.nonzero(self._tokens == index)
            found.append(
                Firings(
                    latent=LatentId(coder="c", index=index),
                    rows=rows.astype(np.int64),
                    positions=positions.astype(np.int32),
                    values=np.ones(len(rows), np.float32),
                )
            )
        return found


def view_of(world: Any, word: int, near: Sequence[int | Explanation], **more: Any) -> LatentView:
    llm = more.pop("llm", None)
    view: LatentView = world.view(word, **more)
    given = [n if isinstance(n, Explanation) else world.explanation(n) for n in near]
    found = tuple(Near(explanation=e, similarity=0.5 / (i + 1)) for i, e in enumerate(given))
    return dataclasses.replace(view, near=found, llm=llm, data=WindowRows(view.examples, world.table))


def one(scorer: DiscriminationScorer, explanation: Explanation, view: LatentView) -> Scoring:
    (scoring,) = scorer.score([(explanation, view)])
    return scoring


def pick(scoring: Scoring, metric: str, control: str = "none") -> Score:
    (found,) = [s for s in scoring.scores if s.metric == metric and s.control == control]
    return found


# -- p(own) -----------------------------------------------------------------------------------------------------------


def test_p_own_is_bayes_rule_where_exactly_one_latent_fires() -> None:
    rng = np.random.default_rng(0)
    yes = rng.uniform(0.05, 0.95, (4, 50))
    contrast = Contrast(own=log_odds(yes[0]), others=log_odds(yes[1:]))
    # P(latent i alone fires | what was said of each) over the four cases, written out.
    alone = np.stack([np.prod(np.where(np.eye(4, dtype=bool)[i][:, None], yes, 1 - yes), axis=0) for i in range(4)])
    assert contrast.bits == pytest.approx(2.0 + np.log2(alone[0] / alone.sum(axis=0)))
    assert contrast.most == 2.0


def test_bits_of_hard_verdicts_by_hand() -> None:
    fits, not_ = special.logit(0.9), special.logit(0.1)
    own = np.array([fits, fits, not_, not_])
    others = np.array([[not_, fits, not_, fits], [not_, not_, not_, not_], [not_, not_, not_, not_]])
    contrast = Contrast(own=own, others=others)
    odds = 9.0
    expected = [odds / (odds + 3 / odds), odds / (2 * odds + 2 / odds), 0.25, (1 / odds) / (3 / odds + odds)]
    assert contrast.bits == pytest.approx(2.0 + np.log2(expected))
    assert contrast.credit.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert contrast.against(0) == pytest.approx([1.0, 0.5, np.nan, 0.0], nan_ok=True)  # neither fits the third
    assert contrast.against(1) == pytest.approx([1.0, 1.0, np.nan, np.nan], nan_ok=True)
    worst = Contrast(own=np.array([not_]), others=np.full((3, 1), fits))
    assert worst.bits.tolist() == pytest.approx([worst.lowest(0.1)])


def test_what_was_not_said_of_any_of_them_is_missing() -> None:
    own = log_odds(np.array([0.9, np.nan, 0.9]))
    contrast = Contrast(own=own, others=log_odds(np.array([[0.1, 0.1, np.nan]])))
    for found in (contrast.bits, contrast.credit, contrast.against(0)):
        assert np.isnan(found).tolist() == [False, True, True]


def test_no_judge_is_surer_than_the_cut() -> None:
    assert log_odds(np.array([0.0, 0.5, 1.0])) == pytest.approx(special.logit([SURE, 0.5, 1 - SURE]))
    with pytest.raises(InputError, match="k at least 1"):
        Contrast(own=np.zeros(3), others=np.zeros((0, 3)))


# -- intervals --------------------------------------------------------------------------------------------------------


def test_of_single_windows_a_document_the_interval_is_a_score_interval_by_hand() -> None:
    values = np.clip(np.random.default_rng(0).normal(0.5, 1.0, 30), -6.0, 2.0)
    found = mean_bits(values, np.arange(30), 2.0, -6.0)
    variance = stats.sem(values) ** 2 + (4.0 / 30) ** 2
    share, t = (values.mean() + 6.0) / 8.0, stats.t.ppf(0.975, 29)
    for bound in (found.low, found.high):  # where the mean lies t of its own errors off
        there = (bound + 6.0) / 8.0
        error = math.sqrt(there * (1 - there) * variance / (share * (1 - share)))
        assert abs(found.value - bound) == pytest.approx(t * error)
    assert found.value == pytest.approx(values.mean())
    assert (found.n, found.n_documents, found.flags) == (30, 30, ())
    assert found.value - found.low > found.high - found.value  # bits lean to the left


def test_equal_windows_are_no_proof_and_bounds_hold() -> None:
    found = mean_bits(np.full(25, 1.9), np.arange(25), 2.0, -6.0)
    assert found.low < 1.7
    assert 1.9 < found.high < 2.0
    credit = mean_credit(np.ones(25), np.arange(25))
    assert (credit.value, credit.high) == (1.0, 1.0)
    assert credit.low == pytest.approx(25 / (25 + stats.t.ppf(0.975, 24) ** 2))
    alone = mean_credit(np.ones(5), np.zeros(5))
    assert (alone.low, alone.high) == (0.0, 1.0)  # of one document nothing is known


def test_windows_of_one_document_count_less() -> None:
    values = np.repeat(np.random.default_rng(1).normal(0.0, 1.0, 12), 5)
    apart = mean_bits(values, np.arange(60), 2.0, -6.0)
    together = mean_bits(values, np.repeat(np.arange(12), 5), 2.0, -6.0)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert (together.n_documents, together.flags) == (12, ("few_documents",))
    share = (values > 0).astype(float)
    assert mean_credit(share, np.repeat(np.arange(12), 5)).low < mean_credit(share, np.arange(60)).low


def test_missing_windows_widen_floor_and_ceiling() -> None:
    values, document = np.array([1.0, 0.5, np.nan, 1.5, 0.0]), np.arange(5)
    found = mean_bits(values, document, 2.0, -6.0)
    assert (found.n, found.value) == (4, 0.75)
    assert found.floor == mean_bits(np.where(np.isnan(values), -6.0, values), document, 2.0, -6.0).low
    assert found.ceiling == mean_bits(np.where(np.isnan(values), 2.0, values), document, 2.0, -6.0).high
    nothing = mean_bits(np.full(3, np.nan), np.arange(3), 2.0, -6.0)
    assert math.isnan(nothing.value)


def test_the_intervals_cover_what_they_estimate() -> None:
    rng, covered = np.random.default_rng(2), np.zeros(2)
    hit, alarm, k, n, draws = 0.85, 0.2, 3, 30, 600
    odds = special.logit(0.9)

    def said(rate: float, shape: tuple[int, ...]) -> Any:
        return np.where(rng.random(shape) < rate, odds, -odds)

    big = Contrast(own=said(hit, (200_000,)), others=said(alarm, (k, 200_000)))
    truth = big.bits.mean(), big.credit.mean()
    for _ in range(draws):
        drawn = Contrast(own=said(hit, (n,)), others=said(alarm, (k, n)))
        found = (
            mean_bits(drawn.bits, np.arange(n), drawn.most, drawn.lowest(0.1)),
            mean_credit(drawn.credit, np.arange(n)),
        )
        covered += [i.low <= t <= i.high for i, t in zip(found, truth, strict=True)]
    assert (covered / draws > 0.92).all()


def test_a_difference_counts_windows_that_own_and_any_other_answered() -> None:
    own = np.array([2.0, 1.0, np.nan, 1.0, 0.0])
    others = [np.array([0.0, np.nan, 0.0, np.nan, 1.0]), np.array([1.0, 0.0, 0.0, np.nan, 1.0])]
    found = mean_difference(own, others, np.arange(5), 2.0, -6.0)
    assert found.n == 3
    assert found.value == pytest.approx(np.mean([2.0 - 0.5, 1.0 - 0.0, 0.0 - 1.0]))
    assert math.isnan(mean_difference(own, [], np.arange(5), 2.0, -6.0).value)


# -- the scorer -------------------------------------------------------------------------------------------------------


def test_the_right_rule_is_told_from_its_neighbours_and_donors_are_not(world: Any) -> None:
    view = view_of(world, 3, (4, 5, 6), donors=(7, 8, 9), n_fire=60)
    scoring = one(DiscriminationScorer(near=3), world.explanation(3), view)
    bits, accuracy = pick(scoring, "bits"), pick(scoring, "accuracy")
    assert scoring.scores[0] is bits
    assert bits.value == pytest.approx(2.0 + np.log2(9 / (9 + 3 / 9)))  # nobody else's word is there
    assert accuracy.value == 1.0
    assert 20 < bits.n_total < 60
    assert bits.n_total == scoring.detail["windows"] == 60 - scoring.detail["left_out"]
    null = pick(scoring, "accuracy", "other_latent")
    assert null.n_total == 3 * bits.n_total
    assert null.value < 0.6
    lift = pick(scoring, "bits_lift", "other_latent")
    assert lift.low > 0.5
    assert lift.value == pytest.approx(bits.value - pick(scoring, "bits", "other_latent").value)
    told = scoring.judgements["none"]
    assert all(j.truth and j.prediction and j.value == pytest.approx(bits.value) for j in told)
    assert [n["latent"] for n in scoring.detail["near"]] == ["c/4", "c/5", "c/6"]
    assert all(n["told_apart"] == 1.0 and n["low"] < 1.0 for n in scoring.detail["near"])
    assert json.loads(json.dumps(scoring.detail)) == scoring.detail


@pytest.mark.parametrize("donors", [(), (7,)])
def test_a_lift_over_too_few_donors_is_flagged(world: Any, donors: tuple[int, ...]) -> None:
    scoring = one(DiscriminationScorer(), world.explanation(3), view_of(world, 3, (4,), donors=donors, n_fire=60))
    lift = pick(scoring, "bits_lift", "other_latent")
    assert "few_donors" in lift.flags
    assert lift.n_failed == 0
    assert lift.n_total == (pick(scoring, "bits").n_total if donors else 0)


def test_windows_on_which_a_neighbour_fires_are_not_asked_about(world: Any) -> None:
    view = view_of(world, 3, (4, 5), n_fire=50)
    scoring = one(DiscriminationScorer(), world.explanation(3), view)
    fired = view.examples.part("test", fires=True)
    free = {int(w.row) for w in fired if not {4, 5} & set(w.tokens.tolist())}
    assert {j.row for j in scoring.judgements["none"]} == free
    assert 0 < len(free) < 50
    first = one(DiscriminationScorer(near=1), world.explanation(3), view)
    assert {j.row for j in first.judgements["none"]} == {int(w.row) for w in fired if 4 not in w.tokens}


def test_the_neighbours_own_firings_decide_not_its_explanation(world: Any) -> None:
    view = view_of(world, 3, (4,), n_fire=10)
    examples = view.examples.part("test", fires=True)
    marked = shared(examples, view.require_data(), [LatentId(coder="c", index=4)])
    assert marked.tolist() == [4 in tokens for tokens in examples.tokens.tolist()]
    assert not shared(examples, view.require_data(), []).any()


def test_a_neighbour_of_the_same_words_collides(world: Any) -> None:
    # Latent 4 is explained by the words of latent 3.
    same = dataclasses.replace(world.explanation(3), latent=LatentId(coder="c", index=4))
    scoring = one(DiscriminationScorer(), world.explanation(3), view_of(world, 3, (same, 5), n_fire=40))
    first, second = scoring.detail["near"]
    assert first["told_apart"] == 0.5
    assert first["high"] < 0.75
    assert second["told_apart"] == 1.0
    assert pick(scoring, "accuracy").value == 0.5
    assert pick(scoring, "bits").value == pytest.approx(math.log2(3) + np.log2(9 / (18 + 1 / 9)))
    assert {j.prediction for j in scoring.judgements["none"]} == {False}


def test_a_twin_leaves_no_window_and_no_number(world: Any) -> None:
    twin = dataclasses.replace(world.explanation(3), latent=LatentId(coder="c", index=3))
    scoring = one(DiscriminationScorer(), world.explanation(5), view_of(world, 3, (twin,), donors=(6, 7)))
    for score in scoring.scores:
        assert math.isnan(score.value)
        assert score.n_total == 0
    assert scoring.detail == {
        "near": [{"latent": "c/3", "similarity": 0.5, "told_apart": None, "low": None, "high": None, "n": 0}],
        "windows": 0,
        "left_out": 30,
    }


def test_without_a_neighbour_or_an_explanation_there_is_no_score(world: Any) -> None:
    failed = Explanation(latent=LatentId(coder="c", index=4), text=None, status="failed", explainer={})
    text_only = world.explanation(5, program=False)
    for view in (view_of(world, 3, ()), view_of(world, 3, (failed, text_only))):
        scoring = one(DiscriminationScorer(), world.explanation(3), view)
        assert (scoring.scores, scoring.judgements) == ((), {})
    assert one(DiscriminationScorer(), failed, view_of(world, 3, (5,))).scores == ()


def test_a_language_model_of_known_rates_gives_the_bits_of_theory(world: Any) -> None:
    judge = SimulatedJudge(world.table, true_positive_rate=0.9, false_positive_rate=0.1, seed=1)
    view = view_of(world, 3, (4, 5, 6), n_fire=150, llm=judge)
    scoring = one(DiscriminationScorer(controls="none"), world.explanation(3), view)
    rng, odds = np.random.default_rng(0), special.logit(0.9)
    own, others = (np.where(rng.random(s) < r, odds, -odds) for r, s in ((0.9, 100_000), (0.1, (3, 100_000))))
    truth = Contrast(own=own, others=others)
    bits, accuracy = pick(scoring, "bits"), pick(scoring, "accuracy")
    assert bits.low <= truth.bits.mean() <= bits.high
    assert accuracy.low <= truth.credit.mean() <= accuracy.high
    assert {s.control for s in scoring.scores} == {"none"}
    assert {r.stage for r in judge.requests} == {"discrimination"}
    assert {read_question(r.messages).kind for r in judge.requests} == {"detection"}


def test_failed_requests_are_states_of_the_windows_they_were_about(world: Any) -> None:
    def reply(request: Any) -> Any:
        question = read_question(request.messages)
        if "w04" in question.explanation:
            return LLMReply(text=None, finish="error", error="HTTP 500")
        return str([int("w03" in question.explanation)] * len(question.excerpts))

    view = view_of(world, 3, (4, 5), n_fire=20, llm=ScriptedClient(reply))
    scoring = one(DiscriminationScorer(), world.explanation(3), view)
    bits = pick(scoring, "bits")
    assert math.isnan(bits.value)
    assert bits.n_failed == bits.n_total > 0
    assert {(j.status, j.prediction, j.value) for j in scoring.judgements["none"]} == {("failed", None, None)}


def test_arguments_are_checked_and_a_spec_makes_the_same_scorer_again() -> None:
    scorer = DiscriminationScorer(near=2, smoothing=0.2, per_request=3, controls="all")
    assert scorers.from_spec(json.loads(json.dumps(scorer.spec))).spec == scorer.spec
    assert DiscriminationScorer().needs == {"examples", "data", "near", "donors"}
    assert DiscriminationScorer(probabilities=True).needs == {"examples", "data", "near", "donors", "llm", "logprobs"}
    for wrong in ({"near": 0}, {"smoothing": 0.0}, {"smoothing": 0.5}, {"judge": "coin"}, {"per_request": 0}):
        with pytest.raises(ConfigError):
            scorers.make("discrimination", wrong)
    with pytest.raises(ConfigError, match="no probabilities"):
        DiscriminationScorer(judge="rule", probabilities=True)


# -- clusters ---------------------------------------------------------------------------------------------------------


def told(**shares: float | None) -> dict[str, Any]:
    return {"near": [{"latent": name, "told_apart": share} for name, share in shares.items()]}


def test_explanations_that_are_not_told_apart_make_clusters() -> None:
    details = {
        "a": told(b=0.5, c=0.9),
        "b": told(a=0.6, d=0.7),
        "c": told(a=0.95),
        "d": told(e=0.8),
        "e": told(f=None),
        "g": told(h=0.5),
        "h": told(g=0.9),
    }
    assert collisions(details) == [("a", "b", "d")]  # g's windows fit h's words, but h's do not fit g's
    assert collisions(details, told_apart=0.96) == [("a", "b", "c", "d", "e"), ("g", "h")]
    assert collisions({}) == []
