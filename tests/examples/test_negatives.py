"""What fires and what is silent, block by block, against slow and obvious ones."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.examples.clusters import Clusters, Units, clusters, units
from exegete.examples.draws import PER_DOCUMENT, allocate, starts_of
from exegete.examples.fired import Fired, Recorded, gathered
from exegete.examples.keys import mixed, nth
from exegete.examples.negatives import draw_silent, homes
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


DOCUMENTS = st.lists(st.integers(0, 4) | st.integers(0, 30), min_size=WIDTH, max_size=WIDTH)


@given(
    FRAMES | ALONE, CASES, st.integers(1, 9), st.integers(0, 99), st.booleans(), st.none() | DOCUMENTS, st.booleans()
)
def test_silent_windows_are_those_told_slowly(
    shape: tuple[list[int], list[int]],
    cases: list[tuple[set[int], ...]],
    n: int,
    seed: int,
    rest: bool,
    document: list[int] | None,
    ascending: bool,
) -> None:
    """Which units there are of each kind, what stands for them in which document, and what chance each had."""
    known, mine = clustered(*shape), set(shape[1])
    touched = [case[0] & mine for case in cases]
    barred = [(case[0] | case[1]) & mine for case in cases]
    kinds = [[case[i] & mine for case in cases] for i in (2, 3)]
    own = keys(len(cases), seed)
    if document is not None and ascending:
        document = sorted(document)

    def coded(sets: list[set[int]]) -> Array:
        return np.array([i * WIDTH + w for i, s in enumerate(sets) for w in sorted(s)], np.int64)

    def drawn_for(which: list[int]) -> list[list[Any]]:
        """Return the columns of each of these latents."""
        where = None if document is None else homes(known, np.array(document))
        told = [coded([sets[i] for i in which]) for sets in (touched, barred, *kinds)]
        found = draw_silent(told[0], told[1], [*told[2:], *([None] * rest)], known, n, own[which], where)
        assert (np.diff(found.latent) >= 0).all()
        columns = (found.kind, found.window, found.multiplicity, found.probability)
        units = [list(zip(*(c[found.latent == i].tolist() for c in columns), strict=True)) for i in range(len(which))]
        return [list(parts) for parts in zip(units, found.sizes.tolist(), found.unused.tolist(), strict=True)]

    together = drawn_for(list(range(len(cases))))
    assert drawn_for(list(range(len(cases)))[::-1]) == together[::-1]
    members = [known.members[a:b].tolist() for a, b in pairwise(known.offsets)]
    for latent, (judged, sizes, unused) in enumerate(together):
        assert drawn_for([latent]) == [[judged, sizes, unused]]
        free = [[w for w in cluster if w not in barred[latent]] for cluster in members]
        of: list[dict[int, int]] = [{} for _ in range(2 + rest)]  # for each kind: window that stands → how many
        for cluster, windows in enumerate(free):
            fitting = [k for k in range(2) if set(windows) & kinds[k][latent]]
            kind = fitting[0] if fitting else 2
            if windows and kind < len(of):
                bits = nth(nth(own[latent : latent + 1], np.array([2 + rest])), np.array([cluster]))
                of[kind][windows[int(bits[0]) % len(windows)]] = len(windows)
        assert sizes == [len(c) for c in of]
        silent = sum(any(w not in touched[latent] for w in cluster) for cluster in members)
        assert unused == silent - sum(sizes)
        shares = allocate(np.array([n]), np.array([sizes]))[0].tolist()
        assert [kind for kind, *_ in judged] == [kind for kind, share in enumerate(shares) for _ in range(share)]
        drawn = [window for _, window, _, _ in judged]
        assert len(drawn) == len(set(drawn)) == min(n, sum(sizes))
        assert not set(drawn) & barred[latent]  # peer's defect: negatives are drawn with replacement
        for kind, share in enumerate(shares):
            lies = Counter(0 if document is None else document[w] for w in of[kind])
            cap = len(of[kind]) if document is None else PER_DOCUMENT
            while sum(min(m, cap) for m in lies.values()) < share:
                cap += 1
            kept = sum(min(m, cap) for m in lies.values())
            taken: Counter[int] = Counter()
            for _, window, multiplicity, probability in (unit for unit in judged if unit[0] == kind):
                home = 0 if document is None else document[window]
                taken[home] += 1
                assert multiplicity == of[kind][window]
                assert probability == pytest.approx(min(lies[home], cap) / lies[home] * share / kept)
                assert 0 < probability <= 1
            assert max(taken.values(), default=0) <= cap


@pytest.mark.parametrize("shape", ["ascending", "mixed", "clustered", "wandering"])
@pytest.mark.parametrize("kinds", [0, 1])
@pytest.mark.parametrize("n", [4, 9])
def test_every_silent_window_is_drawn_as_often_as_its_chance_says(shape: str, kinds: int, n: int) -> None:
    """On a tiny frame, over many latents with other keys: reweighted counts of each window are 1 on average."""
    document = np.array([0] * 8 + [1] * 4 + [2, 2, 3] + [0] * 5)
    heads = {"clustered": [0, 0, 2, 3, 4, 5, 6, 6], "wandering": [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 1, 12, 2, 2]}
    head = heads.get(shape, [])
    known = clustered([*head, *range(len(head), 15)], list(range(15)))
    if shape == "mixed":
        document = document[np.random.default_rng(0).permutation(15)]
    m, touched = 8000, np.array([3, 8, 14])

    def coded(windows: Array | list[int]) -> Array:
        return (np.arange(m)[:, None] * WIDTH + windows).reshape(-1)

    asked = [coded([0, 4, 5, 6, 9, 12])][:kinds]
    found = draw_silent(
        coded(touched), coded(touched), [*asked, None], known, n, keys(m), homes(known, document[:WIDTH])
    )
    assert (np.bincount(found.latent) == n).all()
    weights = found.multiplicity / found.probability
    for window in range(15):
        if window in touched:
            assert window not in found.window
            continue
        sums = np.bincount(found.latent[found.window == window], weights[found.window == window], minlength=m)
        assert abs(sums.mean() - 1) < 4.5 * sums.std() / m**0.5 + 1e-9, window
    if shape in ("ascending", "mixed"):  # nothing of a unit is left to chance but whether it is drawn
        for window in set(found.window.tolist()):
            chance = set(found.probability[found.window == window].tolist())
            assert len(chance) == 1
            assert abs((found.window == window).sum() / m - min(chance)) < 4.5 * (0.25 / m) ** 0.5


def test_where_no_document_is_large_nothing_is_spread() -> None:
    known = clustered(list(range(WIDTH)), list(range(WIDTH)))
    small = homes(known, np.arange(WIDTH) // PER_DOCUMENT * 7)
    assert (small.n, small.document.tolist()) == (1, [0] * WIDTH)
    large = homes(known, np.array([9] * 4 + [7] * 16))
    assert (large.n, large.document.tolist()) == (2, [1] * 4 + [0] * 16)
    assert large.starts.tolist() == [0, 16, 20]
    assert large.settled.tolist() == [*range(4, 20), *range(4)]
    known = clustered([0, 1, 2, 3, 0, 1], [2, 3, 5, 8, 13, 4])
    assert homes(known, np.arange(WIDTH) // 6).wandering.tolist() == [0]


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
