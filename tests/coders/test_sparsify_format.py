from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from exegete.coders import check_fit, inspect_coders, load_coder, load_coders
from exegete.coders.formats import sparsify
from exegete.coders.load import CoderSpec
from exegete.coders.topk import TopKCoder
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
    plain = sparsify.load

    def watched(place: sparsify.CoderFolder, **options: Any) -> TopKCoder:
        read.append(str(place.hookpoint))
        return plain(place, **options)

    monkeypatch.setattr(sparsify, "load", watched)
    assert list(load_coders(str(repository), [pattern])) == expected
    assert read == expected


def test_one_coder(repository: Path) -> None:
    coder = load_coder(str(repository), "layers.10")
    assert (coder.name, coder.hookpoint, coder.side) == ("layers.10", "layers.10", "output")
    assert (coder.d_in, coder.d_out, coder.width, coder.k) == (32, 32, 64, 4)
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
    monkeypatch.setattr(sparsify, "load", None)
    infos = inspect_coders(str(repository))
    assert list(infos) == ["layers.2", "layers.2.mlp", "layers.10"]
    info = infos["layers.10"]
    assert (info.d_in, info.d_out, info.width, info.k, info.side, info.dtype) == (32, 32, 64, 4, "output", "F32")
    assert (info.activation, info.transcode, info.skip, info.hookpoint) == ("topk", False, False, "layers.10")


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
    assert isinstance(coder, TopKCoder)
    assert torch.equal(coder.encoder, halves["encoder.weight"].float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": None}, "d_in as a positive integer, it holds None"),
        ({"d_in": "32"}, "d_in as a positive integer"),
        ({"d_in": True}, "d_in as a positive integer"),
        ({"d_in": -1}, "d_in"),
        ({"d_in": 31}, r"encoder.weight has shape \[64, 32\], its cfg.json says \[64, 31\]"),
        ({"num_latents": 65}, r"says \[65, 32\]"),
        ({"num_latents": -1}, "num_latents"),
        ({"k": 0}, "k as a positive"),
        ({"k": 65}, "k = 65; it must lie between 1 and its width 64"),
        ({"activation": "jump"}, "allowed: topk, groupmax"),
        ({"activation": ["topk"]}, "allowed: topk, groupmax"),
        ({"transcode": "yes"}, "transcode as true or false"),
        ({"skip_connection": True}, "lacks W_skip; it has W_dec, b_dec"),
    ],
)
def test_settings_that_cannot_be(repository: Path, settings: dict[str, Any], message: str) -> None:
    change(repository / "layers.2", **settings)
    with pytest.raises((InputError, CorruptError), match=message) as caught:
        load_coder(str(repository), "layers.2")
    assert "\n" not in str(caught.value)
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
        def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    folder = tmp_path / "pickled"
    (folder / "layers.1").mkdir(parents=True)
    torch.save(Trap(), folder / "layers.1" / "sae.pt")
    for spec in (folder, folder / "layers.1"):
        with pytest.raises(InputError, match=r"pickled weights only .*sae\.pt.*convert"):
            load_coder(str(spec), "layers.1")
    (folder / "layers.1" / "cfg.json").write_text('{"d_in": 4}')
    with pytest.raises(InputError, match="pickled weights only"):
        load_coder(str(folder), "layers.1")
    assert not (tmp_path / "ran").exists()


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sparse coder: expected cfg\.json"):
        load_coder(str(tmp_path))
    with pytest.raises(NotFoundError, match="there is no coder folder"):
        load_coder(str(tmp_path / "none"))
    with pytest.raises(NotFoundError, match=r"there is no folder 'sub' in"):
        load_coder(f"{tmp_path}:sub")


def test_hostile_folder_names(repository: Path) -> None:
    shutil.copytree(repository / "layers.2", repository / "layers.3 <b>")
    with pytest.raises(InputError, match="cannot be used"):
        load_coders(str(repository))
    with pytest.raises(InputError, match="cannot be used"):
        load_coder(str(repository), "layers.2", name="../../etc")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", (None, "a/b", "")),
        ("a/b:layers.3", (None, "a/b", "layers.3")),
        ("n=a/b:x/layers.3", ("n", "a/b", "x/layers.3")),
        ("/p/a=b", (None, "/p/a=b", "")),
    ],
)
def test_specs(text: str, expected: tuple[str | None, str, str]) -> None:
    spec = CoderSpec.parse(text)
    assert (spec.name, spec.where, spec.sub) == expected


@pytest.mark.parametrize("text", ["", "a/b:../c", "a/b:/etc", "n=", ":x", "bad name=a/b"])
def test_specs_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError):
        CoderSpec.parse(text)


def test_specs_of_paths_with_odd_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_topk_coder(tmp_path / "a=b:c")
    monkeypatch.chdir(tmp_path)
    assert load_coder("a=b:c").hookpoint == "layers.1"
    assert load_coder(f"{folder}:layers.1").hookpoint == "layers.1"


def test_hub(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is asked for the settings first, then for the weights chosen, at one revision."""
    cache = tmp_path / "cache" / "abc123"
    asked: list[tuple[str, list[str], str | None]] = []

    def download(name: str, *, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((name, allow_patterns, revision))
        for path in repository.rglob("*"):
            relative = path.relative_to(repository)
            if path.is_file() and any(Path(relative.as_posix()).match(p) for p in allow_patterns):
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / relative)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert list(load_coders("Org/coders", ["layers.1*"])) == ["layers.10"]
    assert asked == [
        ("Org/coders", ["*cfg.json", "*config.json"], None),
        ("Org/coders", ["layers.10/sae.safetensors"], "abc123"),
    ]
    assert not (cache / "layers.2" / "sae.safetensors").exists()
    assert load_coder("x=Org/coders:layers.2").name == "x"


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match=r"'Org-no/such' cannot be fetched .* give a local folder"):
        load_coder("Org-no/such")

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (tmp_path / "runs").mkdir()
    for spec in ("./none", "a/b/c", "runs/none", "alone"):
        with pytest.raises(NotFoundError, match="there is no coder folder"):
            load_coder(spec)


def test_check_fit(repository: Path, subject: Subject, tmp_path: Path) -> None:
    check_fit(load_coder(str(repository), "layers.2"), subject)
    with pytest.raises(MismatchError, match=r"unknown hookpoint 'layers\.10'"):
        check_fit(load_coder(str(repository), "layers.10"), subject)
    wide = load_coder(str(toy_topk_coder(tmp_path / "wide", d=48)), "layers.1")
    with pytest.raises(MismatchError, match=r"reads 48 dimensions, the output of layers\.1 .* has 32"):
        check_fit(wide, subject)
    check_fit(load_coder(str(toy_topk_coder(tmp_path / "t", transcode=True, hookpoints=("layers.1.mlp",)))), subject)
    single = toy_topk_coder(tmp_path / "single", root=True)
    with pytest.raises(MismatchError, match="stands for 3 hookpoints"):
        check_fit(load_coder(str(single), "layers.*", name="x"), subject)


def test_check_fit_of_both_sides(subject: Subject) -> None:
    def transcoder(d_in: int, d_out: int, hookpoint: str) -> TopKCoder:
        return TopKCoder(
            name="t",
            hookpoint=hookpoint,
            encoder=torch.zeros(4, d_in),
            encoder_bias=torch.zeros(4),
            decoder=torch.zeros(4, d_out),
            decoder_bias=torch.zeros(d_out),
            k=1,
            transcode=True,
        )

    check_fit(transcoder(64, 32, "layers.1.mlp.down_proj"), subject)
    with pytest.raises(MismatchError, match=r"predicts 64 dimensions, the output of .*down_proj .* has 32"):
        check_fit(transcoder(64, 64, "layers.1.mlp.down_proj"), subject)
    with pytest.raises(MismatchError, match=r"reads 32 dimensions, the input of .* has 64"):
        check_fit(transcoder(32, 32, "layers.1.mlp.down_proj"), subject)


def test_a_coder_of_another_model_is_told(repository: Path, subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    settings = json.loads((repository / "config.json").read_text())
    for model, expected in (("org/other", 1), ("org/TOY", 0), (None, 0)):
        write_json(repository / "config.json", {**settings, "model": model})
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="exegete"):
            check_fit(load_coder(str(repository), "layers.2"), subject)
        assert len(caplog.records) == expected
