"""The stated criteria of E1 to E6, and whether results meet them: medians over seeds unless one says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, final

from studies.recurrent.conformance import KNOWN, UNMEASURED
from studies.recurrent.models import FAMILIES, RECURRENT
from studies.recurrent.work import Result, Results

NEAR: Final = 0.05
"""What steering both may lie below the better of state and residual stream."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One criterion for one family: what was found, and whether that meets it."""

    experiment: str
    criterion: str
    family: str
    found: str
    met: bool


def judged(results: Results) -> list[Judged]:
    """Return all criteria that there are results for, by experiment."""
    found: list[Judged] = []
    for experiment, study, judge in (
        ("E1", "comparison", _comparison),
        ("E2", "addition", _addition),
        ("E3", "registers", _steering),
        ("E4", "registers", _states),
        ("E5", "lens", _lens),
        ("E6", "conformance", _conformance),
    ):
        by_family = results.get(study, {})
        for family in (name for name in (*FAMILIES, "all") if name in by_family):
            for criterion, text, met in judge(family, by_family[family]):
                found.append(Judged(experiment=experiment, criterion=criterion, family=family, found=text, met=met))
    return found


Criteria = Iterator[tuple[str, str, bool]]


def middle(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    """Return the median over seeds, NaN where any has none."""
    values = [of(result) for result in results]
    return math.nan if any(math.isnan(value) for value in values) else median(values)


# E1 and E2 -------------------------------------------------------------------------------------------------------


def auroc(
    result: Result, feature: str, probe: str, transfer: str, *, rule: str | None = None, which: str = "all"
) -> float:
    """Return the AUROC at the site that a rule chooses, or at the best site on the test rows where it is None."""
    rows = [r for r in result["rows"] if (r["feature"], r["probe"], r["transfer"]) == (feature, probe, transfer)]
    values = [r[which] for r in rows if r[which] is not None and (rule is None or rule in r["rules"])]
    return max(values, default=math.nan)


def residual_auroc(result: Result, transfer: str, rule: str) -> float:
    """Return that of the better of both probes of the residual stream at the last token."""
    return max(auroc(result, "last", probe, transfer, rule=rule) for probe in ("lr", "mean-diff"))


def last_site(result: Result, probe: str, transfer: str, which: str) -> float:
    """Return the AUROC of a probe of the residual stream after the last block."""
    rows = [r for r in result["rows"] if (r["feature"], r["probe"], r["transfer"]) == ("last", probe, transfer)]
    value = max(rows, key=lambda r: r["site"])[which]
    return math.nan if value is None else float(value)


def _own(results: Sequence[Result]) -> float:
    return middle(results, lambda r: min(r["own"]["alice"], r["own"]["bob"]))


def _comparison(family: str, results: Sequence[Result]) -> Criteria:
    own = _own(results)
    yield "the model says what it was trained to: AUROC ≥ .97", number(own), own >= 0.97
    quirk = middle(results, lambda r: last_site(r, "lr", "A->B", "disagree"))
    yield "the quirk is real: residual lr, last site, A→B, where they disagree ≤ .3", number(quirk), quirk <= 0.3
    pair = middle(results, lambda r: auroc(r, "pair", "lr-on-pair", "A->B"))
    yield "lr on the contrast pair, best site, A→B ≥ .90", number(pair), pair >= 0.9
    if family in RECURRENT:
        state = middle(results, lambda r: auroc(r, "state", "mean-diff", "A->B", rule="character"))
        yield "state mean-difference at the EIL, A→B ≥ .90", number(state), state >= 0.9
        for transfer, rule, where in (
            ("A->B", "character", ""),
            ("AE->BH", "character", ", EIL on all of Alice's rows"),
            ("AE->BH", "earliest", ", EIL on Alice's easy rows"),
        ):
            more = middle(results, lambda r, t=transfer, u=rule: _more(r, t, u))  # type: ignore[misc]
            text = f"state mean-difference − residual ≥ .15, {transfer.replace('->', '→')}{where}"
            yield text, number(more, signed=True), more >= 0.15
    odd = middle(results, lambda r: float(r["anomaly"].get("last lr", math.nan)))
    yield "anomalies by residual lr ≥ .75", number(odd), odd >= 0.75


def _more(result: Result, transfer: str, rule: str) -> float:
    return auroc(result, "state", "mean-diff", transfer, rule=rule) - residual_auroc(result, transfer, rule)


def _addition(family: str, results: Sequence[Result]) -> Criteria:
    pair = middle(results, lambda r: auroc(r, "pair", "lr-on-pair", "A->B"))
    yield "lr on the contrast pair, best site, A→B ≥ .9", number(pair), pair >= 0.9


# E3 and E4 -------------------------------------------------------------------------------------------------------


def best_curve(result: Result, contrast: str, mode: str, components: str | None = None) -> Mapping[str, Any] | None:
    """Return the curve with the greatest effect over the sites; of the whole state where no component is named."""
    rows = [row for row in result["swept"].get(contrast, ()) if row["mode"] == mode]
    if components is None:
        size = max((len(row["components"].split("+")) for row in rows), default=0)
        rows = [row for row in rows if len(row["components"].split("+")) == size]
    else:
        rows = [row for row in rows if row["components"] == components]
    return max(rows, key=lambda row: row["effect"], default=None)


def at(row: Mapping[str, Any], what: str, multiplier: float) -> float:
    """Return match or nonsense of a curve at one multiplier."""
    return float(row[what][row["multipliers"].index(multiplier)])


def effect(result: Result, contrast: str, mode: str, components: str | None = None) -> float:
    """Return the effect at the best site, NaN where the mode was not swept."""
    row = best_curve(result, contrast, mode, components)
    return math.nan if row is None else float(row["effect"])


def _steering(family: str, results: Sequence[Result]) -> Criteria:
    for contrast, most in (("answer", 0.5), ("history", 0.3)):

        def of(what: Callable[[Mapping[str, Any]], float], contrast: str = contrast) -> float:
            return middle(results, lambda r: what(best_curve(r, contrast, "residual") or {}))

        base = of(lambda row: at(row, "match", 0.0))
        yield f"{contrast}: unsteered p in .4 … .6", number(base), 0.4 <= base <= 0.6
        rank = of(lambda row: float(row["spearman"]))
        yield f"{contrast}: Spearman of multiplier and p ≥ .85", number(rank), rank >= 0.85
        high, low = of(lambda row: at(row, "match", 1.5)), of(lambda row: at(row, "match", -1.5))
        yield f"{contrast}: p(+1.5) ≥ .8 and p(−1.5) ≤ .2", f"{number(high)}, {number(low)}", high >= 0.8 and low <= 0.2
        lost = of(lambda row: max(at(row, "nonsense", 1.0), at(row, "nonsense", -1.0)))
        yield f"{contrast}: nonsense at ±1 ≤ {number(most)}", number(lost), lost <= most
        times = of(lambda row: row["effect"] / row["random_mean"])
        yield f"{contrast}: effect ≥ 3 × the mean of random ones", f"{times:.1f} ×", times >= 3
        over = of(lambda row: row["effect"] - row["random_most"])
        yield f"{contrast}: effect above the greatest random one", f"by {number(over, signed=True)}", over > 0


def _states(family: str, results: Sequence[Result]) -> Criteria:
    if family not in RECURRENT:
        return
    for contrast in ("answer", "history"):
        state = middle(results, lambda r, c=contrast: effect(r, c, "state"))  # type: ignore[misc]
        yield f"{contrast}: effect of the state ≥ .6", number(state), state >= 0.6
        more = middle(results, lambda r, c=contrast: _joint(r, c))  # type: ignore[misc]
        text = f"{contrast}: both ≥ the better one − {number(NEAR)}"
        yield text, number(more, signed=True), more >= -NEAR
    same = all(result["untouched"] for result in results)
    yield "an edited copy leaves a later unsteered call bit-identical (every seed)", "yes" if same else "no", same


def _joint(result: Result, contrast: str) -> float:
    alone = max(effect(result, contrast, "state"), effect(result, contrast, "residual"))
    return effect(result, contrast, "both") - alone


# E5 --------------------------------------------------------------------------------------------------------------


def kl(result: Result, lens: str) -> list[float]:
    """Return KL(model ‖ lens) in bits per byte at every site."""
    return [float(value) for value in result["curves"][lens]["kl"]]


def _ratios(result: Result, sites: int | None = None) -> list[float]:
    both = list(zip(kl(result, "tuned"), kl(result, "logit"), strict=True))
    return [tuned / logit for tuned, logit in both[:sites]]


def _lens(family: str, results: Sequence[Result]) -> Criteria:
    error = max(float(r["readout_error"]) for r in results)
    yield "readout of the last block − logits < 10⁻⁴ (every seed)", f"{error:.1g}", error < 1e-4
    worst = max(max(_ratios(r)) for r in results)
    yield "tuned KL ≤ logit KL at every site (every seed)", f"at most {number(worst)} ×", worst <= 1
    half = max(max(_ratios(r, len(kl(r, "tuned")) // 2)) for r in results)
    yield "tuned KL ≤ .5 × logit KL in the first half (every seed)", f"at most {number(half)} ×", half <= 0.5
    rise = max(max(b - a for a, b in zip(kl(r, "tuned"), kl(r, "tuned")[1:], strict=False)) for r in results)
    yield (
        "tuned KL rises by ≤ .02 bits from site to site (every seed)",
        f"{number(rise, signed=True)} at most",
        rise <= 0.02,
    )
    for name, text in (
        ("starts_as_logit", "an untrained tuned lens is the logit lens, bit for bit"),
        ("same_after_loading", "saved and loaded: the same logits, bit for bit"),
        ("refused", "refused for another model"),
    ):
        holds = all(result[name] for result in results)
        yield f"{text} (every seed)", "yes" if holds else "no", holds
    unit = max(float(r["unit_error"]) for r in results)
    yield "bits per byte = nats · tokens / bytes / ln 2 (every seed)", f"{unit:.0e}", unit < 1e-9


# E6 --------------------------------------------------------------------------------------------------------------


def _conformance(family: str, results: Sequence[Result]) -> Criteria:
    found: Mapping[str, Mapping[str, Any]] = results[0]["families"]
    other = [f"{name}: {_difference(name, one)}" for name, one in found.items() if _difference(name, one)]
    measured = [name for name in KNOWN if name in found]
    text = "; ".join(other) or "no difference"
    yield f"the known mistakes of {len(measured)} families, and no others", text, not other
    worst = max(float(one["readout_error"]) for one in found.values())
    yield "readout = logits in every family", f"{worst:.1g} at most", worst < 1e-4
    off = [name for name, one in found.items() if one["mended_error"] is None or one["mended_error"] > one["bound"]]
    text = f"off: {', '.join(off)}" if off else "all"
    yield "passes under way = whole passes to 10⁻⁴ of the largest logit", text, not off
    kept = [name for name, one in found.items() if one["copies"] is False]
    yield "copies independent, zero edits change no bit", ", ".join(kept) or "all", not kept
    even = max((float(one["linear"]) for one in found.values() if one["linear"] is not None), default=math.nan)
    yield "the first step is linear in the edit where it should be: off by ≤ 10⁻³", f"{even:.0e}", even <= 1e-3


def _difference(family: str, found: Mapping[str, Any]) -> str:
    """Return what a family of the table does that the table does not say, or the other way round."""
    if family not in KNOWN:
        return ""
    wrong = {name for name in found["wrong"] if (family, name) not in UNMEASURED}
    odd = wrong ^ KNOWN[family]
    return ", ".join(f"{name} {'wrong' if name in wrong else 'right'}" for name in sorted(odd))


def number(value: float, *, signed: bool = False) -> str:
    """Return a number of three digits without its leading zero, as AUROCs and probabilities are written."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1).replace("-", "−")


def counts(found: Iterable[Judged]) -> str:
    """Return how many criteria are met."""
    rows = list(found)
    return f"{sum(one.met for one in rows)} of {len(rows)}"
