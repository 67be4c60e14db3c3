from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders.coder import SparseCoder
from exegete.coders.formats import formats
from exegete.coders.formats.format import CoderInfo
from exegete.coders.formats.saelens import SAELens
from exegete.coders.repository import LocalRepository, Repository
from exegete.errors import CorruptError, ExegeteError, NotFoundError

D, WIDTH = 4, 6
HOOK = "blocks.8.hook_resid_pre"
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": WIDTH,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"model_name": "gpt2-small", "hook_name": HOOK, "sae_lens_version": "6.54.12"},
}


def write(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **settings: Any) -> Path:
    draw = torch.Generator().manual_seed(0)
    held: dict[str, torch.Tensor | None] = {
        "W_enc": torch.randn(D, WIDTH, generator=draw),
        "b_enc": torch.randn(WIDTH, generator=draw),
        "W_dec": torch.randn(WIDTH, D, generator=draw),
        "b_dec": torch.randn(D, generator=draw),
    }
    held = {**held, **(tensors or {})}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v for k, v in held.items() if v is not None}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**CONFIG, **settings}))
    return folder


def write_hook(folder: Path, hook: str) -> Path:
    return write(folder, metadata={**CONFIG["metadata"], "hook_name": hook})


def found(folder: Path, inside: str = "") -> list[tuple[str, str | None, str]]:
    return [(p.folder, p.hookpoint, p.label) for p in SAELens().find(LocalRepository(folder), inside)]


def inspected(folder: Path) -> CoderInfo:
    repository = LocalRepository(folder)
    (place,) = SAELens().find(repository, "")
    return SAELens().inspect(repository, place)


def loaded(folder: Path, hookpoint: str | None = None, dtype: torch.dtype = torch.float32) -> SparseCoder:
    repository = LocalRepository(folder)
    (place,) = SAELens().find(repository, "")
    hookpoint = hookpoint or place.hookpoint or "layers.0"
    return SAELens().load(repository, place, name="c", hookpoint=hookpoint, device="cpu", dtype=dtype)


def refused(folder: Path, error: type[ExegeteError], message: str) -> None:
    for read in (inspected, loaded):
        with pytest.raises(error, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_one_coder(tmp_path: Path) -> None:
    folder = write(tmp_path / HOOK)
    assert found(folder) == [("", HOOK, "")]
    info = inspected(folder)
    expected = CoderInfo(
        format="saelens",
        architecture="relu",
        path=str(folder),
        hookpoint=HOOK,
        side="output",
        target=None,
        d_in=D,
        d_out=D,
        width=WIDTH,
        k=None,
        threshold=None,
        base_model="gpt2-small",
        dtype="F32",
    )
    assert info == expected
    coder = loaded(folder)
    assert (coder.name, coder.hookpoint, coder.target) == ("c", HOOK, (HOOK, "output"))
    assert loaded(folder, "layers.3").hookpoint == "layers.3"
    half = loaded(folder, dtype=torch.bfloat16)
    assert (half.dtype, half.hash) == (torch.bfloat16, coder.hash)


def test_by_hand(tmp_path: Path) -> None:
    """x = (3, 1), b_dec = (1, 0): pre-activations of latent 0 are (3 − 1)·2 = 4, of latent 1 are 1·(−1) + 0.5 < 0."""
    tensors: dict[str, torch.Tensor | None] = {
        "W_enc": torch.tensor([[2.0, 0.0], [0.0, -1.0]]),
        "b_enc": torch.tensor([0.0, 0.5]),
        "W_dec": torch.tensor([[0.5, 1.0], [9.0, 9.0]]),
        "b_dec": torch.tensor([1.0, 0.0]),
    }
    write(tmp_path, tensors, d_in=2, d_sae=2)
    coder, x = loaded(tmp_path), torch.tensor([[3.0, 1.0]])
    code = coder.encode(x)
    assert (list(code.indices), list(code.values)) == ([0], [4.0])
    assert coder.decode(code).tolist() == [[3.0, 4.0]]
    write(
        tmp_path,
        {**tensors, "scaling_factor": torch.tensor([3.0, 1.0])},
        d_in=2,
        d_sae=2,
        finetuning_scaling_factor=True,
    )
    tuned = loaded(tmp_path)
    assert list(tuned.encode(x).values) == [4.0]
    assert tuned.decode(tuned.encode(x)).tolist() == [[7.0, 12.0]]
    assert inspected(tmp_path).notes == ("its finetuning factors are folded into the decoder",)


def test_finetuning_factors(tmp_path: Path) -> None:
    """Versions 3 to 5 multiply what a latent says by its factor before decoding; version 6 cannot read such files."""
    plain, x = loaded(write(tmp_path / "plain")), torch.randn(5, D)
    factors = torch.rand(WIDTH) + 0.5
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        tuned = loaded(write(tmp_path / name, {name: factors}, finetuning_scaling_factor=True))
        code, expected = tuned.encode(x), plain.encode(x)
        assert torch.equal(torch.as_tensor(code.values), torch.as_tensor(expected.values))
        scaled = replace(expected, values=torch.as_tensor(expected.values) * factors[torch.as_tensor(expected.indices)])
        torch.testing.assert_close(tuned.decode(code), plain.decode(scaled))
    asked = write(tmp_path / "asked", finetuning_scaling_factor=True)
    assert loaded(asked).hash == plain.hash
    denied = write(tmp_path / "denied", {"scaling_factor": factors}, finetuning_scaling_factor=False)
    with pytest.raises(CorruptError, match="holds finetuning factors that its settings deny"):
        loaded(denied)


def test_several_coders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (10, 2):
        write_hook(tmp_path / f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_pre")
        write_hook(tmp_path / "wide" / f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_pre")
    write_hook(tmp_path / "v5_128k_layer_0", "blocks.0.hook_resid_post")
    write_hook(tmp_path / "blocks.2.hook_resid_pre_768:v1", "blocks.2.hook_resid_pre")
    write_hook(tmp_path / "mid", "blocks.1.hook_resid_mid")
    expected = [
        ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_pre", ""),
        ("blocks.2.hook_resid_pre_768:v1", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_pre_768_v1"),
        ("blocks.10.hook_resid_pre", "blocks.10.hook_resid_pre", ""),
        ("mid", "h.1.ln_2", ""),
        ("v5_128k_layer_0", "blocks.0.hook_resid_post", ""),
        ("wide/blocks.2.hook_resid_pre", "blocks.2.hook_resid_pre", "wide"),
        ("wide/blocks.10.hook_resid_pre", "blocks.10.hook_resid_pre", "wide"),
    ]
    assert found(tmp_path) == expected
    assert found(tmp_path, "wide") == [(folder, hook, "") for folder, hook, _ in expected[5:]]
    read: list[str] = []

    def watched(self: LocalRepository, path: str) -> dict[str, Any]:
        read.append(path)
        return {}

    monkeypatch.setattr(LocalRepository, "json", watched)
    found(tmp_path)
    assert sorted(read) == [f"{f}/cfg.json" for f in ("blocks.2.hook_resid_pre_768:v1", "mid", "v5_128k_layer_0")]


def test_the_settings_have_the_last_word(tmp_path: Path) -> None:
    write_hook(tmp_path / "blocks.1.hook_resid_pre", HOOK)
    info = inspected(tmp_path)
    assert info.hookpoint == HOOK == loaded(tmp_path).hookpoint
    assert info.notes == (
        f"its folder is called blocks.1.hook_resid_pre and its cfg.json says {HOOK}, which is believed",
    )
    assert loaded(tmp_path, "layers.4").hookpoint == "layers.4"


def test_coders_that_do_not_say_where_they_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, metadata={})
    assert found(tmp_path) == [("a", None, "a"), ("b", None, "b")]
    assert inspected(tmp_path / "a").hookpoint is None
    assert loaded(tmp_path / "a", "layers.1").point == ("layers.1", "output")


@pytest.mark.parametrize(
    ("module", "point"), [("layers.3.mlp.input", ("layers.3.mlp", "input")), ("layers.3", ("layers.3", "output"))]
)
def test_hugging_face_modules(module: str, point: tuple[str, str], tmp_path: Path) -> None:
    info = inspected(write(tmp_path, metadata={"hf_hook_name": module}))
    assert (info.hookpoint, info.side) == point
    assert loaded(tmp_path).point == point


def test_notes(tmp_path: Path) -> None:
    metadata = {
        "hook_name": HOOK,
        "prepend_bos": True,
        "context_size": 128,
        "exclude_special_tokens": [0],
        "seqpos_slice": [1, None],
        "model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": False},
    }
    assert inspected(write(tmp_path, metadata=metadata)).notes == (
        "made on a model changed by fold_ln, whose activations may differ",
        "made on rows of 128 tokens",
        "made with a beginning-of-sequence token in every row",
        "made without the activations of special tokens",
        "made on the positions [1:] of every row",
    )
    plain = {"seqpos_slice": [None], "exclude_special_tokens": False, "model_from_pretrained_kwargs": {}}
    assert inspected(write(tmp_path, metadata=plain)).notes == ()


def test_weights_or_settings_alone(tmp_path: Path) -> None:
    alone = write(tmp_path / "alone" / HOOK)
    (alone / "sae_weights.safetensors").unlink()
    assert found(alone.parent) == [(HOOK, HOOK, "")]
    refused(
        alone.parent, NotFoundError, r"there is no .*sae_weights\.safetensors, only its cfg\.json; copy the weights"
    )
    bare = write(tmp_path / "bare" / HOOK)
    (bare / "cfg.json").unlink()
    assert found(bare.parent) == [(HOOK, HOOK, "")]
    refused(bare.parent, NotFoundError, r"there is no .*cfg\.json, only sae_weights\.safetensors; copy the settings")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "temporal"},
            "'temporal', which is not read; read are standard, gated, jumprelu, topk, batchtopk",
        ),
        ({"architecture": "matching_pursuit"}, "'matching_pursuit', which is not read; read are standard"),
        ({"architecture": "abstopk", "k": 2}, "'abstopk', which is not read"),
        ({"architecture": ["standard"]}, "which is not read"),
        ({"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'; allowed: relu, topk"),
        ({"d_in": None}, "d_in as a whole number of at least 1, it holds None"),
        ({"d_in": "4"}, "d_in as a whole number"),
        ({"d_sae": 0}, "d_sae as a whole number"),
        ({"d_in": 5}, r"W_enc has shape \[4, 6\], its cfg.json says \[5, 6\]"),
        ({"architecture": "topk"}, "k as a whole number"),
        ({"architecture": "topk", "k": 2.5}, "k as a whole number"),
        ({"architecture": "topk", "k": 7}, "k = 7; it must lie between 1 and its width 6"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "2"}},
            "activation_fn_kwargs of .* k as a whole number",
        ),
        ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag; it has W_dec, W_enc, b_dec, b_enc"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "batchtopk", "k": 2}, "lacks topk_threshold"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input as true or false"),
        ({"architecture": "transcoder"}, "a transcoder cannot subtract its decoder bias"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": False}, "add hook_name_out to its metadata"),
        (
            {"architecture": "transcoder", "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
            "a transcoder with normalize_activations layer_norm, which is not read",
        ),
        ({"normalize_activations": "batch_norm"}, "'batch_norm'; allowed: none, layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, "and no norm_scaling_factor; add that number"),
        (
            {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": -1.0},
            "norm_scaling_factor as a positive number, it holds -1.0",
        ),
        ({"normalize_activations": "expected_average_only_in", "norm_scaling_factor": "1"}, "positive number"),
        ({"normalize_activations": "covariance_whitening"}, r"there is no .*activation_whitening\.safetensors"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'; allowed: none, hook_z"),
        ({"hook_head_index": 3}, "hook_head_index 3: a coder of one attention head is not read"),
        ({"hook_point_head_index": 0}, "hook_head_index 0"),
        ({"metadata": [1]}, "metadata that are no settings"),
        ({"metadata": {"hook_name": 3}}, "hook_name as text"),
        ({"metadata": {"hook_name": "blocks.0.ln2.hook_normalized"}}, "an autoencoder of blocks.0.ln2.hook_normalized"),
        ({"metadata": {"model_from_pretrained_kwargs": 1}}, "model_from_pretrained_kwargs as settings"),
        (
            {
                "normalize_activations": "constant_norm_rescale",
                "metadata": {**CONFIG["metadata"], "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            },
            "which are not read together",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(write(tmp_path, **settings), ExegeteError, message)


@pytest.mark.parametrize("text", ["{", "", "[1]", "3", "[" * 100_000, '{"d_sae": 1' + " " * (1 << 20) + "}", "\xff"])
def test_damaged_settings(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "odd")
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))
    assert found(tmp_path) == [("odd", None, "")]
    refused(tmp_path, CorruptError, r"cfg\.json")
    (folder / "sae_weights.safetensors").unlink()
    assert found(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "header"])
def test_damaged_weights(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "sae_weights.safetensors"
    data = path.read_bytes()
    made = {"cut": data[:-5], "empty": b"", "noise": bytes(range(256)) * 8, "header": b"\xff" * 8 + data[8:]}
    path.write_bytes(made[damage])
    refused(tmp_path, CorruptError, r"sae_weights\.safetensors")


def test_damaged_tensors(tmp_path: Path) -> None:
    refused(write(tmp_path / "a", {"b_dec": None}), CorruptError, r"lacks b_dec; it has W_dec, W_enc, b_enc")
    integers = torch.zeros(WIDTH, dtype=torch.int64)
    refused(write(tmp_path / "b", {"b_enc": integers}), CorruptError, "b_enc is of type I64, not floating point")
    holes = torch.full((WIDTH,), float("nan"))
    with pytest.raises(CorruptError, match="b_enc holds NaN"):
        loaded(write(tmp_path / "c", {"b_enc": holes}))
    gated = {
        "b_enc": None,
        "b_gate": holes.nan_to_num(),
        "b_mag": holes.nan_to_num(),
        "r_mag": torch.full((WIDTH,), 99.0),
    }
    with pytest.raises(CorruptError, match="overflow"):
        loaded(write(tmp_path / "d", gated, architecture="gated"))


def test_pickles_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Path, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    folder = write(tmp_path / "coder")
    torch.save(Trap(), folder / "sae_weights.safetensors")
    refused(folder, CorruptError, r"sae_weights\.safetensors is damaged")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    refused(folder, NotFoundError, r"there is no .*sae_weights\.safetensors")
    assert not (tmp_path / "ran").exists()


def test_folders_of_other_formats(tmp_path: Path) -> None:
    sparsify = {"activation": "topk", "expansion_factor": 2, "num_latents": 8, "k": 2, "d_in": 4}
    for name in ("whole", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cfg.json").write_text(json.dumps(sparsify))
    save_file({"W_dec": torch.zeros(8, 4)}, tmp_path / "whole" / "sae.safetensors")
    (tmp_path / "layer_0").mkdir()
    np.savez(tmp_path / "layer_0" / "params.npz", W_enc=np.zeros((4, 8), np.float32))
    (write(tmp_path / "L0R") / "cfg.json").rename(tmp_path / "L0R" / "config.json")
    (tmp_path / "config.json").write_text("{}")
    assert found(tmp_path) == []


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("version", [3, 6])
def test_only_one_of_the_registered_readers_takes_it(version: int, weights: bool, tmp_path: Path) -> None:
    write(tmp_path / HOOK)
    if version < 6:
        (tmp_path / HOOK / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": WIDTH, "expansion_factor": 4}))
    if not weights:
        (tmp_path / HOOK / "sae_weights.safetensors").unlink()
    takers = [each.name for each in formats() if each.find(LocalRepository(tmp_path), "")]
    assert takers == ["saelens"]


def test_folding_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path, normalize_activations="expected_average_only_in", norm_scaling_factor=0.5)
    before = load_file(folder / "sae_weights.safetensors")
    first, again = loaded(folder), loaded(folder)
    assert first.hash == again.hash
    after = load_file(folder / "sae_weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_inspecting_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(Repository, "tensors", None)
    assert inspected(tmp_path).width == WIDTH
