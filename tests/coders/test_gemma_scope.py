"""Gemma Scope 1 and 2 in folders: what is found, what is refused, and that points exist in the models themselves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exegete.coders.formats.format import CoderFormat
from exegete.coders.formats.gemma_scope import GemmaScope
from exegete.coders.formats.gemma_scope_2 import GemmaScope2
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError
from exegete.subjects.names import expand

D, WIDTH = 16, 48


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def weights(seed: int = 0, d: int = D) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d, WIDTH, generator=draw) / d**0.5,
        "W_dec": torch.randn(WIDTH, d, generator=draw) / WIDTH**0.5,
        "b_enc": torch.randn(WIDTH, generator=draw) * 0.3,
        "b_dec": torch.randn(d, generator=draw) * 0.3,
        "threshold": torch.rand(WIDTH, generator=draw) * 0.5,
    }


def one(path: Path, **changed: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{n: t.numpy() for n, t in {**weights(), **changed}.items() if t is not None})


def two(folder: Path, config: dict[str, Any] | None = None, **changed: torch.Tensor | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**{n.lower(): t for n, t in weights().items()}, **changed}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def loaded(reader: CoderFormat, folder: Path, hookpoint: str | None = None) -> LinearCoder:
    repository = LocalRepository(folder)
    (place,) = reader.find(repository, "")
    at = hookpoint or place.hookpoint
    assert at is not None
    coder = reader.load(repository, place, name="c", hookpoint=at, device="cpu", dtype=torch.float32)
    assert isinstance(coder, LinearCoder)
    return coder


def refused(reader: CoderFormat, folder: Path, error: type[ExegeteError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        loaded(reader, folder)
    assert "\n" not in str(caught.value)


def test_a_repository_of_many_is_listed_by_names_alone(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res"
    for path in ("layer_10/width_16k/average_l0_71", "layer_2/width_16k/average_l0_100", "layer_2/width_65k/canonical"):
        (folder / path).mkdir(parents=True)
        (folder / path / "params.npz").write_bytes(b"never read")
    (folder / "embedding/width_4k/average_l0_6").mkdir(parents=True)
    (folder / "embedding/width_4k/average_l0_6/params.npz").touch()
    places = GemmaScope().find(LocalRepository(folder), "")
    assert [(p.hookpoint, p.label) for p in places] == [
        ("hook_embed", "width_4k/average_l0_6"),
        ("blocks.2.hook_resid_post", "width_16k/average_l0_100"),
        ("blocks.2.hook_resid_post", "width_65k/canonical"),
        ("blocks.10.hook_resid_post", "width_16k/average_l0_71"),
    ]
    assert len(GemmaScope().find(LocalRepository(folder), "layer_2")) == 2
    inner = LocalRepository(folder / "layer_10/width_16k/average_l0_71")
    assert [p.hookpoint for p in GemmaScope().find(inner, "")] == ["blocks.10.hook_resid_post"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it"),
        ("models--google--gemma-scope-27b-pt-res/snapshots/0a", "google/gemma-2-27b"),
    ],
)
def test_the_model_is_in_the_name(tmp_path: Path, name: str, model: str) -> None:
    one(tmp_path / name / "layer_1/width_16k/average_l0_7/params.npz")
    assert loaded(GemmaScope(), tmp_path / name).base_model == model


def test_a_file_without_a_name_needs_a_hookpoint(tmp_path: Path) -> None:
    one(tmp_path / "plain" / "params.npz")
    repository = LocalRepository(tmp_path / "plain")
    (place,) = GemmaScope().find(repository, "")
    info = GemmaScope().inspect(repository, place)
    assert (place.hookpoint, info.hookpoint, info.base_model) == (None, None, None)
    assert "no folder is named" in info.notes[0]
    coder = loaded(GemmaScope(), tmp_path / "plain", "layers.3")
    assert (coder.point, coder.target) == (("layers.3", "output"), ("layers.3", "output"))


def test_a_transcoder_without_a_layer_takes_that_of_its_hookpoint(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-transcoders"
    one(folder / "params.npz")
    coder = loaded(GemmaScope(), folder, "layers.3.pre_feedforward_layernorm")
    assert coder.target == ("blocks.3.hook_mlp_out", "output")
    with pytest.raises(InputError, match="neither its folder nor 'norm' names"):
        loaded(GemmaScope(), folder, "norm")


def test_embeddings_are_scaled_as_the_model_scales_them(tmp_path: Path) -> None:
    one(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6/params.npz")
    coder, w, x = loaded(GemmaScope(), tmp_path), weights(), torch.randn(8, D)
    pre = x @ w["W_enc"] + w["b_enc"]
    wanted = (pre.relu() * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"]) * D**0.5
    torch.testing.assert_close(coder.decode(coder.encode(x * D**0.5)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"threshold": None}, "lacks threshold; it has W_dec"),
        ({"b_enc": torch.zeros(WIDTH + 1)}, r"b_enc has shape \[49\]"),
        ({"W_enc": torch.zeros(D)}, r"expected \[d_in, width\]"),
        ({"W_dec": torch.full((WIDTH, D), torch.nan)}, "W_dec holds NaN"),
        ({"b_dec": torch.zeros(D, dtype=torch.int64)}, "not floating point"),
    ],
)
def test_damaged_files(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    one(tmp_path / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_7/params.npz", **changed)
    refused(GemmaScope(), tmp_path, CorruptError, match)


def test_a_scaling_factor_is_refused_unless_it_is_one(tmp_path: Path) -> None:
    path = tmp_path / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_7/params.npz"
    one(path, scaling_factor=torch.ones(WIDTH))
    assert loaded(GemmaScope(), tmp_path).width == WIDTH
    one(path, scaling_factor=torch.full((WIDTH,), 2.0))
    refused(GemmaScope(), tmp_path, InputError, "scaling_factor")


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_7/params.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, W_enc=np.array([{"code": 1}], dtype=object), allow_pickle=True)
    refused(GemmaScope(), tmp_path, CorruptError, "damaged")


SETTINGS = {
    "architecture": "jump_relu",
    "model_name": "gemma-v3-270m-pt",
    "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
    "affine_connection": True,
}
SKIP = torch.randn(D, D, generator=torch.Generator().manual_seed(5))


def test_labels_of_the_second_suite(tmp_path: Path) -> None:
    for name in ("resid_post/layer_9_width_16k_l0_small", "resid_post_all/layer_10_width_16k_l0_small"):
        two(tmp_path / name)
    two(tmp_path / "transcoder_all/layer_9_width_262k_l0_big_affine", SETTINGS, affine_skip_connection=SKIP)
    (tmp_path / "clt/width_262k_l0_medium").mkdir(parents=True)
    (tmp_path / "clt/width_262k_l0_medium/params_layer_0.safetensors").touch()
    places = GemmaScope2().find(LocalRepository(tmp_path), "")
    assert {(p.hookpoint, p.label) for p in places} == {
        ("layers.9", "resid_post/width_16k_l0_small"),
        ("layers.10", "resid_post_all/width_16k_l0_small"),
        ("layers.9.pre_feedforward_layernorm", "transcoder_all/width_262k_l0_big_affine"),
    }
    repository = LocalRepository(tmp_path)
    (place,) = GemmaScope2().find(repository, "clt")
    with pytest.raises(InputError, match="coder across layers"):
        GemmaScope2().inspect(repository, place)


def test_skip_connection_is_undecided_and_the_model_has_its_name_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "transcoder_all/layer_9_width_16k_l0_big_affine"
    two(folder, SETTINGS, affine_skip_connection=SKIP)
    coder = loaded(GemmaScope2(), folder)
    assert coder.base_model == "google/gemma-3-270m"
    assert coder.skip_undecided
    assert coder.skip is not None
    torch.testing.assert_close(coder.skip, SKIP.T)
    info = GemmaScope2().inspect(LocalRepository(folder), GemmaScope2().find(LocalRepository(folder), "")[0])
    assert info.notes
    assert info.architecture == coder.architecture == "jumprelu skip transcoder"


def test_settings_decide_what_an_unknown_folder_reads(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere/layer_9_width_16k_l0_big"
    two(folder, {"architecture": "jump_relu", "hf_hook_point_in": "model.language_model.layers.9.mlp.output"})
    assert loaded(GemmaScope2(), tmp_path).point == ("layers.9.mlp", "output")


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({**SETTINGS, "architecture": "topk"}, InputError, "architecture 'topk'; allowed: jump_relu"),
        ({**SETTINGS, "affine_connection": False}, CorruptError, "disagree about affine_skip_connection"),
        ({**SETTINGS, "affine_connection": "yes"}, InputError, "affine_connection as true or false"),
        ({**SETTINGS, "hf_hook_point_in": "model.layers.8.output"}, InputError, "its folder is of layer 9"),
        ({**SETTINGS, "hf_hook_point_in": "nonsense"}, InputError, "names the hook 'nonsense'"),
        ([1], CorruptError, "does not hold settings"),
    ],
)
def test_bad_settings(tmp_path: Path, config: Any, error: type[ExegeteError], match: str) -> None:
    two(tmp_path / "transcoder/layer_9_width_16k_l0_big_affine", config, affine_skip_connection=SKIP)
    refused(GemmaScope2(), tmp_path, error, match)


def test_weights_missing_or_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "resid_post/layer_9_width_16k_l0_big"
    two(folder, {"architecture": "jump_relu"}, w_enc=None)
    refused(GemmaScope2(), tmp_path, CorruptError, "lacks w_enc")
    (folder / "params.safetensors").write_bytes(b"\xff" * 8)
    refused(GemmaScope2(), tmp_path, CorruptError, "damaged")
    (folder / "params.safetensors").unlink()
    refused(GemmaScope2(), tmp_path, NotFoundError, "copy the weights as well")


@pytest.mark.parametrize("deep", ["[" * 100_000, "x" * (2 << 20)])
def test_hostile_settings(tmp_path: Path, deep: str) -> None:
    folder = tmp_path / "odd/layer_9_width_16k_l0_big"
    two(folder)
    (folder / "config.json").write_text(deep)
    (place,) = GemmaScope2().find(LocalRepository(tmp_path), "")
    with pytest.raises(CorruptError):
        GemmaScope2().inspect(LocalRepository(tmp_path), place)


@pytest.mark.parametrize("reader", [GemmaScope(), GemmaScope2()])
def test_other_formats_are_left_alone(tmp_path: Path, reader: CoderFormat) -> None:
    (tmp_path / "layers.1").mkdir()
    for name in ("cfg.json", "sae.safetensors", "config.json", "layer_0.safetensors"):
        (tmp_path / "layers.1" / name).write_text("{}")
    assert reader.find(LocalRepository(tmp_path), "") == ()


def test_points_exist_in_the_models(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Gemma2Config, Gemma2Model
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Gemma2Model(Gemma2Config(vocab_size=11, num_hidden_layers=3, head_dim=8, **sizes)).eval()
    names = [name for name, _ in model.named_modules() if name]
    for kind in ("res", "mlp", "att", "transcoders"):
        one(tmp_path / kind / f"gemma-scope-2b-pt-{kind}/layer_2/width_16k/average_l0_7/params.npz")
    found = {}
    for kind in ("res", "mlp", "att", "transcoders"):
        coder = loaded(GemmaScope(), tmp_path / kind)
        found[kind] = (expand(coder.hookpoint, names, side=coder.side), expand(coder.target[0], names))
    assert {kind: read[0] for kind, (read, _) in found.items()} == {
        "res": ("layers.2", "output"),
        "mlp": ("layers.2.post_feedforward_layernorm", "output"),
        "att": ("layers.2.self_attn.o_proj", "input"),
        "transcoders": ("layers.2.pre_feedforward_layernorm", "input"),
    }
    assert found["transcoders"][1] == (("layers.2.post_feedforward_layernorm", "output"),)


def test_the_transcoder_reads_what_the_mlp_of_gemma_reads_before_the_gain(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    one(tmp_path / "gemma-scope-2b-pt-transcoders/layer_2/width_16k/average_l0_7/params.npz")
    coder, w = loaded(GemmaScope(), tmp_path), weights()
    norm = Gemma2RMSNorm(D, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(64, D) * torch.logspace(-3, 3, 64).unsqueeze(1)
    with torch.no_grad():
        pre = (norm(x) / (1 + norm.weight)) @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(coder.pre_activations(x), pre, atol=1e-4, rtol=1e-4)
    wanted = pre.relu() * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(coder.decode(coder.encode(x)), wanted, atol=1e-3, rtol=1e-3)
