from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from exegete.analysis.curves import stratum_order, stratum_text
from exegete.analysis.shapes import split_name
from exegete.analysis.summary import ranking, summarise, summary_json, table_text
from exegete.analysis.text import bracket, number, percent, signed, small
from exegete.metrics import Interval
from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, Judgement, LatentId, LatentStats, Score, Skipped

if TYPE_CHECKING:
    from .conftest import SyntheticRun


def interval(value: float, low: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high, method="m", n=9)


def add(
    results: Results,
    coder: str,
    values: list[float],
    nulls: list[float],
    *,
    explainer: str = "rule",
    auprc: list[float] | None = None,
    judge: str = "rule",
    flags: tuple[str, ...] = (),
) -> None:
    """A coder with one latent per value; latent i fires at rate (i + 1) / 1000 with entropy i."""
    results.add_stage(f"d {coder}", "detection", {"judge": judge, "explain": f"{explainer} {coder}"})
    for i, (value, null) in enumerate(zip(values, nulls, strict=True)):
        latent = LatentId(coder=coder, index=i)
        made = Explanation(latent=latent, text="t", status="ok", explainer={"name": explainer}, program={})
        id_ = results.add_explanation(made, f"{explainer} {coder}")
        scores = [score(latent, "detection", "balanced_accuracy", value, flags=flags)]
        scores.append(score(latent, "detection", "balanced_accuracy", null, control="other_latent", flags=flags))
        judged = tuple(
            Judgement(
                row=r, start=0, document=0, stratum=s, truth=t, prediction=p, status="ok" if p is not None else "failed"
            )
            for r, (s, t, p) in enumerate(
                [
                    ("decile_0", True, True),
                    ("decile_0", True, i == 0),
                    ("decile_9", True, None),
                    ("silent", False, True),
                ]
            )
        )
        results.add_scoring(
            Scoring(explanation=made, scores=tuple(scores), judgements={"none": judged}), f"d {coder}", id_
        )
        if auprc is not None:
            executed = (
                score(latent, "execution", "auprc", auprc[i]),
                score(latent, "execution", "base_rate", 0.01),
                score(latent, "execution", "mass_decile_0", auprc[i]),
                score(latent, "baseline", "auprc_bigram", auprc[i] - 0.25),
            )
            results.add_scoring(Scoring(explanation=made, scores=executed, judgements={}), f"x {coder}", id_)
        results.add_latents(
            [
                LatentStats(
                    latent=latent,
                    count=i + 1,
                    rate=(i + 1) / 1000,
                    maximum=1.0,
                    mean=1.0,
                    sum_squares=1.0,
                    histogram=np.array([1]),
                    edges=np.array([0.0, 1.0]),
                    top_tokens=(),
                    token_entropy=float(i),
                )
            ],
            selected=[latent],
        )


def score(latent: LatentId, scorer: str, metric: str, value: float, **changes: Any) -> Score:
    counts = {"n_total": 4, "n_scored": 3, "n_failed": 1, **changes}
    return Score(latent=latent, scorer=scorer, metric=metric, value=value, low=value, high=value, method="m", **counts)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "results.db")


def test_numbers_by_hand(results: Results) -> None:
    add(results, "a", [0.9, 0.7, 0.8, 0.6, math.nan], [0.5, 0.5, 0.4, 0.7, 0.5])
    results.add_skip(Skipped(latent=LatentId(coder="a", index=99), stage="select", reason="rare", have=1, need=2), "k")
    (coder,) = summarise(results).coders
    (explainer,) = coder.explainers
    (found,) = explainer.scorers
    assert (coder.n_latents, coder.n_alive, coder.n_selected, coder.n_explained, coder.n_skipped) == (5, 5, 5, 5, 1)
    assert coder.skipped == (("select", "rare", 1),)
    assert coder.entropy.value == 2.0
    assert (found.n, found.n_unscored, found.n_failed, found.n_total) == (4, 1, 5, 20)
    assert found.median.value == pytest.approx(0.75)
    assert found.null_mean.value == pytest.approx(2.6 / 5)
    assert found.null_median.value == 0.5
    assert found.ties.value == pytest.approx(3 / 5)
    # paired: 0.4, 0.2, 0.4, −0.1; the latent without a score is out. Not the difference of medians, 0.25.
    assert found.lift.value == pytest.approx(0.3)
    assert found.lift.n == 4
    assert found.judge == "executed rule"
    assert explainer.executed is None
    assert (explainer.thirds, explainer.mass) == ((), ())


def test_curves_are_means_over_latents_of_what_was_judged(results: Results) -> None:
    add(results, "a", [0.9, 0.7], [0.5, 0.5])
    (found,) = summarise(results).coders[0].explainers[0].scorers
    sensitivity, specificity = found.curves
    assert (sensitivity.truth, specificity.truth) == (True, False)
    assert [(name, n, mean.value) for name, n, mean in sensitivity.points] == [("decile_0", 2, 0.75)]  # 1 and ½
    assert [(name, n, mean.value) for name, n, mean in specificity.points] == [("silent", 2, 0.0)]


def test_thirds_are_by_firing_rate_and_lifts_are_paired(results: Results) -> None:
    auprc = [0.30, 0.32, 0.34, 0.50, 0.52, 0.54, 0.90, 0.92, 0.94]
    add(results, "a", [0.8] * 9, [0.5] * 9, auprc=auprc)
    explainer = summarise(results).coders[0].explainers[0]
    assert explainer.executed is not None
    assert explainer.executed.metric("auprc").value == 0.52
    assert [part.metric("auprc").value for part in explainer.thirds] == [0.32, 0.52, 0.92]
    assert [part.n for part in explainer.thirds] == [3, 3, 3]
    assert explainer.thirds[0].rates == pytest.approx((0.001, 0.003))
    for part in (explainer.executed, *explainer.thirds):
        assert dict(part.lifts)["auprc_bigram"].value == pytest.approx(0.25)
        assert set(dict(part.baselines)) == {"auprc_bigram"}
    assert explainer.mass[0].value == 0.52
    assert math.isnan(explainer.mass[9].value)


def test_contrasts_are_trained_minus_null_whatever_the_sign(results: Results) -> None:
    add(results, "a", [0.6, 0.7, 0.8], [0.5] * 3, auprc=[0.2, 0.3, 0.4])
    add(results, "a@random-coder", [0.9, 0.9, 0.9], [0.4] * 3, auprc=[0.1, 0.1, 0.1])
    add(results, "b@random-subject", [0.9], [0.4])  # its trained coder is not there
    summary = summarise(results)
    assert [c.name for c in summary.coders] == ["a", "a@random-coder", "b@random-subject"]
    assert [c.name for c in summary.trained()] == ["a"]
    found = {c.quantity: c for c in summary.contrasts}
    assert list(found) == ["detection", "detection lift", "executed auprc", "token entropy"]
    assert found["detection"].difference.value == pytest.approx(-0.2)
    assert found["detection lift"].difference.value == pytest.approx(0.2 - 0.5)
    assert found["executed auprc"].difference.value == pytest.approx(0.2)
    assert found["token entropy"].difference.value == 0
    assert {(c.coder, c.role) for c in summary.contrasts} == {("a", "random-coder")}


def test_explainers_are_kept_apart(results: Results) -> None:
    add(results, "a", [0.9, 0.9], [0.5, 0.5])
    add(results, "a", [0.6, 0.6], [0.5, 0.5], explainer="default")
    (coder,) = summarise(results).coders
    assert [(e.name, dict(e.statuses)) for e in coder.explainers] == [("rule", {"ok": 2}), ("default", {"ok": 2})]
    rule, default = coder.explainers
    assert rule.scorers[0].median.value == 0.9
    assert default.scorers == ()  # the scoring's key was done by the first explainer
    assert coder.n_explained == 2


def test_plumbing_checks_stay_out_of_the_headlines(results: Results) -> None:
    add(results, "a", [0.9, 0.8], [0.5, 0.5], flags=("plumbing",))
    add(results, "a@random-coder", [0.6, 0.7], [0.5, 0.5], flags=("plumbing",))
    summary = summarise(results)
    (trained,) = summary.trained()
    assert [s.plumbing for s in trained.explainers[0].scorers] == [True]
    assert trained.explainers[0].measured == ()
    assert [c.quantity for c in summary.contrasts] == ["token entropy"]
    assert len(ranking(results, "a", trained.explainers[0])[1]) == 0
    text = table_text(summary)
    assert text.index("Latents") < text.index("Plumbing check, not a measurement: Scores beside their nulls")
    # The same latents judged for good: both stand in the summary, and only these in its headline.
    for i, latent in enumerate(results.explanations("a").values()):
        good = (score(latent.latent, "detection", "balanced_accuracy", 0.6 + i / 10),)
        results.add_scoring(Scoring(explanation=latent, scores=good, judgements={}), "again", i + 1)
    (explainer,) = summarise(results).trained()[0].explainers
    assert [(s.plumbing, round(s.median.value, 6)) for s in explainer.scorers] == [(False, 0.65), (True, 0.85)]


def test_alive_follows_the_configured_rate(results: Results) -> None:
    add(results, "a", [0.9] * 4, [0.5] * 4, judge="http://host/v1#some/judge")
    results.put_meta("config", {"latents": {"min_rate": 0.0025}})
    (coder,) = summarise(results).coders
    assert coder.n_alive == 2
    assert coder.explainers[0].scorers[0].judge == "some/judge"


def test_counts_over_the_whole_coder_win_over_those_of_the_drawn_latents(results: Results) -> None:
    add(results, "a", [0.9] * 4, [0.5] * 4)
    results.put_meta("coder a", {"width": 4096, "alive": 1234})
    (coder,) = summarise(results).coders
    assert (coder.n_latents, coder.n_alive, coder.n_selected) == (4096, 1234, 4)


def test_ranking_prefers_executed_auprc(results: Results) -> None:
    add(results, "a", [0.9, 0.8], [0.5, 0.5])
    add(results, "b", [0.9, 0.8], [0.5, 0.5], auprc=[0.3, 0.6])
    a, b = summarise(results).coders
    by, column = ranking(results, "a", a.explainers[0])
    assert (by, column.value.tolist()) == ("detection balanced accuracy", [0.9, 0.8])
    by, column = ranking(results, "b", b.explainers[0])
    assert (by, column.value.tolist()) == ("executed AUPRC", [0.3, 0.6])


def test_an_empty_run_has_a_summary(results: Results) -> None:
    summary = summarise(results)
    assert (summary.coders, summary.contrasts) == ((), ())
    assert table_text(summary) == "no results yet"
    results.add_skip(Skipped(latent=LatentId(coder="a", index=9), stage="s", reason="r", have=1, need=2), "k")
    assert "1 skipped at s: r" in table_text(summarise(results))


def test_the_table_fits_and_prints_the_summary(synthetic_run: SyntheticRun) -> None:
    with synthetic_run.results() as results:
        summary = summarise(results)
    text = table_text(summary)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("Trained against nulls")
    part = lines[lines.index("Latents") :]
    scores = part[part.index("Scores beside their nulls (medians over latents)") :]
    for coder in summary.coders:
        row = next(line for line in part if line.split()[:1] == [coder.name])
        assert [coder.n_latents, coder.n_alive, coder.n_selected] == [int(cell) for cell in row.split()[1:4]]
        assert row.endswith(bracket(coder.entropy, digits=2))
        for found in coder.explainers[0].scorers:
            row = next(line for line in scores if line.split()[:3] == [coder.name, "rule", found.scorer])
            for shown in (
                bracket(found.median, digits=2),
                number(found.null_mean.value),
                bracket(found.lift, sign=True, digits=2),
            ):
                assert f" {shown}" in row
    for c in summary.contrasts:
        assert bracket(c.difference, sign=True, digits=2) in text
    assert "\x1b" not in text


def test_long_and_hostile_names_keep_the_table_in_shape(results: Results) -> None:
    name = "gpt_neox.layers.11.attention.dense\u202e" + "x" * 60
    add(results, name, [0.9], [0.5], auprc=[0.5])
    add(results, f"{name}@random-subject", [0.9], [0.5], auprc=[0.5])
    gone = Skipped(latent=LatentId(coder=name, index=9), stage="s", reason="\x1b[2J" * 99, have=1, need=2)
    results.add_skip(gone, "k")
    text = table_text(summarise(results))
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_summary_json_holds_the_numbers(synthetic_run: SyntheticRun) -> None:
    with synthetic_run.results() as results:
        summary = summarise(results)
    data = json.loads(summary_json(summary))
    assert data["coders"][0]["explainers"][0]["scorers"][0]["median"]["value"] == (
        summary.coders[0].explainers[0].scorers[0].median.value
    )
    assert len(data["contrasts"]) == len(summary.contrasts) > 0
    assert summary_json(summary) == summary_json(summary)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.5), "−0.500"),
        (number(-0.0001), "0.000"),
        (number(math.nan), "–"),
        (number(math.inf), "∞"),
        (number(-math.inf), "−∞"),
        (signed(0.25, 2), "+0.25"),
        (signed(-0.25, 2), "−0.25"),
        (signed(0.0001, 2), "0.00"),
        (small(0.0213), "0.0213"),
        (small(2.13e-5), "2.1e−05"),
        (small(0), "0.0000"),
        (small(math.nan), "–"),
        (percent(0.125), "12.5 %"),
        (percent(math.nan), "–"),
        (bracket(interval(0.5, 0.4, 0.6)), "0.500 [0.400, 0.600]"),
        (bracket(interval(0.5, -0.1, math.inf), sign=True, digits=1), "+0.5 [−0.1, ∞]"),
        (bracket(interval(math.nan, math.nan, math.nan)), "–"),
    ],
)
def test_numbers_as_printed(shown: str, expected: str) -> None:
    assert shown == expected


def test_names_of_coders_and_strata() -> None:
    assert split_name("a.b@random-coder") == ("a.b", "random-coder")
    assert split_name("a@b") == ("a@b", "trained")
    assert split_name("@random-coder") == ("@random-coder", "trained")
    assert sorted(["decile_10", "decile_2", "silent", "decile_0"], key=stratum_order) == [
        "decile_0",
        "decile_2",
        "decile_10",
        "silent",
    ]
    names = ("decile_0", "bin_9", "same_token", "silent")
    assert [stratum_text(n) for n in names] == ["decile 1", "bin 10", "same token", "silent"]
