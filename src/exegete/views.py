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
    from exegete.coders.coder import SparseCoder
    from exegete.llm.client import LLMClient
    from exegete.llm.reader import Reader
    from exegete.subjects import Subject

Need = Literal["examples", "data", "llm", "logprobs", "prompt_logprobs", "donors", "subject", "coder", "reader", "near"]
"""What explainers and scorers may ask for: ``near`` are the explanations of the nearest latents; the others are fields
of a view, ``logprobs`` and ``prompt_logprobs`` those of its language model."""


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
class Near:
    """A latent near another, most like it first, and what was said of it; ``similarity`` as its kind measures it."""

    explanation: Explanation
    similarity: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentView:
    """One latent as explainers and scorers see it.

    ``data`` gives rows and firings by split (None when only examples are at hand); ``donors`` are other latents'
    explanations, ``near`` those of the nearest latents, nearest first; ``llm`` is None when there is no language model,
    ``reader`` is one whose log probabilities are read; ``subject`` and ``coder`` are there for scorers that run them.
    """

    latent: LatentId
    tokens: TokenTable
    examples: ExampleSet
    data: SplitData | None = None
    donors: tuple[Donor, ...] = ()
    llm: LLMClient | None = None
    near: tuple[Near, ...] = ()
    reader: Reader | None = None
    subject: Subject | None = None
    coder: SparseCoder | None = None

    def require_llm(self) -> LLMClient:
        """Return the language model. Raises InputError naming the option to give when there is none."""
        if self.llm is None:
            raise InputError("this needs a language model; give one with --llm URL#MODEL")
        return self.llm

    def require_reader(self) -> Reader:
        """Return what reads log probabilities. Raises InputError naming the option to give when there is none."""
        if self.reader is None:
            raise InputError("this reads log probabilities; name the language model that gives them with --reader")
        return self.reader

    def require_subject(self) -> tuple[Subject, SparseCoder]:
        """Return the subject and the coder. Raises InputError when the view was made without them."""
        if self.subject is None or self.coder is None:
            raise InputError("this runs the subject and its coder; give both with subject=… and coder=…")
        return self.subject, self.coder

    def require_data(self) -> SplitData:
        """Return the rows and firings by split. Raises InputError when the view was made from examples alone."""
        if self.data is None:
            raise InputError("this needs all firings of the latent; make the view with run.latent(coder, index)")
        return self.data
