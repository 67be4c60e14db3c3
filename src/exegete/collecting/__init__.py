"""Subject and coders over a corpus → one store per coder: streaming, resumable, in bounded memory.

Rows are read in batches that are a pure function of the settings; every coder sees the same forward pass; shards end
at batch boundaries. Nothing counts until its shard is listed in the manifest, so a stop at any moment costs at most
the work since the last shard and leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.collecting import plan
from exegete.collecting.job import Gathering, Job
from exegete.collecting.passes import ReadableSubject, run
from exegete.collecting.workers import run_workers, worker_count
from exegete.config import CollectConfig
from exegete.files import RunLock
from exegete.store.compaction import clean
from exegete.store.store import Store
from exegete.store.token_rows import Corpus

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder

__all__ = ["ReadableSubject", "collect_firings"]

Progress = Callable[[int, int], None]


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

    Only counted positions are encoded: the corpus's mask without norm outliers (``config.sink_norm``); values that are
    not positive are no firings. What is there already is kept: a complete store is returned, a begun one goes on from
    its last shard, with the batch size and thread count it was begun with. ``progress`` is called with rows done and
    rows in all. With several ``workers`` subject and coders are copied into as many processes.

    Raises MismatchError when coder, subject and corpus do not fit together, or when a store was begun with another
    subject, coder, corpus, batch plan, device or data type (a complete store may come from another device);
    InputError naming hookpoint and row for activations that are not finite; BusyError when another process collects.
    """
    import torch

    plan.check(subject, coders, corpus)
    base = Path(folder)
    n_workers = worker_count(config, subject.device)
    with contextlib.ExitStack() as held:
        for name in coders:
            held.enter_context(RunLock(base / name))
        held.enter_context(torch.inference_mode())
        moved = {name: coder.to(subject.device) for name, coder in coders.items()}
        begun = plan.begun_manifests(coders, base)
        n_rows = plan.batch_rows(subject, moved, corpus, base, begun, config)
        threads = plan.threads_of(begun, config, subject.device.type, n_workers)
        jobs = {}
        for name, coder in coders.items():
            fresh = plan.fresh_manifest(name, subject, coder, corpus, base, n_rows, threads, config)
            job = Job(base / name, begun.get(name), fresh, moved[name])
            if job.begun:
                plan.require_key(job.folder, job.manifest, fresh, config)
            if not job.manifest.complete:
                clean(job.folder, job.manifest)
                jobs[name] = job
        if jobs:
            corpus.verify()
            held.enter_context(_threads(threads))
            plan.begin([job for job in jobs.values() if not job.begun], subject, corpus, config)
            _collect(jobs, subject, corpus, n_rows, config, progress, n_workers)
            for job in jobs.values():
                job.finish(corpus)
        return {name: Store.open(base / name, corpus) for name in coders}


def _collect(
    jobs: Mapping[str, Job],
    subject: ReadableSubject,
    corpus: Corpus,
    n_rows: int,
    config: CollectConfig,
    progress: Progress | None,
    n_workers: int,
) -> None:
    """Take every batch that some store still lacks through the subject once, in this process or in several."""
    missing = {name: job.missing(len(corpus)) for name, job in jobs.items()}
    batches = sorted(set().union(*missing.values()))
    done = len(corpus) - sum(min(n_rows, len(corpus) - start) for start in batches)

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, len(corpus))

    n_workers = min(n_workers, len(batches))
    if n_workers > 1:
        run_workers(jobs, subject, corpus, batches, n_rows, config, advance, n_workers)
        return
    gatherings = [
        Gathering(
            job.folder,
            job.manifest,
            job.coder,
            missing[name],
            shard_bytes=config.shard_bytes,
            shard_rows=config.shard_rows,
            listing=job.list_shard,
        )
        for name, job in jobs.items()
    ]
    run(gatherings, subject, corpus, batches, n_rows, advance, behind=subject.device.type != "cpu")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
