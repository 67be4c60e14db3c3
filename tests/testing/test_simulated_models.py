from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from exegete.errors import InputError
from exegete.llm.scripted import Evidence, Predicate, Spans
from exegete.scorers.surprisal import UNRELATED, beginning
from exegete.testing.embedders import SimulatedEmbedder
from exegete.testing.readers import NATS, PER_CHARACTER, SimulatedReader
from exegete.types import Array

EVIDENCE = Evidence(true_positive_rate=0.9, false_positive_rate=0.2)


def has_a(text: str, spans: Spans | None) -> bool:
    return "a" in text


def info(texts: Sequence[str], explanation: str = "has  an a", seed: int = 0) -> Array:
    known: dict[str, Predicate] = {"has  an a": has_a}
    reader = SimulatedReader(known, EVIDENCE, seed=seed)
    pairs = [(beginning(described), text) for text in texts for described in (explanation, UNRELATED)]
    read = asyncio.run(reader.logprobs(pairs))
    found: Array = np.array(read, np.float64).reshape(-1, 2)
    assert found[:, 1].tolist() == [PER_CHARACTER * len(text) for text in texts]
    assert not reader.natural
    return found[:, 0] - found[:, 1]


def test_a_reader_believes_explanations_at_the_rates_set() -> None:
    fits, others = info([f"a{i}" for i in range(3000)]), info([f"b{i}" for i in range(3000)])
    # four standard errors of a share of 3000, and of a mean
    assert (fits > 0).mean() == pytest.approx(0.9, abs=0.022)
    assert (others > 0).mean() == pytest.approx(0.2, abs=0.03)
    assert fits.mean() == pytest.approx(NATS * stats.norm.ppf(0.9), abs=0.3)
    assert fits.std() == pytest.approx(NATS, rel=0.06)


def test_a_reader_knows_nothing_of_other_explanations_and_reads_the_same_again() -> None:
    assert info(["a1", "b1"], "something else").tolist() == [0.0, 0.0]
    texts = ["a1", "b2", "a3"]
    assert info(texts).tolist() == info(texts[::-1])[::-1].tolist()
    assert info(texts).tolist() != info(texts, seed=1).tolist()


def test_cosines_of_an_embedder_are_the_evidence() -> None:
    rng = np.random.default_rng(1)
    fits = rng.random((4000, 3)) < 0.3
    texts = [f"text {i}" for i in range(4000)]
    embedder = SimulatedEmbedder(["x", "y", "z"], texts, fits, EVIDENCE, seed=2)
    documents, queries = embedder.embed(texts), embedder.embed(["y", "x"], query=True)
    assert np.linalg.norm(documents, axis=1) == pytest.approx(1.0, abs=1e-5)
    cosines = documents @ queries.T
    for column, axis in ((0, 1), (1, 0)):
        fitting = fits[:, axis]
        assert (cosines[fitting, column] > 0).mean() == pytest.approx(0.9, abs=0.04)
        assert (cosines[~fitting, column] > 0).mean() == pytest.approx(0.2, abs=0.04)
    assert not embedder.natural
    with pytest.raises(InputError, match="not given"):
        embedder.embed(["another"])
