"""The published measurements of lenses on Pythia, Mamba and RWKV, to hold a run beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.files import read_json

if TYPE_CHECKING:
    from exegete.lens.evaluating import Evaluation

_TABLES = {"tuned_ce": ("tuned", "ce"), "logit_ce": ("logit", "ce"), "tuned_kl": ("tuned", "kl")}
_TITLES = {
    "tuned_ce": "cross-entropy of the tuned lens, bits per byte, by share of the sites",
    "logit_ce": "cross-entropy of the logit lens, bits per byte, by share of the sites",
    "tuned_kl": "KL of the tuned lens to the model, bits per byte, by share of the sites",
}
_MEANS = ("logit ce", "tuned ce", "logit kl", "tuned kl")
_MEANS_TITLE = "means over the sites, bits per byte"


def published_tables() -> dict[str, Any]:
    """Return the published tables: ``models`` with values at ``fractions`` of their listed sites, origin, cautions."""
    return dict(read_json(Path(str(resources.files(__package__))) / "published.json"))


def at_fractions(values: Sequence[float], fractions: Sequence[float]) -> list[float]:
    """Return values read off at shares 0 … 1 of their places, linearly interpolated; NaN of none."""
    if not values:
        return [math.nan] * len(fractions)
    found = []
    for share in fractions:
        place = share * (len(values) - 1)
        low = min(int(place), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        found.append(values[low] + (place - low) * (values[high] - values[low]))
    return found


def compared(evaluation: Evaluation | None, *, family: str | None = None) -> list[str]:
    """Return the published tables as lines of text, each with the run's own row first where it has one.

    ``family`` (pythia, mamba, rwkv) leaves the others out.
    """
    data = published_tables()
    lines: list[str] = []
    for table, (lens, metric) in _TABLES.items():
        fractions: list[float] = data["fractions"][table]
        lines += ["", _TITLES[table], _line("", "model", [f"{f:g}" for f in fractions])]
        own = {} if evaluation is None else evaluation.nats
        for name, by_metric in own.items():
            if name == lens or name.startswith(f"{lens} "):
                by = 1.0 if evaluation is None else evaluation.bits_per_byte
                values = [one.value * by for one in by_metric[metric].values()]
                lines.append(_line("this run", _own_ce(evaluation), _numbers(at_fractions(values, fractions))))
        for model in data["models"]:
            if model[table] is not None and family in (None, model["family"]):
                lines.append(
                    _line(f"{model['family']} {model['size']}", f"{model['model_ce']:.3f}", _numbers(model[table]))
                )
    lines += ["", _MEANS_TITLE, _line("", "model", _MEANS)]
    if evaluation is not None:
        lines.append(_line("this run", _own_ce(evaluation), _numbers(_own_means(evaluation))))
    for model in data["models"]:
        if family in (None, model["family"]):
            values = [model[f"{name.replace(' ', '_mean_')}"] for name in _MEANS]
            lines.append(_line(f"{model['family']} {model['size']}", f"{model['model_ce']:.3f}", _numbers(values)))
    return [*lines[1:], "", f"origin: {data['origin']}", *(f"- {one}" for one in data["cautions"])]


def _own_means(evaluation: Evaluation) -> list[float]:
    found = []
    for name in _MEANS:
        lens, metric = name.split(" ")
        values = [one.value for one in evaluation.nats.get(lens, {}).get(metric, {}).values()]
        found.append(sum(values) / len(values) * evaluation.bits_per_byte if values else math.nan)
    return found


def _own_ce(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    baseline: Mapping[str, Any] = evaluation.baseline
    return f"{baseline['ce'].value * evaluation.bits_per_byte:.3f}"


def _numbers(values: Sequence[float]) -> list[str]:
    return ["–" if math.isnan(value) else f"{value:.3f}" for value in values]


def _line(name: str, model: str, cells: Sequence[str]) -> str:
    return f"{name:<14}{model:>8}" + "".join(f"{cell:>9}" for cell in cells)
