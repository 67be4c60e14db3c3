"""Co-firing neighbours against dense counts; what is drawn where the store is large; no dense table; the file."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import CorruptError, InputError, NotFoundError
from exegete.store.manifest import ShardEntry, StoreManifest
from exegete.store.neighbours import Neighbours, cofiring_neighbours, load_neighbours, save_neighbours
from exegete.store.shards import ShardBuilder
from exegete.store.store import Store
from exegete.store.values import ENCODING
from exegete.types import Array

LENGTH = 16


def store_of(folder: Path, place: Array, latent: Array, *, rows: int, width: int, cuts: Sequence[int] = ()) -> Store:
    """Return a store, still being collected, of firings at flat places, sorted by place; all positions count."""
    entries = []
    for start, stop in zip((0, *cuts), (*cuts, rows), strict=True):
        inside = slice(*np.searchsorted(place, [start * LENGTH, stop * LENGTH]))
        counts = np.bincount(place[inside] - start * LENGTH, minlength=(stop - start) * LENGTH)
        builder = ShardBuilder(row_start=start, row_length=LENGTH, width=width)
        builder.add(counts, latent[inside], np.ones(len(place[inside]), np.uint16))
        sha256 = builder.write(folder / f"{start}.bin")
        entries.append(
            ShardEntry(
                file=f"{start}.bin",
                row_start=start,
                row_stop=stop,
                latent_start=0,
                latent_stop=width,
                n_positions=(stop - start) * LENGTH,
                n_firings=builder.n_firings,
                tier=0,
                sha256=sha256,
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
        corpus_hash="",
        corpus="../corpus",
        hookpoint="layers.0",
        side="output",
        width=width,
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
    return Store(folder, manifest)


def dense_store(folder: Path, dense: Array, cuts: Sequence[int] = ()) -> Store:
    """Return the store of firings given as bool [positions, width]."""
    place, latent = np.nonzero(dense)
    return store_of(folder, place, latent, rows=len(dense) // LENGTH, width=dense.shape[1], cuts=cuts)


def planted(seed: int, *, rows: int = 12, width: int = 14) -> Array:
    """Return bool [positions, width]: rare, dense, coinciding and dead latents."""
    rng = np.random.default_rng(seed)
    dense = rng.random((rows * LENGTH, width)) < rng.choice([0.02, 0.1, 0.5], width)
    dense[:, 1] = dense[:, 0] & (rng.random(len(dense)) < 0.8)
    dense[:, 3] = False
    dense[:, 5] = dense[:, 4]
    result: Array = dense
    return result


def brute(dense: Array, indices: Sequence[int], k: int) -> tuple[Array, Array]:
    """Jaccard of all pairs, one by one; the nearest first, the lower index of equals."""
    found = np.full((len(indices), k), -1)
    similarity = np.zeros((len(indices), k), np.float32)
    for row, a in enumerate(indices):
        near = []
        for b in range(dense.shape[1]):
            both = int((dense[:, a] & dense[:, b]).sum())
            if both and b != a:
                near.append((-np.float32(both / (dense[:, a] | dense[:, b]).sum()), b))
        for column, (minus, b) in enumerate(sorted(near)[:k]):
            found[row, column], similarity[row, column] = b, -minus
    return found, similarity


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), order=st.permutations(range(14)), n=st.integers(0, 14))
def test_a_store_that_is_not_large_is_counted_exactly(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, order: list[int], n: int
) -> None:
    dense = planted(seed)
    store = dense_store(tmp_path_factory.mktemp("store"), dense, cuts=(5,))
    found = cofiring_neighbours(store, order[:n], k=k)
    neighbours, similarity = brute(dense, order[:n], k)
    assert found.kind == "cofiring"
    assert found.indices.tolist() == order[:n]
    np.testing.assert_array_equal(found.neighbours, neighbours)
    np.testing.assert_array_equal(found.similarity, similarity)


def test_latents_that_coincide_are_nearest_and_dead_ones_are_alone(tmp_path: Path) -> None:
    found = cofiring_neighbours(dense_store(tmp_path, planted(0)), [4, 3], k=3)
    assert found.neighbours[0, 0] == 5
    assert found.similarity[0, 0] == 1
    assert found.neighbours[1].tolist() == [-1, -1, -1]
    assert found.similarity[1].tolist() == [0, 0, 0]


def test_the_cut_into_shards_and_into_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = planted(1, rows=30)
    whole = cofiring_neighbours(dense_store(tmp_path / "a", dense), range(14), positions=100, seed=3)
    monkeypatch.setattr("exegete.store.neighbours._PAIRS", 5)
    monkeypatch.setattr("exegete.store.neighbours._RUN", 7)
    cut = cofiring_neighbours(dense_store(tmp_path / "b", dense, cuts=(3, 4, 20)), range(14), positions=100, seed=3)
    np.testing.assert_array_equal(whole.neighbours, cut.neighbours)
    np.testing.assert_array_equal(whole.similarity, cut.similarity)


def test_what_is_found_of_a_latent_depends_on_no_other(tmp_path: Path) -> None:
    store = dense_store(tmp_path, planted(2, rows=60))
    one, other = (cofiring_neighbours(store, indices, positions=150) for indices in ([0, 6, 2], [8, 9, 0]))
    np.testing.assert_array_equal(one.neighbours[0], other.neighbours[2])
    np.testing.assert_array_equal(one.similarity[0], other.similarity[2])


def test_draws_depend_on_the_seed_and_estimate_the_overlap(tmp_path: Path) -> None:
    """Over seeds the mean of the estimated overlap is the true one, though few positions are looked at."""
    rng = np.random.default_rng(0)
    dense = rng.random((2000 * LENGTH, 3)) < 0.2
    dense[:, 1] = np.where(rng.random(len(dense)) < 0.5, dense[:, 0], dense[:, 1])
    store = dense_store(tmp_path, dense)
    true = (dense[:, 0] & dense[:, 1]).sum()
    n = dense.sum(axis=0)
    estimates = []
    for seed in range(30):
        found = cofiring_neighbours(store, [0], k=2, positions=600, seed=seed)
        assert found.neighbours.tolist() == [[1, 2]]
        jaccard = float(found.similarity[0, 0])
        estimates.append(jaccard * (n[0] + n[1]) / (1 + jaccard))
    spread = np.std(estimates) / np.sqrt(len(estimates))
    assert spread > 0
    assert abs(np.mean(estimates) - true) < 4 * spread


def test_rare_latents_stay_exact_in_a_large_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dense = rng.random((2000 * LENGTH, 8)) < 0.3
    dense[:, 0] = False
    at = rng.choice(len(dense), 40, replace=False)
    dense[at, 0] = True
    dense[:, 1] = False
    dense[at[:30], 1] = True
    store = dense_store(tmp_path, dense)
    found = cofiring_neighbours(store, [0, 1], k=7, positions=400)
    neighbours, similarity = brute(dense, [0, 1], 7)
    np.testing.assert_array_equal(found.neighbours, neighbours)
    np.testing.assert_array_equal(found.similarity, similarity)


def test_many_firings_at_once_mean_fewer_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(2).random((200 * LENGTH, 10)) < 0.5
    store = dense_store(tmp_path, dense)
    exact = cofiring_neighbours(store, range(10)).similarity
    monkeypatch.setattr("exegete.store.neighbours._FIRINGS", 2000)
    few = cofiring_neighbours(store, range(10)).similarity
    assert not np.array_equal(exact, few)
    np.testing.assert_allclose(few, exact, atol=0.15)


def test_no_dense_table_is_made_of_131072_latents(tmp_path: Path) -> None:
    """A table of all pairs would be 16 GiB in bytes, one of 300 against all 150 MiB in float32."""
    rng = np.random.default_rng(3)
    width, rows = 131_072, 400
    place = np.repeat(np.arange(rows * LENGTH), 16)
    latent = np.where(
        np.arange(len(place)) % 16 < 4, rng.integers(0, 300, len(place)), rng.integers(0, width, len(place))
    )
    key = np.unique(place * width + latent)
    store = store_of(tmp_path, key // width, key % width, rows=rows, width=width)
    store.block(0, 1)
    tracemalloc.start()
    found = cofiring_neighbours(store, np.arange(300), k=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    assert found.neighbours.shape == (300, 10)
    assert (found.neighbours >= 0).all()
    own, other = (set((key // width)[key % width == latent].tolist()) for latent in (7, found.neighbours[7, 0]))
    assert found.similarity[7, 0] == pytest.approx(len(own & other) / len(own | other))


def test_bad_questions_are_refused(tmp_path: Path) -> None:
    store = dense_store(tmp_path, planted(0))
    with pytest.raises(InputError, match="lie in 0 … 13, got 14"):
        cofiring_neighbours(store, [2, 14])
    with pytest.raises(InputError, match="twice"):
        cofiring_neighbours(store, [2, 2])
    with pytest.raises(InputError, match="at least 1"):
        cofiring_neighbours(store, [2], k=0)


def some() -> Neighbours:
    return Neighbours(
        kind="decoder",
        indices=np.array([7, 2]),
        neighbours=np.array([[1, -1], [0, 7]]),
        similarity=np.array([[0.5, 0], [0.75, 0.25]], np.float32),
    )


def test_neighbours_are_looked_up_by_latent() -> None:
    assert some().of([2, 7, 2]).tolist() == [[0, 7], [1, -1], [0, 7]]
    assert some().of([]).shape == (0, 2)
    with pytest.raises(NotFoundError, match="latent 3"):
        some().of([7, 3])
    with pytest.raises(NotFoundError, match="latent 9"):
        dataclasses.replace(
            some(), indices=np.zeros(0, np.int64), neighbours=np.zeros((0, 2), np.int64),
            similarity=np.zeros((0, 2), np.float32),
        ).of([9])  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"indices": np.array([7])},
        {"indices": np.array([7, 7])},
        {"indices": np.array([7, -2])},
        {"neighbours": np.array([[1, -2], [0, 7]])},
        {"neighbours": np.array([[1, -1], [0, 7]], np.int32)},
        {"similarity": np.array([[0.5, 0], [np.nan, 0.25]], np.float32)},
        {"similarity": np.zeros((2, 3), np.float32)},
    ],
)
def test_neighbours_that_do_not_fit_together_are_refused(change: dict[str, Array]) -> None:
    with pytest.raises(InputError, match="neighbours"):
        dataclasses.replace(some(), **change)  # type: ignore[arg-type]


def test_neighbours_of_other_latents_are_added() -> None:
    others = dataclasses.replace(some(), indices=some().indices + 100)
    both = some().with_others(others)
    assert both.indices.tolist() == [*some().indices.tolist(), *others.indices.tolist()]
    np.testing.assert_array_equal(both.of(others.indices), others.neighbours)
    np.testing.assert_array_equal(both.similarity[: len(some())], some().similarity)
    with pytest.raises(InputError, match="twice"):
        some().with_others(some())
    with pytest.raises(InputError, match="joined"):
        some().with_others(dataclasses.replace(others, kind="encoder"))


def test_a_saved_table_comes_back_under_its_key_alone(tmp_path: Path) -> None:
    assert load_neighbours(tmp_path, "decoder", "k1") is None
    save_neighbours(tmp_path / "deep", some(), "k1")
    found = load_neighbours(tmp_path / "deep", "decoder", "k1")
    assert found is not None
    for name in ("indices", "neighbours", "similarity"):
        np.testing.assert_array_equal(getattr(found, name), getattr(some(), name))
    assert load_neighbours(tmp_path / "deep", "decoder", "k2") is None
    assert load_neighbours(tmp_path / "deep", "encoder", "k1") is None


def test_a_damaged_or_forged_table_is_refused(tmp_path: Path) -> None:
    save_neighbours(tmp_path, some(), "k")
    path = tmp_path / "neighbours-decoder.npz"
    whole = path.read_bytes()
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptError, match="neighbours-decoder"):
            load_neighbours(tmp_path, "decoder", "k")
    for at in range(200, len(whole) - 400, 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(CorruptError):  # and nothing else
            load_neighbours(tmp_path, "decoder", "k")
    np.savez_compressed(
        path, allow_pickle=False, format=np.int64(1), key=np.array("k"), indices=np.zeros(10**6, np.int64)
    )
    with pytest.raises(CorruptError, match="compressed"):
        load_neighbours(tmp_path, "decoder", "k")
    np.savez(path, allow_pickle=True, format=np.int64(1), key=np.array("k"), indices=np.array([{}], dtype=object))
    with pytest.raises(CorruptError):
        load_neighbours(tmp_path, "decoder", "k")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other", b"")
    with pytest.raises(CorruptError):
        load_neighbours(tmp_path, "decoder", "k")
