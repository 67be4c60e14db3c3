"""What came of training a lens, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from exegete.lens.lens import TunedLens


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTraining:
    """Losses of one site's translator on the validation part, nats per token.

    ``untrained`` is that of the identity (the logit lens), ``best`` that of the weights that were kept, from after
    ``best_step`` steps, ``last`` that after the last step. ``kept_plain`` says of a state-aware lens that the weights
    are those of the plain one trained beside it, which were better.
    """

    untrained: float
    best: float
    last: float
    best_step: int
    kept_plain: bool = False

    @property
    def kept_identity(self) -> bool:
        """Whether training only made it worse, so that the site keeps the logit lens."""
        return self.best_step == 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A lens with how its training went; ``epochs`` says how often the train part was read."""

    lens: TunedLens
    sites: Mapping[int, SiteTraining]
    epochs: float
