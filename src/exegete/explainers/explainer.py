"""What every explainer is: latent views in, one explanation each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exegete.registry import Registry
from exegete.types import Explanation
from exegete.views import LatentView, Need


class Explainer(ABC):
    """Turns what is known of a latent into an explanation. A failure is an Explanation with its status, not a text."""

    @property
    @abstractmethod
    def spec(self) -> Mapping[str, Any]:
        """``{"name": …, "args": {…}}``, from which the registry re-creates this explainer."""

    @property
    def prompt_hash(self) -> str:
        """Identity of the prompt it puts to a language model, empty without one: explanations rest on it."""
        return ""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Which parts of a view it uses; what is missing is refused before work starts."""

    @abstractmethod
    def explain(self, views: Sequence[LatentView], *, concurrency: int = 16) -> Iterator[Explanation]:
        """Yield one explanation per view, in any order, as each is ready."""


explainers: Registry[Explainer] = Registry(
    "explainer",
    {
        "rule": "exegete.explainers.rule:RuleExplainer",
        "default": "exegete.explainers.default:DefaultExplainer",
    },
)
