"""Nearest directions against dense cosines, for every kind of coder with directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders.activations import TopK
from exegete.coders.coder import SparseCoder
from exegete.coders.cosines import LEAST, Which, cosine_neighbours
from exegete.coders.directions import direction_coder
from exegete.coders.linear import LinearCoder
from exegete.coders.neurons import NeuronCoder, random_rotation
from exegete.errors import InputError
from exegete.types import Array


def linear(seed: int = 0, *, width: int = 90, d: int = 24) -> LinearCoder:
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, width, d, generator=draw)
    decoder[7] = 3 * decoder[4]
    decoder[9] = 0
    encoder[11] = encoder[3] + 0.1 * encoder[5]
    return LinearCoder(
        name="c",
        hookpoint="layers.0",
        encoder=encoder,
        encoder_bias=torch.zeros(width),
        decoder=decoder,
        decoder_bias=torch.zeros(d),
        activation=TopK(4),
    )


def brute(rows: Array, indices: list[int], k: int) -> tuple[Array, Array]:
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    cosine = cosine[indices]
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(cosine, order, 1)
    return np.where(best > LEAST, order, -1), np.where(best > LEAST, best, 0)


@pytest.mark.parametrize("which", ["decoder", "encoder"])
@pytest.mark.parametrize("entries", [1 << 22, 300, 30])
def test_neighbours_are_those_of_the_dense_table(which: Which, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exegete.coders.cosines._ENTRIES", entries)
    coder = linear()
    rows = (coder.decoder if which == "decoder" else coder.encoder).numpy()
    asked = [4, 9, 0, 89, 11, 3, 7]
    found, cosines = cosine_neighbours(coder, asked, which=which, k=6)
    expected, values = brute(rows, asked, 6)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(cosines, values, atol=1e-6)
    assert found.dtype == np.int64
    assert cosines.dtype == np.float32


def test_equal_directions_are_nearest_and_a_zero_one_is_alone() -> None:
    found, cosines = cosine_neighbours(linear(), [4, 7, 9], which="decoder", k=3)
    assert found[:2, 0].tolist() == [7, 4]
    assert cosines[:2, 0] == pytest.approx(1)
    assert found[2].tolist() == [-1, -1, -1]


def test_all_latents_and_more_neighbours_than_there_are() -> None:
    coder = linear(width=20, d=3)
    found, cosines = cosine_neighbours(coder, range(20), which="encoder", k=50)
    expected, values = brute(coder.encoder.numpy(), list(range(20)), 20)
    np.testing.assert_array_equal(found[:, :20], expected)
    np.testing.assert_allclose(cosines[:, :20], values, atol=1e-6)
    assert (found[:, 20:] == -1).all()


def test_half_precision_is_compared_in_single() -> None:
    coder = linear().to("cpu", torch.bfloat16)
    found, _ = cosine_neighbours(coder, [3], which="encoder", k=4)
    expected, _ = brute(coder.encoder.float().numpy(), [3], 4)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("which", ["decoder", "encoder"])
def test_neurons_are_orthogonal_and_have_no_neighbours(rotated: bool, which: Which) -> None:
    rotation = random_rotation(32, 0) if rotated else None
    coder = NeuronCoder(name="n", hookpoint="layers.0.mlp", d=32, signs="both", rotation=rotation)
    found, cosines = cosine_neighbours(coder, range(64), which=which, k=5)
    assert (found == -1).all()
    assert (cosines == 0).all()


def test_opposite_directions_are_no_neighbours() -> None:
    coder = direction_coder(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "layers.0", name="d", signs="both")
    found, cosines = cosine_neighbours(coder, [0, 2], which="decoder", k=3)
    assert found.tolist() == [[1, -1, -1], [3, -1, -1]]
    assert cosines[:, 0] == pytest.approx(0.5**0.5)


class Bare(SparseCoder):
    """A coder that nothing is known of but its decoder."""

    name, hookpoint, side, target = "bare", "layers.0", "output", ("layers.0", "output")
    d_in = d_out = 2
    width, k, base_model = 3, None, None
    architecture = "odd"
    hash = "0"
    device = torch.device("cpu")
    dtype = torch.float32

    def encode(self, x: torch.Tensor) -> Any:
        raise NotImplementedError

    def decode(self, code: Any, x: torch.Tensor | None = None) -> Any:
        raise NotImplementedError

    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[indices]

    def to(self, device: Any, dtype: Any = None) -> Any:
        return self

    def placed(self, **_: Any) -> Any:
        return self


def test_a_coder_without_an_encoder_says_so() -> None:
    found, _ = cosine_neighbours(Bare(), [0], which="decoder", k=2)
    assert found.tolist() == [[1, -1]]
    with pytest.raises(InputError, match=r"'bare' \(odd\) has no encoder directions.*decoder or cofiring"):
        cosine_neighbours(Bare(), [0], which="encoder")


def test_bad_questions_are_refused() -> None:
    with pytest.raises(InputError, match="0 … 89, got 90"):
        cosine_neighbours(linear(), [1, 90], which="decoder")
    with pytest.raises(InputError, match="at least 1"):
        cosine_neighbours(linear(), [1], which="decoder", k=0)
    wrong: Any = "cofiring"
    with pytest.raises(InputError, match="cofiring"):
        cosine_neighbours(linear(), [1], which=wrong)
