from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exegete import metrics
from exegete.errors import ConfigError, InputError, LLMError
from exegete.examples.render import active_tokens, marks, transplant_marks
from exegete.llm.protocol import read_question
from exegete.llm.scripted import ScriptedClient
from exegete.metrics import FrameCounts, Observed
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.scorers.asked import Question
from exegete.scorers.detection import DetectionScorer
from exegete.scorers.fuzzing import FuzzingScorer
from exegete.scorers.judge import RuleJudge, Verdict
from exegete.scorers.scorer import Scoring, scorers
from exegete.scorers.window_scores import control_scores, outside_score, own_scores
from exegete.streams import stream
from exegete.types import SPLITS, Array, Explanation, Judgement, LatentId, LLMReply, Score, TokenLogprob
from exegete.views import Donor, LatentView

LATENT = LatentId(coder="c", index=3)
METRICS = {"balanced_accuracy", "sensitivity", "specificity", "f1"}


def one(scorer: Any, explanation: Explanation, view: LatentView) -> Scoring:
    (scoring,) = scorer.score([(explanation, view)])
    assert isinstance(scoring, Scoring)
    return scoring


def pick(scoring: Scoring, metric: str = "balanced_accuracy", control: str = "none") -> Score:
    (found,) = [s for s in scoring.scores if s.metric == metric and s.control == control]
    return found


def with_llm(view: LatentView, llm: Any) -> LatentView:
    return LatentView(latent=view.latent, tokens=view.tokens, examples=view.examples, donors=view.donors, llm=llm)


def marked(question: Question) -> Array:
    assert question.item.marks is not None
    return question.item.marks


def judgement(truth: bool, prediction: bool | None, status: str = "ok") -> Judgement:
    return Judgement(
        row=0,
        start=0,
        document=0,
        stratum="random",
        truth=truth,
        prediction=prediction,
        status=status,  # type: ignore[arg-type]
    )


# -- scores from judgements -------------------------------------------------------------------------------------------


def own(judged: list[Judgement], **more: Any) -> dict[str, Score]:
    return {s.metric: s for s in own_scores("detection", LATENT, Observed.of(judged), **more)}


def test_scores_are_those_of_the_metrics_and_failures_are_counted_not_scored() -> None:
    judged = [
        *[judgement(True, True)] * 6,
        *[judgement(True, False)] * 2,
        *[judgement(False, False)] * 3,
        judgement(False, True),
        judgement(True, None, "failed"),
        judgement(False, None, "unparsed"),
        judgement(False, None, "refused"),
    ]
    judged = [dataclasses.replace(j, document=i, row=i) for i, j in enumerate(judged)]
    found = own(judged)
    assert [*found][:4] == ["balanced_accuracy", "sensitivity", "specificity", "f1"]
    assert found["sensitivity"].value == 6 / 8
    assert found["specificity"].value == 3 / 4
    assert found["balanced_accuracy"].value == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert found["f1"].value == pytest.approx(12 / 15)
    expected = metrics.judged(Observed.of(judged))
    for metric in METRICS:
        score, interval = found[metric], expected[metric]
        assert (score.n_total, score.n_scored, score.n_failed) == (15, 12, 3)
        assert (score.scorer, score.control, score.latent) == ("detection", "none", LATENT)
        assert (score.low, score.high, score.method) == (interval.low, interval.high, interval.method)
        assert (score.floor, score.ceiling) == (interval.floor, interval.ceiling)
        assert score.floor < score.low < score.high < score.ceiling
        assert score.flags == ("few_documents",)
    # The failed firing window wrong, and both failed silent ones; and the reverse.
    worst = [dataclasses.replace(j, prediction=not j.truth, status="ok") if j.prediction is None else j for j in judged]
    assert found["balanced_accuracy"].floor == pytest.approx(own(worst)["balanced_accuracy"].low)


def test_when_all_fails_there_is_a_count_and_no_value() -> None:
    judged = [
        judgement(True, None, "failed"),
        dataclasses.replace(judgement(False, None, "unparsed"), stratum="silent"),
    ]
    found = own(judged, frame=FrameCounts(windows=100, firing=10, silent={"silent": 90}))
    assert set(found) > METRICS
    for score in found.values():
        assert math.isnan(score.value)
        assert score.n_scored == 0
    assert all((found[m].n_total, found[m].n_failed) == (2, 2) for m in METRICS)


def test_curves_tell_where_a_judge_is_right_and_count_what_they_are_of() -> None:
    def of(stratum: str, truth: bool, said: Sequence[bool | None]) -> list[Judgement]:
        return [dataclasses.replace(judgement(truth, p, "ok" if p is not None else "failed"), stratum=stratum)
                for p in said]  # fmt: skip

    judged = [
        *of("decile_0", True, [True] * 9 + [False]),
        *of("decile_9", True, [True] * 4 + [False] * 4 + [None] * 2),
        *of("same_token", False, [False] * 3 + [True] * 5),
        *of("silent", False, [False] * 8),
    ]
    found = own(judged)
    assert found["sensitivity_decile_0"].value == 0.9
    weak = found["sensitivity_decile_9"]
    assert (weak.value, weak.n_total, weak.n_scored, weak.n_failed) == (0.5, 10, 8, 2)
    assert found["specificity_same_token"].value == 3 / 8
    assert found["specificity_silent"].value == 1.0
    assert found["specificity_silent"].n_total == 8


def test_at_the_true_firing_rate_a_good_judge_is_mostly_wrong_when_it_says_yes() -> None:
    judged = [
        *[judgement(True, i < 90) for i in range(100)],
        *[dataclasses.replace(judgement(False, i < 10), stratum="silent") for i in range(100)],
    ]
    judged = [dataclasses.replace(j, document=i) for i, j in enumerate(judged)]
    found = own(judged, frame=FrameCounts(windows=100_000, firing=100, silent={"silent": 99_900}))
    assert found["balanced_accuracy"].value == pytest.approx(0.9)
    assert found["population_precision"].value == pytest.approx(0.9 * 100 / (0.9 * 100 + 0.1 * 99_900), rel=0.02)
    assert found["population_recall"].value == pytest.approx(0.9)
    assert {m for m in found if m.startswith("population_")} > {"population_f1", "population_specificity"}
    assert not [m for m in own(judged) if m.startswith("population_")]


def donor(hits: int, rejected: int, failed: int = 0) -> Observed:
    judged = [
        *[judgement(True, i < hits) for i in range(10)],
        *[judgement(False, i >= rejected) for i in range(10)],
        *[judgement(True, None, "failed")] * failed,
    ]
    return Observed.of([dataclasses.replace(j, document=i) for i, j in enumerate(judged)])


def null_of(controls: list[Observed], own: Observed | None = None) -> dict[str, Score]:
    given = donor(10, 10) if own is None else own
    return {s.metric: s for s in control_scores("detection", LATENT, "other_latent", given, controls)}


def test_the_null_is_the_mean_over_donors_with_students_interval_over_them_and_the_lift_beside() -> None:
    own = donor(10, 10, failed=2)
    found = null_of([donor(5, 6, failed=2), donor(4, 4, failed=2), donor(7, 5, failed=2)], own)
    values = [0.55, 0.4, 0.6]
    score = found["balanced_accuracy"]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert score.value == pytest.approx(np.mean(values))
    assert [score.low, score.high] == pytest.approx([low, high])
    assert (score.control, score.method) == ("other_latent", "t over 3 donors")
    assert (score.n_total, score.n_scored, score.n_failed) == (66, 60, 6)
    assert set(found) == METRICS | {"balanced_accuracy_lift"}
    lift = found["balanced_accuracy_lift"]
    assert lift.value == pytest.approx(1.0 - np.mean(values))
    assert (lift.n_total, lift.n_scored, lift.n_failed, lift.control) == (22, 20, 2, "other_latent")


def test_the_null_stays_within_0_and_1() -> None:
    found = null_of([donor(10, 10), donor(9, 10), donor(0, 1)])
    assert all(0.0 <= found[m].low <= found[m].value <= found[m].high <= 1.0 for m in METRICS)


@pytest.mark.parametrize("donors", [0, 1])
def test_fewer_than_two_donors_make_no_null_and_say_so(donors: int) -> None:
    score = null_of([donor(5, 5)] * donors)["balanced_accuracy"]
    assert math.isnan(score.value)
    assert score.method == f"too few donors: {donors} of at least 2"
    assert score.n_total == 20 * donors
    assert "few_donors" in score.flags


# -- with the executed rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_the_right_rule_scores_1_and_other_latents_rules_score_chance(world: Any, kind: str) -> None:
    donors = (5, 6, 7, 8, 9)
    view = world.view(3, donors=donors, n_fire=100, n_silent=100)
    scoring = one(scorers.make(kind), world.explanation(3), view)
    own = pick(scoring)
    assert own.value == 1.0
    assert (own.n_total, own.n_scored, own.n_failed) == (200, 200, 0)
    assert own.scorer == kind
    null = pick(scoring, control="other_latent")
    assert null.n_total == 1000
    assert {s.latent for s in scoring.scores} == {view.latent}
    assert null.low < null.value < null.high
    assert abs(null.value - 0.5) < 0.1
    assert len(scoring.judgements["none"]) == 200
    assert len(scoring.judgements["other_latent"]) == 1000


def test_the_null_is_judged_on_the_same_examples_by_the_donors_own_rules(world: Any) -> None:
    view = world.view(3, donors=(5, 6, 7))
    scoring = one(DetectionScorer(), world.explanation(3), view)
    own = scoring.judgements["none"]
    null = scoring.judgements["other_latent"]
    by_place = {e.row: e for e in view.examples.part("test")}
    for at, word in enumerate((5, 6, 7)):
        part = null[at * len(own) : (at + 1) * len(own)]
        assert [(j.row, j.truth) for j in part] == [(j.row, j.truth) for j in own]
        assert [j.prediction for j in part] == [word in by_place[j.row].tokens for j in part]


def test_donors_come_in_the_order_of_their_rank_and_failed_ones_are_left_out(world: Any) -> None:
    view = world.view(3)
    failed = Explanation(latent=LatentId(coder="c", index=8), text=None, status="unparsed", explainer={})
    given = (
        Donor(explanation=world.explanation(7), rank=2),
        Donor(explanation=failed, rank=1),
        Donor(explanation=world.explanation(5), rank=0),
        Donor(explanation=world.explanation(6, program=False), rank=3),
    )
    view = LatentView(latent=view.latent, tokens=view.tokens, examples=view.examples, donors=given)
    scoring = one(DetectionScorer(), world.explanation(3), view)
    first = scoring.judgements["other_latent"][: len(scoring.judgements["none"])]
    by_place = {e.row: e for e in view.examples.part("test")}
    assert [j.prediction for j in first] == [5 in by_place[j.row].tokens for j in first]
    assert len(scoring.judgements["other_latent"]) == 2 * len(first)


def test_every_test_window_is_judged_once_in_an_order_that_carries_no_label(world: Any) -> None:
    view = world.view(3, n_fire=50, n_silent=50)
    judged = one(DetectionScorer(), world.explanation(3), view).judgements["none"]
    assert sorted(j.row for j in judged) == sorted(e.row for e in view.examples.part("test"))
    truth = np.array([j.truth for j in judged])
    runs = 1 + int((truth[1:] != truth[:-1]).sum())
    assert 35 < runs < 67  # 51 expected of a random order, 2 of one sorted by label
    for j in judged:
        (example,) = [e for e in view.examples.part("test") if e.row == j.row]
        assert (j.truth, j.document, j.start, j.stratum) == (
            example.fires,
            example.document,
            example.start,
            example.stratum,
        )
    again = one(DetectionScorer(), world.explanation(3), view).judgements["none"]
    assert again == judged
    other = one(DetectionScorer(), world.explanation(3), world.view(3, n_fire=50, n_silent=50, seed=1))
    assert [j.row for j in other.judgements["none"]] != [j.row for j in judged]


def test_train_windows_are_never_judged(world: Any) -> None:
    judged = one(FuzzingScorer(), world.explanation(3), world.view(3)).judgements["none"]
    assert min(j.row for j in judged) >= 10


def test_what_a_judge_says_is_kept_item_by_item(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [Verdict(prediction=True, probability=0.75), *[Verdict(prediction=None, status="unparsed")] * 59]

    async def panel(self: RuleJudge, explanations: Any, items: Any) -> list[list[Verdict]]:
        return [said for _ in explanations]

    monkeypatch.setattr(RuleJudge, "panel", panel)
    judged = one(DetectionScorer(), world.explanation(3), world.view(3)).judgements["none"]
    assert [(j.prediction, j.probability, j.status) for j in judged] == [
        (v.prediction, v.probability, v.status) for v in said
    ]
    said.pop()
    with pytest.raises(InputError, match="differ in length"):  # a verdict too few is no verdict on the last item
        one(DetectionScorer(), world.explanation(3), world.view(3))


def test_a_failed_explanation_gets_no_score(world: Any) -> None:
    failed = Explanation(latent=LATENT, text=None, status="refused", explainer={})
    for scorer in (DetectionScorer(), FuzzingScorer()):
        scoring = one(scorer, failed, world.view(3, donors=(5, 6)))
        assert scoring == Scoring(explanation=failed, scores=(), judgements={})


def test_free_text_without_a_language_model_is_refused(world: Any) -> None:
    with pytest.raises(InputError, match="--llm"):
        one(DetectionScorer(), world.explanation(3, program=False), world.view(3))
    with pytest.raises(InputError, match="--llm"):
        one(DetectionScorer(judge="llm"), world.explanation(3), world.view(3))


# -- fuzzing ----------------------------------------------------------------------------------------------------------


def test_fuzzing_marks_are_the_true_ones_or_a_firing_windows_whole_pattern(world: Any) -> None:
    view = world.view(3, n_fire=20, n_silent=20)
    questions = FuzzingScorer(threshold=0.3).questions(view)
    patterns = {marks(q.example).tobytes() for q in questions if q.example.fires}
    for q in questions:
        if q.example.fires:
            assert np.array_equal(marked(q), q.example.activations > 0.3 * q.example.maximum)
        else:
            assert marked(q).tobytes() in patterns
    dealt = sorted(marked(q).tobytes() for q in questions if not q.example.fires)
    assert dealt == sorted(marked(q).tobytes() for q in questions if q.example.fires)


def test_silent_windows_are_not_all_marked_at_the_same_places(world: Any) -> None:
    # papers: random.seed(22) inside the bracket routine
    questions = FuzzingScorer().questions(world.view(3))
    assert len({marked(q).tobytes() for q in questions if not q.example.fires}) > 5
    others = FuzzingScorer().questions(world.view(3, seed=4))
    assert [marked(q).tobytes() for q in others] != [marked(q).tobytes() for q in questions]


def test_order_and_transplanted_marks_are_drawn_from_the_latents_own_named_streams(world: Any) -> None:
    # A stored run must not change its questions with a version.
    view = world.view(3)
    test = view.examples.part("test")
    fires, rng = test.fires, stream(view.examples.seed, view.latent, "fuzzing", "marks")
    patterns = active_tokens(test.activations[fires], 0.9)
    hidden = test.tokens[~fires] == 0
    moved = transplant_marks(patterns, test.start[fires], test.start[~fires], rng, hidden)
    questions = FuzzingScorer(threshold=0.9).questions(view)
    shown = {q.example.row: marked(q).tolist() for q in questions}
    assert [shown[row] for row in test.row[~fires].tolist()] == moved.tolist()
    order = stream(view.examples.seed, view.latent, "fuzzing", "order").permutation(len(test))
    assert [q.example.row for q in questions] == test.row[order].tolist()


def test_transplanted_marks_come_from_the_same_place_in_the_row_and_never_lie_on_special_tokens(world: Any) -> None:
    view = world.view(3, n_fire=24, n_silent=24)
    windows = view.examples.windows
    test = windows.split == SPLITS.index("test")
    start, tokens, activations = windows.start.copy(), windows.tokens.copy(), np.zeros_like(windows.activations)
    start[test] = np.tile([0, 50], 24)
    # At row starts the latent fires on the second token, elsewhere on the last; a silent row start has BOS first.
    firing = np.flatnonzero(windows.fires)
    activations[firing, np.where(start[firing] == 0, 1, -1)] = 1.0
    tokens[(start == 0) & test & ~windows.fires, 0] = 0
    changed = dataclasses.replace(windows, start=start, tokens=tokens, activations=activations)
    asked = dataclasses.replace(view, examples=dataclasses.replace(view.examples, examples=changed))
    questions = FuzzingScorer().questions(asked)
    assert len(questions) == 48
    for q in questions:
        assert np.flatnonzero(marked(q)).tolist() == [1 if q.example.start == 0 else 11]


@pytest.mark.parametrize("kind", ["default", "active"])
def test_an_executed_rule_and_a_language_model_are_asked_about_the_same_marks(world: Any, kind: Any) -> None:
    executed = world.view(3, n_fire=60)
    asked = dataclasses.replace(executed, llm=ScriptedClient(["[]"]))
    scorer = FuzzingScorer(kind=kind)
    assert scorer.spec["args"]["threshold"] == 0.3
    shown = [scorer.questions(view) for view in (executed, asked)]
    for one_of, other in zip(*shown, strict=True):
        assert np.array_equal(one_of.item.tokens, other.item.tokens)
        assert np.array_equal(marked(one_of), marked(other))
    for q in scorer.questions(executed):
        if q.truth:
            assert np.array_equal(marked(q), q.example.activations > 0.3 * q.example.maximum)


def test_a_rule_is_judged_by_the_strong_firings_that_are_marked(world: Any) -> None:
    """The latent fires strongly on the word 3 and weakly on the word 4, which stands in the same windows."""
    view = world.view(3, n_fire=60)
    windows = view.examples.windows
    tokens, values = windows.tokens.copy(), windows.activations.copy()
    tokens[tokens == 4] = 5
    for i in np.flatnonzero(windows.fires):
        values[i] = np.where(values[i] > 0, 2.0, 0.0)
        weak = np.flatnonzero(values[i] == 0)[0]
        tokens[i, weak], values[i, weak] = 4, 0.2
    changed = dataclasses.replace(windows, tokens=tokens, activations=values)
    view = dataclasses.replace(view, examples=dataclasses.replace(view.examples, examples=changed))
    found = {}
    said = {
        "all": TokenAt(0, (3, 4)),
        "strong": TokenAt(0, (3,)),
        "weak": TokenAt(0, (4,)),
        "too broad": TokenAt(0, (0,), negated=True),
    }
    for name, condition in said.items():
        rule = Rule((Clause((condition,), 0.9, 1.0),))
        explanation = dataclasses.replace(world.explanation(3), program=rule.to_json())
        for kind in ("default", "active"):
            scoring = one(FuzzingScorer(kind=kind, controls="none"), explanation, view)
            found[name, kind] = tuple(pick(scoring, metric).value for metric in ("sensitivity", "specificity"))
    for kind in ("default", "active"):
        assert found["all", kind] == found["strong", kind] == (1.0, 1.0)
        assert found["weak", kind] == (0.0, 1.0)
        assert found["too broad", kind] == (1.0, 0.0)


def test_the_threshold_moves_marks_alone(world: Any) -> None:
    view = world.view(3)
    wide = {q.example.row: marked(q) for q in FuzzingScorer(threshold=0.0).questions(view)}
    narrow = {q.example.row: marked(q) for q in FuzzingScorer(threshold=0.9).questions(view)}
    firing = [e for e in view.examples.part("test") if e.fires]
    assert all(np.array_equal(wide[e.row], e.activations > 0) for e in firing)
    assert sum(narrow[e.row].sum() for e in firing) < sum(wide[e.row].sum() for e in firing)
    for threshold in (0.0, 0.9):  # marks are firings at any threshold, so the right rule fits them all
        assert pick(one(FuzzingScorer(threshold=threshold), world.explanation(3), view), "sensitivity").value == 1.0


def test_a_latent_without_silent_windows_has_sensitivity_only(world: Any) -> None:
    scoring = one(FuzzingScorer(), world.explanation(3), world.view(3, n_silent=0))
    assert pick(scoring, "sensitivity").value == 1.0
    assert math.isnan(pick(scoring).value)


# -- with a language model --------------------------------------------------------------------------------------------


def test_with_a_language_model_the_judge_is_the_language_model(world: Any) -> None:
    client = ScriptedClient(lambda r: str([1] * len(read_question(r.messages).excerpts)))
    view = with_llm(world.view(3, donors=(5, 6), n_fire=11, n_silent=12), client)
    scoring = one(DetectionScorer(per_request=4), world.explanation(3), view)
    assert pick(scoring).value == 0.5
    assert pick(scoring, "sensitivity").value == 1.0
    assert len(client.requests) == 3 * 6
    assert pick(one(DetectionScorer(judge="rule"), world.explanation(3), view)).value == 1.0
    assert len(client.requests) == 18


def test_failed_batches_are_counted_in_score_and_null(world: Any) -> None:
    def reply(request: Any) -> Any:
        question = read_question(request.messages)
        if len(question.excerpts) == 3:  # the short last batch of 23
            return LLMReply(text=None, finish="error", error="HTTP 500")
        return str([1, 0, 1, 0][: len(question.excerpts)])

    view = with_llm(world.view(3, donors=(5, 6), n_fire=11, n_silent=12), ScriptedClient(reply))
    scoring = one(DetectionScorer(per_request=4), world.explanation(3, program=False), view)
    own, null = pick(scoring), pick(scoring, control="other_latent")
    assert (own.n_total, own.n_scored, own.n_failed) == (23, 20, 3)
    assert (null.n_total, null.n_scored, null.n_failed) == (46, 40, 6)
    assert not math.isnan(own.value)
    failed = [j for j in scoring.judgements["none"] if j.status == "failed"]
    assert len(failed) == 3
    assert all(j.prediction is None for j in failed)


def test_an_unusable_server_stops_the_scoring(world: Any) -> None:
    view = with_llm(world.view(3), ScriptedClient(lambda r: (_ for _ in ()).throw(LLMError("no such model"))))
    with pytest.raises(LLMError, match="no such model"):
        one(DetectionScorer(), world.explanation(3), view)


def test_every_client_is_closed_once_at_the_end(world: Any) -> None:
    closed = []

    class Closing(ScriptedClient):  # type: ignore[misc]
        async def close(self) -> None:
            closed.append(self.name)

    def fits(request: Any) -> str:
        return str([1] * len(read_question(request.messages).excerpts))

    first, second = Closing(fits, name="first"), Closing(fits, name="second")
    pairs = [(world.explanation(w), with_llm(world.view(w), c)) for w, c in ((3, first), (4, second), (5, first))]
    assert len(list(DetectionScorer().score([*pairs, (world.explanation(6), world.view(6))]))) == 4
    assert sorted(closed) == ["first", "second"]


def test_each_item_gets_its_own_scoring(world: Any) -> None:
    pairs = [(world.explanation(word), world.view(word)) for word in range(3, 12)]
    found = {s.explanation.latent: s for s in DetectionScorer().score(pairs, concurrency=2)}
    assert set(found) == {e.latent for e, _ in pairs}
    assert all(pick(s).value == 1.0 and pick(s).latent == latent for latent, s in found.items())
    assert list(DetectionScorer().score([])) == []


# -- probabilities ----------------------------------------------------------------------------------------------------


def sure(truth: bool, yes: float | None) -> Judgement:
    return dataclasses.replace(judgement(truth, (yes or 0.0) > 0.5), probability=yes)


def test_the_auroc_of_p_yes_leaves_out_what_is_missing_and_never_takes_it_for_0() -> None:
    judged = [
        *[sure(True, p) for p in (0.9, 0.8, 0.4)],
        *[sure(False, p) for p in (0.5, 0.1, 0.1)],
        *[sure(True, None)] * 4,  # taken for 0, these would rank below all silent windows
        judgement(True, None, "failed"),
    ]
    judged = [dataclasses.replace(j, document=i) for i, j in enumerate(judged)]
    found = own(judged, probabilities=True)
    expected = metrics.auroc([True] * 3 + [False] * 3, [0.9, 0.8, 0.4, 0.5, 0.1, 0.1])
    score = found["auroc"]
    assert score.value == pytest.approx(8 / 9)
    assert (score.low, score.high, score.method) == (expected.low, expected.high, expected.method)
    assert score.floor < 0.4  # with the missing ones ranked last
    assert (score.n_total, score.n_scored, score.n_failed) == (11, 6, 5)
    assert (found["sensitivity"].n_scored, found["sensitivity"].n_failed) == (10, 1)
    assert set(found) >= METRICS | {"auroc", "pearson", "ece", "brier"}
    assert found["brier"].value == pytest.approx(np.mean([0.01, 0.04, 0.36, 0.25, 0.01, 0.01]))


def test_the_correlation_over_the_frame_counts_what_it_is_of() -> None:
    judged = [
        *[sure(True, p) for p in (0.9, 0.8, 0.4, None)],
        *[dataclasses.replace(sure(False, p), stratum="silent") for p in (0.5, 0.1, None, None)],
    ]
    judged = [dataclasses.replace(j, document=i, activation=float(j.truth)) for i, j in enumerate(judged)]
    frame = FrameCounts(windows=100, firing=10, silent={"silent": 90})
    found = own(judged, frame=frame, probabilities=True)
    assert (found["population_pearson"].n_scored, found["population_pearson"].n_failed) == (5, 3)
    assert found["population_recall"].n_scored == 8
    of_verdicts = own([dataclasses.replace(j, probability=None) for j in judged], frame=frame)
    assert of_verdicts["population_pearson"].n_scored == 8


def test_without_any_probability_there_is_no_auroc_and_no_outside_mass() -> None:
    judged = [judgement(True, True), judgement(False, False)]
    score = own(judged, probabilities=True)["auroc"]
    assert math.isnan(score.value)
    assert (score.n_total, score.n_scored, score.n_failed) == (2, 0, 2)
    none = outside_score("detection", LATENT, [None, None])
    assert all(map(math.isnan, (none.value, none.low, none.high)))
    assert (none.n_total, none.n_scored) == (2, 0)


def test_the_mass_outside_yes_and_no_is_averaged_over_what_is_known() -> None:
    score = outside_score("fuzzing", LATENT, [0.0, 0.3, None, 0.6])
    assert score.value == pytest.approx(0.3)
    assert score.low == 0.0  # Student's interval would go below
    assert score.high == pytest.approx(min(1.0, 0.3 + stats.t.ppf(0.975, 2) * 0.3 / np.sqrt(3)))
    assert (score.n_total, score.n_scored, score.n_failed) == (4, 3, 1)


def leaning_reply(request: Any) -> LLMReply:
    """Yes to what holds the word of the explanation, with P(yes) 0.8 there and 0.3 elsewhere, a tenth outside."""
    question = read_question(request.messages)
    word = question.explanation.split('"')[1]
    tokens = [TokenLogprob(token='{"verdicts": [', logprob=-0.1)]
    for excerpt in question.excerpts:
        yes = 0.72 if word in excerpt.text else 0.27
        logs = {" 1": float(np.log(yes)), " 0": float(np.log(0.9 - yes)), "x": float(np.log(0.1))}
        tokens += [TokenLogprob(token=" 1" if yes > 0.5 else " 0", logprob=None, alternatives=logs),
                   TokenLogprob(token=",", logprob=-0.1)]  # fmt: skip
    tokens[-1] = TokenLogprob(token="]}", logprob=-0.1)
    logprobs = tuple(tokens) if request.logprobs else None
    return LLMReply(text="".join(t.token for t in tokens), finish="stop", logprobs=logprobs)


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_probabilities_reach_judgements_scores_and_null(world: Any, kind: str) -> None:
    view = with_llm(world.view(3, donors=(5, 6), n_fire=12, n_silent=11), ScriptedClient(leaning_reply))
    scoring = one(scorers.make(kind, {"probabilities": True}), world.explanation(3), view)
    assert pick(scoring, "auroc").value == 1.0
    assert pick(scoring, "outside_mass").value == pytest.approx(0.1)
    null = pick(scoring, "auroc", "other_latent")
    assert (null.n_total, null.n_scored) == (46, 46)
    assert null.value < 0.9
    assert {round(j.probability or 0, 6) for j in scoring.judgements["none"]} == {0.8, 0.3}
    plain = one(scorers.make(kind), world.explanation(3), view)
    assert not {"auroc", "pearson", "ece", "brier", "population_auprc"} & {s.metric for s in plain.scores}
    assert pick(scoring, "auroc_lift", "other_latent").low > 0
    assert {j.probability for j in plain.judgements["none"]} == {None}


def test_requests_are_built_without_sending_and_are_those_that_are_sent(world: Any) -> None:
    client = ScriptedClient(leaning_reply)
    for scorer in (DetectionScorer(per_request=4), FuzzingScorer(probabilities=True)):
        view = with_llm(world.view(3, n_fire=11, n_silent=12), client)
        built = scorer.requests(world.explanation(3), view)
        assert client.requests == []
        one(scorer, world.explanation(3), view)
        assert client.requests == built
        assert {r.stage for r in built} == {scorer.kind}
        client.requests.clear()
    bare = world.view(3, n_fire=11, n_silent=12)  # a plan needs no language model
    assert DetectionScorer(per_request=4).requests(world.explanation(3), bare) == DetectionScorer(
        per_request=4
    ).requests(world.explanation(3), with_llm(bare, client))


def test_probabilities_need_a_language_model_that_gives_them(world: Any) -> None:
    for scorer in (DetectionScorer(probabilities=True), FuzzingScorer(probabilities=True, judge="llm")):
        assert scorer.needs == {"examples", "donors", "llm", "logprobs"}
        with pytest.raises(InputError, match="--llm"):
            one(scorer, world.explanation(3), world.view(3))
    with pytest.raises(ConfigError, match="no probabilities"):
        DetectionScorer(judge="rule", probabilities=True)


# -- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer",
    [
        DetectionScorer(),
        DetectionScorer(judge="llm", per_request=3),
        FuzzingScorer(threshold=0.5),
        FuzzingScorer(probabilities=True),
        FuzzingScorer(kind="active", controls="all"),
        DetectionScorer(certify=0.8, margin=0.2, controls=("empty",)),
        DetectionScorer(stop_when=0.1),
    ],
)
def test_a_spec_makes_the_same_scorer_again(scorer: Any) -> None:
    again = scorers.from_spec(json.loads(json.dumps(scorer.spec)))
    assert again.spec == scorer.spec
    assert type(again) is type(scorer)


def test_needs_name_a_language_model_only_when_it_must_judge() -> None:
    assert DetectionScorer().needs == {"examples", "donors"}
    assert FuzzingScorer(judge="rule").needs == {"examples", "donors"}
    assert DetectionScorer(judge="llm").needs == {"examples", "donors", "llm"}


@pytest.mark.parametrize(
    "args",
    [
        {"judge": "coin"},
        {"per_request": 0},
        {"threshold": 1.0},
        {"threshold": -0.1},
        {"window": 3},
        {"kind": "passive"},
        {"controls": "best"},
        {"certify": 1.2},
        {"certify": 0.6, "margin": 0.7},
        {"stop_when": 0.0},
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        scorers.make("fuzzing", args)
