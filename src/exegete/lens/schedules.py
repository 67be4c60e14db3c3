"""How tuned lenses are trained: the published schedule, and Adam with a warm-up that happens.

SGD with Nesterov momentum β = 0.9 and learning rate 1 − β, weight decay 10⁻³ (towards the identity), gradients clipped
at norm 1, decaying linearly to 0: 250 steps of 2¹⁸ tokens are what the published lenses were trained with. Adam is
AMSGrad at 10⁻³ with a linear warm-up over a fifth of the steps, at most 1000, and then the same decay. (The published
trainer compared an enumeration with a string, so that its Adam never warmed up.) Gradients are clipped for each
translator by itself, so that what one learns does not depend on which others are trained beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch

from exegete.errors import ConfigError

Loss = Literal["kl", "ce"]
Optimizer = Literal["sgd", "adam"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LensConfig:
    """How a lens is trained.

    Attributes:
        loss: ``kl``: to the model's own distribution; ``ce``: on the next token.
        optimizer: ``sgd`` or ``adam``.
        steps: Updates of every translator.
        batch_tokens: Predictions in one update, rounded up to whole rows.
        learning_rate: Times the optimizer's own: 1 for SGD (before the factor 1 − momentum), 10⁻³ for Adam.
        momentum: Of SGD; the first moment's decay of Adam.
        weight_decay: Towards the identity.
        clip: Largest norm of a translator's gradient.
        warmup: Steps in which the rate rises from 0; None for the optimizer's own: 0, or a fifth of all for Adam.
        bias: Whether translators have a bias.
        rank: Rank of the maps of large states.
        check_every: Steps between looks at the validation part; None for ten looks in all.
        validation_tokens: Most predictions of the validation part that are looked at.
        repeat: Read the text again when it ends; otherwise too little text is refused.
        seed: Of the order of rows, the split and the start of low-rank maps.
    """

    loss: Loss = "kl"
    optimizer: Optimizer = "sgd"
    steps: int = 250
    batch_tokens: int = 1 << 18
    learning_rate: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-3
    clip: float = 1.0
    warmup: int | None = None
    bias: bool = True
    rank: int = 64
    check_every: int | None = None
    validation_tokens: int = 1 << 15
    repeat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("loss", get_args(Loss)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_tokens", "validation_tokens", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is above 0, got {getattr(self, name)}")
        if not 0.0 < self.momentum < 1.0:
            raise ConfigError(f"momentum lies between 0 and 1, got {self.momentum}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is at least 0, got {self.weight_decay}")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup is at least 0 and less than the {self.steps} steps, got {self.warmup}")
        if self.check_every is not None and self.check_every < 1:
            raise ConfigError(f"check_every is at least 1, got {self.check_every}")

    @property
    def warmup_steps(self) -> int:
        """Steps in which the rate rises."""
        if self.warmup is not None:
            return self.warmup
        return min(1000, self.steps // 5) if self.optimizer == "adam" else 0

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of steps after which the validation part is looked at, 0 and the last among them."""
        every = self.check_every or max(1, self.steps // 10)
        return tuple(dict.fromkeys((*range(0, self.steps + 1, every), self.steps)))

    def rate(self, step: int) -> float:
        """Return the share of the full learning rate at a step (from 0): up over the warm-up, then down to 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return max(0.0, (self.steps - step) / (self.steps - self.warmup_steps))


def optimizer_of(config: LensConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of one translator; its rate is set before every step by ``set_rate``."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=base_rate(config),
            momentum=config.momentum,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
    return torch.optim.Adam(
        parameters,
        lr=base_rate(config),
        betas=(config.momentum, 0.999),
        weight_decay=config.weight_decay,
        amsgrad=True,
    )


def base_rate(config: LensConfig) -> float:
    """Return the full learning rate."""
    return config.learning_rate * ((1.0 - config.momentum) if config.optimizer == "sgd" else 1e-3)


def set_rate(optimizer: torch.optim.Optimizer, config: LensConfig, step: int) -> None:
    """Set the learning rate of a step (from 0)."""
    for group in optimizer.param_groups:
        group["lr"] = base_rate(config) * config.rate(step)
