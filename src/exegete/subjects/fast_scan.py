"""A faster scan for Mamba-1 layers without their CUDA kernels: Mamba, FalconMamba, and such layers of Jamba and Zamba.

Per channel ``i`` and state ``n`` a layer computes ``h[t] = exp(dt[t, i] A[i, n]) h[t-1] + dt[t, i] B[t, n] x[t, i]``
and reads ``y[t, i] = sum_n C[t, n] h[t] + D[i] x[t, i]`` (arXiv 2312.00752, section 3.2). transformers' own loop in
PyTorch holds tensors ``[rows, channels, time, states]`` and takes each time step out of them, so that its backward
pass writes a whole such tensor for every step. Here time comes first, channels lie innermost, and the backward pass is
written out; only every fourth state is kept, those between are computed again. Values and gradients are the same up to
rounding; the gradient can be taken once, not of itself.

Called with a cache and several tokens, those layers go on from what the cache holds of the convolution, but begin their
scan at zero. Here it can begin where the tokens before ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from exegete.subjects.replaced import Replaced

# Four steps at a time: compiled, the states of longer chunks no longer fit the registers.
STEPS = 4


def fast_scan(
    model: torch.nn.Module, *, compiled: bool = False, initial: Iterable[Tensor] = ()
) -> AbstractContextManager[None]:
    """Have Mamba-1 layers scan faster within the block on CPU in float32 or wider; all else is left as it is.

    Only what this thread runs within the block is concerned.

    Args:
        model: Of a family that scans so, or of any other.
        compiled: Have torch.compile build the scan for each shape: worth it where many batches of one shape follow.
        initial: Where the next scans begin, one after another [rows, channels, states] each, on any device and in any
            dtype; those after them begin at zero.
    """
    return _SCAN.taken(model, (compiled, iter(initial)))


def _faster(
    stock: Any, setting: tuple[bool, Iterator[Tensor]], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    compiled, initial = setting[0], next(setting[1], None)
    wide = hidden_states.device.type == "cpu" and hidden_states.dtype in (torch.float32, torch.float64)
    if initial is None and not wide:  # other devices have kernels, and half floats are to round where the model rounds
        return stock(hidden_states, *args, **kwargs)
    return selective_scan(hidden_states, *args, **{**kwargs, "compiled": compiled, "initial": initial})


_SCAN = Replaced("mamba_selective_scan", _faster)


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 (the names transformers calls it by)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial: Tensor | None = None,
    compiled: bool = False,
    **_: Any,
) -> Any:
    """Scan as transformers' ``mamba_selective_scan`` does, and from an ``initial`` state ``[rows, channels, states]``.

    ``hidden_states``, ``dt``, ``z`` are ``[rows, channels, time]``, ``A`` ``[channels, states]``, ``B`` and ``C``
    ``[rows, states, time]``, ``D`` and ``delta_bias`` ``[channels]``. Returns ``[rows, channels, time]``, and with
    ``return_last_state`` also the state after the last step. The state is kept in float32 or wider.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    first = (
        hidden_states.new_zeros(len(hidden_states), *A.shape, dtype=wide)
        if initial is None
        else initial.to(hidden_states.device, wide)
    )
    inputs = hidden_states.permute(2, 0, 1).to(wide)
    steps = dt.permute(2, 0, 1).to(wide)
    y, last = torch.ops.exegete.selective_scan(
        steps.contiguous(),
        (steps * inputs).contiguous(),
        A.to(wide).t().contiguous(),
        B.permute(2, 0, 1).to(wide).contiguous(),
        C.permute(2, 0, 1).to(wide).contiguous(),
        first.transpose(1, 2).contiguous(),
        compiled,
    )[:2]
    out = y.to(hidden_states.dtype).permute(1, 2, 0)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * torch.nn.functional.silu(z)
    return (out, last.transpose(1, 2)) if return_last_state else out


# Below: time T, rows B, channels I, states N. dt and w (= dt x) [T, B, I], a [N, I], b and c [T, B, N], h [B, N, I].


def _advance(dt: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the readings of a few steps ``[T, B, I]`` and the state after them."""
    read = []
    for t in range(len(dt)):
        h = _next(dt[t], w[t], a, b[t], h)
        read.append((h * c[t].unsqueeze(2)).sum(1))
    return torch.stack(read), h


def _next(dt: Tensor, w: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.addcmul(torch.exp(dt.unsqueeze(1) * a) * h, w.unsqueeze(1), b.unsqueeze(2))


def _retreat(
    dt: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, grad_y: Tensor, grad_h: Tensor, grad_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients over a few steps that began at ``h``: of dt, w, b, c, that h; of a ``[B, N, I]``, summed."""
    states = [h]
    for t in range(len(dt)):
        states.append(_next(dt[t], w[t], a, b[t], states[-1]))
    found = []
    for t in range(len(dt) - 1, -1, -1):
        slope = grad_y[t].unsqueeze(1)
        of_c = (states[t + 1] * slope).sum(2)
        grad_h = torch.addcmul(grad_h, c[t].unsqueeze(2), slope)
        of_w = (grad_h * b[t].unsqueeze(2)).sum(1)
        of_b = (grad_h * w[t].unsqueeze(1)).sum(2)
        grad_h = grad_h * torch.exp(dt[t].unsqueeze(1) * a)
        of_exponent = grad_h * states[t]
        grad_a = torch.addcmul(grad_a, of_exponent, dt[t].unsqueeze(1))
        found.append(((of_exponent * a).sum(1), of_w, of_b, of_c))
    of_dt, of_w, of_b, of_c = (torch.stack(parts[::-1]) for parts in zip(*found, strict=True))
    return of_dt, of_w, of_b, of_c, grad_h, grad_a


@functools.cache
def _built(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, dynamic=False)


def _runner(run: Callable[..., Any], compiled: bool, steps: int) -> Callable[..., Any]:
    """A shorter last chunk is not worth building for."""
    return _built(run) if compiled and steps == STEPS else run


def _plain(*tensors: Tensor) -> list[Tensor]:
    """Detach: torch.compile would otherwise build for gradients of the insides, which nobody takes."""
    return [tensor.detach() for tensor in tensors]


@torch.library.custom_op("exegete::selective_scan", mutates_args=())
def _scan(
    dt: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return readings ``[T, B, I]``, the last state, and the states every chunk began at."""
    dt, w, a, b, c, first = _plain(dt, w, a, b, c, first)
    y, h = torch.empty_like(dt), first.clone()
    begun = h.new_empty(-(-len(dt) // STEPS), *h.shape)
    for i, t in enumerate(range(0, len(dt), STEPS)):
        part = slice(t, t + STEPS)
        begun[i] = h
        y[part], h = _runner(_advance, compiled, len(dt[part]))(dt[part], w[part], a, b[part], c[part], h)
    return y, h, begun


@torch.library.custom_op("exegete::selective_scan_backward", mutates_args=())
def _scan_backward(
    dt: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    begun: Tensor,
    grad_y: Tensor,
    grad_h: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of dt, w, a, b, c and the first state."""
    dt, w, a, b, c, begun, grad_y, grad_h = _plain(dt, w, a, b, c, begun, grad_y, grad_h)
    of_dt, of_w, of_b, of_c = (torch.empty_like(x) for x in (dt, w, b, c))
    grad_h, grad_a = grad_h.clone(), torch.zeros_like(grad_h)
    for i in range(len(begun) - 1, -1, -1):
        part = slice(STEPS * i, STEPS * (i + 1))
        run = _runner(_retreat, compiled, len(dt[part]))
        found = run(dt[part], w[part], a, b[part], c[part], begun[i], grad_y[part], grad_h, grad_a)
        of_dt[part], of_w[part], of_b[part], of_c[part], grad_h, grad_a = found
    return of_dt, of_w, grad_a.sum(0), of_b, of_c, grad_h


@_scan.register_fake
def _(
    dt: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dt), torch.empty_like(first), first.new_empty(-(-len(dt) // STEPS), *first.shape)


@_scan_backward.register_fake
def _(
    dt: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    begun: Tensor,
    grad_y: Tensor,
    grad_h: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_dt, of_w, of_a, of_b, of_c, of_h = (torch.empty_like(x) for x in (dt, w, a, b, c, grad_h))
    return of_dt, of_w, of_a, of_b, of_c, of_h


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.compiled = inputs[6]


def _backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, _begun: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.exegete.selective_scan_backward(
        *ctx.saved_tensors, grad_y.contiguous(), grad_h.contiguous(), ctx.compiled
    )
    return (*grads, None)


_scan.register_autograd(_backward, setup_context=_keep)
