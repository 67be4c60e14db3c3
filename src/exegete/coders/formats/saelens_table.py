"""SAELens's table of published coders: which repository and folder a release and an id stand for.

The table is the one of the installed sae-lens, read without importing it (which takes seconds). A coder is written
``saelens:RELEASE:SAE_ID``, such as ``saelens:gpt2-small-res-jb:blocks.8.hook_resid_pre``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, final

import yaml

from exegete.coders.formats.format import beside
from exegete.coders.repository import Repository
from exegete.errors import CorruptError, InputError, MissingExtraError, NotFoundError, unknown

PREFIX = "saelens:"
"""What a spec by release and id starts with."""
_TABLE = "pretrained_saes.yaml"
_LARGEST_TABLE = 64 << 20
_RELEASE = re.compile(r"^(?P<quote>['\"]?)(?P<name>[^\s#'\"-][^'\"\n]*?)(?P=quote):[ \t]*$", re.MULTILINE)
_HOOK = re.compile(r"(?:blocks\.\d+\.(?:\w+\.)?hook_[a-z_]+|hook_embed)")
_SHOWN = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Where one published coder lies, and what the table knows of it.

    ``folder`` is a folder in ``repo_id``; for some converters a file, or the number of a layer. ``hookpoint`` is None
    where neither id nor table name one. ``scale`` is what inputs are multiplied by where the coder's own settings say
    that they were. ``converter`` is SAELens's name of the format, ``sae_lens`` for its own. ``settings`` go before the
    coder's own.
    """

    repo_id: str
    folder: str
    hookpoint: str | None
    scale: float | None
    converter: str
    base_model: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def repository(self, inner: Repository) -> Repository:
        """Return the repository with the table's settings and scale in the coder's ``cfg.json``, if it has one."""
        from exegete.coders.formats.saelens_settings import CONFIG

        added: dict[str, Any] = dict(self.settings)
        if self.scale is not None:
            added["norm_scaling_factor"] = self.scale
        return _Tabled(inner, beside(self.folder, CONFIG), added, {"model_name": self.base_model})


def split(spec: str) -> tuple[str, str]:
    """Return release and id of ``saelens:RELEASE:SAE_ID``. Raises InputError when it is written otherwise."""
    release, colon, sae_id = spec.removeprefix(PREFIX).partition(":")
    if not spec.startswith(PREFIX) or not release or not colon or not sae_id:
        raise InputError(
            f"a coder of SAELens's table is written saelens:RELEASE:SAE_ID, such as "
            f"saelens:gpt2-small-res-jb:blocks.8.hook_resid_pre; got {spec!r}"
        )
    return release, sae_id


def is_release(name: str) -> bool:
    """Tell whether a name is a release of the table; False as well where sae-lens is not installed."""
    return _path() is not None and name in _blocks()


def releases() -> tuple[str, ...]:
    """Return the names of all releases. Raises MissingExtraError where sae-lens is not installed."""
    return tuple(_blocks())


def sae_ids(release: str) -> tuple[str, ...]:
    """Return the ids of one release in the table's order. Raises NotFoundError, or as ``releases``."""
    return tuple(_entries(_release(release), release))


def resolve(release: str, sae_id: str) -> Resolved:
    """Return where one published coder lies.

    Raises:
        NotFoundError: For an unknown release or id, with the nearest names; for a hub repository in the place of a
            release, with what to write instead.
        MissingExtraError: When sae-lens is not installed.
        CorruptError: When the table is not one that is understood.
    """
    from exegete.coders.formats.saelens_settings import positive

    table = _release(release)
    entries = _entries(table, release)
    if sae_id not in entries:
        raise unknown(f"id of the release {release!r}", sae_id, entries)
    entry, where = entries[sae_id], f"{_TABLE} at {release}"
    overrides = table.get("config_overrides") or {}
    repo_id, model, path = table.get("repo_id"), table.get("model"), entry.get("path")
    if not isinstance(repo_id, str) or not isinstance(model, str) or not isinstance(path, str | int):
        raise CorruptError(f"{where} lacks a repository, a model or the path of {sae_id}")
    if not isinstance(overrides, dict):
        raise CorruptError(f"{where} has settings that are none")
    scale, named = entry.get("norm_scaling_factor"), overrides.get("hook_name", sae_id)
    return Resolved(
        repo_id=repo_id,
        folder=str(path),
        hookpoint=named if isinstance(named, str) and _HOOK.fullmatch(named) else None,
        scale=None if scale is None else positive(scale, "norm_scaling_factor", where),
        converter=table.get("conversion_func") or "sae_lens",
        base_model=model,
        settings=overrides,
    )


@final
class _Tabled(Repository):
    """A repository whose settings of one coder are completed from the table."""

    def __init__(self, inner: Repository, path: str, added: Mapping[str, Any], missing: Mapping[str, Any]) -> None:
        self.name = inner.name
        self._inner = inner
        self._path = path
        self._added = added
        self._missing = missing

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the repository."""
        return self._inner.files

    def fetch(self, path: str) -> Path:
        """Return the local path of one file. Raises NotFoundError."""
        return self._inner.fetch(path)

    def stream(self, path: str) -> BinaryIO:
        """Return a stream over one file. Raises NotFoundError."""
        return self._inner.stream(path)

    def json(self, path: str) -> Any:
        """Return a small JSON file, the coder's settings with the table's. Raises NotFoundError or CorruptError."""
        found = self._inner.json(path)
        if path != self._path or not isinstance(found, dict):
            return found
        metadata = found.get("metadata")
        own = {**found, **(metadata if isinstance(metadata, dict) else {})}
        missing = {key: value for key, value in self._missing.items() if own.get(key) is None}
        return {**found, **missing, **self._added}


@cache
def _path() -> Path | None:
    """Return where the table lies, None where sae-lens is not installed."""
    found = importlib.util.find_spec("sae_lens")
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / _TABLE).is_file():
            return Path(folder) / _TABLE
    return None


@cache
def _blocks() -> dict[str, str]:
    """Return the table's text by release. Parsing the whole takes seconds, one release a few milliseconds."""
    path = _path()
    if path is None:
        raise MissingExtraError("a coder by SAELens's release and id", "saelens")
    if path.stat().st_size > _LARGEST_TABLE:
        raise CorruptError(f"{path} is too large to be SAELens's table of coders")
    content = path.read_text(encoding="utf-8")
    starts = list(_RELEASE.finditer(content))
    ends = [start.start() for start in starts[1:]] + [len(content)]
    return {start["name"]: content[start.end() : end] for start, end in zip(starts, ends, strict=True)}


@cache
def _release(name: str) -> Mapping[str, Any]:
    blocks = _blocks()
    if name not in blocks:
        raise _no_release(name, blocks)
    try:
        found = yaml.safe_load(blocks[name])
    except yaml.YAMLError as error:
        raise CorruptError(f"{_TABLE} does not parse at {name}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise CorruptError(f"{_TABLE} holds no settings at {name}")
    return found


def _entries(table: Mapping[str, Any], release: str) -> dict[str, Mapping[str, Any]]:
    """Return what a release says of each of its coders, by id."""
    saes = table.get("saes")
    if not isinstance(saes, list) or not all(isinstance(entry, dict) and "id" in entry for entry in saes):
        raise CorruptError(f"{_TABLE} lists no coders at {release}")
    return {str(entry["id"]): entry for entry in saes}


def _no_release(name: str, blocks: Mapping[str, str]) -> NotFoundError:
    if "/" not in name:
        return unknown("release of SAELens", name, blocks)
    holding = [
        release
        for release, block in blocks.items()
        if re.search(rf"^ +repo_id: *['\"]?{re.escape(name)}['\"]? *$", block, re.MULTILINE)
    ]
    known = (
        f"; its releases are {', '.join(holding[:_SHOWN])}{' …' if len(holding) > _SHOWN else ''}" if holding else ""
    )
    return NotFoundError(f"{name!r} is a hub repository and no release; give it as {name}:FOLDER{known}")
