"""A real packed corpus, collected, selected from, explained by rules and scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import exegete as ex
from exegete.explainers.rule import RuleExplainer
from exegete.explainers.workers import search_on, search_with_detail
from exegete.rules import Rule
from exegete.rules.evaluate import context_of
from exegete.rules.execute import execute
from exegete.runs import Run
from exegete.scorers.execution import ExecutionScorer
from exegete.types import ExampleSet, Split
from exegete.views import LatentView

SIZES = {"window": 6, "n_train": 15, "n_test": 15, "n_negatives": 15, "min_train": 3, "min_test": 3}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def run(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("packed")
    lines = (toy_folder / "text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rng = np.random.default_rng(0)
    short = [text[: int(rng.integers(20, 300))] for text in texts * 6]  # ends of one size would all lie alike
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    subject = ex.load_subject(str(toy_folder / "model"))
    coder = ex.load_coder(str(toy_folder / "coders") + ":layers.0")
    corpus = ex.load_corpus(str(folder / "text.jsonl"), tokenizer=subject.tokenizer, row_length=64, packing=True)
    assert len(corpus.segments) > 2 * len(corpus)
    return ex.collect(subject, {"c": coder}, corpus, out=folder / "run", threads=1)


def test_a_packed_run_from_end_to_end(run: Run) -> None:
    data, corpus = run.data("c"), run.corpus
    segments, codes = corpus.segments, data.segment_split
    assert len(set(segments[codes == 0, 0].tolist()) & set(segments[codes == 2, 0].tolist())) > len(corpus) / 3
    assert not set(segments[codes == 0, 3].tolist()) & set(segments[codes == 2, 3].tolist())
    store = run.store("c")
    chosen = [ex.select(store, index, **SIZES) for index in np.argsort(-store.counts)[:6].tolist()]
    sets = [examples for examples in chosen if isinstance(examples, ExampleSet)]
    assert len(sets) > 3
    whole = corpus.rows(slice(None))
    for examples in sets:
        firings = store.firings(examples.latent.index)
        dense = np.zeros(whole.tokens.shape, np.float32)
        dense[firings.rows, firings.positions] = firings.values
        for example in examples.examples:
            span = slice(example.start, example.stop)
            assert set(whole.documents[example.row, span].tolist()) == {example.document}
            assert set(codes[segments[:, 3] == example.document].tolist()) == {{"train": 0, "test": 2}[example.split]}
            assert (example.activations == dense[example.row, span]).all()


def test_every_firing_of_counted_text_is_on_one_side(run: Run) -> None:
    data, store = run.data("c"), run.store("c")
    for index in np.argsort(-store.counts)[:4].tolist():
        parts = [data.firings([index], split)[0] for split in SPLITS]
        assert sum(map(len, parts)) == len(store.firings(index))
        for split, part in zip(SPLITS, parts, strict=True):
            assert data.rows(split).mask[part.rows, part.positions].all()


def test_rules_are_searched_and_scored_document_by_document(run: Run) -> None:
    data, store = run.data("c"), run.store("c")
    busy = [int(i) for i in np.argsort(-store.counts)[:8]]
    context = context_of(data, "train")
    here = {index: (rule, detail) for index, rule, detail in search_with_detail(data, busy, context)}
    assert {index: (rule, detail) for index, rule, detail in search_on(2, data, busy)} == here
    index, rule = next((i, rule) for i, (rule, _) in here.items() if rule is not None)
    examples = ex.select(store, index, **SIZES)
    assert isinstance(examples, ExampleSet)
    view = LatentView(latent=examples.latent, tokens=data.tokens, examples=examples, data=data)
    (explanation,) = RuleExplainer().explain([view])
    assert Rule.from_json(explanation.program) == rule
    (scoring,) = ExecutionScorer().score([(explanation, view)])
    scores = {(s.scorer, s.metric): s for s in scoring.scores}
    rows = data.rows("test")
    said = execute([rule], rows.tokens, data.tokens, rows.mask, documents=rows.documents)[0] > 0
    assert scores["execution", "precision"].n_total == said.sum()
    assert scores["execution", "auprc"].n_total == rows.mask.sum()
    (fired,) = data.firings([index], "test")
    assert scores["execution", "recall"].value == said[fired.rows, fired.positions].mean()
