"""The table of the installed sae-lens, read without importing it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from exegete.coders.formats import saelens_table
from exegete.coders.formats.saelens import SAELens
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, InputError, MissingExtraError, NotFoundError


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of our own in the place of the installed one."""
    path = tmp_path / "pretrained_saes.yaml"
    monkeypatch.setattr(saelens_table, "_path", lambda: path)
    for cached in (saelens_table._blocks, saelens_table._release):
        cached.cache_clear()
    yield path
    for cached in (saelens_table._blocks, saelens_table._release):
        cached.cache_clear()


def test_published_coders() -> None:
    found = saelens_table.resolve("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert (found.repo_id, found.folder) == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre")
    assert (found.hookpoint, found.converter, found.base_model) == ("blocks.8.hook_resid_pre", "sae_lens", "gpt2-small")
    assert found.settings == {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    gemma = saelens_table.resolve("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    assert (gemma.repo_id, gemma.folder) == ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert (gemma.hookpoint, gemma.converter, gemma.scale) == (None, "gemma_2", None)
    scaled = saelens_table.resolve("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    assert scaled.scale == pytest.approx(1.0493173)


def test_releases_are_the_tables_outermost_names() -> None:
    """The table is cut by a pattern, as parsing all of it takes seconds; each piece must be what YAML makes of it."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text()
    outermost = [line for line in text.splitlines() if line and line[0] not in " #-"]
    assert [f"{name}:" for name in saelens_table.releases()] == outermost
    for release in ("gpt2-small-res-jb", "gemma-2b-res-jb", "gpt2-small-mlp-tm", outermost[-1][:-1]):
        piece = text[text.index(f"\n{release}:\n") + 1 :]
        later = (
            piece.find("\n" + outermost[outermost.index(f"{release}:") + 1]) if release != outermost[-1][:-1] else -1
        )
        whole = yaml.safe_load(piece if later < 0 else piece[:later])[release]
        assert saelens_table.sae_ids(release) == tuple(entry["id"] for entry in whole["saes"])
        for entry in whole["saes"]:
            found = saelens_table.resolve(release, entry["id"])
            assert (found.repo_id, found.folder) == (whole["repo_id"], str(entry["path"]))
            assert found.scale == entry.get("norm_scaling_factor")


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        ("gpt2-small-resjb", "x", "unknown release of SAELens 'gpt2-small-resjb'; did you mean gpt2-small-res-jb"),
        (
            "gpt2-small-res-jb",
            "blocks.8.hook_resid_pr",
            "'blocks.8.hook_resid_pr'; did you mean blocks.8.hook_resid_pre",
        ),
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            "blocks.8.hook_resid_pre",
            "is a hub repository and no release; give it as jbloom/GPT2-Small-SAEs-Reformatted:FOLDER; its releases "
            "are gpt2-small-res-jb",
        ),
        ("someone/something", "x", "give it as someone/something:FOLDER$"),
    ],
)
def test_unknown_names(release: str, sae_id: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message) as caught:
        saelens_table.resolve(release, sae_id)
    assert "\n" not in str(caught.value)


def test_releases_are_told_from_other_names() -> None:
    assert saelens_table.is_release("gpt2-small-res-jb")
    assert not saelens_table.is_release("jbloom/GPT2-Small-SAEs-Reformatted")
    assert not saelens_table.is_release("")


def test_specs() -> None:
    assert saelens_table.split("saelens:a-b:layer_20/width_16k/canonical") == ("a-b", "layer_20/width_16k/canonical")
    assert saelens_table.split("saelens:a:b:v1") == ("a", "b:v1")
    for wrong in ("saelens:a", "saelens::b", "saelens:a:", "saelens:", "a:b"):
        with pytest.raises(InputError, match="is written saelens:RELEASE:SAE_ID"):
            saelens_table.split(wrong)


def test_without_sae_lens(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    monkeypatch.setattr(saelens_table, "_path", lambda: None)
    assert not saelens_table.is_release("gpt2-small-res-jb")
    for ask in (saelens_table.releases, lambda: saelens_table.resolve("a", "b"), lambda: saelens_table.sae_ids("a")):
        with pytest.raises(MissingExtraError, match=r"pip install 'exegete\[saelens\]'"):
            ask()


def test_neither_sae_lens_nor_torch_is_imported() -> None:
    code = (
        "import sys; from exegete.coders.formats import saelens_table as t; assert t.is_release('gpt2-small-res-jb');"
        "assert not {'torch', 'sae_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  saes: [\n", "does not parse at a"),
        ("a:\n  - 1\n", "holds no settings at a"),
        ("a:\n  saes: 3\n", "lists no coders at a"),
        ("a:\n  saes:\n  - path: x\n", "lists no coders at a"),
        ("a:\n  repo_id: o/n\n  saes:\n  - {id: b, path: x}\n", "lacks a repository, a model or the path of b"),
        (
            "a:\n  repo_id: o/n\n  model: m\n  config_overrides: 3\n  saes:\n  - {id: b, path: x}\n",
            "settings that are none",
        ),
    ],
)
def test_tables_that_are_not_understood(table: Path, text: str, message: str) -> None:
    table.write_text(text)
    with pytest.raises(CorruptError, match=message) as caught:
        saelens_table.resolve("a", "b")
    assert "\n" not in str(caught.value)


def test_the_tables_settings_go_before_the_coders_own(table: Path, tmp_path: Path) -> None:
    table.write_text(
        "other:\n  model: m\n  repo_id: o/m\n  saes: []\n"
        "mine:\n  model: gpt2-small\n  repo_id: o/n\n  conversion_func: null\n  config_overrides:\n"
        "    hook_name: blocks.1.hook_resid_pre\n    normalize_activations: expected_average_only_in\n"
        "  saes:\n  - id: b\n    path: deep/b\n    norm_scaling_factor: 0.5\n  - id: c\n    path: 7\n"
    )
    tensors = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    for name in ("deep/b", "c"):
        (tmp_path / "repo" / name).mkdir(parents=True)
        save_file(tensors, tmp_path / "repo" / name / "sae_weights.safetensors")
        (tmp_path / "repo" / name / "cfg.json").write_text(
            json.dumps({"d_in": 2, "d_sae": 2, "hook_point": "layers.0"})
        )
    found = saelens_table.resolve("mine", "b")
    assert (found.hookpoint, found.scale, found.converter) == ("blocks.1.hook_resid_pre", 0.5, "sae_lens")
    assert saelens_table.resolve("mine", "c").folder == "7"
    repository, reader = found.repository(LocalRepository(tmp_path / "repo")), SAELens()
    (place,) = reader.find(repository, found.folder)
    info = reader.inspect(repository, place)
    assert (info.hookpoint, info.base_model) == ("blocks.1.hook_resid_pre", "gpt2-small")
    assert info.notes == ("its input scale 0.5 is folded into the weights",)
    coder = reader.load(repository, place, name="n", hookpoint="layers.9", device="cpu", dtype=torch.float32)
    assert list(coder.encode(torch.tensor([[4.0, -1.0]])).values) == [2.0]
    other = reader.inspect(repository, reader.find(repository, "c")[0])
    assert (other.hookpoint, other.base_model, other.notes) == ("layers.0", None, ())
