"""The prompts of an intervention: text cut just after the first token at which a latent fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from exegete.streams import stream
from exegete.types import Array, Firings, Rows, Split
from exegete.views import LatentView

QUINTILES: Final = 5
PER_DOCUMENT: Final = 3
_CANDIDATES: Final = 64
"""Firings looked at for each prompt wanted: of a latent that fires often, a random part."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Tokens that end in a firing: the row and position of that, its document and activation.

    ``tokens`` may begin with a BOS that stands elsewhere in the row.
    """

    tokens: tuple[int, ...]
    row: int
    position: int
    document: int
    activation: float


def draw_prompts(view: LatentView, split: Split, n: int, *, context: int, bos: int | None) -> list[Prompt]:
    """Return up to ``n`` prompts of a split, drawn at random: as many from each fifth of the firings by strength.

    A prompt ends in a firing of which none of its document lies within ``context`` − 1 tokens before, and begins that
    many tokens before it, or where its document begins in the row. So the latent is silent in it up to its last token.
    Lengths are those of ``length_of``, by leaving out first tokens: prompts of one length are run together and need no
    padding. ``bos`` is put before prompts where the rows have it before their text. Where there are enough others, at
    most 3 are of one document, and none is shorter than ``context``.
    """
    data = view.require_data()
    rows = data.rows(split)
    firings = data.firings([view.latent.index], split)[0]
    begin = beginnings(rows, firings, context)
    rng = stream(view.examples.seed, view.latent, "intervention", split)
    found = np.flatnonzero(begin >= 0)
    found = np.sort(rng.permutation(found)[: n * _CANDIDATES])
    documents = rows.documents[firings.rows[found], firings.positions[found]]
    whole = firings.positions[found] - begin[found] + 1 >= context
    chosen = found[_drawn(firings.values[found], documents, whole, n, rng)].tolist()
    opened = bos is not None and len(rows) > 0 and bool((rows.tokens[:, 0] == bos).any())
    return [_prompt(rows, firings, i, int(begin[i]), context, bos if opened else None) for i in chosen]


def beginnings(rows: Rows, firings: Firings, context: int) -> Array:
    """Return where the prompt of each firing begins in its row [n] int64, −1 where another firing is too near before.

    No prompt is longer than ``context`` tokens.
    """
    used, place = np.unique(firings.rows, return_inverse=True)
    documents = rows.documents[used]
    new = np.ones(documents.shape, bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    opens = np.maximum.accumulate(np.where(new, np.arange(documents.shape[1]), 0), axis=1)
    position = firings.positions.astype(np.int64)
    begin = np.maximum(opens[place, position], position - context + 1) if len(position) else position
    near = np.zeros(len(position), bool)  # firings are in row order, and by position within a row
    near[1:] = (place[1:] == place[:-1]) & (position[:-1] >= begin[1:])
    return np.where(near, -1, begin)


def length_of(length: int, context: int) -> int:
    """Return the length a prompt is cut to: a power of 2, three times one, or the whole ``context``."""
    if length >= context:
        return context
    power = 1 << (length.bit_length() - 1)
    return power + power // 2 if power > 1 and length >= power + power // 2 else power


def _prompt(rows: Rows, firings: Firings, at: int, begin: int, context: int, bos: int | None) -> Prompt:
    row, position = int(firings.rows[at]), int(firings.positions[at])
    if bos is not None and rows.tokens[row, begin] == bos and begin < position:
        begin += 1
    length = length_of(position + 1 - begin, context)
    text = rows.tokens[row, position + 1 - length : position + 1].tolist()
    return Prompt(
        tokens=tuple(text if bos is None else [bos, *text]),
        row=row,
        position=position,
        document=int(rows.documents[row, position]),
        activation=float(firings.values[at]),
    )


def _drawn(values: Array, documents: Array, whole: Array, n: int, rng: np.random.Generator) -> Array:
    """Return which firings are drawn: from each fifth of them in turn, in random order, ascending."""
    order = np.argsort(values, kind="stable")
    fifths = [rng.permutation(part).tolist() for part in np.array_split(order, QUINTILES)]
    in_turn = [part[i] for i in range(max(map(len, fifths), default=0)) for part in fifths if i < len(part)]
    in_turn.sort(key=lambda i: not whole[i])
    held = _held(documents, in_turn)
    in_turn.sort(key=lambda i: i in held)
    return np.sort(np.array(in_turn[:n], np.int64))


def _held(documents: Array, order: Sequence[int]) -> set[int]:
    """Return those that come after three others of their document."""
    seen: dict[int, int] = {}
    held: set[int] = set()
    for i in order:
        document = int(documents[i])
        seen[document] = seen.get(document, 0) + 1
        if seen[document] > PER_DOCUMENT:
            held.add(i)
    return held
