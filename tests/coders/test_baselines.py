from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders.activations import Activation, Gated, JumpReLU, ReLU, TopK
from exegete.coders.baselines import ARCHITECTURES, random_coder, threshold_for, untrained_coder
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder
from exegete.errors import InputError
from exegete.streams import stream


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def made(activation: Activation | None = None, d: int = 6, width: int = 300, **changes: Any) -> LinearCoder:
    given: dict[str, Any] = {
        "name": "c",
        "hookpoint": "layers.1",
        "encoder": normal(width, d),
        "encoder_bias": normal(width),
        "decoder": normal(width, d, seed=1),
        "decoder_bias": normal(d),
        "activation": activation or TopK(3),
        "subtract_decoder_bias": True,
    }
    return LinearCoder(**{**given, **changes})


def test_random_coder() -> None:
    like = made()
    null = random_coder(like, 7)
    assert (null.name, null.hookpoint, null.side) == ("c@random-coder", "layers.1", "output")
    assert (null.d_in, null.width, null.k, null.architecture) == (6, 300, 3, "topk")
    torch.testing.assert_close(null.encoder.norm(dim=1), torch.ones(300))
    assert torch.equal(null.decoder, null.encoder)
    assert torch.equal(null.encoder_bias, torch.zeros(300))
    assert torch.equal(null.decoder_bias, like.decoder_bias)
    assert null.subtract_decoder_bias
    assert null.encoder.mean(dim=0).abs().max() < 0.12  # no direction is preferred
    second_moment = null.encoder.T @ null.encoder / 300
    assert (second_moment - torch.eye(6) / 6).abs().max() < 0.06
    assert torch.equal(random_coder(like, 7, name="n").encoder, null.encoder)
    assert random_coder(like, 7, name="n").name == "n"
    other = random_coder(made(hookpoint="h.2"), 7)
    assert len({null.hash, random_coder(like, 8).hash, other.hash, random_coder(like, 7, 4).hash}) == 4


def test_the_draw_of_a_random_coder_never_changes() -> None:
    """Stores of nulls collected earlier stay comparable."""
    rows = stream(7, "layers.1", "output", 300, 3, "random_coder").standard_normal((300, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.array_equal(random_coder(made(), 7).encoder.numpy(), rows.astype(np.float32))
    assert np.array_equal(random_coder(made(ReLU()), 7, 3).encoder.numpy(), rows.astype(np.float32))


def test_a_draw_in_parts_is_the_same_and_takes_the_memory_of_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.coders import baselines

    rows = stream(1, "d").standard_normal((5000, 40))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for elements in (1, 40 * 7, 40 * 100):
        monkeypatch.setattr(baselines, "_DRAWN_ELEMENTS", elements)
        tracemalloc.start()
        found = baselines._directions(stream(1, "d"), 5000, 40)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(found.numpy(), rows.astype(np.float32))
        assert peak < 1.3 * found.nbytes


def test_random_transcoder_and_dtype() -> None:
    transcoder: dict[str, Any] = {"side": "input", "target": ("layers.1", "output"), "subtract_decoder_bias": False}
    like = made(skip=normal(6, 6), **transcoder).to("cpu", torch.bfloat16)
    null = random_coder(like, 0)
    assert (null.side, null.target, null.skip, null.dtype) == ("input", like.target, None, torch.bfloat16)
    assert not null.subtract_decoder_bias
    assert torch.equal(null.decoder_bias, like.decoder_bias)
    wide = random_coder(made(decoder=normal(300, 7), decoder_bias=torch.zeros(7), **transcoder), 0)
    assert wide.decoder.shape == (300, 7)
    torch.testing.assert_close(wide.decoder.norm(dim=1), torch.ones(300))
    torch.testing.assert_close(wide.encoder.norm(dim=1), torch.ones(300))


def test_random_coder_like_others() -> None:
    like = made(JumpReLU(torch.ones(300)), input_norm="layer_norm", subtract_decoder_bias=False)
    with pytest.raises(InputError, match="no fixed k; give k"):
        random_coder(like, 0)
    null = random_coder(like, 0, 12)
    assert (null.k, null.input_norm, null.subtract_decoder_bias) == (12, "layer_norm", True)
    neurons = NeuronCoder(name="n", hookpoint="h.1", d=6, k=2, signs="both")
    null = random_coder(neurons, 0)
    assert (null.point, null.width, null.k) == (("h.1", "input"), 12, 2)
    assert torch.equal(null.decoder_bias, torch.zeros(6))
    with pytest.raises(InputError, match="k = 301"):
        random_coder(like, 0, 301)


def untrained(architecture: str, **changes: Any) -> LinearCoder:
    given: dict[str, Any] = {"d_in": 8, "width": 64, "seed": 1, "hookpoint": "layers.1", "name": "u"}
    return untrained_coder(architecture, **{**given, **changes})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_coders(architecture: str) -> None:
    sample = normal(200, 8)
    needs: dict[str, dict[str, Any]] = {"topk": {"k": 4}, "batchtopk": {"k": 4, "sample": sample}}
    options = needs.get(architecture, {})
    coder = untrained(architecture, **options)
    length = 0.1 if architecture == "relu" else 1.0
    torch.testing.assert_close(coder.encoder.norm(dim=1), torch.full((64,), length))
    assert torch.equal(coder.encoder, coder.decoder)
    assert not coder.encoder_bias.any()
    assert not coder.decoder_bias.any()
    kinds = {"topk": TopK, "batchtopk": JumpReLU, "jumprelu": JumpReLU, "relu": ReLU, "gated": Gated}
    assert isinstance(coder.activation, kinds[architecture])
    assert torch.equal(coder.encoder, untrained(architecture, **options).encoder)
    assert not torch.equal(coder.encoder, untrained(architecture, **options, seed=2).encoder)
    assert not torch.equal(coder.encoder, untrained(architecture, **options, hookpoint="h.1").encoder)
    code = coder.encode(sample)
    pre = sample @ coder.encoder.T
    l0 = float((code.values > 0).sum()) / len(sample)
    if architecture in ("relu", "gated"):
        assert l0 == pytest.approx(float((pre > 0).sum()) / 200)
    elif architecture == "jumprelu":
        assert l0 == pytest.approx(float((pre > 0.001).sum()) / 200)
    else:
        assert l0 == 4


def test_thresholds_give_the_average_that_was_asked_for() -> None:
    sample = normal(50, 8)
    for l0 in (0.5, 7, 20.02):
        coder = untrained("jumprelu", l0=l0, sample=sample)
        assert len(coder.encode(sample).values) == round(l0 * 50)
    # Pre-activations 3, 2 and 1, −1: halfway between the second and the third.
    encoder = torch.eye(2)
    sample = torch.tensor([[3.0, 2.0], [1.0, -1.0]])
    assert threshold_for(encoder, sample, 1.0, "u") == 1.5
    assert threshold_for(encoder, sample, 1.5, "u") == 0.5
    assert threshold_for(encoder, sample, 0.5, "u") == 2.5


def test_thresholds_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.coders import baselines

    encoder, sample = normal(64, 8), normal(50, 8)
    whole = threshold_for(encoder, sample, 5, "u")
    monkeypatch.setattr(baselines, "_CHUNK_ELEMENTS", 64 * 7)
    assert threshold_for(encoder, sample, 5, "u") == pytest.approx(whole, rel=1e-6)


def test_an_untrained_transcoder() -> None:
    coder = untrained("relu", d_out=5, side="input", target=("layers.1", "output"), base_model="m")
    assert (coder.d_in, coder.d_out, coder.architecture, coder.base_model) == (8, 5, "relu transcoder", "m")
    torch.testing.assert_close(coder.decoder.norm(dim=1), torch.full((64,), 0.1))


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("crosscoder", {}, "known: topk, batchtopk"),
        ("topk", {}, "needs k"),
        ("topk", {"k": 65}, "k = 65"),
        ("topk", {"k": 3, "l0": 4.0}, "has no l0; give k"),
        ("batchtopk", {}, "needs k"),
        ("batchtopk", {"k": 3}, "needs a sample"),
        ("jumprelu", {"k": 3}, "has no k; give l0"),
        ("jumprelu", {"l0": 3.0}, "needs a sample"),
        ("jumprelu", {"l0": 3.0, "sample": torch.zeros(0, 8)}, "needs a sample"),
        ("jumprelu", {"l0": 0.0, "sample": torch.ones(1, 8)}, "an average of 0"),
        ("jumprelu", {"l0": float("nan"), "sample": torch.ones(1, 8)}, "an average of nan"),
        ("jumprelu", {"l0": 64.0, "sample": torch.ones(1, 8)}, "are positive"),
        ("relu", {"l0": 3.0}, "has no l0$"),
        ("gated", {"k": 3}, "has no k$"),
        ("relu", {"width": 0}, "at least 1"),
    ],
)
def test_bad_settings(architecture: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        untrained(architecture, **options)
