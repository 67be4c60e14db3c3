"""The boundary types check themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete import types
from exegete.errors import InputError
from exegete.types import (
    Example,
    ExampleSet,
    Explanation,
    Firings,
    Judgement,
    LatentId,
    LLMReply,
    Rows,
    Score,
    SparseCode,
    Windows,
)


def example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "split": "train",
        "fires": True,
        "stratum": "decile_0",
        "row": 0,
        "start": 1,
        "tokens": np.arange(4, dtype=np.uint32),
        "activations": np.array([0, 2, 5, 0], dtype=np.float32),
        "document": 0,
        "inclusion_probability": 0.5,
    }
    return Example(**{**values, **changes})


def example_set(*examples: Example) -> ExampleSet:
    latent = LatentId(coder="layers.1", index=3)
    return ExampleSet(latent=latent, examples=examples, maximum=5.0, firing_rate=0.1, frame=100, seed=0)


def score(**changes: Any) -> Score:
    values: dict[str, Any] = {
        "latent": LatentId(coder="c", index=0),
        "scorer": "detection",
        "metric": "balanced_accuracy",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "method": "MOVER",
        "n_total": 10,
        "n_scored": 8,
        "n_failed": 2,
    }
    return Score(**{**values, **changes})


@given(st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1), st.integers(0, 10**9))
def test_latent_ids_round_trip_through_text(coder: str, index: int) -> None:
    latent = LatentId(coder=coder, index=index)
    assert LatentId.parse(str(latent)) == latent


@pytest.mark.parametrize("text", ["", "layers.3", "layers.3/", "/4", "layers.3/-1", "layers.3/x", "layers.3/1.5"])
def test_other_texts_are_no_latent(text: str) -> None:
    with pytest.raises(InputError, match="CODER/index"):
        LatentId.parse(text)


def test_negative_indices_and_nameless_coders_are_refused() -> None:
    with pytest.raises(InputError):
        LatentId(coder="c", index=-1)
    with pytest.raises(InputError):
        LatentId(coder="", index=1)


def test_every_boundary_type_is_frozen_slotted_and_keyword_only() -> None:
    kinds = [k for k in vars(types).values() if dataclasses.is_dataclass(k) and isinstance(k, type)]
    assert len(kinds) >= 13
    for kind in kinds:
        parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
        assert parameters.frozen, kind
        assert "__slots__" in vars(kind), kind
        assert all(f.kw_only for f in dataclasses.fields(kind)), kind


def test_example_knows_its_peak() -> None:
    assert example().peak == 2
    assert example().maximum == 5.0
    assert example().stop == 5
    silent = example(fires=False, activations=np.zeros(4, dtype=np.float32))
    assert silent.peak == -1


@pytest.mark.parametrize(
    "changes",
    [
        {"fires": False},
        {"fires": True, "activations": np.zeros(4, dtype=np.float32)},
        {"inclusion_probability": 0.0},
        {"inclusion_probability": 1.01},
        {"split": "dev"},
        {"activations": np.zeros(3, dtype=np.float32)},
    ],
)
def test_examples_that_contradict_themselves_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        example(**changes)


def test_a_document_in_two_splits_is_refused() -> None:
    with pytest.raises(InputError, match="document 0 is in both train and test"):
        example_set(example(), example(split="test", row=1))


def test_a_silent_test_window_shares_the_rule() -> None:
    negative = example(split="test", row=9, fires=False, activations=np.zeros(4, dtype=np.float32))
    with pytest.raises(InputError, match="in both"):
        example_set(example(), negative)


def test_test_windows_never_overlap_but_may_touch() -> None:
    example_set(example(split="test", start=1), example(split="test", start=5))
    with pytest.raises(InputError, match="overlap"):
        example_set(example(split="test", start=1), example(split="test", start=4))


def test_train_windows_may_overlap_but_not_repeat() -> None:
    example_set(example(start=1), example(start=2))
    with pytest.raises(InputError, match="repeats"):
        example_set(example(start=1), example(start=1))


def test_parts_of_a_set() -> None:
    negative = example(split="test", row=2, document=1, fires=False, activations=np.zeros(4, dtype=np.float32))
    chosen = example_set(example(), example(split="test", row=1, document=1), negative)
    assert len(chosen.part("train")) == 1
    assert len(chosen.part("test")) == 2
    (silent,) = chosen.part("test", fires=False)
    assert (silent.row, silent.document, silent.stratum) == (2, 1, negative.stratum)
    assert chosen.part("test", fires=True)[0].row == 1


def test_a_window_stands_for_its_near_duplicates_over_its_chance() -> None:
    assert example(multiplicity=3, inclusion_probability=0.25).weight == 12
    assert example().weight == 2
    with pytest.raises(InputError, match="multiplicity below 1"):
        example(multiplicity=0)


def test_windows_are_examples_as_columns() -> None:
    silent = example(split="test", row=2, document=1, fires=False, activations=np.zeros(4, dtype=np.float32))
    given_ = [
        example(multiplicity=2),
        example(row=5, stratum="bin_3"),
        dataclasses.replace(silent, stratum="near_miss"),
    ]
    windows = Windows.of(given_)
    assert len(windows) == 3
    for one, other in zip(given_, windows, strict=True):
        for f in dataclasses.fields(Example):
            assert np.array_equal(getattr(one, f.name), getattr(other, f.name)), f.name
    assert [w.row for w in windows[1:]] == [5, 2]
    assert windows[-1].stratum == "near_miss"
    assert windows.take(np.array([True, False, True])).row.tolist() == [0, 2]
    assert windows.take(np.array([2, 0])).row.tolist() == [2, 0]
    assert windows.weight.tolist() == [4, 2, 2]
    assert windows.strongest.tolist() == [e.maximum for e in windows]
    assert windows.strongest.dtype == np.float64
    assert windows[:0].strongest.tolist() == []
    with pytest.raises(IndexError):
        windows[3]
    assert len(Windows.of([])) == 0
    assert len(example_set().part("test")) == 0


def test_windows_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match=r"one length, got \[4, 5\]"):
        example_set(
            example(), example(row=1, tokens=np.arange(5), activations=np.array([0, 0, 1, 0, 0], dtype=np.float32))
        )
    with pytest.raises(InputError, match=r"stratum is one of decile_0, .*got.*'x'"):
        example_set(example(stratum="x"))
    windows = Windows.of([example(), example(row=1)])
    changes: list[dict[str, Any]] = [
        {"fires": np.array([True, False])},
        {"split": np.array([0, 3], np.int8)},
        {"stratum": np.array([0, -1], np.int8)},
        {"probability": np.array([0.5, 0.0])},
        {"probability": np.array([0.5, 1.5])},
        {"probability": np.array([0.5, np.nan])},
        {"multiplicity": np.array([1, 0])},
        {"row": np.array([1])},
        {"tokens": windows.tokens[:, :3]},
        {"tokens": windows.tokens[:, :0], "activations": windows.activations[:, :0]},
    ]
    for change in changes:
        with pytest.raises(InputError):
            dataclasses.replace(windows, **change)


def test_arrays_of_unlike_shape_are_refused() -> None:
    with pytest.raises(InputError):
        Rows(tokens=np.zeros((2, 3)), documents=np.zeros((2, 3)), mask=np.zeros((2, 2)))
    with pytest.raises(InputError):
        Rows(tokens=np.zeros(3), documents=np.zeros(3), mask=np.zeros(3))
    with pytest.raises(InputError):
        Firings(latent=LatentId(coder="c", index=0), rows=np.zeros(2), positions=np.zeros(2), values=np.zeros(3))
    with pytest.raises(InputError):
        SparseCode(indices=np.zeros((2, 2)), values=np.zeros((2, 3)), width=4)


def test_an_explanation_has_a_text_exactly_when_it_is_ok() -> None:
    latent = LatentId(coder="c", index=0)
    Explanation(latent=latent, text="x", status="ok", explainer={"name": "rule"})
    Explanation(latent=latent, text=None, status="refused", explainer={"name": "rule"})
    with pytest.raises(InputError):
        Explanation(latent=latent, text=None, status="ok", explainer={})
    with pytest.raises(InputError):
        Explanation(latent=latent, text="Explanation could not be parsed.", status="unparsed", explainer={})


def test_a_failed_judgement_has_no_prediction() -> None:
    places: dict[str, Any] = {"row": 0, "start": 0, "document": 0, "stratum": "silent", "truth": True}
    Judgement(**places, prediction=None, status="unparsed")
    with pytest.raises(InputError):
        Judgement(**places, prediction=False, status="failed")
    with pytest.raises(InputError):
        Judgement(**places, prediction=None)


def test_scores_add_up_and_lie_in_their_interval() -> None:
    score()
    score(value=math.nan, low=math.nan, high=math.nan, n_scored=0, n_failed=10)
    with pytest.raises(InputError, match="add up"):
        score(n_failed=0)
    with pytest.raises(InputError, match="leaves out"):
        score(value=0.7)


def test_an_llm_error_has_no_text() -> None:
    with pytest.raises(InputError):
        LLMReply(text="x", finish="error")
    with pytest.raises(InputError):
        LLMReply(text=None, finish="stop")
