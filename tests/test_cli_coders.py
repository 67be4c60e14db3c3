"""Coders of every kind through the command line: what does not fit is one line, what does ends in a report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exegete.cli import main
from exegete.cli.options import build_parser, fields, given
from exegete.errors import MismatchError
from exegete.runs import Run, open_run
from exegete.testing import toy_topk_coder
from exegete.types import Array

D, WIDTH = 32, 48
FIXTURES = Path(__file__).parent / "fixtures" / "dictionary_learning"
SIZES = ["--n-train", "8", "--n-test", "8", "--n-negatives", "8", "--min-train", "2", "--min-test", "2"]
NO_TABLE = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens is not installed")


def text_arguments(toy: Path, out: Path) -> list[str]:
    return ["--text", str(toy / "text.jsonl"), "--row-length", "64", "--window", "8", "--out", str(out), "-q"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must be refused; return its one line."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("exegete: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def weights(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a linear coder under the names that most formats share."""
    draw = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(D, WIDTH, generator=draw) / D**0.5,
        "b_enc": torch.randn(WIDTH, generator=draw) * 0.1,
        "W_dec": torch.randn(WIDTH, D, generator=draw) / WIDTH**0.5,
        "b_dec": torch.randn(D, generator=draw) * 0.1,
        "threshold": torch.rand(WIDTH, generator=draw) * 0.2,
        **changed,
    }


def linear() -> dict[str, torch.Tensor]:
    held = weights()
    return {
        "encoder.weight": held["W_enc"].T.contiguous(),
        "encoder.bias": held["b_enc"],
        "decoder.weight": held["W_dec"].T.contiguous(),
        "decoder.bias": held["b_dec"],
    }


def saelens(folder: Path, hook: str = "blocks.0.hook_resid_post", **tensors: torch.Tensor) -> Path:
    """Write a JumpReLU coder as SAELens does."""
    folder.mkdir(parents=True)
    save_file(weights(**tensors), folder / "sae_weights.safetensors")
    settings: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": WIDTH,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": "toy", "hook_name": hook, "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(settings))
    return folder


# -- what does not fit ----------------------------------------------------------------------------------------------


@pytest.fixture
def collect(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that gives a coder to ``collect``, which must refuse it and leave nothing behind."""

    def run(coder: object, *options: object) -> str:
        given = [toy_folder / "model", coder, *options, *text_arguments(toy_folder, tmp_path / "run")]
        line = refused(capsys, "collect", *given)
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        return line

    return run


@NO_TABLE
def test_a_release_is_no_repository(collect: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    hook = "blocks.8.hook_resid_pre"
    meant = f"is a release of SAELens, no folder or hub id; write saelens:gpt2-small-res-jb:{hook}"
    assert meant in collect(f"gpt2-small-res-jb:{hook}")
    assert "write saelens:gpt2-small-res-jb:ID" in refused(capsys, "inspect", "gpt2-small-res-jb")


@NO_TABLE
def test_a_repository_is_no_release(collect: Callable[..., str]) -> None:
    line = collect("saelens:jbloom/GPT2-Small-SAEs-Reformatted:blocks.8.hook_resid_pre")
    assert "is a hub repository and no release; give it as jbloom/GPT2-Small-SAEs-Reformatted:FOLDER" in line
    assert "gpt2-small-res-jb" in line


@NO_TABLE
def test_releases_and_ids_that_are_not_there(collect: Callable[..., str]) -> None:
    assert "did you mean gpt2-small-res-jb" in collect("saelens:gpt2-small-resjb:x")
    assert "did you mean blocks.8.hook_resid_pre" in collect("saelens:gpt2-small-res-jb:blocks.8.hook_resid_pree")
    assert "saelens:RELEASE:SAE_ID" in collect("saelens:gpt2-small-res-jb")


def test_releases_without_sae_lens(collect: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.coders.formats import saelens_table

    monkeypatch.setattr(saelens_table, "_path", lambda: None)
    saelens_table._blocks.cache_clear()
    saelens_table._release.cache_clear()
    try:
        assert "pip install 'exegete[saelens]'" in collect("saelens:gpt2-small-res-jb:blocks.8.hook_resid_pre")
    finally:
        saelens_table._blocks.cache_clear()
        saelens_table._release.cache_clear()
    assert "no-such-folder" in collect("no-such-folder")


def test_what_is_not_on_the_hub(collect: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nobody/nothing' cannot be fetched" in collect("nobody/nothing")
    assert "'nobody/nothing' cannot be fetched" in refused(capsys, "inspect", "nobody/nothing")


def test_a_hookpoint_that_the_subject_lacks(collect: Callable[..., str], tmp_path: Path) -> None:
    toy_topk_coder(tmp_path / "far", d=D, hookpoints=("layers.9",))
    line = collect(tmp_path / "far")
    assert "unknown hookpoint 'layers.9'" in line
    assert "layers.1" in line
    assert "'blocks.9.hook_resid_post'" in collect(saelens(tmp_path / "lens", "blocks.9.hook_resid_post"))
    toy_topk_coder(tmp_path / "near", d=D, hookpoints=("layers.0",))
    assert "unknown hookpoint 'layers.1'; did you mean layers.0" in collect(
        tmp_path / "near", "--hookpoints", "layers.1"
    )


def test_another_size(collect: Callable[..., str], tmp_path: Path) -> None:
    toy_topk_coder(tmp_path / "wide", d=48, hookpoints=("layers.0",))
    assert "reads 48 dimensions, the output of layers.0" in collect(tmp_path / "wide")
    np.save(tmp_path / "wide.npy", np.ones((3, 48), np.float32))
    assert "reads 48 dimensions" in collect(f"directions:{tmp_path / 'wide.npy'}", "--hookpoints", "layers.0")


def test_another_base_model(toy_folder: Path, tmp_path: Path) -> None:
    """Folders have no reliable name, so only subjects of the hub are compared; here one that is called like one."""
    import exegete as ex
    from exegete.coders.make import make_coders

    folder = toy_topk_coder(tmp_path / "coders", d=D, hookpoints=("layers.0",))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model": "org/gemma-2-2b"}))
    local = ex.load_subject(str(toy_folder / "model"))
    subject = local.with_model(local.model, name="org/gemma-2-9b", content="0")

    def no_text(_: int) -> Any:
        raise AssertionError("no text is needed")

    with pytest.raises(MismatchError, match=r"was trained on org/gemma-2-2b, the subject is org/gemma-2-9b") as caught:
        make_coders([str(folder)], (), subject, no_text)
    (flag,) = re.findall(r"--[a-z-]+", str(caught.value))
    assert flag in {f"--{name}" for _, name, _, _ in fields()}
    assert list(make_coders([str(folder)], (), subject, no_text, other_model=True)) == ["layers.0"]


def dictionary(folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "AutoEncoderTopK" / "trainer_0", folder / "trainer_0")).parent


def sparsify(folder: Path) -> Path:
    return toy_topk_coder(folder, d=D, hookpoints=("layers.0",))


HALVES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "sparsify": (sparsify, "layers.0/cfg.json", "layers.0/sae.safetensors"),
    "saelens": (saelens, "cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": (dictionary, "trainer_0/config.json", "trainer_0/ae.pt"),
}


@pytest.mark.parametrize("kind", HALVES)
def test_settings_without_weights(
    kind: str, collect: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, _, lost = HALVES[kind]
    folder = write(tmp_path / "half")
    shutil.rmtree(folder / "trainer_0" / "checkpoints", ignore_errors=True)
    (folder / lost).unlink()
    for line in (collect(folder), refused(capsys, "inspect", folder)):
        assert f"there is no {folder / lost}, only its" in line
        assert "copy the weights as well" in line


@pytest.mark.parametrize("kind", HALVES)
def test_weights_without_settings(
    kind: str, collect: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, lost, _ = HALVES[kind]
    folder = write(tmp_path / "half")
    shutil.rmtree(folder / "trainer_0" / "checkpoints", ignore_errors=True)
    (folder / lost).unlink()
    if kind == "dictionary_learning":  # its weights alone say what they are, but not where they read, nor their k
        assert str(folder / "trainer_0") in collect(folder)
        return
    for line in (collect(folder, "--hookpoints", "layers.0"), refused(capsys, "inspect", folder)):
        assert f"there is no {folder / lost}" in line
        assert "copy the settings as well" in line


def test_pickles_are_not_run(collect: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "harm"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    folder = dictionary(tmp_path / "torch")
    shutil.rmtree(folder / "trainer_0" / "checkpoints")
    torch.save({"encoder.weight": Evil()}, folder / "trainer_0" / "ae.pt")
    assert "could run code" in collect(folder)
    assert "could run code" in refused(capsys, "inspect", folder)
    (folder / "trainer_0" / "ae.pt").write_bytes(pickle.dumps(Evil()))
    assert "is no archive of tensors" in collect(folder)
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    assert "is damaged" in collect(f"directions:{tmp_path / 'evil.npy'}", "--hookpoints", "layers.0")
    assert not marker.exists()


def test_folders_without_coders(
    collect: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    for line in (collect(folder), refused(capsys, "inspect", folder)):
        assert f"there is no coder folder '{folder}'" in line
    folder.mkdir()
    assert "or it is empty" in collect(folder)
    (folder / "readme.md").write_text("nothing")
    assert "holds no sparse coder of a known format (sparsify, saelens" in collect(folder)
    assert "and no weights" in refused(capsys, "inspect", folder)
    save_file({"other": torch.ones(2)}, folder / "model.safetensors")
    assert "its weight files (model.safetensors) belong to none of them" in refused(capsys, "inspect", folder)
    assert "CODER" in refused(capsys, "inspect")
    assert "[NAME=]PATH[:SUB]" in refused(capsys, "inspect", "")


@pytest.mark.parametrize(
    ("spec", "hookpoints", "message"),
    [
        ("neurons", (), "neurons can be read anywhere; name hookpoints"),
        ("pca:components=8", (), "pca can be read anywhere; name hookpoints"),
        ("neurons:kk=3", ("layers.0",), "'kk=3' in 'neurons:kk=3' is not understood; options of neurons are k="),
        ("neurons:k=many", ("layers.0",), "k in 'neurons:k=many' must be a whole number, got 'many'"),
        ("neurons:k=99", ("layers.0",), "k = 99"),
        ("neurons", ("layers.9.mlp",), r"unknown hookpoint 'layers.9.mlp'; did you mean layers.1.mlp"),
        ("pca", ("layers.0",), "'pca' lacks components"),
        ("pca:components=8", ("layers.9",), "unknown hookpoint 'layers.9'; did you mean layers.1"),
        ("pca:components=33", ("layers.0",), "have at most 32 principal components, 33 were asked for"),
        ("random", ("layers.0",), "'random' lacks an architecture"),
        ("random:foo,width=8", ("layers.0",), "there is no untrained 'foo'; known: topk"),
        ("random:topk", ("layers.0",), "'random:topk' lacks width"),
        ("random:topk,width=8,k=9", ("layers.0",), "k = 9"),
        ("directions", ("layers.0",), "'directions' lacks a FILE"),
        ("directions:nowhere.npy", ("layers.0",), "there is no file 'nowhere.npy'"),
        ("bad name=neurons", ("layers.0",), "bad name"),
        ("a=b=neurons", ("layers.0",), "b=neurons"),
    ],
)
def test_coders_that_cannot_be_made(
    collect: Callable[..., str], spec: str, hookpoints: tuple[str, ...], message: str
) -> None:
    assert message in collect(spec, *(("--hookpoints", *hookpoints) if hookpoints else ()))


def test_a_made_coder_has_nothing_to_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    for spec in ("neurons", "pca:components=8", "n=random:topk,width=8"):
        assert "is made for a subject" in refused(capsys, "inspect", spec)


def test_two_coders_of_one_name(collect: Callable[..., str], toy_folder: Path) -> None:
    coders = f"{toy_folder / 'coders'}:layers.0"
    assert "two coders are called 'layers.0'" in collect(coders, coders)
    made = "layers.0-neurons"
    assert f"two coders are called '{made}'" in collect(f"{made}={coders}", "neurons", "--hookpoints", "layers.0")


def test_compacting_what_is_not_there(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder" in refused(capsys, "store", "compact", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "VERB" in refused(capsys, "store")
    assert "'compat'" in refused(capsys, "store", "compat", tmp_path)
    arguments = ["neurons:k=2", "--hookpoints", "layers.0", *text_arguments(toy_folder, tmp_path / "run")]
    assert main(["collect", str(toy_folder / "model"), *arguments]) == 0
    capsys.readouterr()
    line = refused(capsys, "store", "compact", tmp_path / "run", "layers.0-neuron")
    assert "unknown coder 'layers.0-neuron'; did you mean layers.0-neurons" in line


def test_every_flag_that_a_message_names_exists() -> None:
    """What tells the user to give an option must name one that there is."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers = [build_parser(), *commands.choices.values()]
    for parser in list(parsers):  # and the verbs of a command
        verbs = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parsers += [made for action in verbs for made in action.choices.values()]
    known = {option for parser in parsers for option in parser._option_string_actions}
    source = Path(__file__).parents[1] / "src" / "exegete"
    for path in [*source.rglob("*.py"), *source.rglob("*.j2")]:
        text = re.sub(r"<style>.*?</style>|var\(--[\w-]+\)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert named - {"--upgrade"} <= known, path  # pip's


def test_an_option_given_twice_adds_up() -> None:
    options = build_parser().parse_args(
        ["run", "m", "c", "--out", "o", "--text", "a", "--text", "b", "c", "--null", "random_coder", "--nulls", "x"]
    )
    assert given(options) == {"corpus": {"text": ["a", "b", "c"]}, "nulls": ["random_coder", "x"]}


# -- inspect --------------------------------------------------------------------------------------------------------


def gemma_scope(top: Path) -> Path:
    place = top / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(place / "params.npz", **arrays)
    return place.parents[2]


def gemma_scope_2(top: Path) -> Path:
    place = top / "gemma-scope-2-1b-pt" / "resid_post" / "layer_9_width_16k_l0_small"
    place.mkdir(parents=True)
    save_file({name.lower(): tensor for name, tensor in weights().items()}, place / "params.safetensors")
    settings = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output", "width": WIDTH}
    (place / "config.json").write_text(json.dumps({**settings, "model_name": "google/gemma-3-1b-pt"}))
    return place.parents[1]


def openai(top: Path) -> Path:
    place = top / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    place.mkdir(parents=True)
    held = weights()
    state = {
        "pre_bias": held["b_dec"],
        "latent_bias": held["b_enc"],
        "encoder.weight": held["W_enc"].T.contiguous(),
        "decoder.weight": held["W_dec"].T.contiguous(),
        "activation": "TopK",
        "activation_state_dict": {"k": 5, "postact_fn": "ReLU"},
    }
    torch.save(state, place / "6.pt")
    return top


def llama_scope(top: Path) -> Path:
    place = top / "Llama3_1-8B-Base-L1R-8x"
    (place / "checkpoints").mkdir(parents=True)
    save_file(linear(), place / "checkpoints" / "final.safetensors")
    settings = {
        "d_model": D,
        "d_sae": WIDTH,
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
        "jump_relu_threshold": 0.1,
        "sparsity_include_decoder_norm": True,
    }
    (place / "hyperparams.json").write_text(json.dumps(settings))
    return place


def circuit_tracer(top: Path) -> Path:
    top.mkdir()
    held = weights()
    tensors = {name: held[name] for name in ("b_enc", "b_dec", "W_dec")}
    save_file({**tensors, "W_enc": held["W_enc"].T.contiguous()}, top / "layer_3.safetensors")
    settings = {
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    (top / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return top


def native(top: Path) -> Path:
    from exegete.coders import load_coder, save_coder

    return save_coder(load_coder(str(saelens(top / "source"))), top / "own")


def goodfire(top: Path) -> Path:
    top.mkdir()
    held = {name.replace("coder.", "coder_linear."): tensor for name, tensor in linear().items()}
    torch.save(held, top / "Llama-3.3-70B-Instruct-SAE-l50.pt")
    return top


def qwen_scope(top: Path) -> Path:
    place = top / "SAE-Res-Qwen3.5-27B-W80K-L0_4"
    place.mkdir(parents=True)
    held = weights()
    state = {"W_enc": held["W_enc"].T, "W_dec": held["W_dec"].T, "b_enc": held["b_enc"], "b_dec": held["b_dec"]}
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, place / "layer3.sae.pt")
    return place


# who writes it, architecture, hookpoint, d_in, width, and what else must be told
FORMATS: dict[str, tuple[Callable[[Path], Path], str, str, int, int, dict[str, Any]]] = {
    "sparsify": (sparsify, "topk", "layers.0", D, 64, {"k": 4}),
    "saelens": (saelens, "jumprelu", "blocks.0.hook_resid_post", D, WIDTH, {"threshold": "per latent"}),
    "gemma-scope": (
        gemma_scope,
        "jumprelu",
        "blocks.3.hook_resid_post",
        D,
        WIDTH,
        {"base_model": "google/gemma-2-2b"},
    ),
    "gemma-scope-2": (
        gemma_scope_2,
        "jumprelu",
        "layers.9",
        D,
        WIDTH,
        {"base_model": "google/gemma-3-1b-pt"},
    ),
    "dictionary_learning": (
        lambda top: Path(shutil.copytree(FIXTURES / "AutoEncoder", top)),
        "relu",
        "blocks.3.hook_mlp_out",
        16,
        48,
        {"base_model": "EleutherAI/pythia-70m-deduped"},
    ),
    "openai-sae": (openai, "topk", "blocks.6.hook_resid_post", D, WIDTH, {"k": 5, "base_model": "gpt2"}),
    "llama-scope": (llama_scope, "jumprelu", "blocks.1.hook_resid_post", D, WIDTH, {"side": "output"}),
    "circuit-tracer": (
        circuit_tracer,
        "relu transcoder",
        "blocks.3.mlp.hook_in",
        D,
        WIDTH,
        {"target": ["layers.3.mlp", "output"], "base_model": "meta-llama/Llama-3.2-1B"},
    ),
    "exegete": (native, "jumprelu", "blocks.0.hook_resid_post", D, WIDTH, {}),
    "goodfire": (
        goodfire,
        "relu",
        "blocks.50.hook_resid_post",
        D,
        WIDTH,
        {"base_model": "meta-llama/Llama-3.3-70B-Instruct"},
    ),
    "qwen-scope": (qwen_scope, "topk", "blocks.3.hook_resid_post", D, WIDTH, {"k": 4}),
}


def test_every_format_is_inspected() -> None:
    from exegete.coders.formats import formats

    assert {reader.name for reader in formats()} == FORMATS.keys()


@pytest.mark.parametrize("kind", FORMATS)
def test_inspect(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, architecture, hookpoint, d_in, width, more = FORMATS[kind]
    folder = write(tmp_path / "coder")

    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("exegete.coders.weights.tensors", loaded)
    assert main(["inspect", str(folder)]) == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (facts["format"], facts["architecture"]) == (kind, architecture)
    assert hookpoint in facts["reads"]
    assert (facts["d_in"], facts["width"]) == (str(d_in), str(width))
    assert main(["inspect", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    wanted = {"format": kind, "architecture": architecture, "hookpoint": hookpoint, "d_in": d_in, "width": width}
    assert {**found, **wanted, **more} == found


def test_inspect_a_repository_of_several(
    toy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("exegete.coders.weights.tensors", loaded)
    folder = str(toy_folder / "coders")
    assert main(["inspect", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 coders"
    assert "format: sparsify" in lines
    assert [line.split("  ")[0] for line in lines[-2:]] == ["output of layers.0", "output of layers.0.mlp"]
    assert main(["inspect", folder, "--hookpoints", "layers.*.mlp", "--json"]) == 0
    assert [found["hookpoint"] for found in json.loads(capsys.readouterr().out)] == ["layers.0.mlp"]


# -- from collecting to the report ----------------------------------------------------------------------------------


def collected(toy: Path, out: Path, coder: object, *options: str) -> Run:
    few = ["--latents", "3", "--donors", "2", "--nulls", "random_coder", "--batch-tokens", "1024", "--threads", "1"]
    arguments = [str(toy / "model"), str(coder), *options, *text_arguments(toy, out), *SIZES, *few]
    assert main(["collect", *arguments]) == 0
    return open_run(out)


def reported(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """Explain, score and report; return the report's first page."""
    for command in ("explain", "score", "report"):
        assert main([command, str(run.folder), "-q"]) == 0
    assert str(run.report_path) in capsys.readouterr().out
    assert len(run.table("scores")["value"]) > 0
    return run.report_path.read_text(encoding="utf-8")


def directions(folder: Path) -> Path:
    np.save(folder / "directions.npy", np.random.default_rng(0).standard_normal((5, D)).astype(np.float32))
    return folder / "directions.npy"


# how the coder is given, the options, and its stores: name, hookpoint, side, architecture, width, k
KINDS: dict[str, tuple[Callable[[Path], str], tuple[str, ...], list[tuple[str, str, str, str, int, int | None]]]] = {
    "saelens": (
        lambda folder: f"sae={saelens(folder / 'sae')}",
        (),
        [("sae", "layers.0", "output", "jumprelu", WIDTH, None)],
    ),
    "neurons": (
        lambda folder: "neurons:k=4",
        ("--hookpoints", "layers.*.mlp"),
        [(f"layers.{i}.mlp-neurons", f"layers.{i}.mlp.down_proj", "input", "topk neurons", 2 * D, 4) for i in range(2)],
    ),
    "pca": (
        lambda folder: "pca:components=8",
        ("--hookpoints", "layers.1"),
        [("layers.1-pca", "layers.1", "output", "relu", 16, None)],
    ),
    "directions": (
        lambda folder: f"probes=directions:{directions(folder)}",
        ("--hookpoints", "blocks.0.hook_resid_post"),
        [("probes", "layers.0", "output", "relu", 10, None)],
    ),
    "random": (
        lambda folder: "random:topk,width=64,k=4",
        ("--hookpoints", "layers.0"),
        [("layers.0-random", "layers.0", "output", "topk", 64, 4)],
    ),
    "transcoder": (
        lambda folder: str(toy_topk_coder(folder / "tc", d=D, hookpoints=("layers.1.mlp",), transcode=True)),
        (),
        [("layers.1.mlp", "layers.1.mlp", "input", "topk transcoder", 64, 4)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_collecting_to_the_report(
    kind: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, options, stores = KINDS[kind]
    run = collected(toy_folder, tmp_path / "run", given(tmp_path), *options)
    said = capsys.readouterr().out
    assert f"next: exegete explain {run.folder}" in said
    names = [name for name, *_ in stores]
    assert run.coders() == (*names, *(f"{name}@random-coder" for name in names))
    for name, hookpoint, side, architecture, width, k in stores:
        store = run.store(name)
        found = store.manifest
        assert (found.hookpoint, found.side, found.coder, store.width, found.k) == (
            hookpoint,
            side,
            architecture,
            width,
            k,
        )
        assert found.complete
        assert found.n_firings == int(store.counts.sum()) > 0
        assert found.quality["fvu"] >= 0
        assert f"{name}: {found.n_firings:,} firings" in said
        null = run.store(f"{name}@random-coder").manifest
        wanted = k or max(1, round(found.n_firings / found.n_positions))  # without a fixed k, as often as it fires
        assert (null.k, null.coder) == (wanted, "topk transcoder" if "transcoder" in architecture else "topk")
    page = reported(run, capsys)
    assert ">FVU</th>" in page
    assert all(name in page for name in run.coders())


def test_a_warning_reaches_the_manifest_and_the_report(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = saelens(tmp_path / "sae", W_dec=torch.full((WIDTH, D), 5.0))
    run = collected(toy_folder, tmp_path / "run", f"wrong={folder}")
    assert "FVU" in capsys.readouterr().out
    manifest = run.store("wrong").manifest
    assert manifest.quality["fvu"] > 1
    (warning,) = manifest.warnings
    assert warning.startswith("explains less of layers.0 than the mean does (FVU ")
    assert warning in caplog.text
    assert run.store("wrong@random-coder").manifest.warnings == ()
    assert main(["explain", str(run.folder), "-q"]) == 0
    assert main(["score", str(run.folder), "-q"]) == 0
    assert main(["report", str(run.folder), "-q"]) == 0
    assert "warning: wrong explains less of layers.0 than the mean does" in capsys.readouterr().out
    page = run.report_path.read_text(encoding="utf-8")
    assert '<p class="warning"><b>wrong</b> explains less of layers.0' in page


def firings(run: Run, name: str) -> list[Array]:
    store = run.store(name)
    return [np.concatenate([getattr(f, part) for f in store.block(0, store.width)]) for part in ("rows", "values")]


def test_compacting_changes_no_result(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name in ("plain", "compacted"):
        coder = f"sae={saelens(tmp_path / name / 'sae')}"
        run = collected(toy_folder, tmp_path / name / "run", coder, "--shard-rows", "16")
        before = len(run.store("sae").manifest.shards), run.store("sae").content_hash(), firings(run, "sae")
        assert before[0] > 2
        if name == "compacted":
            assert main(["explain", str(run.folder), "-q"]) == 0
            capsys.readouterr()
            assert main(["store", "compact", str(run.folder), "-q"]) == 0
            said = capsys.readouterr().out
            assert f"sae: {before[0]} → 1 files" in said
            assert "sae@random-coder: " in said
            assert main(["store", "compact", str(run.folder), "sae", "-q"]) == 0
            assert capsys.readouterr().out == "sae: nothing to do\n"
            after = run.store("sae")
            assert (len(after.manifest.shards), after.content_hash()) == (1, before[1])
            assert all((a == b).all() for a, b in zip(before[2], firings(run, "sae"), strict=True))
        reported(run, capsys)
        results = run.results()
        rows.append(results.canonical_rows())
        results.close()
    assert rows[0] == rows[1]
