"""The tables of the page: what was found, by experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from studies.recurrent import criteria as c
from studies.recurrent.drawing import LENSES
from studies.recurrent.models import FAMILIES, RECURRENT
from studies.recurrent.work import Result

from exegete.testing import FAMILIES as EVERY

Families = Mapping[str, Sequence[Result]]
Table = tuple[Sequence[str], list[list[str]]]
"""Heads of the columns, and rows of cells."""
_FEATURES: Final = {"last": "residual stream", "pair": "contrast pair", "state": "state"}
_PROBES: Final = (
    ("last", "lr"),
    ("last", "mean-diff"),
    ("pair", "lr-on-pair"),
    ("pair", "mean-diff-on-pair"),
    ("state", "lr"),
    ("state", "mean-diff"),
)
_OWN: Final = {
    "alice": "the model's answer, what Alice says",
    "bob": "the model's answer, what Bob says",
    "truth in Bob's context": "the model's answer in Bob's context, the truth",
    "truth where they disagree": "the same, where they disagree",
}
_RULES: Final = {
    "A->B": (("character", "EIL"), (None, "best")),
    "AE->BH": (("character", "EIL"), ("earliest", "EIL easy"), (None, "best")),
}


def _quirky(families: Families) -> list[Table]:
    heads = [FAMILIES[family] for family in families]

    def own(results: Sequence[Result], name: str) -> str:
        return _spread(results, lambda r: float(r["own"][name]))

    def odd(results: Sequence[Result], name: str) -> str:
        return _median(results, lambda r: float(r["anomaly"].get(name, math.nan)))

    first = [[text, *(own(results, name) for results in families.values())] for name, text in _OWN.items()]
    for what, sizes, pools in (("rows fitted on", "fit", ("A", "AE")), ("rows tested on", "sizes", ("B", "BH"))):
        cells = [", ".join(str(results[0][sizes][pool]) for pool in pools) for results in families.values()]
        first.append([f"{what}: {', '.join(pools)} (first seed)", *cells])
    probes = dict.fromkeys(name for results in families.values() for name in results[0]["anomaly"])
    last = [[name.replace("last ", "residual "), *(odd(r, name) for r in families.values())] for name in probes]
    return [
        (["AUROC: median (lowest, highest seed)", *heads], first),
        *(_transfer(families, transfer) for transfer in _RULES),
        (["anomalies told by the log-odds of: AUROC", *heads], last),
    ]


def _transfer(families: Families, transfer: str) -> Table:
    """Return AUROCs against the truth by probe, family and rule."""

    def cell(results: Sequence[Result], feature: str, probe: str, rule: str | None) -> str:
        return _median(results, lambda r: c.auroc(r, feature, probe, transfer, rule=rule))

    rows = []
    for feature, probe in _PROBES:
        cells = [cell(results, feature, probe, rule) for results in families.values() for rule, _ in _RULES[transfer]]
        if any(text != "–" for text in cells):
            rows.append([f"{_FEATURES[feature]}, {probe}", *cells])
    names = [f"{FAMILIES[family]}, {name}" for family in families for _, name in _RULES[transfer]]
    return [f"{transfer.replace('->', '→')}: AUROC against the truth", *names], rows


def _steering(families: Families) -> list[Table]:
    rows = []
    for family, results in families.items():
        for contrast in ("answer", "history"):
            best = [curve for r in results if (curve := c.best_curve(r, contrast, "residual")) is not None]
            lost = _median(results, lambda r, name=contrast: _concepts(r, name))  # type: ignore[misc]
            rows.append([FAMILIES[family], contrast, *_curve(best, lost)])
    head = ["", "contrast", "best sites", "p(−3)", "p(−1.5)", "p(0)", "p(+1.5)", "p(+3)", "nonsense at ±1, ±3"]
    return [([*head, "of it concepts at ±1", "effect (lowest, highest seed)", "mean random", "greatest random"], rows)]


def _concepts(result: Result, contrast: str) -> float:
    """Return how much of the nonsense at the best site is concepts, at −1 or 1, where there is more of it."""
    best = c.best_curve(result, contrast, "residual") or {}
    lost = [(row["concepts"], row["words"]) for row in result["lost"][contrast] if row["site"] == best["site"]]
    concepts, words = max(lost, key=sum)
    return float(concepts / (concepts + words))


def _curve(best: Sequence[Result], lost: str) -> list[str]:
    """Return the cells of one curve, of each seed's best site; ``lost`` stands behind the nonsense."""

    def match(multiplier: float) -> str:
        return _median(best, lambda row: c.at(row, "match", multiplier))

    def nonsense(multiplier: float) -> str:
        return _median(best, lambda row: max(c.at(row, "nonsense", m) for m in (-multiplier, multiplier)))

    return [
        ", ".join(str(row["site"]) for row in best),
        *(match(m) for m in (-3.0, -1.5, 0.0, 1.5, 3.0)),
        f"{nonsense(1.0)}, {nonsense(3.0)}",
        lost,
        _spread(best, lambda row: float(row["effect"])),
        _median(best, lambda row: float(row["random_mean"])),
        _median(best, lambda row: float(row["random_most"])),
    ]


def _states(families: Families) -> list[Table]:
    return [_parts(family, results) for family, results in families.items() if family in RECURRENT]


def _parts(family: str, results: Sequence[Result]) -> Table:
    """Return the effects of one family by what is steered."""

    def cell(contrast: str, mode: str, components: str) -> str:
        return _spread(results, lambda r: c.effect(r, contrast, mode, components))

    kinds = dict.fromkeys((row["mode"], row["components"]) for row in results[0]["swept"]["answer"])
    size = max(len(components.split("+")) for _, components in kinds)
    contrasts = list(results[0]["swept"])
    rows = []
    for mode, components in kinds:
        whole = mode != "state" or len(components.split("+")) == size
        name = mode if whole else f"`{components}` alone"
        rows.append([name, *(cell(contrast, mode, components) for contrast in contrasts)])
    return [f"{FAMILIES[family]}: effect at the best site", *contrasts], rows


def _lenses(families: Families) -> list[Table]:
    def cell(results: Sequence[Result], lens: str, metric: str, place: int) -> str:
        return _median(results, lambda r: float(r["curves"][lens][metric][place]), plain=True)

    sites = next(iter(families.values()))[0]["sites"]
    rows = []
    for family, results in families.items():
        for metric, what in (("ce", "cross-entropy"), ("kl", "KL")):
            for lens in (name for name in LENSES if name in results[0]["curves"]):
                cells = [cell(results, lens, metric, place) for place in range(len(sites))]
                rows.append([FAMILIES[family], what, LENSES[lens], *cells])
        own = _median(results, lambda r: float(r["model"]), plain=True)
        rows.append([FAMILIES[family], "cross-entropy", "the model itself", *[""] * (len(sites) - 1), own])
    return [(["bits per byte", "", "read by", *(f"site {site}".replace("-", "−") for site in sites)], rows)]


def _conformance(families: Families) -> list[Table]:
    rows = []
    found = families["all"][0]["families"]
    for name, one in ((name, found[name]) for name in EVERY if name in found):
        errors = [_scientific(one[key]) for key in ("steps_error", "chunk_error", "batch_error", "mended_error")]
        state = ", ".join(one["components"]) + (f" of {len(one['layers'])}" if one["layers"] else "")
        even = "" if one["linear"] is None else _scientific(one["linear"])
        rows.append([f"`{name}`", one["listed"], *errors, one["route"], state, even])
    head = ["family", "block k in `hidden_states`", "single steps", "several tokens", "steps of rows", "as run here"]
    return [([*head, "fed in", "state, of 3 blocks", "unevenness"], rows)]


TABLES: Final[Mapping[str, Callable[[Families], list[Table]]]] = {
    "E1": _quirky,
    "E2": _quirky,
    "E3": _steering,
    "E4": _states,
    "E5": _lenses,
    "E6": _conformance,
}


def _median(results: Sequence[Result], of: Callable[[Result], float], *, plain: bool = False) -> str:
    value = c.middle(results, of)
    return f"{value:.3f}" if plain and math.isfinite(value) else c.number(value)


def _spread(results: Sequence[Result], of: Callable[[Result], float]) -> str:
    values = [of(result) for result in results]
    if any(math.isnan(value) for value in values):
        return "–"
    text = c.number(c.middle(results, of))
    return text if len(values) == 1 else f"{text} ({c.number(min(values))}, {c.number(max(values))})"


def _scientific(value: float | None) -> str:
    return "fails" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")
