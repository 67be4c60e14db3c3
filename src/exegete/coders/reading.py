"""The activations at a hookpoint, over the counted positions of some rows, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from exegete.coders.coder import Point
from exegete.errors import InputError
from exegete.types import Rows

if TYPE_CHECKING:
    from exegete.subjects.subject import Subject

_BATCH_TOKENS = 1 << 13  # as many as collecting takes the median norm over


def activations(
    subject: Subject,
    point: Point,
    rows: Rows,
    *,
    most: int | None = None,
    by_document: bool = False,
    sink_norm: float = 10.0,
) -> Iterator[torch.Tensor]:
    """Yield the activations [n, d] at the counted positions, in row order, float32 on the subject's device.

    Args:
        subject: The model that reads the rows.
        point: Where, as ``subject.points`` names it.
        rows: Tokens, documents and which positions count.
        most: Stop after as many positions, None for all.
        by_document: Let each token see its own document only, rather than the row up to it.
        sink_norm: Leave out positions longer than this many times the median norm of the counted positions in the
            first batch (of 8,192 tokens) that has any, as collecting does (attention sinks); 0 for none.

    Raises:
        InputError: When an activation is not finite, or ``sink_norm`` is negative or not finite.
    """
    if not 0 <= sink_norm < math.inf:
        raise InputError(f"sink_norm is a multiple of the median norm, or 0 for none, got {sink_norm}")
    batch = max(1, _BATCH_TOKENS // max(1, rows.length))
    left = int(rows.mask.sum()) if most is None else most
    limit: float | None = None
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
        found = x[torch.from_numpy(np.ascontiguousarray(rows.mask[start:stop])).to(x.device)].float()
        if not len(found):
            continue
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"the {point[1]} of {point[0]!r} holds NaN or infinity; load the subject in float32")
        norms = torch.linalg.vector_norm(found, dim=-1)
        if limit is None:
            limit = norm_limit(norms, sink_norm)
        kept = found[norms <= limit][:left]
        left -= len(kept)
        yield kept


def norm_limit(norms: torch.Tensor, multiple: float) -> float:
    """Return the norm beyond which a position does not count: a multiple of the median of ``norms`` [n], n > 0.

    Infinite where the multiple or the median is 0.
    """
    return multiple * float(norms.median()) or math.inf
