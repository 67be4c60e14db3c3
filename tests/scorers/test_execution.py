from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from exegete.errors import InputError
from exegete.metrics import wilson
from exegete.rules.evaluate import RuleMetrics
from exegete.rules.language import Clause, Rule, TokenAt
from exegete.scorers.execution import EXACT, ExecutionScorer, execution_scores
from exegete.scorers.scorer import scorers
from exegete.types import Explanation, LatentId, Score
from exegete.views import LatentView

FIGURES = {"auprc", "precision", "recall", "f1", "pearson", "base_rate", *(f"mass_decile_{i}" for i in range(10))}
BASELINES = {"auprc_token", "auprc_token_set", "auprc_unigram", "auprc_bigram"}
LATENT = LatentId(coder="c", index=3)


def view_of(world: Any, word: int, data: Any) -> LatentView:
    plain = world.view(word)
    return LatentView(latent=plain.latent, tokens=plain.tokens, examples=plain.examples, data=data)


def scores_of(world: Any, data: Any, word: int = 3, **args: Any) -> dict[tuple[str, str], Score]:
    (scoring,) = ExecutionScorer(**args).score([(world.explanation(word), view_of(world, word, data))])
    assert scoring.judgements == {}
    return {(s.scorer, s.metric): s for s in scoring.scores}


def test_every_counted_held_out_token_is_scored(world: Any, word_data: Any) -> None:
    data = word_data()
    rows, active = data.rows("test"), data.activations(3, "test")
    truth, said = (active > 0)[rows.mask], (rows.tokens == 3)[rows.mask]
    hits, n = int((truth & said).sum()), len(truth)
    found = scores_of(world, data)
    assert {m for s, m in found if s == "execution"} == FIGURES
    precision, recall = found["execution", "precision"], found["execution", "recall"]
    assert precision.value == hits / said.sum()
    assert recall.value == hits / truth.sum()
    for score, k, total in ((precision, hits, said.sum()), (recall, hits, truth.sum())):
        expected = wilson(k, int(total))
        assert (score.low, score.high, score.method) == (expected.low, expected.high, expected.method)
        assert (score.n_total, score.n_scored, score.n_failed) == (total, total, 0)
    auprc = found["execution", "auprc"]
    assert auprc.value == pytest.approx(average_precision_score(truth, said * 0.9))
    assert auprc.low == auprc.value == auprc.high
    assert (auprc.method, auprc.n_total) == (EXACT, n)
    assert found["execution", "f1"].value == pytest.approx(2 * hits / (said.sum() + truth.sum()))
    assert found["execution", "pearson"].value == pytest.approx(np.corrcoef(said * 1.0, active[rows.mask])[0, 1])
    assert found["execution", "base_rate"].value == truth.mean()


def test_mass_is_that_of_the_matched_firings_strongest_first(world: Any, word_data: Any) -> None:
    data = word_data()
    active, tokens = data.activations(3, "test"), data.rows("test").tokens
    values, hit = active[active > 0], (tokens == 3)[active > 0]
    order = np.argsort(-values, kind="stable")
    found = scores_of(world, data)
    for i, part in enumerate(np.array_split(order, 10)):
        assert found["execution", f"mass_decile_{i}"].value == pytest.approx(
            values[part][hit[part]].sum() / values[part].sum()
        )


def test_baselines_stand_beside_unless_left_out(world: Any, word_data: Any) -> None:
    found = scores_of(world, word_data())
    beside = {m: s for (scorer, m), s in found.items() if scorer == "baseline"}
    assert set(beside) == BASELINES
    assert all(s.explanation is None and s.method == EXACT and 0 < s.value <= 1 for s in beside.values())
    # a one-word rule is the best token
    assert beside["auprc_token"].value == pytest.approx(found["execution", "auprc"].value)
    assert not [s for s, _ in scores_of(world, word_data(), baselines=False) if s == "baseline"]


def test_free_text_and_failures_yield_nothing(world: Any, word_data: Any) -> None:
    data = word_data()
    failed = Explanation(latent=LATENT, text=None, status="failed", explainer={})
    text = world.explanation(3, program=False)
    scorings = list(ExecutionScorer().score([(e, view_of(world, 3, data)) for e in (failed, text)]))
    assert [s.explanation for s in scorings] == [failed, text]
    assert all(s.scores == () and s.judgements == {} for s in scorings)


def test_a_latent_silent_in_the_test_split_has_no_scores(world: Any, word_data: Any) -> None:
    assert execution_scores(LATENT, None) == ()
    data = word_data()
    data.activations = lambda word, split: np.zeros(data.rows(split).tokens.shape, dtype=np.float32)
    assert scores_of(world, data) == {}


def test_undefined_figures_are_nan_and_never_0() -> None:
    nothing = RuleMetrics(
        n_positions=100, n_firings=5, n_matched=0, n_hits=0, base_rate=0.05, precision=0.0, recall=0.0, f1=0.0,
        auprc=0.05, pearson=math.nan, mass_deciles=(0.0,) * 5 + (math.nan,) * 5,
    )  # fmt: skip
    found = {s.metric: s for s in execution_scores(LATENT, nothing)}
    assert math.isnan(found["precision"].value)
    assert (found["precision"].n_total, found["recall"].n_total) == (0, 5)
    assert math.isnan(found["pearson"].value)
    assert math.isnan(found["mass_decile_9"].value)
    assert (found["recall"].value, found["mass_decile_0"].value) == (0.0, 0.0)


def test_a_sum_that_passes_1_by_rounding_is_1() -> None:
    above = math.nextafter(1.0, 2.0)
    perfect = RuleMetrics(
        n_positions=100, n_firings=5, n_matched=5, n_hits=5, base_rate=0.05, precision=1.0, recall=1.0, f1=above,
        auprc=above, pearson=above, mass_deciles=(above,) * 10,
    )  # fmt: skip
    for score in execution_scores(LATENT, perfect):
        assert score.latent == LATENT
        if score.metric != "base_rate":
            assert (score.value, score.high) == (1.0, 1.0)


def test_rows_are_prepared_once_for_all_blocks(world: Any, word_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluating = importlib.import_module("exegete.rules.evaluate")  # the package has a function of that name
    prepared, original = [], evaluating.context_of

    def counting(data: Any, split: Any) -> Any:
        prepared.append(split)
        return original(data, split)

    monkeypatch.setattr(evaluating, "context_of", counting)
    monkeypatch.setattr("exegete.scorers.execution.context_of", counting)
    scorer, data = ExecutionScorer(baselines=False), word_data()
    for word in (3, 4, 5):
        list(scorer.score([(world.explanation(word), view_of(world, word, data))]))
    assert prepared == ["test"]


def test_coders_are_measured_on_their_own_rows_and_blocks_agree_with_the_whole(world: Any, word_data: Any) -> None:
    first, second = word_data(seed=1), word_data(seed=2)
    items = [(world.explanation(w), view_of(world, w, d)) for w, d in ((3, first), (4, second), (5, first))]
    scorer = ExecutionScorer()
    whole = {s.explanation.latent.index: s for s in scorer.score(items)}
    blocks = {s.explanation.latent.index: s for item in items for s in scorer.score([item])}
    assert whole == blocks
    assert whole[4].scores[0].value == scores_of(world, second, 4)["execution", "auprc"].value


def test_it_needs_all_firings(world: Any) -> None:
    assert ExecutionScorer().needs == {"data", "examples"}
    spec = ExecutionScorer(baselines=False, windows=False).spec
    assert scorers.from_spec(spec).spec["args"] == {"baselines": False, "windows": False}
    with pytest.raises(InputError, match="all firings"):
        list(ExecutionScorer().score([(world.explanation(3), world.view(3))]))


def test_a_rule_does_not_look_into_the_document_before(world: Any, word_data: Any) -> None:
    """Rows that hold two documents each: what stands before the second one is not its context."""
    data = word_data()
    for split in ("train", "test"):
        rows = data.rows(split)
        documents = rows.documents * 2 + (np.arange(rows.length) >= 20)
        data.made[split] = dataclasses.replace(rows, documents=documents)
    rows, active = data.rows("test"), data.activations(3, "test")
    after = np.zeros(rows.tokens.shape, bool)
    after[:, 1:] = rows.tokens[:, :-1] == 3
    assert (after[:, 20] & rows.mask[:, 20]).any()
    after[:, 20] = False
    rule = Rule((Clause((TokenAt(1, (3,)),), 0.9, 1.0),))
    explanation = dataclasses.replace(world.explanation(3), program=rule.to_json())
    (scoring,) = ExecutionScorer(baselines=False).score([(explanation, view_of(world, 3, data))])
    found = {s.metric: s for s in scoring.scores}
    said, truth = after[rows.mask], (active > 0)[rows.mask]
    assert found["precision"].n_total == said.sum()
    assert found["precision"].value == (said & truth).sum() / said.sum()
    assert found["recall"].value == (said & truth).sum() / truth.sum()
