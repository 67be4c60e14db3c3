"""Clusters of near-duplicates against exact Jaccard similarities of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.config import CorpusConfig
from exegete.errors import InputError
from exegete.store import duplicates, minhash
from exegete.store.corpus import Corpus, TextDocument, build_corpus, open_corpus
from exegete.store.duplicates import ClusterCounts, cluster_counts, document_clusters, window_clusters
from exegete.tokens import TokenTable
from exegete.types import Array, Rows

Texts = Sequence[Sequence[int]]
BOS = 0


class Laid:
    """Documents laid out in rows: each from a new row on, or packed; BOS first in every row, which does not count."""

    def __init__(self, texts: Texts, *, row: int = 16, packed: bool = False, bos: bool = False) -> None:
        self.documents = [str(i) for i in range(len(texts))]
        lines: list[list[tuple[int, int]]] = []
        for owner, text in enumerate(texts):
            if not packed or not lines:
                lines.append([])
            for token in text:
                if len(lines[-1]) == row - bos:
                    lines.append([])
                lines[-1].append((owner, token))
        lines = [line for line in lines if line]
        self._tokens = np.zeros((len(lines), row), np.uint32)
        self._owners = np.full((len(lines), row), -1, np.int32)
        segments = []
        for number, line in enumerate(lines):
            owners = [owner for owner, _ in line]
            self._tokens[number, bos : bos + len(line)] = [token for _, token in line]
            self._owners[number, bos : bos + len(line)] = owners
            if bos:
                self._tokens[number, 0], self._owners[number, 0] = BOS, owners[0]
            for owner in sorted(set(owners)):
                start = bos + owners.index(owner)
                segments.append((number, start, start + owners.count(owner), owner))
        self.segments: Array = np.array(segments, np.int64).reshape(-1, 4)
        self._bos = bos

    def rows(self, index: slice, /) -> Rows:
        mask = self._owners[index] >= 0
        if self._bos:
            mask[:, 0] = False
        return Rows(tokens=self._tokens[index], documents=self._owners[index], mask=mask)


def grams(text: Sequence[int], size: int) -> set[tuple[int, ...]]:
    size = min(size, len(text))
    return {tuple(text[i : i + size]) for i in range(len(text) - size + 1)} if size else set()


def exact(texts: Texts, size: int, threshold: float) -> list[int]:
    """All pairs, compared one by one: the smallest member of each text's chain of similar ones."""
    members = list(range(len(texts)))
    sets = [grams(text, size) for text in texts]
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            common = len(one & other)
            if common and common / (len(one) + len(other) - common) >= threshold and members[i] != members[j]:
                low, high = sorted((members[i], members[j]))
                members = [low if m == high else m for m in members]
    return members


def within(fine: Sequence[int], coarse: Sequence[int]) -> bool:
    """Whether every cluster of one lies in a cluster of the other."""
    return all(coarse[i] == coarse[m] for i, m in enumerate(fine))


def planted(seed: int, lengths: tuple[int, int], n: int, vocabulary: int) -> list[list[int]]:
    """Random texts, each with some copies in which a share of the tokens is changed, dropped or put in."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        base = rng.integers(1, vocabulary, rng.integers(*lengths)).tolist()
        texts.append(base)
        for rate in rng.choice([0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.3], 3):
            copy = []
            for token in base:
                change = rng.random() / rate if rate else 1.0
                if change >= 1.0:
                    copy.append(token)
                elif change < 0.33:
                    copy.append(int(rng.integers(1, vocabulary)))
                elif change < 0.66:
                    copy += [token, int(rng.integers(1, vocabulary))]
            texts.append(copy)
    return [texts[i] for i in rng.permutation(len(texts))]


def documents_of(texts: Texts, threshold: float = 0.8, **layout: Any) -> list[int]:
    return list(map(int, document_clusters(Laid(texts, **layout), threshold)))


def windows_of(windows: Any, threshold: float = 0.8) -> list[int]:
    held = np.asarray(windows)
    return list(map(int, window_clusters(lambda a, b: held[a:b], len(held), threshold)))


# -- against all pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "vocabulary"), [((3, 40), 30), ((40, 200), 2000), ((500, 1500), 200), ((700, 800), 3)]
)
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_documents_cluster_as_all_pairs_do(lengths: tuple[int, int], vocabulary: int, threshold: float) -> None:
    texts = planted(7, lengths, 15, vocabulary)
    found = documents_of(texts, threshold, packed=True, row=64)
    # Similarities of long documents are estimated: five standard errors on either side.
    margin = 0.08 if lengths[1] <= 40 else 0.16
    sure, possible = (exact(texts, 5, min(threshold + shift, 1.0)) for shift in (margin, -margin))
    assert within(sure, found)
    assert within(found, possible)
    assert len(set(sure)) < len(texts)


@pytest.mark.parametrize(("window", "vocabulary"), [(16, 40), (32, 5000), (64, 20), (2, 5), (3, 4)])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_windows_cluster_as_all_pairs_do(window: int, vocabulary: int, threshold: float) -> None:
    texts = [
        (text * 2)[:window] for text in planted(window, (window, window + 8), 60, vocabulary) if len(text) > window / 2
    ]
    expected = exact(texts, 3, threshold)
    assert windows_of(texts, threshold) == expected
    assert len(set(expected)) < len(texts)


def test_one_changed_token_of_a_window_is_found_nearly_always() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 16, (4000, 32))
    changed = base.copy()
    changed[np.arange(4000), rng.integers(0, 32, 4000)] += 1 << 16
    found = np.array(windows_of(np.concatenate([base, changed])))
    assert (found[:4000] == np.arange(4000)).all()
    assert (found[4000:] == np.arange(4000)).mean() > 0.995


def test_similar_documents_are_found_nearly_always_however_long() -> None:
    rng = np.random.default_rng(1)
    for length, edits in ((30, 1), (100, 2), (400, 8)):  # Jaccard 21/31, 86/106 and at least 356/436
        base = rng.integers(1, 50_000, (300, length))
        changed = base.copy()
        for line in changed:
            line[rng.choice(np.arange(5, length - 5, 10 if edits > 1 else 1), edits, replace=False)] = 60_000
        texts = [*base.tolist(), *changed.tolist()]
        found = np.array(documents_of(texts, 0.5 if edits == 1 else 0.7, row=512))
        assert (found[300:] == np.arange(300)).mean() > 0.98
        assert (found[:300] == np.arange(300)).all()


def test_dissimilar_documents_stay_apart_though_many() -> None:
    rng = np.random.default_rng(2)
    half = rng.integers(1, 9000, 400).tolist()  # a header shared by all: Jaccard about 396 / 904
    texts = [half + rng.integers(1, 9000, 250).tolist() for _ in range(400)]
    assert documents_of(texts, 0.8, packed=True, row=256) == list(range(400))


def test_the_estimate_is_unbiased_and_as_exact_as_said() -> None:
    rng = np.random.default_rng(3)
    for shared, alone in ((800, 100), (300, 350), (20, 2), (4, 1)):
        tokens = rng.integers(0, 1 << 40, (400, shared + 2 * alone, 1)).astype(np.uint64)
        hashes = minhash.shingles(tokens, 1)[..., 0]
        held = []
        for part in (hashes[:, : shared + alone], np.delete(hashes, np.s_[shared : shared + alone], axis=1)):
            smallest = np.full((256, 400), minhash.EMPTY, np.uint64)
            minhash.minima(part.reshape(-1), np.repeat(np.arange(400), part.shape[1]), smallest)
            bits = np.minimum(smallest.astype(np.uint16), 0xFFFE)
            held.append(np.where(smallest == minhash.EMPTY, 0xFFFF, bits).astype(np.uint16).T)
        truth = shared / (shared + 2 * alone)
        error = duplicates._estimate(*held) - truth
        assert abs(error.mean()) < 4 * (truth * (1 - truth) / 256 / 400) ** 0.5
        assert error.std() < 1.15 * (truth * (1 - truth) / 256) ** 0.5


# -- what must hold of any texts --------------------------------------------------------------------------------------

TEXT = st.lists(st.integers(1, 3), max_size=14)
CORPUS = st.lists(TEXT, min_size=1, max_size=12)


@given(CORPUS, st.randoms(use_true_random=False), st.sampled_from([0.5, 0.8, 1.0]))
@settings(max_examples=25)
def test_clusters_depend_on_the_texts_alone(texts: list[list[int]], random: Any, threshold: float) -> None:
    found = documents_of(texts, threshold)
    assert all(found[m] == m <= i for i, m in enumerate(found))  # named by the smallest member
    assert found == documents_of(texts, threshold)
    for layout in ({"packed": True}, {"bos": True}, {"row": 3, "packed": True, "bos": True}, {"row": 64}):
        assert documents_of(texts, threshold, **layout) == found
    order = list(range(len(texts)))
    random.shuffle(order)
    again = documents_of([texts[i] for i in order], threshold)
    assert {frozenset(i for i, m in enumerate(found) if m == name) for name in found} == {
        frozenset(order[i] for i, m in enumerate(again) if m == name) for name in again
    }


@given(CORPUS)
@settings(max_examples=40)
def test_few_tokens_cluster_as_all_pairs_do(texts: list[list[int]]) -> None:
    # So few n-grams hardly ever share a bin, so that the estimate is nearly exact.
    found = documents_of(texts, 0.8)
    assert within(exact(texts, 5, 0.88), found)
    assert within(found, exact(texts, 5, 0.65))
    for i, text in enumerate(texts):
        for j in range(i):
            if text and text == texts[j]:
                assert found[i] == found[j]
            elif min(len(text), len(texts[j])) < 5:
                assert found[i] != found[j]


@given(CORPUS, st.integers(1, 20))
@settings(max_examples=40)
def test_tokens_may_come_in_pieces_of_any_size(texts: list[list[int]], size: int) -> None:
    laid = Laid(texts, row=2, packed=True)
    whole = document_clusters(laid, 0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_CHUNK", size)
        patch.setattr(duplicates, "_SETS", 2)
        assert document_clusters(laid, 0.8).tolist() == whole.tolist()


def test_the_end_of_a_document_is_no_short_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CHUNK", 1)  # a row at a time: the first document ends with its piece
    assert documents_of([[1, 2, 3, 4, 5], [2, 3, 4, 5]], 0.5, row=5) == [0, 1]


@given(st.integers(1, 5).flatmap(lambda w: st.lists(st.tuples(*[st.integers(0, 2)] * w), min_size=1, max_size=30)))
@settings(max_examples=60)
def test_clusters_of_windows_are_those_of_all_pairs(windows: list[tuple[int, ...]]) -> None:
    found = windows_of(windows)
    assert all(found[m] == m <= i for i, m in enumerate(found))
    assert found == exact(windows, 3, 0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_SETS", 3)
        assert windows_of(windows) == found


# -- traps ------------------------------------------------------------------------------------------------------------


def test_short_and_empty_documents() -> None:
    texts = [[], [1, 2], [1, 2, 3, 4], [1, 2], [], [2, 1], [1, 2, 3, 4], [1, 2, 3, 4, 5], [9], [0, 9], [9]]
    for layout in ({}, {"packed": True}, {"packed": True, "row": 2, "bos": True}):
        assert documents_of(texts, 0.5, **layout) == [0, 1, 2, 1, 4, 5, 2, 7, 8, 9, 8]
    assert documents_of([]) == []
    assert documents_of([[], []]) == [0, 1]
    assert documents_of([[5]]) == [0]


def test_a_document_in_a_longer_one_is_no_near_duplicate() -> None:
    long = list(range(1, 400))
    assert documents_of([long, long[:60], long[:380], long[200:]]) == [0, 1, 0, 3]


def test_repeated_tokens_count_once() -> None:
    assert documents_of([[7] * 500, [7] * 6, [7] * 4, [8] * 500]) == [0, 0, 2, 3]
    assert windows_of([[7] * 32, [8] * 32, [7] * 32, [7] * 31 + [8]]) == [0, 1, 0, 3]


def test_chains_join_and_are_counted() -> None:
    line = list(range(1, 300))
    texts = [line[start : start + 100] for start in range(0, 60, 5)]  # neighbours 91 / 101, ends 41 / 151
    found = document_clusters(Laid([*texts, line]), 0.8)
    assert found.tolist() == [0] * 12 + [12]
    assert cluster_counts(found) == ClusterCounts(items=13, clustered=12, clusters=1, largest=12)
    assert cluster_counts(np.array([0, 0, 2, 2, 4])) == ClusterCounts(items=5, clustered=4, clusters=2, largest=2)
    assert cluster_counts(np.zeros(0, np.int64)) == ClusterCounts(items=0, clustered=0, clusters=0, largest=0)


def test_equal_windows_are_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Array) -> Array:
        raise AssertionError("equal windows were compared")

    monkeypatch.setattr(duplicates, "_jaccard", refuse)
    windows = np.tile(np.arange(16).reshape(2, 8), (20_000, 1))
    assert windows_of(windows) == [0, 1] * 20_000


def test_equal_documents_are_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Array) -> Array:
        raise AssertionError("equal documents were compared")

    monkeypatch.setattr(duplicates, "_estimate", refuse)
    assert documents_of([[1, 2, 3, 4, 5, 6], [9, 8, 7]] * 500, packed=True) == [0, 1] * 500


def test_a_crowded_bucket_is_not_compared_in_full() -> None:
    asked = 0

    def same(left: Array, right: Array) -> Array:
        nonlocal asked
        asked += len(left)
        return np.zeros(len(left), dtype=bool)

    n = 1000
    content = np.arange(n, dtype=np.uint64)
    assert minhash.clusters(np.zeros((n, 2), np.uint32), content, same).tolist() == list(range(n))
    assert asked == 2 * sum(n - look for look in range(1, minhash.LOOKS + 1))
    asked = 0
    small = minhash.LOOKS + 1
    minhash.clusters(np.zeros((small, 1), np.uint32), content[:small], same)
    assert asked == small * (small - 1) / 2  # every pair


def test_a_crowded_bucket_is_compared_the_same_in_any_order() -> None:
    rng = np.random.default_rng(4)
    content = rng.permutation(300).astype(np.uint64)
    found = []
    for order in (np.arange(300), rng.permutation(300)):
        held = content[order]

        def same(left: Array, right: Array, held: Array = held) -> Array:
            return np.asarray((held[left] + held[right]) % 25 == 0)

        members = minhash.clusters(np.zeros((300, 1), np.uint32), held, same)
        found.append({frozenset(held[members == name].tolist()) for name in np.unique(members)})
    assert found[0] == found[1]
    assert 1 < len(found[0]) < 300


def test_a_crowded_bucket_of_near_duplicates_costs_one_look() -> None:
    asked = 0

    def same(left: Array, right: Array) -> Array:
        nonlocal asked
        asked += len(left)
        return np.ones(len(left), dtype=bool)

    content = np.arange(5000, dtype=np.uint64)
    assert minhash.clusters(np.zeros((5000, 9), np.uint32), content, same).tolist() == [0] * 5000
    assert asked == 4999


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30), st.integers(1, 5))
def test_joined_numbers_are_known_by_the_smallest(pairs: list[tuple[int, int]], parts: int) -> None:
    union = minhash.Union(20)
    expected = list(range(20))
    for part in range(parts):
        some = pairs[part::parts]
        union.join(np.array([a for a, _ in some], np.int64), np.array([b for _, b in some], np.int64))
        for a, b in some:
            low, high = sorted((expected[a], expected[b]))
            expected = [low if m == high else m for m in expected]
        assert union.roots(np.arange(20)).tolist() == expected


def test_bands() -> None:
    scheme = minhash.Scheme.of(64, 0.8)
    # Four rows a band: (1 − 0.8⁴)^16 = 0.0002 miss; five would let (1 − 0.8⁵)^12 = 0.008 slip.
    assert (scheme.bins, scheme.bands, scheme.rows) == (64, 16, 4)
    assert minhash.Scheme.of(64, 0.5).rows == 2
    assert minhash.Scheme.of(64, 1.0).rows == 16


@pytest.mark.parametrize("threshold", [-0.1, 0.3, 1.01, float("nan")])
def test_wrong_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=r"between 0\.5 and 1, or is 0 for none"):
        documents_of([[1], [1]], threshold)
    with pytest.raises(InputError, match=r"between 0\.5 and 1, or is 0 for none"):
        windows_of([[1], [1]], threshold)


def test_zero_keeps_everything_apart() -> None:
    assert documents_of([[1, 2], [1, 2]], 0) == [0, 1]
    assert windows_of([[1, 2], [1, 2]], 0) == [0, 1]
    assert window_clusters(lambda a, b: np.zeros((b - a, 4), np.int64), 0, 0.8).tolist() == []


# -- kept beside a corpus ---------------------------------------------------------------------------------------------


class Ids:
    """As much of a tokenizer as a corpus of token ids asks for."""

    is_fast = False
    bos_token_id = BOS
    eos_token_id = BOS

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(100)}


def on_disk(folder: Path, texts: Texts, **options: Any) -> Corpus:
    table = TokenTable([b"", *(f"t{i}".encode() for i in range(1, 100))], special=[BOS])
    given = [TextDocument(key=f"d{i}", ids=np.array(text, np.int64)) for i, text in enumerate(texts)]
    config = CorpusConfig(**{"row_length": 8, **options})
    tokenizer: Any = Ids()
    return build_corpus(folder, given, tokenizer, config, table=table)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    real: Callable[..., Array] = duplicates._document_clusters

    def count(corpus: Any, n: int, threshold: float) -> Array:
        found.append(threshold)
        return real(corpus, n, threshold)

    monkeypatch.setattr(duplicates, "_document_clusters", count)
    return found


def test_a_real_corpus_packed_or_not(tmp_path: Path) -> None:
    texts = [[t for t in text if t] for text in planted(5, (3, 60), 12, 100)]
    texts = [text for text in texts if text]
    expected = documents_of(texts)
    layouts: list[dict[str, Any]] = [
        {"bos": "row"},
        {"bos": "document", "packing": True},
        {"bos": "none", "packing": True, "separator": "eos"},
        {"bos": "none", "row_length": 64},
    ]
    for number, options in enumerate(layouts):
        corpus = on_disk(tmp_path / str(number), texts, **options)
        assert document_clusters(corpus, 0.8).tolist() == expected


def test_clusters_are_kept_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = on_disk(tmp_path, [[1, 2, 3], [4, 5], [1, 2, 3]])
    made = counting(monkeypatch)
    for _ in range(2):
        assert document_clusters(corpus, 0.8).tolist() == [0, 1, 0]
    assert made == [0.8]
    assert document_clusters(open_corpus(tmp_path), 0.8).tolist() == [0, 1, 0]
    assert made == [0.8]
    assert document_clusters(corpus, 0.9).tolist() == [0, 1, 0]
    assert document_clusters(corpus, 0.8).tolist() == [0, 1, 0]
    assert made == [0.8, 0.9, 0.8]


@pytest.mark.parametrize("name", [duplicates.ARRAY, duplicates.MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "other"])
def test_damaged_clusters_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    corpus = on_disk(tmp_path / "a", [[1, 2, 3], [4, 5], [1, 2, 3]])
    document_clusters(corpus, 0.8)
    path = corpus.folder / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "gone":
        path.unlink()
    else:
        other = on_disk(tmp_path / "b", [[1, 2, 3], [1, 2, 3], [1, 2, 3]])
        document_clusters(other, 0.8)
        path.write_bytes((other.folder / name).read_bytes())
    made = counting(monkeypatch)
    for _ in range(2):
        assert document_clusters(corpus, 0.8).tolist() == [0, 1, 0]
    assert made == [0.8]


def test_a_corpus_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = on_disk(tmp_path, [[1, 2, 3], [1, 2, 3]])

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(duplicates, "write_array", refuse)
    assert document_clusters(corpus, 0.8).tolist() == [0, 0]
    assert not (tmp_path / duplicates.ARRAY).exists()
