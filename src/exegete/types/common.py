"""What the other types are made of."""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt

from exegete.errors import InputError

Array = npt.NDArray[Any]
Split = Literal["train", "validation", "test"]
Side = Literal["input", "output"]
ExplanationStatus = Literal["ok", "unparsed", "refused", "failed"]
JudgementStatus = Literal["ok", "unparsed", "refused", "failed"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_DRAWN = ("top", "random", "importance", "diverse", "near_miss", "same_token", "neighbour", "similar", "silent")
STRATA: tuple[str, ...] = (*(f"decile_{i}" for i in range(10)), *(f"bin_{i}" for i in range(10)), *_DRAWN)
"""What windows are drawn from: of firing ones deciles of rank, bins of value, or as their strategy is called; of silent
ones their kind, random ones being ``silent``."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)
