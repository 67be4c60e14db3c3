"""Collecting with several processes, behind the forward pass, with found batch sizes, and killed for real."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.coders import LinearCoder, ReLU, SparseCoder, load_coders
from exegete.coders.coder import Point
from exegete.collecting import collect_firings, passes, plan, workers
from exegete.config import CollectConfig, CorpusConfig, RunConfig
from exegete.errors import ConfigError, InputError, MismatchError
from exegete.store.corpus import Corpus, build_corpus
from exegete.store.manifest import load_manifest
from exegete.store.sources import text_documents
from exegete.store.store import Store
from exegete.subjects import Subject, load_subject
from exegete.types import SparseCode

CONFIG = CollectConfig(batch_tokens=4 * 32, shard_bytes=1 << 14, threads=1)


@pytest.fixture(scope="module")
def subject(toy_folder: Path) -> Subject:
    return load_subject(str(toy_folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def coders(toy_folder: Path) -> dict[str, SparseCoder]:
    return load_coders(str(toy_folder / "coders"))


@pytest.fixture(scope="module")
def corpus(toy_folder: Path, subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    config = CorpusConfig(text=(str(toy_folder / "text.jsonl"),), row_length=32)
    folder = tmp_path_factory.mktemp("corpus")
    return build_corpus(folder, text_documents(config.text), subject.tokenizer, config, table=subject.token_table())


@pytest.fixture(scope="module")
def expected(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return hashes(collect_firings(subject, coders, corpus, tmp_path_factory.mktemp("expected"), CONFIG))


def hashes(stores: dict[str, Store]) -> dict[str, str]:
    assert all(store.manifest.complete for store in stores.values())
    return {name: store.manifest.content_hash for name, store in stores.items()}


def test_two_processes_collect_what_one_does(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path, expected: dict[str, str]
) -> None:
    done: list[tuple[int, int]] = []
    config = dataclasses.replace(CONFIG, workers=2)
    stores = collect_firings(subject, coders, corpus, tmp_path, config, progress=lambda *at: done.append(at))
    assert hashes(stores) == expected
    assert done[-1] == (len(corpus), len(corpus))
    assert [rows for rows, _ in done] == sorted(rows for rows, _ in done)
    for store in stores.values():
        assert Store.open(store.folder, corpus).content_hash() == store.manifest.content_hash


def test_a_process_that_refuses_says_why(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path
) -> None:
    broken = LinearCoder(
        name="broken",
        hookpoint="layers.0",
        encoder=torch.full((4, 32), 1e30),
        encoder_bias=torch.full((4,), 1e30),
        decoder=torch.zeros(4, 32),
        decoder_bias=torch.zeros(32),
        activation=ReLU(),
    )
    with pytest.raises(InputError, match=r"coder 'broken' at 'layers\.0', rows .* too large to store"):
        collect_firings(subject, {"broken": broken}, corpus, tmp_path, dataclasses.replace(CONFIG, workers=2))


def test_shards_are_built_behind_the_forward_pass(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = passes.run
    monkeypatch.setattr("exegete.collecting.run", lambda *args, behind: plain(*args, behind=True))
    assert hashes(collect_firings(subject, coders, corpus, tmp_path, CONFIG)) == expected

    whole = LinearCoder.encode

    def full_at(n: int) -> Callable[[LinearCoder, torch.Tensor], SparseCode]:
        calls = 0

        def encode(coder: LinearCoder, x: torch.Tensor) -> SparseCode:
            nonlocal calls
            calls += coder.name == "layers.0"
            code = whole(coder, x)
            if calls == n and coder.name == "layers.0":
                return SparseCode(indices=code.indices, values=code.values + 1e30, width=code.width)
            return code

        return encode

    for n in (2, 3, 9):  # the first batch after measuring, the next, one in the middle of a shard
        monkeypatch.setattr(LinearCoder, "encode", full_at(n))
        with pytest.raises(InputError, match="too large to store"):
            collect_firings(subject, coders, corpus, tmp_path / str(n), CONFIG)
        monkeypatch.setattr(LinearCoder, "encode", whole)
        assert hashes(collect_firings(subject, coders, corpus, tmp_path / str(n), CONFIG)) == expected


def test_out_of_memory_says_what_to_do(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collect_firings(subject, {"layers.0": coders["layers.0"]}, corpus, tmp_path, CONFIG)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(passes, "read", full)
    monkeypatch.setattr(plan, "begin", lambda *_: None)
    with pytest.raises(InputError, match=r"batches of 4 rows.*smaller collect\.batch_tokens"):
        collect_firings(subject, {"other": coders["layers.0"].placed(name="other")}, corpus, tmp_path, CONFIG)


def test_compiled_subjects_go_to_other_processes(
    toy_folder: Path, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path, expected: dict[str, str]
) -> None:
    compiled = load_subject(str(toy_folder / "model"), device="cpu", compile="eager")
    config = dataclasses.replace(CONFIG, workers=2, compile=True)
    assert hashes(collect_firings(compiled, coders, corpus, tmp_path, config)) == expected


def test_a_coder_of_another_precision_is_another_coder(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path
) -> None:
    one = coders["layers.0"]
    collect_firings(subject, {"layers.0": one.to("cpu", torch.bfloat16)}, corpus, tmp_path, CONFIG)
    with pytest.raises(MismatchError, match="coder_dtype: 'bfloat16' there, 'float32' now"):
        collect_firings(subject, {"layers.0": one}, corpus, tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"sink_norm": -1.0}, "multiple of the median norm"),
        ({"sink_norm": float("nan")}, "multiple of the median norm"),
        ({"threads": 0}, "collect.threads"),
        ({"shard_rows": -3}, "collect.shard_rows"),
        ({"workers": 2, "device_map": "auto"}, "give one of them"),
        ({"workers": 2, "device": "cuda:3"}, "not cuda:3"),
    ],
)
def test_settings_that_cannot_be(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(collect=CollectConfig(**setting))


def test_workers_inside_workers_are_refused(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the parent")
    with pytest.raises(InputError, match='__name__ == "__main__"'):
        collect_firings(subject, coders, corpus, tmp_path, dataclasses.replace(CONFIG, workers=2))


def test_an_infinite_error_is_warned_of(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exegete.coders.quality.fvu_and_l0", lambda *_: (float("inf"), 3.0))
    store = collect_firings(subject, {"layers.0": coders["layers.0"]}, corpus, tmp_path, CONFIG)["layers.0"]
    assert store.manifest.quality == {"l0": 3.0}
    assert "FVU inf" in store.manifest.warnings[0]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_batches_are_shared_out_whole(n: int) -> None:
    parts = workers.share(range(0, 56, 8), n)
    assert [batch for part in parts for batch in part] == list(range(0, 56, 8))
    assert len(parts) == min(n, 7)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def attempts(fits: int, cost: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A device of which a batch takes ``cost(size)`` seconds of a clock of its own; more than ``fits`` do not fit."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def attempt(size: int) -> None:
        nonlocal now
        if size > fits:
            raise torch.OutOfMemoryError
        now += cost(size)

    return attempt


@pytest.mark.parametrize(
    ("fits", "cost", "best"),
    [
        (10**9, lambda n: n, 32),  # no faster when larger
        (10**9, lambda n: 1.0, 4096),  # free: as large as allowed
        (100, lambda n: 1.0, 64),
        (10**9, lambda n: 100 + n, 1024),  # 2048 brings under a twentieth more
        (5, lambda n: n, 4),  # not even the least fits
        (1, lambda n: n, 1),
    ],
)
def test_the_fastest_batch_that_fits(
    fits: int, cost: Callable[[int], float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan.fastest(attempts(fits, cost, monkeypatch), least=32, most=4096) == best


def test_a_device_too_small_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not even one row fits"):
        plan.fastest(attempts(0, float, monkeypatch), least=32, most=4096)


def test_a_begun_batch_plan_is_kept(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path, expected: dict[str, str]
) -> None:
    one = {name: coder for name, coder in coders.items() if name == "layers.0"}
    collect_firings(subject, one, corpus, tmp_path, CONFIG)
    auto = dataclasses.replace(CONFIG, batch_tokens=None)
    assert hashes(collect_firings(subject, coders, corpus, tmp_path, auto)) == expected
    assert {load_manifest(tmp_path / name).batch_plan["rows"] for name in coders} == {4}
    fresh = collect_firings(subject, coders, corpus, tmp_path / "new", auto)
    assert {store.manifest.batch_plan["rows"] for store in fresh.values()} == {8192 // 32}
    for name, folder in (("layers.0", "x"), ("layers.0.mlp", "y")):
        (tmp_path / folder / name).parent.mkdir()
        config = dataclasses.replace(CONFIG, batch_tokens=32 * len(name))
        collect_firings(subject, {name: coders[name]}, corpus, tmp_path / folder, config)
    (tmp_path / "y" / "layers.0.mlp").rename(tmp_path / "x" / "layers.0.mlp")
    with pytest.raises(MismatchError, match="begun with batches of 8, 12 rows"):
        collect_firings(subject, coders, corpus, tmp_path / "x", auto)


DRIVER = """
import os, signal, sys
from pathlib import Path
from typing import Any
from exegete.coders import load_coders
from exegete.collecting import collect_firings
from exegete.config import CollectConfig
from exegete.files import fault_hook
from exegete.store.corpus import open_corpus
from exegete.subjects import load_subject

toy, corpus, out, stop, workers = sys.argv[1:]
left = int(stop)

def kill(point):
    global left
    left -= point == "batch captured"
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = CollectConfig(batch_tokens=4 * 32, shard_bytes=1 << 14, threads=1, workers=int(workers))
    with fault_hook(kill):
        subject = load_subject(toy + "/model", device="cpu")
        collect_firings(subject, load_coders(toy + "/coders"), open_corpus(corpus), Path(out), config)
"""


def test_killed_five_times_and_resumed(
    toy_folder: Path, corpus: Corpus, tmp_path: Path, expected: dict[str, str]
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "out"
    seen = []
    for stop in (9, 12, 10, 11, 13):  # batches until the kill, the measuring pass at the beginning included
        command = [sys.executable, str(driver), str(toy_folder), str(corpus.folder), str(out), str(stop), "1"]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        seen.append(load_manifest(out / "layers.0").row_stop)
    assert seen == sorted(set(seen))
    assert seen[-1] < len(corpus)
    subject = load_subject(str(toy_folder / "model"), device="cpu")
    assert hashes(collect_firings(subject, load_coders(str(toy_folder / "coders")), corpus, out, CONFIG)) == expected


def test_sinks_are_excluded_and_written_down(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, sink_norm=1.2)
    store = collect_firings(subject, {"layers.0": coders["layers.0"]}, corpus, tmp_path, config)["layers.0"]
    rows = corpus.rows(slice(None))
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    point: Point = ("layers.0", "output")
    norms = subject.capture(tokens, torch.from_numpy((rows.documents >= 0).astype(np.int64)), [point])[point].norm(
        dim=-1
    )
    first = norms[: 8192 // 32][torch.from_numpy(rows.mask[: 8192 // 32])]
    limit = 1.2 * float(first.median())
    assert store.manifest.norm_limit == pytest.approx(limit, rel=1e-5)
    assert store.manifest.mask_policy["sink_norm"] == 1.2
    out = rows.mask & (norms.numpy() > store.manifest.norm_limit)
    assert 0 < out.sum() < rows.mask.sum() / 2
    assert store.excluded.tolist() == np.flatnonzero(out.reshape(-1)).tolist()
    assert store.manifest.n_positions == rows.mask.sum() - out.sum()
    assert np.array_equal(store.rows(slice(None)).mask, rows.mask & ~out)
    assert np.array_equal(store.rows([5, 2]).mask, (rows.mask & ~out)[[5, 2]])
    for firings in store.block(0, store.width):
        assert not out[firings.rows, firings.positions].any()
    everything = collect_firings(
        subject, {"layers.0": coders["layers.0"]}, corpus, tmp_path / "all", dataclasses.replace(CONFIG, sink_norm=0.0)
    )["layers.0"]
    assert everything.manifest.norm_limit is None
    assert everything.manifest.n_positions == rows.mask.sum()
    assert not len(everything.excluded)
