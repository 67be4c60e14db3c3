"""One numbering of the residual stream, and what a model makes of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exegete.errors import InputError, NotFoundError
from exegete.subjects import Subject, load_subject
from exegete.subjects.readout import read_out
from exegete.subjects.sites import n_blocks, parse_sites, residuals, site_point
from exegete.testing import FAMILIES, toy_subject_model

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [300, 8, 7, 1, 2, 3, 4]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=5)


def load(folder: Path, family: str, **settings: Any) -> Subject:
    return load_subject(str(toy_subject_model(family, folder / family, **settings)), device="cpu")


def test_sites_are_named(llama: Subject) -> None:
    assert n_blocks(llama) == 5
    assert site_point(llama, -1) == ("layers.0", "input")
    assert site_point(llama, 4) == ("layers.4", "output")
    for text, wanted in {
        "all": (-1, 0, 1, 2, 3, 4),
        "blocks": (0, 1, 2, 3, 4),
        "last": (4,),
        "3": (3,),
        "-1": (-1,),
        "4, -1,2,4": (-1, 2, 4),
        "1-3": (1, 2, 3),
        "-1-1": (-1, 0, 1),
        "2-2,last": (2, 4),
    }.items():
        assert parse_sites(text, llama) == wanted


def test_unknown_sites_are_refused(llama: Subject) -> None:
    for text in ("5", "-2", "2-8", "0,9"):
        with pytest.raises(NotFoundError, match=r"sites -1 \(the embedding\) to 4, got"):
            parse_sites(text, llama)
    for text in ("", "x", "1,", "1..3", "all blocks"):
        with pytest.raises(InputError, match="ranges such as 2-8, got"):
            parse_sites(text, llama)
    with pytest.raises(InputError, match="from the lower to the higher"):
        parse_sites("3-1", llama)
    with pytest.raises(NotFoundError):
        site_point(llama, 5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_residuals_and_readout_of_every_family(family: str, tmp_path: Path) -> None:
    """The embedding and block outputs by plain hooks; head and norm on the last are the model's own logits."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    subject = load(tmp_path, family)
    found = residuals(subject, TOKENS, parse_sites("all", subject))
    assert list(found) == [-1, 0, 1, 2]
    caught: dict[int, torch.Tensor] = {}
    handles = []
    for site in range(3):

        def hook(module: Any, args: Any, kwargs: Any, output: Any, site: int = site) -> None:
            caught[site] = (output[0] if isinstance(output, tuple) else output).clone()
            if site == 0:
                caught[-1] = (args[0] if args else kwargs["hidden_states"]).clone()

        module = subject.model.base_model.get_submodule(site_point(subject, site)[0])
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        logits = subject.model(input_ids=TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    for site, value in found.items():
        torch.testing.assert_close(value, caught[site].float(), rtol=1e-4, atol=2e-5)
    readout = read_out(subject)
    assert readout.error <= 1e-5
    torch.testing.assert_close(readout.logits(found[2]), logits.float(), rtol=1e-4, atol=1e-4)
    earlier = readout.logits(found[0])
    assert earlier.shape == logits.shape
    assert (earlier - logits).abs().max() > 0.01
    assert read_out(subject) is readout


def norm(subject: Subject, h: torch.Tensor) -> torch.Tensor:
    base, eps = subject.model.base_model, subject.model.config.rms_norm_eps
    children = dict(base.named_children())
    weight = next(children[name].weight for name in ("norm", "final_norm", "final_layernorm") if name in children)
    gain = weight + 1.0 if "gemma" in subject.model.config.model_type else weight
    found: torch.Tensor = h * (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * gain
    return found


@pytest.mark.parametrize(
    ("family", "settings", "cap", "scale"),
    [
        ("llama", {}, None, 1.0),
        ("gemma2", {"final_logit_softcapping": 0.7}, 0.7, 1.0),
        ("recurrent_gemma", {"logits_soft_cap": 1.5}, 1.5, 1.0),
        ("granitemoehybrid", {"logits_scaling": 8.0}, None, 1 / 8),
        ("falcon_h1", {"lm_head_multiplier": 0.25}, None, 0.25),
    ],
)
def test_readout_by_hand(
    family: str, settings: dict[str, Any], cap: float | None, scale: float, tmp_path: Path
) -> None:
    subject = load(tmp_path, family, **settings)
    h = residuals(subject, TOKENS, [1])[1]
    wanted = norm(subject, h) @ subject.model.get_output_embeddings().weight.T * scale
    if cap:
        assert wanted.abs().max() > cap
        wanted = cap * torch.tanh(wanted / cap)
    torch.testing.assert_close(read_out(subject).logits(h), wanted, rtol=1e-4, atol=1e-5)


def test_readout_is_differentiable(llama: Subject) -> None:
    readout, h = read_out(llama), residuals(llama, TOKENS, [2])[2][0, 3]
    h.requires_grad_()
    direction = torch.randn(len(h), generator=torch.Generator().manual_seed(0)) / 10
    (gradient,) = torch.autograd.grad(readout.logits(h)[17], h)
    with torch.no_grad():
        difference = (readout.logits(h + 1e-2 * direction) - readout.logits(h - 1e-2 * direction))[17] / 2e-2
    assert float(gradient @ direction) == pytest.approx(float(difference), rel=1e-2)
    assert abs(float(difference)) > 1e-2


def test_the_unembedding_is_hashed_as_tuned_lens_does(llama: Subject) -> None:
    readout = read_out(llama)
    assert torch.equal(readout.unembedding, llama.model.lm_head.weight)
    printed = np.array_str(llama.model.lm_head.weight.detach().float().numpy(), precision=1)
    with np.printoptions(threshold=5, edgeitems=1, linewidth=20, suppress=True):
        assert readout.hash == hashlib.sha256(printed.encode()).hexdigest()
    assert "..." in printed


def test_logits_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    subject = load(tmp_path, "llama")
    subject.model.config.final_logit_softcapping = 0.5  # the model itself does not cap
    with pytest.raises(InputError, match=r"are not its final norm and head on its last block: they differ by up to"):
        read_out(subject)


def test_half_floats_read_out(tmp_path: Path) -> None:
    folder = toy_subject_model("mamba", tmp_path / "mamba")
    half = load_subject(str(folder), device="cpu", dtype="bfloat16")
    h = residuals(half, TOKENS, [2])[2]
    with torch.no_grad():
        logits = half.model(input_ids=TOKENS, use_cache=False).logits.float()
    assert h.dtype == torch.float32
    found = read_out(half).logits(h)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits, rtol=0.02, atol=0.02)
