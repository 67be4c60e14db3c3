"""The faster Mamba-1 scan: the stock scan's values and gradients, from any state, in every family that has one."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mamba import modeling_mamba

from exegete.subjects import Subject
from exegete.subjects.fast_scan import _built, fast_scan, selective_scan
from exegete.testing import toy_subject_model, toy_tokenizer

fast_scan_module = importlib.import_module("exegete.subjects.fast_scan")

ROWS, CHANNELS, STATES = 3, 5, 4


def given(time: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs in the layout transformers passes them in."""
    rng = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden_states": normal(ROWS, CHANNELS, time),
        "dt": normal(ROWS, CHANNELS, time),
        "A": (-torch.rand(CHANNELS, STATES, generator=rng) * 4).to(dtype).requires_grad_(),
        "B": normal(ROWS, STATES, time),
        "C": normal(ROWS, STATES, time),
        "D": normal(CHANNELS),
        "z": normal(ROWS, CHANNELS, time),
        "delta_bias": normal(CHANNELS),
    }


def toy(family: str, folder: Path) -> torch.nn.Module:
    """An untrained model of a family."""
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(toy_subject_model(family, folder))
    return loaded


def both(parts: dict[str, Any], scan: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, last state, and gradients of a loss in which every entry of both has its own weight."""
    out, last = scan(**parts, delta_softplus=True, return_last_state=True)
    loss = (out * torch.arange(out.numel()).view_as(out).sin()).sum() + (last * last).sum()
    return out.detach(), last.detach(), list(torch.autograd.grad(loss, list(parts.values())))


@pytest.mark.parametrize("time", [1, 4, 11])
def test_it_is_the_stock_scan(time: int) -> None:
    parts = given(time)
    out, last, gradients = both(parts, selective_scan)
    stock_out, stock_last, stock_gradients = both(parts, modeling_mamba.mamba_selective_scan)
    torch.testing.assert_close(out, stock_out)
    torch.testing.assert_close(last, stock_last)
    for name, mine, theirs in zip(parts, gradients, stock_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


def test_the_recurrence_by_hand() -> None:
    one = torch.ones(1, 1, 3)
    x = torch.tensor([[[1.0, 2.0, 4.0]]])
    halving = -torch.log(torch.tensor([[2.0]]))  # with dt = 1 a state loses half of itself a step
    out, last = selective_scan(x, one, halving, one, one, return_last_state=True)
    assert out.flatten().tolist() == pytest.approx([1.0, 2.5, 5.25])
    assert last.item() == pytest.approx(5.25)


def test_gradients_are_derivatives() -> None:
    parts = given(6, torch.float64)
    initial = torch.randn(ROWS, CHANNELS, STATES, dtype=torch.float64, requires_grad=True)

    def run(*values: torch.Tensor) -> Any:
        named: dict[str, Any] = dict(zip(parts, values, strict=False))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, initial=values[-1])

    assert torch.autograd.gradcheck(run, (*parts.values(), initial))


def test_a_sequence_in_two_parts_is_the_whole() -> None:
    parts = given(9)
    whole, last = selective_scan(**parts, return_last_state=True)
    timed = {"hidden_states", "dt", "B", "C", "z"}
    first, state = selective_scan(
        **{k: v[..., :5] if k in timed else v for k, v in parts.items()}, return_last_state=True
    )
    second, state = selective_scan(
        **{k: v[..., 5:] if k in timed else v for k, v in parts.items()}, return_last_state=True, initial=state
    )
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole)
    torch.testing.assert_close(state, last)


def test_built_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        built.append(f"{len(inputs)} inputs")
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    parts = given(6)  # a full chunk and a shorter one
    plain = both(parts, selective_scan)
    _built.cache_clear()
    found = both(parts, functools.partial(selective_scan, compiled=True))
    _built.cache_clear()
    torch._dynamo.reset()
    torch.testing.assert_close(found, plain)
    assert built == ["6 inputs", "9 inputs"]  # one graph there, one back, of the full chunk alone


def test_the_operators_are_well_formed() -> None:
    """Schema, shapes without data, and autograd registration, as torch checks them."""
    rng = torch.Generator().manual_seed(0)
    steps, shape = 6, (ROWS, STATES, CHANNELS)
    inputs = [torch.rand(steps, ROWS, CHANNELS, generator=rng, requires_grad=True) for _ in range(2)]
    inputs.append((-torch.rand(STATES, CHANNELS, generator=rng)).requires_grad_())
    inputs += [torch.rand(steps, ROWS, STATES, generator=rng, requires_grad=True) for _ in range(2)]
    inputs.append(torch.rand(shape, generator=rng, requires_grad=True))
    torch.library.opcheck(torch.ops.exegete.selective_scan, (*inputs, False))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads that ran the fast scan, in order."""
    found: list[int] = []
    real = fast_scan_module.selective_scan

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(threading.get_ident())
        return real(*args, **kwargs)

    monkeypatch.setattr(fast_scan_module, "selective_scan", counted)
    return found


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_models_run_on_it_and_only_within_the_block(family: str, tmp_path: Path, scans: list[int]) -> None:
    model = toy(family, tmp_path)
    tokens = torch.arange(14).reshape(2, 7)
    plain = model(input_ids=tokens, use_cache=False).logits
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert scans == []
    with fast_scan(model):
        fast = model(input_ids=tokens, use_cache=False).logits
        fast.square().mean().backward()
    assert scans
    ran = len(scans)
    again = model(input_ids=tokens, use_cache=False).logits
    assert len(scans) == ran
    assert torch.equal(again, plain)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip((p.grad for p in model.parameters() if p.grad is not None), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_an_error_within_the_block_gives_the_stock_scan_back(tmp_path: Path, scans: list[int]) -> None:
    model = toy("mamba", tmp_path)
    with pytest.raises(KeyError), fast_scan(model):
        raise KeyError
    model(input_ids=torch.arange(3)[None], use_cache=False)
    assert scans == []


def test_other_threads_are_left_as_they_are(tmp_path: Path, scans: list[int]) -> None:
    model = toy("mamba", tmp_path)
    tokens = torch.arange(6).reshape(1, 6)
    plain = model(input_ids=tokens, use_cache=False).logits.detach()
    with ThreadPoolExecutor(1) as pool, fast_scan(model):
        other = pool.submit(lambda: model(input_ids=tokens, use_cache=False).logits.detach()).result()
        assert scans == []
        with fast_scan(model):
            pass
        model(input_ids=tokens, use_cache=False)
    assert set(scans) == {threading.get_ident()}
    assert torch.equal(other, plain)


def test_activations_are_captured_on_it(tmp_path: Path, scans: list[int]) -> None:
    model = toy("mamba", tmp_path)
    subject = Subject(model, toy_tokenizer(), name="toy")
    tokens = torch.arange(14).reshape(2, 7)
    found = subject.capture(tokens, None, [("layers.1", "output")])["layers.1", "output"]
    assert scans
    with torch.no_grad():
        states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, states[1], atol=1e-5, rtol=1e-4)


def test_other_families_are_left_as_they_are(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    before = dict(vars(sys.modules[type(model).__module__]))
    with fast_scan(model):
        assert vars(sys.modules[type(model).__module__]) == before
