from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import CorpusConfig
from exegete.errors import BusyError, CorruptError
from exegete.files import RunLock, fault_hook
from exegete.store import compaction
from exegete.store.compaction import clean, compact, settle
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import save_summary
from exegete.store.store import Store
from exegete.store.values import ENCODING
from exegete.tokens import TokenTable

WIDTH, LENGTH = 7, 4


class LetterTokenizer:
    is_fast = False
    bos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def made_corpus(folder: Path, n_rows: int) -> Corpus:
    table = TokenTable([bytes([i]) for i in range(128)], special=[])
    rng = np.random.default_rng(0)
    text = bytes(rng.integers(97, 110, n_rows * LENGTH).tolist()).decode()
    documents = [TextDocument(key="a", text=text)]
    return build_corpus(folder, documents, LetterTokenizer(), CorpusConfig(row_length=LENGTH), table=table)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return made_corpus(tmp_path_factory.mktemp("run") / "corpus", 40)


def written(folder: Path, corpus: Corpus, cuts: list[int], seed: int = 0) -> StoreManifest:
    """Write a store in shards that end at ``cuts``, and a few excluded positions."""
    rng = np.random.default_rng(seed)
    n = len(corpus)
    dense = rng.integers(1, 1 << 16, (n * LENGTH, WIDTH)) * (rng.random((n * LENGTH, WIDTH)) < 0.3)
    dense[:, 2] = 0
    excluded = rng.choice(n * LENGTH, 5, replace=False)
    dense[excluded] = 0
    entries = []
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        builder = ShardBuilder(row_start=start, row_length=LENGTH, width=WIDTH)
        part = dense[start * LENGTH : stop * LENGTH]
        at, latents = np.nonzero(part)
        out = np.sort(excluded[(excluded >= start * LENGTH) & (excluded < stop * LENGTH)]) - start * LENGTH
        builder.add((part > 0).sum(axis=1), latents, part[at, latents], out)
        file = f"shard-{start}-{stop}.bin"
        sha = builder.write(folder / file)
        entries.append(
            ShardEntry(
                file=file,
                row_start=start,
                row_stop=stop,
                latent_start=0,
                latent_stop=WIDTH,
                n_positions=(stop - start) * LENGTH - len(out),
                n_firings=builder.n_firings,
                tier=0,
                sha256=sha,
            )
        )
    manifest = StoreManifest(
        name="res",
        subject="toy",
        subject_hash="s",
        tokenizer_hash="t",
        coder_hash="c",
        coder_dtype="float32",
        coder="topk",
        corpus_hash=corpus.hash,
        corpus="../corpus",
        hookpoint="layers.0",
        side="output",
        width=WIDTH,
        k=None,
        mask_policy={},
        batch_plan={"rows": 1, "row_length": LENGTH},
        device="cpu",
        dtype="float32",
        compiled=False,
        threads=1,
        values=ENCODING,
        versions={},
        quality={},
        shards=tuple(entries),
    )
    summary, content = Store(folder, manifest, corpus).scan()
    save_summary(folder, summary)
    manifest = dataclasses.replace(manifest, complete=True, content_hash=content)
    save_manifest(folder, manifest)
    return manifest


def contents(folder: Path, corpus: Corpus) -> list[Any]:
    store = Store.open(folder, corpus)
    assert store.content_hash() == store.manifest.content_hash
    latents = [(f.rows.tolist(), f.positions.tolist(), f.values.tolist()) for f in store.block(0, WIDTH)]
    singly = [store.firings(i) for i in range(WIDTH)]
    assert latents == [(f.rows.tolist(), f.positions.tolist(), f.values.tolist()) for f in singly]
    mask = store.rows([39, 0, 17]).mask.tolist()
    assert store.rows(slice(None)).mask.sum() == store.manifest.n_positions
    assert store.counts.tolist() == [len(f) for f in singly]
    return [latents, store.excluded.tolist(), mask, store.manifest.n_positions, store.manifest.content_hash]


cuts_of_40 = st.sets(st.integers(1, 39)).map(sorted)


@settings(max_examples=20, deadline=None)
@given(cuts=cuts_of_40, seed=st.integers(0, 99), run=st.integers(1, 200), most=st.integers(1, 300))
def test_merging_and_compacting_change_nothing(
    corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int, run: int, most: int
) -> None:
    folder = tmp_path_factory.mktemp("s") / "store"
    written(folder, corpus, cuts, seed)
    before = contents(folder, corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_RUN", run)
        patch.setattr(compaction, "RANGE_FIRINGS", most)
        settle(folder, load_manifest(folder), last=True)
        manifest = load_manifest(folder)
        assert len(manifest.shards) <= 16
        assert contents(folder, corpus) == before
        compact(folder)
        manifest = load_manifest(folder)
        assert manifest.by_latent
        if len(manifest.shards) > 1:
            assert all(s.n_firings <= most or s.latent_stop == s.latent_start + 1 for s in manifest.shards)
        assert contents(folder, corpus) == before
        files = {path.name for path in folder.glob("*.bin")}
        assert files == {entry.file for entry in manifest.shards}
        assert compact(folder) == manifest


def test_tiers_while_collecting(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "FAN_IN", 3)
    whole = written(tmp_path, corpus, list(range(1, 40)))
    manifest = dataclasses.replace(whole, shards=())
    for entry in whole.shards:
        manifest = settle(tmp_path, dataclasses.replace(manifest, shards=(*manifest.shards, entry)))
        tiers = [shard.tier for shard in manifest.shards]
        assert tiers == sorted(tiers, reverse=True)
        assert max(tiers.count(tier) for tier in tiers) < 3
    assert [shard.row_stop for shard in manifest.shards] == [27, 36, 39, 40]
    save_manifest(tmp_path, manifest)
    assert contents(tmp_path, corpus)[4] == whole.content_hash


def test_gaps_are_not_merged_over(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "FAN_IN", 2)
    whole = written(tmp_path, corpus, [10, 20, 30])
    partial = dataclasses.replace(whole, complete=False, shards=(whole.shards[0], whole.shards[2], whole.shards[3]))
    settled = settle(tmp_path, partial)
    assert [(s.row_start, s.row_stop) for s in settled.shards] == [(0, 10), (20, 40)]
    assert settled.missing(40) == [(10, 20)]
    assert settled.missing(45) == [(10, 20), (40, 45)]


def listed(n_firings: int, row: int, rows: int = 1, tier: int = 0) -> ShardEntry:
    return ShardEntry(
        file=f"{row}.bin",
        row_start=row,
        row_stop=row + rows,
        latent_start=0,
        latent_stop=WIDTH,
        n_positions=rows,
        n_firings=n_firings,
        tier=tier,
        sha256="",
    )


def settled(shards: list[ShardEntry], *, last: bool) -> tuple[list[ShardEntry], int]:
    """Merge entries as ``settle`` does, and return what is left and how many firings were written."""
    written = 0
    while (due := compaction._due(shards, last=last)) is not None:
        first, stop = due
        old = shards[first:stop]
        assert len(old) > 1
        assert all(a.row_stop == b.row_start for a, b in itertools.pairwise(old))
        n = sum(entry.n_firings for entry in old)
        written += n
        rows = old[-1].row_stop - old[0].row_start
        shards = [*shards[:first], listed(n, old[0].row_start, rows, max(e.tier for e in old) + 1), *shards[stop:]]
    return shards, written


@pytest.mark.parametrize("firings", [1 << 22, 1 << 28])
def test_tens_of_billions_of_firings_end_in_sixteen_slices_at_little_cost(firings: int) -> None:
    total = 32_000_000_000
    shards: list[ShardEntry] = []
    written = 0
    for row in range(-(-total // firings)):
        shards, more = settled([*shards, listed(firings, row)], last=False)
        written += more
    shards, more = settled(shards, last=True)
    assert len(shards) <= 16
    assert more <= total
    assert written + more <= 4 * total


def test_shards_that_come_in_any_order_end_in_sixteen_slices_at_little_cost() -> None:
    rng = np.random.default_rng(0)
    shards: list[ShardEntry] = []
    written = 0
    for row in rng.permutation(3000).tolist():
        entry = listed(int(rng.integers(1, 100)), row)
        shards, more = settled(sorted([*shards, entry], key=lambda e: e.row_start), last=False)
        written += more
    total = sum(entry.n_firings for entry in shards)
    shards, more = settled(shards, last=True)
    assert len(shards) == 16
    assert [shards[0].row_start, shards[-1].row_stop] == [0, 3000]
    assert more <= total
    assert written + more <= 4 * total


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), most=st.integers(1, 5), gaps=st.sets(st.integers(1, 8))
)
def test_the_last_merges_are_the_cheapest_there_are(sizes: list[int], most: int, gaps: set[int]) -> None:
    row, shards = 0, []
    for i, size in enumerate(sizes):
        row += 5 if i in gaps else 0
        shards.append(listed(size, row))
        row += 1
    stretches = 1 + sum(a.row_stop != b.row_start for a, b in itertools.pairwise(shards))
    costs = []
    for cuts in itertools.product((False, True), repeat=len(sizes) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(sizes)]
        groups = list(itertools.pairwise(bounds))
        if len(groups) <= max(most, stretches) and not any(
            shards[i].row_stop != shards[i + 1].row_start for a, b in groups for i in range(a, b - 1)
        ):
            costs.append(sum(sum(sizes[a:b]) + b - a for a, b in groups if b - a > 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "MOST_SLICES", most)
        left, written = settled(shards, last=True)
    assert len(left) == min(len(sizes), max(most, stretches))
    assert sum(entry.n_firings for entry in left) == sum(sizes)
    groups = compaction._cheapest(shards, most)
    assert sum(sum(sizes[a:b]) + b - a for a, b in groups if b - a > 1) == min(costs)
    assert written <= min(costs)


def test_large_shards_stay_where_merging_small_ones_is_enough() -> None:
    sizes = [1, 1, 1000, 2, 1, *[1000] * 8, 1, 1, 1000, 1, 1, 1]
    left, written = settled([listed(size, row, tier=int(size > 9)) for row, size in enumerate(sizes)], last=True)
    assert len(left) == 16
    assert written == 5
    assert sum(entry.n_firings == 1000 for entry in left) == 10


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way out."""


@pytest.mark.parametrize("what", ["settle", "compact"])
def test_stopped_at_every_point_nothing_is_lost(
    corpus: Corpus, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(compaction, "RANGE_FIRINGS", 100)

    def act(folder: Path) -> None:
        if what == "compact":
            compact(folder)
        else:
            settle(folder, load_manifest(folder), last=True)

    points: list[str] = []
    written(tmp_path / "whole", corpus, list(range(2, 40, 2)))
    before = contents(tmp_path / "whole", corpus)
    with fault_hook(points.append):
        act(tmp_path / "whole")
    assert len(points) >= 8
    for stop in range(len(points)):
        left = stop

        def kill(_: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1

        folder = tmp_path / str(stop)
        written(folder, corpus, list(range(2, 40, 2)))
        with monkeypatch.context() as patch, fault_hook(kill):
            patch.setattr("os.unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                act(folder)
        assert contents(folder, corpus) == before
        clean(folder, load_manifest(folder))
        act(folder)
        assert contents(folder, corpus) == before
        assert sorted(p.name for p in folder.glob("*.bin")) == sorted(s.file for s in load_manifest(folder).shards)
        assert not list(folder.glob(".*.tmp"))


def test_a_damaged_shard_is_not_compacted(corpus: Corpus, tmp_path: Path) -> None:
    manifest = written(tmp_path, corpus, [20])
    path = tmp_path / manifest.shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=path.name.replace(".", r"\.")):
        compact(tmp_path)
    assert load_manifest(tmp_path) == manifest


def test_a_store_being_written_is_not_compacted(corpus: Corpus, tmp_path: Path) -> None:
    written(tmp_path, corpus, [20])
    with RunLock(tmp_path), pytest.raises(BusyError):
        compact(tmp_path)


def test_hundreds_of_shards_with_few_file_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    corpus = made_corpus(tmp_path / "corpus", 500)
    written(tmp_path / "store", corpus, list(range(1, 500)))
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from exegete.store import Store\n"
        "from exegete.store.compaction import compact\n"
        "store = Store.open(sys.argv[1])\n"
        "assert len(store.manifest.shards) == 500\n"
        "count = len(store.firings(3))\n"
        "assert store.content_hash() == store.manifest.content_hash\n"
        "compact(sys.argv[1])\n"
        "store = Store.open(sys.argv[1])\n"
        "assert len(store.manifest.shards) == 1 and len(store.firings(3)) == count > 0\n"
        "assert store.content_hash() == store.manifest.content_hash\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True)
