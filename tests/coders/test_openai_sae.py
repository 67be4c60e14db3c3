"""OpenAI's coders against its model's equations, written out; the library itself is not on the package index."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.coders.formats.openai_sae import OpenAISae
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError
from exegete.subjects.names import expand

D, WIDTH, K = 16, 48, 5


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def written(top: Path, location: str, *, topk: bool, **changed: Any) -> dict[str, Any]:
    """Write what the library's ``state_dict`` returns."""
    state: dict[str, Any] = OrderedDict(
        {
            "pre_bias": torch.randn(D) * 0.3,
            "latent_bias": torch.randn(WIDTH) * 0.3,
            "stats_last_nonzero": torch.zeros(WIDTH, dtype=torch.long),
            "latents_activation_frequency": torch.ones(WIDTH),
            "latents_mean_square": torch.zeros(WIDTH),
            "encoder.weight": torch.randn(WIDTH, D) / D**0.5,
            "decoder.weight": torch.randn(D, WIDTH) / WIDTH**0.5,
            "activation": "TopK" if topk else "ReLU",
            "activation_state_dict": OrderedDict({"k": K, "postact_fn": "ReLU"} if topk else {}),
        }
    )
    state.update(changed)
    path = top / "gpt2-small" / location / "autoencoders/6.pt"
    path.parent.mkdir(parents=True)
    torch.save(OrderedDict({n: v for n, v in state.items() if v is not None}), path)
    return state


def loaded(folder: Path) -> LinearCoder:
    repository = LocalRepository(folder)
    (place,) = OpenAISae().find(repository, "")
    info = OpenAISae().inspect(repository, place)
    options: dict[str, Any] = {"hookpoint": place.hookpoint or "h.6", "device": "cpu", "dtype": torch.float32}
    coder = OpenAISae().load(repository, place, name="c", **options)
    assert (info.side, info.k, info.width, info.d_in, info.architecture, info.base_model) == (
        coder.side,
        coder.k,
        coder.width,
        coder.d_in,
        coder.architecture,
        coder.base_model,
    )
    return coder


@pytest.mark.parametrize("topk", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_published_equations(tmp_path: Path, topk: bool, tied: bool) -> None:
    changed: dict[str, Any] = {}
    if tied:
        linear = torch.randn(WIDTH, D) / D**0.5
        changed = {"encoder.weight": linear, "decoder.linear.weight": linear, "decoder.weight": None}
    state = written(tmp_path, "resid_post_mlp_v5_32k", topk=topk, **changed)
    coder = loaded(tmp_path)
    x = torch.randn(32, D) * 3 + 1
    mean, spread = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    normed = (x - mean) / (spread + 1e-5) if topk else x
    latents = (normed - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    if topk:
        best = latents.topk(K)
        latents = torch.zeros_like(latents).scatter(1, best.indices, best.values)
    latents = latents.relu()
    decoder = state["encoder.weight"] if tied else state["decoder.weight"].T
    wanted = latents @ decoder + state["pre_bias"]
    wanted = wanted * spread + mean if topk else wanted
    code = coder.encode(x)
    dense = torch.zeros(32, WIDTH)
    if topk:
        dense.scatter_(1, torch.as_tensor(code.indices).long(), torch.as_tensor(code.values))
    else:
        row = torch.repeat_interleave(torch.arange(32), torch.as_tensor(code.offsets).diff())
        dense[row, torch.as_tensor(code.indices).long()] = torch.as_tensor(code.values)
    assert torch.equal(dense > 0, latents > 0)
    torch.testing.assert_close(dense, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coder.decode(code, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("location", "point", "label"),
    [
        ("mlp_post_act", ("h.6.mlp.c_proj", "input"), ""),
        ("resid_delta_mlp_v4", ("h.6.mlp", "output"), "v4"),
        ("resid_delta_attn_v5_128k", ("h.6.attn", "output"), "v5_128k"),
        ("resid_post_attn_v5_32k", ("h.6.ln_2", "input"), "v5_32k"),
        ("resid_post_mlp_v5_32k", ("h.6", "output"), "v5_32k"),
    ],
)
def test_locations_in_gpt2(tmp_path: Path, location: str, point: tuple[str, str], label: str) -> None:
    from transformers import GPT2Config, GPT2Model

    written(tmp_path, location, topk=True)
    (place,) = OpenAISae().find(LocalRepository(tmp_path), "")
    assert place.label == label
    coder = loaded(tmp_path)
    model = GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=7, vocab_size=5, n_positions=4))
    names = [name for name, _ in model.named_modules() if name]
    assert expand(coder.hookpoint, names, side=coder.side) == (point,)
    assert coder.base_model == "gpt2"


def test_an_unknown_location_needs_a_hookpoint(tmp_path: Path) -> None:
    written(tmp_path, "somewhere", topk=True)
    (place,) = OpenAISae().find(LocalRepository(tmp_path), "")
    assert place.hookpoint is None
    assert loaded(tmp_path).point == ("h.6", "output")


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"activation": "Identity"}, InputError, "activation 'Identity'; allowed: ReLU, TopK"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, InputError, "'Identity' after TopK"),
        ({"activation_state_dict": {"k": 0, "postact_fn": "ReLU"}}, InputError, "k as a whole number"),
        ({"activation_state_dict": {"k": WIDTH + 1}}, InputError, "between 1 and its width"),
        ({"latent_bias": torch.zeros(3)}, CorruptError, r"latent_bias has shape \[3\]"),
        ({"encoder.weight": None}, CorruptError, r"lacks encoder\.weight"),
        ({"pre_bias": torch.full((D,), torch.inf)}, CorruptError, "pre_bias holds NaN or infinity"),
    ],
)
def test_bad_files(tmp_path: Path, changed: dict[str, Any], error: type[ExegeteError], match: str) -> None:
    written(tmp_path, "resid_post_mlp_v5_32k", topk=True, **changed)
    with pytest.raises(error, match=match):
        loaded(tmp_path)


class Runs:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    written(tmp_path, "resid_post_mlp_v5_32k", topk=True, activation=Runs(tmp_path / "ran"))
    with pytest.raises(InputError, match="could run code"):
        loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("trainer_0/ae.pt", "layer3.sae.pt", "autoencoders/last.pt", "autoencoders/3.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert OpenAISae().find(LocalRepository(tmp_path), "") == ()
