"""What a store is and how far it has got: one JSON file, swapped in after every shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from exegete.errors import CorruptError, NotFoundError
from exegete.files import safe_name
from exegete.store.checks import read_manifest, write_manifest
from exegete.types import Side

FORMAT = 1
MANIFEST = "manifest.json"
_IDENTITY = (
    "name",
    "subject_hash",
    "tokenizer_hash",
    "coder_hash",
    "corpus_hash",
    "hookpoint",
    "side",
    "width",
    "k",
    "mask_policy",
    "batch_plan",
    "device",
    "dtype",
    "values",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard in a manifest: its file, its rows, its counted positions and firings, its payload's SHA-256."""

    file: str
    row_start: int
    row_stop: int
    n_positions: int
    n_firings: int
    sha256: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoreManifest:
    """What was collected, with what, and the shards so far.

    ``corpus`` is the path of the corpus relative to the store; ``mask_policy`` the corpus's; ``batch_plan`` the rows
    of a batch and their length; ``device`` and ``dtype`` those of the subject; ``threads`` the CPU threads used;
    ``values`` the 16-bit encoding; ``quality`` holds ``fvu`` and ``l0`` on the first batch where they could be
    measured; ``content_hash`` is empty until the store is ``complete``.
    """

    format: int = FORMAT
    name: str
    subject: str
    subject_hash: str
    tokenizer_hash: str
    coder_hash: str
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
    threads: int
    values: str
    versions: Mapping[str, str]
    quality: Mapping[str, float]
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False
    content_hash: str = ""

    @property
    def key(self) -> dict[str, Any]:
        """The settings that decide the firings: whoever goes on with a store must share them."""
        return {name: getattr(self, name) for name in _IDENTITY}

    @property
    def row_stop(self) -> int:
        """Rows collected so far."""
        return self.shards[-1].row_stop if self.shards else 0

    @property
    def n_positions(self) -> int:
        """Counted positions collected so far."""
        return sum(shard.n_positions for shard in self.shards)

    @property
    def n_firings(self) -> int:
        """Firings collected so far."""
        return sum(shard.n_firings for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that ``from_json`` turns back into an equal manifest."""
        data = dataclasses.asdict(self)
        data["shards"] = list(data["shards"])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoreManifest:
        """Read what ``to_json`` gave. Raises CorruptError when fields do not fit or rows have gaps."""
        try:
            shards = tuple(ShardEntry(**entry) for entry in data["shards"])
            manifest = cls(**{**data, "shards": shards})
        except (TypeError, KeyError) as error:
            raise CorruptError(f"the store manifest does not parse: {error}") from error
        stop = 0
        for entry in manifest.shards:
            safe_name(entry.file)
            if entry.row_start != stop or entry.row_stop <= stop:
                raise CorruptError(f"the shards of store {manifest.name} do not join at row {stop}; collect again")
            stop = entry.row_stop
        return manifest


def save_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Swap in a store's manifest, atomically."""
    write_manifest(folder / MANIFEST, manifest.to_json())


def load_manifest(folder: Path) -> StoreManifest:
    """Read a store's manifest. Raises NotFoundError where there is no store, CorruptError when it is damaged."""
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(f"there is no store in {folder}; make one with exegete collect")
    return StoreManifest.from_json(read_manifest(folder / MANIFEST, number=FORMAT))
