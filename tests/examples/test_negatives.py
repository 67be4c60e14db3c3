"""What fires and what is silent, block by block, against slow and obvious ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exegete.examples.clusters import Clusters, Units, clusters, units
from exegete.examples.draws import allocate, draw_places, starts_of
from exegete.examples.fired import Fired, Recorded, gathered
from exegete.examples.keys import mixed, nth
from exegete.examples.negatives import draw_silent
from exegete.examples.windows import Frame, frame, lookup
from exegete.types import Array, Rows

WIDTH = 20
SETS = st.sets(st.integers(0, WIDTH - 1))
CASES = st.lists(st.tuples(SETS, SETS, SETS, SETS), min_size=1, max_size=4)


def keys(n: int, seed: int = 0) -> Array:
    return nth(np.full(n, seed, np.uint64), np.arange(n))


def clustered(heads: list[int], mine: list[int]) -> Clusters:
    """Return clusters of some windows of a frame of 20; those with one head are together."""
    number = np.full(WIDTH, -1, np.int32)
    number[mine] = np.unique([heads.index(head) for head in heads], return_inverse=True)[1]
    members = np.array(mine)[np.argsort(number[mine], kind="stable")]
    return Clusters(number=number, members=members, offsets=starts_of(np.bincount(number[mine])))


FRAMES = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).flatmap(
    lambda chosen: st.just([i for i, held in enumerate(chosen) if held] or [3]).flatmap(
        lambda mine: st.tuples(st.lists(st.integers(0, 8), min_size=len(mine), max_size=len(mine)), st.just(mine))
    )
)
ALONE = st.sets(st.integers(0, WIDTH - 1), min_size=1).map(lambda s: (list(range(len(s))), sorted(s)))


@given(FRAMES | ALONE, CASES, st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_silent_windows_are_those_told_slowly(
    shape: tuple[list[int], list[int]], cases: list[tuple[set[int], ...]], n: int, seed: int, rest: bool
) -> None:
    known, mine = clustered(*shape), set(shape[1])
    touched = [case[0] & mine for case in cases]
    barred = [(case[0] | case[1]) & mine for case in cases]
    kinds = [[case[i] & mine for case in cases] for i in (2, 3)]
    own = keys(len(cases), seed)

    def coded(sets: list[set[int]]) -> Array:
        return np.array([i * WIDTH + w for i, s in enumerate(sets) for w in sorted(s)], np.int64)

    found = draw_silent(coded(touched), coded(barred), [*map(coded, kinds), *([None] * rest)], known, n, own)
    assert (np.diff(found.latent) >= 0).all()
    for latent in range(len(cases)):
        members = [known.members[a:b].tolist() for a, b in zip(known.offsets, known.offsets[1:], strict=False)]
        free = [[w for w in cluster if w not in barred[latent]] for cluster in members]
        of: list[list[int]] = [[] for _ in range(2 + rest)]
        for cluster, windows in enumerate(free):
            fitting = [k for k in range(2) if set(windows) & kinds[k][latent]]
            kind = fitting[0] if fitting else 2
            if windows and kind < len(of):
                of[kind].append(cluster)
        sizes = np.array([[len(c) for c in of]])
        assert found.sizes[latent].tolist() == sizes[0].tolist()
        silent = sum(any(w not in touched[latent] for w in cluster) for cluster in members)
        assert found.unused[latent] == silent - sizes.sum()
        shares = allocate(np.array([n]), sizes)[0]
        expected = []
        for kind, candidates in enumerate(of):
            key = nth(own[latent : latent + 1], np.array([kind]))
            for place in draw_places(key, sizes[0, kind : kind + 1], shares[kind : kind + 1])[1].tolist():
                cluster = candidates[place]
                key_ = nth(nth(own[latent : latent + 1], np.array([2 + rest])), np.array([cluster]))
                window = free[cluster][int(key_[0]) % len(free[cluster])]
                expected.append((kind, window, len(free[cluster]), shares[kind] / sizes[0, kind]))
        at = np.flatnonzero(found.latent == latent)
        columns = (found.kind, found.window, found.multiplicity, found.probability)
        assert list(zip(*(c[at].tolist() for c in columns), strict=True)) == expected
        drawn = found.window[at].tolist()
        assert len(drawn) == len(set(drawn)) == min(n, int(sizes.sum()))
        assert not set(drawn) & barred[latent]  # peer's defect: negatives are drawn with replacement


def test_every_silent_window_has_the_same_chance() -> None:
    known = clustered(list(range(15)), list(range(15)))
    touched = np.array([0, 3, 4, 9, 14])
    m = 3000
    coded = (np.arange(m)[:, None] * WIDTH + touched).reshape(-1)
    found = draw_silent(coded, coded, [None], known, 4, keys(m))
    counts = np.bincount(found.window, minlength=15)
    assert not counts[touched].any()
    others = np.delete(counts, touched) / m
    assert (abs(others - 0.4) < 4.5 * (0.4 * 0.6 / m) ** 0.5).all()
    assert set(found.probability) == {0.4}


@given(FRAMES | ALONE, st.lists(SETS, min_size=1, max_size=4), st.integers(0, 99))
def test_one_firing_window_stands_for_its_cluster(
    shape: tuple[list[int], list[int]], fires: list[set[int]], seed: int
) -> None:
    known, mine = clustered(*shape), set(shape[1])
    runs = [(i, w) for i, windows in enumerate(fires) for w in sorted(windows & mine)]
    latent, window = np.array(runs, np.int64).reshape(-1, 2).T
    maximum = (window % 4).astype(np.float32)  # every fourth window holds a stored 0
    fired = Fired(
        latent=latent,
        window=window,
        maximum=maximum,
        peak=window * 7,
        offsets=starts_of(np.bincount(latent, minlength=len(fires))),
    )
    own = keys(len(fires), seed)
    made = units(fired, known, own)
    expected = []
    for i in range(len(fires)):
        groups: dict[int, list[int]] = {}
        for j, w in runs:
            if j == i and w % 4:
                groups.setdefault(int(known.number[w]), []).append(w)
        for windows in groups.values():
            bits = {w: int(mixed(own[i : i + 1] ^ np.uint64(w))[0]) for w in windows}
            expected.append((i, min(windows, key=bits.__getitem__), len(windows)))
    got = zip(made.latent.tolist(), made.window.tolist(), made.multiplicity.tolist(), strict=True)
    assert list(got) == sorted(expected)
    assert made.offsets.tolist() == starts_of(np.bincount(made.latent, minlength=len(fires))).tolist()
    assert made.peak.tolist() == (made.window * 7).tolist()
    assert made.maximum.tolist() == (made.window % 4).tolist()


def test_any_of_a_cluster_may_stand_for_it() -> None:
    known = clustered([0, 0, 0, 1], [2, 5, 7, 9])
    m = 3000
    fired = Fired(
        latent=np.repeat(np.arange(m), 3),
        window=np.tile([2, 7, 9], m),
        maximum=np.ones(3 * m, np.float32),
        peak=np.zeros(3 * m, np.int64),
        offsets=np.arange(m + 1) * 3,
    )
    made = units(fired, known, keys(m))
    assert isinstance(made, Units)
    counts = Counter(made.window.tolist())
    assert counts[9] == m
    assert abs(counts[2] / m - 0.5) < 4.5 * (0.25 / m) ** 0.5
    assert set(made.multiplicity[made.window == 9].tolist()) == {1}
    assert set(made.multiplicity[made.window != 9].tolist()) == {2}


def test_windows_are_clustered_by_their_tokens() -> None:
    tokens = np.arange(200, dtype=np.uint32).reshape(10, 20)
    tokens[7] = tokens[2]
    tokens[8, 1:] = tokens[4, 1:]
    made = clusters(np.arange(10) + 5, 30, lambda some: tokens[some - 5], 0.8)
    assert made.number.tolist() == [-1] * 5 + [0, 1, 2, 3, 4, 5, 6, 2, 4, 7] + [-1] * 15
    assert [made.members[a:b].tolist() for a, b in zip(made.offsets, made.offsets[1:], strict=False)] == [
        [5], [6], [7, 12], [8], [9, 13], [10], [11], [14],
    ]  # fmt: skip
    assert not made.single
    assert clusters(np.arange(10) + 5, 30, lambda some: tokens[some - 5], 0).single


# -- what fires -------------------------------------------------------------------------------------------------------


def tiling(seed: int) -> tuple[Frame, Array, Array]:
    """Return a frame of 6 rows of 30 positions of 3 segments each, the segments, and their splits."""
    segments = np.array([(r, s, s + 10, 3 * r + s // 10) for r in range(6) for s in (0, 10, 20)], np.int64)
    codes = np.random.default_rng(seed).integers(-1, 3, 18).astype(np.int8)
    documents = np.repeat(segments[:, 3].reshape(6, 3), 10, axis=1).astype(np.int32)
    mask = np.ones((6, 30), bool)
    mask[:, 0] = False
    made = frame(Rows(tokens=documents.astype(np.uint32), documents=documents, mask=mask), 4, seed=seed)
    own = codes[made.row * 3 + made.start // 10]
    fields: dict[str, Any] = {name: getattr(made, name) for name in made.__slots__}
    return Frame(**{**fields, "split": own}), segments, codes


@given(st.integers(0, 99), st.lists(st.integers(0, 90), min_size=1, max_size=5))
def test_firings_are_gathered_as_told_slowly(seed: int, sizes: list[int]) -> None:
    made, segments, codes = tiling(seed)
    rng = np.random.default_rng(seed)
    parts = [np.sort(rng.choice(np.flatnonzero(np.arange(180) % 30), n, replace=False)) for n in sizes]
    places = np.concatenate(parts)
    values = rng.integers(-1, 5, len(places)).astype(np.float32)
    offsets = starts_of(sizes)
    recorded = Recorded(rows=places // 30, places=places, values=values, offsets=offsets)
    found = gathered(recorded, made.split, lookup(made, segments, codes))
    of_place = codes[places // 30 * 3 + places % 30 // 10]
    strays: list[tuple[int, int]] = []
    for split, fired in ((0, found.train), (2, found.test)):
        expected = []
        for latent in range(len(sizes)):
            mine = range(offsets[latent], offsets[latent + 1])
            for number in np.flatnonzero(made.split == split).tolist():
                base = int(made.places(np.array([number]))[0])
                inside = [(max(float(values[f]), 0.0), -int(places[f])) for f in mine if 0 <= places[f] - base < 4]
                if inside:
                    value, place = max(inside)  # of equal values the first place
                    expected.append((latent, number, value, -place))
        columns = (fired.latent, fired.window, fired.maximum, fired.peak)
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
        assert fired.offsets.tolist() == starts_of(np.bincount(fired.latent, minlength=len(sizes))).tolist()
    windows = {int(p) + i for p in made.places(np.arange(len(made))) for i in range(4)}
    for latent in range(len(sizes)):
        own = slice(offsets[latent], offsets[latent + 1])
        train, test = values[own][of_place[own] == 0], values[own][of_place[own] == 2]
        assert found.strongest[latent] == max(train.max(initial=0), 0)
        assert found.alive[latent] == bool((train > 0).any() or (test > 0).any())
        strays += [
            (latent, int(places[f]))
            for f in range(own.start, own.stop)
            if of_place[f] == 2 and int(places[f]) not in windows
        ]
    assert list(zip(found.stray_latent.tolist(), found.stray_place.tolist(), strict=True)) == strays
