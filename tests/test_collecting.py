from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders.coder import SparseCoder
from exegete.collecting import collect_firings, job, plan
from exegete.config import CollectConfig, CorpusConfig
from exegete.errors import BusyError, CorruptError, InputError, MismatchError
from exegete.files import RunLock, fault_hook
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import load_manifest, save_manifest
from exegete.store.store import Store
from exegete.store.values import decode_values, encode_values
from exegete.tokens import TokenTable
from exegete.types import Array, Side, SparseCode

D, WIDTH, K, LENGTH = 6, 20, 3, 8
TABLE = TokenTable([bytes([i]) for i in range(128)], special=[0])


class LetterTokenizer:
    """One token per character, BOS 0."""

    is_fast = False
    bos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


class ToySubject:
    """Activations that depend on a token and the one before it; poison wherever firings must not count."""

    name = "toy"
    hash = "subject0"
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, corpus: Corpus | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(128, D, generator=generator)
        self.passes: list[tuple[int, tuple[str, ...]]] = []
        self.bad_row = -1
        self.corpus = corpus

    def token_table(self) -> TokenTable:
        return TABLE

    def d(self, hookpoint: str, side: Side) -> int:
        return D

    def to(self, device: str | torch.device) -> ToySubject:
        return self

    def capture(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        points: Sequence[tuple[str, Side]],
        documents: torch.Tensor | None = None,
    ) -> dict[tuple[str, Side], torch.Tensor]:
        assert torch.is_inference_mode_enabled()
        assert attention_mask is not None
        assert tokens.dtype == torch.long
        assert attention_mask.shape == tokens.shape
        self.passes.append((len(tokens), tuple(name for name, _ in points)))
        values = self.embedding[tokens] + 0.5 * self.embedding[tokens.roll(1, dims=1)]
        values[attention_mask == 0] = float("nan")
        values[:, 0] = 1e9
        if self.bad_row >= 0 and self.corpus is not None:
            wanted = torch.from_numpy(self.corpus.rows([self.bad_row]).tokens.astype(np.int64))[0]
            values[(tokens == wanted).all(dim=1), 2] = float("inf")
        return {point: values * (1 + len(point[0])) for point in points}


class ToyCoder(SparseCoder):
    """TopK, or every positive latent as a ragged code when ``k`` is None."""

    def __init__(self, hookpoint: str = "a", *, k: int | None = K, seed: int = 1, side: Side = "output") -> None:
        self.name, self.hookpoint, self.side, self.k = hookpoint, hookpoint, side, k
        self.target, self.base_model = (hookpoint, "output"), None
        self.d_in = self.d_out = D
        self.width = WIDTH
        self.weight = torch.randn(WIDTH, D, generator=torch.Generator().manual_seed(seed))
        self.content = f"coder{seed}"

    @property
    def hash(self) -> str:
        return self.content

    @property
    def architecture(self) -> str:
        return "toy"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def placed(self, **_: Any) -> ToyCoder:
        return self

    def encode(self, x: torch.Tensor) -> SparseCode:
        assert bool(x.isfinite().all())
        assert float(x.abs().max()) < 1e6
        dense = x @ self.weight.T
        if self.k is not None:
            values, indices = dense.topk(self.k)
            return SparseCode(indices=indices, values=values, width=WIDTH)
        at, indices = dense.gt(-0.5).nonzero(as_tuple=True)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at, minlength=len(x)).cumsum(0)])
        return SparseCode(indices=indices, values=dense[at, indices], width=WIDTH, offsets=offsets)

    def decode(self, code: SparseCode, x: torch.Tensor | None = None) -> torch.Tensor:
        assert x is not None
        return x * 3

    def decoder_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.weight[indices]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> ToyCoder:
        assert str(device) == "cpu"
        return self


CODERS = {"a": ToyCoder("a"), "bb@x": ToyCoder("bb", k=None, seed=2), "a2": ToyCoder("a", seed=3)}
CONFIG = CollectConfig(batch_tokens=2 * LENGTH + 3, shard_rows=4, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)
    letters = [bytes(rng.integers(97, 105, n).tolist()).decode() for n in (28, 3, 17, 9, 7)]
    documents = [TextDocument(key=str(i), text=text) for i, text in enumerate(letters)]
    folder = tmp_path_factory.mktemp("run") / "corpus"
    made = build_corpus(folder, documents, LetterTokenizer(), CorpusConfig(row_length=LENGTH), table=TABLE)
    assert len(made) == 11
    return made


def dense_oracle(corpus: Corpus, coder: ToyCoder) -> Array:
    """Return stored values [rows, LENGTH, WIDTH], one position at a time."""
    subject, rows = ToySubject(), corpus.rows(slice(None))
    found = np.zeros((len(corpus), LENGTH, WIDTH), np.float32)
    for row, position in np.argwhere(rows.mask):
        now, before = (subject.embedding[int(rows.tokens[row, position - back])] for back in (0, 1))
        values = coder.weight @ ((now + 0.5 * before) * (1 + len(coder.hookpoint)))
        chosen = range(WIDTH) if coder.k is None else values.argsort(descending=True)[: coder.k].tolist()
        for latent in chosen:
            if values[latent] > 0:
                found[row, position, latent] = values[latent]
    return found


def hashes(stores: dict[str, Store]) -> dict[str, str]:
    assert all(store.manifest.complete for store in stores.values())
    found = {name: store.content_hash() for name, store in stores.items()}
    assert found == {name: store.manifest.content_hash for name, store in stores.items()}
    return found


@pytest.fixture(scope="module")
def expected(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hashes(collect_firings(ToySubject(), CODERS, corpus, tmp_path_factory.mktemp("expected"), CONFIG))


def test_stores_equal_the_dense_oracle(corpus: Corpus) -> None:
    subject, told = ToySubject(), []
    folder = corpus.folder.parent / "store"
    stores = collect_firings(
        subject, CODERS, corpus, folder, CONFIG, progress=lambda done, total: told.append((done, total))
    )
    assert list(stores) == list(CODERS)
    for name, coder in CODERS.items():
        dense = dense_oracle(corpus, coder)
        store = Store.open(folder / name)
        assert store.corpus.hash == corpus.hash
        assert store.width == WIDTH
        for latent in range(WIDTH):
            firings = store.firings(latent)
            rows, positions = np.nonzero(dense[:, :, latent])
            assert firings.rows.tolist() == rows.tolist()
            assert firings.positions.tolist() == positions.tolist()
            assert np.allclose(firings.values, dense[rows, positions, latent], rtol=2.0**-11 + 1e-5)
        assert store.counts.tolist() == (dense > 0).sum(axis=(0, 1)).tolist()
        assert store.manifest.n_positions == corpus.n_counted
        assert [(s.row_start, s.row_stop) for s in store.manifest.shards] == [(0, 4), (4, 8), (8, 11)]
    assert told == [(n, 11) for n in (2, 4, 6, 8, 10, 11)]
    assert subject.passes[1:] == [(2, ("a", "bb"))] * 5 + [(1, ("a", "bb"))]


def test_values_are_the_nearest_stored_ones(corpus: Corpus, tmp_path: Path) -> None:
    coder = ToyCoder("a", k=None)
    store = collect_firings(ToySubject(), {"a": coder}, corpus, tmp_path, CONFIG)["a"]
    rows = corpus.rows(slice(None))
    with torch.inference_mode():
        tokens = torch.from_numpy(rows.tokens.astype(np.int64))
        x = ToySubject().capture(tokens, torch.ones_like(tokens), [("a", "output")])["a", "output"]
        values = (x @ coder.weight.T).numpy()
    for firings in store.block(0, WIDTH):
        exact = values[firings.rows, firings.positions, firings.latent.index]
        assert np.allclose(firings.values, decode_values(encode_values(exact)), rtol=2.0**-10)


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 6, 100, None])
def test_shard_size_does_not_change_the_content(
    corpus: Corpus, tmp_path: Path, expected: dict[str, str], shard_rows: int | None
) -> None:
    config = dataclasses.replace(CONFIG, shard_rows=shard_rows)
    stores = collect_firings(ToySubject(), CODERS, corpus, tmp_path, config)
    assert hashes(stores) == expected
    stops = [shard.row_stop for shard in stores["a"].manifest.shards]
    rows = {1: 2, 2: 2, 3: 4, 6: 6}.get(shard_rows or 0, 12)
    assert stops == [*range(rows, 11, rows), 11]


def test_shards_end_when_they_are_full(
    corpus: Corpus, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, shard_rows=None, shard_bytes=60 * 16)
    stores = collect_firings(ToySubject(), CODERS, corpus, tmp_path / "a", config)
    assert hashes(stores) == expected
    for store in stores.values():
        assert len(store.manifest.shards) > 1
        assert all(shard.n_firings >= 60 for shard in store.manifest.shards[:-1])
    monkeypatch.setattr(job, "MOST_FIRINGS", 1)
    stores = collect_firings(ToySubject(), CODERS, corpus, tmp_path / "b", dataclasses.replace(CONFIG, shard_rows=100))
    assert hashes(stores) == expected
    assert len(stores["a"].manifest.shards) == 6


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way out."""


def test_stopped_at_every_fault_point_and_begun_again(
    corpus: Corpus, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # slow, and nothing here cuts the power
    coders = {"a": CODERS["a"], "bb@x": CODERS["bb@x"]}
    points: list[str] = []
    with fault_hook(points.append):
        whole = collect_firings(ToySubject(), coders, corpus, tmp_path / "whole", CONFIG)
    assert {"before shard is listed", "before store is complete", "batch captured"} <= set(points)
    assert len(points) > 50
    for stop in range(len(points)):
        left = stop

        def kill(_: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch, fault_hook(kill):
            patch.setattr("os.unlink", lambda *_, **__: None)  # a killed process does not tidy up
            with pytest.raises(Killed):
                collect_firings(ToySubject(), coders, corpus, folder, CONFIG)
        again = collect_firings(ToySubject(), coders, corpus, folder, CONFIG)
        assert hashes(again) == {name: expected[name] for name in coders}
        for name in coders:
            assert again[name].manifest == whole[name].manifest
            files = [sorted(p.name for p in (base / name).iterdir()) for base in (folder, tmp_path / "whole")]
            assert files[0] == files[1]


def stopped(corpus: Corpus, folder: Path, name: str, *, after: int, config: CollectConfig = CONFIG) -> None:
    """Collect, and stop at the n-th fault point of a name."""
    seen = 0

    def kill(point: str) -> None:
        nonlocal seen
        seen += point == name
        if seen == after:
            raise Killed

    with fault_hook(kill), pytest.raises(Killed):
        collect_firings(ToySubject(), CODERS, corpus, folder, config)


def test_only_what_is_missing_is_computed(corpus: Corpus, tmp_path: Path, expected: dict[str, str]) -> None:
    stopped(corpus, tmp_path, "before shard is listed", after=5)  # a: two shards, bb@x: one and a half, a2: one
    assert [load_manifest(tmp_path / name).row_stop for name in CODERS] == [8, 4, 4]
    subject = ToySubject()
    assert hashes(collect_firings(subject, CODERS, corpus, tmp_path, CONFIG)) == expected
    assert subject.passes == [(2, ("bb", "a"))] * 2 + [(2, ("a", "bb"))] + [(1, ("a", "bb"))]
    subject = ToySubject()
    collect_firings(subject, CODERS, corpus, tmp_path, CONFIG)
    assert subject.passes == []
    more = {**CODERS, "new": ToyCoder("ccc", seed=7)}
    assert set(hashes(collect_firings(subject, more, corpus, tmp_path, CONFIG))) == set(more)
    assert {names for _, names in subject.passes} == {("ccc",)}


def test_another_shard_size_may_go_on(corpus: Corpus, tmp_path: Path, expected: dict[str, str]) -> None:
    stopped(corpus, tmp_path, "before shard is listed", after=4)
    config = dataclasses.replace(CONFIG, shard_rows=2)
    stores = collect_firings(ToySubject(), CODERS, corpus, tmp_path, config)
    assert hashes(stores) == expected
    assert [shard.row_stop for shard in stores["a"].manifest.shards] == [4, 6, 8, 10, 11]


def test_another_key_is_refused_with_the_difference(corpus: Corpus, tmp_path: Path) -> None:
    stopped(corpus, tmp_path, "before shard is listed", after=5)

    def again(subject: ToySubject | None = None, **change: Any) -> None:
        coders = change.pop("coders", CODERS)
        config = dataclasses.replace(CONFIG, **change)
        collect_firings(subject or ToySubject(), coders, corpus, tmp_path, config)

    subject = ToySubject()
    subject.hash = "subject1"
    with pytest.raises(MismatchError, match=r"'?subject_hash: 'subject0' there, 'subject1' now"):
        again(subject)
    subject = ToySubject()
    subject.dtype = torch.bfloat16
    with pytest.raises(MismatchError, match="dtype: 'float32' there, 'bfloat16' now"):
        again(subject)
    with pytest.raises(MismatchError, match="coder_hash: 'coder1' there, 'coder5' now"):
        again(coders={**CODERS, "a": ToyCoder("a", seed=5)})
    with pytest.raises(MismatchError, match=r"batch_plan: .*'rows': 2.* there, .*'rows': 4.* now"):
        again(batch_tokens=4 * LENGTH)
    again()


def test_a_complete_store_may_come_from_another_device(corpus: Corpus, tmp_path: Path) -> None:
    collect_firings(ToySubject(), CODERS, corpus, tmp_path, CONFIG)
    for name in CODERS:
        manifest = dataclasses.replace(load_manifest(tmp_path / name), device="cuda", dtype="bfloat16")
        save_manifest(tmp_path / name, manifest)
    collect_firings(ToySubject(), CODERS, corpus, tmp_path, CONFIG)
    with pytest.raises(MismatchError, match="dtype: 'bfloat16' there, 'float32' now"):
        collect_firings(ToySubject(), CODERS, corpus, tmp_path, dataclasses.replace(CONFIG, dtype="float32"))


def test_threads_are_pinned_to_those_of_the_beginning(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    before = torch.get_num_threads()
    stopped(corpus, tmp_path, "before shard is listed", after=5, config=dataclasses.replace(CONFIG, threads=3))
    collect_firings(ToySubject(), CODERS, corpus, tmp_path, dataclasses.replace(CONFIG, threads=7))
    assert set_to == [3, before, 3, before]


def test_going_on_with_another_version_warns(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(corpus, tmp_path, "before shard is listed", after=1)
    manifest = load_manifest(tmp_path / "a")
    assert set(manifest.versions) == {"python", "exegete", "torch", "transformers", "numpy"}
    save_manifest(tmp_path / "a", dataclasses.replace(manifest, versions={**manifest.versions, "torch": "1.0"}))
    with caplog.at_level(logging.WARNING):
        collect_firings(ToySubject(), {"a": CODERS["a"]}, corpus, tmp_path, CONFIG)
    assert "other versions of torch" in caplog.text


def test_quality_is_measured_on_the_first_rows(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = ToySubject()
    coders = {"out": ToyCoder("a", k=None), "in": ToyCoder("bb", side="input")}
    with caplog.at_level(logging.WARNING):
        stores = collect_firings(subject, coders, corpus, tmp_path, CONFIG)
    assert subject.passes[0] == (11, ("a", "bb", "bb"))
    first = dense_oracle(corpus, coders["out"])
    quality = stores["out"].manifest.quality
    assert quality["l0"] == pytest.approx((first > 0).sum() / corpus.rows(slice(None)).mask.sum())
    assert quality["fvu"] > 4
    assert "coder out explains less of a than the mean does" in caplog.text
    caplog.clear()
    collect_firings(subject, {"out@random-coder": ToyCoder("a", k=None)}, corpus, tmp_path, CONFIG)
    assert not caplog.text


def test_a_coder_whose_reconstruction_has_another_size_is_collected_all_the_same(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyCoder, "decode", lambda _, code, x: x[:, :2])
    assert collect_firings(ToySubject(), {"a": CODERS["a"]}, corpus, tmp_path, CONFIG)["a"].manifest.quality == {}


def test_activations_that_are_not_finite_are_named(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CPU_TOKENS", 2 * LENGTH)
    subject = ToySubject(corpus)
    subject.bad_row = 7
    with pytest.raises(InputError, match="the output of 'a' holds NaN or infinity in row 7"):
        collect_firings(subject, {"a": CODERS["a"]}, corpus, tmp_path, CONFIG)
    assert load_manifest(tmp_path / "a").row_stop == 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda n: (torch.full((n, 1), 3), torch.full((n, 1), float("nan"))), "NaN or infinity"),
        (lambda n: (torch.full((n, 1), 3), torch.full((n, 1), 1e30)), "too large to store"),
        (lambda n: (torch.full((n - 1, 1), 3), torch.ones((n - 1, 1))), "answered 1[0-9] inputs with"),
    ],
)
def test_a_coder_that_answers_nonsense_is_named(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Any, words: str
) -> None:
    def encode(_: ToyCoder, x: torch.Tensor) -> SparseCode:
        indices, values = code(len(x))
        return SparseCode(indices=indices, values=values, width=WIDTH)

    monkeypatch.setattr(ToyCoder, "encode", encode)
    monkeypatch.setattr(ToyCoder, "decode", lambda _, code, x: x)
    with pytest.raises(InputError, match=f"coder 'a' at 'a', rows 0 to 1: .*{words}"):
        collect_firings(ToySubject(), {"a": CODERS["a"]}, corpus, tmp_path, CONFIG)


def test_what_does_not_fit_is_refused_before_anything_is_written(corpus: Corpus, tmp_path: Path) -> None:
    wide = ToyCoder("a")
    wide.d_in = 7
    with pytest.raises(MismatchError, match="coder 'x' reads 7 dimensions, the output of 'a' in toy has 6"):
        collect_firings(ToySubject(), {"x": wide}, corpus, tmp_path, CONFIG)
    subject = ToySubject()
    subject.token_table = lambda: TokenTable([b"a"])  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match="another tokenizer than that of toy"):
        collect_firings(subject, CODERS, corpus, tmp_path, CONFIG)
    with pytest.raises(InputError, match="no coder is given"):
        collect_firings(ToySubject(), {}, corpus, tmp_path, CONFIG)
    with pytest.raises(InputError, match="cannot be used"):
        collect_firings(ToySubject(), {"../up": CODERS["a"]}, corpus, tmp_path, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_in_a_listed_shard_is_found_when_going_on(corpus: Corpus, tmp_path: Path) -> None:
    stopped(corpus, tmp_path, "before shard is listed", after=5)
    shard = tmp_path / "a" / load_manifest(tmp_path / "a").shards[0].file
    data = bytearray(shard.read_bytes())
    data[-70] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=shard.name):
        collect_firings(ToySubject(), CODERS, corpus, tmp_path, CONFIG)
    assert not load_manifest(tmp_path / "a").complete


def test_one_writer_per_store(corpus: Corpus, tmp_path: Path) -> None:
    with RunLock(tmp_path / "a"), pytest.raises(BusyError, match="is being written by"):
        collect_firings(ToySubject(), CODERS, corpus, tmp_path, CONFIG)
