"""What a store is and how far it has got: one JSON file, swapped in after every shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from exegete.errors import CorruptError, NotFoundError
from exegete.files import safe_name
from exegete.store.checks import read_manifest, write_manifest
from exegete.types import Side

FORMAT = 2
MANIFEST = "manifest.json"
_IDENTITY = (
    "name",
    "subject_hash",
    "tokenizer_hash",
    "coder_hash",
    "coder_dtype",
    "corpus_hash",
    "hookpoint",
    "side",
    "width",
    "k",
    "mask_policy",
    "batch_plan",
    "device",
    "dtype",
    "compiled",
    "values",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard in a manifest: its file, its rows and latents, their counted positions, its firings, its checksum.

    ``tier`` is 0 for a shard as collected, and one more than its parts' for one that was merged.
    """

    file: str
    row_start: int
    row_stop: int
    latent_start: int
    latent_stop: int
    n_positions: int
    n_firings: int
    tier: int
    sha256: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoreManifest:
    """What was collected, with what, and the shards so far.

    ``coder`` is the coder's architecture, ``coder_dtype`` what it computes in; ``corpus`` the path of the corpus
    relative to the store; ``mask_policy`` the corpus's, with ``sink_norm``, the multiple of the median norm beyond
    which a position does not count (0: none), of which ``norm_limit`` is the norm itself, measured on the first rows;
    ``batch_plan`` the rows of a batch and their length; ``device`` and ``dtype`` those of the subject, ``compiled``
    whether its layers were; ``threads`` the CPU threads used; ``values`` the 16-bit encoding; ``quality`` holds ``fvu``
    and ``l0`` on the first rows where they could be measured, ``warnings`` what looks wrong there,
    ``skip_transposed`` whether a skip connection whose file does not say which way it lies had to be turned;
    ``content_hash`` and ``summary_sha256``, the checksum of the summary's file, are empty until the store is
    ``complete``.
    """

    format: int = FORMAT
    name: str
    subject: str
    subject_hash: str
    tokenizer_hash: str
    coder_hash: str
    coder_dtype: str
    coder: str
    corpus_hash: str
    corpus: str
    hookpoint: str
    side: Side
    width: int
    k: int | None
    mask_policy: Mapping[str, Any]
    batch_plan: Mapping[str, int]
    device: str
    dtype: str
    compiled: bool
    threads: int
    values: str
    versions: Mapping[str, str]
    quality: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    norm_limit: float | None = None
    skip_transposed: bool | None = None
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False
    content_hash: str = ""
    summary_sha256: str = ""

    @property
    def key(self) -> dict[str, Any]:
        """The settings that decide the firings: whoever goes on with a store must share them."""
        return {name: getattr(self, name) for name in _IDENTITY}

    @property
    def row_length(self) -> int:
        """Positions in a row."""
        return int(self.batch_plan["row_length"])

    @property
    def by_latent(self) -> bool:
        """Whether every latent lies whole in one shard, as ``exegete store compact`` leaves it."""
        return len(self.shards) == 1 or any(shard.latent_stop < self.width for shard in self.shards)

    @property
    def row_stop(self) -> int:
        """One past the last row collected so far."""
        return max((shard.row_stop for shard in self.shards), default=0)

    @property
    def n_positions(self) -> int:
        """Counted positions collected so far."""
        return sum(shard.n_positions for shard in self.shards if shard.latent_start == 0)

    @property
    def n_firings(self) -> int:
        """Firings collected so far."""
        return sum(shard.n_firings for shard in self.shards)

    def missing(self, n_rows: int) -> list[tuple[int, int]]:
        """Return the ranges of rows that no shard holds yet, of ``n_rows`` in all."""
        gaps, stop = [], 0
        for shard in self.shards:
            if shard.latent_start == 0:
                if shard.row_start > stop:
                    gaps.append((stop, shard.row_start))
                stop = shard.row_stop
        return [*gaps, (stop, n_rows)] if stop < n_rows else gaps

    def to_json(self) -> dict[str, Any]:
        """Return plain data that ``from_json`` turns back into an equal manifest."""
        data = dataclasses.asdict(self)
        data["shards"], data["warnings"] = list(data["shards"]), list(data["warnings"])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoreManifest:
        """Read what ``to_json`` gave. Raises CorruptError when fields do not fit or rows have gaps."""
        try:
            if not all(isinstance(data[name], (list, tuple)) for name in ("shards", "warnings")):
                raise TypeError("shards and warnings are lists")
            shards = tuple(ShardEntry(**entry) for entry in data["shards"])
            manifest = cls(**{**data, "shards": shards, "warnings": tuple(data["warnings"])})
        except (TypeError, LookupError) as error:
            raise CorruptError(f"the store manifest does not parse: {error}") from error
        wrong = _misfits(manifest) + [name for entry in shards for name in _misfits(entry)]
        if wrong:
            raise CorruptError(f"the store manifest does not parse: its {wrong[0]} cannot be so; collect again")
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise CorruptError unless shards follow each other in rows, or share all rows and follow in latents."""
        damaged = CorruptError(f"the shards of store {self.name} do not fit together; collect again")
        if (
            not 0 < self.width < 1 << 31
            or min(self.batch_plan.get("row_length", 0), self.batch_plan.get("rows", 0)) < 1
        ):
            raise CorruptError(f"the width or batch plan of store {self.name} cannot be so; collect again")
        row = latent = 0
        for entry in self.shards:
            safe_name(entry.file)
            whole = entry.latent_start == 0 and entry.latent_stop == self.width
            if entry.row_stop <= entry.row_start or entry.latent_stop <= entry.latent_start:
                raise damaged
            if whole and (latent or entry.row_start < row or (self.complete and entry.row_start != row)):
                raise damaged
            if not whole and (entry.latent_start != latent or entry.row_start or entry.row_stop != self.row_stop):
                raise damaged
            row, latent = entry.row_stop, 0 if whole else entry.latent_stop
        if latent not in (0, self.width):
            raise damaged


def _misfits(part: StoreManifest | ShardEntry) -> list[str]:
    """Return the names of the fields whose values are of another kind than they should be."""
    return [f.name for f in dataclasses.fields(part) if not _KINDS[str(f.type)](getattr(part, f.name))]


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _table(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(item(one) for one in value.values())


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "int": _whole,
    "int | None": lambda value: value is None or _whole(value),
    "str": _is(str),
    "bool": _is(bool),
    "bool | None": _is(bool, type(None)),
    "float | None": _is(float, int, type(None)),
    "Side": lambda value: type(value) is str and value in ("input", "output"),
    "Mapping[str, Any]": _table(lambda _: True),
    "Mapping[str, int]": _table(_whole),
    "Mapping[str, str]": _table(_is(str)),
    "Mapping[str, float]": _table(_is(float, int)),
    "tuple[str, ...]": lambda value: all(type(one) is str for one in value),
    "tuple[ShardEntry, ...]": lambda _: True,
}
"""What a field's value must be, by its annotation; shards are looked at one by one."""


def save_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Swap in a store's manifest, atomically."""
    write_manifest(folder / MANIFEST, manifest.to_json())


def load_manifest(folder: Path) -> StoreManifest:
    """Read a store's manifest. Raises NotFoundError where there is no store, CorruptError when it is damaged."""
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(f"there is no store in {folder}; make one with exegete collect")
    return StoreManifest.from_json(read_manifest(folder / MANIFEST, number=FORMAT))
