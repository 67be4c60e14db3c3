"""The rule explainer: the best small executable rule of a latent, stated in English. It needs no language model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from exegete.explainers.explainer import Explainer
from exegete.rules import render, search_rules
from exegete.rules.evaluate import RuleMetrics, context_of, evaluate_many
from exegete.rules.execute import TokenContext
from exegete.rules.language import Rule
from exegete.tokens import TokenTable
from exegete.types import Explanation, LatentId
from exegete.views import LatentView, Need, SplitData


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
        if self._prepared is None or self._prepared[0] is not data:  # explained in blocks, the rows are prepared once
            self._prepared = data, context_of(data, "train")
        context = self._prepared[1]
        indices = [view.latent.index for view in views]
        rules = search_rules(data, indices, context=context)
        measured = evaluate_many(rules, data, indices, split="train", context=context)
        for view, rule, metrics in zip(views, rules, measured, strict=True):
            yield self._explanation(view.latent, rule, metrics, data.tokens)

    def _explanation(
        self, latent: LatentId, rule: Rule | None, metrics: RuleMetrics | None, table: TokenTable
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
            detail={} if metrics is None else {"train": _plain(metrics)},
        )


def _plain(metrics: RuleMetrics) -> dict[str, Any]:
    """Return the figures as JSON data; what is undefined (NaN, which JSON lacks) becomes None."""
    figures = dataclasses.asdict(metrics)
    shares = figures.pop("mass_deciles")
    known = {name: None if math.isnan(value) else value for name, value in figures.items()}
    return known | {"mass_deciles": [None if math.isnan(share) else share for share in shares]}
