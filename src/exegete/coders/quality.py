"""How well a coder reconstructs."""

from __future__ import annotations

import torch

from exegete.coders.coder import SparseCoder
from exegete.coders.kernels import in_float64
from exegete.errors import InputError, MismatchError


@torch.no_grad()
def fvu_and_l0(coder: SparseCoder, x: torch.Tensor, target: torch.Tensor | None = None) -> tuple[float, float]:
    """Return the fraction of variance unexplained and the mean number of firing latents.

    FVU is the squared error over the squared distance of the target from its mean, both summed over inputs and
    dimensions: 0 is perfect, 1 is no better than the mean.

    Args:
        coder: Any coder.
        x: [n, d_in] activations at the coder's hookpoint and side.
        target: [n, d_out] what the coder predicts; by default ``x``, which a transcoder refuses.

    Raises:
        InputError: When a transcoder gets no target, or the target does not vary.
        MismatchError: When the target has another shape than the reconstruction.
    """
    if target is None:
        if coder.target != coder.point:
            where, side = coder.target
            raise InputError(f"coder {coder.name!r} predicts the {side} of {where!r}; give it as target")
        target = x
    code = coder.encode(x)
    y = in_float64(coder.decode(code, x))
    if y.shape != target.shape:
        raise MismatchError(f"coder {coder.name!r} predicts {list(y.shape)}, the target is {list(target.shape)}")
    wanted = target.to(y.device).double()
    variance = (wanted - wanted.mean(dim=0)).square().sum()
    if float(variance) == 0.0:
        raise InputError(f"the target of coder {coder.name!r} does not vary; give several different inputs")
    fvu = (wanted - y).square().sum() / variance
    return float(fvu), float((code.values > 0).sum()) / len(x)
