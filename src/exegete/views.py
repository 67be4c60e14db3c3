"""What an explainer or scorer is given of one latent: everything known about it, each part fetched when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from exegete.errors import InputError
from exegete.tokens import TokenTable
from exegete.types import ExampleSet, Explanation, Firings, LatentId, Rows, Split

if TYPE_CHECKING:
    from exegete.llm.client import LLMClient

Need = Literal["examples", "data", "llm", "logprobs", "donors"]


class SplitData(ABC):
    """The rows and firings of one coder, split by document. One object serves all latents of the coder."""

    @property
    @abstractmethod
    def tokens(self) -> TokenTable:
        """The token-bytes table."""

    @abstractmethod
    def rows(self, split: Split) -> Rows:
        """Return the rows that hold text of a split, in store order. The object is made once and kept.

        Where a row also holds documents of other splits, their positions have document −1 and do not count.
        """

    @abstractmethod
    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        """Return the firings of each latent in the split's text; ``Firings.rows`` index into ``rows(split)``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """Another latent whose explanation serves as a null: ``rank`` orders donors by how like their firing rate is."""

    explanation: Explanation
    rank: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentView:
    """One latent as explainers and scorers see it.

    ``data`` gives rows and firings by split (None when only examples are at hand); ``donors`` are other latents'
    explanations; ``llm`` is None when there is no language model.
    """

    latent: LatentId
    tokens: TokenTable
    examples: ExampleSet
    data: SplitData | None = None
    donors: tuple[Donor, ...] = ()
    llm: LLMClient | None = None

    def require_llm(self) -> LLMClient:
        """Return the language model. Raises InputError naming the option to give when there is none."""
        if self.llm is None:
            raise InputError("this needs a language model; give one with --llm URL#MODEL")
        return self.llm

    def require_data(self) -> SplitData:
        """Return the rows and firings by split. Raises InputError when the view was made from examples alone."""
        if self.data is None:
            raise InputError("this needs all firings of the latent; make the view with run.latent(coder, index)")
        return self.data
