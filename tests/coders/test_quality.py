from __future__ import annotations

from typing import Any

import pytest
import torch

from exegete.coders import kernels
from exegete.coders.activations import TopK
from exegete.coders.linear import LinearCoder
from exegete.coders.quality import fvu_and_l0
from exegete.types import SparseCode


class _WithoutFloat64(torch.Tensor):
    """A tensor of a device that has no float64, until it is on the CPU."""

    def double(self, *_: Any, **__: Any) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_a_coder_on_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
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
    expected = fvu_and_l0(coder, x)
    assert expected[0] == pytest.approx(11 / (78 / 9 + 14))
    plain = LinearCoder.decode

    def decode(self: LinearCoder, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        return plain(self, code, x).as_subclass(_WithoutFloat64)

    monkeypatch.setattr(LinearCoder, "decode", decode)
    monkeypatch.setattr(kernels, "has_float64", lambda device: False)
    assert fvu_and_l0(coder, x) == expected
