"""The rule explainer: the best small executable rule of a latent, stated in English. It needs no language model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from exegete.examples.build import StoreData
from exegete.explainers.explainer import Explainer
from exegete.explainers.workers import Found, search_on, search_with_detail
from exegete.rules import render
from exegete.rules.evaluate import context_of
from exegete.rules.execute import TokenContext
from exegete.rules.language import Rule
from exegete.tokens import TokenTable
from exegete.types import Explanation, LatentId
from exegete.views import LatentView, Need, SplitData

WORTH_WORKERS = 16  # below so many latents, starting processes costs more than it saves


@final
class RuleExplainer(Explainer):
    """Searches a rule on all train rows and firings. A latent without one gets status ``failed`` and the reason.

    ``detail`` holds the rule's figures on the train split, on which it was chosen: no measure of how good it is.
    """

    def __init__(self) -> None:
        self._prepared: tuple[SplitData, TokenContext] | None = None

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name; there are no arguments."""
        return {"name": "rule", "args": {}}

    @property
    def needs(self) -> frozenset[Need]:
        """All firings of the train split."""
        return frozenset({"data"})

    def explain(self, views: Sequence[LatentView], *, concurrency: int = 16) -> Iterator[Explanation]:
        """Yield one explanation per view; the latents of one coder are searched together."""
        groups: dict[int, list[LatentView]] = {}
        for view in views:
            groups.setdefault(id(view.require_data()), []).append(view)
        for group in groups.values():
            yield from self._group(group)

    def _group(self, views: Sequence[LatentView]) -> Iterator[Explanation]:
        data = views[0].require_data()
        latents = {view.latent.index: view.latent for view in views}
        workers = os.cpu_count() or 1
        if workers > 1 and len(latents) >= WORTH_WORKERS and isinstance(data, StoreData) and data.folder is not None:
            found = search_on(workers, data, list(latents))
        else:
            found = self._here(data, list(latents))
        for index, rule, detail in found:
            yield self._explanation(latents[index], rule, detail, data.tokens)

    def _here(self, data: SplitData, indices: Sequence[int]) -> Iterator[Found]:
        if self._prepared is None or self._prepared[0] is not data:  # explained in blocks, the rows are prepared once
            self._prepared = data, context_of(data, "train")
        yield from search_with_detail(data, indices, self._prepared[1])

    def _explanation(
        self, latent: LatentId, rule: Rule | None, detail: dict[str, Any], table: TokenTable
    ) -> Explanation:
        if rule is None:
            reason = "too few firings in the train split, or no rule tells them from the rest"
            return Explanation(
                latent=latent, text=None, status="failed", explainer=self.spec, detail={"reason": reason}
            )
        return Explanation(
            latent=latent,
            text=render(rule, table),
            status="ok",
            explainer=self.spec,
            program=rule.to_json(),
            detail=detail,
        )
