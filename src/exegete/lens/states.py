"""The recurrent state after every token, for lenses that read it beside the residual stream.

A pass over the rows is run token by token, since models give out no states in between; that costs about as much as
generating the text. States are far larger than streams (26 MB after every token of a Mamba of 2.8 billion parameters),
so they are given out a block of positions at a time. A state is read as flat numbers. RWKV-4 carries a numerator and a
denominator relative to an exponential; read as they are they span hundreds of orders of magnitude, so their quotient
and the logarithm of the denominator, from which both follow, stand in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_BLOCK_ENTRIES = 1 << 27  # of a block of states; one is read while the next is filled, 1 GiB of both in float32
_CARRIED_ENTRIES = 1 << 26  # of the states that the rows of a pass carry, which are held twice while they are read


@final
class StateReader:
    """Reads the states of the blocks whose outputs are the given sites, where these blocks carry one."""

    def __init__(self, subject: Subject, sites: Sequence[int]) -> None:
        """Find out which sites have a state. Raises InputError when none has, or the model cannot be run step by step.

        Attributes:
            sites: Those that have a state.
            sizes: The numbers in the state of each of them.
            rows: The most rows to be read at once, so that what they carry stays within bounds.
        """
        found = verdict(subject)
        self._subject = subject
        self.sites = tuple(site for site in sites if site in found.layers)
        if found.route == "whole" or not self.sites:
            why = (
                "carries no recurrent state"
                if found.route != "whole" or not found.layers
                else "is not exact step by step"
            )
            raise InputError(f"{subject.name} {why} at the sites {list(sites)}, so a state-aware lens has none to read")
        first = Running.start(subject, torch.zeros((1, 1), dtype=torch.long)).state()
        self.sizes = {site: int(state_numbers(first, site).shape[1]) for site in self.sites}
        self.rows = max(1, _CARRIED_ENTRIES // sum(self.sizes.values()))

    @torch.no_grad()
    def blocks(self, batch: Batch) -> Iterator[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
        """Yield the states after the predicting positions of a batch, a block of positions at a time.

        With every block come the places [n] of its predictions among those of the batch, ascending, and by site their
        states [n, numbers] float32 in that order. A block has as many positions as fit into ½ GiB, at least one.
        """
        places = (batch.keep.flatten().cumsum(0) - 1).reshape(batch.keep.shape)
        running: Running | None = None
        for start, stop in self._ranges(batch):
            keep = batch.keep[:, start:stop]
            within = (keep.flatten().cumsum(0) - 1).reshape(keep.shape)
            held: dict[int, torch.Tensor] = {}
            for at in range(start, stop):
                column = batch.tokens[:, at : at + 1]
                if running is None:
                    running = Running.start(self._subject, column)
                else:
                    running.feed(column)
                here = batch.keep[:, at].nonzero()[:, 0]
                if len(here):
                    self._put(running.state(self.sites), here, within[here, at - start], held, int(keep.sum()))
            if held:
                yield places[:, start:stop][keep], held

    def _put(
        self, state: State, rows: torch.Tensor, places: torch.Tensor, held: dict[int, torch.Tensor], n: int
    ) -> None:
        for site in self.sites:
            numbers = state_numbers(state, site)
            if site not in held:
                held[site] = numbers.new_empty((n, numbers.shape[1]))
            held[site][places.to(numbers.device)] = numbers[rows.to(numbers.device)]

    def _ranges(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Yield where blocks of positions begin and end, up to the last position that predicts."""
        most = _BLOCK_ENTRIES // sum(self.sizes.values())
        start = held = 0
        counts = batch.keep.sum(dim=0).tolist()
        for at, count in enumerate(counts):
            if held and held + count > most:
                yield start, at
                start, held = at, 0
            held += count
        if held:
            yield start, 1 + max(at for at, count in enumerate(counts) if count)


def state_numbers(state: State, layer: int) -> torch.Tensor:
    """Return the state of one block as numbers [rows, n] float32 that a linear map can read."""
    parts = dict(state[layer])
    if "num" in parts and "den" in parts:
        den = parts["den"].clamp_min(_TINY)
        parts["num"], parts["den"] = parts["num"] / den, den.log()
    return torch.cat([part.flatten(1).float() for part in parts.values()], dim=1)
