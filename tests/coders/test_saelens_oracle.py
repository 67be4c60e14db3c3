"""SAELens writes the checkpoints; what it computes after loading them is what we must compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders.coder import SparseCoder
from exegete.coders.formats.format import CoderInfo
from exegete.coders.formats.saelens import SAELens
from exegete.coders.repository import LocalRepository

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

D, OUT, WIDTH, K = 24, 20, 72, 6
HOOK = "blocks.3.hook_resid_post"
TRANSCODES = {"model_name": "gemma-2-2b", "hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": K},
    "transcoder": {"d_out": OUT},
    "skip_transcoder": {"d_out": OUT},
    "jumprelu_transcoder": {"d_out": OUT},
    "jumprelu_skip_transcoder": {"d_out": OUT},
}
AUTOENCODERS = [name for name in ARCHITECTURES if "transcoder" not in name]


@pytest.fixture(autouse=True)
def _random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # SAELens warns of the options of a model; that is what some of these tests are about.
        warnings.filterwarnings("ignore", message="(?s).*non-empty model_from_pretrained_kwargs")
        torch.manual_seed(0)
        yield


def randomised(sae: Any) -> Any:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            draw = torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[0] ** -0.5)
            parameter.data = draw.abs() if name == "threshold" else draw
    return sae


def made(architecture: str, metadata: dict[str, Any] | None = None, *, training: bool = False, **options: Any) -> Any:
    coder, config = (SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY)[architecture]
    transcoder = "transcoder" in architecture
    known: dict[str, Any] = TRANSCODES if transcoder else {"model_name": "gpt2-small", "hook_name": HOOK}
    given = {"apply_b_dec_to_input": False} if transcoder else {}
    chosen = {"d_in": D, "d_sae": WIDTH, **ARCHITECTURES.get(architecture, {}), **given, **options}
    return randomised(coder(config(**chosen, metadata=SAEMetadata(**{**known, **(metadata or {})}))))


def inputs(n: int = 40, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def read(folder: Path) -> tuple[SparseCoder, CoderInfo]:
    repository, reader = LocalRepository(folder), SAELens()
    (place,) = reader.find(repository, "")
    info = reader.inspect(repository, place)
    where = place.hookpoint or "layers.0"
    coder = reader.load(repository, place, name="c", hookpoint=where, device="cpu", dtype=torch.float32)
    facts = ("architecture", "side", "d_in", "d_out", "width", "k", "base_model")
    assert [getattr(info, fact) for fact in facts] == [getattr(coder, fact) for fact in facts]
    assert coder.hookpoint == (info.hookpoint or where)
    assert coder.target == (info.target or coder.point)
    assert info.format == "saelens"
    return coder, info


def dense(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    code = coder.encode(x)
    found = torch.zeros(len(x), coder.width)
    if code.offsets is None:
        return found.scatter_(1, torch.as_tensor(code.indices), torch.as_tensor(code.values))
    rows = torch.repeat_interleave(torch.arange(len(x)), torch.as_tensor(code.offsets).diff())
    found[rows, torch.as_tensor(code.indices)] = torch.as_tensor(code.values)
    return found


def same(coder: SparseCoder, sae: Any, x: torch.Tensor, *, seen: torch.Tensor | None = None) -> None:
    """The coder on ``x`` is the peer on ``seen``, by default the same."""
    seen = x if seen is None else seen
    with torch.no_grad():
        acts = sae.encode(seen)
        whole = sae(seen)
    ours = dense(coder, x)
    assert 0.02 < (acts > 0).float().mean() < 0.9
    assert torch.equal(ours > 0, acts > 0)
    torch.testing.assert_close(ours, acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coder.decode(coder.encode(x), x), whole.reshape(len(x), -1), rtol=1e-5, atol=2e-5)


def reloaded(folder: Path) -> Any:
    return sae_lens.SAE.load_from_disk(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    made(architecture).save_model(tmp_path)
    coder, info = read(tmp_path)
    same(coder, reloaded(tmp_path), inputs())
    transcoder = "transcoder" in architecture
    kind = architecture.removesuffix("transcoder").strip("_").replace("_skip", " skip")
    assert info.architecture == {"standard": "relu", "": "relu transcoder", "skip": "relu skip transcoder"}.get(
        kind, f"{kind} transcoder" if transcoder else kind
    )
    assert info.k == (K if architecture == "topk" else None)
    assert info.threshold == ("per latent" if "jumprelu" in architecture else None)
    assert (info.hookpoint, info.side) == ("blocks.3.mlp.hook_in" if transcoder else HOOK, "output")
    assert info.target == (("blocks.3.hook_mlp_out", "output") if transcoder else None)
    assert (info.d_out, info.dtype) == (OUT if transcoder else D, "F32")
    assert coder.hash == read(tmp_path)[0].hash


def test_all_of_sae_lens_is_read_or_refused_by_name() -> None:
    from exegete.coders.formats import saelens_settings

    theirs = set(SAE_CLASS_REGISTRY) | set(SAE_TRAINING_CLASS_REGISTRY)
    assert theirs - set(saelens_settings.ARCHITECTURES) == {"temporal", "matching_pursuit", "abstopk"}


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("architecture", AUTOENCODERS)
def test_norms_and_the_decoder_bias(architecture: str, subtract: bool, norm: str, tmp_path: Path) -> None:
    made(architecture, apply_b_dec_to_input=subtract, normalize_activations=norm).save_model(tmp_path)
    coder, _ = read(tmp_path)
    same(coder, reloaded(tmp_path), inputs())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["norm_scaling_factor", "scaling_factor", "checkpoint"])
def test_the_input_scale(architecture: str, source: str, tmp_path: Path) -> None:
    scale = 0.37
    made(architecture, normalize_activations="expected_average_only_in").save_model(tmp_path)
    if source == "checkpoint":
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    else:
        changed(tmp_path, **{source: scale})
    coder, info = read(tmp_path)
    sae = reloaded(tmp_path)
    sae.fold_activation_norm_scaling_factor(scale)
    same(coder, sae, inputs())
    assert "its input scale 0.37 is folded into the weights" in info.notes


@pytest.mark.parametrize("scale", [None, 0.37])
def test_decoder_norms_under_topk(scale: float | None, tmp_path: Path) -> None:
    norm = "none" if scale is None else "expected_average_only_in"
    made("topk", rescale_acts_by_decoder_norm=True, normalize_activations=norm).save_model(tmp_path)
    sae = reloaded(tmp_path)
    if scale is not None:
        changed(tmp_path, norm_scaling_factor=scale)
        sae.fold_activation_norm_scaling_factor(scale)
    coder, info = read(tmp_path)
    same(coder, sae, inputs())
    assert "its decoder norms are folded into the encoder" in info.notes


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("architecture", [*AUTOENCODERS, "rescaled topk"])
def test_whitened_checkpoints(architecture: str, subtract: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rescale_acts_by_decoder_norm": True} if architecture == "rescaled topk" else {}
    kind = architecture.removeprefix("rescaled ")
    made(kind, normalize_activations="covariance_whitening", apply_b_dec_to_input=subtract, **options).save_model(
        tmp_path
    )
    matrix = torch.eye(D, dtype=torch.float64) * 0.7 + torch.randn(D, D, dtype=torch.float64) * 0.05
    whitening = {
        "mean": torch.randn(D, dtype=torch.float64) * 0.2,
        "matrix": matrix,
        "inverse_matrix": matrix.inverse().contiguous(),
    }
    save_file(whitening, tmp_path / "activation_whitening.safetensors")
    sae = reloaded(tmp_path)
    sae.fold_activation_whitening(*whitening.values())
    coder, info = read(tmp_path)
    same(coder, sae, inputs())
    assert "the whitening of its inputs is folded into the weights" in info.notes


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_flattened_heads(architecture: str, tmp_path: Path) -> None:
    metadata = {"hook_name": "blocks.3.attn.hook_z"}
    made(architecture, metadata, reshape_activations="hook_z").save_model(tmp_path)
    coder, info = read(tmp_path)
    x = inputs()
    same(coder, reloaded(tmp_path), x, seen=x.view(len(x), 4, D // 4))
    assert info.hookpoint == "blocks.3.attn.hook_z"


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_topk_saved_for_inference_and_for_training(architecture: str, rescale: bool, tmp_path: Path) -> None:
    widths: dict[str, Any] = {"matryoshka_widths": [24, WIDTH]} if architecture.startswith("matryoshka") else {}
    sae = made(architecture, training=True, k=4.5, rescale_acts_by_decoder_norm=rescale, **widths)
    sae.topk_threshold.fill_(0.6)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    expected = reloaded(tmp_path / "inference")
    assert expected.cfg.architecture() == "jumprelu"
    for form in ("inference", "training"):
        coder, info = read(tmp_path / form)
        same(coder, expected, inputs())
        assert info.architecture == "jumprelu"
        assert info.threshold == ("per latent" if form == "inference" else "one for all latents")
        assert f"trained as {architecture} for 4.5 latents on average; fires above its threshold" in info.notes


@pytest.mark.parametrize("rescale", [False, True])
def test_a_batch_topk_checkpoint_with_its_scale(rescale: bool, tmp_path: Path) -> None:
    norm = "expected_average_only_in"
    sae = made("batchtopk", training=True, k=4.0, rescale_acts_by_decoder_norm=rescale, normalize_activations=norm)
    sae.topk_threshold.fill_(0.6)
    sae.save_model(tmp_path / "training")
    (tmp_path / "training" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    sae.fold_activation_norm_scaling_factor(0.5)
    sae.save_inference_model(tmp_path / "inference")
    same(read(tmp_path / "training")[0], reloaded(tmp_path / "inference"), inputs())


@pytest.mark.parametrize("architecture", AUTOENCODERS)
def test_other_training_checkpoints(architecture: str, tmp_path: Path) -> None:
    sae = made(architecture, training=True)
    sae.save_model(tmp_path)
    same(read(tmp_path)[0], sae, inputs())


def test_an_older_jumprelu_checkpoint(tmp_path: Path) -> None:
    sae = made("jumprelu", training=True)
    sae.save_model(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    same(read(tmp_path)[0], sae_lens.TrainingSAE.load_from_disk(tmp_path), inputs())


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_files_are_widened(kind: str, tmp_path: Path) -> None:
    made("jumprelu", dtype=kind).save_model(tmp_path)
    coder, info = read(tmp_path)
    assert info.dtype == {"float16": "F16", "bfloat16": "BF16"}[kind]
    same(coder, sae_lens.SAE.load_from_disk(tmp_path, dtype="float32"), inputs())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_centred_stream(architecture: str, tmp_path: Path) -> None:
    """Where TransformerLens centred the writing weights, the coder saw x − mean(x); here it is given x."""
    centred = {"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    if "transcoder" in architecture:
        centred["hook_name"] = "blocks.3.hook_resid_mid"
    made(architecture, centred).save_model(tmp_path)
    coder, info = read(tmp_path)
    x = inputs()
    same(coder, reloaded(tmp_path), x, seen=x - x.mean(dim=-1, keepdim=True))
    assert "made on a centred stream: the mean of each input is ignored, and reconstructed as zero" in info.notes


@pytest.mark.parametrize(
    "metadata",
    [
        {"model_name": "gemma-2-2b"},
        {"hook_name": "blocks.3.attn.hook_z"},
        {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
    ],
)
def test_what_is_not_centred(metadata: dict[str, Any], tmp_path: Path) -> None:
    options = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, **metadata}
    made("standard", options).save_model(tmp_path)
    same(read(tmp_path)[0], reloaded(tmp_path), inputs())


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_a_transcoder_of_normed_inputs(architecture: str, tmp_path: Path) -> None:
    """The hook is in front of the norm's gain, where no module is: the coder reads what is normed, and norms it."""
    made(architecture, {"hook_name": "blocks.3.ln2.hook_normalized"}).save_model(tmp_path)
    coder, info = read(tmp_path)
    x = inputs()
    same(coder, reloaded(tmp_path), x, seen=x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6))
    assert (info.hookpoint, info.side) == ("layers.3.pre_feedforward_layernorm", "input")


def test_the_stream_before_the_mlp(tmp_path: Path) -> None:
    made("standard", {"hook_name": "blocks.3.hook_resid_mid"}).save_model(tmp_path / "blocks.3.hook_resid_mid")
    coder, info = read(tmp_path)
    same(coder, reloaded(tmp_path / "blocks.3.hook_resid_mid"), inputs())
    assert (info.hookpoint, info.side, coder.target) == ("h.3.ln_2", "input", ("h.3.ln_2", "input"))


# Settings as versions before 6 wrote them, with the tensors of the architecture that they stand for.
FLAT: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "d_in": D,
    "d_sae": WIDTH,
    "expansion_factor": 3,
    "dtype": "torch.float32",
    "device": "cpu",
    "context_size": 128,
}
LEGACY: dict[str, tuple[str, dict[str, Any]]] = {
    "version 2": ("standard", {"use_ghost_grads": True}),
    "version 3": (
        "standard",
        {"architecture": "standard", "activation_fn_str": "relu", "apply_b_dec_to_input": False, "prepend_bos": False},
    ),
    "gated": ("gated", {"architecture": "gated", "activation_fn_str": "relu", "activation_fn_kwargs": {}}),
    "jumprelu": ("jumprelu", {"architecture": "jumprelu", "normalize_activations": "none"}),
    "topk by function": ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    "topk": ("topk", {"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}}),
    "not normed": ("standard", {"normalize_activations": False}),
    "layer norm": ("standard", {"normalize_activations": "layer_norm", "sae_lens_training_version": "4.0.0"}),
    "rescaled": ("standard", {"normalize_activations": "constant_norm_rescale", "sae_lens_version": "5.11.0"}),
    "heads": ("standard", {"hook_point": "blocks.8.attn.hook_z"}),
}


@pytest.mark.parametrize("case", LEGACY)
def test_settings_before_version_6(case: str, tmp_path: Path) -> None:
    architecture, settings = LEGACY[case]
    made(architecture).save_model(tmp_path)
    config = {k: v for k, v in {**FLAT, **settings}.items() if v is not None}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    coder, info = read(tmp_path)
    x = inputs()
    same(coder, reloaded(tmp_path), x, seen=x.view(len(x), 4, -1) if case == "heads" else None)
    assert (info.hookpoint, info.base_model) == (config["hook_point"], "gpt2-small")
    assert "made on rows of 128 tokens" in info.notes


def test_a_true_normalisation_before_version_6_is_a_scale(tmp_path: Path) -> None:
    made("standard").save_model(tmp_path)
    config = {**FLAT, "normalize_activations": True, "norm_scaling_factor": 0.25}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = reloaded(tmp_path)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    sae.fold_activation_norm_scaling_factor(0.25)
    same(read(tmp_path)[0], sae, inputs())


def test_factors_of_ones_are_ignored(tmp_path: Path) -> None:
    sae = made("standard")
    sae.save_model(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": torch.ones(WIDTH)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(FLAT))
    same(read(tmp_path)[0], sae, inputs())
    same(read(tmp_path)[0], reloaded(tmp_path), inputs())


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
