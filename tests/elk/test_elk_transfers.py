"""Transfers, chosen sites, recovered gaps, anomalies and interventions, where the truth is planted."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

from exegete.elk import (
    Extraction,
    Transfers,
    anomalies,
    answer_log_odds,
    extract,
    intervene,
    mean_share,
    probes,
    probes_pair,
    published,
    recovered,
    reference_lines,
    run_transfers,
    summary_lines,
    transfers,
    write_probes,
)
from exegete.elk.anomaly import Mahalanobis
from exegete.elk.gap import share
from exegete.elk.intervals import (
    bootstrap,
    clustered_auroc,
    clustered_mean_auroc,
    column_placements,
    resampled,
    weighted_aurocs,
)
from exegete.elk.intervention import Reflect
from exegete.elk.transfers import best, earliest, parse_transfer
from exegete.elk.whitening import fit_whitening
from exegete.errors import InputError, MismatchError, NotFoundError
from exegete.files import fault_hook
from exegete.subjects.edits import edited
from exegete.subjects.sites import residuals, site_point


@pytest.fixture(scope="module")
def extractions(toys: Any) -> tuple[Extraction, Extraction]:
    return toys.planted(400, seed=1, prefix="v"), toys.planted(300, seed=2, prefix="t")


@pytest.fixture(scope="module")
def found(extractions: tuple[Extraction, Extraction]) -> Transfers:
    names = ("lr", "lr-on-pair", "mean-diff", "crc", "random")
    return run_transfers(*extractions, probes=names, transfers=("A->A", "A->B", "B->B", "B->A", "AE->BH", "all->all"))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=30))
def test_weighted_auroc_counts_rows_as_often_as_they_weigh(rows: list[tuple[bool, int, int]]) -> None:
    truth, score = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    weights = np.array([[r[2] for r in rows], [1] * len(rows)])
    for weight, value in zip(weights, weighted_aurocs(truth, score, weights), strict=True):
        y, s = np.repeat(truth, weight), np.repeat(score, weight)
        if len(np.unique(y)) < 2:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(roc_auc_score(y, s))


def test_rows_of_a_base_example_are_drawn_together() -> None:
    place = np.array([3, 5, 3, 5, 9])
    weights = resampled(place, 200, 1)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 3]).all()
    assert (weights[:, [0, 1, 4]].sum(axis=1) == 3).all()
    assert np.isinf(bootstrap(0.5, np.full(10, np.nan), 4, 2).low)
    assert np.isnan(bootstrap(np.nan, np.ones(10), 4, 2).low)


def test_a_draw_that_leaves_a_value_undefined_counts_at_both_ends() -> None:
    drawn = np.linspace(0.0, 1.0, 1001)
    whole = bootstrap(0.5, drawn, 4, 2)
    assert (whole.low, whole.high) == pytest.approx((0.025, 0.975))
    few, many = drawn.copy(), drawn.copy()
    few[500:510], many[500:530] = np.nan, np.nan  # 1 % and 3 % of the draws, 2.5 % lie beyond either end
    some = bootstrap(0.5, few, 4, 2)
    assert (some.low, some.high) == pytest.approx((0.015, 0.985), abs=1e-9)
    none = bootstrap(0.5, many, 4, 2)
    assert (none.low, none.high) == (-np.inf, np.inf)


def test_intervals_are_wider_where_rows_belong_together() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(100) < 0.5
    score = truth + draw.standard_normal(100)
    one = clustered_auroc(truth, score, np.arange(100))
    four = clustered_auroc(np.repeat(truth, 4), np.repeat(score, 4), np.repeat(np.arange(100), 4))
    assert four.value == pytest.approx(roc_auc_score(truth, score))
    assert four.low == pytest.approx(one.low, abs=0.01)
    assert four.high == pytest.approx(one.high, abs=0.01)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=25),
    st.booleans(),
)
def test_placements_and_mean_aurocs_against_those_of_single_scores(
    rows: list[tuple[bool, int, int]], apart: bool
) -> None:
    truth = np.array([r[0] for r in rows])
    scores = np.array([[r[1], r[2] + 0.1 * i] for i, r in enumerate(rows)], float)
    place = np.arange(len(rows)) if apart else np.arange(len(rows)) // 2
    placed = column_placements(truth, scores)
    mean = clustered_mean_auroc(truth, placed, place)
    if truth.all() or not truth.any():
        assert np.isnan(mean.value)
        return
    aurocs = [roc_auc_score(truth, scores[:, k]) for k in (0, 1)]
    np.testing.assert_allclose(placed[truth].mean(axis=0), aurocs)
    np.testing.assert_allclose(placed[~truth].mean(axis=0), aurocs)
    assert mean.value == pytest.approx(np.mean(aurocs))
    assert mean.low <= mean.value <= mean.high
    for k in (0, 1):
        alone = clustered_mean_auroc(truth, placed[:, k : k + 1], place)
        one = clustered_auroc(truth, scores[:, k], place)
        assert alone.value == pytest.approx(one.value)
        if len(np.unique(place)) < len(place):
            assert (alone.low, alone.high) == pytest.approx((one.low, one.high))


def test_the_interval_of_a_mean_auroc_is_what_drawing_base_examples_again_gives() -> None:
    draw = np.random.default_rng(3)
    place = np.arange(300) // 2
    truth = np.repeat(draw.random(150) < 0.5, 2)
    shared = np.repeat(draw.standard_normal(150), 2)
    scores = 0.7 * truth[:, None] + shared[:, None] + draw.standard_normal((300, 8))
    mean = clustered_mean_auroc(truth, column_placements(truth, scores), place)
    weights = resampled(place, 1500, 0)
    drawn = np.mean([weighted_aurocs(truth, scores[:, k], weights) for k in range(8)], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert mean.high - mean.low == pytest.approx(high - low, rel=0.1)
    assert mean.low == pytest.approx(low, abs=0.01)


@pytest.mark.parametrize(
    ("aurocs", "first", "most"),
    [
        ({0: 0.5, 1: 0.90, 2: 0.91, 3: 0.89}, 1, 2),
        ({-1: 0.95, 4: 1.0}, 4, 4),
        ({-1: 0.976, 4: 1.0}, -1, 4),
        ({0: 0.2, 1: 0.4, 2: 0.5, 3: 0.1}, 2, 2),
    ],
)
def test_the_earliest_informative_site(aurocs: Mapping[int, float], first: int, most: int) -> None:
    assert (earliest(aurocs), best(aurocs)) == (first, most)


def test_a_probe_of_what_is_true_and_one_of_what_is_said(found: Transfers) -> None:
    lies = found.row("output", "lm", "A->B")
    assert found.row("output", "lm", "A->B", which="disagree").auroc.value == 0
    assert found.row("output", "lm", "A->B", which="agree").auroc.value == 1
    pair = found.row("pair", "lr-on-pair", "A->B")
    assert pair.site == 1
    assert pair.auroc.value > 0.9 > lies.auroc.value
    assert pair.auroc.low < pair.auroc.value < pair.auroc.high
    assert pair.auroc.n_documents == 300
    assert pair.held_out == pair.on_held_out.value
    assert pair.on_held_out.low < pair.held_out < pair.on_held_out.high
    assert 50 < pair.on_held_out.n_documents < 150  # a quarter of 400
    # In Alice's rows the truth is also what is said, so that half of what a single vector learned goes with the lie.
    assert 0.2 < found.row("last", "mean-diff", "A->B", which="disagree").auroc.value < 0.8
    # On Bob's rows what is learned is what he says there, and on Alice's what she says, which is true.
    assert found.row("last", "lr", "B->B", which="disagree").auroc.value < 0.1
    assert found.row("last", "lr", "B->A", which="disagree").auroc.value > 0.9
    assert found.row("last", "lr", "A->A").auroc.value > 0.97
    assert np.isnan(pair.sign_free)
    crc = found.row("pair", "crc", "A->B")
    assert crc.sign_free == pytest.approx(max(crc.auroc.value, 1 - crc.auroc.value))


def test_sites_are_chosen_without_test_rows(extractions: tuple[Extraction, Extraction], found: Transfers) -> None:
    fitted, tested = extractions
    assert found.sites["last", "lr", "A", "B"] == {"earliest": 1, "character": 1, "best": 1, "target": 1}
    spoilt = Extraction(
        subject=tested.subject,
        data=tested.data,
        facts=tested.facts,
        log_odds=tested.log_odds,
        features={kind: {0: x[1], 1: x[0]} for kind, x in tested.features.items()},
    )
    other = run_transfers(fitted, spoilt, probes=("lr",), transfers=("A->B",))
    assert other.sites["last", "lr", "A", "B"] == found.sites["last", "lr", "A", "B"]
    assert other.row("last", "lr", "A->B").auroc.value < 0.65


def test_random_directions_are_told_apart(found: Transfers) -> None:
    rows = [row for row in found.random if (row.source, row.target, row.which) == ("A", "A", "all")]
    by = {row.site: row for row in rows}
    assert by[0].mean.value < by[1].mean.value
    assert by[1].count == 1000
    assert by[1].rules == ("earliest", "best")
    for row in by.values():
        assert row.mean.low < row.mean.value < row.mean.high
        assert row.mean.n_documents == 300
        assert row.on_held_out.low < row.on_held_out.value < row.on_held_out.high
    assert list(by[1].quantiles) == sorted(by[1].quantiles)
    assert not any(row.probe == "random" for row in found.rows)


def test_what_cannot_be_run_is_refused(extractions: tuple[Extraction, Extraction], toys: Any) -> None:
    fitted, tested = extractions
    with pytest.raises(InputError, match="share base examples"):
        run_transfers(fitted, fitted)
    other = Extraction(
        subject="another", data="", facts=tested.facts, log_odds=tested.log_odds, features=tested.features
    )
    with pytest.raises(InputError, match="seed is 0 or more"):
        run_transfers(fitted, tested, seed=-1)
    with pytest.raises(MismatchError, match="two different models"):
        run_transfers(fitted, other)
    with pytest.raises(NotFoundError, match="lr-on-pair"):
        run_transfers(fitted, tested, probes=("lr-on-pairs",))
    with pytest.raises(InputError, match="SOURCE->TARGET"):
        parse_transfer("A")
    with pytest.raises(NotFoundError, match="pool"):
        parse_transfer("A->C")
    last = Extraction(
        subject="subject",
        data="",
        facts=tested.facts,
        log_odds=tested.log_odds,
        features={"last": tested.features["last"]},
    )
    with pytest.raises(InputError, match="reads what was extracted"):
        run_transfers(fitted, last, probes=("ccs",))
    narrow = Extraction(
        subject="subject",
        data="",
        facts=tested.facts,
        log_odds=tested.log_odds,
        features={"last": {0: tested.features["last"][0][:, :5]}},
    )
    with pytest.raises(MismatchError, match=r"last at site 0 is \[12\].* \[5\]"):
        run_transfers(fitted, narrow, probes=("lr",))
    part = run_transfers(fitted, last, probes=("lr", "ccs", "vinc", "random"), transfers=("A->B",))
    assert part.skipped == ("ccs, vinc: neither pair nor state-pair was extracted",)
    with pytest.raises(InputError, match="at least one component, got 0"):
        run_transfers(fitted, tested, rank=0)
    few = run_transfers(fitted.take(np.arange(4)), tested, probes=("lr",), transfers=("AE->BH",))
    assert few.skipped


def test_the_recovered_gap_by_hand(extractions: tuple[Extraction, Extraction], found: Transfers) -> None:
    rows = recovered(found, extractions[1], draws=200)
    row = next(r for r in rows if (r.probe, r.source, r.target, r.rule) == ("lr-on-pair", "A", "B", "earliest"))
    floor = found.row("last", "lr", "B->B").auroc.value
    ceiling = found.row("last", "lr", "A->A").auroc.value
    own = found.row("pair", "lr-on-pair", "A->B").auroc.value
    np.testing.assert_allclose([row.floor.value, row.ceiling.value, row.auroc.value], [floor, ceiling, own])
    assert row.share.value == pytest.approx((own - floor) / (ceiling - floor))
    for one in (row.share, row.floor, row.ceiling, row.auroc):
        assert one.low < one.value < one.high
    assert row.ceiling.n == 300
    assert np.isnan(share(np.array([0.5]), np.array([0.9]), np.array([0.8])))[0]
    assert mean_share([0.7, 0.9], [0.5, 0.5], [0.9, 0.9]) == pytest.approx(0.75)
    assert np.isnan(mean_share([], [], []))


def test_distances_by_hand_and_anomalies_that_are_there(extractions: tuple[Extraction, Extraction]) -> None:
    x = np.random.default_rng(0).standard_normal((500, 3)) @ np.array([[1.0, 0.8, 0], [0, 0.6, 0], [0, 0, 2]])
    plain, less = Mahalanobis(), Mahalanobis(less_diagonal=True)
    for made in (plain, less):
        made.fit(x)
    away = np.array([[1.0, -1.0, 0.5]]) - x.mean(axis=0)
    covariance = np.cov(x, rowvar=False)
    distance = (away @ np.linalg.solve(covariance, away.T)).item()
    assert plain.unusual(away + x.mean(axis=0))[0] == pytest.approx(distance, rel=1e-3)
    diagonal = (away**2 / np.diag(covariance)).sum()
    assert less.unusual(away + x.mean(axis=0))[0] == pytest.approx(distance - diagonal, rel=1e-3)


def test_anomalies_with_every_detector(extractions: tuple[Extraction, Extraction], found: Transfers) -> None:
    detectors = ("mahalanobis", "mahalanobis-diagonal", "isolation-forest", "local-outliers", "one-class-svm")
    rows = anomalies(found, extractions[1], detectors=detectors, draws=100)  # type: ignore[arg-type]
    assert {row.detector for row in rows} == set(detectors)
    assert {row.probe for row in rows} == {"lr", "mean-diff", "lr-on-pair", "crc"}
    for row in rows:
        assert row.auroc.low <= row.auroc.value <= row.auroc.high
        assert row.sites == (0, 1)
    with pytest.raises(NotFoundError, match="detector"):
        anomalies(found, extractions[1], detectors=("forest",))  # type: ignore[arg-type]


@pytest.mark.parametrize("detector", ["isolation-forest", "local-outliers", "one-class-svm"])
def test_detectors_are_scikit_learns(
    detector: Any, extractions: tuple[Extraction, Extraction], found: Transfers
) -> None:
    tested = extractions[1]
    odds = np.stack(
        [found.probes["last", "lr", "AE", at].log_odds(tested.features["last"][at]) for at in (0, 1)], axis=1
    )
    usual, hard = tested.facts.pool("AE"), tested.facts.pool("AH") | tested.facts.pool("BH")
    model = {
        "isolation-forest": IsolationForest(random_state=3),
        "local-outliers": LocalOutlierFactor(novelty=True),
        "one-class-svm": OneClassSVM(),
    }[detector].fit(odds[usual])
    rows = anomalies(found, tested, detectors=(detector,), draws=20, seed=3)
    row = next(r for r in rows if (r.feature, r.probe) == ("last", "lr"))
    wanted = roc_auc_score(tested.facts.pool("BH")[hard], -model.decision_function(odds[hard]))
    assert row.auroc.value == pytest.approx(wanted)


def test_wide_vectors_are_whitened_once_for_all_probes_that_read_them_alike(
    extractions: tuple[Extraction, Extraction], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("lr", "lda", "lr-on-pair", "lda-on-pair", "ccs", "crc", "vinc")
    calls: list[tuple[int, ...]] = []

    def counted(x: Any, rank: int) -> Any:
        calls.append(x.shape)
        return fit_whitening(x, rank)

    monkeypatch.setattr(transfers, "WIDE", 11)
    apart = {}
    for probe in names:  # each alone finds its own
        apart[probe] = run_transfers(*extractions, probes=(probe,), transfers=("A->B",), rank=6)
    monkeypatch.setattr(transfers, "fit_whitening", counted)
    for module in (probes, probes_pair):
        monkeypatch.setattr(module, "fit_whitening", None)  # none of them finds any itself
    together = run_transfers(*extractions, probes=names, transfers=("A->B",), rank=6)
    n = calls[0][0]
    assert calls == [(n, 12), (n, 12), (n, 24), (2 * n, 12), (n, 24), (2 * n, 12)]
    for probe in names:
        feature = "pair" if probe in ("lr-on-pair", "lda-on-pair", "ccs", "crc", "vinc") else "last"
        one, other = (found.row(feature, probe, "A->B").auroc.value for found in (apart[probe], together))
        assert one == pytest.approx(other)


def test_reflection_by_hand(toys: Any) -> None:
    subject, tokens = toys.subject("mamba"), torch.tensor([[1, 2, 3]])
    unit, centre = np.eye(16)[2] * 3, np.full(16, 0.25)
    clean = residuals(subject, tokens, (0,))[0]
    with edited(subject, [Reflect(site_point(subject, 0), unit, centre)], slice(-1, None)):
        turned = residuals(subject, tokens, (0,))[0]
    wanted = clean.clone()
    wanted[0, -1, 2] = 0.5 - clean[0, -1, 2]
    torch.testing.assert_close(turned, wanted)
    with pytest.raises(InputError, match="above 0"):
        Reflect(site_point(subject, 0), np.zeros(16), centre)
    with pytest.raises(MismatchError, match="3 dimensions"):
        intervene(subject, toys.rows(2), np.ones(3), np.ones(3), 0)


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_answers_flip_when_the_direction_they_are_read_from_is_reflected(toys: Any, family: str) -> None:
    """At the last site the answer is read off by the norm and the head, so reflecting along it turns the answers."""
    subject, data = toys.subject(family), toys.rows(30, seed=3)
    found = extract(subject, data, features=("last",))
    head = subject.model.get_output_embeddings().weight
    direction = (head[13] - head[12]).detach().numpy().astype(np.float64)
    centre = np.zeros(16)
    own = intervene(subject, data, direction, centre, 1, random=4, draws=100)
    assert own.flipped.value == 1.0
    assert own.moved.value > 0
    assert max(own.random_flipped) < 1.0
    assert len(own.random_moved) == 4
    assert own.flipped_by_random.value == pytest.approx(np.mean(own.random_flipped))
    assert own.moved_by_random.value == pytest.approx(np.mean(own.random_moved))
    assert own.moved_by_random.low <= own.moved_by_random.value <= own.moved_by_random.high
    alone = intervene(subject, data, direction, centre, 1, random=0, draws=20)
    assert alone.random_flipped == ()
    assert np.isnan(alone.flipped_by_random.value)
    with pytest.raises(InputError, match="0 or more"):
        intervene(subject, data, direction, centre, 1, random=-1)
    assert own.before.value == pytest.approx(roc_auc_score(data.facts.alice, found.log_odds))
    assert own.after.value == pytest.approx(1 - own.before.value, abs=1e-6)
    np.testing.assert_allclose(answer_log_odds(subject, data), found.log_odds, atol=1e-6)  # nothing was left behind
    with pytest.raises(InputError, match="has no rows"):
        intervene(subject, data.take(np.array([0])), direction, centre, 1, pool="B")


def test_tables_figures_and_words(extractions: tuple[Extraction, Extraction], found: Transfers, tmp_path: Path) -> None:
    shares = recovered(found, extractions[1], draws=50)
    odd = anomalies(found, extractions[1], draws=50)
    files = write_probes(found, tmp_path, shares=shares, anomalies=odd, facts={"seed": 0})
    rows = list(csv.DictReader((tmp_path / "transfers.csv").read_text().splitlines()))
    assert len(rows) == len(found.rows)
    first = next(r for r in rows if r["feature"] == "pair" and r["which"] == "all" and "earliest" in r["rules"])
    own = found.row("pair", first["probe"], f"{first['source']}->{first['target']}")
    assert float(first["auroc"]) == own.auroc.value
    assert int(first["auroc_bases"]) == own.auroc.n_documents
    held = json.loads((tmp_path / "probes.json").read_text())
    assert len(held["recovered"]) == len(shares)
    assert held["facts"] == {"seed": 0}
    pictures = [path for path in files if path.suffix == ".svg"]
    assert {path.name for path in pictures} >= {"grid.svg", "sites-A-B.svg", "sites-AE-BH.svg"}
    for path in pictures:
        xml.etree.ElementTree.parse(path)
    text = "\n".join(summary_lines(found, shares=shares, anomalies=odd))
    assert "A -> B" in text
    assert "pair lr-on-pair, site 1" in text
    assert "the model's answer" in text
    assert "chance is 0.500" in text
    assert "last random (mean), site 1" in text
    one = found.row("pair", "lr-on-pair", "A->B", which="disagree").auroc
    assert f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" in text


def test_results_of_two_runs_never_stand_side_by_side(
    extractions: tuple[Extraction, Extraction], found: Transfers, tmp_path: Path
) -> None:
    (tmp_path / "notes.csv").write_text("mine")
    odd = anomalies(found, extractions[1], draws=20)
    write_probes(found, tmp_path, shares=recovered(found, extractions[1], draws=20), anomalies=odd)
    assert {"random.csv", "recovered.csv", "anomalies.csv", "sites-AE-BH.svg"} <= {p.name for p in tmp_path.iterdir()}
    less = run_transfers(*extractions, probes=("lr",), transfers=("A->B",))
    files = write_probes(less, tmp_path)
    assert {path.name for path in files} == {"transfers.csv", "sites-A-B.svg", "grid.svg", "probes.json"}
    assert {p.name for p in tmp_path.iterdir()} == {path.name for path in files} | {"notes.csv", "lock"}
    held = json.loads((tmp_path / "probes.json").read_text())
    assert not any(held[name] for name in ("random", "recovered", "anomalies"))

    def stop(point: str) -> None:
        if point == "before rename grid.svg":
            raise KeyboardInterrupt

    with fault_hook(stop), pytest.raises(KeyboardInterrupt):
        write_probes(found, tmp_path)
    assert not (tmp_path / "probes.json").exists()  # it comes last, so what is there is not taken for whole


def test_published_numbers_stand_beside_ones_own(extractions: tuple[Extraction, Extraction], found: Transfers) -> None:
    lines = "\n".join(reference_lines(recovered(found, extractions[1], draws=50)))
    assert "published 0.89" in lines
    assert "this run" in lines
    assert "no number of it is quoted" in lines
    assert published()["shares_by_model"]["Mistral 7b"] == 0.63
