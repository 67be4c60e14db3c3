from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import ConfigError, InputError
from exegete.metrics import wilson
from exegete.metrics.sequential import RatioTest, fixed_pairs, operating
from exegete.scorers.sequential import (
    Outcome,
    Rounds,
    Stopping,
    drawn_order,
    fixed_judgements,
    half_width,
    round_pairs,
)
from exegete.scorers.sequential import Tested as Course
from exegete.types import STRATA, Array, LatentId, Windows

Judge = Callable[[int, Windows], Sequence[bool | None]]
SILENT = STRATA.index("silent"), STRATA.index("same_token")


def windows(firing: int = 100, silent: int = 100, *, shuffled: int | None = None) -> Windows:
    """Windows of ten deciles and two silent kinds, in order of stratum unless ``shuffled`` by a seed."""
    n = firing + silent
    fires = np.arange(n) < firing
    stratum = np.concatenate([np.sort(np.arange(firing) % 10), np.sort(np.resize(SILENT, silent))])
    order = np.arange(n) if shuffled is None else np.random.default_rng(shuffled).permutation(n)
    return Windows(
        split=np.full(n, 2, np.int8),
        stratum=stratum.astype(np.int8)[order],
        row=np.arange(n)[order],
        start=np.full(n, 8),
        document=np.arange(n)[order] % 20,
        fires=fires[order],
        multiplicity=np.ones(n, np.int64),
        probability=np.ones(n),
        tokens=np.zeros((n, 4), np.uint32),
        activations=np.where(fires[order, None], 1.0, 0.0).astype(np.float32) * np.ones((1, 4), np.float32),
    )


def named(index: int = 0, given: Windows | None = None, seed: int = 0) -> Course:
    return Course(seed=seed, latent=LatentId(coder="c", index=index), windows=windows() if given is None else given)


def run(rounds: Rounds, block: Sequence[Course], judge: Judge) -> list[Outcome]:
    while drawn := rounds.draw():
        for place, which in drawn:
            rounds.tell(place, judge(place, block[place].windows.take(which)))
    return [rounds.outcome(place) for place in range(len(block))]


def right_with(chances: Sequence[float], seed: int = 0) -> Judge:
    rng = np.random.default_rng(seed)

    def judge(place: int, asked: Windows) -> list[bool | None]:
        right = rng.random(len(asked)) < chances[place]
        said: list[bool | None] = (asked.fires == right).tolist()
        return said

    return judge


def steadily(shares: Sequence[float]) -> Judge:
    """A judge that is right about just such a share of whatever it is asked, at any time."""
    asked_yet = [0] * len(shares)

    def judge(place: int, asked: Windows) -> list[bool | None]:
        said: list[bool | None] = []
        for fires in asked.fires.tolist():
            before, asked_yet[place] = asked_yet[place] * shares[place], asked_yet[place] + 1
            right = math.floor(asked_yet[place] * shares[place]) > math.floor(before)
            said.append(fires == right)
        return said

    return judge


# -- the order of the draw --------------------------------------------------------------------------------------------


def test_every_stratum_has_its_share_at_any_time() -> None:
    given = windows()
    order = drawn_order(named(given=given))
    assert sorted(order.tolist()) == list(range(200))
    for firing, strata in ((True, range(10)), (False, SILENT)):
        drawn = given.stratum[order[given.fires[order] == firing]]
        for upto in range(1, 101):
            counts = np.array([(drawn[:upto] == stratum).sum() for stratum in strata])
            assert np.abs(counts - upto / len(counts)).max() < 2


def test_the_order_hangs_on_names_not_on_places() -> None:
    def names(one: Course) -> list[int]:
        found: list[int] = one.windows.row[drawn_order(one)].tolist()
        return found

    assert names(named()) == names(named(given=windows(shuffled=3)))
    assert names(named()) != names(named(seed=1))
    assert names(named()) != names(named(index=1))


def test_each_window_comes_first_equally_often() -> None:
    given = windows(20, 20)
    first = []
    for i in range(1500):
        order = drawn_order(named(i, given))
        first.append(order[given.fires[order]][0])
    counts = np.bincount(first, minlength=20)
    assert ((counts - 75.0) ** 2 / 75.0).sum() < 43.8  # chi-squared with 19 degrees of freedom at .001


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_rounds_are_whole_requests_of_both_classes() -> None:
    block = [named()]
    rounds = Rounds(Stopping(certify=0.8), block, per_request=5, budget=200)
    seen: list[int] = []
    sizes = []
    rng = np.random.default_rng(0)
    while drawn := rounds.draw():
        [(place, which)] = drawn
        fires = block[0].windows.fires[which]
        assert place == 0
        assert 2 * fires.sum() == len(which)
        sizes.append(len(which))
        seen += which.tolist()
        rounds.tell(place, (fires == (rng.random(len(which)) < 0.725)).tolist())
    assert sizes[0] == 20
    assert all(size % 10 == 0 for size in sizes)
    assert len(set(seen)) == len(seen)
    assert rounds.outcome(0).asked.tolist() == seen


def test_both_classes_are_mixed_within_a_round() -> None:
    block = [named(i) for i in range(300)]
    first = [block[place].windows.fires[which[0]] for place, which in Rounds(Stopping(certify=0.8), block).draw()]
    assert 110 < sum(first) < 190


@pytest.mark.parametrize("per_request", [1, 2, 5, 10, 16])
def test_sizes_of_rounds(per_request: int) -> None:
    done, sizes = 0, []
    while done < 400:
        sizes.append(round_pairs(done, per_request))
        assert 2 * sizes[-1] % per_request == 0
        done += sizes[-1]
    assert sizes[0] >= 8
    assert min(sizes) >= 4
    assert max(sizes) <= max(50, per_request)
    assert len(sizes) <= 30


def test_the_clear_are_settled_in_the_first_round() -> None:
    block = [named(0), named(1)]
    good, bad = run(Rounds(Stopping(certify=0.8), block), block, right_with([1.0, 0.0]))
    assert (good.certified, bad.certified) == (True, False)
    assert len(good.asked) == len(bad.asked) == 20
    assert good.figures["certified"].value == good.figures["certified"].low == 1.0
    assert bad.figures["certified"].value == bad.figures["certified"].high == 0.0
    assert good.figures["certified"].method == (
        "likelihood ratio test of at least 0.8 against at most 0.65, errors 0.05 and 0.05"
    )
    assert good.figures["certify_e"].value == pytest.approx((0.8 / 0.65) ** 16)  # at the eighth pair, which decided
    assert good.figures["balanced_accuracy"].value == 1.0
    assert good.figures["balanced_accuracy"].n == 20
    assert 0.55 < good.figures["balanced_accuracy"].low < 0.9
    assert dict(good.detail) == {"judgements": 20, "pairs": 10, "rounds": 1, "certified": True, "fixed_test": 98}


def test_what_stays_undecided_is_no_number() -> None:
    block = [named(given=windows(6, 6))]
    [found] = run(Rounds(Stopping(certify=0.8), block), block, right_with([1.0]))
    assert found.certified is None
    assert math.isnan(found.figures["certified"].value)
    assert (found.figures["certified"].low, found.figures["certified"].high) == (0.0, 1.0)
    assert found.figures["certified"].method.endswith("; undecided")
    assert len(found.asked) == 12


def test_failures_are_made_up_for_and_never_filled_in() -> None:
    block = [named()]
    rounds = Rounds(Stopping(certify=0.8), block, per_request=5)
    [(_, first)] = rounds.draw()
    fires = block[0].windows.fires[first]
    kept = np.flatnonzero(fires)[:3].tolist() + np.flatnonzero(~fires)[:9].tolist()
    rounds.tell(0, [bool(fires[i]) if i in kept else None for i in range(20)])
    assert rounds.outcome(0).detail["pairs"] == 3
    [(_, second)] = rounds.draw()
    again = block[0].windows.fires[second]
    assert (again.sum(), (~again).sum()) == (5, 0)  # six silent ones wait for their partners; a round makes five pairs
    rounds.tell(0, again.tolist())
    found = rounds.outcome(0)
    assert found.detail["pairs"] == 8
    assert found.certified is True
    assert found.figures["sensitivity"].n == 8
    assert found.figures["specificity"].n == 9


def test_what_failed_widens_the_bounds() -> None:
    """Every tenth answer is missing: as wrong ones they would not certify, as right ones they would sooner."""
    block = [named()]

    def judge(_: int, asked: Windows) -> list[bool | None]:
        return [None if k % 10 == 9 else bool(f) == (k % 10 > 0) for k, f in enumerate(asked.fires)]

    [found] = run(Rounds(Stopping(certify=0.8), block, budget=200), block, judge)
    assert found.certified is True
    verdicts = judge(0, block[0].windows.take(found.asked[:10])) * (len(found.asked) // 10)
    assert verdicts.count(None) == len(found.asked) // 10
    for name in ("balanced_accuracy", "sensitivity", "specificity", "f1", "certify_e"):
        figure = found.figures[name]
        assert figure.floor < figure.low <= figure.high
        assert figure.floor <= figure.low <= figure.high <= figure.ceiling
    assert found.figures["certified"].floor == 0.0
    assert found.figures["certified"].ceiling == 1.0


def test_figures_say_how_many_documents_they_rest_on() -> None:
    block = [named()]
    [few] = run(Rounds(Stopping(certify=0.8), block), block, steadily([1.0]))
    [many] = run(Rounds(Stopping(stop_when=0.1), block), block, steadily([0.75]))
    for outcome in (few, many):
        asked = block[0].windows.take(outcome.asked)
        assert outcome.figures["balanced_accuracy"].n_documents == len(set(asked.document.tolist()))
        assert outcome.figures["sensitivity"].n_documents == len(set(asked.document[asked.fires].tolist()))
    assert few.figures["sensitivity"].flags == ("few_documents",)
    assert many.figures["f1"].flags == ()


def test_a_judge_that_never_answers_ends() -> None:
    block = [named(given=windows(30, 12))]
    [found] = run(Rounds(Stopping(certify=0.8), block), block, lambda _, asked: [None] * len(asked))
    assert len(found.asked) == 24  # no more of one class than the other has partners for
    assert found.certified is None
    assert all(math.isnan(found.figures[name].value) for name in ("balanced_accuracy", "sensitivity", "f1"))
    [found] = run(Rounds(Stopping(stop_when=0.1), block), block, lambda _, asked: [None] * len(asked))
    assert found.detail["half_width"] is None


@pytest.mark.parametrize(("firing", "silent"), [(0, 30), (30, 0), (0, 0)])
def test_a_latent_without_both_classes_is_asked_nothing(firing: int, silent: int) -> None:
    block = [named(given=windows(firing, silent)), named(1)]
    found, other = run(Rounds(Stopping(certify=0.8), block), block, right_with([1.0, 1.0]))
    assert len(found.asked) == 0
    assert math.isnan(found.figures["balanced_accuracy"].value)
    assert other.certified is True


def test_the_block_does_not_change_a_latent() -> None:
    """As long as the budget suffices, a latent has the same windows and decision in whatever company."""

    def judge(place: int, asked: Windows) -> list[bool | None]:
        return [bool(f) == (r % 5 > 0) for f, r in zip(asked.fires, asked.row, strict=True)]

    blocks = [[named(7)], [named(3), named(7), named(9)]]
    alone, among = (run(Rounds(Stopping(certify=0.7), block), block, judge) for block in blocks)
    assert alone[0].asked.tolist() == among[1].asked.tolist()
    assert alone[0].certified == among[1].certified


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_what_the_decided_leave_goes_to_the_undecided() -> None:
    shares = [1.0] * 6 + [0.73] * 4  # where the evidence stands still
    block = [named(i) for i in range(10)]
    alone = [run(Rounds(Stopping(certify=0.8), [one]), [one], steadily([0.73]))[0] for one in block[6:]]
    assert [len(outcome.asked) for outcome in alone] == [90] * 4  # the fixed test takes 98, a round 10
    found = run(Rounds(Stopping(certify=0.8), block), block, steadily(shares))
    asked = [len(outcome.asked) for outcome in found]
    assert asked[:6] == [20] * 6
    assert min(asked[6:]) > 98
    assert 980 - 40 < sum(asked) <= 980 or max(asked) == 200


@settings(max_examples=25, deadline=None)
@given(
    chances=st.lists(st.sampled_from([0.5, 0.7, 0.75, 1.0]), min_size=1, max_size=6),
    budget=st.integers(2, 150),
    per_request=st.sampled_from([1, 5, 8]),
    seed=st.integers(0, 99),
)
def test_no_block_passes_its_budget(chances: list[float], budget: int, per_request: int, seed: int) -> None:
    block = [named(i) for i in range(len(chances))]
    rounds = Rounds(Stopping(certify=0.8), block, per_request=per_request, budget=budget)
    found = run(rounds, block, right_with(chances, seed))
    assert sum(len(outcome.asked) for outcome in found) <= budget * len(chances)
    assert all(len(set(outcome.asked.tolist())) == len(outcome.asked) for outcome in found)
    first = 2 * round_pairs(0, per_request)
    assert all(len(outcome.asked) >= first for outcome in found if budget >= first)


def test_the_nearest_to_a_decision_go_on_first() -> None:
    block = [named(0), named(1), named(2)]
    rounds = Rounds(Stopping(certify=0.8), block, per_request=5, budget=24)
    drawn = rounds.draw()
    assert [place for place, _ in drawn] == [0, 1, 2]
    right = {0: 14, 1: 16, 2: 17}  # of 20: the evidence of the last is nearest to certifying
    for place, which in drawn:
        fires = block[place].windows.fires[which]
        rounds.tell(place, [bool(f) == (i >= 20 - right[place]) for i, f in enumerate(fires)])
    assert [place for place, _ in rounds.draw()] == [2]


# -- until an interval is narrow --------------------------------------------------------------------------------------


def test_judging_stops_when_the_interval_is_narrow() -> None:
    block = [named(i, windows(150, 150)) for i in range(4)]
    found = run(Rounds(Stopping(stop_when=0.1), block, per_request=5), block, right_with([0.8, 0.9, 0.97, 0.6]))
    for outcome in found:
        reached = half_width(outcome.figures["balanced_accuracy"])
        detail = outcome.detail
        assert reached <= 0.1
        assert detail["half_width"] == reached
        assert detail["fixed_width"] < detail["judgements"]  # no saving is claimed
        assert "certified" not in outcome.figures
        assert outcome.certified is None
    assert len(found[2].asked) < len(found[0].asked)


def test_what_never_gets_narrow_ends_with_its_windows() -> None:
    block = [named(given=windows(20, 20))]
    [found] = run(Rounds(Stopping(stop_when=0.05), block), block, right_with([0.7]))
    assert len(found.asked) == 40
    assert found.detail["half_width"] > 0.05


def test_both_reasons_to_stop_have_to_hold() -> None:
    block = [named()]
    [found] = run(Rounds(Stopping(certify=0.8, stop_when=0.15), block), block, right_with([0.95]))
    assert found.certified is True
    assert half_width(found.figures["balanced_accuracy"]) <= 0.15
    assert len(found.asked) > 20


def test_fixed_judgements_by_search() -> None:
    def width(n: int) -> float:
        one, other = wilson(0.8 * n, n), wilson(0.9 * n, n)
        below = math.hypot(one.value - one.low, other.value - other.low)
        return (below + math.hypot(one.high - one.value, other.high - other.value)) / 4

    assert fixed_judgements(0.8, 0.9, 0.06) == 2 * next(n for n in itertools.count(1) if width(n) <= 0.06)
    with pytest.raises(InputError, match="above 0, got 0"):
        fixed_judgements(0.8, 0.9, 0.0)


# -- what it saves and whether it holds -------------------------------------------------------------------------------


def test_certifying_takes_half_the_judgements_of_the_fixed_test() -> None:
    """Over latents like Beta(6, 2.2), in rounds of whole requests of five, exactly: at least 45 % fewer."""
    test, rounds = RatioTest(level=0.8), [0]
    while rounds[-1] < 100:
        rounds.append(min(rounds[-1] + round_pairs(rounds[-1], 5), 100))
    values = (np.arange(60) + 0.5) / 60
    weights = values**5 * (1 - values) ** 1.2
    each = [operating(test, v, v, rounds[1:]) for v in values.tolist()]
    mean = weights @ np.array([o.judgements for o in each]) / weights.sum()
    assert mean <= 0.55 * 2 * fixed_pairs(test)
    assert operating(test, 0.65, 0.65, rounds[1:]).certified <= 0.05
    assert operating(test, 0.8, 0.8, rounds[1:]).rejected <= 0.05


def test_a_block_saves_as_much_and_errs_as_rarely() -> None:
    rng = np.random.default_rng(0)
    values: Array = rng.beta(6, 2.2, 240)
    block = [named(i, windows()) for i in range(len(values))]
    found = run(Rounds(Stopping(certify=0.8), block), block, right_with(values.tolist(), seed=1))
    assert np.mean([len(outcome.asked) for outcome in found]) <= 0.55 * 98
    wrong = [o.certified is not None and o.certified != (v >= 0.8) for o, v in zip(found, values, strict=True)]
    clear = (values <= 0.65) | (values >= 0.8)
    assert np.mean(np.array(wrong)[clear]) < 0.04
    missed = [not o.figures["balanced_accuracy"].low <= v <= o.figures["balanced_accuracy"].high
              for o, v in zip(found, values, strict=True)]  # fmt: skip
    assert np.mean(missed) <= 0.05


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"certify": 1.0}, {"certify": 0.1}, {"certify": 0.8, "margin": -0.1},
                                   {"stop_when": 0.0}, {"stop_when": 0.5}, {"certify": 0.8, "error": 0.6}])  # fmt: skip
def test_settings_that_make_no_test(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Stopping(**given)


def test_rounds_refuse_what_they_cannot_do() -> None:
    assert not Stopping().active
    assert Stopping().test is None
    with pytest.raises(InputError, match="give certify or stop_when"):
        Rounds(Stopping(), [named()])
    with pytest.raises(InputError, match="got 0 and None"):
        Rounds(Stopping(certify=0.8), [named()], per_request=0)
    rounds = Rounds(Stopping(certify=0.8), [named()])
    rounds.draw()
    with pytest.raises(InputError, match="verdicts of 1 latents are still to be told"):
        rounds.draw()
    with pytest.raises(InputError, match="asked 20 windows, got 1 answers"):
        rounds.tell(0, [True])
    with pytest.raises(InputError, match="asked 0 windows, got 1 answers"):
        rounds.tell(1, [True])
