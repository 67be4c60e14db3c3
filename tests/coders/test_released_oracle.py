"""What SAELens's converters make of released files is what we must make of them; its downloads come from a folder."""

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

from exegete.coders.coder import SparseCoder
from exegete.coders.formats.circuit_tracer import CircuitTracer
from exegete.coders.formats.format import CoderFormat, CoderInfo
from exegete.coders.formats.gemma_scope import GemmaScope
from exegete.coders.formats.gemma_scope_2 import GemmaScope2
from exegete.coders.formats.goodfire import Goodfire
from exegete.coders.formats.llama_scope import LlamaScope
from exegete.coders.formats.qwen_scope import QwenScope
from exegete.coders.repository import LocalRepository

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from transformer_lens import HookedTransformerConfig, components

D, WIDTH = 16, 48


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # SAELens warns that the model of a coder should be loaded with options; no model is loaded here.
        warnings.filterwarnings("ignore", message="(?s).*non-empty model_from_pretrained_kwargs")
        torch.manual_seed(0)
        yield


def weights(d: int = D, width: int = WIDTH) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.randn(d, width) / d**0.5,
        "W_dec": torch.randn(width, d) / width**0.5,
        "b_enc": torch.randn(width) * 0.3,
        "b_dec": torch.randn(d) * 0.3,
        "threshold": torch.rand(width) * 0.5,
    }


def served(monkeypatch: pytest.MonkeyPatch, hub: Path, repository: str) -> Path:
    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = hub / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        header = LocalRepository(hub / repo_id).header(filename)
        return {name: list(info.shape) for name, info in header.items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    folder = hub / repository
    folder.mkdir(parents=True)
    return folder


def theirs(converter: str, repository: str, path: str, scale: float | None = None, **overrides: Any) -> Any:
    """Build the coder as SAELens's ``from_pretrained`` does once it has a converter's settings and weights."""
    overrides = {"dtype": "float32", "device": "cpu", **overrides}
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[converter]
    config, state, _ = loader(repo_id=repository, folder_name=path, device="cpu", cfg_overrides=overrides)
    config = loaders.handle_config_defaulting(config)
    made = SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    coder = SAE.get_sae_class_for_architecture(made.architecture())(made)
    coder.process_state_dict_for_loading(state)
    coder.load_state_dict(state)
    if scale is not None:
        coder.fold_activation_norm_scaling_factor(scale)
    coder.turn_off_forward_pass_hook_z_reshaping()  # heads come flattened here
    return coder.float()


def ours(reader: CoderFormat, folder: Path, index: int = 0) -> tuple[CoderInfo, SparseCoder]:
    repository = LocalRepository(folder)
    place = reader.find(repository, "")[index]
    info = reader.inspect(repository, place)
    assert place.hookpoint == info.hookpoint
    assert place.hookpoint is not None
    options: dict[str, Any] = {"hookpoint": place.hookpoint, "device": "cpu", "dtype": torch.float32}
    coder = reader.load(repository, place, name="mine", **options)
    assert (coder.hookpoint, coder.side, coder.d_in, coder.d_out, coder.width, coder.k, coder.base_model) == (
        info.hookpoint,
        info.side,
        info.d_in,
        info.d_out,
        info.width,
        info.k,
        info.base_model,
    )
    assert (coder.target if coder.target != coder.point else None) == info.target
    assert coder.architecture == info.architecture
    assert info.format == reader.name
    return info, coder


def same(coder: SparseCoder, oracle: Any, x: torch.Tensor, read: torch.Tensor | None = None) -> None:
    """Compare codes and reconstructions; ``read`` is what the oracle reads, where the coder norms its input itself."""
    read = x if read is None else read
    with torch.no_grad():
        latents = oracle.encode(read)
        wanted = oracle.decode(latents)
        if "W_skip" in dict(oracle.named_parameters()):
            wanted = wanted + read @ oracle.W_skip.T
    code = coder.encode(x)
    dense = torch.zeros(len(x), coder.width)
    if code.offsets is None:
        dense.scatter_(1, torch.as_tensor(code.indices).long(), torch.as_tensor(code.values))
    else:
        row = torch.repeat_interleave(torch.arange(len(x)), torch.as_tensor(code.offsets).diff())
        dense[row, torch.as_tensor(code.indices).long()] = torch.as_tensor(code.values)
    assert 0 < int((latents > 0).sum()) < latents.numel()
    torch.testing.assert_close(dense > 0, latents > 0)
    torch.testing.assert_close(dense, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coder.decode(code, x), wanted, atol=1e-5, rtol=1e-5)


def npz(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("kind", "hookpoint", "lower"),
    [
        ("2b-pt-res", "blocks.7.hook_resid_post", False),
        ("9b-it-mlp", "blocks.7.hook_mlp_out", True),
        ("2b-pt-att", "blocks.7.attn.hook_z", False),
    ],
)
def test_gemma_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hookpoint: str, lower: bool) -> None:
    repository, path = f"google/gemma-scope-{kind}", "layer_7/width_16k/average_l0_71"
    folder = served(monkeypatch, tmp_path, repository)
    tensors = weights()
    npz(folder / path / "params.npz", {n.lower() if lower and n[0] == "W" else n: t for n, t in tensors.items()})
    info, coder = ours(GemmaScope(), folder)
    oracle = theirs("gemma_2", repository, path, d_in=D, d_sae=WIDTH)
    assert (info.hookpoint, info.target) == (hookpoint, None)
    assert oracle.cfg.metadata.hook_name == hookpoint
    assert info.base_model == f"google/{oracle.cfg.metadata.model_name}"
    same(coder, oracle, torch.randn(32, D))


def test_gemma_scope_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, path = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    folder = served(monkeypatch, tmp_path, repository)
    # SAELens leaves b_dec in the scale of the raw embeddings; a coder whose b_dec is 0 is the same either way.
    npz(folder / path / "params.npz", {**weights(), "b_dec": torch.zeros(D)})
    info, coder = ours(GemmaScope(), folder)
    oracle = theirs("gemma_2", repository, path, d_in=D, d_sae=WIDTH)
    assert info.hookpoint == oracle.cfg.metadata.hook_name == "hook_embed"
    same(coder, oracle, torch.randn(32, D) * D**0.5)


def test_gemma_scope_transcoder_reads_the_residual_stream_and_norms_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, path = "google/gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_71"
    folder = served(monkeypatch, tmp_path, repository)
    npz(folder / path / "params.npz", weights())
    info, coder = ours(GemmaScope(), folder)
    oracle = theirs("gemma_2_transcoder", repository, path, d_in=D, d_out=D, d_sae=WIDTH)
    assert oracle.cfg.metadata.hook_name == "blocks.7.ln2.hook_normalized"
    assert (info.hookpoint, info.side) == ("layers.7.pre_feedforward_layernorm", "input")
    assert info.target == (oracle.cfg.metadata.hook_name_out, "output")
    assert any("gain" in note for note in info.notes)
    x = torch.randn(32, D) * torch.logspace(-3, 2, 32).unsqueeze(1)
    config = HookedTransformerConfig(n_layers=1, d_model=D, n_ctx=8, d_head=8, d_vocab=8, act_fn="gelu", eps=1e-6)
    norm = vars(components)["RMSNorm"](config)
    norm.w.data = torch.randn(D)
    read: list[torch.Tensor] = []
    norm.hook_normalized.register_forward_hook(lambda *args: read.append(args[2]))
    norm(x)
    same(coder, oracle, x, read[0])


NORMED = "layers.9.post_feedforward_layernorm"
GEMMA_2_SITES = [
    ("resid_post", "layers.9", "output", None, False),
    ("attn_out_all", "layers.9.self_attn.o_proj", "input", None, False),
    ("mlp_out", NORMED, "output", None, False),
    ("transcoder_all", "layers.9.pre_feedforward_layernorm", "output", NORMED, False),
    ("transcoder", "layers.9.pre_feedforward_layernorm", "output", NORMED, True),
]


@pytest.mark.parametrize("settings", [True, False])
@pytest.mark.parametrize(("site", "hookpoint", "side", "target", "affine"), GEMMA_2_SITES)
def test_gemma_scope_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    site: str,
    hookpoint: str,
    side: str,
    target: str | None,
    affine: bool,
    settings: bool,
) -> None:
    repository = "google/gemma-scope-2-1b-it"
    folder = served(monkeypatch, tmp_path, repository)
    path = f"{site}/layer_9_width_16k_l0_medium{'_affine' if affine else ''}"
    tensors = {n.lower(): t for n, t in weights().items()}
    if affine:
        tensors["affine_skip_connection"] = torch.randn(D, D) / D**0.5
    (folder / path).mkdir(parents=True)
    save_file(tensors, folder / path / "params.safetensors")
    if settings:
        hooks: dict[str, Any] = {"hf_hook_point_in": f"model.{hookpoint}.{side}"}
        if target:
            hooks |= {"hf_hook_point_out": f"model.{target}.output", "affine_connection": affine}
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-it", "width": WIDTH, "l0": 60, **hooks}
        (folder / path / "config.json").write_text(json.dumps(config))
    info, coder = ours(GemmaScope2(), folder)
    oracle = theirs("gemma_3", repository, path)
    assert (info.hookpoint, info.side) == (hookpoint, side)
    assert info.target == (None if target is None else (target, "output"))
    assert info.base_model == oracle.cfg.metadata.model_name == "google/gemma-3-1b-it"
    same(coder, oracle, torch.randn(32, D))


def llama_scope(folder: Path, settings: dict[str, Any], name: str = "Llama3_1-8B-Base-L15R-8x") -> dict[str, Any]:
    tensors = weights()
    where = folder / name / "checkpoints"
    where.mkdir(parents=True)
    # OpenMOSS's own code divides thresholds by the norms of decoder rows, SAELens takes these to be 1.
    tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "decoder.bias": tensors["b_dec"],
    }
    save_file(state, where / "final.safetensors")
    config = {
        "d_model": D,
        "d_sae": WIDTH,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "jump_relu_threshold": 0.25,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        **settings,
    }
    (folder / name / "hyperparams.json").write_text(json.dumps(config))
    return config


def test_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, path = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    folder = served(monkeypatch, tmp_path, repository)
    hook = "blocks.15.hook_resid_post"
    norms = {"in": 2.5, "out": 2.5}
    llama_scope(folder, {"hook_point_in": hook, "hook_point_out": hook, "dataset_average_activation_norm": norms})
    info, coder = ours(LlamaScope(), folder)
    oracle = theirs("llama_scope", repository, path, scale=D**0.5 / 2.5)
    assert info.hookpoint == oracle.cfg.metadata.hook_name == hook
    assert info.base_model == oracle.cfg.metadata.model_name
    same(coder, oracle, torch.randn(32, D) * 0.6)


def test_llama_scope_of_the_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, path = "fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L5R"
    folder = served(monkeypatch, tmp_path, repository)
    tensors, hook = weights(), "blocks.5.hook_resid_post"
    (folder / path).mkdir(parents=True)
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "decoder.bias": tensors["b_dec"],
        "log_jumprelu_threshold": tensors["threshold"].log(),
        f"dataset_average_activation_norm.{hook}": torch.tensor(2.5),
    }
    save_file(state, folder / path / "sae_weights.safetensors")
    config = {"d_model": D, "expansion_factor": 3, "hook_point_in": hook, "sparsity_include_decoder_norm": False}
    (folder / path / "config.json").write_text(json.dumps(config))
    info, coder = ours(LlamaScope(), folder)
    oracle = theirs("llama_scope_r1_distill", repository, path, scale=D**0.5 / 2.5)
    assert (info.hookpoint, info.base_model) == (hook, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    same(coder, oracle, torch.randn(32, D) * 0.6)


@pytest.mark.parametrize(
    ("converter", "repository", "path", "spelling"),
    [
        ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear"),
        (
            "deepseek_r1",
            "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
            "",
        ),
    ],
)
def test_single_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converter: str, repository: str, path: str, spelling: str
) -> None:
    folder = served(monkeypatch, tmp_path, repository)
    tensors = weights()
    state = {
        f"encoder{spelling}.weight": tensors["W_enc"].T.contiguous(),
        f"encoder{spelling}.bias": tensors["b_enc"],
        f"decoder{spelling}.weight": tensors["W_dec"].T.contiguous(),
        f"decoder{spelling}.bias": tensors["b_dec"],
    }
    torch.save(state, folder / path)
    info, coder = ours(Goodfire(), folder)
    oracle = theirs(converter, repository, path, d_in=D, d_sae=WIDTH)
    assert info.hookpoint == oracle.cfg.metadata.hook_name == "blocks.19.hook_resid_post"
    assert info.base_model == oracle.cfg.metadata.model_name
    same(coder, oracle, torch.randn(32, D))


def test_qwen_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    folder = served(monkeypatch, tmp_path, repository)
    tensors = weights()
    state = {
        "W_enc": tensors["W_enc"].T.contiguous(),
        "W_dec": tensors["W_dec"].T.contiguous(),
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
    }
    for layer in (0, 10, 2):
        torch.save(state, folder / f"layer{layer}.sae.pt")
    info, coder = ours(QwenScope(), folder, index=1)
    oracle = theirs("qwen_scope", repository, "layer2.sae.pt", d_in=D, d_sae=WIDTH)
    assert info.hookpoint == oracle.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert (info.k, info.base_model) == (5, oracle.cfg.metadata.model_name)
    same(coder, oracle, torch.randn(32, D))


@pytest.mark.parametrize("config", [True, False])
def test_circuit_tracer_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: bool) -> None:
    repository = "mwhanna/qwen3-0.6b-transcoders-lowl0" if config else "mwhanna/qwen3-14b-transcoders"
    folder = served(monkeypatch, tmp_path, repository)
    tensors = weights()
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    del tensors["threshold"]
    for layer in (0, 1, 10):
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    values = {"d_model": {"value": D}, "d_feature": {"value": WIDTH}, "batch_size": {"value": 8}}
    (folder / "wandb-config.yaml").write_text(json.dumps(values))
    if config:
        settings = {
            "model_name": "Qwen/Qwen3-0.6B",
            "model_kind": "transcoder_set",
            "feature_input_hook": "mlp.hook_in",
            "feature_output_hook": "mlp.hook_out",
        }
        (folder / "config.yaml").write_text(json.dumps(settings))
    info, coder = ours(CircuitTracer(), folder, index=2)
    oracle = theirs("mwhanna_transcoder", repository, "layer_10.safetensors")
    assert info.hookpoint == oracle.cfg.metadata.hook_name == "blocks.10.mlp.hook_in"
    assert info.target == ("layers.10.mlp", "output")
    assert info.base_model == oracle.cfg.metadata.model_name
    same(coder, oracle, torch.randn(32, D))
