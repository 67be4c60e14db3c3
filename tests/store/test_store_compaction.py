from __future__ import annotations

import dataclasses
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


def test_shards_too_large_together_stay_apart(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path, corpus, list(range(1, 40)))
    monkeypatch.setattr(compaction, "MAX_FIRINGS", 1)
    assert settle(tmp_path, whole, last=True) == whole


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


def test_two_thousand_shards_with_few_file_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    corpus = made_corpus(tmp_path / "corpus", 2000)
    written(tmp_path / "store", corpus, list(range(1, 2000)))
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from exegete.store import Store\n"
        "from exegete.store.compaction import compact\n"
        "store = Store.open(sys.argv[1])\n"
        "assert len(store.manifest.shards) == 2000\n"
        "count = len(store.firings(3))\n"
        "assert store.content_hash() == store.manifest.content_hash\n"
        "compact(sys.argv[1])\n"
        "store = Store.open(sys.argv[1])\n"
        "assert len(store.manifest.shards) == 1 and len(store.firings(3)) == count > 0\n"
        "assert store.content_hash() == store.manifest.content_hash\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True)
