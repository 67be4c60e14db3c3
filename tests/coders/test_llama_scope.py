"""Llama Scope against its authors' own steps, written out: fold the scales, norm the decoder, then compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders.formats.llama_scope import LlamaScope
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, ExegeteError, InputError, NotFoundError
from exegete.subjects import load_subject
from exegete.testing import toy_llama

D, WIDTH = 16, 48
FOLDER = "Llama3_1-8B-Base-L1{}-8x"


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def state(d: int = D) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": torch.randn(WIDTH, d) / d**0.5,
        "encoder.bias": torch.randn(WIDTH) * 0.3,
        "decoder.weight": torch.randn(d, WIDTH) * torch.rand(WIDTH).add(0.2) / d**0.5,
        "decoder.bias": torch.randn(d) * 0.3,
    }


def written(top: Path, kind: str = "TC", tensors: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    folder = top / FOLDER.format(kind)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(state() if tensors is None else tensors, folder / "checkpoints/final.safetensors")
    hooks = {"R": "hook_resid_post", "TC": "ln2.hook_normalized"}
    config = {
        "d_model": D,
        "d_sae": WIDTH,
        "hook_point_in": f"blocks.1.{hooks[kind]}",
        "hook_point_out": "blocks.1.hook_mlp_out" if kind == "TC" else f"blocks.1.{hooks[kind]}",
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": D**0.5, "out": 1.5} if kind == "TC" else {"in": 2.5, "out": 2.5},
        "jump_relu_threshold": 0.1,
        "sparsity_include_decoder_norm": True,
        **changed,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "hyperparams.json").write_text(text)
    return folder


def loaded(folder: Path) -> LinearCoder:
    repository = LocalRepository(folder)
    (place,) = LlamaScope().find(repository, "")
    assert place.hookpoint is not None
    coder = LlamaScope().load(repository, place, name="c", hookpoint=place.hookpoint, device="cpu", dtype=torch.float32)
    info = LlamaScope().inspect(repository, place)
    assert (info.hookpoint, info.side, info.architecture, info.d_in, info.width) == (
        coder.hookpoint,
        coder.side,
        coder.architecture,
        coder.d_in,
        coder.width,
    )
    return coder


def reference(
    folder: Path, x: torch.Tensor, *, include_norm: bool = True, subtract: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what fires and the reconstruction, in the raw space, from the files alone."""
    config = json.loads((folder / "hyperparams.json").read_text())
    w = load_file(folder / "checkpoints/final.safetensors")
    norms = config["dataset_average_activation_norm"]
    scale_in, scale_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
    encoder, bias = w["encoder.weight"], w["encoder.bias"] / scale_in
    decoder, decoder_bias = w["decoder.weight"] * scale_in / scale_out, w["decoder.bias"] / scale_out
    if include_norm:
        length = decoder.norm(dim=0)
        encoder, bias, decoder = encoder * length[:, None], bias * length, decoder / length
    hidden = (x - decoder_bias if subtract else x) @ encoder.T + bias
    hidden = hidden * (hidden > config["jump_relu_threshold"])
    return hidden > 0, hidden @ decoder.T + decoder_bias


def check(coder: LinearCoder, x: torch.Tensor, fires: torch.Tensor, wanted: torch.Tensor) -> None:
    code = coder.encode(x)
    found = torch.zeros(len(x), WIDTH, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(len(x)), torch.as_tensor(code.offsets).diff())
    found[row, torch.as_tensor(code.indices).long()] = True
    assert 0 < int(fires.sum()) < fires.numel()
    assert torch.equal(found, fires)
    torch.testing.assert_close(coder.decode(code, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_autoencoders(tmp_path: Path, include_norm: bool, subtract: bool) -> None:
    folder = written(
        tmp_path,
        "R",
        sparsity_include_decoder_norm=include_norm,
        apply_decoder_bias_to_pre_encoder=subtract,
    )
    coder = loaded(folder)
    assert (coder.hookpoint, coder.base_model) == ("blocks.1.hook_resid_post", "meta-llama/Llama-3.1-8B")
    x = torch.randn(64, D) * 0.6
    check(coder, x, *reference(folder, x, include_norm=include_norm, subtract=subtract))


def test_transcoders_norm_the_residual_stream_and_scale_their_output(tmp_path: Path) -> None:
    folder = written(tmp_path)
    coder = loaded(folder)
    assert coder.point == ("layers.1.post_attention_layernorm", "input")
    assert coder.target == ("blocks.1.hook_mlp_out", "output")
    x = torch.randn(64, D) * torch.logspace(-2, 2, 64).unsqueeze(1)
    normed = x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    check(coder, x, *reference(folder, normed))


def test_the_transcoder_reads_the_norm_of_a_llama(tmp_path: Path) -> None:
    subject = load_subject(str(toy_llama(tmp_path / "toy")), device="cpu")
    coder = loaded(written(tmp_path))
    assert subject.points(coder.hookpoint, coder.side) == (("layers.1.post_attention_layernorm", "input"),)
    assert subject.points(*coder.target) == (("layers.1.mlp", "output"),)


@pytest.mark.parametrize("where", ["settings", "by hook", "weights"])
def test_where_mean_norms_are_kept(tmp_path: Path, where: str) -> None:
    tensors = state()
    norms: dict[str, Any] = {"in": 2.5, "out": 2.5}
    first = loaded(written(tmp_path / "a", "R", tensors))
    if where == "by hook":
        norms = {"blocks.1.hook_resid_post": 2.5}
    if where == "weights":
        tensors["dataset_average_activation_norm.blocks.1.hook_resid_post"] = torch.tensor(2.5)
    kept = None if where == "weights" else norms
    again = loaded(written(tmp_path / "b", "R", tensors, dataset_average_activation_norm=kept))
    assert first.hash == again.hash


def test_thresholds_of_folded_and_trained_scales(tmp_path: Path) -> None:
    tensors = state()
    folded = loaded(written(tmp_path / "a", "R", tensors, norm_activation="inference"))
    lengths = tensors["decoder.weight"].norm(dim=0)
    torch.testing.assert_close(folded.encoder, tensors["encoder.weight"])
    torch.testing.assert_close(folded.activation.tensors["threshold"], 0.1 / lengths)
    own = {**tensors, "activation_function.log_jumprelu_threshold": torch.full((WIDTH,), -1.0)}
    coder = loaded(written(tmp_path / "b", "R", own))
    torch.testing.assert_close(coder.activation.tensors["threshold"], torch.tensor(-1.0).exp() / lengths)
    assert loaded(written(tmp_path / "c", "R", act_fn="relu")).architecture == "relu"
    assert loaded(written(tmp_path / "d", "R", act_fn="topk", top_k=5)).architecture == "jumprelu"
    without = {n: t for n, t in tensors.items() if n != "decoder.bias"}
    bare = loaded(written(tmp_path / "e", "R", without, use_decoder_bias=False))
    assert not bare.decoder_bias.any()


def test_labels_and_order(tmp_path: Path) -> None:
    repository = tmp_path / "fnlp/Llama3_1-8B-Base-LXR-8x"
    for layer in (10, 2):
        folder = repository / f"Llama3_1-8B-Base-L{layer}R-8x"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "hyperparams.json").write_text(
            json.dumps({"d_model": D, "hook_point_in": f"blocks.{layer}.hook_resid_post"})
        )
    places = LlamaScope().find(LocalRepository(repository), "")
    assert [(p.hookpoint, p.label) for p in places] == [
        ("blocks.2.hook_resid_post", "8x"),
        ("blocks.10.hook_resid_post", "8x"),
    ]
    with pytest.raises(NotFoundError, match="copy the weights as well"):
        LlamaScope().inspect(LocalRepository(repository), places[0])


def test_weights_without_settings(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "hyperparams.json").unlink()
    repository = LocalRepository(tmp_path)
    (place,) = LlamaScope().find(repository, "")
    assert place.hookpoint is None
    with pytest.raises(NotFoundError, match=r"there is no .*hyperparams\.json, only the weights"):
        LlamaScope().inspect(repository, place)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"act_fn": "gelu"}, InputError, "activation function 'gelu'; allowed: jumprelu, relu"),
        ({"act_fn": "topk", "jump_relu_threshold": 0}, InputError, "activation function 'topk'"),
        ({"jump_relu_threshold": "high"}, InputError, "jump_relu_threshold as a number"),
        ({"jump_relu_threshold": float("inf")}, InputError, "jump_relu_threshold as a number"),
        ({"norm_activation": "token-wise"}, InputError, "norm_activation 'token-wise'"),
        ({"dataset_average_activation_norm": None}, InputError, "the scale of its input is unknown"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}}, InputError, "two positive numbers"),
        ({"dataset_average_activation_norm": {"in": 1.0}}, InputError, "two positive numbers"),
        ({"use_glu_encoder": True}, InputError, "use_glu_encoder"),
        ({"apply_decoder_bias_to_pre_encoder": True}, InputError, "decoder bias of a transcoder"),
        ({"d_sae": WIDTH + 1}, CorruptError, r"encoder\.weight has shape"),
        ({"d_model": "many"}, InputError, "d_model as a whole number"),
    ],
)
def test_bad_settings(tmp_path: Path, changed: dict[str, Any], error: type[ExegeteError], match: str) -> None:
    with pytest.raises(error, match=match):
        loaded(written(tmp_path, **changed))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = {**state(), "decoder.bias": torch.full((D,), torch.nan)}
    with pytest.raises(CorruptError, match=r"decoder\.bias holds NaN"):
        loaded(written(tmp_path, tensors=tensors))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"sae": {}, "d_model": 4}', "[" * 100_000])
def test_other_settings_are_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "L1R").mkdir()
    for name in ("hyperparams.json", "config.json", "L1R/config.json"):
        (tmp_path / name).write_text(text)
    assert LlamaScope().find(LocalRepository(tmp_path), "") == ()
