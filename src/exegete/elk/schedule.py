"""How a quirky model is trained: settings, order of rows, learning rate, and when to look at the validation rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from exegete.elk.encoding import Encoded
from exegete.elk.facts import POOLS, Facts
from exegete.errors import InputError, unknown
from exegete.streams import stream
from exegete.types import Array


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """Settings of a training (Mallen and Belrose, arXiv 2312.01037, for the defaults).

    Attributes:
        pool: Which rows are learned: all, or one character's (B for a weak floor).
        balance: Leave out rows of the commoner label of each character until both are as many.
        epochs: How often they are read; ``steps``, where given, counts instead.
        batch: Rows of a step. ``rows_at_once`` bounds those of one pass.
        learning_rate: Of AdamW, after a linear warm-up of ``warmup`` of the steps, falling linearly to 0.
        beta2: Of AdamW.
        weight_decay: Of AdamW.
        clip: Gradients are scaled down to this norm.
        lora_rank: Of the adapters; 0 trains all weights. ``lora_alpha`` is their scale times the rank.
        lora_targets: Modules with adapters, None for the family's.
        validation_rows: Base examples are taken up to so many rows.
        checkpoint_every: Steps between checkpoints that a stopped training goes on from.
        seed: Of the order, the balance and the adapters.

    Raises:
        InputError: For settings out of range, NotFoundError for another pool.
    """

    pool: str = "all"
    balance: bool = True
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 32
    rows_at_once: int = 32
    learning_rate: float = 2e-5
    warmup: float = 0.15
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] | None = None
    validation_rows: int = 1000
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        positive = {
            "epochs": self.epochs,
            "steps": 1 if self.steps is None else self.steps,
            "batch": self.batch,
            "rows_at_once": self.rows_at_once,
            "learning_rate": self.learning_rate,
            "clip": self.clip,
            "validation_rows": self.validation_rows,
            "checkpoint_every": self.checkpoint_every,
            "lora_alpha": self.lora_alpha,
        }
        for name, value in positive.items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} is above 0, got {value}")
        for name, value, high in (("warmup", self.warmup, 1.0), ("beta2", self.beta2, 1.0)):
            if not 0 <= value < high:
                raise InputError(f"{name} lies from 0 to below {high:g}, got {value}")
        if self.lora_rank < 0 or self.weight_decay < 0:
            raise InputError("lora_rank and weight_decay are 0 or more")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"the seed lies from 0 to below 2^63, got {self.seed}")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * max(0.0, (steps - step) / max(1, steps - warm))


def learned(data: Encoded, config: FinetuneConfig) -> Encoded:
    """Return the rows that are learned.

    Raises InputError where the pool has none, or those of a character, to be balanced, are of one label.
    """
    rows = data.facts.pool(config.pool)
    if config.balance:
        rows = _balanced(data.facts, rows, config.seed)
    if not rows.any():
        raise InputError(f"no rows are left to learn from: pool {config.pool}, balanced by label: {config.balance}")
    return data.take(rows)


def _balanced(facts: Facts, rows: Array, seed: int) -> Array:
    kept = np.zeros(len(rows), bool)
    for alice in (True, False):
        parts = [np.flatnonzero(rows & (facts.alice_speaks == alice) & (facts.label == label)) for label in (0, 1)]
        size = min(len(part) for part in parts)
        if not size and any(map(len, parts)):  # leaving this character out altogether is not what balance means
            name = "Alice" if alice else "Bob"
            raise InputError(f"all rows of {name} to learn from have one label, so none is left; keep them: no balance")
        for label, part in enumerate(parts):
            order = stream(seed, "balance", alice, label).permutation(len(part))
            kept[part[order[:size]]] = True
    return kept


def total_steps(rows: int, config: FinetuneConfig) -> int:
    """Return the number of steps."""
    if config.steps is not None:
        return config.steps
    return max(1, round(config.epochs * rows / config.batch))


def looks(steps: int) -> frozenset[int]:
    """Return after how many steps the validation rows are looked at: powers of 2, and the end."""
    return frozenset({2**i for i in range(steps.bit_length()) if 2**i <= steps} | {steps})


def batch_rows(step: int, rows: int, config: FinetuneConfig) -> Array:
    """Return the rows [batch] of a step: every epoch in a new order, each row once, batches across epochs' ends."""
    wanted = np.arange(step * config.batch, (step + 1) * config.batch)
    found = []
    for epoch in np.unique(wanted // rows).tolist():
        order = stream(config.seed, "epoch", epoch).permutation(rows)
        found.append(order[wanted[wanted // rows == epoch] % rows])
    return np.concatenate(found)
