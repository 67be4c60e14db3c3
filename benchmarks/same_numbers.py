"""Do firings depend on how they were collected? Promise 7 of the design, measured on the embedded default.

    python -m benchmarks.same_numbers [--tokens 65536]

The demo's two TopK coders over the standard library on a CPU; in (b) also the first with a JumpReLU threshold.

(a) With one batch plan: shards of any size, batches in any order, two processes, kills, merging and compaction. The
content hash, computed anew from the files, is the same each time.

(b) Other batch sizes and thread counts against the default of 8192 tokens and one thread. Where a position fires other
latents, the reference batch is taken through the model again for its pre-activations: how far was the k-th from the
next one, or the latent from its threshold? Where a latent fires in both: how far apart are its 16-bit values? Last, the
same plan with the arithmetic of an older processor (no vector extensions beyond SSE2), a stand-in for other machines.

Prints the tables and writes them to ``benchmarks/results/same_numbers.md``; ends with status 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, final
from unittest import mock

import numpy as np
import torch
from benchmarks.machine import RESULTS, describe, save_section

from exegete import collecting
from exegete.coders import JumpReLU, LinearCoder, SparseCoder, load_coders
from exegete.collecting import collect_firings, passes
from exegete.config import CollectConfig, CorpusConfig
from exegete.demo import assets
from exegete.files import fault_hook
from exegete.store import compaction
from exegete.store.corpus import build_corpus, open_corpus, text_documents
from exegete.store.store import Store
from exegete.store.token_rows import Corpus
from exegete.store.values import encode_values
from exegete.subjects import Subject, load_subject
from exegete.types import Array

ROW_LENGTH = 256
REFERENCE = 8192
BATCHES = (256, 1024, 2048, 4096, 16384)
SMALL = 1024
"""Tokens of a batch in part (a): enough shards that they are merged while collecting."""
FEWEST = 16 * SMALL
NEAR = 1e-5
"""Relative distance from the k-th place or the threshold within which a latent may fire or not."""
WITHIN = 0.999
"""Share of values that must agree to one unit in the last place."""
OLDER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""What makes torch and MKL compute as on an older processor."""
ELSEWHERE = "older processor"

Stores = Mapping[str, Store]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What everything is measured on."""

    subject: Subject
    coders: Mapping[str, SparseCoder]
    corpus: Corpus
    folder: Path

    def collect(self, name: str, tokens: int, **options: Any) -> Stores:
        """Collect with all coders; one thread unless told otherwise."""
        config = CollectConfig(batch_tokens=tokens, **{"threads": 1, "workers": 1, **options})
        return collect_firings(self.subject, self.coders, self.corpus, self.folder / name, config)

    @property
    def trained(self) -> Setting:
        """The same without the JumpReLU coder."""
        return replace(self, coders=trained_coders())


def trained_coders() -> dict[str, SparseCoder]:
    """Return the demo's own coders."""
    return load_coders(str(assets() / "coders"))


def all_coders(folder: Path) -> dict[str, SparseCoder]:
    """Return the demo's coders, and the one whose threshold was written down."""
    coders = trained_coders()
    with np.load(folder / "threshold.npz", allow_pickle=False) as levels:
        made = [with_threshold(coders[name], float(level)) for name, level in levels.items()]
    return coders | {coder.name: coder for coder in made}


def with_threshold(coder: SparseCoder, level: float) -> LinearCoder:
    """Return a JumpReLU coder with the weights of another coder."""
    assert isinstance(coder, LinearCoder)
    return LinearCoder(
        name=f"{coder.name}.jump",
        hookpoint=coder.hookpoint,
        encoder=coder.encoder,
        encoder_bias=coder.encoder_bias,
        decoder=coder.decoder,
        decoder_bias=coder.decoder_bias,
        activation=JumpReLU(torch.full((coder.width,), level)),
        subtract_decoder_bias=coder.subtract_decoder_bias,
    )


def prepare(folder: Path, tokens: int) -> Setting:
    """Build the corpus, load subject and coders, and set the threshold at which as many latents fire as under TopK."""
    subject = load_subject(str(assets() / "model"), device="cpu", dtype="float32")
    settings = CorpusConfig(text=("stdlib",), row_length=ROW_LENGTH, max_tokens=tokens)
    documents = text_documents(settings.text)
    corpus = build_corpus(folder / "corpus", documents, subject.tokenizer, settings, table=subject.token_table())
    coder = next(iter(trained_coders().values()))
    assert isinstance(coder, LinearCoder)
    assert coder.k is not None
    with torch.inference_mode():
        batch = passes.read(subject, corpus, 0, REFERENCE // ROW_LENGTH, [coder.point])
        pre = coder.pre_activations(batch.inputs(coder.point, batch.mask)).numpy().reshape(-1)
    place = len(pre) - coder.k * int(batch.mask.sum())
    np.savez(folder / "threshold.npz", **{coder.name: np.partition(pre, place)[place]})
    return Setting(subject=subject, coders=all_coders(folder), corpus=corpus, folder=folder)


def reopened(folder: Path) -> Setting:
    """Return the setting that ``prepare`` made, in another process."""
    subject = load_subject(str(assets() / "model"), device="cpu", dtype="float32")
    return Setting(subject=subject, coders=all_coders(folder), corpus=open_corpus(folder / "corpus"), folder=folder)


# (a) One batch plan


def same_plan(setting: Setting) -> dict[str, dict[str, str]]:
    """Return the content hash of every coder's store, by how it was collected."""
    found = {}

    def note(how: str, stores: Stores) -> None:
        assert all(store.manifest.complete for store in stores.values())
        files = max(len(store.manifest.shards) for store in stores.values())
        fresh = {name: Store.open(store.folder, setting.corpus).content_hash() for name, store in stores.items()}
        found[f"{how} ({files} file{'s' if files > 1 else ''})"] = fresh

    note("one shard", setting.collect("one", SMALL))
    with mock.patch.object(compaction, "FAN_IN", 1 << 30), mock.patch.object(compaction, "MOST_SLICES", 1 << 30):
        note("a shard for each batch, unmerged", setting.collect("many", SMALL, shard_rows=1))
        note("shards of 2 MB in memory, unmerged", setting.collect("bytes", SMALL, shard_bytes=2 << 20))
    stores = setting.collect("many", SMALL)
    for store in stores.values():
        compaction.settle(store.folder, store.manifest, last=True)
    note("the first of these, merged", setting.collect("many", SMALL))
    note("two processes, a shard for each batch", setting.collect("workers", SMALL, shard_rows=1, workers=2))
    with mock.patch.object(collecting, "run", shuffled_run):
        note("batches in random order", setting.collect("order", SMALL, shard_rows=1))
    killed(collect_until, setting.folder, "before shard is listed", len(setting.corpus) // 10)
    killed(collect_until, setting.folder, "before merged shard is listed", 2)
    note("killed twice and resumed", setting.collect("killed", SMALL, shard_rows=1))
    killed(compact_until, setting.folder, "before compacted store is listed", 1)
    for name in setting.coders:
        compaction.compact(setting.folder / "killed" / name)
    note("killed while compacting, compacted", setting.collect("killed", SMALL))
    return found


def shuffled_run(gatherings: Any, subject: Any, corpus: Any, batches: Sequence[int], *rest: Any, **named: Any) -> None:
    """Take batches through the subject in random order."""
    passes.run(gatherings, subject, corpus, random.Random(0).sample(batches, len(batches)), *rest, **named)


def killed(target: Callable[[Path, str, int], None], folder: Path, point: str, times: int) -> None:
    """Run something in a process that is killed when it passes a fault point for the ``times``-th time."""
    process = started(target, folder, point, times)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the process was not killed {point!r}; it ended with {process.exitcode}")


def kill_at(point: str, times: int) -> Callable[[str], None]:
    """Return a fault hook that kills this process when it passes a point for the ``times``-th time."""
    left = times

    def hook(name: str) -> None:
        nonlocal left
        left -= name == point
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def collect_until(folder: Path, point: str, times: int) -> None:
    """Collect, until killed."""
    setting = reopened(folder).trained
    with fault_hook(kill_at(point, times)):
        setting.collect("killed", SMALL, shard_rows=1)


def compact_until(folder: Path, point: str, times: int) -> None:
    """Compact the stores, until killed."""
    with fault_hook(kill_at(point, times)):
        for path in sorted((folder / "killed").iterdir()):
            compaction.compact(path)


# (b) Across batch plans


def collect_plans(folder: Path) -> None:
    """Collect with the reference's plan and all others."""
    setting = reopened(folder)
    for tokens in (REFERENCE, *BATCHES):
        setting.collect(str(tokens), tokens)


def collect_elsewhere(folder: Path) -> None:
    """Collect with the reference's plan, in a process that was started with the environment ``OLDER``."""
    reopened(folder).collect(ELSEWHERE, REFERENCE)


def started(target: Callable[..., None], *given: Any, environment: Mapping[str, str] | None = None) -> SpawnProcess:
    """Start a process of its own, which runs beside this one."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=given)
    with mock.patch.dict(os.environ, environment or {}):
        process.start()
    return process


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """All firings of a store, sorted: position · width + latent int64 [n], and their codes uint16 [n]."""

    keys: Array
    codes: Array
    excluded: Array


def fired(store: Store) -> Fired:
    """Read a whole store."""
    keys, values = [], []
    for firings in store.block(0, store.width):
        flat = firings.rows.astype(np.int64) * store.row_length + firings.positions
        keys.append(flat * store.width + firings.latent.index)
        values.append(firings.values)
    joined = np.concatenate(keys)
    order = np.argsort(joined)
    return Fired(keys=joined[order], codes=encode_values(np.concatenate(values))[order], excluded=store.excluded)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """Of the reference: where it counts, and how far from changing its firings each position and each latent is.

    ``gap`` [positions of the corpus] is what lies between the k-th and the next pre-activation, relative to the k-th;
    NaN where not counted, and all of it under JumpReLU. ``distance`` [len(keys)] is how far each of ``keys`` lies
    beyond the first latent on the other side of the k-th place, or from its threshold, in the same unit.
    """

    n_positions: int
    keys: Array
    gap: Array
    distance: Array

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Array, Array]], keys: Array, size: int) -> Edges:
        """Join what ``batch_edges`` found in all batches; ``size`` positions."""
        gap, distance = np.full(size, np.nan), np.full(len(keys), np.inf)
        for _, gaps, distances in parts:
            gap[gaps[0].astype(np.int64)] = gaps[1]
            distance[distances[0].astype(np.int64)] = distances[1]
        return cls(n_positions=sum(part[0] for part in parts), keys=keys, gap=gap, distance=distance)


def edges(setting: Setting, stores: Stores, made: Mapping[str, Fired], keys: Mapping[str, Array]) -> dict[str, Edges]:
    """Take the reference batches through the subject again and measure; raises where they fire anything else."""
    corpus, n_rows = setting.corpus, REFERENCE // ROW_LENGTH
    points = list(dict.fromkeys(coder.point for coder in setting.coders.values()))
    parts: dict[str, list[tuple[int, Array, Array]]] = {name: [] for name in setting.coders}
    torch.set_num_threads(1)
    with torch.inference_mode():
        for start in range(0, len(corpus), n_rows):
            batch = passes.read(setting.subject, corpus, start, min(start + n_rows, len(corpus)), points)
            for name, coder in setting.coders.items():
                limit = stores[name].manifest.norm_limit
                counted = batch.counted(coder.point, np.inf if limit is None else limit)
                at = np.flatnonzero(counted.numpy()) + start * ROW_LENGTH
                assert isinstance(coder, LinearCoder)
                pre = coder.pre_activations(batch.inputs(coder.point, counted))
                require_same(coder, pre, at, made[name])
                parts[name].append(batch_edges(coder, pre, at, keys[name]))
    return {name: Edges.of(part, keys[name], len(corpus) * ROW_LENGTH) for name, part in parts.items()}


def require_same(coder: LinearCoder, pre: torch.Tensor, at: Array, expected: Fired) -> None:
    """Raise unless pre-activations [n, width] at positions [n] make the firings that are stored there."""
    found = coder.activation.sparse(pre.clone())
    counts = np.full(len(at), found.indices.shape[-1]) if found.counts is None else found.counts.numpy()
    latents, values = found.indices.numpy().reshape(-1), found.values.numpy().reshape(-1)
    keys = (np.repeat(at, counts) * coder.width + latents)[values > 0]
    order = np.argsort(keys)
    low, high = np.searchsorted(expected.keys, [at[0] * coder.width, (at[-1] + 1) * coder.width])
    codes = encode_values(values[values > 0])[order]
    if not np.array_equal(keys[order], expected.keys[low:high]) or not np.array_equal(codes, expected.codes[low:high]):
        raise RuntimeError(f"{coder.name}: the reference batch fires otherwise when it is taken through again")


def batch_edges(coder: LinearCoder, pre: torch.Tensor, at: Array, keys: Array) -> tuple[int, Array, Array]:
    """Return counted positions, (position, gap) pairs, and (place in keys, distance) pairs of one batch."""
    positions, latents = np.divmod(keys, coder.width)
    row = np.searchsorted(at, positions)
    here = np.flatnonzero(at[np.minimum(row, len(at) - 1)] == positions)
    own = pre.numpy()[row[here], latents[here]].astype(np.float64)
    if isinstance(coder.activation, JumpReLU):
        level = coder.activation.threshold.numpy()[latents[here]].astype(np.float64)
        return len(at), np.zeros((2, 0)), np.stack([here, np.abs(own - level) / level])
    assert coder.k is not None
    best = pre.relu().topk(coder.k + 1, dim=-1).values.numpy().astype(np.float64)
    last, following = best[:, -2], best[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.where(last > 0, (last - following) / last, np.inf)  # fewer than k are positive
    inside = own >= last[row[here]]
    beyond = np.where(inside, own - following[row[here]], last[row[here]] - own)
    return len(at), np.stack([at, gap]), np.stack([here, beyond / last[row[here]]])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one collection differs in from the reference."""

    coder: str
    plan: str
    n_positions: int
    n_counted_otherwise: int
    n_differing: int
    n_near: int
    gaps: Array
    n_common: int
    n_equal: int
    n_within: int
    largest: int


def compare(coder: str, plan: str, reference: Fired, other: Fired, edge: Edges, width: int) -> Row:
    """Count positions with other firings, near ties among them, and values that differ."""
    _, here, there = np.intersect1d(reference.keys, other.keys, assume_unique=True, return_indices=True)
    apart = np.abs(reference.codes[here].astype(np.int64) - other.codes[there])
    changed = np.setxor1d(reference.keys, other.keys, assume_unique=True)
    positions, owner = np.unique(changed // width, return_inverse=True)
    gaps = np.fmax(edge.gap[positions], 0)  # under JumpReLU there is no gap, it is NaN
    np.maximum.at(gaps, owner, edge.distance[np.searchsorted(edge.keys, changed)])
    return Row(
        coder=coder,
        plan=plan,
        n_positions=edge.n_positions,
        n_counted_otherwise=len(np.setxor1d(reference.excluded, other.excluded, assume_unique=True)),
        n_differing=len(positions),
        n_near=int((gaps <= NEAR).sum()),
        gaps=gaps,
        n_common=len(apart),
        n_equal=int((apart == 0).sum()),
        n_within=int((apart <= 1).sum()),
        largest=int(apart.max(initial=0)),
    )


def across_plans(setting: Setting) -> tuple[list[Row], dict[str, Edges]]:
    """Compare all other collections, most of them already made, with the reference."""
    stores = setting.collect(str(REFERENCE), REFERENCE)
    others: dict[str, Stores] = {f"{tokens:,} tokens": setting.collect(str(tokens), tokens) for tokens in BATCHES}
    others["2 threads"] = setting.collect("threads", REFERENCE, threads=2)
    others[ELSEWHERE] = setting.collect(ELSEWHERE, REFERENCE)
    reference = {name: fired(store) for name, store in stores.items()}
    found = {plan: {name: fired(store) for name, store in made.items()} for plan, made in others.items()}
    keys = {
        name: np.unique(
            np.concatenate([np.setxor1d(own.keys, made[name].keys, assume_unique=True) for made in found.values()])
        )
        for name, own in reference.items()
    }
    measured = edges(setting, stores, reference, keys)
    rows = [
        compare(name, plan, reference[name], found[plan][name], measured[name], coder.width)
        for name, coder in setting.coders.items()
        for plan in found
    ]
    return rows, measured


# What is printed


def plan_table(found: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield the table of part (a)."""
    names = list(next(iter(found.values())))
    yield f"| how it was collected | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for how, hashes in found.items():
        yield f"| {how} | {' | '.join(hashes[name] for name in names)} |"


def number_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of part (b)."""
    yield (
        "| coder | plan | positions that fire otherwise | of these near ties | largest relative gap | median | values: "
        "same code | within one | largest difference |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        middle, most = (f"{f(row.gaps):.1e}" if len(row.gaps) else "–" for f in (np.median, np.max))
        otherwise = f"{row.n_differing} of {row.n_positions:,} | {row.n_near} | {most} | {middle}"
        values = f"{row.n_equal / row.n_common:.4%} of {row.n_common:,} | {row.n_within / row.n_common:.4%}"
        yield f"| {row.coder} | {row.plan} | {otherwise} | {values} | {row.largest} |"


def gap_lines(measured: Mapping[str, Edges]) -> Iterator[str]:
    """Yield how often near ties occur at all."""
    for name, edge in measured.items():
        gap = edge.gap[~np.isnan(edge.gap)]
        if len(gap):
            shares = ", ".join(f"{int((gap <= at).sum())} within {at:.0e}" for at in (1e-4, 1e-5, 1e-6))
            yield f"- {name}: of {len(gap):,} positions the k-th and the next pre-activation lie {shares}"


def verdicts(found: Mapping[str, Mapping[str, str]], rows: Sequence[Row]) -> dict[str, bool]:
    """Return the bounds, and whether they hold."""
    hashes = list(found.values())
    bounds = {
        f"one batch plan: the content hashes of all {len(found)} ways are equal": all(h == hashes[0] for h in hashes)
    }
    elsewhere = [row for row in rows if row.plan == ELSEWHERE]
    for what, part in (("batch plans and threads", [r for r in rows if r not in elsewhere]), (ELSEWHERE, elsewhere)):
        differing, near = sum(row.n_differing for row in part), sum(row.n_near for row in part)
        worst = min(row.n_within / row.n_common for row in part)
        moved = sum(row.n_counted_otherwise for row in part)
        bounds |= {
            f"{what}: {near} of {differing} positions that fire otherwise are near ties (gap at most {NEAR:.0e})": near
            == differing,
            f"{what}: {moved} positions count in one store and not in the other": moved == 0,
            f"{what}: at least {worst:.4%} of values within one unit (bound {WITHIN:.1%})": worst >= WITHIN,
        }
    return bounds


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    if arguments.tokens < FEWEST:
        parser.error(f"--tokens must be at least {FEWEST:,}, so that shards are merged; got {arguments.tokens}")
    machine, begun = describe(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(Path(folder), arguments.tokens)
        beside = [started(collect_plans, Path(folder)), started(collect_elsewhere, Path(folder), environment=OLDER)]
        found = same_plan(setting.trained)
        for process in beside:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a collecting process ended with status {process.exitcode}")
        rows, measured = across_plans(setting)
    bounds = verdicts(found, rows)
    lines = [
        machine,
        "",
        f"`python -m benchmarks.same_numbers --tokens {arguments.tokens}`: demo subject (4 layers, d 256, float32), "
        f"{len(setting.corpus):,} rows of {ROW_LENGTH}, coders of 2,048 latents and k = 32; "
        f"{time.perf_counter() - begun:.0f} s. The older processor is this one with {OLDER}.",
        "",
        f"**One batch plan** ({SMALL:,} tokens a batch, one thread): content hashes, computed anew from the files.",
        "",
        *plan_table(found),
        "",
        f"**Across batch plans**: against {REFERENCE:,} tokens a batch and one thread.",
        "",
        *number_table(rows),
        "",
        *gap_lines(measured),
        "",
        *(f"- {'holds' if holds else '**DOES NOT HOLD**'}: {bound}" for bound, holds in bounds.items()),
    ]
    print("\n".join(lines))
    save_section(RESULTS / "same_numbers.md", "The same numbers (promise 7)", "\n".join(lines))
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
