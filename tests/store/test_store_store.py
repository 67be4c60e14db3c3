from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import CorpusConfig
from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import hash_file
from exegete.store import store as module
from exegete.store.checks import write_manifest
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import ShardEntry, StoreManifest, load_manifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import joined, latent_stats, load_counts, load_summary, save_summary, summarise, tally
from exegete.store.store import Store
from exegete.store.values import ENCODING, decode_values, encode_values
from exegete.tokens import TokenTable
from exegete.types import Array, LatentId

WIDTH, LENGTH = 6, 8


class LetterTokenizer:
    """One token per character."""

    is_fast = False
    bos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    table = TokenTable([bytes([i]) for i in range(128)], special=[0])
    texts = ["abcabcabcabcabcab", "xyz" * 6, "q"]
    documents = [TextDocument(key=t, text=t) for t in texts]
    folder = tmp_path_factory.mktemp("run") / "corpus"
    return build_corpus(folder, documents, LetterTokenizer(), CorpusConfig(row_length=LENGTH), table=table)


def some(corpus: Corpus, seed: int = 0) -> Array:
    """Return dense values [rows, LENGTH, WIDTH] that the encoding holds exactly; latent 2 is silent."""
    rng = np.random.default_rng(seed)
    values = np.exp2(rng.normal(0, 3, (len(corpus), LENGTH, WIDTH))).astype(np.float32)
    values = decode_values(encode_values(values.reshape(-1))).reshape(values.shape)
    keep = corpus.rows(slice(None)).mask[:, :, None] & (rng.random(values.shape) < 0.4)
    keep[:, :, 2] = False
    result: Array = np.where(keep, values, np.float32(0))
    return result


def save(folder: Path, corpus: Corpus, dense: Array, cuts: tuple[int, ...], *, complete: bool = True) -> Store:
    mask = corpus.rows(slice(None)).mask
    entries = []
    for start, stop in zip((0, *cuts), (*cuts, len(dense)), strict=True):
        builder = ShardBuilder(row_start=start, row_length=LENGTH, width=WIDTH)
        part = dense[start:stop].reshape(-1, WIDTH)
        at, latents = np.nonzero(part)
        builder.add((part > 0).sum(axis=1), latents, encode_values(part[at, latents]))
        sha = builder.write(folder / f"{start}.bin")
        entries.append(
            ShardEntry(
                file=f"{start}.bin",
                row_start=start,
                row_stop=stop,
                latent_start=0,
                latent_stop=WIDTH,
                n_positions=int(mask[start:stop].sum()),
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
        mask_policy=corpus.manifest.mask_policy,
        batch_plan={"rows": 1, "row_length": LENGTH},
        device="cpu",
        dtype="float32",
        compiled=False,
        threads=1,
        values=ENCODING,
        versions={},
        quality={"fvu": 0.5},
        shards=tuple(entries),
    )
    if complete:
        summary, content = Store(folder, manifest, corpus).scan()
        save_summary(folder, summary)
        manifest = dataclasses.replace(manifest, complete=True, content_hash=content)
    save_manifest(folder, manifest)
    return Store.open(folder)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 5)])
def test_every_latent_equals_the_dense_oracle(
    corpus: Corpus, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUN", 20)
    dense = some(corpus)
    store = save(corpus.folder.parent / f"cut{len(cuts)}", corpus, dense, cuts)
    assert store.corpus.hash == corpus.hash
    block = store.block(0, WIDTH)
    for latent in range(WIDTH):
        rows, positions = np.nonzero(dense[:, :, latent])
        for firings in (store.firings(latent), block[latent], store.block(latent, WIDTH)[0]):
            assert firings.latent == LatentId(coder="res", index=latent)
            assert firings.rows.tolist() == rows.tolist()
            assert firings.positions.tolist() == positions.tolist()
            assert firings.values.tolist() == dense[rows, positions, latent].tolist()
            assert firings.rows.dtype == np.int64
            assert firings.positions.dtype == np.int32
            assert firings.values.dtype == np.float32
    assert store.counts.tolist() == (dense > 0).sum(axis=(0, 1)).tolist()
    assert store.counts.dtype == np.int64
    flat = dense.reshape(-1, WIDTH).astype(np.float64)
    assert np.allclose(store.summary.totals, flat.sum(axis=0), rtol=1e-12)
    assert np.allclose(store.summary.sum_squares, (flat**2).sum(axis=0), rtol=1e-12)
    assert store.summary.maxima.tolist() == flat.max(axis=0).tolist()
    assert store.block(3, 3) == []


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 5)), block=st.integers(1, 60), seed=st.integers(0, 50))
def test_cuts_and_blocks_do_not_change_the_content_hash(
    corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, cuts: set[int], block: int, seed: int
) -> None:
    dense = some(corpus, seed)
    folder = tmp_path_factory.mktemp("any")
    whole = save(folder / "whole", corpus, dense, ())
    cut = save(folder / "cut", corpus, dense, tuple(sorted(cuts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_RUN", block)
        cut, whole = (Store.open(store.folder, corpus) for store in (cut, whole))
        assert cut.content_hash() == whole.manifest.content_hash == cut.manifest.content_hash
        summary = cut.scan()[0]
    for field in dataclasses.fields(summary):
        assert np.array_equal(getattr(summary, field.name), getattr(whole.summary, field.name)), field.name


def test_every_change_of_a_firing_changes_the_content_hash(corpus: Corpus, tmp_path: Path) -> None:
    dense = some(corpus)
    row, position = np.argwhere(dense[:, :, 1])[0]
    value = dense[row, position, 1]
    moved, louder, other = dense.copy(), dense.copy(), dense.copy()
    moved[row, position, 1], moved[row, 0, 1] = 0, value
    louder[row, position, 1] = value * np.float32(1.01)
    other[row, position, 1], other[row, position, 2] = 0, value
    kinds = enumerate((dense, moved, louder, other))
    assert len({save(tmp_path / str(i), corpus, d, ()).manifest.content_hash for i, d in kinds}) == 4


def test_stats_equal_the_obvious_ones(corpus: Corpus, tmp_path: Path) -> None:
    dense = some(corpus)
    store = Store(tmp_path, save(tmp_path, corpus, dense, (2,)).manifest, corpus)
    mask = corpus.rows(slice(None)).mask
    n_counted = int(mask.sum())
    firsts, lasts = (np.argmax(m, axis=1) for m in (mask, mask[:, ::-1]))
    for stats in store.stats():
        own = dense[:, :, stats.latent.index]
        fired = own[own > 0].astype(np.float64)
        letters = [int(t) for t in corpus.tokens[own > 0]]
        counts = {t: letters.count(t) for t in letters}
        assert stats.count == len(fired)
        assert stats.rate == len(fired) / n_counted
        assert stats.maximum == (fired.max() if len(fired) else 0)
        assert stats.mean == pytest.approx(fired.mean() if len(fired) else 0)
        assert stats.sum_squares == pytest.approx((fired**2).sum())
        assert list(stats.top_tokens) == sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        shares = [c / len(letters) for c in counts.values()]
        assert stats.token_entropy == pytest.approx(-sum(s * math.log2(s) for s in shares))
        ends = [sum(own[row, column] > 0 for row, column in enumerate(c)) for c in (firsts, LENGTH - 1 - lasts)]
        assert [stats.first_share, stats.last_share] == [end / max(len(fired), 1) for end in ends]
        assert len(stats.edges) == len(stats.histogram) + 1
        assert stats.histogram.tolist() == np.histogram(fired, stats.edges)[0].tolist() if len(fired) else True
        assert stats.histogram.sum() == len(fired)
        assert len(fired) == 0 or stats.histogram[0] > 0 < stats.histogram[-1]
    assert [s.latent.index for s in store.stats([4, 1])] == [4, 1]
    assert store.stats([2])[0].histogram.tolist() == []


def test_stats_by_hand() -> None:
    codes = encode_values(np.array([1.0, 1.5, 4.0, 0.5, 0.25], np.float32))
    summary = summarise(np.array([0, 4, 4, 5]), codes, np.array([7, 9, 7, 9, 3]), np.array([1, 0, 2, 3, 0], np.uint8))
    stats = latent_stats(summary, 0, LatentId(coder="c", index=0), n_positions=40, n_top=1)
    assert (stats.count, stats.rate, stats.maximum, stats.mean, stats.sum_squares) == (4, 0.1, 4.0, 1.75, 19.5)
    assert stats.edges.tolist() == [0.5, 1, 2, 4, 8]
    assert stats.histogram.tolist() == [1, 2, 0, 1]
    assert stats.top_tokens == ((7, 2),)
    assert stats.token_entropy == 1.0
    assert (stats.first_share, stats.last_share) == (0.5, 0.5)
    assert summary.distinct.tolist() == [2, 0, 1]
    silent = latent_stats(summary, 1, LatentId(coder="c", index=1), n_positions=40)
    assert (silent.count, silent.top_tokens, silent.histogram.tolist(), silent.first_share) == (0, (), [], 0.0)


def test_only_so_many_top_tokens_are_kept() -> None:
    tokens = np.repeat(np.arange(20), np.arange(20, 0, -1))
    codes = np.full(len(tokens), 5, np.uint16)
    summary = summarise(np.array([0, len(tokens)]), codes, tokens, np.zeros(len(tokens), np.uint8))
    assert summary.top_tokens.tolist() == [list(range(10))]
    assert summary.top_counts.tolist() == [list(range(20, 10, -1))]
    assert summary.distinct.tolist() == [20]


def test_an_unfinished_store_holds_its_rows_so_far(corpus: Corpus, tmp_path: Path) -> None:
    dense = some(corpus)[:4]
    store = Store(tmp_path, save(tmp_path, corpus, dense, (2,), complete=False).manifest, corpus)
    assert not (tmp_path / "summary.npz").exists()
    assert store.counts.tolist() == store.summary.counts.tolist() == (dense > 0).sum(axis=(0, 1)).tolist()
    assert store.stats([0])[0].rate == store.counts[0] / corpus.rows(slice(0, 4)).mask.sum()
    assert store.manifest.row_stop == 4
    empty = Store(tmp_path, dataclasses.replace(store.manifest, shards=()), corpus)
    assert not empty.counts.any()
    assert len(empty.firings(0)) == 0
    assert empty.stats([0])[0].rate == 0.0


def test_what_is_not_there_is_named(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no store"):
        Store.open(tmp_path)
    store = save(tmp_path, corpus, some(corpus), ())
    for index in (-1, WIDTH):
        with pytest.raises(InputError, match="latents of res lie in 0 … 5"):
            store.firings(index)
        with pytest.raises(InputError, match="latents of res lie in 0 … 5"):
            Store.open(tmp_path, corpus).stats([index])
    with pytest.raises(NotFoundError, match="give it to Store"):
        _ = store.corpus


def test_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    manifest = save(tmp_path, corpus, some(corpus), ()).manifest
    with pytest.raises(MismatchError, match="give the corpus of its run"):
        Store(tmp_path, dataclasses.replace(manifest, corpus_hash="other"), corpus)


@pytest.mark.parametrize(("name", "at"), [("0.bin", -70), ("manifest.json", 20), ("summary.npz", 80)])
def test_a_flipped_byte_is_found_and_its_file_named(corpus: Corpus, tmp_path: Path, name: str, at: int) -> None:
    save(tmp_path, corpus, some(corpus), (3,))
    data = bytearray((tmp_path / name).read_bytes())
    data[at] ^= 4
    (tmp_path / name).write_bytes(data)

    def read() -> None:
        store = Store.open(tmp_path)
        _ = store.firings(0), store.summary

    with pytest.raises(CorruptError, match=name):
        read()


def test_a_summary_of_other_firings_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = save(tmp_path / "b", corpus, some(corpus, 1), ())
    save(tmp_path / "a", corpus, some(corpus), ())
    save_summary(tmp_path / "a", other.summary)
    with pytest.raises(CorruptError, match="not that of this store"):
        _ = Store.open(tmp_path / "a").summary
    (tmp_path / "a" / "summary.npz").unlink()
    with pytest.raises(NotFoundError, match=r"summary\.npz"):
        _ = Store.open(tmp_path / "a").counts


def test_manifests_round_trip_and_hostile_ones_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    manifest = save(tmp_path, corpus, some(corpus), (2, 3)).manifest
    assert StoreManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest == load_manifest(tmp_path)
    assert (manifest.row_stop, manifest.n_positions) == (len(corpus), corpus.n_counted)
    data = manifest.to_json()
    with pytest.raises(CorruptError, match="does not parse"):
        StoreManifest.from_json({**data, "more": 1})
    with pytest.raises(CorruptError, match="do not fit together"):
        StoreManifest.from_json({**data, "shards": [data["shards"][0], data["shards"][2]]})
    with pytest.raises(InputError, match="cannot be used"):
        StoreManifest.from_json({**data, "shards": [{**data["shards"][0], "file": "../../etc/passwd"}]})


WRONG: list[Any] = [-1, 1 << 63, 10**40, 1.5, None, "3", [], {}, True]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(StoreManifest)])
def test_manifests_with_other_types_are_damaged(corpus: Corpus, tmp_path: Path, name: str) -> None:
    data = save(tmp_path, corpus, some(corpus), (2,)).manifest.to_json()
    right: dict[str, list[Any]] = {"shards": [[]], "warnings": [[]], "k": [None], "skip_transposed": [None, True]}
    right |= {"norm_limit": [None, -1, 1 << 63, 10**40, 1.5], "compiled": [True], "complete": [True]}
    right |= {"quality": [{}], "versions": [{}], "mask_policy": [{}]}
    if isinstance(data[name], str) and name != "side":
        right[name] = ["3"]
    for value in WRONG:
        if any(value == fine and type(value) is type(fine) for fine in right.get(name, [])):
            continue
        with pytest.raises(CorruptError, match=r"manifest does not parse|cannot be so|do not fit together"):
            StoreManifest.from_json({**data, name: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ShardEntry)])
def test_manifests_with_other_entries_are_damaged(corpus: Corpus, tmp_path: Path, name: str) -> None:
    data = save(tmp_path, corpus, some(corpus), (2,)).manifest.to_json()
    first = data["shards"][0]
    for value in WRONG:
        if name in ("sha256", "file") and isinstance(value, str):
            continue
        with pytest.raises((CorruptError, InputError)):
            StoreManifest.from_json({**data, "shards": [{**first, name: value}, data["shards"][1]]})
    hostile: list[Any] = [5, [5], [[]], None, "ab", {"a": 1}, [{}]]
    for shards in hostile:
        with pytest.raises(CorruptError):
            StoreManifest.from_json({**data, "shards": shards})


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 100_000, '{"checksum": NaN}', '{"a": NaN}', '{"a": Infinity}', "5", "", "9" * 9000],
)
def test_hostile_manifests_are_damaged(corpus: Corpus, tmp_path: Path, text: str) -> None:
    save(tmp_path, corpus, some(corpus), (2,))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("number", [None, "3", [1], 1.0, True])
def test_a_format_that_is_no_number_is_damage(corpus: Corpus, tmp_path: Path, number: Any) -> None:
    data = save(tmp_path, corpus, some(corpus), (2,)).manifest.to_json()
    write_manifest(tmp_path / "manifest.json", {**data, "shards": [], "format": number})
    with pytest.raises(CorruptError, match=r"manifest\.json does not parse"):
        load_manifest(tmp_path)


def test_every_flipped_byte_of_a_summary_is_found(corpus: Corpus, tmp_path: Path) -> None:
    store = save(tmp_path, corpus, some(corpus), ())
    path = tmp_path / "summary.npz"
    sha256 = hash_file(path)
    whole = path.read_bytes()
    counts = store.counts.tolist()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"summary\.npz"):
            load_summary(tmp_path, sha256, WIDTH)
        for load in (load_summary, load_counts) if at % 9 == 0 else ():
            with contextlib.suppress(CorruptError):  # without a checksum, names and dates in the archive may differ
                load(tmp_path, "", WIDTH)
    path.write_bytes(whole)
    assert load_counts(tmp_path, sha256, WIDTH).tolist() == counts
    with pytest.raises(CorruptError, match="too large"):
        load_counts(tmp_path, "", -64)
    with pytest.raises(CorruptError, match="not that of this store"):
        load_summary(tmp_path, "", WIDTH + 1)


def test_the_checksum_of_the_summary_stands_in_the_manifest(corpus: Corpus, tmp_path: Path) -> None:
    other = save(tmp_path / "b", corpus, some(corpus, 1), ())
    store = save(tmp_path / "a", corpus, some(corpus), ())
    sha256 = save_summary(tmp_path / "a", store.summary)
    assert sha256 == hash_file(tmp_path / "a" / "summary.npz") == save_summary(tmp_path / "a", store.summary)
    manifest = dataclasses.replace(store.manifest, summary_sha256=sha256)
    save_manifest(tmp_path / "a", manifest)
    assert Store.open(tmp_path / "a").summary.counts.tolist() == store.counts.tolist()
    save_summary(tmp_path / "a", dataclasses.replace(store.summary, totals=other.summary.totals))
    for read in (lambda: Store.open(tmp_path / "a").summary, lambda: Store.open(tmp_path / "a").counts):
        with pytest.raises(CorruptError, match=r"summary\.npz is damaged: its checksum"):
            read()


def test_counts_read_nothing_but_the_counts(corpus: Corpus, tmp_path: Path) -> None:
    store = save(tmp_path, corpus, some(corpus), ())
    counts = store.counts.tolist()
    with np.load(tmp_path / "summary.npz") as data:
        np.savez(tmp_path / "summary.npz", counts=data["counts"])
    assert Store.open(tmp_path).counts.tolist() == counts
    with pytest.raises(CorruptError, match="damaged"):
        _ = Store.open(tmp_path).summary


@pytest.mark.parametrize(
    "other",
    [
        {"first": np.array(["x"] * WIDTH)},
        {"last": np.full(WIDTH, np.nan)},
        {"maxima": np.zeros(WIDTH, bool)},
        {"totals": np.zeros((WIDTH, 1))},
        {"histogram": np.zeros(WIDTH, int)},
        {"top_counts": np.zeros((WIDTH, 3), int)},
        {"lowest": np.array([1, 2])},
        {"lowest": np.array(5000)},
        {"lowest": np.array(0.5)},
    ],
)
def test_summaries_of_other_shapes_or_types_are_refused(
    corpus: Corpus, tmp_path: Path, other: dict[str, Array]
) -> None:
    save(tmp_path, corpus, some(corpus), ())
    with np.load(tmp_path / "summary.npz") as data:
        np.savez(tmp_path / "summary.npz", **{**data, **other})
    with pytest.raises(CorruptError, match="not that of this store"):
        load_summary(tmp_path, "", WIDTH)


def test_tallies_add_up_however_large_the_tokens() -> None:
    codes = encode_values(np.array([1.0, 1.5, 4.0, 0.5, 0.25], np.float32))
    tokens, ends = np.array([7, (1 << 32) - 1, 7, 9, 3]), np.array([1, 0, 2, 3, 0], np.uint8)
    both = tally(codes[:2], tokens[:2], ends[:2]).plus(tally(codes[2:], tokens[2:], ends[2:])).summary()
    whole = summarise(np.array([0, 5]), codes, tokens, ends)
    for field in dataclasses.fields(whole):
        assert np.array_equal(getattr(both, field.name), getattr(whole, field.name)), field.name
    assert whole.top_tokens.tolist()[0][:5] == [7, 3, 9, (1 << 32) - 1, -1]


def test_wide_parts_of_a_summary_are_kept_in_narrow_types(corpus: Corpus, tmp_path: Path) -> None:
    store = save(tmp_path, corpus, some(corpus), ())
    for summary in (store.summary, Store.open(tmp_path, corpus).scan()[0]):
        assert {getattr(summary, name).dtype for name in ("histogram", "top_tokens", "top_counts")} == {np.dtype("i1")}
        assert {getattr(summary, name).dtype for name in ("counts", "distinct", "first")} == {np.dtype("i8")}
    large = np.array([[5_000_000_000, 1]])
    parts = [dataclasses.replace(store.summary, histogram=np.tile(large, (WIDTH, 1)), lowest=3), store.summary]
    assert joined(parts).histogram.max() == 5_000_000_000
    save_summary(tmp_path, parts[0])
    assert load_summary(tmp_path, "", WIDTH).histogram.tolist() == [[5_000_000_000, 1]] * WIDTH


def test_rows_by_negative_numbers_and_by_what_is_no_number(corpus: Corpus, tmp_path: Path) -> None:
    store = Store(tmp_path, save(tmp_path, corpus, some(corpus), ()).manifest, corpus)
    column = int(np.flatnonzero(corpus.rows([-1]).mask[0])[0])
    store.excluded = np.array([(len(corpus) - 1) * LENGTH + column])
    for rows in (store.rows([-1]), store.rows(np.array([-1], np.int8)), store.rows(slice(-1, None))):
        assert not rows.mask[0, column]
        assert rows.mask.sum() == corpus.rows([-1]).mask.sum() - 1
        assert rows.tokens.tolist() == corpus.rows([len(corpus) - 1]).tokens.tolist()
    assert store.rows([0, -len(corpus)]).mask.tolist() == corpus.rows([0, 0]).mask.tolist()
    assert len(store.rows([])) == 0
    wrong: list[Any] = [np.ones(len(corpus), bool), [True, False], [0.5], ["a"], np.zeros((1, 1), int)]
    for index in wrong:
        with pytest.raises(InputError, match="whole numbers"):
            store.rows(index)
    for number in (len(corpus), -len(corpus) - 1):
        with pytest.raises(InputError, match="rows lie in"):
            store.rows([number])


def test_a_store_of_more_rows_than_its_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    manifest = save(tmp_path, corpus, some(corpus), ()).manifest
    shards = (dataclasses.replace(manifest.shards[0], row_stop=len(corpus) + 1),)
    with pytest.raises(MismatchError, match="not those of its corpus"):
        Store(tmp_path, dataclasses.replace(manifest, shards=shards), corpus)


def test_reading_needs_neither_torch_nor_transformers_nor_scipy(corpus: Corpus) -> None:
    save(corpus.folder.parent / "plain", corpus, some(corpus), ())
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, scipy=None, tokenizers=None)\n"
        "from exegete.store import Store\n"
        f"store = Store.open({str(corpus.folder.parent / 'plain')!r})\n"
        "assert store.stats([0])[0].count == len(store.firings(0)) > 0\n"
        "import exegete.collecting\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
