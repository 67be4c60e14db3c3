"""The recurrent state after every token, for lenses that read it beside the residual stream.

A pass over the rows is run token by token, since models give out no states in between; that costs about as much as
generating the text. A state is read as flat numbers. RWKV-4 carries a numerator and a denominator relative to an
exponential; read as they are they span hundreds of orders of magnitude, so their quotient and the logarithm of the
denominator, from which both follow, stand in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch

from exegete.errors import InputError
from exegete.subjects.running import Running
from exegete.subjects.verdicts import verdict

if TYPE_CHECKING:
    from exegete.lens.text import Batch
    from exegete.subjects import Subject
    from exegete.subjects.recurrent_state import State

_TINY = 1e-300


@final
class StateReader:
    """Reads the states of the blocks whose outputs are the given sites, where these blocks carry one."""

    def __init__(self, subject: Subject, sites: Sequence[int]) -> None:
        """Find out which sites have a state. Raises InputError when none has, or the model cannot be run step by step.

        Attributes:
            sizes: The numbers in the state of each site that has one.
        """
        found = verdict(subject)
        self._subject = subject
        self.sites = tuple(site for site in sites if site in found.layers)
        if found.route == "whole" or not self.sites:
            why = "is not exact step by step" if found.layers else "carries no recurrent state"
            raise InputError(f"{subject.name} {why} at the sites {list(sites)}, so a state-aware lens has none to read")
        first = Running.start(subject, torch.zeros((1, 1), dtype=torch.long)).state()
        self.sizes = {site: int(_numbers(first, site).shape[1]) for site in self.sites}

    @torch.no_grad()
    def read(self, batch: Batch, sites: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Return the states [n, numbers] float32 after the n predicting positions of a batch, row by row."""
        wanted = self.sites if sites is None else tuple(sites)
        parts: dict[int, list[torch.Tensor]] = {site: [] for site in wanted}
        running: Running | None = None
        for at in range(batch.tokens.shape[1]):
            column = batch.tokens[:, at : at + 1]
            if running is None:
                running = Running.start(self._subject, column)
            else:
                running.feed(column)
            here = batch.keep[:, at].nonzero()[:, 0]
            if len(here):
                state = running.state()
                for site in wanted:
                    parts[site].append(_numbers(state, site)[here])
        row, column_of = batch.keep.T.nonzero().flip(1).unbind(1)  # in the order in which they were read
        order = torch.argsort(row * batch.keep.shape[1] + column_of)
        return {site: torch.cat(read)[order] for site, read in parts.items()}


def _numbers(state: State, layer: int) -> torch.Tensor:
    """Return the state of one block as numbers [rows, n] float32 that a linear map can read."""
    parts = dict(state[layer])
    if "num" in parts and "den" in parts:
        den = parts["den"].clamp_min(_TINY)
        parts["num"], parts["den"] = parts["num"] / den, den.log()
    return torch.cat([part.flatten(1).float() for part in parts.values()], dim=1)
