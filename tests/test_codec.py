"""Every boundary type goes through JSON and comes back equal."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exegete import types
from exegete.codec import from_json, to_json
from exegete.errors import CorruptError, InputError
from exegete.tokens import TokenTable
from exegete.types import (
    Example,
    ExampleSet,
    Explanation,
    Firings,
    Judgement,
    LatentId,
    LatentStats,
    LLMReply,
    LLMRequest,
    Rows,
    Score,
    Skipped,
    SparseCode,
    TokenLogprob,
    Windows,
)

LATENT = LatentId(coder="layers.3", index=17)


def example(split: types.Split, row: int, fires: bool) -> Example:
    return Example(
        split=split,
        fires=fires,
        stratum="decile_0" if fires else "silent",
        row=row,
        start=1,
        tokens=np.array([3, 1, 2], dtype=np.uint32),
        activations=np.array([0, 1.5 * fires, 0], dtype=np.float32),
        document=row,
        inclusion_probability=1 / 3,
    )


OBJECTS: list[Any] = [
    LATENT,
    Rows(
        tokens=np.arange(6, dtype=np.uint32).reshape(2, 3),
        documents=np.array([[0, 0, 0], [1, 1, -1]], dtype=np.int32),
        mask=np.array([[False, True, True], [False, True, False]]),
    ),
    SparseCode(indices=np.array([[1, 2]], dtype=np.int32), values=np.array([[0.5, 0]], dtype=np.float32), width=8),
    Firings(
        latent=LATENT,
        rows=np.array([0, 4], dtype=np.int64),
        positions=np.array([1, 9], dtype=np.int32),
        values=np.array([0.25, math.pi], dtype=np.float32),
    ),
    example("train", 0, True),
    ExampleSet(
        latent=LATENT,
        examples=(example("train", 0, True), example("test", 1, True), example("test", 2, False)),
        maximum=1.5,
        firing_rate=0.01,
        frame=300,
        seed=4,
        strata=(("same_token", 3), ("silent", 40)),
        table=TokenTable([b"a", b"\xff", b"\n", b"<s>"], special=[3]),
    ),
    Explanation(
        latent=LATENT,
        text="fires on cats",
        status="ok",
        explainer={"name": "default", "args": {"n": 3}},
        prompt_hash="ab",
        examples=((0, 1), (4, 9)),
        program={"clauses": [1, "x", None]},
        detail={"finish": "stop"},
    ),
    Judgement(row=1, start=2, document=3, stratum="silent", truth=False, prediction=None, status="refused"),
    Judgement(row=1, start=2, document=3, stratum="silent", truth=False, prediction=True, probability=0.75),
    Score(
        latent=LATENT,
        scorer="fuzzing",
        metric="f1",
        value=0.5,
        low=0.25,
        high=0.75,
        method="MOVER",
        n_total=9,
        n_scored=8,
        n_failed=1,
        explanation=12,
    ),
    Skipped(latent=LATENT, stage="select", reason="dead", have=0, need=10),
    LatentStats(
        latent=LATENT,
        count=3,
        rate=0.1,
        maximum=2.0,
        mean=1.0,
        sum_squares=5.0,
        histogram=np.array([1, 2], dtype=np.int64),
        edges=np.array([0.5, 1, 2], dtype=np.float64),
        top_tokens=((5, 2), (1, 1)),
        token_entropy=0.9,
    ),
    LLMRequest(messages=({"role": "user", "content": "hé"},), seed=3, schema={"type": "array"}, logprobs=5),
    LLMReply(
        text="1",
        finish="stop",
        prompt_tokens=7,
        cost=0.1,
        logprobs=(TokenLogprob(token="1", logprob=-0.1, alternatives={"1": -0.1, "0": -2.5}),),
    ),
    Windows.of([example("train", 0, True), example("test", 1, False)]),
    TokenLogprob(token=" a", logprob=None),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("value", OBJECTS, ids=lambda v: type(v).__name__)
def test_boundary_types_round_trip(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert same(from_json(type(value), json.loads(text)), value)


def test_every_boundary_type_is_in_the_list() -> None:
    kinds = {k for k in vars(types).values() if isinstance(k, type) and dataclasses.is_dataclass(k)}
    assert kinds == {type(value) for value in OBJECTS}


def test_an_undefined_score_stays_undefined() -> None:
    undefined = dataclasses.replace(OBJECTS[9], value=math.nan, low=math.nan, high=math.nan, n_scored=0, n_failed=9)
    again = from_json(Score, to_json(undefined))
    assert math.isnan(again.value)
    assert again.n_failed == 9


@given(arrays.arrays(st.sampled_from(["uint16", "int64", "float32", "bool", ">f4"]), arrays.array_shapes(max_dims=3)))
def test_arrays_of_any_shape_and_order(array: Any) -> None:
    finite = np.nan_to_num(array)
    code = SparseCode(indices=finite, values=finite, width=1)
    again = from_json(SparseCode, json.loads(json.dumps(to_json(code))))
    assert np.array_equal(again.values, finite)
    assert again.values.shape == finite.shape


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (LatentId, {"coder": "c"}),
        (LatentId, {"coder": "c", "index": "3"}),
        (LatentId, {"coder": "c", "index": 3, "extra": 1}),
        (LatentId, []),
        (LatentId, {"coder": "c", "index": True}),
        (Skipped, {"latent": 3, "stage": "", "reason": "", "have": 0, "need": 0}),
    ],
)
def test_data_that_does_not_fit_is_named(kind: Any, data: Any) -> None:
    with pytest.raises(CorruptError, match=kind.__name__):
        from_json(kind, data)


def test_contents_are_checked_as_on_construction() -> None:
    with pytest.raises(InputError, match="not negative"):
        from_json(LatentId, {"coder": "c", "index": -3})
    broken = to_json(OBJECTS[3])
    broken["values"]["__array__"] = "object"
    with pytest.raises(CorruptError, match="object"):
        from_json(Firings, broken)
    broken["values"]["__array__"] = "float32"
    broken["values"]["data"] = "!!"
    with pytest.raises(CorruptError, match="no array"):
        from_json(Firings, broken)


def test_other_objects_are_refused() -> None:
    with pytest.raises(InputError, match="no boundary type"):
        to_json(object())
