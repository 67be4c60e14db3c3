"""Fewer, larger shards: merged by tiers while collecting, by ranges of latents when a store is compacted.

Both stream: a run of latents is read from every shard and appended to the new file, so memory is bounded. The new
shard is written whole before the manifest lists it, and the old files go after that; a stop in between leaves files
that no manifest lists, which the next writer removes. The firings and their order do not change.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from exegete.files import RunLock, fault_point
from exegete.store.manifest import ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.shards import MAX_FIRINGS, OpenShards, Shard, ShardShape, ShardWriter, gather
from exegete.types import Array

FAN_IN = 16
"""Neighbouring shards of one tier that are merged into one of the next."""
MOST_SLICES = 16
"""Shards that a complete store has at most, as far as their size allows."""
RANGE_FIRINGS = 1 << 26
"""Firings of one file of a compacted store, about 270 MB."""
_RUN = 1 << 22
"""Firings in memory at once."""

Advance = Callable[[int, int], None]


def settle(folder: Path, manifest: StoreManifest, *, last: bool = False) -> StoreManifest:
    """Merge what is due and return the manifest that lists the result.

    Due are 16 neighbouring shards of one tier; at the ``last`` call also the smallest neighbours, until 16 are left.
    """
    while (due := _due(manifest.shards, last=last)) is not None:
        first, stop = due
        old = manifest.shards[first:stop]
        merged = _merge_rows(folder, manifest, old)
        fault_point("before merged shard is listed")
        shards = (*manifest.shards[:first], merged, *manifest.shards[stop:])
        manifest = dataclasses.replace(manifest, shards=shards)
        save_manifest(folder, manifest)
        fault_point("before merged shards are removed")
        _remove(folder, old)
    return manifest


def compact(folder: str | os.PathLike[str], *, progress: Advance | None = None) -> StoreManifest:
    """Rewrite a complete store as files of whole latents, so that a latent is one piece of one file.

    ``progress`` is called with latents done and in all. A store that is already so, or not yet complete, is left as it
    is. Raises NotFoundError where there is no store, BusyError while it is being written.
    """
    base = Path(folder)
    with RunLock(base):
        manifest = load_manifest(base)
        if not manifest.complete or manifest.by_latent:
            return manifest
        clean(base, manifest)
        opened = OpenShards(base)
        counts = _counts(manifest, opened)
        entries = []
        for start, stop in runs(counts, RANGE_FIRINGS):
            entries.append(_merge_latents(base, manifest, opened, counts, start, stop))
            if progress is not None:
                progress(stop, manifest.width)
        fault_point("before compacted store is listed")
        compacted = dataclasses.replace(manifest, shards=tuple(entries))
        save_manifest(base, compacted)
        fault_point("before merged shards are removed")
        _remove(base, manifest.shards)
        return compacted


def runs(counts: Array, most: int) -> Iterator[tuple[int, int]]:
    """Cut latents [n] with ``counts`` firings into consecutive ranges of at most ``most`` firings, or one latent."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield start, stop
        start = stop


def _due(shards: Sequence[ShardEntry], *, last: bool) -> tuple[int, int] | None:
    """Return the range of neighbouring shards to merge next, None when there is none."""
    first = 0
    for stop in range(1, len(shards) + 1):
        before = shards[stop - 1]
        if stop == len(shards) or shards[stop].tier != before.tier or shards[stop].row_start != before.row_stop:
            if stop - first >= FAN_IN and _fits(shards[first : first + FAN_IN]):
                return first, first + FAN_IN
            first = stop
    if last and len(shards) > MOST_SLICES:
        size = len(shards) - MOST_SLICES + 1
        starts = [i for i in range(len(shards) - size + 1) if _fits(shards[i : i + size])]
        if starts:
            best = min(starts, key=lambda i: sum(s.n_firings for s in shards[i : i + size]))
            return best, best + size
    return None


def _fits(shards: Sequence[ShardEntry]) -> bool:
    return sum(shard.n_firings for shard in shards) <= MAX_FIRINGS


def _merge_rows(folder: Path, manifest: StoreManifest, old: Sequence[ShardEntry]) -> ShardEntry:
    """Write one shard with the rows of several neighbouring ones."""
    opened = OpenShards(folder, limit=len(old))
    shards = [opened.get(entry.file, entry.sha256) for entry in old]
    row_start, row_stop = old[0].row_start, old[-1].row_stop
    file = f"shard-{row_start:010d}-{row_stop:010d}.bin"
    shape = ShardShape.fitting(
        row_start=row_start,
        n_rows=row_stop - row_start,
        row_length=manifest.row_length,
        latent_start=0,
        n_latents=manifest.width,
        n_firings=sum(entry.n_firings for entry in old),
        n_excluded=sum(shard.shape.n_excluded for shard in shards),
    )
    counts = np.sum([shard.counts() for shard in shards], axis=0)
    with ShardWriter.open(folder / file, shape) as writer:
        for start, stop in runs(counts, _RUN):
            writer.append(*_read(shards, start, stop, row_start))
        sha256 = writer.finish(_excluded(shards, row_start))
    return ShardEntry(
        file=file,
        row_start=row_start,
        row_stop=row_stop,
        latent_start=0,
        latent_stop=manifest.width,
        n_positions=sum(entry.n_positions for entry in old),
        n_firings=shape.n_firings,
        tier=max(entry.tier for entry in old) + 1,
        sha256=sha256,
    )


def _merge_latents(
    folder: Path, manifest: StoreManifest, opened: OpenShards, counts: Array, first: int, last: int
) -> ShardEntry:
    """Write one shard with all rows of the latents ``first`` to ``last``; excluded positions go with the first."""
    file = f"latents-{first:010d}-{last:010d}.bin"
    excluded = _excluded(_all(manifest, opened), 0) if first == 0 else np.zeros(0, np.uint64)
    shape = ShardShape.fitting(
        row_start=0,
        n_rows=manifest.row_stop,
        row_length=manifest.row_length,
        latent_start=first,
        n_latents=last - first,
        n_firings=int(counts[first:last].sum()),
        n_excluded=len(excluded),
    )
    with ShardWriter.open(folder / file, shape) as writer:
        for start, stop in runs(counts[first:last], _RUN):
            writer.append(*_read(_all(manifest, opened), first + start, first + stop, 0))
        sha256 = writer.finish(excluded)
    return ShardEntry(
        file=file,
        row_start=0,
        row_stop=manifest.row_stop,
        latent_start=first,
        latent_stop=last,
        n_positions=manifest.n_positions,
        n_firings=shape.n_firings,
        tier=0,
        sha256=sha256,
    )


def _all(manifest: StoreManifest, opened: OpenShards) -> Iterator[Shard]:
    return (opened.get(entry.file, entry.sha256) for entry in manifest.shards)


def _read(shards: Sequence[Shard] | Iterator[Shard], start: int, stop: int, row: int) -> tuple[Array, Array, Array]:
    pieces = []
    for shard in shards:
        counts, positions, codes = shard.piece(start, stop)
        positions += (shard.shape.row_start - row) * shard.shape.row_length
        pieces.append((counts, positions, codes))
    return gather(pieces)


def _excluded(shards: Sequence[Shard] | Iterator[Shard], row: int) -> Array:
    parts = [s.excluded + np.uint64((s.shape.row_start - row) * s.shape.row_length) for s in shards]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _counts(manifest: StoreManifest, opened: OpenShards) -> Array:
    total: Array = np.zeros(manifest.width, np.int64)
    for shard in _all(manifest, opened):
        total += shard.counts()
    return total


def _remove(folder: Path, entries: Sequence[ShardEntry]) -> None:
    for entry in entries:
        (folder / entry.file).unlink(missing_ok=True)


def clean(folder: Path, manifest: StoreManifest) -> None:
    """Remove what a stopped process left behind: files that the manifest does not list."""
    listed = {entry.file for entry in manifest.shards}
    for path in [*folder.glob("shard-*.bin"), *folder.glob("latents-*.bin"), *folder.glob(".*.tmp")]:
        if path.name not in listed:
            path.unlink(missing_ok=True)
