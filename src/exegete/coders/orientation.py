"""Which way round a skip connection is, where its file leaves that open: settled by what reconstructs real activations.

A square matrix fits either way. Loaders take the orientation that the format's authors use and mark the coder
(``LinearCoder.skip_undecided``), because files written by other versions hold it transposed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from exegete.coders.linear import LinearCoder
from exegete.coders.quality import fvu_and_l0

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_CLEAR = 1.1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Oriented:
    """A coder with its skip connection decided.

    ``fvu`` is the fraction of variance unexplained of the orientation kept, ``other`` that of the other one.
    """

    coder: LinearCoder
    transposed: bool
    fvu: float
    other: float

    @property
    def clear(self) -> bool:
        """Whether the other orientation leaves at least a tenth more unexplained."""
        return self.other >= _CLEAR * self.fvu


def oriented(coder: LinearCoder, x: torch.Tensor, target: torch.Tensor) -> Oriented:
    """Return the coder in the orientation that predicts ``target`` [n, d_out] better from ``x`` [n, d_in].

    The orientation of the file is kept unless the other one is clearly better; where neither is, a warning says so.
    A coder that is decided comes back as it is. Raises InputError or MismatchError as ``fvu_and_l0`` does.
    """
    kept = coder.settled(transpose=False)
    fvu, _ = fvu_and_l0(kept, x, target)
    if coder.skip is None or not coder.skip_undecided or coder.d_in != coder.d_out:
        return Oriented(coder=kept, transposed=False, fvu=fvu, other=fvu)
    turned = coder.settled(transpose=True)
    other, _ = fvu_and_l0(turned, x, target)
    if fvu >= _CLEAR * other:
        log.warning(
            "the skip connection of coder %r is stored transposed (FVU %.3f instead of %.3f)", coder.name, other, fvu
        )
        return Oriented(coder=turned, transposed=True, fvu=other, other=fvu)
    found = Oriented(coder=kept, transposed=False, fvu=fvu, other=other)
    if not found.clear:
        log.warning(
            "either orientation of the skip connection of coder %r reconstructs alike (FVU %.3f and %.3f)",
            coder.name,
            fvu,
            other,
        )
    return found
