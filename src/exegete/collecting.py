"""Subject and coders over a corpus → one store per coder: streaming, resumable, in bounded memory.

Rows are read in batches that are a pure function of the settings; every coder sees the same forward pass; shards end
at batch boundaries. Nothing counts until its shard is listed in the manifest, so a stop at any moment costs at most
the work since the last shard and leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np

from exegete.config import CollectConfig
from exegete.errors import InputError, MismatchError
from exegete.files import RunLock, fault_point, safe_name
from exegete.store.checks import require_same
from exegete.store.manifest import MANIFEST, ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import save_summary
from exegete.store.store import Store
from exegete.store.token_rows import Corpus
from exegete.store.values import ENCODING, encode_values
from exegete.tokens import TokenTable
from exegete.types import Array, Side, SparseCode

if TYPE_CHECKING:
    import torch

    from exegete.coders.coder import SparseCoder

Progress = Callable[[int, int], None]
Point = tuple[str, Side]

SHARD_FIRINGS = 1 << 22
"""A shard ends with the batch that reaches this many firings, when ``shard_rows`` does not say otherwise."""
MOST_FIRINGS = 1 << 28
"""A shard ends with the batch that reaches this many firings, whatever ``shard_rows`` says."""

_log = logging.getLogger(__name__)
_PACKAGES = ("exegete", "torch", "transformers", "numpy")


class ReadableSubject(Protocol):
    """What collecting asks of a subject; ``exegete.subjects.Subject`` is one."""

    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of config and weights."""

    @abstractmethod
    def token_table(self) -> TokenTable:
        """Return the bytes of every token id."""

    @abstractmethod
    def d(self, hookpoint: str, side: Side) -> int:
        """Return the size of the activations at a hookpoint."""

    @abstractmethod
    def capture(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, points: Sequence[Point]
    ) -> dict[Point, torch.Tensor]:
        """Return the activations [rows, length, d] at each point."""


def collect_firings(
    subject: ReadableSubject,
    coders: Mapping[str, SparseCoder],
    corpus: Corpus,
    folder: str | os.PathLike[str],
    config: CollectConfig,
    *,
    progress: Progress | None = None,
) -> dict[str, Store]:
    """Collect the firings of every coder over the whole corpus into ``folder``/NAME, and return the stores.

    Only counted positions (the corpus's mask) are encoded; values that are not positive are no firings. What is there
    already is kept: a complete store is returned, a begun one goes on from its last shard, with the thread count it
    was begun with. ``progress`` is called with rows done and rows in all.

    Raises MismatchError when coder, subject and corpus do not fit together, or when a store was begun with another
    subject, coder, corpus, batch plan, device or data type (a complete store may come from another device);
    InputError naming hookpoint and row for activations that are not finite; BusyError when another process collects.
    """
    import torch

    _check(subject, coders, corpus)
    base = Path(folder)
    n_rows = max(1, config.batch_tokens // corpus.row_length)
    with contextlib.ExitStack() as held:
        jobs = []
        for name, coder in coders.items():
            held.enter_context(RunLock(base / name))
            job = _Job(base / name, _fresh_manifest(name, subject, coder, corpus, base, n_rows, config), coder, config)
            if not job.manifest.complete:
                jobs.append(job)
        if jobs:
            corpus.verify()
            held.enter_context(_threads(jobs[0].manifest.threads))
            held.enter_context(torch.inference_mode())
            for job in jobs:
                job.coder = job.coder.to(str(subject.device))
            _begin([job for job in jobs if not job.begun], subject, corpus, n_rows)
            _run(jobs, subject, corpus, n_rows, progress)
            for job in jobs:
                job.finish(corpus)
        return {name: Store.open(base / name, corpus) for name in coders}


@final
class _Job:
    """One coder's store under construction."""

    def __init__(self, folder: Path, fresh: StoreManifest, coder: SparseCoder, config: CollectConfig) -> None:
        self.folder = folder
        self.coder = coder
        self.begun = (folder / MANIFEST).exists()
        self.manifest = load_manifest(folder) if self.begun else fresh
        if self.begun:
            _require_key(folder, self.manifest, fresh, config)
        if not self.manifest.complete:
            self._clean()
        self._shard_rows = config.shard_rows
        self._builder: ShardBuilder | None = None
        self._n_positions = 0

    @property
    def point(self) -> Point:
        """Where the coder reads."""
        return self.coder.hookpoint, self.coder.side

    @property
    def target(self) -> Point:
        """What the coder predicts."""
        return self.coder.hookpoint, "output"

    def add(self, start: int, mask: Array, activations: torch.Tensor) -> None:
        """Encode the counted positions of the rows from ``start`` on, ``mask`` and ``activations`` [rows, length …]."""
        manifest = self.manifest
        if self._builder is None:
            self._builder = ShardBuilder(row_start=start, row_length=mask.shape[1], width=manifest.width)
        counts = np.zeros(mask.size, np.int32)
        latents, codes = np.zeros(0, np.int32), np.zeros(0, np.uint16)
        if mask.any():
            where = f"coder {manifest.name!r} at {manifest.hookpoint!r}, rows {start} to {start + len(mask) - 1}"
            try:
                per_position, latents, values = _flat(self.coder.encode(activations), int(mask.sum()))
                codes = encode_values(values)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            counts[mask.reshape(-1)] = per_position
        self._builder.add(counts, latents, codes)
        self._n_positions += int(mask.sum())

    def cut(self, stop: int, *, last: bool) -> None:
        """End the shard before row ``stop`` if it is due: write it, then list it."""
        builder = self._builder
        if builder is None or not (last or self._due(stop, builder.n_firings)):
            return
        file = f"shard-{builder.row_start:010d}-{stop:010d}.bin"
        sha256 = builder.write(self.folder / file)
        entry = ShardEntry(
            file=file,
            row_start=builder.row_start,
            row_stop=stop,
            n_positions=self._n_positions,
            n_firings=builder.n_firings,
            sha256=sha256,
        )
        fault_point("before shard is listed")
        self.save(dataclasses.replace(self.manifest, shards=(*self.manifest.shards, entry)))
        self._builder, self._n_positions = None, 0

    def save(self, manifest: StoreManifest) -> None:
        """Swap in a manifest."""
        save_manifest(self.folder, manifest)
        self.manifest = manifest

    def finish(self, corpus: Corpus) -> None:
        """Read everything back once, write the summary, and mark the store complete."""
        summary, content = Store(self.folder, self.manifest, corpus).scan()
        save_summary(self.folder, summary)
        fault_point("before store is complete")
        self.save(dataclasses.replace(self.manifest, complete=True, content_hash=content))

    def _due(self, stop: int, n_firings: int) -> bool:
        if self._shard_rows is None:
            return n_firings >= SHARD_FIRINGS
        batch = int(self.manifest.batch_plan["rows"])
        whole = max(1, -(-self._shard_rows // batch)) * batch
        return stop % whole == 0 or n_firings >= MOST_FIRINGS

    def _clean(self) -> None:
        """Remove what a stopped process left behind: files that no manifest lists."""
        listed = {entry.file for entry in self.manifest.shards} if self.begun else set()
        for path in [*self.folder.glob("shard-*.bin"), *self.folder.glob(".*.tmp")]:
            if path.name not in listed:
                path.unlink()


def _check(subject: ReadableSubject, coders: Mapping[str, SparseCoder], corpus: Corpus) -> None:
    if not coders:
        raise InputError("no coder is given; name at least one")
    if subject.token_table() != corpus.table:
        raise MismatchError(
            f"the corpus in {corpus.folder} was made with another tokenizer than that of {subject.name}"
        )
    for name, coder in coders.items():
        safe_name(name)
        size = subject.d(coder.hookpoint, coder.side)
        if size != coder.d_in:
            raise MismatchError(
                f"coder {name!r} reads {coder.d_in} dimensions, the {coder.side} of {coder.hookpoint!r} in "
                f"{subject.name} has {size}; give the hookpoint it was trained at"
            )


def _fresh_manifest(
    name: str,
    subject: ReadableSubject,
    coder: SparseCoder,
    corpus: Corpus,
    base: Path,
    n_rows: int,
    config: CollectConfig,
) -> StoreManifest:
    import torch

    return StoreManifest(
        name=name,
        subject=subject.name,
        subject_hash=subject.hash,
        tokenizer_hash=str(corpus.manifest.key["tokenizer"]),
        coder_hash=coder.hash,
        corpus_hash=corpus.hash,
        corpus=Path(os.path.relpath(corpus.folder.resolve(), (base / name).resolve())).as_posix(),
        hookpoint=coder.hookpoint,
        side=coder.side,
        width=coder.width,
        k=coder.k,
        mask_policy=corpus.manifest.mask_policy,
        batch_plan={"rows": n_rows, "row_length": corpus.row_length},
        device=torch.device(subject.device).type,
        dtype=str(subject.dtype).removeprefix("torch."),
        threads=config.threads or torch.get_num_threads(),
        values=ENCODING,
        versions={"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
        quality={},
    )


def _require_key(folder: Path, old: StoreManifest, new: StoreManifest, config: CollectConfig) -> None:
    """Refuse another key; where nothing is left to compute, what "auto" chose on this machine does not matter."""
    loose = set()
    if old.complete:
        loose = {"device", "dtype"} if config.dtype == "auto" else {"device"}
    keys = [{name: value for name, value in manifest.key.items() if name not in loose} for manifest in (old, new)]
    require_same(f"the store in {folder}", *keys)
    changed = [name for name, version in new.versions.items() if old.versions.get(name) != version]
    if changed and not old.complete:
        _log.warning(
            "%s goes on with other versions of %s than it was begun with; values may differ in their last bit",
            folder,
            ", ".join(changed),
        )


def _begin(jobs: Sequence[_Job], subject: ReadableSubject, corpus: Corpus, n_rows: int) -> None:
    """Measure the new coders on the first batch and write their first manifests."""
    if not jobs:
        return
    points = list(dict.fromkeys(point for job in jobs for point in (job.point, job.target)))
    mask, captured = _capture(subject, corpus, 0, min(n_rows, len(corpus)), points)
    for job in jobs:
        quality = _quality(job, captured[job.point][mask], captured[job.target][mask])
        job.save(dataclasses.replace(job.manifest, quality=quality))


def _quality(job: _Job, x: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    from exegete.coders.quality import fvu_and_l0

    try:
        fvu, l0 = fvu_and_l0(job.coder, x, target)
    except InputError as error:
        _log.info("the reconstruction of coder %s cannot be measured: %s", job.manifest.name, error)
        return {}
    if fvu > 1 and "@random-" not in job.manifest.name:  # a null is meant to explain nothing
        _log.warning(
            "coder %s explains less of %s than the mean does (FVU %.3g on the first batch): is this its model, "
            "hookpoint and side?",
            job.manifest.name,
            job.manifest.hookpoint,
            fvu,
        )
    return {name: value for name, value in (("fvu", fvu), ("l0", l0)) if np.isfinite(value)}


def _run(
    jobs: Sequence[_Job], subject: ReadableSubject, corpus: Corpus, n_rows: int, progress: Progress | None
) -> None:
    """Take every batch that some job still lacks through the subject once."""
    first = min(job.manifest.row_stop for job in jobs)
    for start in range(first, len(corpus), n_rows):
        stop = min(start + n_rows, len(corpus))
        active = [job for job in jobs if job.manifest.row_stop <= start]
        mask, captured = _capture(subject, corpus, start, stop, list(dict.fromkeys(job.point for job in active)))
        for point, activations in captured.items():
            _require_finite(point, activations, mask, start)
        fault_point("batch captured")
        counted = mask.cpu().numpy()
        for job in active:
            job.add(start, counted, captured[job.point][mask])
            job.cut(stop, last=stop == len(corpus))
        if progress is not None:
            progress(stop, len(corpus))


def _capture(
    subject: ReadableSubject, corpus: Corpus, start: int, stop: int, points: Sequence[Point]
) -> tuple[torch.Tensor, dict[Point, torch.Tensor]]:
    """Return the mask [rows, length] of counted positions and the activations of some rows."""
    import torch

    rows = corpus.rows(slice(start, stop))
    tokens = torch.from_numpy(rows.tokens.astype(np.int64)).to(subject.device)
    attention = torch.from_numpy((rows.documents >= 0).astype(np.int64)).to(subject.device)
    mask = torch.from_numpy(rows.mask).to(subject.device)
    return mask, subject.capture(tokens, attention, points)


def _require_finite(point: Point, activations: torch.Tensor, mask: torch.Tensor, start: int) -> None:
    finite = activations.isfinite().all(dim=-1) | ~mask
    if not bool(finite.all()):
        row = start + int((~finite).any(dim=1).nonzero()[0, 0])
        raise InputError(
            f"the {point[1]} of {point[0]!r} holds NaN or infinity in row {row}; load the subject in float32"
        )


def _flat(code: SparseCode, n: int) -> tuple[Array, Array, Array]:
    """Return the firings of n inputs: how many each has, and their latents and values, flat and in input order."""
    import torch

    indices, values = torch.as_tensor(code.indices), torch.as_tensor(code.values)
    if not bool(values.isfinite().all()):
        raise InputError("the coder's values hold NaN or infinity")
    keep = values > 0
    if code.offsets is None:
        counts = keep.sum(dim=1)
    else:
        owner = torch.repeat_interleave(torch.as_tensor(code.offsets, device=values.device).diff())
        counts = torch.bincount(owner[keep], minlength=n)
    if len(counts) != n:
        raise InputError(f"the coder answered {n} inputs with {len(counts)} codes")
    parts: list[Any] = [counts, indices[keep], values[keep].float()]
    return parts[0].cpu().numpy(), parts[1].cpu().numpy(), parts[2].cpu().numpy()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
