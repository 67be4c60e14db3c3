"""Where a vector acts: which tokens of a prompt and of what comes after it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

import torch

from exegete.errors import InputError

_ALLOWED = "onward, last, last:K, prompt, from:I, every:K, generated, all"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Positions of a sequence whose first tokens are a prompt. Read from text by ``places``.

    Attributes:
        name: As given.
        start: The first prompt token edited, from the prompt's end where negative; None for no prompt token.
        generated: Whether tokens after the prompt are edited.
        every: Of these, only those whose position is a multiple of it, counted from 0.
    """

    name: str
    start: int | None
    generated: bool
    every: int = 1

    def mask(self, at: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return which positions are edited, bool as ``at``.

        ``at`` [rows, positions] count from each row's first token, negative at padding; ``lengths`` [rows] are those of
        the prompts.
        """
        length = lengths[:, None]
        after = at >= length
        if self.start is None:
            return after & self.generated
        first = (length + self.start).clamp_min(0) if self.start < 0 else self.start
        return (at >= 0) & (at >= first) & (at % self.every == 0) & (~after | self.generated)

    def from_end(self, length: int) -> int:
        """Return how many of the last tokens of a prompt of this length there are from the first edited one on."""
        if self.start is None:
            return 0
        return max(0, min(length, -self.start if self.start < 0 else length - self.start))

    def reaches(self, length: int, first: int = 0, more: int = 0) -> bool:
        """Tell whether a token is edited at the position ``first`` or behind it, of a prompt and ``more`` after it."""
        return bool(self.mask(torch.arange(length + more)[None], torch.tensor([length]))[0, first:].any())


def places(text: str) -> Places:
    """Return the places that a text names.

    ``onward``, what contrastive activation addition uses to generate: the last prompt token and all after it ·
    ``last``, the last prompt token · ``last:K``, the last K of it · ``prompt``, all of it · ``from:I``, from I on,
    counted from 0, or from the prompt's end where negative · ``every:K``, the positions 0, K, 2K … of the prompt and of
    what comes after it · ``generated``, what comes after the prompt · ``all``.

    Raises InputError for any other text.
    """
    named = {
        "onward": (-1, True),
        "last": (-1, False),
        "prompt": (0, False),
        "generated": (None, True),
        "all": (0, True),
    }
    if text in named:
        start, generated = named[text]
        return Places(name=text, start=start, generated=generated)
    if found := re.fullmatch(r"last:(\d{1,9})", text):
        if int(found[1]) > 0:
            return Places(name=text, start=-int(found[1]), generated=False)
    elif found := re.fullmatch(r"from:(-?\d{1,9})", text):
        return Places(name=text, start=int(found[1]), generated=True)
    elif (found := re.fullmatch(r"every:(\d{1,9})", text)) and int(found[1]) > 0:
        return Places(name=text, start=0, generated=True, every=int(found[1]))
    raise InputError(f"a vector acts at {_ALLOWED} (K at least 1); got {text!r}")
