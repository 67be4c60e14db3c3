from __future__ import annotations

import asyncio

import numpy as np
import pytest

from exegete.llm.scripted import Evidence
from exegete.scorers.intervention_effects import STEPS
from exegete.scorers.intervention_measuring import token_set
from exegete.scorers.intervention_reading import beginning
from exegete.testing.acting import Stage
from exegete.testing.intervening import Ends, divergences, ends_of, named_tokens, naming
from exegete.testing.readers import WORTH, CountingReader, spelled
from exegete.testing.settings import Round
from exegete.testing.worlds import World
from exegete.testing.written import WRITTEN, written_after

RATES = Evidence(true_positive_rate=1.0, false_positive_rate=0.0)


def nats(reader: CountingReader, text: str, said: str) -> float:
    (found,) = asyncio.run(reader.logprobs([(beginning(text), f'{said}"')]))
    assert found is not None
    return found


def test_every_covered_token_is_worth_as_much_to_the_reader(world: World) -> None:
    table = spelled(world.table)
    reader = CountingReader({"two": (7, 9), "none": ()}, RATES)
    few, more = table.decode([11, 7, 12]), table.decode([11, 7, 12, 9, 9])
    assert nats(reader, more, "two") - nats(reader, few, "two") == pytest.approx(2 * WORTH)
    assert nats(reader, more, "none") == nats(reader, few, "none")


def test_texts_that_begin_alike_are_read_alike(world: World) -> None:
    table = spelled(world.table)
    reader = CountingReader({"x": (7,)}, Evidence(true_positive_rate=0.5, false_positive_rate=0.5), seed=3)
    texts = [table.decode([5] * n) for n in range(40)]
    steps = np.diff([nats(reader, text, "x") for text in texts])
    assert set(steps.round(6)) == {0.0, WORTH}  # a token more changes nothing of what was read before


def test_what_is_written_is_a_chain() -> None:
    # two tokens and an end: after 0 comes 1, after 1 comes 0; the edit ends the text half of the time
    clean = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    edited = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0, 1]], np.float32)
    taken = np.array([[0.0, 1.0, 1.0], [0.25, 0.25, 1.0]])
    with np.errstate(divide="ignore"):
        found = written_after(
            np.array([0]),
            clean,
            [(strength, edited) for strength in (1.0, 2.0, 3.0)],
            taken=taken,
            ends=np.array([False, False, True]),
            seed=0,
        )
    ones = sum(0.5**k for k in range(1, STEPS + 1, 2))
    every = sum(0.5**k for k in range(1, STEPS + 1))
    expected = [ones - STEPS / 2, 0.25 * (every - STEPS)]
    assert found.expected[1, 0] == pytest.approx(expected, abs=1e-6)
    at = np.array([0])
    assert found.gains(np.array([2.5]), at, np.array([[1.0]]))[0] == pytest.approx(expected, abs=1e-6)
    assert found.off.shape == (1, WRITTEN, 2)
    assert found.off.mean(axis=1) == pytest.approx(np.zeros((1, 2)), abs=1e-9)
    scatter = found.scatter(at, np.array([[10_000]]), np.random.default_rng(0))
    assert np.abs(scatter).max() < 0.1


def test_ends_are_weighted_as_they_are_drawn() -> None:
    ends = Ends(tokens=np.array([3, 4]), counts=np.array([[10, 0], [5, 5]]))
    assert ends.shares == pytest.approx(np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]))


def test_damaged_explanations_name_half_the_tokens_or_as_many_wrong_ones(world: World) -> None:
    made = Round(world, 1, 20)
    frequent = np.bincount(made.frame.tokens.ravel(), minlength=len(world.table))
    for setting in made.settings:
        exact, missing, extra = (set(named_tokens(setting, rung)) for rung in ("exact", "missing", "extra"))
        assert missing < exact
        assert len(missing) == (len(exact) + 1) // 2 or (len(exact) == 1 and not missing)
        assert exact < extra
        assert len(extra) == 2 * len(exact)
        assert frequent[list(extra)].min() > 0
        assert set(token_set(naming(setting, "extra"))) == extra


def test_prompts_end_in_tokens_of_the_program(world: World) -> None:
    setting = Round(world, 1, 20).settings[0]
    ends = ends_of(setting)
    assert set(ends.tokens) <= set(named_tokens(setting, "exact"))
    assert (ends.counts.sum(axis=1) == 20).all()
    kl = divergences(Stage().acting(world), 0, ends.tokens)
    assert (np.diff(kl[:200].mean(axis=1)) > 0).all()
    assert kl[0] == pytest.approx(np.zeros(len(ends.tokens)), abs=1e-12)
