"""Lenses: what a model would predict from its residual stream at any site.

``lens.logits(site, h)`` is the model's own readout (final norm, head, soft caps) of the translated stream. The logit
lens translates nothing; a tuned lens has a learned translator per site. Sites are numbered alike in every family: −1 is
the embedding, j the output of block j. After the last block there is nothing left to translate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, final

import torch

from exegete.errors import NotFoundError
from exegete.lens.translators import FULL_ENTRIES, StateMap, Translator
from exegete.subjects.readout import Readout, read_out
from exegete.subjects.sites import n_blocks

if TYPE_CHECKING:
    from exegete.subjects import Subject

Kind = Literal["logit", "tuned", "state"]


class Lens(ABC):
    """A way to read predictions off the residual stream of one subject."""

    kind: Kind
    subject: Subject
    readout: Readout
    sites: tuple[int, ...]
    last: int
    """The site after the last block, where every lens gives the model's own logits unless it was trained there."""

    @abstractmethod
    def translate(self, site: int, h: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """Return the stream ``h`` [..., d] of a site as the last block would have put it out, [..., d] float32.

        ``state`` [..., n] is the recurrent state of the site's block, for sites where ``reads_state``. Raises
        NotFoundError for a site that the lens does not have.
        """

    @abstractmethod
    def translate_direction(self, site: int, v: torch.Tensor) -> torch.Tensor:
        """Return directions ``v`` [..., d] of a site's stream as directions of the last one, [..., d]."""

    @abstractmethod
    def reads_state(self, site: int) -> bool:
        """Whether the translator of a site needs the recurrent state."""

    def logits(self, site: int, h: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the lens predicts from the stream ``h`` [..., d] of a site: logits [..., V] float32."""
        return self.readout.logits(self.translate(site, h, state))

    @property
    def state_sites(self) -> tuple[int, ...]:
        """The sites whose translators need the recurrent state."""
        return tuple(site for site in self.sites if self.reads_state(site))


@final
class LogitLens(Lens):
    """Reads every site as if it were the last (nostalgebraist 2020)."""

    def __init__(self, subject: Subject) -> None:
        self.kind: Kind = "logit"
        self.subject, self.readout = subject, read_out(subject)
        self.last = n_blocks(subject) - 1
        self.sites = tuple(range(-1, self.last + 1))

    def translate(self, site: int, h: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """Return the stream as it is, in float32."""
        _known(site, self.sites, self.last)
        return h.float()

    def translate_direction(self, site: int, v: torch.Tensor) -> torch.Tensor:
        """Return the directions as they are, in float32."""
        _known(site, self.sites, self.last)
        return v.float()

    def reads_state(self, site: int) -> bool:
        """Return False."""
        return False


@final
class TunedLens(Lens):
    """Reads every site through its own learned translator (arXiv 2303.08112)."""

    def __init__(self, subject: Subject, translators: Mapping[int, Translator]) -> None:
        self.subject, self.readout = subject, read_out(subject)
        self.last = n_blocks(subject) - 1
        self.translators = {site: translators[site] for site in sorted(translators)}
        self.sites = tuple(self.translators)
        aware = any(one.state is not None for one in self.translators.values())
        self.kind: Kind = "state" if aware else "tuned"
        for translator in self.translators.values():
            translator.to(subject.device)

    def translate(self, site: int, h: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """Return the translated stream [..., d]."""
        _known(site, self.sites, self.last)
        own = self.translators.get(site)
        return h.float() if own is None else own(h, state)

    def translate_direction(self, site: int, v: torch.Tensor) -> torch.Tensor:
        """Return v + W v."""
        _known(site, self.sites, self.last)
        own = self.translators.get(site)
        return v.float() if own is None else own.linear(v)

    def reads_state(self, site: int) -> bool:
        """Whether the site's translator has a map of the state."""
        own = self.translators.get(site)
        return own is not None and own.state is not None


def default_sites(subject: Subject) -> tuple[int, ...]:
    """Return the sites that a tuned lens has unless told otherwise: −1 … L − 2, all before the last block's output."""
    return tuple(range(-1, n_blocks(subject) - 1))


def new_lens(
    subject: Subject,
    sites: Sequence[int] | None = None,
    *,
    bias: bool = True,
    states: Mapping[int, int] | None = None,
    rank: int = 64,
    seed: int = 0,
) -> TunedLens:
    """Return an untrained tuned lens: the logit lens, exactly, until it is trained.

    Args:
        subject: The model to read.
        sites: Where; by default −1 … L − 2.
        bias: Whether translators have one.
        states: For a state-aware lens, the numbers in the state of each site that has one.
        rank: Rank of the map of a state whose full matrix would have more than ``FULL_ENTRIES`` entries.
        seed: Of the start of low-rank maps.
    """
    d = int(read_out(subject).unembedding.shape[1])
    made: dict[int, Translator] = {}
    for site in default_sites(subject) if sites is None else sites:
        n = (states or {}).get(site)
        own = None
        if n is not None:
            own = StateMap(n, d, rank=None if n * d <= FULL_ENTRIES else rank, seed=seed * 4099 + site + 1)
        made[site] = Translator(d, bias=bias, state=own)
    return TunedLens(subject, made)


def _known(site: int, sites: Sequence[int], last: int) -> None:
    if site not in sites and site != last:
        shown = ", ".join(map(str, sites))
        raise NotFoundError(f"the lens has no site {site}; it has {shown} (and {last}, the model's own output)")
