"""Small quirky data and models for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exegete.elk.encoding import Encoded
from exegete.elk.facts import Facts, quantiles
from exegete.elk.features import Extraction
from exegete.subjects.subject import Subject
from exegete.testing.models import toy_model, toy_tokenizer
from exegete.types import Array

TEXT = "0 1 2 3 4 5 6 7 8 9 1 + 2 = 3. Alice: Bob: True False No Yes"


def toy_facts(n: int, *, seed: int = 0, prefix: str = "b") -> Facts:
    """Facts of ``n`` claims with two rows each, Alice's then Bob's; labels and difficulties drawn."""
    draw = np.random.default_rng(seed)
    alice, bob = draw.random(n) < 0.5, draw.random(n) < 0.5
    difficulty = draw.random(n)
    speaks = np.tile([True, False], n)
    truth, wrong = np.repeat(alice, 2), np.repeat(bob, 2)
    return Facts(
        id=np.array([f"{prefix}{i // 2}-{i % 2}" for i in range(2 * n)]),
        base=np.array([f"{prefix}{i // 2}" for i in range(2 * n)]),
        alice_speaks=speaks,
        label=np.where(speaks, truth, wrong),
        alice=truth,
        bob=wrong,
        difficulty=np.repeat(difficulty, 2),
        quantile=np.repeat(quantiles(difficulty), 2),
    )


def toy_rows(n: int, *, seed: int = 0, prefix: str = "b", lengths: tuple[int, ...] = (4,)) -> Encoded:
    """Rows of tokens below 14: some digits, then the character (10 or 11); answers 12 and 13.

    Alice says whether the first digit is above the second, Bob whether the last digit is at least 5.
    """
    draw = np.random.default_rng(seed)
    prompts, rows = [], []
    for i in range(n):
        length = int(draw.choice(lengths))
        digits = draw.integers(0, 10, length).tolist()
        alice, bob = digits[0] > digits[1], digits[-1] >= 5
        for speaks in (True, False):
            prompts.append((*digits, 10 if speaks else 11))
            rows.append((f"{prefix}{i}-{speaks}", f"{prefix}{i}", speaks, alice if speaks else bob, alice, bob, i, 0.5))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    hard = columns[6].astype(np.float64)
    quantile = np.repeat(quantiles(hard[::2]), 2)
    facts = Facts(
        id=columns[0],
        base=columns[1],
        alice_speaks=columns[2],
        label=columns[3],
        alice=columns[4],
        bob=columns[5],
        difficulty=hard,
        quantile=quantile,
    )
    return Encoded(prompts=tuple(prompts), choices=(((12,), (13,)),) * len(prompts), facts=facts)


def toy_subject(
    family: str = "mamba", *, vocabulary: int | None = None, seed: int = 0, tokenizer: Any = None
) -> Subject:
    """An untrained model of two blocks with 16 dimensions."""
    from transformers import LlamaConfig, MambaConfig, RwkvConfig

    made = toy_tokenizer([TEXT] * 3, vocabulary=290) if tokenizer is None else tokenizer
    size = len(made) if vocabulary is None else vocabulary
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    common: dict[str, Any] = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, **ends}
    config = {
        "mamba": lambda: MambaConfig(state_size=4, initializer_range=0.4, **common),
        "rwkv": lambda: RwkvConfig(attention_hidden_size=16, rescale_every=0, **common),
        "llama": lambda: LlamaConfig(
            intermediate_size=32, num_attention_heads=2, initializer_range=0.4, max_position_embeddings=128, **common
        ),
    }[family]()
    return Subject(toy_model(config, seed=seed), made, name=f"toy-{family}")


def planted(n: int, *, seed: int = 0, prefix: str = "b", d: int = 12, noise: float = 0.6) -> Extraction:
    """Features of a model that knows and lies, by construction.

    Site 0 holds nothing. At site 1 the first axis is the truth and the second what the character says; pairs hold which
    answer was given (third axis), and the truth in opposite ways for the two answers. The model's answer is what the
    character says.
    """
    facts = toy_facts(n, seed=seed, prefix=prefix)
    draw = np.random.default_rng(seed + 1)
    rows = len(facts)

    def vectors(*shape: int) -> Array:
        return (noise * draw.standard_normal(shape)).astype(np.float32)

    truth, said = np.where(facts.alice, 1.0, -1.0), np.where(facts.label, 1.0, -1.0)
    one = vectors(rows, d)
    one[:, 0] += truth
    one[:, 1] += said
    pair = vectors(rows, 2, d)
    for which, sign in ((0, -1.0), (1, 1.0)):
        pair[:, which, 0] += sign * truth
        pair[:, which, 2] += 3 * sign
    return Extraction(
        subject="subject",
        data=prefix,
        facts=facts,
        log_odds=(4 * said).astype(np.float32),
        features={"last": {0: vectors(rows, d), 1: one}, "pair": {0: vectors(rows, 2, d), 1: pair}},
    )


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """The makers of this file."""
    return SimpleNamespace(facts=toy_facts, rows=toy_rows, subject=toy_subject, planted=planted)
