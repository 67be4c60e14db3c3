"""Which figures the page has, drawn from results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from studies.recurrent.criteria import best_curve, kl
from studies.recurrent.figures import Panel, Series, figure
from studies.recurrent.models import FAMILIES, RECURRENT
from studies.recurrent.work import Result, Results

_PROBES: Final = (
    ("last", "lr", "residual stream, lr"),
    ("pair", "lr-on-pair", "contrast pair, lr"),
    ("state", "lr", "state, lr"),
    ("state", "mean-diff", "state, mean difference"),
)

LENSES: Final = {"logit": "logit lens", "tuned": "tuned lens", "state": "state-aware lens"}


def figures_of(results: Results) -> dict[str, str]:
    """Return the figures by name, which begins with the experiment's."""
    found: dict[str, str] = {}
    for experiment, study in (("e1", "comparison"), ("e2", "addition")):
        if study in results:
            for transfer in ("A->B", "AE->BH"):
                name = f"{experiment}-{transfer.replace('->', '-').lower()}"
                found[name] = _quirky(results[study], transfer)
    if "registers" in results:
        found["e3"] = _steering(results["registers"])
        if any(family in RECURRENT for family in results["registers"]):
            found["e4"] = _states(results["registers"])
    if "lens" in results:
        found["e5"] = _lenses(results["lens"])
    return found


def _series(name: str, seeds: Sequence[Sequence[float | None]], **how: Any) -> Series:
    """Return the median over seeds with its range, at each tick where every seed has a value."""
    columns = [None if any(v is None for v in column) else column for column in zip(*seeds, strict=True)]

    def each(of: Callable[[Any], float]) -> list[float | None]:
        return [None if column is None else float(of(column)) for column in columns]

    return Series(name=name, values=each(median), low=each(min), high=each(max), **how)


def _quirky(families: Mapping[str, Sequence[Result]], transfer: str) -> str:
    panels = []
    for family, results in families.items():
        sites = sorted({r["site"] for r in results[0]["rows"] if r["site"] is not None})
        series = []
        for feature, probe, name in _PROBES:
            seeds = [_by_site(result, feature, probe, transfer, sites) for result in results]
            if any(value is not None for value in seeds[0]):
                series.append(_series(name, seeds))
        panels.append(Panel(title=FAMILIES[family], ticks=[str(site) for site in sites], series=series))
    title = f"{transfer.replace('->', '→')}: AUROC against the truth by site, every claim (median and range of seeds)"
    return figure(title, panels, label="site", levels=(0.0, 0.25, 0.5, 0.75, 1.0), base=0.5)


def _by_site(result: Result, feature: str, probe: str, transfer: str, sites: Sequence[int]) -> list[float | None]:
    rows = {
        r["site"]: r["all"]
        for r in result["rows"]
        if (r["feature"], r["probe"], r["transfer"]) == (feature, probe, transfer)
    }
    return [rows.get(site) for site in sites]


def _steering(families: Mapping[str, Sequence[Result]]) -> str:
    panels = []
    for family, results in families.items():
        series, ticks = [], []
        for contrast in ("answer", "history"):
            best = [curve for r in results if (curve := best_curve(r, contrast, "residual")) is not None]
            ticks = [f"{m:g}".replace("-", "−") for m in best[0]["multipliers"]]
            series.append(_series(f"{contrast}: p(polite)", [curve["match"] for curve in best]))
            series.append(_series(f"{contrast}: nonsense", [curve["nonsense"] for curve in best], dashed=True))
        panels.append(Panel(title=FAMILIES[family], ticks=ticks, series=series))
    title = "Residual stream steered at the best site: p(polite) and nonsense by multiplier"
    return figure(title, panels, label="multiplier", levels=(0.0, 0.25, 0.5, 0.75, 1.0), base=0.5)


def _states(families: Mapping[str, Sequence[Result]]) -> str:
    panels = []
    for family in (name for name in families if name in RECURRENT):
        results = families[family]
        kinds = list(dict.fromkeys((row["mode"], row["components"]) for row in results[0]["swept"]["answer"]))
        size = max(len(components.split("+")) for _, components in kinds)
        ticks = [m if m != "state" or len(k.split("+")) == size else k.replace("_", " ") for m, k in kinds]
        for contrast in ("answer", "history"):
            seeds, random = [], []
            for result in results:
                curves = [best_curve(result, contrast, mode, components) for mode, components in kinds]
                seeds.append([None if curve is None else curve["effect"] for curve in curves])
                random.append([None if curve is None else curve["random_most"] for curve in curves])
            series = [
                _series("effect", seeds, joined=False),
                _series("greatest of the random ones", random, joined=False),
            ]
            panels.append(Panel(title=f"{FAMILIES[family]}, {contrast}", ticks=ticks, series=series))
    title = "Effect at the best site: what is steered, and each part of the state alone"
    return figure(title, panels, label="", levels=(-0.25, 0.0, 0.25, 0.5, 0.75, 1.0), base=0.0)


def _lenses(families: Mapping[str, Sequence[Result]]) -> str:
    panels, most = [], 0.0
    for family, results in families.items():
        here = [lens for lens in LENSES if lens in results[0]["curves"]]
        series = [_series(LENSES[lens], [kl(r, lens) for r in results]) for lens in here]
        most = max(most, *(value for r in results for value in kl(r, "logit")))
        panels.append(
            Panel(
                title=FAMILIES[family],
                ticks=[str(site).replace("-", "−") for site in results[0]["sites"]],
                series=series,
            )
        )
    step = 0.5 if most <= 3 else 1.0
    levels = [step * i for i in range(int(most / step) + 2)]
    title = "KL from the model to the lens by site, bits per byte"
    return figure(title, panels, label="site (−1 is the embedding)", levels=levels)
