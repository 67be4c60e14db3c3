from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from exegete.errors import InputError
from exegete.rules.baselines import PRIOR, baseline_auprc
from exegete.rules.evaluate import (
    average_precision,
    average_precision_of_blocks,
    context_of,
    evaluate,
    evaluate_many,
)
from exegete.rules.execute import TokenContext, execute
from exegete.rules.language import Clause, Rule, StateIs, TokenAt
from exegete.tokens import TokenTable
from exegete.types import Array, Firings, LatentId
from exegete.views import SplitData

LETTERS = TokenTable([bytes([b]) for b in b"abcdefgh"])


def firings_of(activations: Array) -> Firings:
    rows, positions = np.nonzero(activations)
    return Firings(
        latent=LatentId(coder="c", index=0),
        rows=rows.astype(np.int64),
        positions=positions.astype(np.int32),
        values=activations[rows, positions].astype(np.float32),
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40).filter(
        lambda pairs: any(truth for _, truth in pairs)
    )
)
def test_average_precision_is_sklearns(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([s for s, _ in pairs]) / 7, np.array([t for _, t in pairs])
    assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_average_precision_by_hand() -> None:
    # 2 of 4 in the first block, then 1 of 6: 2/3 · 2/4 + 1/3 · 3/10
    assert average_precision_of_blocks(np.array([4, 6]), np.array([2, 1])) == pytest.approx(1 / 3 + 0.1)
    with pytest.raises(InputError):
        average_precision_of_blocks(np.array([4]), np.array([0]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_every_figure_agrees_with_sklearn_and_numpy(
    rule_strategy: Callable[[int], st.SearchStrategy[Rule]], seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 8, (4, 12)).astype(np.uint32)
    mask = rng.random(tokens.shape) < 0.8
    activations = np.where(rng.random(tokens.shape) < 0.4, rng.gamma(2.0, 1.0, tokens.shape), 0.0)
    activations = activations.astype(np.float32).astype(np.float64)
    rule = data.draw(rule_strategy(8))
    context = TokenContext(tokens, LETTERS, mask)
    found = evaluate(rule, firings_of(activations), context)
    values = activations[mask]
    truth = values > 0
    if not 0 < truth.sum() < len(truth):
        assert found is None
        return
    assert found is not None
    score = execute([rule], tokens, LETTERS)[0][mask]
    mean = execute([rule], tokens, LETTERS, value="activation")[0][mask].astype(np.float64)
    clauses = [execute([Rule((c,))], tokens, LETTERS)[0][mask] > 0 for c in rule.clauses if c.precision > 1e-30]
    if len(clauses) < len(rule.clauses):  # a precision of (nearly) 0 cannot be told from silence by its score
        return
    predicted = np.any(clauses, axis=0)
    assert (found.n_positions, found.n_firings) == (mask.sum(), truth.sum())
    assert (found.n_matched, found.n_hits) == (predicted.sum(), (predicted & truth).sum())
    assert found.base_rate == pytest.approx(truth.mean())
    assert found.precision == pytest.approx(precision_score(truth, predicted, zero_division=0))
    assert found.recall == pytest.approx(recall_score(truth, predicted))
    assert found.f1 == pytest.approx(f1_score(truth, predicted))
    assert found.auprc == pytest.approx(average_precision_score(truth, score))
    if np.ptp(mean) > 1e-3 * mean.max():
        assert found.pearson == pytest.approx(np.corrcoef(mean, values)[0, 1], abs=1e-6)
    elif mean.max() == 0:
        assert math.isnan(found.pearson)
    strongest = np.argsort(-values[truth], kind="stable")
    for tenth, share in zip(np.array_split(strongest, 10), found.mass_deciles, strict=True):
        part, hit = values[truth][tenth], predicted[truth][tenth]
        assert (share == pytest.approx(part[hit].sum() / part.sum())) if len(part) else math.isnan(share)


def test_figures_by_hand() -> None:
    tokens = np.array([[0, 1, 0, 2, 0, 3, 0, 1, 4, 4]], np.uint32)
    activations = np.array([[4.0, 0, 2.0, 0, 0, 1.0, 0, 0, 0, 0]])
    rule = Rule((Clause((TokenAt(0, (0,)),), 0.5, 1.5), Clause((TokenAt(0, (1, 3)),), 1 / 3, 0.3333)))
    found = evaluate(rule, firings_of(activations), TokenContext(tokens, LETTERS))
    assert found is not None
    assert (found.n_matched, found.n_hits) == (7, 3)
    assert found.auprc == pytest.approx(2 / 3 * 2 / 4 + 1 / 3 * 3 / 7)
    assert (found.precision, found.recall) == (3 / 7, 1.0)
    assert found.mass_deciles[:3] == (1.0, 1.0, 1.0)
    assert math.isnan(found.mass_deciles[3])


def test_what_cannot_be_measured_is_none_not_a_number() -> None:
    tokens = np.array([[0, 1]], np.uint32)
    rule = Rule((Clause((TokenAt(0, (0,)),), 0.5, 1.5),))
    context = TokenContext(tokens, LETTERS)
    assert evaluate(rule, firings_of(np.zeros((1, 2))), context) is None
    assert evaluate(rule, firings_of(np.ones((1, 2))), context) is None
    masked = TokenContext(tokens, LETTERS, np.array([[False, True]]))
    assert evaluate(rule, firings_of(np.array([[1.0, 0.0]])), masked) is None


def test_a_rule_that_matches_nowhere_has_precision_0_and_the_base_rate_as_auprc() -> None:
    tokens = np.array([[0, 1, 2, 3]], np.uint32)
    rule = Rule((Clause((TokenAt(0, (7,)),), 0.5, 1.5),))
    found = evaluate(rule, firings_of(np.array([[1.0, 0, 0, 0]])), TokenContext(tokens, LETTERS))
    assert found is not None
    assert (found.precision, found.recall, found.f1, found.auprc) == (0.0, 0.0, 0.0, 0.25)
    assert math.isnan(found.pearson)


def test_firings_in_any_order_give_the_same_figures() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8, (5, 20)).astype(np.uint32)
    fired = firings_of(np.where(rng.random(tokens.shape) < 0.3, 1.0 + rng.random(tokens.shape), 0))
    order = rng.permutation(len(fired))
    shuffled = Firings(
        latent=fired.latent, rows=fired.rows[order], positions=fired.positions[order], values=fired.values[order]
    )
    rule = Rule((Clause((TokenAt(0, (1, 2, 3)),), 0.5, 1.5),))
    context = TokenContext(tokens, LETTERS)
    assert evaluate(rule, fired, context) == evaluate(rule, shuffled, context)


def test_many_rules_at_once(planted: Callable[..., SplitData], ids_of: Callable[..., tuple[int, ...]]) -> None:
    data = planted([lambda row, t: row[t] == "7", lambda row, t: False, lambda row, t: row[t] in "()"])
    sevens = Rule((Clause((TokenAt(0, ids_of("7")),), 1.0, 2.0),))
    found = evaluate_many([sevens, sevens, None], data, [0, 1, 2])
    assert found[1] is None
    assert found[2] is None
    assert found[0] is not None
    assert (found[0].auprc, found[0].recall) == (1.0, 1.0)
    assert found == evaluate_many([sevens, sevens, None], data, [0, 1, 2], context=context_of(data, "test"))
    strings = Rule((Clause((StateIs("string"),), 0.1, 2.0),))
    (on_train,) = evaluate_many([strings], data, [2], split="train")
    assert on_train is not None
    assert on_train.n_firings == len(data.firings([2], "train")[0])


def slow_baselines(data: SplitData, index: int) -> tuple[float, float, float, float]:
    """Dense and obvious."""
    tables = {}
    for split in ("train", "test"):
        rows, (fired,) = data.rows(split), data.firings([index], split)
        truth = np.zeros(rows.tokens.shape, bool)
        truth[fired.rows, fired.positions] = True
        before = np.concatenate([np.full((len(rows), 1), 10_000), rows.tokens[:, :-1]], axis=1)
        tables[split] = (rows.tokens[rows.mask], before[rows.mask], truth[rows.mask])
    tokens, before, truth = tables["train"]
    base = truth.mean()
    n: dict[int, int] = {}
    f: dict[int, int] = {}
    pairs: dict[tuple[int, int], list[int]] = {}
    for token, previous, fires in zip(tokens.tolist(), before.tolist(), truth.tolist(), strict=True):
        n[token] = n.get(token, 0) + 1
        f[token] = f.get(token, 0) + fires
        pair = pairs.setdefault((previous, token), [0, 0])
        pair[0] += 1
        pair[1] += fires

    def unigram(token: int) -> float:
        return float((f.get(token, 0) + PRIOR * base) / (n.get(token, 0) + PRIOR))

    def bigram(previous: int, token: int) -> float:
        total, hits = pairs.get((previous, token), (0, 0))
        return (hits + PRIOR * unigram(token)) / (total + PRIOR)

    best = max(n, key=lambda t: f[t] / (n[t] + truth.sum()))
    fired_tokens = [t for t in n if f[t]]
    chosen = sorted(fired_tokens, key=lambda t: (-unigram(t), -f[t], t))[:12]
    tokens, before, truth = tables["test"]
    return (
        average_precision_score(truth, tokens == best),
        average_precision_score(truth, np.isin(tokens, chosen)),
        average_precision_score(truth, [unigram(t) for t in tokens.tolist()]),
        average_precision_score(truth, [bigram(b, t) for b, t in zip(before.tolist(), tokens.tolist(), strict=True)]),
    )


def test_baselines_agree_with_a_dense_reckoning(planted: Callable[..., SplitData]) -> None:
    rng = np.random.default_rng(3)
    data = planted(
        [
            lambda row, t: row[t] in ("alpha", " =", "(", ",", "7") and rng.random() < 0.5,
            lambda row, t: row[t] == "(" and row[t - 1] in ("phi", "chi", "psi"),
            lambda row, t: rng.random() < 0.02,
            lambda row, t: False,
        ]
    )
    found = baseline_auprc(data, [0, 1, 2, 3])
    assert list(found) == [0, 1, 2, 3]
    assert found[3] is None
    for index in range(3):
        metrics = found[index]
        assert metrics is not None
        got = (metrics.token, metrics.token_set, metrics.unigram, metrics.bigram)
        assert got == pytest.approx(slow_baselines(data, index), abs=1e-9)
    assert found[1] is not None
    assert found[1].bigram > 0.99 > found[1].token
