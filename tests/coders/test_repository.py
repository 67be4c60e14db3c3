from __future__ import annotations

import io
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from exegete.coders import repository as module
from exegete.coders.repository import HubRepository, LocalRepository, open_repository
from exegete.errors import CorruptError, NotFoundError

FIRST, SECOND = "a" * 40, "b" * 40


def write(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    return folder


def test_files_in_natural_order_without_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, "layers.10/b", "layers.2/a.10", "layers.2/a.9", "z", ".git/config", "layers.2/.hidden", ".top")
    repository = LocalRepository(tmp_path)
    assert repository.files == ("layers.2/a.9", "layers.2/a.10", "layers.10/b", "z")
    assert repository.under("layers.2") == ("layers.2/a.9", "layers.2/a.10")
    assert repository.under("layers") == ()
    assert repository.under("") == repository.files
    assert "z" in repository
    assert ".top" not in repository
    assert repository.fetch("layers.10/b") == tmp_path / "layers.10/b"
    assert repository.where("z") == f"{tmp_path}/z"
    assert repository.where("") == str(tmp_path)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/hostname", "none", "", "a"])
def test_what_is_not_in_it_is_not_fetched(tmp_path: Path, path: str) -> None:
    write(tmp_path, "secret")
    repository = LocalRepository(write(tmp_path / "repo", "a/b"))
    for read in (repository.fetch, repository.stream, repository.json, repository.tensors):
        with pytest.raises(NotFoundError, match="there is no"):
            read(path)


def test_links(tmp_path: Path) -> None:
    """Links are followed, out of the folder too; those back up, to themselves or to nothing end there."""
    outside = write(tmp_path / "outside", "cfg.json")
    top = write(tmp_path / "repo", "layers.1/cfg.json")
    (top / "layers.2").symlink_to(outside)
    (top / "layers.1" / "up").symlink_to(top)
    (top / "layers.1" / "self").symlink_to(top / "layers.1" / "self")
    (top / "layers.1" / "gone").symlink_to(tmp_path / "nothing")
    (top / "file.json").symlink_to(outside / "cfg.json")
    repository = LocalRepository(top)
    assert repository.files == ("file.json", "layers.1/cfg.json", "layers.1/gone", "layers.1/self", "layers.2/cfg.json")
    assert repository.json("layers.2/cfg.json") == repository.json("file.json") == {}
    for path in ("layers.1/gone", "layers.1/self"):
        with pytest.raises(NotFoundError, match="there is no"):
            repository.fetch(path)
    (tmp_path / "link").symlink_to(top)
    assert LocalRepository(tmp_path / "link").files == repository.files


def test_links_that_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        (tmp_path / str(i)).mkdir()
        for j in range(9):
            (tmp_path / str(i) / f"to{j}").symlink_to(tmp_path / str(j))
    monkeypatch.setattr(module, "_MOST_FILES", 500)
    with pytest.raises(NotFoundError, match="holds over 500 files; give the folder of the coders"):
        _ = LocalRepository(tmp_path).files


def test_names_that_would_break_a_line_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, "a\nb/cfg.json", "ok")
    assert LocalRepository(tmp_path).files == ("ok",)


def test_special_files_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cfg.json")
    with pytest.raises(NotFoundError, match="there is no"):
        LocalRepository(tmp_path).json("cfg.json")


@pytest.mark.parametrize(
    "text", ["{", "", "[" * 100_000, '{"d_in": 1' + " " * (1 << 20) + "}", "\xff", "a: [b", "&a [*a, *a" + "\t"]
)
def test_damaged_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "cfg.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptError, match=r"cfg\.json") as caught:
        LocalRepository(tmp_path).json("cfg.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"k": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "a.yaml").write_text("k: [1, 2]\n")
    (tmp_path / "code.yaml").write_text(f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n")
    (tmp_path / "broken.yaml").write_text("k: [1\n'")
    repository = LocalRepository(tmp_path)
    assert repository.settings("a.json") == {"k": 1}
    assert repository.yaml("a.yaml") == {"k": [1, 2]}
    with pytest.raises(CorruptError, match=r"list\.json does not hold settings"):
        repository.settings("list.json")
    for name in ("code.yaml", "broken.yaml"):
        with pytest.raises(CorruptError, match="does not parse as YAML") as caught:
            repository.yaml(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_settings_above(tmp_path: Path) -> None:
    write(tmp_path, "run/layers.1/seed0/cfg.json")
    (tmp_path / "run" / "config.json").write_text('{"a": 1}')
    repository = LocalRepository(tmp_path / "run" / "layers.1" / "seed0")
    assert repository.json_above("config.json", 1) is None
    assert repository.json_above("config.json", 2) == {"a": 1}
    assert repository.json_above("config.json", 0) is None
    assert LocalRepository(Path("/")).json_above("config.json", 2) is None


def test_weights(tmp_path: Path) -> None:
    save_file({"W": torch.ones(2, 3), "b": torch.zeros(3)}, tmp_path / "a.safetensors")
    repository = LocalRepository(tmp_path)
    assert {n: i.shape for n, i in repository.header("a.safetensors").items()} == {"W": (2, 3), "b": (3,)}
    assert repository.tensors("a.safetensors", ("b",)).keys() == {"b"}


def test_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "runs/a")
    assert isinstance(open_repository("runs"), LocalRepository)
    assert isinstance(open_repository("Org/coders"), HubRepository)
    spellings = ("./none", "a/b/c", "runs/none", "alone", "~nobody-of-this-name/x", "x" * 5000, "a\0/b", "../x/y", "")
    for where in spellings:
        with pytest.raises(NotFoundError, match="there is no coder folder") as caught:
            open_repository(where)
        assert "\n" not in str(caught.value)


class Hub:
    """A hub of one repository with two commits, as far as readers ask; everything asked for is noted."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.commits = {FIRST: folder / FIRST, SECOND: folder / SECOND}
        self.branches = {None: FIRST, "main": FIRST, "old": SECOND}
        self.cache = cache
        self.asked: list[tuple[str, ...]] = []
        self.remote_bytes = 0

    def model_info(self, name: str, *, revision: str | None = None, timeout: float | None = None) -> Any:
        self.asked.append(("list", str(revision)))
        commit = self.branches.get(revision, revision)
        top = self.commits[str(commit)]
        files = [p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()]
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=f) for f in files])

    def local(self, name: str, commit: str, path: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit / path

    def download(self, name: str, path: str, *, revision: str) -> str:
        self.asked.append(("fetch", path, revision))
        local = self.local(name, revision, path)
        local.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.commits[revision] / path, local)
        return str(local)

    def cached(self, name: str, path: str, *, revision: str) -> str | None:
        local = self.local(name, revision, path)
        return str(local) if local.exists() else None

    def open(self, address: str, *, block_size: int) -> io.BytesIO:
        _, _, rest = address.partition("@")
        commit, _, path = rest.partition("/")
        self.asked.append(("open", path, commit))
        hub = self

        class Remote(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                data = super().read(size)
                hub.remote_bytes += len(data)
                return data

        return Remote((self.commits[commit] / path).read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "server", tmp_path / "cache")
    for i, commit in enumerate((FIRST, SECOND)):
        folder = tmp_path / "server" / commit / "layers.1"
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps({"k": i}))
        save_file({"W": torch.full((2, 3), float(i)), "big": torch.zeros(100_000)}, folder / "sae.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=made.model_info))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", made.cached)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(open=made.open))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_snapshot)
    return made


def no_snapshot(name: str, *, revision: str | None, local_files_only: bool) -> str:
    assert local_files_only
    raise errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nfor the revision.")


def test_hub_files_are_listed_and_only_what_is_asked_for_is_fetched(hub: Hub) -> None:
    repository = HubRepository("Org/coders")
    assert hub.asked == []
    assert repository.files == ("layers.1/cfg.json", "layers.1/sae.safetensors")
    assert repository.settings("layers.1/cfg.json") == {"k": 0}
    assert hub.asked == [("list", "None"), ("fetch", "layers.1/cfg.json", FIRST)]
    assert repository.header("layers.1/sae.safetensors")["big"].shape == (100_000,)
    assert hub.asked[2:] == [("open", "layers.1/sae.safetensors", FIRST)]
    assert 0 < hub.remote_bytes < 100_000
    assert repository.tensors("layers.1/sae.safetensors", ("W",))["W"].tolist() == [[0.0] * 3] * 2
    assert hub.asked[3:] == [("fetch", "layers.1/sae.safetensors", FIRST)]
    repository.header("layers.1/sae.safetensors")  # now from the cache
    assert len(hub.asked) == 4
    with pytest.raises(NotFoundError, match="there is no Org/coders/none"):
        repository.fetch("none")
    with pytest.raises(NotFoundError, match="there is no Org/coders/none"):
        repository.stream("none")
    assert len(hub.asked) == 4


def test_the_commit_is_looked_up_once(hub: Hub) -> None:
    """A push between two requests changes nothing: all files are of the commit that was listed."""
    repository = HubRepository("Org/coders", "main")
    assert repository.settings("layers.1/cfg.json") == {"k": 0}
    hub.branches["main"] = SECOND
    assert repository.tensors("layers.1/sae.safetensors", ("W",))["W"].tolist() == [[0.0] * 3] * 2
    assert [one for one in hub.asked if one[0] == "list"] == [("list", "main")]
    assert {one[2] for one in hub.asked if one[0] != "list"} == {FIRST}
    assert HubRepository("Org/coders", "main").settings("layers.1/cfg.json") == {"k": 1}
    assert HubRepository("Org/coders", "old").settings("layers.1/cfg.json") == {"k": 1}


@pytest.mark.parametrize(("spec", "asked"), [("org/coders", "None"), ("org/coders@v1", "v1"), ("org/coders@", "None")])
def test_a_revision_may_be_named(hub: Hub, spec: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.branches, "v1", hub.branches[None])
    opened = open_repository(spec)
    assert opened.name == "org/coders"
    assert opened.files
    assert hub.asked[0] == ("list", asked)


def test_hub_paths_that_lead_elsewhere(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["../../up", "/etc/passwd", "a/../../b", "ok", "line\nbreak"]
    info = SimpleNamespace(sha=FIRST, siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(hub, "model_info", lambda *a, **o: info)
    repository = HubRepository("Org/coders")
    assert repository.files == ("ok",)
    with pytest.raises(NotFoundError):
        repository.fetch("../../up")


def response(status: int) -> Any:
    """What the hub's client raises for a status, whatever library it is built on."""
    http = errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
    library = __import__(http)
    request = library.Request("GET", "https://hub/api")
    return errors.RepositoryNotFoundError(
        f"{status} Client Error.\n\nRepository Not Found for url: https://hub/api.\nPlease make sure.",
        response=library.Response(status, request=request),
    )


def test_a_repository_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise response(404)

    monkeypatch.setattr(hub, "model_info", refuse)
    write(hub.cache, f"models--Org--none/snapshots/{FIRST}/cfg.json")
    with pytest.raises(
        NotFoundError, match=r"'Org/none' cannot be fetched .*404 .*Repository Not Found.*give a local"
    ) as caught:
        _ = HubRepository("Org/none").files
    assert "\n" not in str(caught.value)


def unreachable(*args: object, **options: object) -> None:
    library = __import__(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    raise library.ConnectError("[Errno 111]\nConnection refused")


def test_without_a_connection_the_cache_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    HubRepository("Org/coders", "old").fetch("layers.1/cfg.json")
    HubRepository("Org/coders").fetch("layers.1/cfg.json")
    os.utime(hub.local("Org/coders", SECOND, ""), (1, 1))
    monkeypatch.setattr(hub, "model_info", unreachable)
    before = list(hub.asked)
    with caplog.at_level(logging.WARNING, logger="exegete"):
        repository = HubRepository("Org/coders")
        assert repository.files == ("layers.1/cfg.json",)
    assert repository.settings("layers.1/cfg.json") == {"k": 0}
    with repository.stream("layers.1/cfg.json") as stream:
        assert stream.read() == b'{"k": 0}'
    assert hub.asked == before
    assert "cannot be reached; of Org/coders what is cached is used" in caplog.text
    with pytest.raises(NotFoundError, match=r"cannot be fetched .*Connection refused.* give a local folder") as caught:
        _ = HubRepository("Org/other").files
    assert "\n" not in str(caught.value)
    with pytest.raises(NotFoundError):
        _ = HubRepository("Org/coders", "v2").files  # which commit that is, is not known


def test_offline_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    HubRepository("Org/coders").fetch("layers.1/cfg.json")
    before = list(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert HubRepository("Org/coders").files == ("layers.1/cfg.json",)
    with pytest.raises(NotFoundError, match=r"'Org/none' cannot be fetched .*give a local folder") as caught:
        _ = HubRepository("Org/none").files
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(hub.local(name, FIRST, "layers.1")))
    assert HubRepository("Org/coders").files == ("cfg.json",)
    assert hub.asked == before


def test_a_connection_that_breaks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = HubRepository("Org/coders")
    assert "layers.1/cfg.json" in repository
    broken = SimpleNamespace(seek=lambda *_: 0, tell=lambda: 0, read=unreachable, close=lambda: None)
    monkeypatch.setattr(hub, "open", lambda *_, **__: broken)
    with pytest.raises(NotFoundError, match="Connection refused") as caught:
        repository.header("layers.1/sae.safetensors")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(hub, "open", unreachable)
    with pytest.raises(NotFoundError, match="Connection refused"):
        repository.header("layers.1/sae.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(NotFoundError, match="Connection refused"):
        repository.tensors("layers.1/sae.safetensors")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    repository = LocalRepository(write(tmp_path, "a.json"))
    monkeypatch.setattr(Path, "open", forbidden)
    monkeypatch.setattr(Path, "read_text", forbidden)
    for read in (repository.stream, repository.json):
        with pytest.raises(NotFoundError, match=r"a\.json cannot be read: Permission denied"):
            read("a.json")
