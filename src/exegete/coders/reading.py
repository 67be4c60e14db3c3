"""The activations at a hookpoint, over the counted positions of some rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from exegete.coders.coder import Point
from exegete.errors import InputError
from exegete.types import Rows

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject

_BATCH_TOKENS = 1 << 13


def activations(
    subject: Subject, point: Point, rows: Rows, *, most: int | None = None, by_document: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the activations [n, d] at the counted positions, in row order, float32 on the subject's device.

    Args:
        subject: The model that reads the rows.
        point: Where, as ``subject.points`` names it.
        rows: Tokens, documents and which positions count.
        most: Stop after as many positions, None for all.
        by_document: Let each token see its own document only, rather than the row up to it.

    Raises:
        InputError: When an activation is not finite.
    """
    batch = max(1, _BATCH_TOKENS // max(1, rows.length))
    left = int(rows.mask.sum()) if most is None else most
    for start in range(0, len(rows), batch):
        if left <= 0:
            return
        stop = start + batch
        documents = torch.from_numpy(rows.documents[start:stop].astype(np.int64))
        x = subject.capture(
            torch.from_numpy(rows.tokens[start:stop].astype(np.int64)),
            (documents >= 0).long(),
            [point],
            documents if by_document else None,
        )[point]
        found = x[torch.from_numpy(np.ascontiguousarray(rows.mask[start:stop])).to(x.device)][:left].float()
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"the {point[1]} of {point[0]!r} holds NaN or infinity; load the subject in float32")
        left -= len(found)
        yield found
