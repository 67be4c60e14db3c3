from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.coders import topk
from exegete.coders.baselines import random_coder
from exegete.coders.quality import fvu_and_l0
from exegete.coders.topk import TopKCoder
from exegete.errors import InputError, MismatchError
from exegete.testing import toy_weights
from exegete.types import SparseCode


def made(*, d: int = 6, width: int = 12, k: int = 3, seed: int = 0, skip: bool = False, **options: Any) -> TopKCoder:
    weights = toy_weights(d, width, stream_of=(seed, "x"), skip=skip)
    return TopKCoder(
        name=options.pop("name", "c"),
        hookpoint=options.pop("hookpoint", "layers.1"),
        encoder=weights["encoder.weight"],
        encoder_bias=weights["encoder.bias"],
        decoder=weights["W_dec"],
        decoder_bias=weights["b_dec"],
        k=k,
        skip=weights.get("W_skip"),
        **options,
    )


def inputs(n: int, d: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


def slow_code(coder: TopKCoder, x: torch.Tensor) -> list[dict[int, float]]:
    """Latent to value of every input, one number at a time in double precision."""
    rows = []
    for row in x.double().numpy():
        read = row if coder.transcode else row - coder.decoder_bias.double().numpy()
        dense = coder.encoder.double().numpy() @ read + coder.encoder_bias.double().numpy()
        if coder.activation == "groupmax":
            size = coder.width // coder.top
            chosen = [g * size + int(dense[g * size : (g + 1) * size].argmax()) for g in range(coder.top)]
        else:
            chosen = sorted(range(coder.width), key=lambda i: -dense[i])[: coder.top]
        rows.append({i: float(dense[i]) for i in chosen if dense[i] > 0})
    return rows


def as_rows(code: SparseCode) -> list[dict[int, float]]:
    pairs = (zip(i, v, strict=True) for i, v in zip(code.indices.tolist(), code.values.tolist(), strict=True))
    return [{i: v for i, v in row if v != 0} for row in pairs]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 9),
    activation=st.sampled_from(["topk", "groupmax"]),
    transcode=st.booleans(),
    skip=st.booleans(),
    k=st.sampled_from([1, 2, 3, 12]),
)
@settings(max_examples=60, deadline=None)
def test_encode_and_decode_against_one_number_at_a_time(
    seed: int, n: int, activation: Any, transcode: bool, skip: bool, k: int
) -> None:
    coder = made(seed=seed, activation=activation, transcode=transcode, skip=skip, k=k)
    x = inputs(n, seed=seed + 1)
    code = coder.encode(x)
    assert code.indices.shape == code.values.shape == (n, k)
    assert code.width == 12
    expected = slow_code(coder, x)
    y = coder.decode(code, x)
    assert y.shape == (n, 6)
    for row, (have, want) in enumerate(zip(as_rows(code), expected, strict=True)):
        assert have.keys() == want.keys()
        assert all(abs(have[i] - want[i]) < 1e-5 for i in want)
        whole = coder.decoder_bias + sum(want[i] * coder.decoder[i] for i in want)
        if coder.skip is not None:
            whole = whole + coder.skip @ x[row]
        torch.testing.assert_close(y[row], whole.float(), rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    coder, x = made(), inputs(11)
    whole = coder.encode(x)
    monkeypatch.setattr(topk, "_CHUNK_ELEMENTS", 2 * coder.width)
    sizes: list[int] = []
    plain = TopKCoder._encode

    def counted(self: TopKCoder, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(part))
        return plain(self, part)

    monkeypatch.setattr(TopKCoder, "_encode", counted)
    parts = coder.encode(x)
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert torch.equal(parts.indices, whole.indices)
    torch.testing.assert_close(parts.values, whole.values)


def test_ties_give_k_different_latents_every_time() -> None:
    coder = TopKCoder(
        name="c",
        hookpoint="layers.1",
        encoder=torch.ones(8, 2),
        encoder_bias=torch.zeros(8),
        decoder=torch.ones(8, 2),
        decoder_bias=torch.zeros(2),
        k=3,
    )
    first, second = coder.encode(torch.ones(4, 2)), coder.encode(torch.ones(4, 2))
    assert torch.equal(first.indices, second.indices)
    assert all(len(set(row)) == 3 for row in first.indices.tolist())
    assert first.values.tolist() == [[2.0] * 3] * 4
    assert coder.encode(-torch.ones(1, 2)).values.tolist() == [[0.0] * 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite(bad: float) -> None:
    x = inputs(3)
    x[1, 2] = bad
    with pytest.raises(InputError, match=r"output of 'layers\.1' holds NaN or infinity"):
        made().encode(x)


def test_overflow_is_no_activation() -> None:
    coder = made().to("cpu", torch.float16)
    with pytest.raises(InputError, match=r"overflows torch\.float16"):
        coder.encode(inputs(2) * 60_000)


def test_shapes_that_do_not_fit() -> None:
    coder = made()
    with pytest.raises(MismatchError, match=r"reads \[n, 6\], got \[2, 5\]"):
        coder.encode(inputs(2, 5))
    with pytest.raises(MismatchError, match=r"got \[6\]"):
        coder.encode(inputs(1)[0])
    with pytest.raises(MismatchError, match="has 12 latents, the code 13"):
        coder.decode(SparseCode(indices=torch.zeros(1, 1).long(), values=torch.ones(1, 1), width=13))
    skipping = made(skip=True)
    with pytest.raises(InputError, match="decoding needs its input"):
        skipping.decode(skipping.encode(inputs(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0; it must lie between 1 and its width 12"),
        ({"k": 13}, "k = 13"),
        ({"k": 5, "activation": "groupmax"}, "does not divide its width 12"),
        ({"activation": "relu"}, "activation 'relu'; allowed: topk, groupmax"),
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
            TopKCoder(name="c", hookpoint="h.1", k=1, **tensors)
    wide: dict[str, Any] = {n: torch.zeros(s) for n, s in {**parts, "decoder": (12, 7), "decoder_bias": (7,)}.items()}
    with pytest.raises(InputError, match="only a transcoder"):
        TopKCoder(name="c", hookpoint="h.1", k=1, **wide)
    coder = TopKCoder(name="c", hookpoint="h.1", k=1, transcode=True, **wide)
    assert (coder.d_in, coder.d_out, coder.side) == (6, 7, "input")
    assert coder.decode(coder.encode(inputs(2))).shape == (2, 7)


def test_ragged_and_numpy_codes() -> None:
    coder, x = made(), inputs(4)
    code = coder.encode(x)
    keep = code.values > code.values.median()
    offsets = np.concatenate([[0], keep.sum(1).cumsum(0).numpy()])
    ragged = SparseCode(indices=code.indices[keep].numpy(), values=code.values[keep].numpy(), width=12, offsets=offsets)
    same = SparseCode(indices=code.indices, values=code.values * keep, width=12)
    torch.testing.assert_close(coder.decode(ragged), coder.decode(same))
    assert int(offsets[-1]) == int(keep.sum()) > 0


def test_hash_follows_weights_settings_and_place() -> None:
    coder = made()
    others = [made(seed=1), made(k=4), made(activation="groupmax"), made(transcode=True), made(skip=True)]
    others += [made(hookpoint="layers.2")]
    assert len({c.hash for c in (coder, *others)}) == 7
    assert coder.hash == made(name="other").hash == coder.renamed("third").hash
    assert len(coder.hash) == 16


def test_hash_survives_a_change_of_dtype() -> None:
    coder = made()
    narrow = coder.to("cpu", torch.bfloat16)
    assert (narrow.dtype, narrow.device.type, narrow.hash) == (torch.bfloat16, "cpu", coder.hash)
    fresh = made().to("cpu", torch.bfloat16).to("cpu", torch.float32)
    assert fresh.dtype == torch.float32
    assert fresh.hash == coder.hash
    halves = TopKCoder(
        name="c",
        hookpoint="layers.1",
        encoder=narrow.encoder,
        encoder_bias=narrow.encoder_bias,
        decoder=narrow.decoder,
        decoder_bias=narrow.decoder_bias,
        k=3,
    )
    assert halves.to("cpu", torch.float32).hash == halves.hash != coder.hash
    assert halves.to("cpu", torch.float32).encode(inputs(2)).values.dtype == torch.float32
    assert halves.encode(inputs(2)).values.dtype == torch.bfloat16


def test_renamed_and_moved_coders_are_whole() -> None:
    coder = made(skip=True, transcode=True, activation="groupmax", base_model="a/b")
    for other in (coder.renamed("new"), coder.to("cpu"), coder.to("cpu", torch.float64)):
        assert (other.k, other.activation, other.transcode, other.base_model) == (3, "groupmax", True, "a/b")
        assert other.skip is not None
        assert as_rows(other.encode(inputs(3)))[0].keys() == as_rows(coder.encode(inputs(3)))[0].keys()
    assert coder.renamed("new").name == "new"


def test_decoder_rows() -> None:
    coder = made()
    assert torch.equal(coder.decoder_rows(torch.tensor([3, 0])), coder.decoder[[3, 0]])


def test_fvu_and_l0() -> None:
    coder = TopKCoder(
        name="c",
        hookpoint="layers.1",
        encoder=torch.eye(2),
        encoder_bias=torch.zeros(2),
        decoder=torch.eye(2),
        decoder_bias=torch.zeros(2),
        k=1,
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
    skipping = made(transcode=True, skip=True)
    perfect = skipping.decode(skipping.encode(inputs(4)), inputs(4))
    assert fvu_and_l0(skipping, inputs(4), perfect)[0] == pytest.approx(0.0, abs=1e-9)


def test_random_coder() -> None:
    like = made(d=6, width=300)
    null = random_coder(like, 7)
    assert (null.name, null.hookpoint, null.side) == ("c@random-coder", "layers.1", "output")
    assert (null.d_in, null.width, null.k, null.activation) == (6, 300, 3, "topk")
    torch.testing.assert_close(null.encoder.norm(dim=1), torch.ones(300))
    assert torch.equal(null.decoder, null.encoder)
    assert torch.equal(null.encoder_bias, torch.zeros(300))
    assert torch.equal(null.decoder_bias, like.decoder_bias)
    assert null.encoder.mean(dim=0).abs().max() < 0.12  # no direction is preferred
    second_moment = null.encoder.T @ null.encoder / 300
    assert (second_moment - torch.eye(6) / 6).abs().max() < 0.06
    assert torch.equal(random_coder(like, 7, "n").encoder, null.encoder)
    assert random_coder(like, 7, "n").name == "n"
    assert len({null.hash, random_coder(like, 8).hash, random_coder(made(width=300, hookpoint="h.2"), 7).hash}) == 3


def test_random_transcoder_and_dtype() -> None:
    like = made(transcode=True, skip=True).to("cpu", torch.bfloat16)
    null = random_coder(like, 0)
    assert (null.side, null.skip, null.dtype) == ("input", None, torch.bfloat16)
    wide = TopKCoder(
        name="w",
        hookpoint="h.1",
        encoder=torch.zeros(12, 6),
        encoder_bias=torch.zeros(12),
        decoder=torch.zeros(12, 7),
        decoder_bias=torch.zeros(7),
        k=2,
        transcode=True,
    )
    other = random_coder(wide, 0)
    assert other.decoder.shape == (12, 7)
    torch.testing.assert_close(other.decoder.norm(dim=1), torch.ones(12))


def test_random_coder_needs_k() -> None:
    like = made()
    like.k = None
    with pytest.raises(InputError, match="no fixed k"):
        random_coder(like, 0)
