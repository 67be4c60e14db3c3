"""Negative kinds, near-duplicates and weights: what is judged stands for the whole test frame."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import NEGATIVES, ExampleConfig, Negative
from exegete.errors import InputError
from exegete.examples import Proxy, StoreData, select, select_many
from exegete.examples.fired import Block
from exegete.types import STRATA, Array, ExampleSet, Firings, LatentId, Skipped

Make = Callable[..., Any]
WINDOW = 8
BASE = ExampleConfig(
    window=WINDOW, n_train=20, n_test=24, n_negatives=30, min_train=1, min_test=1, negatives=("same_token", "random")
)


@final
class Holding(Proxy):
    """Windows that hold one of some tokens."""

    def __init__(self, kind: Negative, tokens: set[int]) -> None:
        self.kind = kind
        self._tokens = tokens

    def windows(self, block: Block) -> tuple[Array, Array]:
        """Return them, whether they fire or not."""
        test = block.frame.numbers(2)
        found = test[np.isin(block.data.window_tokens(block.frame, test), list(self._tokens)).any(axis=1)]
        return np.arange(len(block) + 1) * len(found), np.tile(found, len(block))


PROXIES: dict[Negative, Proxy] = {
    "same_token": Holding("same_token", {3, 4}),
    "neighbour": Holding("neighbour", {4, 5}),
}


def repeated(make_store: Make, *, copies: int = 100, rate: float = 0.05) -> Any:
    """Return a store whose text repeats itself: half the rows are those of two documents, one token apart.

    All ``copies`` latents fire at the same places; not always in all copies of a text.
    """
    store = make_store(lengths=[50] * 100, rates=[rate], row=52)
    tokens = store.corpus.tokens
    for row in (*range(2, 100, 4), *range(3, 100, 4)):
        tokens[row, 1:51] = tokens[row % 2, 1:51]
        tokens[row, 1 + row % 50] = 6
    first = store.found[0]
    found = tuple(
        Firings(latent=LatentId(coder="toy", index=i), rows=first.rows, positions=first.positions, values=first.values)
        for i in range(copies)
    )
    return dataclasses.replace(store, found=found)


def data_of(store: Any) -> StoreData:
    """Return the data of a store with every other row of a test document, near-duplicates as they come."""
    return StoreData(store, np.where(np.arange(len(store.corpus.segments)) % 2, 2, 0).astype(np.int8))


def dense(store: Any, index: int = 0) -> Array:
    whole = np.zeros(store.corpus.tokens.shape, np.float32)
    firings = store.firings(index)
    whole[firings.rows, firings.positions] = firings.values
    return whole


def frame_of(store: Any, data: StoreData, config: ExampleConfig, split: int) -> tuple[Array, Array, Array, Array]:
    """Return tokens and activations [windows, window], documents and numbers of the windows of a split."""
    made = data.frame(WINDOW, 0, keep_bos=config.keep_bos)
    numbers = np.flatnonzero(made.split == split)
    columns = made.start[numbers][:, None] + np.arange(WINDOW)
    rows = made.row[numbers][:, None]
    return store.corpus.tokens[rows, columns], dense(store)[rows, columns], made.document[numbers], numbers


def sets_of(found: list[ExampleSet | Skipped]) -> list[ExampleSet]:
    sets = [f for f in found if isinstance(f, ExampleSet)]
    assert len(sets) == len(found)
    return sets


def close(sums: list[float], exact: float) -> bool:
    return bool(abs(np.mean(sums) - exact) <= 4.5 * np.std(sums) / len(sums) ** 0.5 + 1e-9 * abs(exact))


@pytest.mark.parametrize("strategy", ["quantiles", "bins", "random", "importance"])
@pytest.mark.parametrize("duplicates", [0.0, 0.6])
@pytest.mark.parametrize("negatives", [("random",), ("same_token", "neighbour", "random")])
def test_reweighted_windows_stand_for_all_of_the_frame(
    make_store: Make, strategy: Any, duplicates: float, negatives: Any
) -> None:
    """The weighted sum of any function of a window is unbiased, over firing and over silent windows alike."""
    store = repeated(make_store, copies=400)
    config = dataclasses.replace(BASE, test_strategy=strategy, duplicates=duplicates, negatives=negatives)
    data = data_of(store)
    sets = sets_of(select_many(data, range(400), config, 0, proxies=PROXIES))
    tokens, values, documents, _ = frame_of(store, data, config, 2)
    fires = values.max(axis=1) > 0
    assert sets[0].frame == len(fires)
    assert {s.firing_rate for s in sets} == {fires.mean()}
    most = max(int(s.part("test").multiplicity.max()) for s in sets)
    assert most > 2 if duplicates else most == 1
    for firing in (True, False):
        judged = [s.part("test", fires=firing) for s in sets]
        mine = fires == firing
        for function in (
            lambda t, a, d: np.ones(len(t)),
            lambda t, a, d: t.mean(axis=1),
            lambda t, a, d: a.max(axis=1) ** 2 + 1,
            lambda t, a, d: d * 1.0,
            lambda t, a, d: (t == 6).any(axis=1) * 1.0,  # told apart among near-duplicates only
        ):
            exact = float(function(tokens[mine], values[mine], documents[mine]).sum())
            sums = [float((function(w.tokens, w.activations, w.document) * w.weight).sum()) for w in judged]
            assert close(sums, exact), (firing, np.mean(sums), exact)


@pytest.mark.parametrize("strategy", ["quantiles", "bins", "random", "importance"])
@pytest.mark.parametrize("duplicates", [0.0, 0.6])
@pytest.mark.parametrize("negatives", [("random",), ("same_token", "neighbour", "random")])
def test_reweighted_windows_stand_for_documents_of_any_size(
    make_store: Make, strategy: Any, duplicates: float, negatives: Any
) -> None:
    """Few windows of a large document are judged, and yet it weighs as much as it holds; its copies wander."""
    copies = 300
    store = make_store(lengths=[50 * 40, 50 * 40, 50 * 8, *[50] * 50], rates=[0.06], row=51, seed=2)
    tokens = store.corpus.tokens
    tokens[80:100:3] = tokens[0]  # a passage of the large document, in others as well
    tokens[[81, 90]] = tokens[50]
    first = store.found[0]
    store = dataclasses.replace(
        store,
        found=tuple(dataclasses.replace(first, latent=LatentId(coder="toy", index=i)) for i in range(copies)),
    )
    config = dataclasses.replace(BASE, test_strategy=strategy, duplicates=duplicates, negatives=negatives)
    owner = store.corpus.segments[:, 3]
    data = StoreData(store, np.where((owner == 1) | (owner > 20) & (owner % 5 == 0), 0, 2).astype(np.int8))
    sets = sets_of(select_many(data, range(copies), config, 0, proxies=PROXIES))
    whole, values, documents, _ = frame_of(store, data, config, 2)
    fires = values.max(axis=1) > 0
    share = (documents == 0).mean()
    assert share > 0.25
    for firing in (True, False):
        judged = [s.part("test", fires=firing) for s in sets]
        mine = fires == firing
        taken = np.mean([(w.document == 0).mean() for w in judged])
        assert taken < 0.75 * share or (firing and strategy != "random")  # of a decile there are few anyhow
        for function in (
            lambda t, a, d: np.ones(len(t)),
            lambda t, a, d: (d == 0) * 1.0,
            lambda t, a, d: d * 1.0,
            lambda t, a, d: a.max(axis=1) ** 2 + t.mean(axis=1),
        ):
            exact = float(function(whole[mine], values[mine], documents[mine]).sum())
            sums = [float((function(w.tokens, w.activations, w.document) * w.weight).sum()) for w in judged]
            assert close(sums, exact), (firing, np.mean(sums), exact)


def test_train_windows_are_reweighted_too(make_store: Make) -> None:
    store = repeated(make_store, copies=300, rate=0.1)
    config = dataclasses.replace(BASE, duplicates=0.6, strategy="quantiles")
    data = data_of(store)
    sets = sets_of(select_many(data, range(300), config, 0, proxies=PROXIES))
    tokens, values, _, _ = frame_of(store, data, config, 0)
    exact = float(tokens[(values > 0).any(axis=1)].mean(axis=1).sum())
    shown = [s.part("train") for s in sets]
    assert close([float((w.tokens.mean(axis=1) * w.weight).sum()) for w in shown], exact)
    assert max(int(w.multiplicity.max()) for w in shown) > 2


def test_no_two_judged_windows_are_near_duplicates(make_store: Make) -> None:
    store = repeated(make_store, copies=3, rate=0.1)
    config = dataclasses.replace(BASE, duplicates=0.6, n_test=500, n_negatives=500)
    for found in sets_of(select_many(data_of(store), range(3), config, 0, proxies=PROXIES)):
        for fires in (True, False):
            windows = [set(zip(t, t[1:], t[2:], strict=False)) for t in found.part("test", fires=fires).tokens.tolist()]
            for i, one in enumerate(windows):
                assert all(len(one & other) / len(one | other) < 0.6 for other in windows[:i])
        assert len(found.part("test", fires=True)) < found.firing_rate * found.frame
        assert found.part("test", fires=True).weight.sum() == pytest.approx(found.firing_rate * found.frame)
        assert found.part("test", fires=False).weight.sum() == pytest.approx((1 - found.firing_rate) * found.frame)


def test_kinds_are_disjoint_by_priority_and_their_sizes_are_told(make_store: Make) -> None:
    store = make_store(lengths=[50] * 60, rates=[0.02, 0.05], row=52)
    config = dataclasses.replace(BASE, duplicates=0, negatives=("random", "neighbour", "same_token"))
    for index in (0, 1):
        found = sets_of([select(data_of(store), index, config=config, proxies=PROXIES)])[0]
        data = data_of(store)
        made = data.frame(WINDOW, 0)
        silent: Counter[str] = Counter()
        free: dict[str, Counter[int]] = {kind: Counter() for kind in ("same_token", "neighbour", "silent")}
        for row, start in zip(made.row[made.split == 2], made.start[made.split == 2], strict=True):
            span = slice(start, start + WINDOW)
            if not dense(store, index)[row, span].any():
                held = set(store.corpus.tokens[row, span].tolist())
                kind = "same_token" if held & {3, 4} else "neighbour" if held & {4, 5} else "silent"
                silent[kind] += 1
                free[kind][int(row)] += 1  # every row is a document
        assert found.strata == tuple((kind, silent[kind]) for kind in ("same_token", "neighbour", "silent"))
        windows = found.part("test", fires=False)
        drawn = Counter(e.stratum for e in windows)
        assert drawn == {"same_token": 10, "neighbour": 10, "silent": 10}
        for example in windows:
            held = set(example.tokens.tolist())
            fitting = "same_token" if held & {3, 4} else "neighbour" if held & {4, 5} else "silent"
            assert example.stratum == fitting
            own = free[fitting]
            cap, m = 3, own[example.document]
            while sum(min(n, cap) for n in own.values()) < 10:
                cap += 1
            kept = sum(min(n, cap) for n in own.values())
            assert example.inclusion_probability == pytest.approx(min(m, cap) / m * 10 / kept)


def test_silent_windows_of_no_kind_are_counted(make_store: Make) -> None:
    store = make_store(lengths=[50] * 60, rates=[0.02], row=52)
    config = dataclasses.replace(BASE, duplicates=0, negatives=("same_token",))
    found = sets_of([select(data_of(store), 0, config=config, proxies=PROXIES)])[0]
    sizes = dict(found.strata)
    assert list(sizes) == ["same_token", "unused"]
    assert sum(sizes.values()) == round((1 - found.firing_rate) * found.frame)
    assert set(found.part("test", fires=False).stratum.tolist()) == {STRATA.index("same_token")}


def test_negatives_may_be_silent_over_their_whole_document(make_store: Make) -> None:
    store = make_store(lengths=[50] * 80, rates=[0.012, 0.3], row=52, seed=2)
    config = dataclasses.replace(BASE, duplicates=0, silent="document", negatives=("same_token", "random"))
    data = data_of(store)
    found = sets_of([select(data, 0, config=config, proxies=PROXIES)])[0]
    quiet = dense(store).max(axis=1) == 0
    silent = found.part("test", fires=False)
    assert len(silent) == 30
    assert quiet[silent.row].all()
    made = data.frame(WINDOW, 0)
    free = int(quiet[made.row[made.split == 2]].sum())
    sizes = dict(found.strata)
    assert sizes["same_token"] + sizes["silent"] == free
    assert sizes["unused"] == round((1 - found.firing_rate) * found.frame) - free > 0
    everything = sets_of([select(data, 0, config=dataclasses.replace(config, n_negatives=10**6), proxies=PROXIES)])[0]
    assert everything.part("test", fires=False).weight.tolist() == [1.0] * free
    plain = dataclasses.replace(config, silent="window", n_negatives=10**6)
    whole = sets_of([select(data, 0, config=plain, proxies=PROXIES)])[0].part("test", fires=False)
    assert not quiet[whole.row].all()
    few = select(data, 1, config=config, proxies=PROXIES)  # it fires in every document
    assert isinstance(few, Skipped)
    assert (few.reason, few.have) == ("too few silent test windows", 0)


def test_a_firing_outside_of_all_windows_counts_for_its_document(make_store: Make) -> None:
    store = make_store(lengths=[9] * 60, rates=[0.05], row=12)
    data = data_of(store)
    made = data.frame(WINDOW, 0)
    outside = np.array([1 if start == 2 else 9 for start in made.start])  # of nine positions one is in no window
    loud = made.row[10:30]
    firings = Firings(
        latent=LatentId(coder="toy", index=0),
        rows=np.sort(np.concatenate([loud, made.row[:4]])),
        positions=np.concatenate([[5] * 4, outside[10:30]]).astype(np.int32),
        values=np.ones(24, np.float32),
    )
    data = data_of(dataclasses.replace(store, found=(firings,)))
    config = dataclasses.replace(BASE, duplicates=0, negatives=("random",), n_negatives=99)
    apart = sets_of([select(data, 0, config=dataclasses.replace(config, silent="document"))])[0]
    whole = sets_of([select(data, 0, config=config)])[0]
    assert set(whole.part("test", fires=False).row.tolist()) & set(loud.tolist())
    assert not set(apart.part("test", fires=False).row.tolist()) & set(loud.tolist())
    assert dict(apart.strata)["unused"] == 10


def test_a_window_may_begin_with_bos(make_store: Make) -> None:
    store = make_store(lengths=[50] * 60, rates=[0.2], row=52)
    for keep in (False, True):
        config = dataclasses.replace(
            BASE, keep_bos=keep, n_train=500, n_test=500, n_negatives=500, duplicates=0, negatives=("random",)
        )
        windows = sets_of([select(data_of(store), 0, config=config)])[0].windows
        at_bos = windows.start == 0
        assert at_bos.any() == keep
        assert ((windows.tokens == 0).any(axis=1) == at_bos).all()
        assert (windows.tokens[at_bos, 0] == 0).all()
        assert not windows.activations[at_bos, 0].any()


def test_a_kind_without_a_proxy_is_refused(make_store: Make) -> None:
    data = data_of(make_store(lengths=[50] * 60, rates=[0.2], row=52))
    with pytest.raises(InputError, match=r"kind near_miss need a proxy.*got \['neighbour', 'same_token'\]"):
        select(data, 0, config=dataclasses.replace(BASE, negatives=("near_miss", "random")), proxies=PROXIES)
    with pytest.raises(InputError, match=r"kind same_token need a proxy.*got none"):
        select(data, 0, config=BASE)
    for kinds in ((), ("random", "random"), ("nearby",)):
        with pytest.raises(InputError, match=r"negatives are some of near_miss, .*got"):
            select(data, 0, config=dataclasses.replace(BASE, negatives=kinds))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["train", "twice", "short", "more"])
def test_a_proxy_that_breaks_its_word_is_refused(make_store: Make, shape: str) -> None:
    @final
    class Wrong(Proxy):
        kind: Negative = "same_token"

        def windows(self, block: Block) -> tuple[Array, Array]:
            """Return what is none of the promised."""
            test = block.frame.numbers(2)
            if shape == "train":
                return np.array([0, 1]), block.frame.numbers(0)[:1]
            if shape == "twice":
                return np.array([0, 2]), test[[3, 3]]
            return (np.array([0]), test[:0]) if shape == "short" else (np.array([0, 2]), test[:3])

    data = data_of(make_store(lengths=[50] * 60, rates=[0.2], row=52))
    with pytest.raises(InputError, match="the proxy of same_token negatives"):
        select(data, 0, config=BASE, proxies={"same_token": Wrong()})


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.permutations(range(6)),
    st.sampled_from(["window", "document"]),
    st.sampled_from([0.0, 0.6]),
    st.sets(st.sampled_from(NEGATIVES[1:3] + NEGATIVES[4:]), min_size=1),
    st.sampled_from(["quantiles", "bins", "random", "importance"]),
    st.sampled_from(["top", "random", "quantiles", "bins", "mix", "importance", "diverse"]),
    st.booleans(),
)
def test_neither_order_nor_block_matters_and_all_that_is_said_is_true(
    make_store: Make,
    seed: int,
    order: list[int],
    silent: Any,
    duplicates: float,
    negatives: Any,
    test_strategy: Any,
    strategy: Any,
    centred: bool,
) -> None:
    base = repeated(make_store, copies=1)
    other = make_store(lengths=[50] * 100, rates=[0.01, 0.05, 0.0, 0.2, 0.004, 0.02], row=52)
    store = dataclasses.replace(other, corpus=base.corpus)
    config = dataclasses.replace(
        BASE, silent=silent, duplicates=duplicates, negatives=tuple(negatives), test_strategy=test_strategy,
        strategy=strategy, centred=centred, keep_bos=seed % 2 == 0,
    )  # fmt: skip
    data = data_of(store)
    together = select_many(data, order, config, seed, proxies=PROXIES)
    for index, found in zip(order, together, strict=True):
        alone = select(data_of(store), index, config=config, seed=seed, proxies=PROXIES)
        if isinstance(found, Skipped):
            assert alone == found
            continue
        assert isinstance(alone, ExampleSet)
        for column in dataclasses.fields(found.windows):
            assert np.array_equal(getattr(alone.windows, column.name), getattr(found.windows, column.name))
        assert (alone.strata, alone.maximum, alone.firing_rate) == (found.strata, found.maximum, found.firing_rate)
        truth, sizes = dense(store, index), Counter(e.stratum for e in found.part("test", fires=False))
        documents = Counter(data.frame(WINDOW, seed, keep_bos=config.keep_bos).document.tolist())
        for example in found.windows:
            span = slice(example.start, example.stop)
            assert (example.activations == truth[example.row, span]).all()
            assert (example.tokens == store.corpus.tokens[example.row, span]).all()
            assert (example.row % 2 == 1) == (example.split == "test")
            assert set(store.corpus.owners[example.row, span].tolist()) == {example.document}
            if not example.fires:
                assert example.split == "test"
                assert silent == "window" or not truth[example.row].any()
                least = sizes[example.stratum] / dict(found.strata)[example.stratum]
                held = documents[example.document]
                assert min(3 / held, 1) * least <= example.inclusion_probability * (1 + 1e-9) <= 1 + 1e-9
        assert sum(sizes.values()) == min(30, sum(n for kind, n in found.strata if kind != "unused"))
        assert len(found.part("train")) <= 20
        assert len(found.part("test", fires=True)) <= 24
