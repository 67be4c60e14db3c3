from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.coders import kernels
from exegete.coders.kernels import Part

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(kind: str, n: int, width: int, seed: int) -> torch.Tensor:
    """Pre-activations that are easy to get wrong: ties, zeros of both signs, hardly any positive."""
    draw = np.random.default_rng(seed)
    dense = draw.standard_normal((n, width)).astype(np.float32)
    made = {
        "normal": dense,
        "relu": np.maximum(dense, 0),
        "few": np.where(draw.random((n, width)) < 3 / width, np.abs(dense), 0),
        "ties": draw.integers(-2, 3, (n, width)).astype(np.float32),
        "constant": np.ones((n, width), np.float32),
        "zeros": np.where(draw.random((n, width)) < 0.5, np.float32(-0.0), np.float32(0.0)),
        "negative": -np.abs(dense),
        "one block": np.where(np.arange(width) // 32 == width // 64, np.abs(dense) + 5, dense),
        "sorted": np.sort(dense, axis=1),
    }
    return torch.from_numpy(np.ascontiguousarray(made[kind].astype(np.float32)))


KINDS = ("normal", "relu", "few", "ties", "constant", "zeros", "negative", "one block", "sorted")


def check_largest(pre: torch.Tensor, k: int) -> None:
    before = pre.clone()
    found = kernels.largest(pre, k)
    assert found.counts is None
    assert found.indices.shape == found.values.shape == (len(pre), k)
    assert torch.equal(found.values, before.topk(k, dim=-1).values)
    assert int(found.indices.min()) >= 0
    assert int(found.indices.max()) < pre.shape[1]
    assert torch.equal(before.gather(1, found.indices), found.values)
    assert all(len(set(row)) == k for row in found.indices.tolist())


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 3),
    width=st.sampled_from([8192, 8193, 8224, 10_000, 16_384]),
    k=st.sampled_from([1, 2, 31, 32, 33, 64]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_largest_of_wide_rows(kind: str, n: int, width: int, k: int, seed: int, dtype: torch.dtype) -> None:
    check_largest(drawn(kind, n, width, seed).to(dtype), k)


@given(kind=st.sampled_from(KINDS), width=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_largest_of_narrow_rows(kind: str, width: int, share: float, seed: int) -> None:
    check_largest(drawn(kind, 2, width, seed), max(1, round(share * width)))


@pytest.mark.parametrize("width", [8192, 8224, 8160, 8200])
def test_blocks_are_taken_where_they_pay(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows of at least 8192 in whole blocks, for k up to an eighth of the blocks: there and just beyond."""
    most = width // 32 // 8
    sizes: list[int] = []
    plain = torch.Tensor.topk

    def watched(self: torch.Tensor, k: int, **options: Any) -> Any:
        sizes.append(self.shape[1])
        return plain(self, k, **options)

    dense = drawn("ties", 2, width, 3)
    monkeypatch.setattr(torch.Tensor, "topk", watched)
    for k, blockwise in ((most, width in (8192, 8224)), (most + 1, False)):
        sizes.clear()
        kernels.largest(dense, k)
        assert sizes == ([width // 32, k * 32] if blockwise else [width])
    monkeypatch.undo()
    check_largest(dense, most)
    check_largest(dense, most + 1)


def test_largest_of_rows_that_are_no_copy() -> None:
    whole = drawn("normal", 6, 8192, 0)
    check_largest(whole[::2], 5)
    check_largest(whole.T.contiguous().T, 5)
    assert kernels.largest(whole[:0], 5).indices.shape == (0, 5)


@given(kind=st.sampled_from(KINDS), n=st.integers(0, 4), groups=st.integers(1, 9), size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_largest_of_groups(kind: str, n: int, groups: int, size: int) -> None:
    dense = drawn(kind, n, groups * size, groups)
    found = kernels.largest_of_groups(dense, groups)
    assert found.indices.shape == found.values.shape == (n, groups)
    for row, indices, values in zip(dense.tolist(), found.indices.tolist(), found.values.tolist(), strict=True):
        for g, (index, value) in enumerate(zip(indices, values, strict=True)):
            assert index // size == g
            assert value == row[index] == max(row[g * size : (g + 1) * size])


def check_ragged(found: Part, keep: torch.Tensor, values: torch.Tensor) -> None:
    rows, columns = keep.nonzero(as_tuple=True)
    assert found.counts is not None
    assert found.counts.tolist() == keep.sum(dim=1).tolist()
    assert torch.equal(found.indices, columns)
    assert torch.equal(found.values, values[rows, columns])
    assert found.indices.dtype == torch.int64


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 4),
    width=st.integers(1, 50),
    per_latent=st.booleans(),
    bound=st.floats(-2, 2, width=32),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_above(kind: str, n: int, width: int, per_latent: bool, bound: float, dtype: torch.dtype, seed: int) -> None:
    pre = drawn(kind, n, width, seed).to(dtype)
    threshold = (drawn("ties", 1, width, seed + 1)[0] * bound).to(dtype) if per_latent else bound
    keep = (pre > threshold) & (pre > 0)
    check_ragged(kernels.above(pre, threshold), keep, pre)


@given(n=st.integers(0, 4), width=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_where(n: int, width: int, share: float, seed: int) -> None:
    keep = torch.from_numpy(np.random.default_rng(seed).random((n, width)) < share)
    values = drawn("normal", n, width, seed)
    check_ragged(kernels.where(keep, values), keep, values)
    if n:
        check_ragged(kernels.where(keep.T.contiguous().T, values.T.contiguous().T), keep, values)


def test_what_no_comparison_keeps_is_noticed() -> None:
    found = kernels.above(torch.tensor([[float("nan"), -1.0, 1.0, -float("inf"), float("inf")]]), 0.5)
    assert found.indices.tolist() == [0, 2, 4]
    assert not bool(torch.isfinite(found.values).all())


def test_rows_at_once() -> None:
    """On a GPU 128 rows of a wide coder would leave it idle."""
    for width, on_cpu, on_gpu in ((131_072, 512, 2048), (1 << 20, 64, 256), (16, 1 << 16, 1 << 24), (1 << 30, 1, 1)):
        assert kernels.rows_at_once(width, torch.device("cpu")) == on_cpu
        assert kernels.rows_at_once(width, torch.device("cuda", 1)) == on_gpu
    assert kernels.rows_at_once(2048, torch.device("cpu")) == 512


def test_joined() -> None:
    pre = drawn("normal", 7, 20, 0)
    whole = kernels.above(pre, 0.0)
    parts = kernels.joined([kernels.above(part, 0.0) for part in torch.split(pre, 3)])
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True) if a is not None and b is not None)
    rectangular = kernels.joined([kernels.largest(part, 4) for part in torch.split(pre, 3)])
    assert rectangular.counts is None
    assert torch.equal(rectangular.values, pre.topk(4).values)
    assert kernels.joined([whole]) is whole
