"""Reading in bounded memory, and while the store is merged or compacted by another process."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import CorpusConfig
from exegete.errors import BusyError, CorruptError
from exegete.store import compaction, reading
from exegete.store import store as module
from exegete.store.compaction import compact, settle
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.reading import Span, latents_at_once, runs, spans
from exegete.store.shards import ShardBuilder
from exegete.store.stats import Summary, save_summary, summarise
from exegete.store.store import Store
from exegete.store.values import ENCODING
from exegete.tokens import TokenTable
from exegete.types import Array, Rows

WIDTH = 5


class LetterTokenizer:
    is_fast = False
    bos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def made_corpus(folder: Path, n_rows: int, row_length: int) -> Corpus:
    """Documents of a few tokens, several to a row, in which the letter z does not count."""
    table = TokenTable([bytes([i]) for i in range(128)], special=[ord("z")])
    rng = np.random.default_rng(0)
    text = bytes(rng.integers(110, 123, n_rows * row_length).tolist()).decode()
    cuts = [0, *np.sort(rng.choice(len(text), len(text) // 100 + 1, replace=False) + 1).tolist(), len(text)]
    documents = [TextDocument(key=f"{a}", text=text[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    config = CorpusConfig(row_length=row_length)
    return build_corpus(folder, documents, LetterTokenizer(), config, table=table)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return made_corpus(tmp_path_factory.mktemp("run") / "corpus", 24, 16)


def drawn(corpus: Corpus, seed: int) -> tuple[Array, Array]:
    """Return codes [positions, WIDTH], 0 for silence, of dense and sparse latents, and some excluded positions."""
    rng = np.random.default_rng(seed)
    n = corpus.tokens.size
    rates = rng.permutation([1.0, 0.5, 0.1, 0.02, 0.0])
    dense = rng.integers(1, 1 << 16, (n, WIDTH)) * (rng.random((n, WIDTH)) < rates)
    mask = corpus.rows(slice(None)).mask.reshape(-1)
    excluded = np.sort(rng.choice(np.flatnonzero(mask), 9, replace=False))
    mask[excluded] = False
    dense[~mask] = 0
    return dense, excluded


def shard(folder: Path, corpus: Corpus, dense: Array, excluded: Array, start: int, stop: int) -> ShardEntry:
    length = corpus.row_length
    low, high = start * length, stop * length
    builder = ShardBuilder(row_start=start, row_length=length, width=dense.shape[1])
    part = dense[low:high]
    at, latents = np.nonzero(part)
    out = excluded[(excluded >= low) & (excluded < high)] - low
    builder.add((part > 0).sum(axis=1), latents, part[at, latents], out)
    mask = corpus.rows(slice(start, stop)).mask
    return ShardEntry(
        file=f"shard-{start}-{stop}.bin",
        row_start=start,
        row_stop=stop,
        latent_start=0,
        latent_stop=dense.shape[1],
        n_positions=int(mask.sum()) - len(out),
        n_firings=builder.n_firings,
        tier=0,
        sha256=builder.write(folder / f"shard-{start}-{stop}.bin"),
    )


def stored(
    folder: Path, corpus: Corpus, dense: Array, excluded: Array, cuts: list[int], *, rows: int | None = None
) -> StoreManifest:
    """Write an unfinished store of the first ``rows`` rows in shards that end at ``cuts``."""
    n_rows = len(corpus) if rows is None else rows
    bounds = zip([0, *cuts], [*cuts, n_rows], strict=True)
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
        width=dense.shape[1],
        k=None,
        mask_policy={},
        batch_plan={"rows": 1, "row_length": corpus.row_length},
        device="cpu",
        dtype="float32",
        compiled=False,
        threads=1,
        values=ENCODING,
        versions={},
        quality={},
        shards=tuple(shard(folder, corpus, dense, excluded, start, stop) for start, stop in bounds),
    )
    save_manifest(folder, manifest)
    return manifest


def finished(folder: Path, corpus: Corpus) -> None:
    """Mark a store complete."""
    store = Store.open(folder, corpus)
    summary, content = store.scan()
    sha256 = save_summary(folder, summary)
    done = dataclasses.replace(store.manifest, complete=True, content_hash=content, summary_sha256=sha256)
    save_manifest(folder, done)


def marks_of(documents: Array, mask: Array) -> list[list[int]]:
    """Return the marks, the obvious way."""
    found = np.zeros(mask.shape, int)
    for row in range(len(mask)):
        start = 0
        for stop in range(1, mask.shape[1] + 1):
            if stop == mask.shape[1] or documents[row, stop] != documents[row, start]:
                counted = [column for column in range(start, stop) if mask[row, column]]
                if counted:
                    found[row, counted[0]] += 1
                    found[row, counted[-1]] += 2
                start = stop
    marks: list[list[int]] = found.tolist()
    return marks


@pytest.mark.parametrize(
    ("mask", "documents", "marks"),
    [
        ("11011", "00000", [1, 0, 0, 0, 2]),
        ("01010", "00000", [0, 1, 0, 2, 0]),
        ("00100", "00000", [0, 0, 3, 0, 0]),
        ("11111", "00111", [1, 2, 1, 0, 2]),
        ("10101", "00111", [3, 0, 1, 0, 2]),
        ("00000", "01234", [0, 0, 0, 0, 0]),
        ("11111", "01234", [3, 3, 3, 3, 3]),
    ],
)
def test_first_and_last_counted_positions_by_hand(mask: str, documents: str, marks: list[int]) -> None:
    both = [np.array([list(map(int, text))] * 2) for text in (mask, documents)]
    rows = Rows(tokens=np.zeros((2, 5), np.uint32), documents=both[1].astype(np.int32), mask=both[0].astype(bool))
    assert module._marks(rows).tolist() == [marks, marks]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(0, 1))
def test_first_and_last_counted_positions_equal_the_obvious_ones(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    documents = np.cumsum(rng.random((4, 11)) < 0.3, axis=1).astype(np.int32) + rng.integers(0, 2, (4, 1), np.int32)
    mask = rng.random((4, 11)) < rate
    rows = Rows(tokens=np.zeros((4, 11), np.uint32), documents=documents, mask=mask)
    assert module._marks(rows).tolist() == marks_of(documents, mask)


def test_shares_of_first_and_last_with_holes_and_several_documents_a_row(corpus: Corpus, tmp_path: Path) -> None:
    dense, excluded = drawn(corpus, 3)
    stored(tmp_path, corpus, dense, excluded, [7, 8])
    rows = corpus.rows(slice(None))
    mask = rows.mask.copy()
    mask.reshape(-1)[excluded] = False
    assert (np.diff(rows.documents, axis=1) != 0).any()
    assert (mask[:, :-2] & ~mask[:, 1:-1] & mask[:, 2:]).any()
    marks = np.array(marks_of(rows.documents, mask)).reshape(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MARKED", 50)
        found = Store.open(tmp_path, corpus).stats()
    for stats in found:
        own = dense[:, stats.latent.index] > 0
        n = max(int(own.sum()), 1)
        assert stats.first_share == (own & (marks % 2 == 1)).sum() / n
        assert stats.last_share == (own & (marks >= 2)).sum() / n


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    firings=st.integers(1, 60),
    latents=st.integers(1, 5),
    chunk=st.integers(1, 30),
)
def test_spans_hold_every_firing_once_and_no_more_than_they_may(
    counts: list[int], firings: int, latents: int, chunk: int
) -> None:
    found = list(spans(np.array(counts), firings=firings, latents=latents, chunk=chunk, first=100))
    at, begin = 100, 0
    for span in found:
        assert (span.start, span.begin) == (at, begin)
        own = counts[span.start - 100 : span.stop - 100]
        if span.end is None:
            assert max(own) <= chunk
            assert sum(own) <= firings or len(own) == 1
            assert len(own) <= latents
        else:
            assert own[0] > chunk
            assert span.end == min(begin + chunk, own[0])
            assert span.more == (span.end < own[0])
        at, begin = (span.start, span.end or 0) if span.more else (span.stop, 0)
    assert (at, begin) == (100 + len(counts), 0)
    assert [stop for _, stop in runs(np.array(counts), firings, latents)][-1] == len(counts)


def slow_summary(store: Store, corpus: Corpus, dense: Array, excluded: Array) -> Summary:
    """Return the summary from whole latents at once."""
    rows = corpus.rows(slice(None))
    mask = rows.mask.copy()
    mask.reshape(-1)[excluded] = False
    marks = np.array(marks_of(rows.documents, mask), np.uint8).reshape(-1)
    latent, at = np.nonzero(dense.T)
    offsets = np.concatenate([[0], np.cumsum((dense > 0).sum(axis=0))])
    tokens = corpus.tokens.reshape(-1).astype(np.int64)[at]
    return summarise(offsets, dense[at, latent].astype(np.uint16), tokens, marks[at])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 23)).map(sorted),
    run=st.integers(1, 200),
    chunk=st.integers(1, 120),
    cells=st.integers(1, 60),
    threads=st.integers(1, 4),
)
def test_chunks_change_nothing(
    corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    cuts: list[int],
    run: int,
    chunk: int,
    cells: int,
    threads: int,
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    dense, excluded = drawn(corpus, seed)
    stored(folder / "whole", corpus, dense, excluded, [])
    stored(folder / "cut", corpus, dense, excluded, cuts)
    whole, content = Store.open(folder / "whole", corpus).scan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        chunked, same = Store.open(folder / "whole", corpus).scan()
        assert same == content
        patch.setattr(module, "_RUN", run)
        patch.setattr(module, "_LATENTS", 2)
        patch.setattr(reading, "CELLS", cells)
        patch.setattr(compaction, "_RUN", run)
        patch.setattr(compaction, "RANGE_FIRINGS", 150)
        patch.setattr(compaction, "MOST_SLICES", 3)
        finished(folder / "cut", corpus)
        for change in ("none", "settle", "compact"):
            if change == "settle":
                settle(folder / "cut", load_manifest(folder / "cut"), last=True)
            elif change == "compact":
                compact(folder / "cut")
            store = Store.open(folder / "cut", corpus)
            found, same = store.scan(threads)
            assert same == content == store.content_hash()
            for name in (field.name for field in dataclasses.fields(Summary)):
                assert np.array_equal(getattr(found, name), getattr(chunked, name)), name
    slow = slow_summary(store, corpus, dense, excluded)
    for name in (field.name for field in dataclasses.fields(Summary)):
        near = np.allclose if name in ("totals", "sum_squares") else np.array_equal
        assert near(getattr(chunked, name), getattr(slow, name)), name
        assert np.array_equal(getattr(whole, name), getattr(slow, name)), name


def test_statistics_of_single_latents_are_those_of_the_scan(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, excluded = drawn(corpus, 0)
    stored(tmp_path, corpus, dense, excluded, [5, 9])
    monkeypatch.setattr(module, "_CHUNK", 30)
    calls = 0
    ends = Store._ends

    def counted(store: Store) -> Any:
        nonlocal calls
        calls += 1
        return ends(store)

    monkeypatch.setattr(Store, "_ends", counted)
    singly = Store.open(tmp_path, corpus).stats([4, 0, 1, 3, 2, 0])
    assert calls == 1
    finished(tmp_path, corpus)
    known = Store.open(tmp_path, corpus).stats([4, 0, 1, 3, 2, 0])
    for one, other in zip(singly, known, strict=True):
        assert one.histogram.tolist() == other.histogram.tolist()
        assert one.edges.tolist() == other.edges.tolist()
        plain = {"histogram": np.zeros(0), "edges": np.zeros(0)}
        for field in dataclasses.fields(one):
            if field.name not in plain:
                assert getattr(one, field.name) == getattr(other, field.name), field.name


def test_what_a_thread_reads_at_once_does_not_depend_on_their_number(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, excluded = drawn(corpus, 0)
    stored(tmp_path, corpus, dense, excluded, [])
    monkeypatch.setattr(module, "_RUN", 300)
    seen: dict[int, list[Span]] = {}
    read = Store._counted
    store = Store.open(tmp_path, corpus)
    for threads in (1, 3, 64):
        own = seen.setdefault(threads, [])

        def counted(self: Store, span: Span, ends: Array, own: list[Span] = own) -> Any:
            own.append(span)
            return read(self, span, ends)

        monkeypatch.setattr(Store, "_counted", counted)
        store.scan(threads)
        own.sort(key=lambda span: span.start)
    assert seen[1] == seen[3] == seen[64]


def test_a_run_is_bounded_by_its_counters_too(corpus: Corpus, tmp_path: Path) -> None:
    dense, excluded = drawn(corpus, 0)
    manifest = stored(tmp_path, corpus, dense, excluded, [3, 11])
    assert latents_at_once(manifest) == reading.CELLS // 3
    wide = dataclasses.replace(manifest, batch_plan={"rows": 1, "row_length": 1 << 20})
    assert latents_at_once(wide) == reading.CELLS // (len(corpus) * 16)
    one = dataclasses.replace(wide.shards[0], row_start=0, row_stop=len(corpus), latent_stop=2)
    other = dataclasses.replace(one, latent_start=2, latent_stop=WIDTH)
    assert latents_at_once(dataclasses.replace(wide, shards=(one, other))) == reading.CELLS // (len(corpus) * 16)
    huge = dataclasses.replace(wide, batch_plan={"rows": 1, "row_length": 1 << 50})
    assert latents_at_once(huge) == 1


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_latent_that_fires_everywhere_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = made_corpus(tmp_path / "corpus", 1024, 256)
    dense = np.zeros((corpus.tokens.size, 2), np.int64)
    dense[:, 1] = np.arange(len(dense)) % 60_000 + 1
    dense[::1000, 0] = 5
    none = np.zeros(0, np.int64)
    stored(tmp_path / "store", corpus, dense, none, [300, 700])
    small = 1 << 12
    monkeypatch.setattr(module, "_RUN", small)
    monkeypatch.setattr(module, "_CHUNK", small)
    monkeypatch.setattr(module, "_MARKED", small)
    monkeypatch.setattr(compaction, "_RUN", small)
    bound = 8 * corpus.tokens.size  # the positions of that latent alone, as int64
    store = Store.open(tmp_path / "store", corpus)
    assert peak_of(lambda: store.stats([0])) < bound
    assert peak_of(lambda: store.stats([1])) < bound
    assert peak_of(store.scan) < bound
    finished(tmp_path / "store", corpus)
    monkeypatch.setattr(compaction, "MOST_SLICES", 2)
    manifest = load_manifest(tmp_path / "store")
    assert peak_of(lambda: settle(tmp_path / "store", manifest, last=True)) < bound
    merged = load_manifest(tmp_path / "store")
    assert len(merged.shards) == 2 < len(manifest.shards)
    monkeypatch.setattr(compaction, "load_manifest", lambda _: merged)  # its file is not what is measured
    monkeypatch.setattr(compaction, "RANGE_FIRINGS", 1000)
    assert peak_of(lambda: compact(tmp_path / "store")) < bound
    after = Store.open(tmp_path / "store", corpus)
    assert [s.latent_stop for s in after.manifest.shards] == [1, 2]
    assert after.firings(1).values.tolist() == store.firings(1).values.tolist()
    assert after.content_hash() == after.manifest.content_hash


@pytest.mark.parametrize("what", ["settle", "compact"])
def test_a_store_opened_before_its_shards_were_merged_goes_on(
    corpus: Corpus, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, excluded = drawn(corpus, 1)
    folder = tmp_path / "store"
    stored(folder, corpus, dense, excluded, list(range(1, 24)))
    if what == "compact":
        finished(folder, corpus)
        monkeypatch.setattr(compaction, "RANGE_FIRINGS", 100)
    shutil.copytree(folder, tmp_path / "before")
    reads: dict[str, Callable[[Store], Any]] = {
        "firings": lambda s: [s.firings(i).values.tolist() for i in range(WIDTH)],
        "block": lambda s: [f.rows.tolist() for f in s.block(0, WIDTH)],
        "counts": lambda s: s.counts.tolist(),
        "excluded": lambda s: s.excluded.tolist(),
        "rows": lambda s: s.rows([5, 1]).mask.tolist(),
        "scan": lambda s: s.scan(2)[1],
        "stats": lambda s: [x.count for x in s.stats()],
    }
    stores = {name: Store.open(folder, corpus) for name in reads}
    if what == "compact":
        compact(folder)
    else:
        settle(folder, load_manifest(folder), last=True)
    assert not (folder / "shard-0-1.bin").exists()
    old = Store.open(tmp_path / "before", corpus)
    for name, read in reads.items():
        assert read(stores[name]) == read(old), name


def test_many_threads_read_on_while_shards_are_merged(corpus: Corpus, tmp_path: Path) -> None:
    dense, excluded = drawn(corpus, 2)
    stored(tmp_path, corpus, dense, excluded, list(range(1, 24)))
    store = Store.open(tmp_path, corpus)
    merged = threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while True:
                last = merged.is_set()
                for latent, firings in enumerate(store.block(0, WIDTH)):
                    assert len(firings) == (dense[:, latent] > 0).sum()
                if last:
                    return
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    settle(tmp_path, load_manifest(tmp_path), last=True)
    merged.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_store_that_changed_while_it_was_read_says_so(corpus: Corpus, tmp_path: Path) -> None:
    dense, excluded = drawn(corpus, 2)
    manifest = stored(tmp_path, corpus, dense, excluded, [5, 9], rows=20)
    first = tmp_path / manifest.shards[0].file

    def gone() -> None:
        store = Store.open(tmp_path, corpus)
        first.unlink()
        store.firings(0)

    with pytest.raises(CorruptError, match=r"shard-0-5\.bin is missing; collect again"):
        gone()
    store = Store(tmp_path, manifest, corpus)
    grown = stored(tmp_path / "new", corpus, dense, excluded, [20])
    save_manifest(tmp_path, grown)
    with pytest.raises(BusyError, match="was changed while it was read; open it again"):
        store.firings(0)
    save_manifest(tmp_path, dataclasses.replace(manifest, coder_hash="other"))
    with pytest.raises(BusyError, match="open it again"):
        store.firings(0)
    finished_one = dataclasses.replace(manifest, complete=True, content_hash="a")
    save_manifest(tmp_path, dataclasses.replace(finished_one, content_hash="b"))
    with pytest.raises(BusyError, match="open it again"):
        Store(tmp_path, finished_one, corpus).firings(0)
