"""Published numbers on quirky models beside a run's own. They ship as data, with where they are from and cautions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from exegete.elk.tables import bracket, of_probe

if TYPE_CHECKING:
    from exegete.elk.anomaly import Anomaly
    from exegete.elk.gap import Recovered


@cache
def published() -> dict[str, Any]:
    """Return the published numbers: ``shares_by_transfer``, ``shares_by_model``, ``anomaly``, source and cautions."""
    return dict(yaml.safe_load((files(__package__) / "reference.yaml").read_text(encoding="utf-8")))


def reference_lines(shares: Sequence[Recovered] = (), anomalies: Sequence[Anomaly] = ()) -> list[str]:
    """Return the published numbers as lines, with the run's own of the same probe and transfer where it has one."""
    held = published()
    lines = [f"published: {held['source']}", *(f"caution: {text}" for text in held["cautions"])]
    lines += ["", "share of the performance gap recovered"]
    for row in held["shares_by_transfer"]:
        lines.append(f"  {row['probe']:<12} {row['transfer']:<8} published {row['share']:.2f}")
        for own in shares:
            if (own.probe, f"{own.source}->{own.target}") == (row["probe"], row["transfer"]):
                told = f"{of_probe(own)} site {own.site} ({own.rule})"
                lines.append(f"  {'':<21} this run {bracket(own.share)} {told}")
    lines.append("share recovered, mean over probes and sets, AE->BH")
    lines += [f"  {model:<14} published {share:.2f}" for model, share in held["shares_by_model"].items()]
    lines.append("anomaly detection, AUROC")
    lines += [f"  published {row['auroc']:.2f} ({row['what']})" for row in held["anomaly"]]
    lines += [f"  this run {bracket(own.auroc)} {of_probe(own)} {own.detector}" for own in anomalies]
    return lines
