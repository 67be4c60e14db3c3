"""One coder's store under construction, and the firings of a batch on their way into it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exegete.coders.coder import Point, SparseCoder
from exegete.errors import InputError
from exegete.files import fault_point
from exegete.store.compaction import settle
from exegete.store.manifest import ShardEntry, StoreManifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import save_summary
from exegete.store.store import Store
from exegete.store.token_rows import Corpus
from exegete.store.values import encode_values
from exegete.types import Array, SparseCode

if TYPE_CHECKING:
    import torch

FIRING_BYTES = 16
"""Memory that a firing takes while its shard is made."""
MOST_FIRINGS = 1 << 28
"""A shard ends with the batch that reaches this many firings, whatever the settings say."""

Listing = Callable[[ShardEntry], None]


@final
class Job:
    """A store that is being collected: its manifest and its coder. The only one that writes the manifest."""

    def __init__(self, folder: Path, begun: StoreManifest | None, fresh: StoreManifest, coder: SparseCoder) -> None:
        self.folder = folder
        self.coder = coder
        self.begun = begun is not None
        self.manifest = fresh if begun is None else begun

    @property
    def point(self) -> Point:
        """Where the coder reads."""
        return self.coder.point

    def missing(self, n_rows: int) -> set[int]:
        """Return the first rows of the batches that no shard holds yet."""
        step = int(self.manifest.batch_plan["rows"])
        return {start for a, b in self.manifest.missing(n_rows) for start in range(a, b, step)}

    def save(self, manifest: StoreManifest) -> None:
        """Swap in a manifest."""
        save_manifest(self.folder, manifest)
        self.manifest = manifest

    def list_shard(self, entry: ShardEntry) -> None:
        """List a shard that was written, and merge shards where that is due."""
        fault_point("before shard is listed")
        shards = sorted((*self.manifest.shards, entry), key=lambda shard: shard.row_start)
        self.save(dataclasses.replace(self.manifest, shards=tuple(shards)))
        self.manifest = settle(self.folder, self.manifest)

    def finish(self, corpus: Corpus) -> None:
        """Read everything back once, write the summary, and mark the store complete."""
        self.manifest = settle(self.folder, self.manifest, last=True)
        summary, content = Store(self.folder, self.manifest, corpus).scan(self.manifest.threads)
        checksum = save_summary(self.folder, summary)
        fault_point("before store is complete")
        self.save(dataclasses.replace(self.manifest, complete=True, content_hash=content, summary_sha256=checksum))


@final
class Gathering:
    """Builds the shards of one store from batches; what it writes it hands to ``listing``, in row order.

    ``missing`` are the first rows of the batches it takes; it passes over all others, and ends a shard where rows are
    missing between two batches.
    """

    def __init__(
        self,
        folder: Path,
        manifest: StoreManifest,
        coder: SparseCoder,
        missing: set[int],
        *,
        shard_bytes: int,
        shard_rows: int | None,
        listing: Listing,
    ) -> None:
        self.coder = coder
        self.limit = math.inf if manifest.norm_limit is None else manifest.norm_limit
        self.missing = missing
        self._folder, self._manifest, self._listing = folder, manifest, listing
        self._firings = max(1, min(shard_bytes // FIRING_BYTES, MOST_FIRINGS))
        self._rows = shard_rows
        self._builder: ShardBuilder | None = None
        self._n_positions = 0
        self._failed = False

    def encode(self, start: int, activations: torch.Tensor) -> SparseCode:
        """Encode the counted positions of a batch. Raises InputError naming coder, hookpoint and rows."""
        try:
            return self.coder.encode(activations)
        except InputError as error:
            raise InputError(f"{self._where(start)}: {error}") from error

    def add(self, start: int, counted: Array, excluded: Array, code: SparseCode | None) -> None:
        """Take in a batch: ``counted`` [rows, length], its codes in order, and the ``excluded`` flat positions.

        After a batch was refused nothing more is taken in or written.
        """
        if self._failed:
            return
        self._failed = True
        self._add(start, counted, excluded, code)
        self._failed = False

    def _add(self, start: int, counted: Array, excluded: Array, code: SparseCode | None) -> None:
        if self._builder is not None and self._builder.row_start + self._builder.n_rows != start:
            self._end()
        counts = np.zeros(counted.size, np.int32)
        latents, codes = np.zeros(0, np.int32), np.zeros(0, np.uint16)
        if code is not None:
            try:
                per_position, latents, values = flat_firings(code, int(counted.sum()))
                codes = encode_values(values)
            except InputError as error:
                raise InputError(f"{self._where(start)}: {error}") from error
            counts[counted.reshape(-1)] = per_position
        if self._builder is None:
            self._builder = ShardBuilder(row_start=start, row_length=counted.shape[1], width=self._manifest.width)
        self._builder.add(counts, latents, codes, excluded)
        self._n_positions += int(counted.sum())
        stop = start + len(counted)
        if self._due(stop, self._builder.n_firings):
            self._end()

    def end(self) -> None:
        """Write the shard under construction, if there is one, and have it listed."""
        if not self._failed:
            self._end()

    def _end(self) -> None:
        builder = self._builder
        if builder is None:
            return
        stop = builder.row_start + builder.n_rows
        file = f"shard-{builder.row_start:010d}-{stop:010d}.bin"
        n_firings = builder.n_firings
        sha256 = builder.write(self._folder / file)
        self._listing(
            ShardEntry(
                file=file,
                row_start=builder.row_start,
                row_stop=stop,
                latent_start=0,
                latent_stop=self._manifest.width,
                n_positions=self._n_positions,
                n_firings=n_firings,
                tier=0,
                sha256=sha256,
            )
        )
        self._builder, self._n_positions = None, 0

    def _due(self, stop: int, n_firings: int) -> bool:
        if self._rows is None:
            return n_firings >= self._firings
        batch = int(self._manifest.batch_plan["rows"])
        whole = max(1, -(-self._rows // batch)) * batch
        return stop % whole == 0 or n_firings >= MOST_FIRINGS

    def _where(self, start: int) -> str:
        rows = int(self._manifest.batch_plan["rows"])
        return f"coder {self._manifest.name!r} at {self._manifest.hookpoint!r}, rows {start} to {start + rows - 1}"


def flat_firings(code: SparseCode, n: int) -> tuple[Array, Array, Array]:
    """Return the firings of n inputs: how many each has, and their latents and values, flat and in input order.

    Raises InputError when the values are not finite or the code is not of n inputs.
    """
    import torch

    from exegete.coders.kernels import finite

    indices, values = torch.as_tensor(code.indices), torch.as_tensor(code.values)
    if not finite(values):
        raise InputError("the coder's values hold NaN or infinity")
    keep = values > 0
    whole = bool(keep.all())
    if code.offsets is None:
        counts = keep.sum(dim=1)
    else:
        offsets = torch.as_tensor(code.offsets, device=values.device)
        if whole:
            counts = offsets.diff()
        else:
            owner = torch.repeat_interleave(offsets.diff())
            counts = torch.bincount(owner[keep], minlength=n)
    if len(counts) != n:
        raise InputError(f"the coder answered {n} inputs with {len(counts)} codes")
    indices = indices.reshape(-1) if whole else indices[keep]
    values = values.reshape(-1) if whole else values[keep]
    parts: list[Any] = [counts, indices.to(torch.int32), values.float()]
    return parts[0].cpu().numpy(), parts[1].cpu().numpy(), parts[2].cpu().numpy()
