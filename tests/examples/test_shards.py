"""Stores on disk: how the firings are cut into shards makes no difference, nor does who reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exegete.config import CorpusConfig, ExampleConfig
from exegete.examples import StoreData, select_many, split_segments
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import ShardEntry, StoreManifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.store import Store
from exegete.store.values import ENCODING, encode_values
from exegete.tokens import TokenTable
from exegete.types import ExampleSet

WIDTH, LENGTH = 9, 32
CONFIG = ExampleConfig(
    window=8, n_train=15, n_test=15, n_negatives=15, min_train=2, min_test=2, strategy="mix", keep_bos=True
)


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
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, int(rng.integers(20, 130))))) for _ in range(80)]
    texts += [text[:-1] + "é" for text in texts[::4]]  # near-duplicates
    table = TokenTable([bytes([i]) for i in range(256)], special=[0])
    return build_corpus(
        tmp_path_factory.mktemp("run") / "corpus",
        [TextDocument(key=str(i), text=t) for i, t in enumerate(texts)],
        LetterTokenizer(),
        CorpusConfig(row_length=LENGTH, packing=True),
        table=table,
    )


def save(folder: Path, corpus: Corpus, cuts: list[int]) -> Store:
    """Return a store with the same firings whatever the cuts."""
    rng = np.random.default_rng(1)
    mask = corpus.rows(slice(None)).mask
    rates = np.array([0.01, 0.02, 0.05, 0.1, 0.3, 0, 0.02, 0.05, 0.1])
    fires = mask[:, :, None] & (rng.random((*mask.shape, WIDTH)) < rates)
    values = rng.gamma(2, 1, fires.shape).astype(np.float32) + 0.01
    entries = []
    for start, stop in zip((0, *cuts), (*cuts, len(mask)), strict=True):
        builder = ShardBuilder(row_start=start, row_length=LENGTH, width=WIDTH)
        part = fires[start:stop].reshape(-1, WIDTH)
        at, latents = np.nonzero(part)
        builder.add(part.sum(axis=1), latents, encode_values(values[start:stop].reshape(-1, WIDTH)[at, latents]))
        sha = builder.write(folder / f"{start}.bin")
        entries.append(
            ShardEntry(
                file=f"{start}.bin", row_start=start, row_stop=stop, latent_start=0, latent_stop=WIDTH,
                n_positions=int(mask[start:stop].sum()), n_firings=builder.n_firings, tier=0, sha256=sha,
            )
        )  # fmt: skip
    manifest = StoreManifest(
        name="res", subject="toy", subject_hash="s", tokenizer_hash="t", coder_hash="c", coder_dtype="float32",
        coder="topk", corpus_hash=corpus.hash, corpus="../corpus", hookpoint="layers.0", side="output", width=WIDTH,
        k=None, mask_policy=corpus.manifest.mask_policy, batch_plan={"rows": 1, "row_length": LENGTH}, device="cpu",
        dtype="float32", compiled=False, threads=1, values=ENCODING, versions={}, quality={}, shards=tuple(entries),
    )  # fmt: skip
    save_manifest(folder, manifest)
    return Store.open(folder)


def test_shards_make_no_difference(corpus: Corpus) -> None:
    found = []
    for number, cuts in enumerate([[], [40], [3, 4, 50, 90]]):
        folder = corpus.folder.parent / f"store{number}"
        folder.mkdir()
        store = save(folder, corpus, cuts)
        data = StoreData(store, split_segments(corpus, seed=5, test_share=0.4))
        found.append(select_many(data, range(WIDTH), CONFIG, 5))
    assert sum(isinstance(f, ExampleSet) for f in found[0]) > 5
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            if not isinstance(one, ExampleSet):
                assert one == two
                continue
            assert isinstance(two, ExampleSet)
            assert (one.maximum, one.firing_rate, one.frame, one.strata) == (
                two.maximum, two.firing_rate, two.frame, two.strata
            )  # fmt: skip
            for column in dataclasses.fields(one.windows):
                assert np.array_equal(getattr(one.windows, column.name), getattr(two.windows, column.name))


def test_what_is_said_of_a_window_is_in_the_corpus_and_the_store(corpus: Corpus) -> None:
    folder = corpus.folder.parent / "true"
    folder.mkdir()
    store = save(folder, corpus, [20])
    codes = split_segments(corpus, seed=5, test_share=0.4)
    rows = corpus.rows(slice(None))
    for found in select_many(StoreData(store, codes), range(WIDTH), CONFIG, 5):
        if not isinstance(found, ExampleSet):
            continue
        firings = store.firings(found.latent.index)
        dense = np.zeros(rows.tokens.shape, np.float32)
        dense[firings.rows, firings.positions] = firings.values
        sides: dict[int, str] = {}
        for example in found.windows:
            span = slice(example.start, example.stop)
            assert (example.tokens == rows.tokens[example.row, span]).all()
            assert (example.activations == dense[example.row, span]).all()
            assert set(rows.documents[example.row, span].tolist()) == {example.document}
            assert sides.setdefault(example.document, example.split) == example.split
            assert (example.tokens == 0).sum() == (example.start == 0)  # BOS stands before each row
