from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from exegete.rules.english import parse, render
from exegete.rules.evaluate import average_precision, evaluate, evaluate_many, flat_firings
from exegete.rules.execute import TokenContext, execute, holds
from exegete.rules.growing import Goal, Grower, average_precisions, token_sets
from exegete.rules.language import MAX_TOKENS, PositionIn, StateIs, TokenAt, TokenWithin
from exegete.rules.search import search_rules
from exegete.rules.universe import FLAGS, Shared, Universe, unpack
from exegete.tokens import TokenTable
from exegete.types import Firings, Rows, Split
from exegete.views import SplitData

Function = Callable[[Sequence[str], int], bool]


def prefix_states(row: tuple[str, ...]) -> list[tuple[bool, bool, int]]:
    """(inside a string, inside a comment, open brackets) before every position; knows nothing of exegete.rules."""
    mark, comment, depth = "", False, 0
    found = []
    for piece in row:
        found.append((bool(mark), comment, depth))
        for c in piece if piece != "<bos>" else "":
            if comment:
                comment = c != "\n"
            elif mark:
                mark = "" if c in (mark, "\n") else mark
            elif c in "'\"":
                mark = c
            elif c == "#":
                comment = True
            elif c in "([{":
                depth += 1
            elif c in ")]}":
                depth = max(depth - 1, 0)
    return [*found, (bool(mark), comment, depth)]


cached_states = functools.cache(prefix_states)


def in_code(row: Sequence[str], t: int) -> tuple[bool, bool, int]:
    return cached_states(tuple(row))[t]


class TrainOnly(SplitData):
    """Data whose test split must not be read."""

    def __init__(self, data: SplitData) -> None:
        self._data = data

    @property
    def tokens(self) -> TokenTable:
        return self._data.tokens

    def rows(self, split: Split) -> Rows:
        assert split == "train"
        return self._data.rows(split)

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        assert split == "train"
        return self._data.firings(indices, split)


KINDS: dict[str, Function] = {
    "token set": lambda row, t: row[t] in ("alpha", "beta", " =", "MAX"),
    "bigram": lambda row, t: row[t] == "(" and row[t - 1] in ("alpha", "beta", "gamma", "ing"),
    "trigram": lambda row, t: row[t] in "([" and row[t - 1] == " =" and row[t - 2] != "x" if t > 1 else False,
    "skip-gram": lambda row, t: t >= 3 and row[t] == "," and row[t - 3] in ("(", ","),
    "within": lambda row, t: "import" in row[max(t - 5, 0) : t],
    "within, inclusive": lambda row, t: "return" in row[max(t - 3, 0) : t + 1],
    "word while near": lambda row, t: row[t] == "\n    " and "def" in row[max(t - 9, 0) : t],
    "digits": lambda row, t: row[t].isdigit(),
    "capitals": lambda row, t: row[t].strip().isalpha() and row[t].strip().isupper(),
    "continuation": lambda row, t: row[t][0].isalpha() and row[t - 1][-1].isalpha() and t > 1,
    "indentation": lambda row, t: row[t] in ("\n    ", "\n        "),
    "class after class": lambda row, t: row[t].isdigit() and row[t - 1].isdigit(),
    "early": lambda row, t: t < 4,
    "late": lambda row, t: t >= 90,
    "string": lambda row, t: in_code(row, t)[0],
    "comment": lambda row, t: in_code(row, t)[1],
    "brackets": lambda row, t: in_code(row, t)[2] > 0,
    "brackets once read": lambda row, t: in_code(row, t + 1)[2] > 0,
    "nested": lambda row, t: in_code(row, t)[2] > 1,
    "line start": lambda row, t: "\n" in row[t - 1] or t == 1,
    "word in brackets": lambda row, t: row[t] == "alpha" and in_code(row, t)[2] > 0,
    "word outside strings": lambda row, t: row[t] == " alpha" and not any(in_code(row, t)[:2]),
    "either": lambda row, t: row[t] == "7" or (row[t] == " self" and row[t - 1] == ","),
    "any of three": lambda row, t: (
        row[t] == "def" or (row[t] == ")" and row[t - 1].isdigit()) or (t > 1 and row[t - 2] == "[" and row[t] == ",")
    ),
    "on a line of": lambda row, t: "import" in "".join(row[1:t]).rpartition("\n")[2],
}


@pytest.fixture(scope="module")
def recovered(planted: Callable[..., SplitData]) -> dict[str, tuple[float, int, str]]:
    """Held-out AUPRC, test firings and English of the rule of every planted kind; the search sees train rows only."""
    names = list(KINDS)
    data = planted(list(KINDS.values()))
    rules = search_rules(TrainOnly(data), range(len(names)))
    metrics = evaluate_many(rules, data, range(len(names)))
    found = {}
    for name, rule, figures in zip(names, rules, metrics, strict=True):
        assert rule is not None, name
        assert figures is not None, name
        found[name] = (figures.auprc, figures.n_firings, render(rule, data.tokens))
        assert parse(found[name][2], data.tokens) == rule
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_planted_latent_is_recovered(recovered: dict[str, tuple[float, int, str]], kind: str) -> None:
    auprc, n, text = recovered[kind]
    assert n >= 30
    assert auprc >= 0.98, text


def test_simple_latents_get_simple_rules(recovered: dict[str, tuple[float, int, str]]) -> None:
    assert recovered["digits"][2].startswith(("Fires on a number (", "Fires on text with a digit ("))
    assert recovered["early"][2].startswith("Fires at positions 0 to 3 of the row (100% ")
    assert recovered["comment"][2].startswith("Fires inside a comment (100% ")


def test_the_rule_of_a_latent_depends_on_nothing_else(planted: Callable[..., SplitData]) -> None:
    functions = [KINDS["either"], KINDS["bigram"], KINDS["token set"]]
    data = planted(functions)
    done: list[int] = []
    together = search_rules(data, [0, 1, 2], progress=done.append)
    assert done == [1, 2, 3]
    assert search_rules(data, [2, 1]) == [together[2], together[1]]


def test_nothing_is_said_of_latents_that_hardly_fire_or_fire_at_random(planted: Callable[..., SplitData]) -> None:
    rng = np.random.default_rng(5)
    data = planted(
        [lambda row, t: False, lambda row, t: t == 5 and rng.random() < 0.01, lambda row, t: rng.random() < 0.01]
    )
    assert search_rules(data, [0, 1, 2]) == [None, None, None]


def test_clauses_carry_their_train_figures(planted: Callable[..., SplitData]) -> None:
    rng = np.random.default_rng(6)
    data = planted([lambda row, t: row[t] in ("7", ",", "alpha") and rng.random() < (0.9 if row[t] == "7" else 0.4)])
    (rule,) = search_rules(data, [0])
    assert rule is not None
    rows, (fired,) = data.rows("train"), data.firings([0], "train")
    dense = np.zeros(rows.tokens.shape)
    dense[fired.rows, fired.positions] = fired.values
    context = TokenContext(rows.tokens, data.tokens, rows.mask)
    for clause in rule.clauses:
        matched = np.logical_and.reduce([holds(c, context) for c in clause.conditions]) & rows.mask.reshape(-1)
        values = dense.reshape(-1)[matched]
        assert clause.precision == pytest.approx((values > 0).mean(), rel=1e-3)
        assert clause.mean == pytest.approx(values.mean(), rel=1e-3)
    precisions = [c.precision for c in rule.clauses]
    assert precisions == sorted(precisions, reverse=True)
    assert len(precisions) > 1
    figures = evaluate(rule, fired, context)
    assert figures is not None
    scores = execute([rule], rows.tokens, data.tokens)[0][rows.mask]
    assert figures.auprc == pytest.approx(average_precision(scores, dense[rows.mask] > 0))


@pytest.fixture
def universe(planted: Callable[..., SplitData], monkeypatch: pytest.MonkeyPatch) -> Universe:
    monkeypatch.setattr("exegete.rules.universe.HARD", (3_000, 1_000))
    monkeypatch.setattr("exegete.rules.universe.REST", 2_000)
    data = planted([lambda row, t: row[t] == "(" and row[t - 1] in ("alpha", "beta", "gamma")])
    shared = Shared(TokenContext(data.rows("train").tokens, data.tokens, data.rows("train").mask))
    flat, _ = flat_firings(data.firings([0], "train")[0], shared.context)
    return Universe(shared, flat, np.random.default_rng(0))


def test_a_universe_holds_all_firings_and_stands_for_all_positions(universe: Universe, table: TokenTable) -> None:
    n, f = universe.counts(universe.all)
    assert n == pytest.approx(universe.shared.n)
    assert f == universe.n_firings
    flat = universe.flat[universe.valid]
    assert len(np.unique(flat)) == len(flat) < universe.shared.n / 2
    assert universe.shared.base_mask[flat].all()


def test_bits_of_a_universe_are_what_execution_says(universe: Universe, ids_of: Callable[..., tuple[int, ...]]) -> None:
    conditions = [
        *FLAGS,
        StateIs("bracket", negated=True),
        TokenAt(1, ids_of("alpha", ",")),
        TokenAt(2, ids_of("("), True),
        TokenWithin(7, ids_of("def", "import")),
        TokenWithin(3, ids_of("def"), True, True),
        PositionIn(3, 20),
        PositionIn(40, None, True),
    ]
    for condition in conditions:
        expected = holds(condition, universe.shared.context, universe.flat) & universe.valid
        np.testing.assert_array_equal(unpack(universe.bits(condition)), expected, str(condition))


def test_average_precision_from_counts_is_that_of_the_rule(universe: Universe) -> None:
    grower = Grower(universe)
    clauses = grower.grow(grower.root, [(Goal(), 8)], sets=2)
    assert len(clauses) >= 4
    assert len({c.precision for c in clauses}) >= 3
    truth = np.arange(len(universe.flat)) < universe.split
    for first in ((), clauses[:1], clauses[1:3], [clauses[3], clauses[0]]):
        found = average_precisions(universe, first, clauses)
        for score, last in zip(found, clauses, strict=True):
            scores = np.zeros(len(truth))
            for clause in (*first, last):
                scores = np.maximum(scores, unpack(clause.bits) * clause.precision)
            expected = average_precision_score(truth, scores, sample_weight=universe.weight)
            assert score == pytest.approx(expected)


def test_grown_clauses_are_what_execution_says(universe: Universe) -> None:
    grower = Grower(universe)
    (first, *_) = grower.grow(grower.root, [(Goal(), 3)])
    grown = [*grower.grow(first, [(Goal(floor=first.precision), 5), (Goal(), 2)]), *grower.variants(first, [])]
    assert len(grown) >= 4
    for clause in [*grown, *(c for g in grown for c in grower.simpler(g))]:
        expected = universe.valid.copy()
        for condition in clause.conditions:
            expected &= holds(condition, universe.shared.context, universe.flat)
        np.testing.assert_array_equal(unpack(clause.bits), expected)
        assert clause.n == pytest.approx(universe.weight[expected].sum())
        assert clause.f == pytest.approx(universe.weight[: universe.split][expected[: universe.split]].sum())


def test_token_sets_trade_precision_for_recall_with_the_tokens_that_pay() -> None:
    total = np.array([100.0, 100.0, 100.0, 1000.0, 2.0, 50_000.0])
    hit = np.array([90.0, 50.0, 10.0, 90.0, 1.0, 100.0])
    sets = token_sets(total, hit, (total.sum(), hit.sum()), False)
    assert {tuple(sorted(tokens.tolist())) for tokens, _, _ in sets} <= {(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)}
    assert len(sets) >= 3  # the token seen twice does not pay, the common one is no better than chance
    for tokens, n, f in sets:
        assert n == total[tokens].sum()
        assert hit[tokens].sum() - 4 < f < hit[tokens].sum()  # shrunk a little
    against = token_sets(total, hit, (total.sum(), hit.sum()), True)
    assert [tokens.tolist() for tokens, _, _ in against] == [[5]]


def test_a_list_never_names_more_tokens_than_a_rule_may() -> None:
    total, hit = np.full(40, 100.0), np.r_[np.full(20, 80.0), np.zeros(20)]
    assert max(len(tokens) for tokens, _, _ in token_sets(total, hit, (1e6, 1700.0), False)) == MAX_TOKENS
