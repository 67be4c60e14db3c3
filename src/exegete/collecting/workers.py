"""Several processes collect disjoint rows, one GPU or a share of the CPU each; only the parent writes manifests.

A worker writes shards and reports each; what a worker had written but not reported when everything stopped is removed
by the next run. Workers end when their parent does.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from exegete.coders.coder import SparseCoder
from exegete.collecting.job import Gathering, Job
from exegete.collecting.passes import ReadableSubject, run
from exegete.config import CollectConfig
from exegete.errors import ExegeteError, InputError
from exegete.store.manifest import ShardEntry, StoreManifest

if TYPE_CHECKING:
    from exegete.store.token_rows import Corpus


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one worker does: the batches (first rows) it takes, and what each store lacks."""

    folder: Path
    corpus: Path
    batches: tuple[int, ...]
    n_rows: int
    device: str
    config: CollectConfig
    manifests: Mapping[str, StoreManifest]
    coders: Mapping[str, SparseCoder]
    missing: Mapping[str, set[int]]


def share(batches: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Cut batches into at most n runs of neighbours of nearly equal length, none of them empty."""
    n = min(n, len(batches))
    bounds = [len(batches) * i // n for i in range(n + 1)]
    return [tuple(batches[a:b]) for a, b in itertools.pairwise(bounds)]


def worker_count(config: CollectConfig, device: Any) -> int:
    """Return how many processes collect: as told, or one for each GPU when the device is ``cuda`` without a number."""
    import multiprocessing

    import torch

    if config.workers != 1 and multiprocessing.parent_process() is not None:
        raise InputError(
            "collecting with several processes was begun inside one of them; put what your script does under "
            'if __name__ == "__main__":'
        )
    if config.workers is not None:
        return config.workers
    many = device.type == "cuda" and config.device in ("cuda", "auto") and config.device_map is None
    return torch.cuda.device_count() if many else 1


def run_workers(
    jobs: Mapping[str, Job],
    subject: ReadableSubject,
    corpus: Corpus,
    batches: Sequence[int],
    n_rows: int,
    config: CollectConfig,
    advance: Callable[[int], None],
    n_workers: int,
) -> None:
    """Collect batches in several processes and list their shards as they come.

    Raises what a worker raised; InputError when a worker ended without a word.
    """
    import torch
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    reports = context.Queue()
    processes = []
    home = subject.device
    subject = subject.to("cpu")  # each process makes its own copy on its device; this one needs none meanwhile
    coders = {name: job.coder.to("cpu") for name, job in jobs.items()}
    for name, job in jobs.items():
        job.coder = coders[name]
    if home.type == "cuda":
        torch.cuda.empty_cache()
    try:
        for number, part in enumerate(share(batches, n_workers)):
            task = Task(
                folder=next(iter(jobs.values())).folder.parent,
                corpus=corpus.folder,
                batches=part,
                n_rows=n_rows,
                device=_device(home, number),
                config=config,
                manifests={name: job.manifest for name, job in jobs.items()},
                coders=coders,
                missing={name: job.missing(len(corpus)) & set(part) for name, job in jobs.items()},
            )
            process = context.Process(target=_work, args=(subject, task, reports), daemon=True)
            process.start()
            processes.append(process)
        left = len(processes)
        while left:
            left -= _listen(reports, jobs, advance, processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        subject.to(home)


def _listen(reports: Any, jobs: Mapping[str, Job], advance: Callable[[int], None], processes: Sequence[Any]) -> int:
    """Take in one report; return 1 when it says that a worker is done."""
    try:
        kind, *what = reports.get(timeout=1)
    except queue.Empty:
        dead = [p for p in processes if p.exitcode not in (None, 0)]
        if dead:
            raise InputError(
                f"a collecting process ended with status {dead[0].exitcode}, perhaps for want of memory; run it again "
                "with fewer workers or smaller batches: it goes on from the last shard"
            ) from None
        return 0
    if kind == "shard":
        name, entry = what
        jobs[name].list_shard(entry)
    elif kind == "rows":
        advance(what[0])
    elif kind == "error":
        raise what[0]
    return int(kind == "done")


def _device(device: Any, number: int) -> str:
    import torch

    return f"cuda:{number % torch.cuda.device_count()}" if device.type == "cuda" else str(device)


def _work(subject: Any, task: Task, reports: Any) -> None:
    """Run in the worker: collect the task's batches and report shards, rows, and how it ended."""
    import torch

    from exegete.store.token_rows import open_corpus

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(next(iter(task.manifests.values())).threads)
        subject = subject.to(task.device)
        gatherings = [
            Gathering(
                task.folder / name,
                manifest,
                task.coders[name].to(task.device),
                set(task.missing[name]),
                shard_bytes=task.config.shard_bytes,
                shard_rows=task.config.shard_rows,
                listing=_reporter(reports, name),
            )
            for name, manifest in task.manifests.items()
        ]
        with torch.inference_mode():
            run(
                gatherings,
                subject,
                open_corpus(task.corpus),
                task.batches,
                task.n_rows,
                lambda rows: reports.put(("rows", rows)),
                behind=torch.device(task.device).type != "cpu",
            )
        reports.put(("done",))
    except ExegeteError as error:
        reports.put(("error", error))
    except Exception:  # noqa: BLE001 (told to the parent, which raises it)
        reports.put(("error", RuntimeError(f"a collecting process failed:\n{traceback.format_exc()}")))


def _reporter(reports: Any, name: str) -> Callable[[ShardEntry], None]:
    return lambda entry: reports.put(("shard", name, entry))


def _end_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
