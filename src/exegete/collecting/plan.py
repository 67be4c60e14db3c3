"""What is settled before the first shard: who fits whom, the batch plan, and the first manifest of every store."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exegete.coders.coder import SparseCoder
from exegete.collecting.job import Job
from exegete.collecting.passes import Batch, ReadableSubject, read
from exegete.config import CollectConfig
from exegete.errors import InputError, MismatchError
from exegete.files import safe_name
from exegete.store.checks import require_same
from exegete.store.manifest import MANIFEST, StoreManifest, load_manifest
from exegete.store.token_rows import Corpus
from exegete.store.values import ENCODING

if TYPE_CHECKING:
    import torch

CPU_TOKENS = 8192
"""Tokens in a batch on a CPU; also those that coders are measured on."""
MOST_TOKENS = 1 << 18
"""Tokens in a batch that a GPU is tried with at most."""

_log = logging.getLogger(__name__)
_PACKAGES = ("exegete", "torch", "transformers", "numpy")


def check(subject: ReadableSubject, coders: Mapping[str, SparseCoder], corpus: Corpus) -> None:
    """Raise MismatchError or InputError unless subject, coders and corpus fit together."""
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


def begun_manifests(coders: Iterable[str], base: Path) -> dict[str, StoreManifest]:
    """Return the manifests of the stores that are begun, by coder."""
    return {name: load_manifest(base / name) for name in coders if (base / name / MANIFEST).exists()}


def batch_rows(
    subject: ReadableSubject,
    coders: Mapping[str, SparseCoder],
    corpus: Corpus,
    base: Path,
    begun: Mapping[str, StoreManifest],
    config: CollectConfig,
) -> int:
    """Return the rows of a batch: as told, as begun, or on a GPU the fastest that fit.

    Raises MismatchError when stores of one pass were begun with different plans.
    """
    if config.batch_tokens is not None:
        return max(1, config.batch_tokens // corpus.row_length)
    rows = {int(m.batch_plan["rows"]) for m in begun.values() if m.row_length == corpus.row_length}
    if len(rows) > 1:
        raise MismatchError(
            f"the stores in {base} were begun with batches of {', '.join(map(str, sorted(rows)))} rows; collect their "
            "coders one by one, each with its own collect.batch_tokens"
        )
    if rows:
        return rows.pop()
    least = max(1, CPU_TOKENS // corpus.row_length)
    if subject.device.type != "cuda":
        return least

    def attempt(n_rows: int) -> None:
        points = list(dict.fromkeys(coder.point for coder in coders.values()))
        batch = read(subject, corpus, 0, min(n_rows, len(corpus)), points)
        for coder in coders.values():
            coder.encode(batch.inputs(coder.point, batch.mask))

    most = min(MOST_TOKENS // corpus.row_length, len(corpus))
    return fastest(attempt, least=least, most=max(least, most))


def fastest(attempt: Callable[[int], None], *, least: int, most: int) -> int:
    """Return the batch size at which more brings less than a twentieth in speed, or no longer fits.

    Sizes double from ``least`` up to ``most``; each is tried twice, the first time to warm up. Out of memory at
    ``least`` halves it until it fits. Raises InputError when not even one row fits.
    """
    import torch

    size, best, speed = least, 0, 0.0
    while 1 <= size <= max(most, least):
        try:
            attempt(size)
            begun = time.perf_counter()
            attempt(size)
            found = size / max(time.perf_counter() - begun, 1e-9)
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if best:
                return best
            size //= 2
            most = min(most, size)
            least = min(least, size)
            continue
        if best and found < 1.05 * speed:
            return best
        best, speed = size, found
        size *= 2
    if not best:
        raise InputError("not even one row fits into the device's memory; use shorter rows, or a device_map")
    return best


def threads_of(begun: Mapping[str, StoreManifest], config: CollectConfig, device: str, n_workers: int) -> int:
    """Return the CPU threads of a pass: as begun, as told, or all, shared among the processes of a CPU."""
    import torch

    for manifest in begun.values():
        if not manifest.complete:
            return manifest.threads
    share = n_workers if device == "cpu" else 1
    return config.threads or max(1, torch.get_num_threads() // share)


def fresh_manifest(
    name: str,
    subject: ReadableSubject,
    coder: SparseCoder,
    corpus: Corpus,
    base: Path,
    n_rows: int,
    threads: int,
    config: CollectConfig,
) -> StoreManifest:
    """Return the manifest of a store that is not begun."""
    import torch

    return StoreManifest(
        name=name,
        subject=subject.name,
        subject_hash=subject.hash,
        tokenizer_hash=str(corpus.manifest.key["tokenizer"]),
        coder_hash=coder.hash,
        coder_dtype=str(coder.dtype).removeprefix("torch."),
        coder=coder.architecture,
        corpus_hash=corpus.hash,
        corpus=Path(os.path.relpath(corpus.folder.resolve(), (base / name).resolve())).as_posix(),
        hookpoint=coder.hookpoint,
        side=coder.side,
        width=coder.width,
        k=coder.k,
        mask_policy={**corpus.manifest.mask_policy, "sink_norm": config.sink_norm},
        batch_plan={"rows": n_rows, "row_length": corpus.row_length},
        device=torch.device(subject.device).type,
        dtype=str(subject.dtype).removeprefix("torch."),
        compiled=config.compile,
        threads=threads,
        values=ENCODING,
        versions={"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
        quality={},
    )


def require_key(folder: Path, old: StoreManifest, new: StoreManifest, config: CollectConfig) -> None:
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


def begin(jobs: Sequence[Job], subject: ReadableSubject, corpus: Corpus, config: CollectConfig) -> None:
    """Measure the new coders on the first rows and write their first manifests."""
    if not jobs:
        return
    points = list(dict.fromkeys(point for job in jobs for point in (job.point, job.coder.target)))
    batch = read(subject, corpus, *_first_rows(corpus), points)
    for job in jobs:
        limit = _norm_limit(batch, job, config.sink_norm)
        counted = batch.counted(job.point, np.inf if limit is None else limit)
        x, target = batch.inputs(job.point, counted), batch.inputs(job.coder.target, counted)
        transposed = _settle(job, x, target)
        fvu, l0 = _quality(job, x, target)
        quality = {name: value for name, value in (("fvu", fvu), ("l0", l0)) if value is not None and isfinite(value)}
        n_sinks = int((batch.mask & ~counted).sum())
        if n_sinks:
            share = n_sinks / max(int(batch.mask.sum()), 1)
            _log.info("%s: %.2g %% of positions are norm outliers and do not count", job.manifest.name, 100 * share)
        warnings = _warnings(job.manifest, fvu)
        for warning in warnings:
            _log.warning("coder %s %s", job.manifest.name, warning)
        job.save(
            dataclasses.replace(
                job.manifest, quality=quality, warnings=warnings, norm_limit=limit, skip_transposed=transposed
            )
        )


def _norm_limit(batch: Batch, job: Job, multiple: float) -> float | None:
    """Return the norm beyond which a position does not count, None without a limit."""
    from exegete.coders.reading import norm_limit

    norms = batch.norms[job.point][batch.mask]
    if not multiple or not len(norms):
        return None
    limit = norm_limit(norms, multiple)
    return limit if isfinite(limit) else None


def _settle(job: Job, x: torch.Tensor, target: torch.Tensor) -> bool | None:
    """Turn a skip connection whose file does not say how it lies; return whether it was turned, None if it is sure.

    It takes no part in encoding, so that the firings are the same either way.
    """
    from exegete.coders.linear import LinearCoder
    from exegete.coders.orientation import oriented

    if not isinstance(job.coder, LinearCoder) or not job.coder.skip_undecided:
        return None
    found = oriented(job.coder, x, target)
    job.coder = found.coder
    return found.transposed


def _first_rows(corpus: Corpus) -> tuple[int, int]:
    """Return the first rows at which any position counts, as many as coders are measured on."""
    size = max(1, CPU_TOKENS // corpus.row_length)
    counting = (at for at in range(0, len(corpus), size) if corpus.rows(slice(at, at + size)).mask.any())
    start = next(counting, 0)
    return start, min(start + size, len(corpus))


def _quality(job: Job, x: torch.Tensor, target: torch.Tensor) -> tuple[float | None, float | None]:
    """Return FVU and L0, None where they cannot be measured."""
    from exegete.coders.quality import fvu_and_l0

    try:
        return fvu_and_l0(job.coder, x, target)
    except InputError as error:
        _log.info("the reconstruction of coder %s cannot be measured: %s", job.manifest.name, error)
        return None, None


def _warnings(manifest: StoreManifest, fvu: float | None) -> tuple[str, ...]:
    """Return what a coder's quality on the first rows says against it. A null is meant to explain nothing."""
    if fvu is None or fvu <= 1 or "@random-" in manifest.name:
        return ()
    return (
        f"explains less of {manifest.hookpoint} than the mean does (FVU {fvu:.3g} on the first rows): is "
        "this its model, hookpoint, side and scale?",
    )
