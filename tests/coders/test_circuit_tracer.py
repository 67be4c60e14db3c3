"""circuit-tracer's transcoder sets against its transcoders' equations, written out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exegete.coders import inspect_coders, load_coder, load_coders
from exegete.coders.formats.circuit_tracer import CircuitTracer
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError

D, WIDTH, K = 16, 48, 5
CONFIG: dict[str, Any] = {
    "model_name": "meta-llama/Llama-3.2-1B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def state(*, skip: bool = False, threshold: bool = False) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.randn(WIDTH, D) / D**0.5,
        "W_dec": torch.randn(WIDTH, D) / WIDTH**0.5,
        "b_enc": torch.randn(WIDTH) * 0.3,
        "b_dec": torch.randn(D) * 0.3,
        **({"W_skip": torch.randn(D, D) / D**0.5} if skip else {}),
        **({"activation_function.threshold": torch.rand(WIDTH)} if threshold else {}),
    }


def written(folder: Path, tensors: dict[str, torch.Tensor], layer: int = 3, **changed: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"layer_{layer}.safetensors")
    config = {**CONFIG, **changed}
    (folder / "config.yaml").write_text(json.dumps({n: v for n, v in config.items() if v is not None}))


def loaded(folder: Path, hookpoint: str | None = None) -> LinearCoder:
    repository = LocalRepository(folder)
    (place,) = CircuitTracer().find(repository, "")
    info = CircuitTracer().inspect(repository, place)
    at = hookpoint or place.hookpoint
    assert at is not None
    coder = CircuitTracer().load(repository, place, name="c", hookpoint=at, device="cpu", dtype=torch.float32)
    assert (info.side, info.target, info.k, info.architecture, info.base_model) == (
        coder.side,
        coder.target,
        coder.k,
        coder.architecture,
        coder.base_model,
    )
    return coder


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_the_equations(tmp_path: Path, kind: str, skip: bool) -> None:
    tensors = state(skip=skip, threshold=kind == "jump_relu")
    written(tmp_path, tensors, activation=kind, k=K if kind == "topk" else None)
    coder = loaded(tmp_path)
    assert coder.point == ("blocks.3.mlp.hook_in", "output")
    assert coder.target == ("layers.3.mlp", "output")
    assert coder.skip_undecided is skip
    x = torch.randn(32, D)
    latents = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"]).relu()
    if kind == "jump_relu":
        latents = latents * (latents > tensors["activation_function.threshold"])
    if kind == "topk":
        latents = latents * torch.zeros_like(latents).scatter(1, latents.topk(K).indices, 1.0)
    wanted = latents @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"].T if skip else 0)
    code = coder.encode(x)
    assert int((torch.as_tensor(code.values) > 0).sum()) == int((latents > 0).sum()) < latents.numel()
    torch.testing.assert_close(coder.decode(code, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("hook", "model", "point", "norm"),
    [
        ("hook_resid_mid", "meta-llama/Llama-3.2-1B", ("layers.3.post_attention_layernorm", "input"), "none"),
        ("hook_resid_mid", "google/gemma-2-2b", ("layers.3.pre_feedforward_layernorm", "input"), "none"),
        ("hook_resid_mid", "gpt2", ("h.3.ln_2", "input"), "none"),
        ("ln2.hook_normalized", "google/gemma-2-2b", ("layers.3.pre_feedforward_layernorm", "input"), "rms_norm"),
        ("ln2.hook_normalized", "Qwen/Qwen3-4B", ("layers.3.post_attention_layernorm", "input"), "rms_norm"),
        ("mlp.hook_in", "google/gemma-3-4b-it", ("blocks.3.mlp.hook_in", "output"), "none"),
    ],
)
def test_what_hooks_read(tmp_path: Path, hook: str, model: str, point: tuple[str, str], norm: str) -> None:
    written(tmp_path, state(), model_name=model, feature_input_hook=hook, feature_output_hook="hook_mlp_out")
    coder = loaded(tmp_path)
    assert (coder.point, coder.input_norm) == (point, norm)
    assert coder.target == ("blocks.3.hook_mlp_out", "output")


def test_the_skip_of_a_normed_input_is_of_the_norm(tmp_path: Path) -> None:
    tensors = state(skip=True)
    hooks: dict[str, Any] = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    written(tmp_path, tensors, model_name="google/gemma-2-2b", **hooks)
    coder, x = loaded(tmp_path), torch.randn(8, D) * 7
    normed = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    latents = (normed @ tensors["W_enc"].T + tensors["b_enc"]).relu()
    wanted = latents @ tensors["W_dec"] + tensors["b_dec"] + normed @ tensors["W_skip"].T
    torch.testing.assert_close(coder.decode(coder.encode(x), x), wanted, atol=1e-5, rtol=1e-5)


def test_an_unknown_model_needs_a_hookpoint_and_says_which(tmp_path: Path) -> None:
    written(tmp_path, state(), model_name="new-model", feature_input_hook="ln2.hook_normalized")
    repository = LocalRepository(tmp_path)
    (place,) = CircuitTracer().find(repository, "")
    assert place.hookpoint is None
    assert "must be the RMSNorm in front of the MLP" in CircuitTracer().inspect(repository, place).notes[0]
    coder = loaded(tmp_path, "layers.3.norm2")
    assert (coder.point, coder.input_norm) == (("layers.3.norm2", "input"), "rms_norm")


def test_all_layers_of_a_set_are_loaded(tmp_path: Path) -> None:
    for layer in (10, 2):
        written(tmp_path, state(), layer)
    coders = load_coders(str(tmp_path))
    assert list(coders) == ["blocks.2.mlp.hook_in", "blocks.10.mlp.hook_in"]
    assert load_coder(f"{tmp_path}:layer_10.safetensors").hash == coders["blocks.10.mlp.hook_in"].hash
    assert len(inspect_coders(str(tmp_path))) == 2


def test_a_set_is_found_in_natural_order_also_in_a_subfolder(tmp_path: Path) -> None:
    for layer in (10, 2):
        written(tmp_path / "sets" / "width_16k_l0_small", state(), layer)
    places = CircuitTracer().find(LocalRepository(tmp_path), "sets")
    assert [(p.hookpoint, p.label) for p in places] == [
        ("blocks.2.mlp.hook_in", "width_16k_l0_small"),
        ("blocks.10.mlp.hook_in", "width_16k_l0_small"),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"model_kind": "cross_layer_transcoder"}, InputError, "only a transcoder_set can be read"),
        ({"model_kind": "something"}, InputError, "only a transcoder_set can be read"),
        ({"activation": "gelu"}, InputError, "activation 'gelu'"),
        ({"activation": "jump_relu"}, InputError, "its weights are without thresholds"),
        ({"activation": "topk"}, InputError, "k as a whole number"),
        ({"activation": "topk", "k": WIDTH + 1}, InputError, "between 1 and its width"),
        ({"feature_output_hook": None}, InputError, "feature_input_hook and feature_output_hook"),
        ({"feature_input_hook": 3}, InputError, "feature_input_hook as text"),
        ({"model_name": "gpt2", "feature_input_hook": "ln2.hook_normalized"}, InputError, "cannot be read"),
    ],
)
def test_bad_settings(tmp_path: Path, changed: dict[str, Any], error: type[ExegeteError], match: str) -> None:
    written(tmp_path, state(), **changed)
    with pytest.raises(error, match=match):
        loaded(tmp_path)


def test_lists_of_files_elsewhere_are_named(tmp_path: Path) -> None:
    listed = ["hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz"]
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "transcoders": listed}))
    with pytest.raises(NotFoundError, match=f"load those themselves, such as {listed[0]}"):
        loaded(tmp_path)


def test_weights_without_settings(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "layer_0.safetensors")
    repository = LocalRepository(tmp_path)
    (place,) = CircuitTracer().find(repository, "")
    with pytest.raises(NotFoundError, match=r"there is no .*config\.yaml, only weights"):
        CircuitTracer().inspect(repository, place)
    (tmp_path / "cfg.json").write_text("{}")
    assert CircuitTracer().find(LocalRepository(tmp_path), "") == ()


def test_cross_layer_files_are_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "model_kind": "cross_layer_transcoder"}))
    for name in ("W_enc_0.safetensors", "W_dec_0.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="cross_layer_transcoder"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"W_enc": torch.ones(3)}, r"no transcoder \[width, d_in\]"),
        ({"log_thresholds": torch.zeros(WIDTH)}, "no transcoder"),
        ({"b_enc": torch.zeros(3)}, r"b_enc has shape \[3\]"),
        ({"b_dec": torch.full((D,), torch.nan)}, "b_dec holds NaN"),
        ({"W_skip": torch.ones(D, 3)}, r"W_skip has shape \[16, 3\]"),
    ],
)
def test_damaged_weights(tmp_path: Path, tensors: dict[str, torch.Tensor], match: str) -> None:
    written(tmp_path, {**state(), **tensors})
    with pytest.raises(CorruptError, match=match):
        loaded(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[1]", "!!python/object/apply:os.mkdir [ran]", "a: [", "trainer: {}"])
def test_other_settings_are_left_alone(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(state(), tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(text)
    assert CircuitTracer().find(LocalRepository(tmp_path), "") == ()
    assert not (tmp_path / "ran").exists()
