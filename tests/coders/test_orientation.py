from __future__ import annotations

import logging

import pytest
import torch

from exegete.coders.activations import ReLU
from exegete.coders.linear import LinearCoder
from exegete.coders.orientation import oriented

D, WIDTH = 12, 30


def transcoder(skip: torch.Tensor | None, *, undecided: bool = True, d_out: int = D) -> LinearCoder:
    draw = torch.Generator().manual_seed(0)
    return LinearCoder(
        name="t",
        hookpoint="layers.1.mlp",
        encoder=torch.randn(WIDTH, D, generator=draw) / D**0.5,
        encoder_bias=torch.zeros(WIDTH),
        decoder=torch.randn(WIDTH, d_out, generator=draw) / WIDTH**0.5,
        decoder_bias=torch.zeros(d_out),
        activation=ReLU(),
        side="input",
        target=("layers.1.mlp", "output"),
        skip=skip,
        skip_undecided=undecided,
    )


@pytest.fixture
def skip() -> torch.Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(200, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("turned", [False, True])
def test_the_orientation_that_reconstructs_is_kept(skip: torch.Tensor, x: torch.Tensor, turned: bool) -> None:
    truth = transcoder(skip)
    target = truth.decode(truth.encode(x), x) + 0.1 * torch.randn(200, D, generator=torch.Generator().manual_seed(3))
    found = oriented(transcoder(skip.T.contiguous() if turned else skip), x, target)
    assert found.transposed is turned
    assert found.clear
    assert found.fvu < 0.01 < found.other
    assert not found.coder.skip_undecided
    assert found.coder.skip is not None
    torch.testing.assert_close(found.coder.skip, skip)


def test_a_turned_coder_is_another_coder(skip: torch.Tensor) -> None:
    coder = transcoder(skip)
    assert coder.settled(transpose=False).hash == coder.hash != coder.settled(transpose=True).hash
    half = coder.to("cpu", torch.bfloat16)
    assert half.skip_undecided
    assert half.settled(transpose=True).hash == coder.settled(transpose=True).hash


def test_a_decided_coder_is_left_alone(skip: torch.Tensor, x: torch.Tensor) -> None:
    wrong = transcoder(skip)
    target = wrong.decode(wrong.encode(x), x)
    found = oriented(transcoder(skip.T.contiguous(), undecided=False), x, target)
    assert not found.transposed
    assert found.coder.skip is not None
    torch.testing.assert_close(found.coder.skip, skip.T)
    rectangular = oriented(transcoder(torch.ones(5, D), d_out=5), x, x[:, :5])
    assert not rectangular.transposed
    assert oriented(transcoder(None), x, target).coder.skip is None


def test_no_clear_winner_is_said(x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    symmetric = torch.eye(D)
    coder = transcoder(symmetric)
    with caplog.at_level(logging.WARNING):
        found = oriented(coder, x, coder.decode(coder.encode(x), x) + x.flip(0))
    assert not found.transposed
    assert not found.clear
    assert "reconstructs alike" in caplog.text
