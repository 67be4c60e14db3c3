"""Rare latents in real text: planted by plain Python functions over the demo's tokens, recovered on held-out files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from exegete.config import CorpusConfig
from exegete.demo import assets
from exegete.examples import split_segments
from exegete.rules import evaluate_many, render, search_rules
from exegete.store.corpus import build_corpus
from exegete.store.sources import text_documents
from exegete.subjects.pieces import token_table
from exegete.tokens import TokenTable
from exegete.types import Array, Firings, LatentId, Rows, Split
from exegete.views import SplitData

Function = Callable[[list[str], int], bool]

KINDS: dict[str, Function] = {
    "one token": lambda row, t: row[t] == " None",
    "token set": lambda row, t: row[t] in (" yield", " raise", " lambda", "assert", "pass", "break", "continue"),
    "bigram": lambda row, t: row[t] == "." and row[t - 1] in ("os", " os", "sys", " sys"),
    "skip-gram": lambda row, t: t > 2 and row[t] == "," and row[t - 2] == "(",
    "within": lambda row, t: row[t] == " None" and " is" in row[max(0, t - 3) : t],
    "class and token": lambda row, t: row[t].strip().isdigit() and row[t - 1] in ("[", "("),
    "capitals after a dot": lambda row, t: row[t - 1] == "." and row[t].isalpha() and row[t].isupper(),
    "word at line start": lambda row, t: "\n" in row[t - 1] and row[t] == "return",
    "early and token": lambda row, t: t <= 8 and row[t] == ".",
    "either": lambda row, t: row[t] == " None" or (row[t] == "(" and row[t - 1] in ("len", " len")),
}

FLOOR = 0.98


class Planted(SplitData):
    """Latents that fire where a function says, with noisy magnitudes."""

    def __init__(self, rows: dict[Split, Rows], table: TokenTable, functions: Sequence[Function]) -> None:
        self._rows, self._table = rows, table
        self._fired: list[dict[Split, tuple[Array, Array]]] = [{} for _ in functions]
        for split, part in rows.items():
            texts = [[table.texts[i] for i in row] for row in part.tokens.tolist()]
            for number, function in enumerate(functions):
                hits = [(r, t) for r, row in enumerate(texts) for t in range(1, len(row)) if function(row, t)]
                places = np.array(hits, dtype=np.int64).reshape(-1, 2)
                counted = places[part.mask[places[:, 0], places[:, 1]]]
                self._fired[number][split] = counted[:, 0], counted[:, 1]

    @property
    def tokens(self) -> TokenTable:
        return self._table

    def rows(self, split: Split) -> Rows:
        return self._rows[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            rows, positions = self._fired[index][split]
            noise = np.random.default_rng(index).lognormal(1.0, 0.5, len(rows)).astype(np.float32)
            latent = LatentId(coder="planted", index=index)
            found.append(Firings(latent=latent, rows=rows, positions=positions.astype(np.int32), values=noise))
        return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("rare")
    tokenizer = AutoTokenizer.from_pretrained(assets() / "model")
    table = token_table(tokenizer)
    config = CorpusConfig(text=("stdlib",), row_length=128, max_tokens=500_000)
    corpus = build_corpus(folder / "corpus", text_documents(config.text), tokenizer, config, table=table)
    sides = split_segments(corpus, seed=0, test_share=0.4)
    numbers = corpus.segments[:, 0]
    rows: dict[Split, Rows] = {"train": corpus.rows(numbers[sides == 0]), "test": corpus.rows(numbers[sides == 2])}
    return Planted(rows, table, list(KINDS.values()))


def test_rare_planted_latents_are_recovered_on_held_out_files(planted: Planted) -> None:
    indices = range(len(KINDS))
    rules = search_rules(planted, indices)
    measured = evaluate_many(rules, planted, indices)
    for kind, rule, metrics in zip(KINDS, rules, measured, strict=True):
        assert rule is not None, kind
        assert metrics is not None, kind
        assert 1e-4 <= metrics.base_rate <= 1e-2, f"{kind}: {metrics.base_rate}"
        assert metrics.n_firings >= 30, kind
        assert metrics.auprc >= FLOOR, f"{kind}: {metrics.auprc:.3f} {render(rule, planted.tokens)}"
