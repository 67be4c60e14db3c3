from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import CorruptError, InputError
from exegete.store import shards
from exegete.store.manifest import ShardEntry
from exegete.store.shards import AbsentShardError, OpenShards, ShardBuilder, ShardShape, ShardWriter, open_shard
from exegete.types import Array

WIDTH, LENGTH = 7, 4


def build(dense: Array, *, row_start: int = 0, batch: int = 1) -> ShardBuilder:
    """Make a shard of dense codes [rows, LENGTH, WIDTH], 0 for silence, in batches of rows."""
    builder = ShardBuilder(row_start=row_start, row_length=LENGTH, width=WIDTH)
    for start in range(0, len(dense), batch):
        part = dense[start : start + batch].reshape(-1, WIDTH)
        at, latents = np.nonzero(part)
        builder.add((part > 0).sum(axis=1), latents, part[at, latents])
    return builder


def some(seed: int, rows: int = 5) -> Array:
    rng = np.random.default_rng(seed)
    dense: Array = rng.integers(1, 1 << 16, (rows, LENGTH, WIDTH)) * (rng.random((rows, LENGTH, WIDTH)) < 0.3)
    return dense


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3))
def test_latents_hold_exactly_their_firings_in_order(seed: int, rows: int, batch: int) -> None:
    dense = some(seed, rows)
    offsets, positions, codes = build(dense, batch=batch).sorted_by_latent()
    assert len(offsets) == WIDTH + 1
    assert offsets[-1] == len(positions) == (dense > 0).sum()
    for latent in range(WIDTH):
        inside = slice(int(offsets[latent]), int(offsets[latent + 1]))
        flat = dense[:, :, latent].reshape(-1)
        assert positions[inside].tolist() == np.flatnonzero(flat).tolist()
        assert codes[inside].tolist() == flat[flat > 0].tolist()


def test_a_written_shard_reads_back_mapped_and_aligned(tmp_path: Path) -> None:
    builder = build(some(1), row_start=40)
    sha = builder.write(tmp_path / "a.bin")
    shard = open_shard(tmp_path / "a.bin")
    shape = shard.shape
    assert (shape.row_start, shape.n_rows, shape.row_length, shape.n_latents) == (40, 5, LENGTH, WIDTH)
    assert (shape.n_firings, shape.latent_start, shape.n_excluded, shape.bits) == (builder.n_firings, 0, 0, 16)
    assert shard.sha256 == sha
    made_of = build(some(1)).sorted_by_latent()
    for mapped, made in zip((shard.offsets, shard.positions, shard.codes), made_of, strict=True):
        assert np.array_equal(mapped, made)
        assert mapped.ctypes.data % 64 == 0
        assert isinstance(mapped, np.memmap)
        assert not mapped.flags.writeable
    assert (tmp_path / "a.bin").stat().st_size % 64 == 0


def test_a_shard_without_firings(tmp_path: Path) -> None:
    build(np.zeros((2, LENGTH, WIDTH), np.int64)).write(tmp_path / "a.bin")
    shard = open_shard(tmp_path / "a.bin")
    assert (shard.shape.n_rows, shard.shape.n_firings) == (2, 0)
    assert not shard.offsets.any()


def test_the_same_rows_give_the_same_file_however_batched(tmp_path: Path) -> None:
    dense = some(2, 6)
    build(dense, batch=1).write(tmp_path / "a.bin")
    build(dense, batch=4).write(tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    build(some(3)).write(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"a\.bin"):
            open_shard(path)


def test_a_byte_flipped_after_a_first_good_look_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    build(some(3)).write(path)
    open_shard(path)
    damaged = bytearray(path.read_bytes())
    damaged[-65] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptError, match=r"a\.bin"):
        open_shard(path)


@pytest.mark.parametrize("keep", [0, 3, 60, 200, -64, -1])
def test_a_shard_cut_short_or_missing_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.bin"
    build(some(3)).write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"a\.bin"):
        open_shard(path)
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        open_shard(path)


def test_another_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FORMAT", 1)
    build(some(3)).write(tmp_path / "a.bin")
    monkeypatch.undo()
    with pytest.raises(InputError, match="shard format 1, this version reads 3"):
        open_shard(tmp_path / "a.bin")
    assert struct.unpack_from("<I", (tmp_path / "a.bin").read_bytes(), 8) == (1,)


def entry(builder: ShardBuilder, path: Path) -> ShardEntry:
    """Write a shard and return the entry that lists it."""
    n_firings = builder.n_firings
    return ShardEntry(
        file=path.name,
        row_start=builder.row_start,
        row_stop=builder.row_start + builder.n_rows,
        latent_start=0,
        latent_stop=WIDTH,
        n_positions=builder.n_rows * LENGTH,
        n_firings=n_firings,
        tier=0,
        sha256=builder.write(path),
    )


def test_at_most_so_many_maps_are_open(tmp_path: Path) -> None:
    entries = [entry(build(some(i), row_start=i), tmp_path / f"{i}.bin") for i in range(5)]
    opened = OpenShards(tmp_path, LENGTH, limit=2)
    for _ in range(2):
        for i, listed in enumerate(entries):
            assert opened.get(listed).shape.row_start == i
            assert len(opened) <= 2
    assert opened.get(entries[4]) is opened.get(entries[4])
    for file in ("0.bin", "4.bin"):
        with pytest.raises(AbsentShardError, match="not the shard its manifest lists"):
            opened.get(dataclasses.replace(entries[1], file=file))


@pytest.mark.parametrize("field", ["row_start", "row_stop", "latent_start", "latent_stop", "n_firings"])
def test_a_manifest_that_lists_something_else_than_the_shard_holds_is_damaged(tmp_path: Path, field: str) -> None:
    listed = entry(build(some(1), row_start=3), tmp_path / "a.bin")
    assert OpenShards(tmp_path, LENGTH).get(listed).shape.n_rows == 5
    other = dataclasses.replace(listed, **{field: getattr(listed, field) + 1})
    opened = OpenShards(tmp_path, LENGTH)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"manifest\.json lists other rows, latents or firings of a\.bin"):
            opened.get(other)
    with pytest.raises(CorruptError, match="lists other rows"):
        OpenShards(tmp_path, LENGTH + 1).get(listed)


def test_the_shape_is_part_of_the_checksum(tmp_path: Path) -> None:
    sums = {build(some(1), row_start=start).write(tmp_path / "a.bin") for start in (0, 1)}
    assert len(sums) == 2


def forged(path: Path, header: bytes) -> None:
    """Give a shard another header, with the checksum that belongs to it."""
    raw = path.read_bytes()
    _, number, length, _ = struct.unpack_from("<8sII32s", raw)
    text = header.ljust(-(-(48 + len(header)) // 64) * 64 - 48, b"\0")
    start = struct.pack("<8sII", b"EXEGSHRD", number, 48 + len(text))
    path.write_bytes(start + hashlib.sha256(start + text).digest() + text + raw[length:])


def header_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_bytes()[48:512].split(b"\0")[0])
    return fields


ABSURD: list[Any] = [-1, 1 << 62, 10**30, 1.5, True, None, "5", [1], math.nan]


@pytest.mark.parametrize("name", [*ShardShape.__slots__, "values", "digests"])
def test_hostile_headers_are_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.bin"
    build(some(3), row_start=2).write(path)
    fields = header_of(path)
    absurd = ABSURD if name != "digests" else [*ABSURD, [], ["0"], ["0"] * 4, {}]
    changed = [{**fields, name: value} for value in absurd if value != fields[name]]
    for header in [*changed, {key: value for key, value in fields.items() if key != name}]:
        forged(path, json.dumps(header).encode())
        with pytest.raises(CorruptError, match=r"a\.bin"):
            open_shard(path)
    forged(path, json.dumps(fields, sort_keys=True).encode())
    assert open_shard(path).shape.row_start == 2


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"5", b"null", b"{", b"\xff", b"[" * 9000, b'{"a":' * 2000, b" " * 20000, b"9" * 5000]
)
def test_headers_that_are_no_object_are_damaged(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.bin"
    build(some(3)).write(path)
    forged(path, header)
    with pytest.raises(CorruptError, match=r"a\.bin"):
        open_shard(path)


@pytest.mark.parametrize("bits", [0, 8, 17, 64])
def test_only_two_widths_of_positions_are_known(tmp_path: Path, bits: int) -> None:
    build(some(3)).write(tmp_path / "a.bin")
    forged(tmp_path / "a.bin", json.dumps({**header_of(tmp_path / "a.bin"), "bits": bits}).encode())
    with pytest.raises(CorruptError, match="describes no shard"):
        open_shard(tmp_path / "a.bin")


def shape_of(**fields: int) -> ShardShape:
    known = {"row_start": 0, "n_rows": 1, "row_length": 4, "latent_start": 0, "n_latents": 2, "n_excluded": 0}
    return ShardShape.fitting(**{**known, **fields})


@pytest.mark.parametrize("counts", [[3, -1], [1, 2], [0, 1]])
def test_offsets_that_do_not_ascend_to_the_firings_are_damaged(tmp_path: Path, counts: list[int]) -> None:
    with ShardWriter.open(tmp_path / "a.bin", shape_of(n_firings=2)) as writer:
        writer.append(np.array(counts), np.array([0, 1]), np.array([1, 1], np.uint16))
        writer.finish(np.zeros(0, np.uint64))
    for _ in range(2):
        with pytest.raises(CorruptError, match="do not ascend"):
            open_shard(tmp_path / "a.bin")


@pytest.mark.parametrize("excluded", [[1, 1], [3, 2], [2, 4]])
def test_excluded_positions_that_do_not_ascend_are_damaged(tmp_path: Path, excluded: list[int]) -> None:
    with ShardWriter.open(tmp_path / "a.bin", shape_of(n_firings=0, n_excluded=2)) as writer:
        writer.append(np.array([0, 0]), np.zeros(0, int), np.zeros(0, np.uint16))
        writer.finish(np.array(excluded, np.uint64))
    with pytest.raises(CorruptError, match="do not ascend"):
        open_shard(tmp_path / "a.bin")


def test_a_position_outside_the_rows_is_found_when_read(tmp_path: Path) -> None:
    with ShardWriter.open(tmp_path / "a.bin", shape_of(n_firings=2)) as writer:
        writer.append(np.array([1, 1]), np.array([0, 4]), np.array([1, 1], np.uint16))
        writer.finish(np.zeros(0, np.uint64))
    shard = open_shard(tmp_path / "a.bin")
    assert shard.piece(0, 1)[1].tolist() == [0]
    with pytest.raises(CorruptError, match=r"a\.bin holds a position outside"):
        shard.piece(0, 2)
    with pytest.raises(CorruptError, match=r"a\.bin holds a position outside"):
        shard.part(1, 0, 1)


def test_offsets_take_eight_bytes_where_four_are_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = shape_of(n_rows=1 << 20, row_length=1 << 20, n_latents=1 << 20, n_firings=1 << 32)
    assert large.types[0] == "<u8"
    assert large.sizes[0] == 8 * (large.n_latents * large.blocks + 1)
    assert dataclasses.replace(large, n_firings=(1 << 32) - 1).types[0] == "<u4"
    small = entry(build(some(1)), tmp_path / "small.bin")
    monkeypatch.setattr(shards, "WIDE_OFFSETS", small.n_firings)
    wide = open_shard(tmp_path / entry(build(some(1)), tmp_path / "wide.bin").file)
    assert wide.offsets.dtype == np.uint64
    monkeypatch.undo()
    narrow = open_shard(tmp_path / "small.bin")
    assert narrow.offsets.dtype == np.uint32
    assert wide.offsets.tolist() == narrow.offsets.tolist()
    for mine, other in zip(wide.piece(1, 6), narrow.piece(1, 6), strict=True):
        assert mine.tolist() == other.tolist()


def test_what_a_coder_must_not_say_is_refused() -> None:
    builder = ShardBuilder(row_start=0, row_length=2, width=3)
    for latents in ([3], [-1]):
        with pytest.raises(InputError, match="latents lie in 0 … 2"):
            builder.add(np.array([1, 0]), np.array(latents), np.array([5]))
    for counts in ([1, 1], [1], [1, 0, 0]):
        with pytest.raises(InputError, match="whole rows"):
            builder.add(np.array(counts), np.array([0]), np.array([5]))


def test_a_latent_listed_twice_at_one_position_is_refused() -> None:
    builder = ShardBuilder(row_start=0, row_length=2, width=9)
    builder.add(np.array([2, 2]), np.array([7, 8, 4, 4]), np.array([1, 1, 1, 1]))
    with pytest.raises(InputError, match="latent 4 twice"):
        builder.sorted_by_latent()


def test_a_position_shared_by_neighbouring_latents_is_fine() -> None:
    builder = ShardBuilder(row_start=0, row_length=2, width=9)
    builder.add(np.array([0, 3]), np.array([5, 3, 4]), np.array([1, 2, 3]))
    _, positions, codes = builder.sorted_by_latent()
    assert positions.tolist() == [1, 1, 1]
    assert codes.tolist() == [2, 3, 1]


def test_a_shard_too_large_for_the_sort_is_refused() -> None:
    builder = ShardBuilder(row_start=0, row_length=1 << 30, width=9)
    builder.n_rows = 1
    with pytest.raises(InputError, match="set a smaller shard size"):
        builder.add(np.zeros(1 << 30, np.int8), np.zeros(0, int), np.zeros(0, int))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), start=st.integers(0, 9), size=st.integers(0, 9))
def test_positions_beyond_sixteen_bits_and_ranges_of_latents(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, start: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    length, width = 30_000, 9
    path = tmp_path_factory.mktemp("wide") / "a.bin"
    at = np.sort(rng.choice(rows * length, 400, replace=False))
    latents, codes = rng.integers(0, width, 400), rng.integers(0, 1 << 16, 400).astype(np.uint16)
    counts = np.bincount(at, minlength=rows * length)
    excluded = np.flatnonzero(counts == 0)[::5000]
    builder = ShardBuilder(row_start=7, row_length=length, width=width)
    builder.add(counts, latents, codes, excluded)
    builder.write(path)
    shard = open_shard(path)
    assert shard.shape.blocks == -(-rows * length // 65536)
    assert shard.excluded.tolist() == excluded.tolist()
    assert shard.counts().tolist() == np.bincount(latents, minlength=width).tolist()
    stop = start + size
    found, positions, values = shard.piece(start, stop)
    assert found.tolist() == [int((latents == latent).sum()) for latent in range(start, stop)]
    assert positions.tolist() == [p for latent in range(start, stop) for p in at[latents == latent].tolist()]
    assert values.tolist() == [c for latent in range(start, stop) for c in codes[latents == latent].tolist()]
    assert shard.count(start) == int((latents == start).sum())
    for begin, end in ((-5, 7), (3, 11), (2, 2), (30, 10_000)):
        n, positions, values = shard.part(start, begin, end)
        assert positions.tolist() == at[latents == start][max(begin, 0) : end].tolist()
        assert values.tolist() == codes[latents == start][max(begin, 0) : end].tolist()
        assert n.tolist() == [len(values)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.sets(st.integers(0, 300)))
def test_latents_appended_in_parts_give_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: set[int]
) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("parts")
    at = np.sort(rng.choice(4 * 200_000, 300, replace=False))
    latents = np.sort(rng.integers(0, 4, 300))
    places, codes = at % 200_000, rng.integers(0, 1 << 16, 300).astype(np.uint16)
    order = np.lexsort((places, latents))
    latents, places = latents[order], places[order]
    repeated = (np.diff(places) == 0) & (np.diff(latents) == 0)
    keep = np.concatenate([[True], ~repeated])
    latents, places, codes = latents[keep], places[keep], codes[keep]
    shape = shape_of(n_rows=2, row_length=100_000, n_latents=4, n_firings=len(places))
    for bits in (16, 32):
        for name in ("whole", "parts"):
            with ShardWriter.open(folder / name, dataclasses.replace(shape, bits=bits)) as writer:
                if name == "whole":
                    writer.append(np.bincount(latents, minlength=4), places, codes)
                for latent in range(4 if name == "parts" else 0):
                    mine = np.flatnonzero(latents == latent)
                    pieces = np.split(mine, sorted(cut for cut in cuts if cut < len(mine)))
                    for i, piece in enumerate(pieces):
                        more = i < len(pieces) - 1
                        writer.append(np.array([len(piece)]), places[piece], codes[piece], more=more)
                writer.finish(np.zeros(0, np.uint64))
        assert (folder / "whole").read_bytes() == (folder / "parts").read_bytes()


def test_a_firing_costs_little_over_four_bytes(tmp_path: Path) -> None:
    builder = ShardBuilder(row_start=0, row_length=256, width=4096)
    n = 256 * 40
    builder.add(np.full(n, 32), np.tile(np.arange(32), n), np.ones(32 * n, np.uint16))
    builder.write(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size / (32 * n) < 4.1


def test_few_firings_of_a_wide_coder_take_the_smaller_layout(tmp_path: Path) -> None:
    builder = ShardBuilder(row_start=0, row_length=1 << 18, width=1000)
    counts = np.zeros(1 << 18, int)
    counts[[3, 70_000]] = 1
    builder.add(counts, np.array([999, 5]), np.array([1, 2]))
    builder.write(tmp_path / "a.bin")
    shard = open_shard(tmp_path / "a.bin")
    assert (shard.shape.bits, shard.shape.blocks) == (32, 1)
    assert shard.piece(5, 6)[1].tolist() == [70_000]
    assert shard.piece(999, 1000)[1].tolist() == [3]


def test_a_shard_given_other_firings_than_promised_is_not_written(tmp_path: Path) -> None:
    fields = {"row_start": 0, "n_rows": 1, "row_length": 4, "latent_start": 0, "n_latents": 1, "n_excluded": 0}
    shape = ShardShape.fitting(**fields, n_firings=2)

    def write() -> None:
        with ShardWriter.open(tmp_path / "a.bin", shape) as writer:
            writer.append(np.array([1]), np.array([0]), np.array([1], np.uint16))
            writer.finish(np.zeros(0, np.uint64))

    with pytest.raises(RuntimeError, match="another number"):
        write()
    assert not list(tmp_path.iterdir())
