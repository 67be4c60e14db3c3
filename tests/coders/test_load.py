from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from exegete.coders import inspect_coders, load_coder, load_coders
from exegete.coders.coder import SparseCoder
from exegete.coders.formats.format import CoderFormat, CoderInfo, Place, module_name
from exegete.coders.load import CoderSpec, find_coders, planned
from exegete.coders.repository import LocalRepository, Repository
from exegete.errors import InputError, NotFoundError
from exegete.testing import toy_topk_coder

POINTS = ("layers.10", "layers.2", "layers.2.mlp")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return toy_topk_coder(tmp_path / "repo", hookpoints=POINTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", (None, "a/b", "")),
        ("a/b:layers.3", (None, "a/b", "layers.3")),
        ("a/b:layers.3/", (None, "a/b", "layers.3")),
        ("a/b:./layers.3//x", (None, "a/b", "layers.3/x")),
        ("a/b:.", (None, "a/b", "")),
        ("n=a/b:x/layers.3", ("n", "a/b", "x/layers.3")),
        ("/p/a=b", (None, "/p/a=b", "")),
        ("a/b:x=y", (None, "a/b", "x=y")),
    ],
)
def test_specs(text: str, expected: tuple[str | None, str, str]) -> None:
    spec = CoderSpec.parse(text)
    assert (spec.name, spec.where, spec.sub) == expected


@pytest.mark.parametrize("text", ["", "a/b:../c", "a/b:/etc", "n=", ":x", "bad name=a/b", "a/b:x/../../c", "=a/b"])
def test_specs_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError) as caught:
        CoderSpec.parse(text)
    assert "\n" not in str(caught.value)


def test_specs_of_paths_with_odd_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_topk_coder(tmp_path / "a=b:c")
    monkeypatch.chdir(tmp_path)
    assert load_coder("a=b:c").hookpoint == "layers.1"
    assert load_coder(f"{folder}:layers.1").hookpoint == "layers.1"
    for text in ("~nobody-of-this-name/x", "x" * 5000, "a\0b"):
        with pytest.raises(NotFoundError, match="there is no coder folder"):
            load_coder(text)


def test_a_file_stands_for_its_coder(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_coder(str(repository), "layers.2").hash
    weights = repository / "layers.2" / "sae.safetensors"
    for spec in (str(weights), f"x={weights.parent / 'cfg.json'}", f"{repository}:layers.2/sae.safetensors"):
        coder = load_coder(spec)
        assert (coder.hookpoint, coder.hash) == ("layers.2", expected)
    monkeypatch.chdir(weights.parent)
    assert load_coder("sae.safetensors", "layers.2").hash == expected
    (repository / "layers.2" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt' holds no sparse coder of a known format"):
        load_coder(str(repository / "layers.2" / "notes.txt"))


def test_names(repository: Path, tmp_path: Path) -> None:
    assert list(load_coders(str(repository))) == ["layers.2", "layers.2.mlp", "layers.10"]
    assert list(load_coders(f"n={repository}:layers.2")) == ["n"]
    assert list(load_coders(f"n={repository}")) == ["n-layers.2", "n-layers.2.mlp", "n-layers.10"]
    assert load_coder(f"n={repository}:layers.2", name="given").name == "given"
    for again in ([str(repository), str(repository)], [f"a={repository}:layers.2", f"a={repository}:layers.10"]):
        with pytest.raises(
            InputError, match=r"two coders are called '(layers\.2|a)' .*name one of them with NAME=SPEC"
        ):
            load_coders(again)
    with pytest.raises(InputError, match="cannot be used"):
        load_coder(str(repository), "layers.2", name="a/b")


def test_globs_and_spellings(repository: Path) -> None:
    def chosen(*patterns: str) -> list[str]:
        return [hookpoint for *_, hookpoint in planned([str(repository)], patterns)]

    assert chosen("layers.*") == ["layers.2", "layers.10"]
    assert chosen("layers.*.mlp", "layers.10") == ["layers.2.mlp", "layers.10"]
    assert chosen("blocks.*.hook_resid_post") == ["layers.2", "layers.10"]
    assert chosen("blocks.11.hook_resid_pre") == ["layers.10"]
    assert chosen("transformer.layers.2") == ["layers.2"]
    for pattern in ("layers.3", "h.2", "blocks.3.hook_resid_post", "layers.*.self_attn"):
        with pytest.raises(NotFoundError) as caught:
            chosen(pattern)
        assert "\n" not in str(caught.value)


class Listed(CoderFormat):
    """A format that is a list of places."""

    name = "listed"

    def __init__(self, *hookpoints: str | None, labels: tuple[str, ...] = ("",)) -> None:
        self.places = tuple(
            Place(folder=f"{i}/{label}".rstrip("/"), files=(f"{i}/{label}/w.npz",), hookpoint=hookpoint, label=label)
            for i, hookpoint in enumerate(hookpoints)
            for label in labels
        )

    def find(self, repository: Repository, folder: str) -> tuple[Place, ...]:
        return self.places

    def inspect(self, repository: Repository, place: Place) -> CoderInfo:
        raise NotImplementedError

    def load(
        self, repository: Repository, place: Place, *, name: str, hookpoint: str, device: str, dtype: torch.dtype
    ) -> SparseCoder:
        raise NotImplementedError


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "any").write_text("x")

    def use(*hookpoints: str | None, labels: tuple[str, ...] = ("",)) -> str:
        monkeypatch.setattr("exegete.coders.load.formats", lambda: (Listed(*hookpoints, labels=labels),))
        return str(tmp_path)

    return use


@pytest.mark.parametrize(
    ("held", "asked", "expected"),
    [
        ("blocks.12.hook_resid_post", "layers.12", True),
        ("blocks.12.hook_resid_post", "h.12", True),
        ("blocks.12.hook_resid_post", "transformer.h.12", True),
        ("blocks.12.hook_resid_post", "blocks.12.hook_resid_post", True),
        ("blocks.12.hook_resid_post", "blocks.*.hook_resid_post", True),
        ("blocks.12.hook_resid_post", "blocks.13.hook_resid_pre", True),
        ("blocks.12.hook_resid_post", "12-gemmascope-res-16k", True),
        ("blocks.12.hook_resid_post", "layers.*", True),
        ("blocks.12.hook_resid_post", "layers.1", False),
        ("blocks.12.hook_resid_pre", "layers.11", True),
        ("blocks.12.hook_resid_pre", "h.11", True),
        ("blocks.12.hook_resid_pre", "blocks.11.hook_resid_post", True),
        ("blocks.12.hook_resid_pre", "layers.12", False),
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre", True),
        ("blocks.0.hook_resid_pre", "layers.0", False),
        ("blocks.3.hook_mlp_out", "layers.3.mlp", True),
        ("blocks.3.hook_mlp_out", "layers.3", False),
        ("blocks.3.hook_attn_out", "layers.3.self_attn", True),
        ("blocks.3.attn.hook_z", "blocks.3.attn.hook_z", True),
        ("h.12", "blocks.12.hook_resid_post", True),
        ("layers.12", "blocks.12.hook_resid_post", True),
        ("layers.12", "model.layers.12", True),
    ],
)
def test_one_hookpoint_in_several_spellings(listed: Any, held: str, asked: str, expected: bool) -> None:
    where = listed("embed_tokens", held)
    if expected:
        assert [hookpoint for *_, hookpoint in planned([where], [asked])] == [held]
    else:
        with pytest.raises(NotFoundError):
            planned([where], [asked])


def test_coders_of_one_hookpoint(listed: Any) -> None:
    labels = tuple(f"width_{i}/l0" for i in range(16))
    names = [name for _, _, name, _ in planned([listed("layers.1", "layers.2", labels=labels)], ["layers.1"])]
    assert names == [f"layers.1-width_{i}-l0" for i in range(16)]
    more = tuple(f"w{i}" for i in range(17))
    with pytest.raises(InputError, match=r"holds 17 coders at layers\.1; name the folder of one, such as .*:0/w0"):
        planned([listed("layers.1", labels=more)], [])
    with pytest.raises(InputError, match=r"holds 34 coders \(0/w0, .*, …\); name one as hookpoint, or with PATH:SUB"):
        load_coder(listed("layers.1", "layers.2", labels=more))
    assert [name for _, _, name, _ in planned([listed("layers.1", labels=("w0",))], [])] == ["layers.1"]


def test_coders_that_do_not_say_where_they_read(listed: Any) -> None:
    assert [one[3] for one in planned([listed(None)], ["layers.5"])] == ["layers.5"]
    for asked in ((), ("layers.1", "layers.2")):
        with pytest.raises(InputError, match=r"does not say where it reads; give its hookpoint, such as layers\.3"):
            planned([listed(None)], asked)


def test_a_folder_is_taken_by_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "any").write_text("x")
    first, second = Listed("layers.1"), Listed("layers.7", "layers.8")
    monkeypatch.setattr("exegete.coders.load.formats", lambda: (first, second))
    found = find_coders(LocalRepository(tmp_path))
    assert [(one.format, one.place.hookpoint) for one in found] == [(first, "layers.1"), (second, "layers.8")]


def test_places() -> None:
    def shown(folder: str, hookpoint: str | None, label: str) -> str:
        return str(Place(folder=folder, files=(), hookpoint=hookpoint, label=label))

    assert shown("a/layers.1", "layers.1", "") == "a/layers.1"
    assert shown("a/layers.1/seed0", "layers.1", "seed0") == "a/layers.1/seed0"
    assert shown("", "layers.1", "16k") == "layers.1 16k"
    assert shown("", None, "") == "."
    names = {"a/layers.3": "layers.3", "h.1.mlp": "h.1.mlp", "x/embed_tokens": "embed_tokens", "run": None, "": None}
    assert {name: module_name(name) for name in names} == names
    assert module_name("my-layers.3") is None


def test_inspect(repository: Path, tmp_path: Path) -> None:
    other = toy_topk_coder(tmp_path / "single", root=True)
    infos = inspect_coders([str(repository), str(other)], ["layers.2"])
    assert [(info.hookpoint, info.path) for info in infos] == [
        ("layers.2", str(repository / "layers.2")),
        (None, str(other)),
    ]
    assert len(inspect_coders([str(repository), str(repository)])) == 6


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """A hub that holds the repository; what is asked of it is noted."""
    asked: list[tuple[str, ...]] = []

    def model_info(name: str, *, revision: str | None, timeout: float) -> Any:
        asked.append(("list", name))
        files = [p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()]
        return SimpleNamespace(sha="abc123", siblings=[SimpleNamespace(rfilename=f) for f in files])

    def download(name: str, path: str, *, revision: str) -> str:
        asked.append(("fetch", path, revision))
        (tmp_path / "cache" / path).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(repository / path, tmp_path / "cache" / path))

    def opened(address: str, *, block_size: int) -> Any:
        asked.append(("open", address))
        return (repository / address.partition("@abc123/")[2]).open("rb")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(open=opened))
    return asked


def test_hub(hub: list[tuple[str, ...]], repository: Path) -> None:
    """The hub is asked what there is, then for the settings and weights chosen, at one revision."""
    loaded = load_coders("Org/coders", ["layers.1*"])
    assert list(loaded) == ["layers.10"]
    assert loaded["layers.10"].hash == load_coder(str(repository), "layers.10").hash
    assert hub[0] == ("list", "Org/coders")
    assert [one for one in hub if one[0] == "list"] == hub[:1]
    fetched = {one[1] for one in hub if one[0] == "fetch"}
    assert fetched == {"layers.10/cfg.json", "config.json", "layers.10/sae.safetensors"}
    assert {one[2] for one in hub if one[0] == "fetch"} == {"abc123"}
    assert {one[1] for one in hub if one[0] == "open"} == {"Org/coders@abc123/layers.10/sae.safetensors"}
    assert load_coder("x=Org/coders:layers.2").name == "x"
    assert load_coder("Org/coders:layers.2/sae.safetensors").name == "layers.2"
    with pytest.raises(NotFoundError, match="there is no folder 'none' in 'Org/coders'"):
        load_coder("Org/coders:none")


def test_inspecting_a_hub_repository_fetches_no_weights(hub: list[tuple[str, ...]]) -> None:
    infos = inspect_coders("Org/coders")
    assert [info.path for info in infos] == [
        f"Org/coders/{point}" for point in ("layers.2", "layers.2.mlp", "layers.10")
    ]
    assert not any(one[0] == "fetch" and one[1].endswith("safetensors") for one in hub)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError, match=r"'Org-no/such' cannot be fetched .* give a local folder"):
        load_coder("Org-no/such")

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (tmp_path / "runs").mkdir()
    for spec in ("./none", "a/b/c", "runs/none", "alone"):
        with pytest.raises(NotFoundError, match="there is no coder folder"):
            load_coder(spec)
