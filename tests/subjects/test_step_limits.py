"""Single steps of Mamba-2 layers keep within the limits of whole passes, in the thread that asks for it."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from exegete.subjects.step_limits import step_limits
from exegete.testing import toy_subject_model


def toy(family: str, folder: Path, limits: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(toy_subject_model(family, folder)).eval()
    for module in model.modules():
        if "time_step_limit" in vars(module):
            module.time_step_limit = limits
    return model


@torch.no_grad()
def stepped(model: Any, tokens: torch.Tensor, prefill: int = 4) -> torch.Tensor:
    output = model(input_ids=tokens[:, :prefill], use_cache=True)
    found = []
    for at in range(prefill, tokens.shape[1]):
        name = "cache_params" if "cache_params" in output else "past_key_values"
        given = {name: output[name], "position_ids": torch.tensor([[at]])}
        output = model(input_ids=tokens[:, at : at + 1], use_cache=True, **given)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", ["mamba2", "zamba2", "nemotron_h", "bamba", "falcon_h1", "granitemoehybrid"])
@pytest.mark.parametrize("limits", [(0.5, float("inf")), [0.0, 0.001], (0.6, 0.7)])
def test_steps_equal_whole_passes_whatever_the_limits(family: str, limits: Any, tmp_path: Path) -> None:
    model = toy(family, tmp_path, limits)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits[:, 4:]
    stock = stepped(model, tokens)
    assert not torch.allclose(stock, whole, atol=1e-3)  # what is mended
    with step_limits(model):
        torch.testing.assert_close(stepped(model, tokens), whole, rtol=0, atol=1e-4)
    assert torch.equal(stepped(model, tokens), stock)


@pytest.mark.parametrize("limits", [(0.0, float("inf")), None])
def test_models_without_limits_are_left_as_they_are(limits: Any, tmp_path: Path) -> None:
    model = toy("mamba2", tmp_path, limits) if limits else toy("llama", tmp_path, limits)
    home = vars(sys.modules[type(model).__module__])
    before = dict(home)
    with step_limits(model):
        assert home == before


def test_other_threads_step_as_they_did(tmp_path: Path) -> None:
    model = toy("mamba2", tmp_path, (0.5, float("inf")))
    tokens = torch.arange(3, 12)[None]
    stock = stepped(model, tokens)
    entered, done = threading.Event(), threading.Event()

    def limited() -> torch.Tensor:
        with step_limits(model):
            entered.set()
            assert done.wait(30)
            return stepped(model, tokens)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(limited)
        assert entered.wait(30)
        here = stepped(model, tokens)
        done.set()
        assert not torch.equal(other.result(), stock)
    assert torch.equal(here, stock)
