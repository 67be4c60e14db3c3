"""What came of judging only as much as needed: decisions, and judgements beside those of a fixed number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exegete.analysis.across import judge_name
from exegete.analysis.shapes import Stopped, StoppedLatent
from exegete.results import Results


def stopped(results: Results, coder: str | None = None, *, scorer: str | None = None) -> tuple[Stopped, ...]:
    """Return what came of each scorer whose newest scores were judged in rounds (``--certify``, ``--stop-when``).

    One for each coder, explaining stage and scorer, of ``coder`` and ``scorer`` alone where these are named;
    measurements first, then plumbing checks, marked as such. Empty where nothing was judged in rounds.
    """
    names = sorted(results.coders()) if coder is None else [coder]
    scorers = [name for name, _ in results.headlines() if scorer in (None, name)]
    found = (
        _stopped(results, name, explainer, one, plumbing=plumbing)
        for plumbing in (False, True)
        for name in names
        for explainer in results.explainers(name)
        for one in scorers
    )
    return tuple(one for one in found if one is not None)


def _stopped(
    results: Results, coder: str, explainer: tuple[str, str], scorer: str, *, plumbing: bool
) -> Stopped | None:
    key, name = explainer
    spec = results.scored_with(coder, scorer, key, plumbing=plumbing)
    args = (spec.get("scorer") or {}).get("args") or {}
    certify, stop_when = args.get("certify"), args.get("stop_when")
    if certify is None and stop_when is None:
        return None
    details = results.details(coder, scorer, explainer=key, plumbing=plumbing)
    latents = tuple(_latent(index, details[index]) for index in sorted(details) if "judgements" in details[index])
    if not latents:
        return None
    return Stopped(
        coder=coder,
        explainer=name,
        scorer=scorer,
        judge=judge_name(spec),
        plumbing=plumbing,
        certify=certify,
        margin=float(args.get("margin", math.nan)),
        stop_when=stop_when,
        latents=latents,
    )


def _latent(index: int, detail: Mapping[str, Any]) -> StoppedLatent:
    width = detail.get("half_width")
    return StoppedLatent(
        index=index,
        certified=detail.get("certified"),
        judgements=int(detail["judgements"]),
        fixed_test=detail.get("fixed_test"),
        half_width=math.nan if width is None else float(width),
        fixed_width=detail.get("fixed_width"),
    )
