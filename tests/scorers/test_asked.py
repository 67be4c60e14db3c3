"""Windows and what was said of them, as columns and as judgements: the two say the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from exegete.metrics import Observed
from exegete.scorers.asked import Asked, judgements_of
from exegete.scorers.judge import Items, Verdict
from exegete.scorers.valued import observed_values, value_judgements
from exegete.types import Windows


@pytest.fixture
def windows(world: Any) -> Windows:
    found: Windows = world.view(3, n_fire=4, n_silent=5).examples.part("test")
    n = len(found)
    return dataclasses.replace(found, multiplicity=np.arange(1, n + 1), probability=np.linspace(0.1, 1.0, n))


def same(left: Observed, right: Observed) -> None:
    for column in dataclasses.fields(Observed):
        a, b = getattr(left, column.name), getattr(right, column.name)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype, column.name


def test_verdicts_on_windows(windows: Windows) -> None:
    said = [Verdict(prediction=bool(i % 2), probability=i / 10) for i in range(len(windows) - 1)]
    said.append(Verdict(prediction=None, status="refused"))
    asked = Asked.whole(windows, Items(tokens=windows.tokens))
    judgements = asked.judgements(said)
    same(asked.observed(said), Observed.of(judgements))
    assert [j.status for j in judgements] == ["ok"] * (len(windows) - 1) + ["refused"]
    for judgement, window in zip(judgements, windows, strict=True):
        place = (judgement.row, judgement.start, judgement.document, judgement.stratum)
        assert place == (window.row, window.start, window.document, window.stratum)
        assert (judgement.truth, judgement.activation) == (window.fires, window.maximum)
        assert judgement.weight == window.weight


def test_numbers_on_windows(windows: Windows) -> None:
    values = np.linspace(-1.0, 1.0, len(windows))
    values[2] = np.nan
    judgements = value_judgements(windows, values)
    same(observed_values(windows, values), Observed.of(judgements))
    assert [j.status for j in judgements].count("failed") == 1
    assert (judgements[2].status, judgements[2].value, judgements[2].prediction) == ("failed", None, None)


def test_numbers_on_tokens_that_lie_in_windows(windows: Windows) -> None:
    place, column = np.array([0, 0, 2, 1]), np.array([1, 3, 0, 2])
    activation = windows.activations[place, column].astype(np.float64)
    truth, values = activation > 0, np.array([0.5, 0.25, 2.0, 0.0])
    said = [Verdict(prediction=None, value=value) for value in values.tolist()]
    judgements = judgements_of(windows, said, truth=truth, activation=activation, place=place, column=column)
    same(
        Observed.of_windows(windows, score=values, truth=truth, activation=activation, place=place),
        Observed.of(judgements),
    )
    assert [j.start for j in judgements] == (windows.start[place] + column).tolist()
    assert [j.row for j in judgements] == windows.row[place].tolist()
    assert [j.value for j in judgements] == values.tolist()
