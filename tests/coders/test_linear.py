from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.coders import kernels
from exegete.coders.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from exegete.coders.baselines import random_coder
from exegete.coders.kernels import Part
from exegete.coders.linear import LinearCoder
from exegete.coders.quality import fvu_and_l0
from exegete.errors import InputError, MismatchError
from exegete.testing import toy_weights
from exegete.types import SparseCode

Row = list[float]


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def activation(kind: str, width: int = 12, k: int = 3, seed: int = 0) -> Activation:
    made_as: dict[str, Callable[[], Activation]] = {
        "topk": lambda: TopK(k),
        "groupmax": lambda: GroupMax(k),
        "relu": ReLU,
        "jumprelu": lambda: JumpReLU(numbers(width, seed=seed + 50, scale=0.5)),
        "gated": lambda: Gated(
            gate_bias=numbers(width, seed=seed + 51, scale=0.5),
            scale=numbers(width, seed=seed + 52).exp(),
            magnitude_bias=numbers(width, seed=seed + 53, scale=0.5),
        ),
    }
    return made_as[kind]()


KINDS = ("topk", "groupmax", "relu", "jumprelu", "gated")


def made(
    *,
    d: int = 6,
    d_out: int | None = None,
    width: int = 12,
    k: int = 3,
    seed: int = 0,
    skip: bool = False,
    transcode: bool = False,
    kind: str = "topk",
    **options: Any,
) -> LinearCoder:
    """A coder as sparsify makes them: a transcoder reads the input and subtracts no bias."""
    weights = toy_weights(d, width, stream_of=(seed, "x"), skip=skip)
    hookpoint = options.pop("hookpoint", "layers.1")
    if transcode:
        options = {"side": "input", "target": (hookpoint, "output"), **options}
    if d_out is not None:
        weights["W_dec"], weights["b_dec"] = numbers(width, d_out, seed=seed), numbers(d_out, seed=seed + 1)
        if skip:
            weights["W_skip"] = numbers(d_out, d, seed=seed + 2)
    fields: dict[str, Any] = {
        "name": "c",
        "hookpoint": hookpoint,
        "encoder": weights["encoder.weight"],
        "encoder_bias": weights["encoder.bias"],
        "decoder": weights["W_dec"],
        "decoder_bias": weights["b_dec"],
        "activation": activation(kind, width, k, seed),
        "skip": weights.get("W_skip"),
        "subtract_decoder_bias": not transcode,
    }
    return LinearCoder(**{**fields, **options})


def inputs(n: int, d: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


def slow_norm(coder: LinearCoder, row: Row) -> tuple[Row, float, float]:
    """The normed input, and what undoes the norm: scale and shift."""
    mean = sum(row) / len(row)
    if coder.input_norm == "layer_norm":
        std = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        return [(v - mean) / (std + 1e-5) for v in row], std, mean
    if coder.input_norm == "constant_norm":
        scale = math.sqrt(sum(v * v for v in row) / len(row))
        return [v / scale for v in row], scale, 0.0
    if coder.input_norm == "rms_norm":
        square = sum(v * v for v in row) / len(row)
        return [v / math.sqrt(square + coder.norm_epsilon) for v in row], 1.0, 0.0
    return row, 1.0, 0.0


def slow_pre(coder: LinearCoder, row: Row) -> Row:
    read = slow_norm(coder, row)[0]
    if coder.subtract_decoder_bias:
        read = [v - b for v, b in zip(read, coder.decoder_bias.tolist(), strict=True)]
    weights, biases = coder.encoder.tolist(), coder.encoder_bias.tolist()
    return [sum(w * v for w, v in zip(ws, read, strict=True)) + b for ws, b in zip(weights, biases, strict=True)]


def slow_code(coder: LinearCoder, x: torch.Tensor) -> list[tuple[dict[int, float], set[int]]]:
    """Of every input latent to value, and the latents too near the edge of firing for single precision."""
    return [slow_firing(coder.activation, slow_pre(coder, row)) for row in x.tolist()]


def slow_firing(rule: Activation, pre: Row) -> tuple[dict[int, float], set[int]]:
    """One number at a time, in double precision."""
    everything = range(len(pre))
    value, margin = dict(enumerate(pre)), dict(enumerate(pre))
    if isinstance(rule, TopK):
        order = sorted(everything, key=lambda i: -pre[i])
        others = {i: pre[order[rule.count]] if len(pre) > rule.count else -1.0 for i in order[: rule.count]}
        others |= dict.fromkeys(order[rule.count :], pre[order[rule.count - 1]])
        margin = {i: min(pre[i], pre[i] - others[i]) for i in everything}
    elif isinstance(rule, GroupMax):
        size = len(pre) // rule.count
        for i in everything:
            group = [j for j in everything if j // size == i // size and j != i]
            margin[i] = min(pre[i], pre[i] - max((pre[j] for j in group), default=-1.0))
    elif isinstance(rule, JumpReLU):
        margin = {i: min(pre[i], pre[i] - t) for i, t in enumerate(rule.threshold.tolist())}
    elif isinstance(rule, Gated):
        for i, (gate, scale, bias) in enumerate(
            zip(rule.gate_bias.tolist(), rule.scale.tolist(), rule.magnitude_bias.tolist(), strict=True)
        ):
            value[i] = pre[i] * scale + bias
            margin[i] = min(pre[i] + gate, value[i])
    return {i: value[i] for i in everything if margin[i] > 0}, {i for i in everything if abs(margin[i]) < 1e-4}


def slow_decode(coder: LinearCoder, firing: dict[int, float], row: Row) -> Row:
    normed, scale, shift = slow_norm(coder, row)
    decoder, bias = coder.decoder.tolist(), coder.decoder_bias.tolist()
    y = [(sum(v * decoder[i][j] for i, v in firing.items()) + bias[j]) * scale + shift for j in range(coder.d_out)]
    if coder.skip is not None:
        read = normed if coder.input_norm == "rms_norm" else row
        y = [
            v + sum(w * r for w, r in zip(ws, read, strict=True)) for v, ws in zip(y, coder.skip.tolist(), strict=True)
        ]
    return y


def as_rows(code: SparseCode) -> list[dict[int, float]]:
    indices, values = code.indices.tolist(), code.values.tolist()
    if code.offsets is not None:
        cuts = list(zip(code.offsets.tolist(), code.offsets.tolist()[1:], strict=False))
        indices, values = ([flat[a:b] for a, b in cuts] for flat in (indices, values))
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(indices, values, strict=True)]
    assert all(len({i for i, _ in row}) == len(row) for row in pairs)
    return [{i: v for i, v in row if v != 0} for row in pairs]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 9),
    kind=st.sampled_from(KINDS),
    transcode=st.booleans(),
    skip=st.booleans(),
    k=st.sampled_from([1, 2, 3, 12]),
    input_norm=st.sampled_from(["none", "layer_norm", "constant_norm", "rms_norm"]),
    subtract=st.booleans(),
    d_out=st.sampled_from([None, 4, 9]),
)
@settings(max_examples=120, deadline=None)
def test_encode_and_decode_against_one_number_at_a_time(
    seed: int,
    n: int,
    kind: str,
    transcode: bool,
    skip: bool,
    k: int,
    input_norm: Any,
    subtract: bool,
    d_out: int | None,
) -> None:
    transcode, subtract = transcode or d_out is not None, subtract and d_out is None
    coder = made(
        seed=seed,
        kind=kind,
        transcode=transcode,
        skip=skip,
        k=k,
        d_out=d_out,
        input_norm=input_norm,
        subtract_decoder_bias=subtract,
    )
    x = inputs(n, seed=seed + 1)
    code = coder.encode(x)
    assert code.width == 12
    if kind in ("topk", "groupmax"):
        assert code.indices.shape == code.values.shape == (n, k)
        assert code.offsets is None
        assert coder.k == k
    else:
        assert code.offsets is not None
        assert code.offsets.tolist()[0] == 0
        assert len(code.offsets) == n + 1
        assert int(code.offsets[-1]) == len(code.indices) == len(code.values)
        assert coder.k is None
    y = coder.decode(code, x)
    assert y.shape == (n, coder.d_out)
    for have, (want, near) in zip(as_rows(code), slow_code(coder, x), strict=True):
        assert have.keys() - near == want.keys() - near
        assert all(abs(have[i] - want[i]) < 1e-5 * max(1, abs(want[i])) for i in want.keys() & have.keys())
        assert all(v > 0 for v in have.values())
    for row, have, out in zip(x.tolist(), as_rows(code), y.tolist(), strict=True):
        assert out == pytest.approx(slow_decode(coder, have, row), rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    coder, x = made(kind=kind), inputs(11)
    whole = coder.encode(x)
    monkeypatch.setattr(kernels, "rows_at_once", lambda *_: 2)
    sizes: list[int] = []
    plain = LinearCoder._encode

    def counted(self: LinearCoder, part: torch.Tensor) -> Part:
        sizes.append(len(part))
        return plain(self, part)

    monkeypatch.setattr(LinearCoder, "_encode", counted)
    parts = coder.encode(x)
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert torch.equal(parts.indices, whole.indices)
    torch.testing.assert_close(parts.values, whole.values)
    assert (parts.offsets is None) == (whole.offsets is None)
    if parts.offsets is not None and whole.offsets is not None:
        assert torch.equal(parts.offsets, whole.offsets)


def test_the_device_decides_how_many_rows_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coder, x = made(), inputs(7)
    whole = coder.encode(x)
    asked: list[tuple[int, str]] = []

    def rows(width: int, device: torch.device) -> int:
        asked.append((width, device.type))
        return 3

    monkeypatch.setattr(kernels, "rows_at_once", rows)
    assert torch.equal(coder.encode(x).indices, whole.indices)
    assert asked == [(coder.width, "cpu")]


def flat_coder(width: int, d: int, rule: Activation, weight: float = 1.0) -> LinearCoder:
    return LinearCoder(
        name="c",
        hookpoint="layers.1",
        encoder=torch.full((width, d), weight),
        encoder_bias=torch.zeros(width),
        decoder=torch.ones(width, d),
        decoder_bias=torch.zeros(d),
        activation=rule,
    )


def test_ties_give_k_different_latents_every_time() -> None:
    for width in (8, 8192):
        coder = flat_coder(width, 2, TopK(3))
        first, second = coder.encode(torch.ones(4, 2)), coder.encode(torch.ones(4, 2))
        assert torch.equal(first.indices, second.indices)
        assert all(len(set(row)) == 3 for row in first.indices.tolist())
        assert first.values.tolist() == [[2.0] * 3] * 4
        assert coder.encode(-torch.ones(1, 2)).values.tolist() == [[0.0] * 3]


def test_the_edges_of_firing() -> None:
    """At the threshold nothing fires; a negative threshold is no licence to fire below zero."""
    coder = flat_coder(4, 1, JumpReLU(torch.tensor([2.0, 1.0, -3.0, 0.0])))
    assert as_rows(coder.encode(torch.tensor([[2.0], [0.0], [-1.0], [0.5]]))) == [
        {1: 2.0, 2: 2.0, 3: 2.0},
        {},
        {},
        {2: 0.5, 3: 0.5},
    ]
    gate = Gated(torch.tensor([-1.0, 5.0]), torch.tensor([2.0, 1.0]), torch.tensor([0.5, -3.0]))
    gated = flat_coder(2, 1, gate)
    # u = 1: the first gate is at 0, closed; the second open, its magnitude −2. u = 4: both, 8.5 and 1.
    assert as_rows(gated.encode(torch.tensor([[1.0], [4.0]]))) == [{}, {0: 8.5, 1: 1.0}]
    assert as_rows(flat_coder(2, 1, ReLU()).encode(torch.tensor([[0.0], [-0.0], [1.0]]))) == [{}, {}, {0: 1.0, 1: 1.0}]


def test_nothing_fires() -> None:
    for rule in (ReLU(), JumpReLU(torch.ones(4)), TopK(2)):
        coder = flat_coder(4, 3, rule)
        code = coder.encode(-torch.ones(2, 3))
        assert as_rows(code) == [{}, {}]
        assert coder.decode(code).tolist() == [[0.0] * 3] * 2
        empty = coder.encode(torch.zeros(0, 3))
        assert coder.decode(empty).shape == (0, 3)
        assert as_rows(empty) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_that_are_not_finite(bad: float, kind: str, dtype: torch.dtype) -> None:
    x = inputs(3)
    x[1, 2] = bad
    with pytest.raises(InputError, match=r"output of 'layers\.1' holds NaN or infinity"):
        made(kind=kind).encode(x.to(dtype))
    both = inputs(3)
    both[0, 0], both[2, 1] = float("inf"), -float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        made(kind=kind).encode(both.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_inputs_are_finite(dtype: torch.dtype) -> None:
    """The sum of an input may overflow where none of its numbers does."""
    coder = made(encoder=torch.zeros(12, 6), kind="relu")
    x = torch.full((4, 6), torch.finfo(dtype).max, dtype=dtype)
    coder._require_input(x)
    coder._require_input(-x)
    coder._require_input(x[:0])
    coder._require_input(torch.ones(2, 6, dtype=torch.int64))


def test_overflow_is_no_activation() -> None:
    coder = made().to("cpu", torch.float16)
    with pytest.raises(InputError, match=r"overflows torch\.float16"):
        coder.encode(inputs(2) * 60_000)


@pytest.mark.parametrize("kind", KINDS)
def test_overflow_to_nan_is_noticed(kind: str) -> None:
    """Infinities of both signs cancel to NaN, which no comparison keeps."""
    coder = made(kind=kind, d=2).to("cpu", torch.float16)
    coder = coder._replace(encoder=torch.tensor([[1.0, 1.0]] * 12).half(), decoder_bias=torch.zeros(2).half())
    with pytest.raises(InputError, match=r"'c' at 'layers\.1' overflows torch\.float16"):
        coder.encode(torch.tensor([[1e5, -1e5]]))


def test_a_long_input_in_half_precision() -> None:
    """The length of an input of 60 000s overflows float16; its normed form is all ones."""
    coder = made(kind="relu", input_norm="constant_norm", subtract_decoder_bias=False).to("cpu", torch.float16)
    assert as_rows(coder.encode(torch.full((1, 6), 60_000.0))) == as_rows(coder.encode(torch.ones(1, 6)))


def test_an_input_of_zeros_has_no_direction() -> None:
    for norm in ("constant_norm", "layer_norm"):
        coder = made(input_norm=norm, kind="relu", subtract_decoder_bias=False, skip=True)
        x = torch.zeros(1, 6)
        code = coder.encode(x)
        assert as_rows(code) == [
            {i: pytest.approx(b) for i, b in enumerate(coder.encoder_bias.tolist()) if b > 0}  # what a bias alone gives
        ]
        assert coder.decode(code, x).tolist() == [[0.0] * 6]


def test_norms_are_undone() -> None:
    """A coder that copies its input copies it whatever the norm, up to the 1e-5 that layer norm adds and loses."""
    eye = torch.eye(6)
    for norm in ("none", "constant_norm", "layer_norm"):
        coder = made(
            encoder=torch.cat([eye, -eye]), encoder_bias=torch.zeros(12), decoder=torch.cat([eye, -eye]), kind="relu"
        )._replace(input_norm=norm, decoder_bias=torch.zeros(6))
        x = inputs(5) * 30 + 7
        torch.testing.assert_close(coder.decode(coder.encode(x), x), x, rtol=1e-4, atol=1e-3)


def test_shapes_that_do_not_fit() -> None:
    coder = made()
    with pytest.raises(MismatchError, match=r"reads \[n, 6\], got \[2, 5\]"):
        coder.encode(inputs(2, 5))
    with pytest.raises(MismatchError, match=r"got \[6\]"):
        coder.encode(inputs(1)[0])
    with pytest.raises(MismatchError, match="has 12 latents, the code 13"):
        coder.decode(SparseCode(indices=torch.zeros(1, 1).long(), values=torch.ones(1, 1), width=13))
    skipping = made(skip=True)
    with pytest.raises(InputError, match="a skip connection; decoding needs its input"):
        skipping.decode(skipping.encode(inputs(1)))
    normed = made(input_norm="layer_norm")
    with pytest.raises(InputError, match="the input norm layer_norm; decoding needs its input"):
        normed.decode(normed.encode(inputs(1)))
    for x in (inputs(2), inputs(1, 5), inputs(1)[0]):
        with pytest.raises(MismatchError, match="decodes 1 codes, its input is"):
            skipping.decode(skipping.encode(inputs(1)), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0; it must lie between 1 and its width 12"),
        ({"k": 13}, "k = 13"),
        ({"k": -1}, "k = -1"),
        ({"k": 0, "kind": "groupmax"}, "k = 0"),
        ({"k": 13, "kind": "groupmax"}, "k = 13"),
        ({"k": 5, "kind": "groupmax"}, "does not divide its width 12"),
        ({"input_norm": "batch"}, "input norm 'batch'; allowed: none, layer_norm, constant_norm"),
        ({"activation": JumpReLU(torch.zeros(1))}, r"threshold has shape \(1,\), expected \(12,\)"),
        ({"activation": Gated(torch.zeros(12), torch.zeros(12), torch.zeros(12, 1))}, "magnitude_bias has shape"),
        ({"encoder": torch.zeros(12)}, "expected two dimensions each"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**options)


def test_tensors_that_cannot_be() -> None:
    parts: dict[str, Any] = {"encoder": (12, 6), "encoder_bias": (12,), "decoder": (12, 6), "decoder_bias": (6,)}
    for part, shape in (("encoder_bias", (11,)), ("decoder", (11, 6)), ("decoder_bias", (5,)), ("skip", (6, 5))):
        tensors: dict[str, Any] = {n: torch.zeros(s) for n, s in {**parts, part: shape}.items()}
        with pytest.raises(InputError, match=f"{part} has shape"):
            LinearCoder(name="c", hookpoint="h.1", activation=TopK(1), **tensors)
    wide: dict[str, Any] = {n: torch.zeros(s) for n, s in {**parts, "decoder": (12, 7), "decoder_bias": (7,)}.items()}
    with pytest.raises(InputError, match="only a transcoder"):
        LinearCoder(name="c", hookpoint="h.1", activation=TopK(1), **wide)
    target: Any = ("h.1", "output")
    with pytest.raises(InputError, match="only a transcoder"):
        LinearCoder(name="c", hookpoint="h.0", activation=TopK(1), target=target, subtract_decoder_bias=True, **wide)
    coder = LinearCoder(name="c", hookpoint="h.1", activation=TopK(1), side="input", target=target, **wide)
    assert (coder.d_in, coder.d_out, coder.side, coder.target) == (6, 7, "input", ("h.1", "output"))
    assert coder.architecture == "topk transcoder"
    assert coder.decode(coder.encode(inputs(2))).shape == (2, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_and_numpy_codes(kind: str) -> None:
    """One code decodes alike whether rectangular or ragged, of torch or numpy, in any order, unused slots or not."""
    coder, x = made(kind=kind), inputs(4)
    rows = as_rows(coder.encode(x))
    rows[2] = {}
    flat = [(i, v) for row in rows for i, v in reversed(row.items())]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    ragged = SparseCode(
        indices=np.array([i for i, _ in flat]),
        values=np.array([v for _, v in flat], np.float32),
        width=12,
        offsets=offsets,
    )
    padded = [[*row.items(), *[(0, 0.0)] * (12 - len(row))] for row in rows]
    same = SparseCode(
        indices=torch.tensor([[i for i, _ in row] for row in padded]),
        values=torch.tensor([[v for _, v in row] for row in padded]),
        width=12,
    )
    torch.testing.assert_close(coder.decode(ragged), coder.decode(same))
    torch.testing.assert_close(coder.decode(ragged)[2], coder.decoder_bias)
    assert int(offsets[-1]) > 0


def test_hash_follows_weights_and_settings() -> None:
    coder = made()
    others = [made(seed=1), made(k=4), made(kind="groupmax"), made(transcode=True), made(skip=True)]
    others += [made(kind=kind) for kind in ("relu", "jumprelu", "gated")]
    others += [made(subtract_decoder_bias=False), made(input_norm="layer_norm"), made(input_norm="constant_norm")]
    others += [made(input_norm="rms_norm"), made(input_norm="rms_norm", norm_epsilon=1e-5), made(width=24)]
    assert len({c.hash for c in (coder, *others)}) == len(others) + 1
    assert len(coder.hash) == 16
    same = [made(name="other"), made(hookpoint="layers.2"), made(base_model="a/b"), made(side="input")]
    same += [coder.placed(name="third", point=("h.3", "input")), made(norm_epsilon=1e-5), made().to("cpu")]
    assert {c.hash for c in same} == {coder.hash}


def test_hash_follows_every_weight() -> None:
    for kind in ("jumprelu", "gated"):
        coder = made(kind=kind, skip=True)
        seen = {coder.hash}
        for name, tensor in coder._tensors():
            other = tensor.clone()
            other.view(-1)[-1] += 1e-3
            seen.add(coder._replace(**{name: other}).hash)
        for name, tensor in coder.activation.tensors.items():
            other = tensor.clone()
            other[0] += 1e-3
            rule = coder.activation.replaced({**coder.activation.tensors, name: other})
            seen.add(coder._replace(activation=rule).hash)
        assert len(seen) == 1 + 5 + len(coder.activation.tensors)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated"])
def test_hash_survives_a_change_of_dtype(kind: str) -> None:
    coder = made(kind=kind)
    narrow = coder.to("cpu", torch.bfloat16)
    assert (narrow.dtype, narrow.device.type, narrow.hash) == (torch.bfloat16, "cpu", coder.hash)
    assert all(t.dtype == torch.bfloat16 for t in narrow.activation.tensors.values())
    fresh = made(kind=kind).to("cpu", torch.bfloat16).to("cpu", torch.float32)
    assert fresh.dtype == torch.float32
    assert fresh.hash == coder.hash
    assert made(kind=kind).to("cpu", torch.float64).hash == coder.hash
    assert made(kind=kind).to("cpu", torch.float64).to("cpu", torch.float16).hash == coder.hash
    halves = narrow._replace(content=None)
    assert halves.to("cpu", torch.float32).hash == halves.hash != coder.hash
    assert halves.to("cpu", torch.float64).hash == halves.hash
    assert halves.to("cpu", torch.float32).encode(inputs(2)).values.dtype == torch.float32
    assert halves.encode(inputs(2)).values.dtype == torch.bfloat16
    assert halves.decode(halves.encode(inputs(2))).dtype == torch.bfloat16


def test_hash_of_weights_in_several_dtypes() -> None:
    """Where a file holds some weights more exactly than others, the data type to compute in does not matter either."""
    wide = numbers(12, seed=3).double() / 3
    mixed = made(activation=JumpReLU(wide))
    assert len({mixed.to("cpu", kind).hash for kind in (torch.float32, torch.float64, torch.bfloat16)}) == 1
    assert mixed.to("cpu", torch.float32).hash == mixed.hash != made(activation=JumpReLU(wide.float())).hash


def test_placed_and_moved_coders_are_whole() -> None:
    coder = made(skip=True, transcode=True, kind="groupmax", base_model="a/b", input_norm="layer_norm")
    for other in (coder.placed(name="new"), coder.to("cpu"), coder.to("cpu", torch.float64)):
        assert (other.k, other.base_model, other.input_norm) == (3, "a/b", "layer_norm")
        assert (other.side, other.target) == ("input", ("layers.1", "output"))
        assert other.activation == GroupMax(3)
        assert other.subtract_decoder_bias is False
        assert other.skip is not None
        assert other.architecture == "groupmax skip transcoder"
        assert as_rows(other.encode(inputs(3)))[0].keys() == as_rows(coder.encode(inputs(3)))[0].keys()
    assert coder.placed(name="new").name == "new"
    assert (made().architecture, made(kind="gated", skip=True).architecture) == ("topk", "gated skip")


def test_placed() -> None:
    coder, cross = made(), made(transcode=True)
    moved = coder.placed(point=("h.3", "input"))
    assert (moved.name, moved.point, moved.target, moved.architecture) == (
        "c",
        ("h.3", "input"),
        ("h.3", "input"),
        "topk",
    )
    assert coder.placed() is not coder
    moved = cross.placed(point=("h.3", "input"))
    assert (moved.point, moved.target) == (("h.3", "input"), ("layers.1", "output"))
    moved = cross.placed(target=("h.3", "output"))
    assert (moved.point, moved.target) == (("layers.1", "input"), ("h.3", "output"))
    wide = made(transcode=True, d_out=9)
    assert wide.placed(point=("h.3", "input"), target=("h.3", "output")).d_out == 9
    with pytest.raises(InputError, match="only a transcoder"):
        wide.placed(point=("h.3", "input"), target=("h.3", "input"))


def test_decoder_rows() -> None:
    coder = made()
    assert torch.equal(coder.decoder_rows(torch.tensor([3, 0])), coder.decoder[[3, 0]])


def test_fvu_and_l0() -> None:
    coder = LinearCoder(
        name="c",
        hookpoint="layers.1",
        encoder=torch.eye(2),
        encoder_bias=torch.zeros(2),
        decoder=torch.eye(2),
        decoder_bias=torch.zeros(2),
        activation=TopK(1),
    )
    x = torch.tensor([[3.0, 1.0], [0.0, 2.0], [-1.0, -3.0]])
    # Reconstructions (3, 0), (0, 2), (0, 0); error 1 + 0 + 10; mean (2/3, 0); variance (49 + 4 + 25) / 9 + 14.
    fvu, l0 = fvu_and_l0(coder, x)
    assert fvu == pytest.approx(11 / (78 / 9 + 14))
    assert l0 == pytest.approx(2 / 3)
    target = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    fvu, l0 = fvu_and_l0(coder, x, target)
    assert fvu == 0.0
    assert l0 == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="does not vary"):
        fvu_and_l0(coder, x[:1])
    with pytest.raises(MismatchError, match=r"predicts \[3, 2\], the target is \[3, 1\]"):
        fvu_and_l0(coder, x, target[:, :1])
    with pytest.raises(InputError, match="give it as target"):
        fvu_and_l0(made(transcode=True), inputs(4))
    across = made(target=("layers.1.mlp", "output"))
    with pytest.raises(InputError, match=r"predicts the output of 'layers\.1\.mlp'; give it as target"):
        fvu_and_l0(across, inputs(4))
    inside = made(side="input")  # reads a module's input and reconstructs it
    assert fvu_and_l0(inside, inputs(4)) == fvu_and_l0(made(), inputs(4))
    ragged = made(kind="relu")
    fires = sum(len(row) for row in as_rows(ragged.encode(inputs(4)))) / 4
    assert fvu_and_l0(ragged, inputs(4))[1] == pytest.approx(fires)
    skipping = made(transcode=True, skip=True)
    perfect = skipping.decode(skipping.encode(inputs(4)), inputs(4))
    assert fvu_and_l0(skipping, inputs(4), perfect)[0] == pytest.approx(0.0, abs=1e-9)


def test_random_coder() -> None:
    like = made(d=6, width=300)
    null = random_coder(like, 7)
    assert (null.name, null.hookpoint, null.side) == ("c@random-coder", "layers.1", "output")
    assert (null.d_in, null.width, null.k, null.activation) == (6, 300, 3, TopK(3))
    torch.testing.assert_close(null.encoder.norm(dim=1), torch.ones(300))
    assert torch.equal(null.decoder, null.encoder)
    assert torch.equal(null.encoder_bias, torch.zeros(300))
    assert torch.equal(null.decoder_bias, like.decoder_bias)
    assert null.encoder.mean(dim=0).abs().max() < 0.12  # no direction is preferred
    second_moment = null.encoder.T @ null.encoder / 300
    assert (second_moment - torch.eye(6) / 6).abs().max() < 0.06
    assert torch.equal(random_coder(like, 7, name="n").encoder, null.encoder)
    assert random_coder(like, 7, name="n").name == "n"
    assert len({null.hash, random_coder(like, 8).hash, random_coder(made(width=300, hookpoint="h.2"), 7).hash}) == 3


def test_random_transcoder_and_dtype() -> None:
    like = made(transcode=True, skip=True).to("cpu", torch.bfloat16)
    null = random_coder(like, 0)
    assert (null.side, null.skip, null.dtype) == ("input", None, torch.bfloat16)
    wide = LinearCoder(
        name="w",
        hookpoint="h.1",
        encoder=torch.zeros(12, 6),
        encoder_bias=torch.zeros(12),
        decoder=torch.zeros(12, 7),
        decoder_bias=torch.zeros(7),
        activation=TopK(2),
        side="input",
        target=("h.1", "output"),
    )
    other = random_coder(wide, 0)
    assert other.decoder.shape == (12, 7)
    torch.testing.assert_close(other.decoder.norm(dim=1), torch.ones(12))


def test_random_coder_needs_k() -> None:
    with pytest.raises(InputError, match="no fixed k"):
        random_coder(made(kind="relu"), 0)
