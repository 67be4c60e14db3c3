"""TF-IDF against scikit-learn; embeddings kept, and refused with one line where they cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from exegete.errors import CorruptError, MissingExtraError, NotFoundError
from exegete.examples.similar import Embeddings, TfIdf
from exegete.tokens import TokenTable
from exegete.types import Array

TABLE = TokenTable([f"w{i} ".encode() for i in range(40)])


def texts(tokens: Array) -> list[str]:
    return [" ".join(f"t{t}" for t in window) for window in tokens.tolist()]


def windows(seed: int, n: int, *, window: int = 6, ids: int = 40) -> Array:
    rng = np.random.default_rng(seed)
    drawn: Array = (ids * rng.random((n, window)) ** 2).astype(np.uint32)
    return drawn


def oracle(searched: Array, pattern: Array) -> Array:
    """Cosine of every searched window to the mean of the pattern's, by scikit-learn and plain algebra."""
    model = TfidfVectorizer(analyzer=str.split, vocabulary=[f"t{i}" for i in range(40)])
    held = model.fit_transform(texts(searched)).toarray()
    mean = model.transform(texts(pattern)).toarray().mean(axis=0)
    like: Array = held @ mean / np.linalg.norm(mean)
    return like


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), shown=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_tfidf_is_that_of_scikit_learn(seed: int, n: int, shown: list[int]) -> None:
    searched, pattern = windows(seed, n), windows(seed + 1, sum(shown))
    index = TfIdf(40)
    index.fill(searched)
    offsets = np.concatenate([[0], np.cumsum(shown)])
    found = list(index.likeness(pattern, offsets))
    assert len(found) == len(shown)
    for like, start, stop in zip(found, offsets[:-1], offsets[1:], strict=True):
        assert like.dtype == np.float32
        np.testing.assert_allclose(like, oracle(searched, pattern[start:stop]), atol=1e-5)


def test_vectors_of_searched_windows_are_those_of_scikit_learn() -> None:
    searched = windows(0, 25)
    index = TfIdf(40)
    index.fill(searched)
    model = TfidfVectorizer(analyzer=str.split)
    expected = model.fit_transform(texts(searched)).toarray()
    found = index.vectors(searched).toarray()
    for token, column in model.vocabulary_.items():
        np.testing.assert_allclose(found[:, int(token[1:])], expected[:, column], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_window_is_most_like_itself_and_filling_again_replaces() -> None:
    searched = windows(3, 30)
    index = TfIdf(40)
    index.fill(searched[:5])
    index.fill(searched)
    for place, like in enumerate(index.likeness(searched, np.arange(31))):
        assert like[place] == pytest.approx(1, abs=1e-5)
        assert like.max() <= 1 + 1e-5


def test_only_the_heaviest_tokens_of_a_long_pattern_are_looked_up() -> None:
    """200 tokens once each and one in every window: of the tail only the first by id are found."""
    searched = np.arange(300, dtype=np.uint32).reshape(100, 3)
    pattern = np.stack([np.full(100, 299), np.arange(0, 200, 2), np.arange(1, 201, 2)], axis=1).astype(np.uint32)
    index = TfIdf(300)
    index.fill(searched)
    like = next(index.likeness(pattern, np.array([0, 100])))
    assert like.argmax() == 99
    assert np.flatnonzero(like).tolist() == [*range(21), 99]


class FakeModel:
    """Vectors of letter counts; says what it was asked."""

    asked: list[list[str]] = []  # noqa: RUF012

    def __init__(self, name: str, **options: Any) -> None:
        assert options["trust_remote_code"] is False
        assert options["model_kwargs"] == {"use_safetensors": True}
        if name == "nowhere":
            raise OSError("nowhere is not\na folder")

    def encode(self, given: list[str], *, normalize_embeddings: bool, **_: Any) -> Array:
        assert normalize_embeddings
        self.asked.append(given)
        counts = np.array([[text.count(str(digit)) for digit in range(10)] for text in given], np.float64)
        unit: Array = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return unit


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeModel.asked.clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=FakeModel))


@pytest.mark.usefixtures("_fake")
def test_embeddings_are_compared_with_the_mean_of_the_pattern() -> None:
    searched, pattern = windows(0, 12), windows(1, 5)
    index = Embeddings("tiny", TABLE)
    index.fill(searched)
    found = list(index.likeness(pattern, np.array([0, 2, 5])))
    held, own = index.vectors(searched).astype(float), index.vectors(pattern).astype(float)
    for like, start, stop in zip(found, (0, 2), (2, 5), strict=True):
        mean = own[start:stop].mean(axis=0)
        np.testing.assert_allclose(like, held @ mean / np.linalg.norm(mean), atol=1e-6)
    assert FakeModel.asked[0] == [TABLE.decode(window) for window in searched.tolist()]


@pytest.mark.usefixtures("_fake")
def test_no_text_is_embedded_twice(tmp_path: Path) -> None:
    searched = windows(0, 12)
    first = Embeddings("tiny", TABLE, tmp_path).vectors(searched)
    again = Embeddings("tiny", TABLE, tmp_path).vectors(searched)
    np.testing.assert_array_equal(first, again)
    assert len(FakeModel.asked) == 1
    Embeddings("other", TABLE, tmp_path).vectors(searched)
    Embeddings("tiny", TABLE, tmp_path).vectors(searched[::-1])
    assert len(FakeModel.asked) == 3
    assert len(list(tmp_path.glob("*.npy"))) == 3


@pytest.mark.usefixtures("_fake")
def test_damaged_embeddings_are_refused(tmp_path: Path) -> None:
    searched = windows(0, 12)
    Embeddings("tiny", TABLE, tmp_path).vectors(searched)
    (path,) = tmp_path.glob("*.npy")
    for wrong in (np.zeros((3, 10), np.float32), np.full((12, 10), np.nan, np.float32), np.zeros((12, 10))):
        np.save(path, wrong)
        with pytest.raises(CorruptError, match="12 windows"):
            Embeddings("tiny", TABLE, tmp_path).vectors(searched)
    path.write_bytes(b"no array")
    with pytest.raises(CorruptError):
        Embeddings("tiny", TABLE, tmp_path).vectors(searched)


@pytest.mark.usefixtures("_fake")
def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(NotFoundError, match=r"'nowhere'.*nowhere is not a folder") as error:
        Embeddings("nowhere", TABLE).vectors(windows(0, 2))
    assert "\n" not in str(error.value)


def test_without_the_extra_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"exegete\[embed\]"):
        Embeddings("tiny", TABLE)


def test_a_real_model_of_a_folder_embeds(tmp_path: Path) -> None:
    """A BERT of random weights, made here, through the real library where it is installed."""
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    index = Embeddings(str(tmp_path / "bert"), TABLE, tmp_path / "kept")
    searched = windows(0, 12)
    index.fill(searched)
    np.testing.assert_allclose(np.linalg.norm(index.vectors(searched), axis=1), 1, atol=1e-5)
    for place, like in enumerate(index.likeness(searched, np.arange(13))):
        assert like[place] == pytest.approx(1, abs=1e-5)
    with pytest.raises(NotFoundError, match="no sentence-transformers model"):
        Embeddings(str(tmp_path / "kept"), TABLE).vectors(searched)
