"""A value with its confidence interval: what every metric returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from exegete.errors import InputError


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its confidence interval, the method's name, and ``n``, the observations that the value rests on.

    ``floor`` and ``ceiling`` hold the interval whatever had failed might have said (``low`` and ``high`` where nothing
    failed); ``n_documents`` is the number of documents it rests on, 0 where that was not counted; ``flags`` are of
    ``types.FLAGS``; ``n_needed`` observations would pin down what is not identified.
    """

    value: float
    low: float
    high: float
    method: str
    n: int
    floor: float = math.nan
    ceiling: float = math.nan
    n_documents: int = 0
    flags: tuple[str, ...] = ()
    n_needed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", self.low if math.isnan(self.floor) else min(self.floor, self.low))
        object.__setattr__(self, "ceiling", self.high if math.isnan(self.ceiling) else max(self.ceiling, self.high))
        if not math.isnan(self.value) and not self.low <= self.value <= self.high:
            raise InputError(f"interval {self.low}…{self.high} leaves out {self.value}")
