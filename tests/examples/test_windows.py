from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.examples.windows import activations, centred, frame, joined, lookup, stretches
from exegete.types import Array, Rows


def rows_of(owners: list[list[int]], mask: list[list[int]] | None = None) -> Rows:
    documents = np.array(owners, dtype=np.int32)
    counted = documents >= 0 if mask is None else np.array(mask, dtype=bool)
    return Rows(
        tokens=np.arange(documents.size, dtype=np.uint32).reshape(documents.shape), documents=documents, mask=counted
    )


def plain(n: int, length: int, *, bos: bool = False) -> Rows:
    mask = np.ones((n, length), dtype=bool)
    mask[:, 0] = not bos
    return Rows(tokens=np.zeros((n, length), np.uint32), documents=np.zeros((n, length), np.int32), mask=mask)


MESSY = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(-1, 2), min_size=12, max_size=12), min_size=n, max_size=n),
        st.lists(st.lists(st.integers(0, 4), min_size=12, max_size=12), min_size=n, max_size=n),
        st.integers(1, 5),
        st.integers(0, 99),
    )
)


def test_stretches_by_hand() -> None:
    rows = rows_of(
        [[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2], [-1, -1, -1, -1, -1, -1]],
        [[0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    )
    row, first, last = stretches(rows)
    assert list(zip(row.tolist(), first.tolist(), last.tolist(), strict=True)) == [
        (0, 1, 3), (0, 3, 5), (1, 0, 2), (1, 3, 6),
    ]  # fmt: skip


@given(MESSY)
def test_the_frame_holds_each_counted_position_at_most_once(
    case: tuple[list[list[int]], list[list[int]], int, int],
) -> None:
    owners, counted, window, seed = case
    rows = rows_of(owners, [[int(c > 0) for c in line] for line in counted])
    made = frame(rows, window, seed=seed)
    taken = np.zeros(rows.documents.shape, dtype=int)
    for row, start, document in zip(made.row, made.start, made.document, strict=True):
        span = slice(start, start + window)
        assert start + window <= rows.length
        assert rows.mask[row, span].all()
        assert set(rows.documents[row, span].tolist()) == {int(document)}
        assert document >= 0
        taken[row, span] += 1
    assert taken.max(initial=0) <= 1
    places = made.row * rows.length + made.start
    assert (np.diff(places) >= window).all()
    # No stretch that could hold a window is left without one, and what is left at its ends is shorter than a window.
    for row, first, last in zip(*stretches(rows), strict=True):
        mine = made.start[(made.row == row) & (made.first == first)]
        assert (made.last[(made.row == row) & (made.first == first)] == last).all()
        assert bool(len(mine)) == (last - first >= window)
        if len(mine):
            assert mine[0] - first < window
            assert last - mine[-1] < 2 * window
            assert (np.diff(mine) == window).all()


@given(st.integers(0, 2**63), st.permutations(range(12)))
def test_the_offset_depends_on_seed_and_row_alone(seed: int, order: list[int]) -> None:
    rows = plain(12, 40)
    whole = frame(rows, 8, seed=seed, numbers=np.arange(12) + 100)
    numbers = np.array(order[:5]) + 100
    part = frame(plain(5, 40), 8, seed=seed, numbers=numbers)
    for place, number in enumerate(numbers):
        assert part.start[part.row == number].tolist() == whole.start[whole.row == number].tolist()
        assert (part.row == number).sum() == (whole.row == order[place] + 100).sum() > 0


def test_offsets_are_uniform_over_the_window() -> None:
    made = frame(plain(20_000, 256, bos=True), 32, seed=7)
    first = made.start[np.flatnonzero(np.diff(made.row, prepend=-1))] - 1  # BOS stands at position 0
    counts = np.bincount(first, minlength=32)
    assert len(counts) == 32
    assert ((counts - 625) ** 2 / 625).sum() < 61.1  # chi-square, 31 degrees of freedom, p = .001
    assert len(made) == 20_000 * 7
    other = frame(plain(20_000, 256, bos=True), 32, seed=8)
    assert 0.01 < (made.start == other.start).mean() < 0.06  # 1/32 by chance


def test_stretches_of_one_row_have_offsets_of_their_own() -> None:
    owners = [[0] * 20 + [1] * 20] * 60
    made = frame(rows_of(owners), 8, seed=0)
    offsets = [
        (
            int(made.start[(made.row == r) & (made.first == 0)][0]),
            int(made.start[(made.row == r) & (made.first == 20)][0]),
        )
        for r in range(60)
    ]
    assert sum(a == b - 20 for a, b in offsets) < 25  # 1/8 by chance


def test_short_stretches_keep_their_one_window() -> None:
    starts = set()
    for seed in range(200):
        made = frame(plain(1, 10), 8, seed=seed)
        assert len(made) == 1
        starts.add(int(made.start[0]))
    assert starts == {0, 1, 2}
    assert len(frame(plain(5, 7), 8, seed=0)) == 0
    assert len(frame(plain(5, 8), 8, seed=0)) == 5
    assert {len(frame(plain(1, 15), 8, seed=s)) for s in range(50)} == {1}
    assert {len(frame(plain(1, 16), 8, seed=s)) for s in range(50)} == {1, 2}


def test_no_window_holds_bos_or_padding() -> None:
    owners = [[0] * 30 + [-1] * 10] * 40
    mask = [[0] + [1] * 29 + [0] * 10] * 40
    made = frame(rows_of(owners, mask), 8, seed=3)
    assert made.start.min() >= 1
    assert (made.start + 8).max() <= 30


def test_a_frame_without_rows_and_wrong_arguments() -> None:
    assert len(frame(plain(0, 10), 4, seed=0)) == 0
    with pytest.raises(InputError, match="at least one token, got 0"):
        frame(plain(1, 10), 0, seed=0)
    with pytest.raises(InputError, match="one number"):
        frame(plain(2, 10), 4, seed=0, numbers=np.arange(3))


@given(MESSY)
def test_pieces_make_the_same_frame(case: tuple[list[list[int]], list[list[int]], int, int]) -> None:
    owners, counted, window, seed = case
    rows = rows_of(owners, [[int(c > 0) for c in line] for line in counted])
    whole = frame(rows, window, seed=seed)
    pieces = [
        frame(
            Rows(tokens=rows.tokens[i : i + 1], documents=rows.documents[i : i + 1], mask=rows.mask[i : i + 1]),
            window,
            seed=seed,
            numbers=np.array([i]),
        )
        for i in range(len(rows))
    ]
    made = joined(pieces)
    assert made.n_rows == len(rows)
    for name in ("row", "start", "document", "split", "first", "last"):
        assert getattr(made, name).tolist() == getattr(whole, name).tolist()
        assert getattr(made, name).dtype == getattr(whole, name).dtype


@given(MESSY)
def test_every_position_knows_its_window_and_its_split(case: tuple[list[list[int]], list[list[int]], int, int]) -> None:
    owners, counted, window, seed = case
    rows = rows_of(owners, [[int(c > 0) for c in line] for line in counted])
    made = frame(rows, window, seed=seed)
    segments, codes = [], []
    expected = np.full(rows.documents.shape, -4)
    for r, line in enumerate(owners):
        edges = [0, *(i for i in range(1, 12) if line[i] != line[i - 1]), 12]
        for start, stop in pairwise(edges):
            if line[start] >= 0:
                segments.append((r, start, stop, line[start]))
                codes.append((line[start] + r) % 4 - 1)
                expected[r, start:stop] = -1 - codes[-1] if codes[-1] >= 0 else -4
    for number, (row, start) in enumerate(zip(made.row, made.start, strict=True)):
        expected[row, start : start + window] = number
    table = lookup(made, np.array(segments, np.int64).reshape(-1, 4), np.array(codes, np.int8))
    places = np.arange(expected.size)
    assert table.windows(places // 12, places).tolist() == expected.reshape(-1).tolist()
    assert table.nth.itemsize == 1


def test_a_row_of_very_many_windows_is_looked_up_too() -> None:
    made = frame(plain(2, 600), 1, seed=0)
    table = lookup(made, np.array([[0, 0, 600, 0], [1, 0, 600, 0]]), np.array([0, 2], np.int8))
    assert table.nth.dtype == np.uint16
    assert table.windows(np.repeat([0, 1], 600), np.arange(1200)).tolist() == list(range(1200))


def test_special_tokens_that_stand_before_a_text_may_begin_its_window() -> None:
    tokens = np.array([[7, 8, 1, 2, 3, 4, 7, 5, 6, 1, 8, 9]], np.uint32)  # 7 and 8 are special
    mask = np.array([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0]], bool)
    documents = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]], np.int32)
    rows = Rows(tokens=tokens, documents=documents, mask=mask)

    def spans(window: int, special: list[int] | None) -> set[tuple[int, int]]:
        made = [frame(rows, window, seed=s, special=special) for s in range(40)]
        assert all(m.keep_bos == (special is not None) for m in made)
        return {(int(a), int(b)) for m in made for a, b in zip(m.first, m.last, strict=True)}

    assert spans(3, None) == {(2, 6), (7, 10)}
    assert spans(3, [7, 8]) == {(0, 6), (6, 10)}
    assert spans(3, [8]) == {(1, 6), (7, 10)}  # 7 is left out for another reason
    assert spans(2, [7, 8]) == {(1, 6), (6, 10)}  # a window holds some text
    assert spans(1, [7, 8]) == {(2, 6), (7, 10)}
    starts = [frame(rows, 3, seed=s, special=[7, 8]).start.tolist() for s in range(60)]
    assert {line[0] for line in starts} == {0, 1, 2}


def fire(size: int, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    places = np.sort(rng.choice(size, n, replace=False))
    return places, rng.integers(-1, 5, n).astype(np.float32)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 60))
def test_activations_are_the_slow_obvious_ones(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    places, values = fire(120, rng, n)
    whole = np.zeros(120, np.float32)
    whole[places] = values
    base = rng.integers(0, 113, 9)  # overlapping and repeated windows too
    dense = activations(places, values, base, 7)
    assert dense.dtype == np.float32
    assert dense.tolist() == [whole[b : b + 7].tolist() for b in base]
    assert activations(places, values, base[:0], 7).shape == (0, 7)


def test_a_centred_window_is_centred() -> None:
    """Peer's defect: the centring flag is inverted, so "centred" windows are not and their negatives give it away."""
    made = frame(plain(3, 100, bos=True), 8, seed=1)
    for position, start in [(50, 46), (1, 1), (4, 1), (5, 1), (6, 2), (99, 92), (95, 91), (96, 92), (97, 92)]:
        window = int(np.flatnonzero(made.row == 2)[0])
        assert centred(made, np.array([window]), np.array([2 * 100 + position])).tolist() == [200 + start]


def test_centred_windows_stay_in_their_stretch() -> None:
    made = frame(rows_of([[0] * 12 + [1] * 12]), 4, seed=0)
    for number, begin in enumerate(made.start.tolist()):
        peaks = np.arange(begin, begin + 4)
        start = centred(made, np.full(4, number), peaks)
        assert all(s + 4 <= 12 for s in start.tolist()) if begin < 12 else (start >= 12).all()
        assert ((start <= peaks) & (peaks < start + 4)).all()


@given(MESSY)
def test_centred_windows_of_different_frame_windows_differ(
    case: tuple[list[list[int]], list[list[int]], int, int],
) -> None:
    owners, counted, window, seed = case
    made = frame(rows_of(owners, [[int(c > 0) for c in line] for line in counted]), window, seed=seed)
    numbers = np.repeat(np.arange(len(made)), window)
    places = made.places(numbers) + np.tile(np.arange(window), len(made))
    start = centred(made, numbers, places)
    owner: dict[int, int] = {}
    for place, number in zip(start.tolist(), numbers.tolist(), strict=True):
        assert owner.setdefault(place, number) == number


def test_the_frame_is_pinned() -> None:
    # A stored run must not change its windows with a version.
    assert frame(plain(6, 64, bos=True), 16, seed=5).start.tolist() == [
        11,
        27,
        43,
        8,
        24,
        40,
        16,
        32,
        48,
        12,
        28,
        44,
        15,
        31,
        47,
        15,
        31,
        47,
    ]
