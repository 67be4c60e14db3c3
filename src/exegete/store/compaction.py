"""Fewer, larger shards: merged by tiers while collecting, by ranges of latents when a store is compacted.

Both stream: a run of latents is read from every shard and appended to the new file, so memory is bounded. The new
shard is written whole before the manifest lists it, and the old files go after that; a stop in between leaves files
that no manifest lists, which the next writer removes. The firings and their order do not change.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from exegete.files import RunLock, fault_point
from exegete.store.manifest import ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.reading import latents_at_once, read, runs, spans
from exegete.store.shards import OpenShards, Shard, ShardShape, ShardWriter
from exegete.types import Array

FAN_IN = 16
"""Neighbouring shards of one tier that are merged into one of the next."""
MOST_SLICES = 16
"""Shards that a complete store has at most."""
RANGE_FIRINGS = 1 << 26
"""Firings of one file of a compacted store, about 270 MB."""
_RUN = 1 << 22
"""Firings in memory at once."""

Advance = Callable[[int, int], None]


def settle(folder: Path, manifest: StoreManifest, *, last: bool = False) -> StoreManifest:
    """Merge what is due and return the manifest that lists the result.

    Due are 16 neighbouring shards of one tier, so that a firing is written once for each tier; at the ``last`` call
    also what leaves 16 shards at the least cost, and writes a firing once more at most.
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
        opened = OpenShards(base, manifest.row_length)
        counts = _counts(manifest, opened)
        entries = []
        for start, stop in runs(counts, RANGE_FIRINGS, manifest.width):
            entries.append(_merge_latents(base, manifest, opened, counts, start, stop))
            if progress is not None:
                progress(stop, manifest.width)
        fault_point("before compacted store is listed")
        compacted = dataclasses.replace(manifest, shards=tuple(entries))
        save_manifest(base, compacted)
        fault_point("before merged shards are removed")
        _remove(base, manifest.shards)
        return compacted


def _due(shards: Sequence[ShardEntry], *, last: bool) -> tuple[int, int] | None:
    """Return the range of neighbouring shards to merge next, None when there is none."""
    first = 0
    for stop in range(1, len(shards) + 1):
        before = shards[stop - 1]
        if stop == len(shards) or shards[stop].tier != before.tier or shards[stop].row_start != before.row_stop:
            if stop - first >= FAN_IN:
                return first, first + FAN_IN
            first = stop
    if not last or len(shards) <= MOST_SLICES:
        return None
    groups = _cheapest(shards, MOST_SLICES)
    merged = [(first, stop) for first, stop in groups if stop - first > 1]
    return min(merged, key=lambda group: sum(s.n_firings for s in shards[group[0] : group[1]]), default=None)


def _cheapest(shards: Sequence[ShardEntry], most: int) -> list[tuple[int, int]]:
    """Cut shards into at most ``most`` groups of neighbours, so that the fewest firings lie in groups of several.

    Nothing is merged over missing rows: there are more groups where there are more stretches of rows. Bellman's
    recursion: the cheapest cut of the first ``stop`` shards into one group more ends in the group that adds least.
    """
    n = len(shards)
    gaps = np.array([0, *(a.row_stop != b.row_start for a, b in itertools.pairwise(shards))]).cumsum()
    sums = np.concatenate([[0.0], np.cumsum([float(shard.n_firings + 1) for shard in shards])])
    best = np.full(n + 1, np.inf)
    best[0] = 0
    begins = []
    for _ in range(min(n, max(most, int(gaps[-1]) + 1))):
        further, begin = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
        for stop in range(1, n + 1):
            low = int(np.searchsorted(gaps, gaps[stop - 1]))
            cost = best[low:stop] + (sums[stop] - sums[low:stop])
            cost[-1] = best[stop - 1]
            begin[stop] = low + int(cost.argmin())
            further[stop] = cost.min()
        best = further
        begins.append(begin)
    groups, stop = [], n
    for begin in reversed(begins):
        groups.append((int(begin[stop]), stop))
        stop = int(begin[stop])
    return groups[::-1]


def _merge_rows(folder: Path, manifest: StoreManifest, old: Sequence[ShardEntry]) -> ShardEntry:
    """Write one shard with the rows of several neighbouring ones."""
    part = dataclasses.replace(manifest, shards=tuple(old))
    row_start, row_stop = old[0].row_start, old[-1].row_stop
    return _merge(
        folder,
        part,
        OpenShards(folder, manifest.row_length),
        ShardEntry(
            file=f"shard-{row_start:010d}-{row_stop:010d}.bin",
            row_start=row_start,
            row_stop=row_stop,
            latent_start=0,
            latent_stop=manifest.width,
            n_positions=part.n_positions,
            n_firings=part.n_firings,
            tier=max(entry.tier for entry in old) + 1,
            sha256="",
        ),
    )


def _merge_latents(
    folder: Path, manifest: StoreManifest, opened: OpenShards, counts: Array, first: int, last: int
) -> ShardEntry:
    """Write one shard with all rows of the latents ``first`` to ``last``; excluded positions go with the first."""
    entry = ShardEntry(
        file=f"latents-{first:010d}-{last:010d}.bin",
        row_start=0,
        row_stop=manifest.row_stop,
        latent_start=first,
        latent_stop=last,
        n_positions=manifest.n_positions,
        n_firings=int(counts[first:last].sum()),
        tier=0,
        sha256="",
    )
    return _merge(folder, manifest, opened, entry, counts)


def _merge(
    folder: Path, manifest: StoreManifest, opened: OpenShards, entry: ShardEntry, counts: Array | None = None
) -> ShardEntry:
    """Write the rows and latents of ``entry`` from the manifest's shards, and return it with its checksum."""
    first, last, row = entry.latent_start, entry.latent_stop, entry.row_start
    excluded = _excluded(_all(manifest, opened), row) if first == 0 else np.zeros(0, np.uint64)
    counts = _counts(manifest, opened) if counts is None else counts
    shape = ShardShape.fitting(
        row_start=row,
        n_rows=entry.row_stop - row,
        row_length=manifest.row_length,
        latent_start=first,
        n_latents=last - first,
        n_firings=entry.n_firings,
        n_excluded=len(excluded),
    )
    parts = spans(counts[first:last], firings=_RUN, latents=latents_at_once(manifest), chunk=_RUN, first=first)
    with ShardWriter.open(folder / entry.file, shape) as writer:
        for span in parts:
            writer.append(*read(_all(manifest, opened), span, row), more=span.more)
            opened.release()
        return dataclasses.replace(entry, sha256=writer.finish(excluded))


def _all(manifest: StoreManifest, opened: OpenShards) -> Iterator[Shard]:
    return (opened.get(entry) for entry in manifest.shards)


def _excluded(shards: Iterator[Shard], row: int) -> Array:
    return np.concatenate([s.excluded + np.uint64((s.shape.row_start - row) * s.shape.row_length) for s in shards])


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
