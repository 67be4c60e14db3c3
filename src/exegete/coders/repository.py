"""Where coders lie: a local folder, or a repository on the Hugging Face hub of which only what is needed is fetched."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast, final

from exegete.coders import weights
from exegete.coders.weights import TensorInfo
from exegete.errors import CorruptError, NotFoundError

T = TypeVar("T")
log = logging.getLogger(__name__)
_LARGEST_SETTINGS = 1 << 20
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_FILES = 1_000_000
_BLOCK = 1 << 16


class Repository(ABC):
    """A tree of files. Paths are relative, with forward slashes; ``name`` is what errors call it."""

    name: str

    @property
    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """All files, in natural order (``layers.2`` before ``layers.10``)."""

    @abstractmethod
    def fetch(self, path: str) -> Path:
        """Return the local path of one file, fetching it first where needed. Raises NotFoundError."""

    @abstractmethod
    def stream(self, path: str) -> BinaryIO:
        """Return a seekable stream over one file that reads only what is asked of it. Raises NotFoundError."""

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.files)

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def under(self, folder: str) -> tuple[str, ...]:
        """Return the files in a folder and below, or the one file of that name; ``""`` is the root."""
        if not folder:
            return self.files
        return tuple(f for f in self.files if f == folder or f.startswith(f"{folder}/"))

    def where(self, path: str) -> str:
        """Return how errors name a path in this tree."""
        return f"{self.name}/{path}" if path else self.name

    def json(self, path: str) -> Any:
        """Return a small JSON file. Raises NotFoundError or CorruptError."""
        return self._parsed(path, json.loads, "JSON")

    def yaml(self, path: str) -> Any:
        """Return a small YAML file, parsed safely. Raises NotFoundError or CorruptError."""
        import yaml

        def load(text: str) -> Any:
            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from error

        return self._parsed(path, load, "YAML")

    def settings(self, path: str) -> Mapping[str, Any]:
        """Return a small JSON file that must hold an object. Raises NotFoundError or CorruptError."""
        data = self.json(path)
        if not isinstance(data, dict):
            raise CorruptError(f"{self.where(path)} does not hold settings")
        return data

    def header(self, path: str) -> dict[str, TensorInfo]:
        """Return the shapes and types of a weight file's tensors; no weights are read."""
        with self.stream(path) as stream:
            return weights.header(stream, self.where(path))

    def tensors(self, path: str, names: tuple[str, ...] | None = None) -> Any:
        """Return tensors of a weight file by name, on the CPU; see ``weights.tensors``."""
        return weights.tensors(self.fetch(path), names)

    def _parsed(self, path: str, parse: Callable[[str], Any], kind: str) -> Any:
        if path not in self:
            raise NotFoundError(f"there is no {self.where(path)}")
        return _parsed(self.fetch(path), self.where(path), parse, kind)


@final
class LocalRepository(Repository):
    """A folder on this machine. Hidden files are not looked at; links are followed, also out of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """All files that are not hidden, in natural order."""
        found: list[str] = []
        seen = 0
        left: list[tuple[str, frozenset[str]]] = [("", frozenset())]
        while left:
            here, above = left.pop()
            real = os.path.realpath(self.folder / here)
            if real in above:
                continue  # a link back up
            for name in _entries(real):
                seen += 1
                path = f"{here}/{name}" if here else name
                if os.path.isdir(self.folder / path):
                    left.append((path, above | {real}))
                else:
                    found.append(path)
            if seen > _MOST_FILES:
                raise NotFoundError(f"{self.name} holds over {_MOST_FILES:,} files; give the folder of the coders")
        return _sorted(found)

    def fetch(self, path: str) -> Path:
        """Return the file's path. Raises NotFoundError."""
        local = self.folder / path
        if not _inside(path) or not local.is_file():
            raise NotFoundError(f"there is no {local}")
        return local

    def json_above(self, name: str, levels: int) -> Any:
        """Return the nearest small JSON file of this name in the folders above, None when there is none.

        Looks ``levels`` up. Raises CorruptError.
        """
        for folder in Path(os.path.abspath(self.folder)).parents[:levels]:
            if (folder / name).is_file():
                return _parsed(folder / name, str(folder / name), json.loads, "JSON")
        return None

    def stream(self, path: str) -> BinaryIO:
        """Open the file."""
        local = self.fetch(path)
        try:
            return local.open("rb")
        except OSError as error:
            raise NotFoundError(f"{local} cannot be read: {error.strerror}") from error


@final
class HubRepository(Repository):
    """A model repository on the Hugging Face hub at one commit; without a connection, what of it is cached.

    Its commit is looked up once, so that its files belong together whatever is pushed meanwhile.
    """

    def __init__(self, repository: str, revision: str | None = None) -> None:
        self.name = repository
        self._revision = revision
        self._cache: LocalRepository | None = None

    @cached_property
    def files(self) -> tuple[str, ...]:
        """All files of the commit, in natural order; no contents are fetched."""
        import huggingface_hub
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            try:
                info = _ask(
                    self.name,
                    lambda: huggingface_hub.HfApi().model_info(self.name, revision=self._revision, timeout=60),
                )
            except _UnreachableError:
                with contextlib.suppress(NotFoundError):
                    self._cache = LocalRepository(self._snapshot())
                if self._cache is None:
                    raise
                log.warning("the Hugging Face hub cannot be reached; of %s what is cached is used", self.name)
                return self._cache.files
            self._revision = info.sha
            return _sorted([s.rfilename for s in info.siblings or ()])
        self._cache = LocalRepository(self._snapshot())
        return self._cache.files

    def _snapshot(self) -> Path:
        """Return the folder of the cached commit asked for, of several the newest. Raises NotFoundError."""
        import huggingface_hub
        from huggingface_hub import constants

        try:
            return Path(
                _ask(
                    self.name,
                    lambda: huggingface_hub.snapshot_download(
                        self.name, revision=self._revision, local_files_only=True
                    ),
                )
            )
        except NotFoundError:
            # Files fetched by commit leave no branch behind, only the folder of their commit.
            cached = Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}" / "snapshots"
            commits = sorted(cached.glob("*"), key=lambda folder: folder.stat().st_mtime)
            if not commits or self._revision is not None:
                raise
            return commits[-1]

    def fetch(self, path: str) -> Path:
        """Return the cached file, downloading it first when it is not there. Raises NotFoundError."""
        import huggingface_hub

        if path not in self:
            raise NotFoundError(f"there is no {self.where(path)}")
        if self._cache is not None:
            return self._cache.fetch(path)
        return Path(_ask(self.name, lambda: huggingface_hub.hf_hub_download(self.name, path, revision=self._revision)))

    def stream(self, path: str) -> BinaryIO:
        """Open the cached file, or read the remote one piece by piece."""
        import huggingface_hub

        if self._cache is not None or path not in self:
            return self.fetch(path).open("rb")
        cached = huggingface_hub.try_to_load_from_cache(self.name, path, revision=self._revision)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        address = f"{self.name}@{self._revision}/{path}"
        remote = _ask(self.name, lambda: huggingface_hub.HfFileSystem().open(address, block_size=_BLOCK))
        return cast(BinaryIO, _Remote(remote, self.name))


@final
class _Remote(io.RawIOBase):
    """A file on the hub, of which only what is asked for is read; what goes wrong on the way is a NotFoundError."""

    def __init__(self, file: Any, repository: str) -> None:
        self._file = file
        self._repository = repository

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = _ask(self._repository, lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@final
class _UnreachableError(NotFoundError):
    """The hub did not answer."""


def _ask(repository: str, call: Callable[[], T]) -> T:
    """Return what the hub answers. Raises NotFoundError in one line, _UnreachableError when it does not answer."""
    from huggingface_hub import errors

    # The client's own errors are those of the HTTP library it is built on, which differs between its versions.
    own = [base for base in errors.HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception]
    transport = cast(tuple[type[Exception], ...], (*own, ValueError))
    try:
        return call()
    except transport as error:
        detail = " ".join(str(error).split())[:200]
        answered = isinstance(error, (errors.HfHubHTTPError, ValueError))
        raise (NotFoundError if answered else _UnreachableError)(
            f"the coder {repository!r} cannot be fetched from the Hugging Face hub ({detail}); give a local folder, or "
            "check the id and the connection"
        ) from error


def open_repository(where: str) -> Repository:
    """Return the repository of a local folder, or of a hub id with the branch, tag or commit after an ``@``.

    Raises NotFoundError when the name is neither.
    """
    path = os.path.expanduser(where)
    if os.path.isdir(path):
        return LocalRepository(Path(path))
    where, _, revision = where.partition("@")
    if not _HUB.fullmatch(where) or os.path.isdir(where.partition("/")[0]):
        raise NotFoundError(f"there is no coder folder {where!r}; give a folder, or a hub id such as ORG/NAME")
    return HubRepository(where, revision or None)


def _parsed(local: Path, where: str, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        if local.stat().st_size > _LARGEST_SETTINGS:
            raise CorruptError(f"{where} is too large to be the settings of a coder")
        return parse(local.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{where} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise CorruptError(f"{where} does not parse as {kind}: nested too deeply") from None
    except ValueError as error:
        detail = " ".join(str(error).split())[:200]
        raise CorruptError(f"{where} does not parse as {kind}: {detail}") from error


def _entries(folder: str) -> list[str]:
    """Return what a folder holds, hidden files aside; nothing of a folder that cannot be read."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []


def _inside(path: str) -> bool:
    return bool(path) and not path.startswith("/") and ".." not in PurePosixPath(path).parts


def _sorted(files: list[str]) -> tuple[str, ...]:
    """Return paths in natural order, without those that lead elsewhere or would break a line."""
    from exegete.subjects.names import natural

    files = [path for path in files if _inside(path) and path.isprintable()]
    return tuple(sorted(files, key=lambda path: [natural(part) for part in path.split("/")]))
