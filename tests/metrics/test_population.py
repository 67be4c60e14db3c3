"""Population metrics against hand computations, scikit-learn, every possible draw, and exact bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from exegete import metrics
from exegete.errors import InputError
from exegete.metrics import FrameCounts, Observed, population
from exegete.metrics.interval import Interval
from exegete.metrics.reweighting import NONE_SEEN, further, half_width, parts, quantile
from exegete.types import STRATA, Array

RATES = ("population_precision", "population_recall", "population_f1", "population_specificity")


def judgements(
    firing: Sequence[int],
    silent: Sequence[int],
    *,
    score: Sequence[float] | None = None,
    kinds: Sequence[str] = (),
    deciles: Sequence[int] = (),
    probability: Sequence[float] = (),
    multiplicity: Sequence[int] = (),
    document: Sequence[int] = (),
    activation: Sequence[float] = (),
) -> Observed:
    """Verdicts (1, 0, −1 for a failure) on firing and then on silent windows, each of its own document by default."""
    m, n = len(firing), len(firing) + len(silent)
    names = [f"decile_{d}" for d in deciles or [0] * m] + list(kinds or ["silent"] * len(silent))
    return Observed(
        truth=np.arange(n) < m,
        prediction=np.array([*firing, *silent], np.int8),
        score=np.full(n, np.nan) if score is None else np.array(score, np.float64),
        stratum=np.array([STRATA.index(name) for name in names], np.int8),
        document=np.array(document or range(n), np.int64),
        probability=np.array(probability or [1.0] * n, np.float64),
        multiplicity=np.array(multiplicity or [1] * n, np.int64),
        activation=np.array(activation or [1.0] * m + [0.0] * (n - m), np.float64),
    )


def verdicts(yes: int, of: int) -> list[int]:
    return [1] * yes + [0] * (of - yes)


def frame_weights(observed: Observed, frame: FrameCounts) -> Array:
    cut = parts(observed, frame, np.ones(len(observed), bool))
    weights = np.zeros(len(observed))
    for part in cut.all:
        weights[part.places] = part.weight
    return weights


# -- values -----------------------------------------------------------------------------------------------------------


def test_values_of_a_case_worked_by_hand() -> None:
    # 100 of 1000 windows fire; half of them are of a decile of which 3 of 4 are found, half of one with 1 of 2.
    # 100 windows hold a token of the latent, of which 2 of 5 are taken for firing; of the 800 others 1 of 10 is.
    observed = judgements(
        [1, 1, 1, 0, 1, 0], [*verdicts(2, 5), *verdicts(1, 10)],
        deciles=[0, 0, 0, 0, 1, 1], kinds=["same_token"] * 5 + ["silent"] * 10,
        probability=[4 / 50] * 4 + [2 / 50] * 2 + [5 / 100] * 5 + [10 / 800] * 10,
    )  # fmt: skip
    frame = FrameCounts(windows=1000, firing=100, silent={"same_token": 100, "silent": 800})
    found = population(observed, frame)
    hits, alarms = 50 * 3 / 4 + 50 * 1 / 2, 100 * 2 / 5 + 800 / 10
    assert found["population_recall"].value == pytest.approx(hits / 100)
    assert found["population_precision"].value == pytest.approx(hits / (hits + alarms))
    assert found["population_f1"].value == pytest.approx(2 * hits / (100 + hits + alarms))
    assert found["population_specificity"].value == pytest.approx(1 - alarms / 900)
    assert {one.n for one in found.values()} == {21}
    assert {one.n_documents for one in found.values()} == {21}


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_scikit_learn_with_the_weights_of_the_frame(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = ["same_token"] * 20 + ["neighbour"] * 15 + ["silent"] * 30
    n = 40 + len(kinds)
    score = np.concatenate([rng.random(40) * 0.9, rng.random(len(kinds)).round(1)])
    score[[40, 60, 75]] = 1.0  # an alarm of every kind above all thresholds: nothing is extrapolated
    observed = judgements(
        (score[:40] > 0.4).astype(int).tolist(), (score[40:] > 0.4).astype(int).tolist(),
        score=score.tolist(), kinds=kinds, deciles=[i % 10 for i in range(40)],
        probability=[*rng.uniform(0.1, 1.0, 40).tolist(), *[0.5] * (n - 40)],
        multiplicity=rng.integers(1, 4, n).tolist(),
        activation=[*rng.gamma(2.0, size=40).tolist(), *[0.0] * (n - 40)],
    )  # fmt: skip
    frame = FrameCounts(windows=5000, firing=300, silent={"same_token": 200, "neighbour": 500, "silent": 2000})
    weights = frame_weights(observed, frame)
    assert weights[observed.truth].sum() == pytest.approx(300)
    assert weights[~observed.truth].sum() == pytest.approx(4700)
    found = population(observed, frame)
    pairs = {
        "population_precision": oracle.precision_score,
        "population_recall": oracle.recall_score,
        "population_f1": oracle.f1_score,
    }
    for metric, theirs in pairs.items():
        expected = theirs(observed.truth, observed.prediction, sample_weight=weights)
        assert found[metric].value == pytest.approx(expected)
    expected = oracle.average_precision_score(observed.truth, score, sample_weight=weights)
    assert found["population_auprc"].value == pytest.approx(expected)
    both = np.cov(score, observed.activation, aweights=weights)
    assert found["population_pearson"].value == pytest.approx(both[0, 1] / math.sqrt(both[0, 0] * both[1, 1]))


def test_recall_and_specificity_are_right_on_average_over_every_possible_draw() -> None:
    # The frame: 9 firing windows in two deciles, 7 and 5 silent ones of two kinds, and what the judge says of each.
    firing, first, second = ((1, 1, 0, 1), (0, 1, 0, 0, 1)), (1, 0, 0, 1, 0, 0, 0), (0, 0, 1, 0, 0)
    frame = FrameCounts(windows=21, firing=9, silent={"same_token": 7, "silent": 5})
    draws = itertools.product(
        itertools.combinations(firing[0], 2),
        itertools.combinations(firing[1], 2),
        itertools.combinations(first, 2),
        itertools.combinations(second, 2),
    )
    values = []
    for a, b, c, d in draws:
        observed = judgements(
            [*a, *b], [*c, *d], deciles=[0, 0, 1, 1], kinds=["same_token"] * 2 + ["silent"] * 2,
            probability=[2 / 4] * 2 + [2 / 5] * 2 + [2 / 7] * 2 + [2 / 5] * 2,
        )  # fmt: skip
        found = population(observed, frame, draws=2)
        values.append([found["population_recall"].value, found["population_specificity"].value])
    assert len(values) == 6 * 10 * 21 * 10
    assert np.mean(values, axis=0) == pytest.approx([5 / 9, 1 - 3 / 12])


def test_a_window_that_stands_for_others_counts_as_often() -> None:
    frame = FrameCounts(windows=60, firing=8, silent={"silent": 40})
    once = judgements([1, 0], [1, 0, 0], multiplicity=[3, 1, 1, 2, 2])
    often = judgements([1, 1, 1, 0], [1, 0, 0, 0, 0])
    a, b = population(once, frame), population(often, replace(frame, silent={"silent": 52}))
    for metric in RATES:
        assert a[metric].value == pytest.approx(b[metric].value)


def test_what_was_answered_stands_for_what_failed_in_its_stratum() -> None:
    observed = judgements([1, 0, -1, -1, 0, 0], [1, 0], deciles=[0, 0, 0, 0, 1, 1], probability=[0.1] * 8)
    frame = FrameCounts(windows=1000, firing=60, silent={"silent": 940})
    assert population(observed, frame)["population_recall"].value == pytest.approx(4 / 6 * 1 / 2)


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [25, 50, 100])
def test_recall_covers_at_every_rate(n: int) -> None:
    k = np.arange(n + 1)
    low = stats.beta.ppf(0.025, k + 0.25, n - k + 0.75)
    high = stats.beta.ppf(0.975, k + 0.75, n - k + 0.25)
    frame = FrameCounts(windows=3000, firing=1000, silent={"silent": 2000})
    for some in (0, n // 3, n - 1, n):  # what is simulated are these bounds
        found = population(judgements(verdicts(some, n), [0] * 5), frame, draws=20_000)["population_recall"]
        assert (found.low, found.high) == pytest.approx((min(low[some], some / n), max(high[some], some / n)), abs=5e-3)
    covered = [stats.binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() for p in np.arange(0.55, 0.96, 0.05)]
    assert min(covered) > 0.935
    assert 0.94 < np.mean(covered) < 0.97


@pytest.mark.parametrize(("k", "n"), [(0, 30), (3, 30), (30, 30), (1, 100)])
def test_one_silent_stratum_has_the_bounds_of_clopper_and_pearson(k: int, n: int) -> None:
    observed = judgements(verdicts(18, 20), verdicts(k, n))
    frame = FrameCounts(windows=2000, firing=200, silent={"silent": 1800})
    found = population(observed, frame, draws=100_000)
    upper = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    lower = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    assert found["population_specificity"].low == pytest.approx(1.0 - upper, abs=2e-3)
    assert found["population_specificity"].high == pytest.approx(1.0 - lower, abs=2e-3)
    recall = found["population_recall"]
    assert recall.low == pytest.approx(stats.beta.ppf(0.025, 18.25, 2.75), abs=3e-3)
    assert recall.high == pytest.approx(stats.beta.ppf(0.975, 18.75, 2.25), abs=3e-3)


def test_the_lower_bound_of_precision_is_that_of_its_rates() -> None:
    # Recall hardly varies, so that precision is a function of the rate of alarms alone.
    observed = judgements([1] * 5000, verdicts(4, 50))
    frame = FrameCounts(windows=100_000, firing=5000, silent={"silent": 95_000})
    found = population(observed, frame, draws=50_000)["population_precision"]
    worst, best = stats.beta.ppf(0.975, 5, 46), stats.beta.ppf(0.025, 4, 47)
    assert found.low == pytest.approx(5000 / (5000 + 95_000 * worst), rel=0.01)
    assert found.high == pytest.approx(5000 / (5000 + 95_000 * best), rel=0.01)
    assert found.value == pytest.approx(5000 / (5000 + 95_000 * 4 / 50))


def test_none_of_n_never_says_precision_1() -> None:
    observed = judgements(verdicts(90, 100), [0] * 100)
    rare = population(observed, FrameCounts(windows=100_000, firing=100, silent={"silent": 99_900}))
    precision = rare["population_precision"]
    rate = NONE_SEEN / 100
    assert precision.value == pytest.approx(90 / (90 + 99_900 * rate), rel=1e-6)
    assert precision.high == 1.0
    assert precision.low < 0.05
    assert precision.flags == ("not_identified",)
    assert precision.n_needed is not None
    assert 400 < precision.n_needed < 5000
    often = population(observed, FrameCounts(windows=400, firing=200, silent={"silent": 200}))["population_precision"]
    assert often.value < 1.0
    assert often.low > 0.9
    assert (often.flags, often.n_needed) == ((), None)
    assert rare["population_specificity"].value == 1.0  # unbiased, and bounded from below
    assert rare["population_specificity"].low == pytest.approx(1 - stats.beta.ppf(0.975, 1, 100), abs=0.005)


def test_a_stratum_cut_in_two_has_no_more_unseen_alarms() -> None:
    whole = judgements(verdicts(9, 10), [0] * 40)
    halves = judgements(verdicts(9, 10), [0] * 40, kinds=["neighbour"] * 20 + ["silent"] * 20)
    a = population(whole, FrameCounts(windows=1100, firing=100, silent={"silent": 1000}))
    b = population(halves, FrameCounts(windows=1100, firing=100, silent={"neighbour": 500, "silent": 500}))
    assert b["population_precision"].value == pytest.approx(a["population_precision"].value)


def test_as_many_judgements_as_needed_identify() -> None:
    frame = FrameCounts(windows=50_000, firing=500, silent={"silent": 49_500})
    few = population(judgements(verdicts(80, 100), verdicts(2, 100)), frame)["population_precision"]
    assert few.flags == ("not_identified",)
    assert few.n_needed is not None
    assert few.n_needed > 200
    times = math.ceil(few.n_needed / 200)
    more = population(judgements(verdicts(80 * times, 100 * times), verdicts(2 * times, 100 * times)), frame)
    assert more["population_precision"].flags == ()


def test_windows_that_could_not_be_drawn_leave_everything_open() -> None:
    observed = judgements(verdicts(90, 100), verdicts(5, 100))
    frame = FrameCounts(windows=1100, firing=100, silent={"silent": 900}, unused=100)
    known = FrameCounts(windows=1100, firing=100, silent={"silent": 1000})
    found, other = population(observed, frame), population(observed, known)
    for metric in RATES:
        assert found[metric].value == pytest.approx(other[metric].value)  # they count as the others do
    specificity = found["population_specificity"]
    assert specificity.low == pytest.approx(0.9 * (1 - stats.beta.ppf(0.975, 6, 95)), abs=0.01)
    assert specificity.high == pytest.approx(1 - 0.9 * stats.beta.ppf(0.025, 5, 96), abs=0.01)
    nothing = population(observed, FrameCounts(windows=100_000, firing=100, silent={"silent": 100}, unused=99_800))
    assert nothing["population_precision"].flags == ("not_identified",)
    assert nothing["population_precision"].n_needed is None  # no number of these would do


def test_a_stratum_without_answers_is_unknown() -> None:
    observed = judgements(verdicts(9, 10), [0, 1, 0, -1, -1], kinds=["same_token"] * 3 + ["silent"] * 2)
    frame = FrameCounts(windows=110, firing=10, silent={"same_token": 50, "silent": 50})
    found = population(observed, frame)["population_specificity"]
    assert found.value == pytest.approx(2 / 3)
    assert found.low < 0.5 * (2 / 3)
    assert found.high > 0.9


def test_failures_bound_what_might_have_been() -> None:
    firing, silent = [*verdicts(15, 18), -1, -1], [*verdicts(2, 27), -1, -1, -1]
    frame = FrameCounts(windows=1000, firing=100, silent={"silent": 900})
    found = population(judgements(firing, silent), frame)
    worst = population(judgements([max(v, 0) for v in firing], [abs(v) for v in silent]), frame)
    best = population(judgements([abs(v) for v in firing], [max(v, 0) for v in silent]), frame)
    for metric in (*RATES, "population_pearson"):
        assert found[metric].floor == min(worst[metric].low, found[metric].low)
        assert found[metric].ceiling == max(best[metric].high, found[metric].high)
        assert found[metric].floor < found[metric].low
        assert found[metric].n == 45
        assert found[metric].n_documents == 45


def test_missing_scores_rank_last_and_first() -> None:
    score = [0.9, 0.8, 0.3, math.nan, 0.85, 0.1, 0.2, math.nan]
    observed = judgements([1, 1, 0, -1], [1, 0, 0, -1], score=score)
    frame = FrameCounts(windows=80, firing=40, silent={"silent": 40})
    found = population(observed, frame)
    filled = [*score[:3], -1.0, *score[4:7], 2.0]
    worst = population(judgements([1, 1, 0, 0], [1, 0, 0, 1], score=filled), frame)
    assert found["population_auprc"].floor == pytest.approx(
        min(worst["population_auprc"].low, found["population_auprc"].low)
    )
    assert found["population_auprc"].n == 6


def test_documents_widen_and_few_are_flagged() -> None:
    apart = judgements(verdicts(30, 40), verdicts(8, 40))
    rng = np.random.default_rng(3)
    together = replace(apart, document=np.concatenate([np.sort(rng.integers(8, size=40)), np.arange(40) // 5]))
    frame = FrameCounts(windows=1000, firing=200, silent={"silent": 800})
    a, b = population(apart, frame), population(together, frame)
    for metric in RATES:
        assert a[metric].value == pytest.approx(b[metric].value)
        assert b[metric].high - b[metric].low > a[metric].high - a[metric].low
        assert "few_documents" in b[metric].flags
        assert "few_documents" not in a[metric].flags


def test_effective_counts_of_cases_worked_by_hand() -> None:
    everything = np.ones(8, bool)
    frame = FrameCounts(windows=80, firing=40, silent={"silent": 40})
    yes = np.array([1, 1, 0, 0, 1, 0, 0, 0], np.float64)
    plain = parts(judgements([1, 1, 0, 0], [1, 0, 0, 0]), frame, everything)
    assert plain.firing.effective(yes, 0.95) == pytest.approx(4.0)
    # Weights 3, 1, 1, 1: the variance of the mean is Σw²(x − p)² / (Σw)² with p = 4/6; Kish's count is 36/12.
    unequal = parts(judgements([1, 1, 0, 0], [1, 0, 0, 0], multiplicity=[3, 1, 1, 1] * 2), frame, everything)
    variance = (9 * (1 / 3) ** 2 + (1 / 3) ** 2 + 2 * (2 / 3) ** 2) / 36
    assert unequal.firing.effective(yes, 0.95) == pytest.approx(min(2 / 9 / variance, 3.0))
    # Two documents that agree within are two observations, less what Student's t with one degree takes.
    pairs = parts(judgements([1, 1, 0, 0], [1, 0, 0, 0], document=[0, 0, 1, 1, 2, 3, 4, 5]), frame, everything)
    factor = (stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)) ** 2
    assert pairs.firing.effective(yes, 0.95) == pytest.approx(1.0 / factor)
    assert pairs.firing.mean(yes) == pytest.approx(0.5)


# -- the edges --------------------------------------------------------------------------------------------------------


def test_what_is_undefined_is_no_number() -> None:
    frame = FrameCounts(windows=100, firing=10, silent={"silent": 90})
    never = population(judgements([0, 0, 0], [0, 0, 0]), frame)
    assert (never["population_precision"].n, math.isnan(never["population_precision"].value)) == (0, True)
    assert never["population_f1"].value == 0.0
    assert never["population_recall"].value == 0.0
    assert math.isnan(never["population_pearson"].value)
    for one_class in (judgements([1, 0], []), judgements([], [1, 0]), judgements([-1, -1], [-1, -1])):
        found = population(one_class, frame)
        assert {one.n for one in found.values()} == {0}
        assert all(math.isnan(one.value) for one in found.values())


def test_scores_without_verdicts_have_no_rates() -> None:
    observed = judgements([-1] * 3, [-1] * 3, score=[3.0, 2.0, 0.5, 1.0, -1.0, 0.0], activation=[3, 2, 1, 0, 0, 0])
    found = population(observed, FrameCounts(windows=60, firing=30, silent={"silent": 30}))
    assert sorted(found) == ["population_auprc", "population_pearson"]
    assert found["population_auprc"].floor == found["population_auprc"].low  # nothing failed


def test_a_frame_without_the_stratum_is_refused() -> None:
    frame = FrameCounts(windows=100, firing=10, silent={"silent": 90})
    with pytest.raises(InputError, match="of stratum neighbour, the frame has silent; give the frame"):
        population(judgements([1], [0], kinds=["neighbour"]), frame)


@given(st.data())
def test_intervals_hold_their_values_whatever_was_judged(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    verdict = st.sampled_from([-1, 0, 1])
    numbers = st.one_of(st.just(math.nan), st.floats(0, 1))
    observed = judgements(
        data.draw(st.lists(verdict, min_size=m, max_size=m)),
        data.draw(st.lists(verdict, min_size=n, max_size=n)),
        score=data.draw(st.lists(numbers, min_size=m + n, max_size=m + n)),
        kinds=data.draw(st.lists(st.sampled_from(["same_token", "silent"]), min_size=n, max_size=n)),
        document=data.draw(st.lists(st.integers(0, 9), min_size=m + n, max_size=m + n)),
        multiplicity=data.draw(st.lists(st.integers(1, 5), min_size=m + n, max_size=m + n)),
        activation=[*data.draw(st.lists(st.floats(0.1, 9), min_size=m, max_size=m)), *[0.0] * n],
    )
    frame = FrameCounts(windows=1000, firing=50, silent={"same_token": 100, "silent": 700}, unused=3)
    found = population(observed, frame, draws=50)
    for metric, one in found.items():
        lowest = -1.0 if metric == "population_pearson" else 0.0
        if one.n:
            assert lowest <= one.floor <= one.low <= one.value <= one.high <= one.ceiling <= 1.0
        else:
            assert math.isnan(one.value)
    again = population(observed, frame, draws=50)
    assert repr(found) == repr(again)


# -- the steps --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(np.array(values), share) == pytest.approx(float(np.quantile(values, share)), abs=1e-9)


def test_half_widths_are_over_the_value_or_the_geometric_centre() -> None:
    def of(value: float, low: float, high: float) -> float:
        return half_width(Interval(value=value, low=low, high=high, method="", n=1))

    assert of(0.2, 0.1, 0.5) == pytest.approx(0.2 / 0.2)
    assert of(0.4, 0.1, 0.5) == pytest.approx(0.2 / math.sqrt(0.05))
    assert math.isinf(of(0.4, 0.0, 0.5))


def test_bounds_move_out_in_logits() -> None:
    assert further(0.5, 0.3, 1.0, 0.0) == 0.3
    assert further(0.5, 1 / (1 + math.exp(1.0)), 2.0, 0.0) == pytest.approx(1 / (1 + math.exp(2.0)))
    assert further(0.0, math.tanh(0.5), 2.0, -1.0) == pytest.approx(math.tanh(1.0))


def test_firing_windows_of_one_document_bound_no_area_and_no_correlation() -> None:
    rng = np.random.default_rng(0)
    activation = [*(rng.random(30) + 0.1), *[0.0] * 30]
    score = [*rng.beta(4, 2, 30), *rng.beta(1, 6, 30)]
    frame = FrameCounts(windows=1000, firing=60, silent={"silent": 940})

    def judged(document: list[int]) -> Observed:
        firing, silent = verdicts(25, 30), verdicts(3, 30)
        return judgements(firing, silent, score=score, document=document, activation=activation)

    one, many = (judged([*first, *range(100, 130)]) for first in ([0] * 30, list(range(30))))
    for lowest, name in ((0.0, "population_auprc"), (-1.0, "population_pearson")):
        found, apart = population(one, frame)[name], population(many, frame)[name]
        assert (found.low, found.high) == (lowest, 1.0)
        assert lowest < apart.low < apart.high < 1.0
        assert found.value == pytest.approx(apart.value)
    for lowest, metric in ((-1.0, metrics.responsiveness), (0.0, metrics.purity)):
        found = metric(one, frame)
        assert (found.low, found.high) == (lowest, 1.0)
        assert metric(many, frame).high < 1.0
