from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders import fit_coder, inspect_coders, load_coder, load_coders
from exegete.coders.activations import GroupMax, TopK
from exegete.coders.formats.sparsify import Sparsify
from exegete.coders.linear import LinearCoder
from exegete.coders.repository import LocalRepository
from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import write_json
from exegete.subjects import load_subject
from exegete.subjects.subject import Subject
from exegete.testing import toy_llama, toy_topk_coder

POINTS = ("layers.10", "layers.2", "layers.2.mlp")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return toy_topk_coder(tmp_path / "repo", hookpoints=POINTS)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("m") / "toy")), device="cpu")


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    kept = load_file(folder / "sae.safetensors")
    for name, tensor in tensors.items():
        kept.pop(name.replace("__", "."), None)
        if tensor is not None:
            kept[name.replace("__", ".")] = tensor
    save_file(kept, folder / "sae.safetensors")


def test_all_hookpoints_in_natural_order(repository: Path) -> None:
    coders = load_coders(str(repository))
    assert list(coders) == ["layers.2", "layers.2.mlp", "layers.10"]
    assert all(name == c.name == c.hookpoint for name, c in coders.items())
    assert len({c.hash for c in coders.values()}) == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.2", ["layers.2"]),
        ("model.layers.2", ["layers.2"]),
        ("layers.*", ["layers.2", "layers.10"]),
        ("blocks.10.hook_resid_post", ["layers.10"]),
        ("blocks.2.hook_mlp_out", ["layers.2.mlp"]),
        ("10-gemmascope-res-16k", ["layers.10"]),
    ],
)
def test_only_the_hookpoints_asked_for_are_loaded(
    repository: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = LocalRepository.fetch

    def watched(self: LocalRepository, path: str) -> Path:
        read.append(path)
        return plain(self, path)

    monkeypatch.setattr(LocalRepository, "fetch", watched)
    assert list(load_coders(str(repository), [pattern])) == expected
    assert {path.rpartition("/")[0] for path in read if path.endswith("safetensors")} == set(expected)


def test_one_coder(repository: Path) -> None:
    coder = load_coder(str(repository), "layers.10")
    assert (coder.name, coder.hookpoint, coder.side) == ("layers.10", "layers.10", "output")
    assert (coder.d_in, coder.d_out, coder.width, coder.k) == (32, 32, 64, 4)
    assert (coder.target, coder.architecture) == (("layers.10", "output"), "topk")
    for spec in (f"{repository}:layers.10", str(repository / "layers.10"), f"mine={repository}:layers.10"):
        again = load_coder(spec)
        assert (again.hash, again.hookpoint) == (coder.hash, "layers.10")
    assert again.name == "mine"
    assert load_coder(str(repository), "layers.10", name="other").name == "other"
    with pytest.raises(InputError, match=r"holds 3 coders \(layers\.2, layers\.2\.mlp, layers\.10\)"):
        load_coder(str(repository))
    with pytest.raises(NotFoundError, match=r"'layers\.1'; did you mean"):
        load_coder(str(repository), "layers.1")


def test_a_coder_at_the_root(tmp_path: Path) -> None:
    folder = toy_topk_coder(tmp_path / "single", root=True)
    assert load_coder(str(folder), "layers.1").hookpoint == "layers.1"
    assert load_coder(f"a={folder}", "h.3").name == "a"
    assert list(load_coders(f"a={folder}", ["layers.1"])) == ["a"]
    for loading in (load_coder, load_coders):
        with pytest.raises(InputError, match="give its hookpoint"):
            loading(str(folder))


def test_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for seed in (0, 1):
        toy_topk_coder(folder / "layers.1" / f"seed{seed}", seed=seed, root=True)
    toy_topk_coder(folder / "layers.2" / "seed0", root=True)
    coders = load_coders(str(folder))
    assert list(coders) == ["layers.1-seed0", "layers.1-seed1", "layers.2"]
    assert {c.hookpoint for c in coders.values()} == {"layers.1", "layers.2"}
    assert list(load_coders(f"{folder}:layers.1/seed1")) == ["layers.1"]
    assert load_coder(f"{folder}:layers.1/seed1").hash == coders["layers.1-seed1"].hash
    assert list(load_coders(f"{folder}:layers.1")) == ["layers.1-seed0", "layers.1-seed1"]
    with pytest.raises(InputError, match=r"2 coders \(layers\.1/seed0, layers\.1/seed1\)"):
        load_coder(str(folder), "layers.1")


def test_several_specs(repository: Path, tmp_path: Path) -> None:
    other = toy_topk_coder(tmp_path / "other", hookpoints=("layers.2",), seed=1)
    with pytest.raises(InputError, match=r"two coders are called 'layers\.2' .*NAME=SPEC"):
        load_coders([str(repository), str(other)], ["layers.2"])
    both = load_coders([str(repository), f"b={other}"], ["layers.2"])
    assert list(both) == ["layers.2", "b"]
    assert {c.hookpoint for c in both.values()} == {"layers.2"}
    assert list(load_coders(f"b={repository}", ["layers.*"])) == ["b-layers.2", "b-layers.10"]


def test_hookpoints_go_to_the_specs_that_have_them(repository: Path, tmp_path: Path) -> None:
    other = toy_topk_coder(tmp_path / "other", hookpoints=("layers.3.mlp",), seed=1)
    single = toy_topk_coder(tmp_path / "single", root=True)
    both = [str(repository), str(other)]
    assert list(load_coders(both, ["layers.2", "layers.3.mlp"])) == ["layers.2", "layers.3.mlp"]
    assert list(load_coders(both, ["layers.2"])) == ["layers.2"]
    with pytest.raises(NotFoundError, match=r"'layers\.3\.mlq'; did you mean layers\.3\.mlp"):
        load_coders(both, ["layers.2", "layers.3.mlq"])
    assert {n: c.hookpoint for n, c in load_coders([*both, f"s={single}"], ["layers.2"]).items()} == {
        "layers.2": "layers.2",
        "s": "layers.2",
    }
    with pytest.raises(InputError, match="give its hookpoint"):
        load_coders([*both, f"s={single}"], ["layers.2", "layers.10"])


def test_inspect_reads_no_weights(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sparsify, "load", None)
    monkeypatch.setattr(LocalRepository, "tensors", None)
    infos = inspect_coders(str(repository))
    assert [info.hookpoint for info in infos] == ["layers.2", "layers.2.mlp", "layers.10"]
    info = infos[2]
    assert (info.d_in, info.d_out, info.width, info.k, info.side, info.dtype) == (32, 32, 64, 4, "output", "F32")
    assert (info.format, info.architecture, info.target, info.threshold) == ("sparsify", "topk", None, None)
    assert (info.path, info.base_model, info.notes) == (str(repository / "layers.10"), None, ())
    assert [info.hookpoint for info in inspect_coders(str(repository), ["layers.2*"])] == ["layers.2"]


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders(tmp_path: Path, activation: str, skip: bool) -> None:
    folder = toy_topk_coder(
        tmp_path / "t", transcode=True, skip=skip, activation=activation, hookpoints=("layers.1.mlp",)
    )
    coder, (info,) = load_coder(str(folder)), inspect_coders(str(folder))
    assert isinstance(coder, LinearCoder)
    assert (coder.point, coder.target) == (("layers.1.mlp", "input"), ("layers.1.mlp", "output"))
    assert (info.side, info.target, info.k) == (coder.side, coder.target, coder.k)
    assert info.architecture == coder.architecture == f"{activation}{' skip' if skip else ''} transcoder"
    assert coder.activation == (TopK(4) if activation == "topk" else GroupMax(4))
    assert (coder.subtract_decoder_bias, coder.skip is not None) == (False, skip)


def test_settings_that_do_not_matter(repository: Path) -> None:
    plain = load_coder(str(repository), "layers.2")
    change(repository / "layers.2", signed=True, multi_topk=True, normalize_decoder=False, novel=[1])
    assert load_coder(str(repository), "layers.2").hash == plain.hash
    change(repository / "layers.2", num_latents=0, expansion_factor=2)
    assert load_coder(str(repository), "layers.2").width == 64


def test_half_precision_files_are_widened(repository: Path) -> None:
    place = repository / "layers.2"
    halves = {n: t.bfloat16() for n, t in load_file(place / "sae.safetensors").items()}
    save_file(halves, place / "sae.safetensors")
    coder, narrow = (load_coder(str(place), dtype=kind) for kind in (None, torch.bfloat16))
    assert coder.encode(torch.ones(1, 32)).values.dtype == torch.float32
    assert narrow.encode(torch.ones(1, 32)).values.dtype == torch.bfloat16
    assert coder.hash == narrow.hash
    assert isinstance(coder, LinearCoder)
    assert torch.equal(coder.encoder, halves["encoder.weight"].float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": None}, "d_in as a whole number of at least 1, it holds None"),
        ({"d_in": "32"}, "d_in as a whole number of at least 1"),
        ({"d_in": True}, "d_in as a whole number of at least 1"),
        ({"d_in": -1}, "d_in"),
        ({"d_in": 31}, r"encoder.weight has shape \[64, 32\], its cfg.json says \[64, 31\]"),
        ({"num_latents": 65}, r"says \[65, 32\]"),
        ({"num_latents": -1}, "num_latents"),
        ({"k": 0}, "k as a whole number of at least 1, it holds 0"),
        ({"k": 65}, "k = 65; it must lie between 1 and its width 64"),
        ({"activation": "jump"}, "allowed: topk, groupmax"),
        ({"activation": ["topk"]}, r"the activation \['topk'\]; allowed: topk, groupmax"),
        ({"d_in": [[[[[[[[1]]]]]]]] * 1000}, "d_in as a whole number"),
        ({"k": 5, "activation": "groupmax"}, "does not divide its width 64"),
        ({"transcode": "yes"}, "transcode as true or false"),
        ({"skip_connection": True}, "lacks W_skip; it has W_dec, b_dec"),
    ],
)
def test_settings_that_cannot_be(repository: Path, settings: dict[str, Any], message: str) -> None:
    change(repository / "layers.2", **settings)
    with pytest.raises((InputError, CorruptError), match=message) as caught:
        load_coder(str(repository), "layers.2")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(type(caught.value), match=message):
        inspect_coders(str(repository), ["layers.2"])
    assert list(load_coders(str(repository), ["layers.10"])) == ["layers.10"]


@pytest.mark.parametrize("text", ["{", "", "[1]", "3", "[" * 100_000, '{"d_in": 1' + " " * (1 << 20) + "}", "\xff"])
def test_damaged_settings(repository: Path, text: str) -> None:
    (repository / "layers.2" / "cfg.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptError, match=r"cfg\.json") as caught:
        load_coder(str(repository), "layers.2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "header", "gone"])
def test_damaged_weights(repository: Path, damage: str) -> None:
    path = repository / "layers.2" / "sae.safetensors"
    data = path.read_bytes()
    made = {"cut": data[:-5], "empty": b"", "noise": bytes(range(256)) * 8, "header": b"\xff" * 8 + data[8:]}
    path.unlink()
    if damage in made:
        path.write_bytes(made[damage])
    with pytest.raises(NotFoundError if damage == "gone" else CorruptError, match=r"sae\.safetensors") as caught:
        load_coder(str(repository), "layers.2")
    assert "\n" not in str(caught.value)


def test_damaged_tensors(repository: Path) -> None:
    place = repository / "layers.2"
    change_tensors(place, b_dec=None, encoder__bias=None)
    with pytest.raises(CorruptError, match=r"lacks b_dec, encoder\.bias; it has W_dec, encoder\.weight"):
        load_coder(str(place))
    change_tensors(place, b_dec=torch.zeros(32), encoder__bias=torch.zeros(64, dtype=torch.int64))
    with pytest.raises(CorruptError, match=r"encoder\.bias is of type I64"):
        load_coder(str(place))
    change_tensors(place, encoder__bias=torch.full((64,), float("nan")))
    with pytest.raises(CorruptError, match=r"encoder\.bias holds NaN"):
        load_coder(str(place))


def test_pickles_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "pickled"
    (folder / "layers.1").mkdir(parents=True)
    torch.save({"x": Trap()}, folder / "layers.1" / "sae.pt")
    for spec in (folder, folder / "layers.1"):
        with pytest.raises(InputError, match=r"holds no sparse coder .*sae\.pt"):
            load_coder(str(spec), "layers.1")
    (folder / "layers.1" / "cfg.json").write_text('{"d_in": 4, "num_latents": 8}')
    with pytest.raises(InputError, match=r"holds no sparse coder .*sae\.pt"):
        load_coder(str(folder), "layers.1")
    assert not (tmp_path / "ran").exists()


def test_weights_without_settings(repository: Path) -> None:
    (repository / "layers.2" / "cfg.json").unlink()
    for loading in (load_coder, inspect_coders, load_coders):
        for spec in (f"{repository}:layers.2", str(repository / "layers.2")):
            with pytest.raises(
                NotFoundError, match=r"there is no .*layers\.2/cfg\.json, only its sae\.safetensors; copy the settings"
            ):
                loading(spec)
    with pytest.raises(NotFoundError, match="copy the settings"):
        load_coders(str(repository))
    assert list(load_coders(str(repository), ["layers.10"])) == ["layers.10"]


def test_settings_without_weights(repository: Path) -> None:
    (repository / "layers.2" / "sae.safetensors").unlink()
    for loading in (load_coder, inspect_coders, load_coders):
        with pytest.raises(
            NotFoundError, match=r"there is no .*layers\.2/sae\.safetensors, only its cfg\.json; copy the weights"
        ):
            loading(str(repository / "layers.2"))
    assert list(load_coders(str(repository), ["layers.10"])) == ["layers.10"]


def found_by_sparsify(folder: Path) -> list[str]:
    return [place.folder for place in Sparsify().find(LocalRepository(folder), "")]


def test_folders_of_other_formats_are_not_claimed(tmp_path: Path) -> None:
    """SAELens writes ``cfg.json`` too, in its early versions with an expansion factor."""
    folder = tmp_path / "blocks.3.hook_resid_pre"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"d_in": 4, "d_sae": 8, "expansion_factor": 2}))
    assert found_by_sparsify(tmp_path) == []
    (folder / "cfg.json").write_text(json.dumps({"d_in": 4, "expansion_factor": 2}))
    assert found_by_sparsify(tmp_path) == ["blocks.3.hook_resid_pre"]
    save_file({"W_enc": torch.ones(4, 8)}, folder / "sae_weights.safetensors")
    assert found_by_sparsify(tmp_path) == []
    for weights in ({"encoder.weight": torch.ones(8, 4), "decoder.weight": torch.ones(4, 8)}, {"W_dec": torch.ones(2)}):
        shutil.rmtree(folder)
        folder.mkdir()
        save_file(weights, folder / "sae.safetensors")
        assert found_by_sparsify(tmp_path) == []
    (folder / "sae.safetensors").write_bytes(b"x")
    assert found_by_sparsify(tmp_path) == []
    shutil.rmtree(folder)
    toy_topk_coder(folder, root=True)
    (folder / "cfg.json").rename(folder / "hyperparams.json")
    assert found_by_sparsify(tmp_path) == []


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no sparse coder of a known format \(sparsify, .*and no weights"):
        load_coder(str(tmp_path))
    with pytest.raises(NotFoundError, match="there is no coder folder"):
        load_coder(str(tmp_path / "none"))
    with pytest.raises(NotFoundError, match=r"there is no folder 'sub' in '"):
        load_coder(f"{tmp_path}:sub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="or it is empty"):
        load_coder(str(tmp_path / "empty"))


def test_hostile_folder_names(repository: Path) -> None:
    shutil.copytree(repository / "layers.2", repository / "layers.3 <b>")
    with pytest.raises(InputError, match="cannot be used"):
        load_coders(str(repository))
    with pytest.raises(InputError, match="cannot be used"):
        load_coder(str(repository), "layers.2", name="../../etc")


def test_fit(repository: Path, subject: Subject, tmp_path: Path) -> None:
    assert fit_coder(load_coder(str(repository), "layers.2"), subject).point == ("layers.2", "output")
    with pytest.raises(MismatchError, match=r"unknown hookpoint 'layers\.10'"):
        fit_coder(load_coder(str(repository), "layers.10"), subject)
    wide = load_coder(str(toy_topk_coder(tmp_path / "wide", d=48)), "layers.1")
    with pytest.raises(MismatchError, match=r"reads 48 dimensions, the output of layers\.1 .* has 32"):
        fit_coder(wide, subject)
    folder = toy_topk_coder(tmp_path / "t", transcode=True, hookpoints=("layers.1.mlp",))
    assert fit_coder(load_coder(str(folder)), subject).target == ("layers.1.mlp", "output")
    single = toy_topk_coder(tmp_path / "single", root=True)
    with pytest.raises(MismatchError, match="stands for 3 hookpoints"):
        fit_coder(load_coder(str(single), "layers.*", name="x"), subject)
    spelled = load_coder(str(single), "blocks.1.hook_resid_post")
    assert fit_coder(spelled, subject).point == ("layers.1", "output")


def test_a_coder_of_another_model_is_told(repository: Path, subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    settings = json.loads((repository / "config.json").read_text())
    for model, expected in (("org/other", 1), ("org/TOY", 0), (None, 0)):
        write_json(repository / "config.json", {**settings, "model": model})
        for spec in (f"{repository}:layers.2", str(repository / "layers.2")):
            assert [info.base_model for info in inspect_coders(spec)] == [model]
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="exegete"):
                fit_coder(load_coder(spec), subject)
            assert len(caplog.records) == expected


def test_where_the_base_model_is_read(tmp_path: Path) -> None:
    """In the run's settings, at most two folders up, whichever of them the spec names; others' settings say nothing."""
    run = tmp_path / "run"
    toy_topk_coder(run / "h.1" / "seed0", root=True)
    write_json(run / "config.json", {"sae": {}, "model": "a/b"})
    for spec in (str(run), f"{run}:h.1", f"{run}:h.1/seed0", str(run / "h.1"), str(run / "h.1" / "seed0")):
        coder = load_coder(spec)
        assert (coder.hookpoint, coder.name, coder.base_model) == ("h.1", "h.1", "a/b")
    assert load_coder(str(tmp_path)).base_model == "a/b"
    deep = tmp_path / "deep" / "x" / "y"
    shutil.copytree(run / "h.1", deep / "h.1")
    write_json(tmp_path / "deep" / "config.json", {"sae": {}, "model": "too/far"})
    assert load_coder(str(deep / "h.1" / "seed0")).base_model is None
    for text in ('{"model": "a/b"}', '{"sae": {}, "model": 3}', "[1]", "{"):
        (run / "config.json").write_text(text)
        assert load_coder(str(run / "h.1" / "seed0")).base_model is None
        assert load_coder(str(run)).base_model is None
