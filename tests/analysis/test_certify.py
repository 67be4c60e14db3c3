"""Certified lists from stored judgements: what they rest on, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from exegete.analysis.across import judge_name
from exegete.analysis.certify import certify
from exegete.analysis.text import certified_text
from exegete.errors import InputError, NotFoundError
from exegete.results import Results
from exegete.scorers.scorer import Scoring
from exegete.types import Explanation, Judgement, LatentId, Score

CODER = "layers.3"


def scoring(index: int, right: int, n: int, *, metric: str = "balanced_accuracy", plumbing: bool = False) -> Scoring:
    """``right`` of ``n`` windows of each class judged rightly, each window of a document of its own."""
    latent = LatentId(coder=CODER, index=index)
    said: list[Judgement] = [
        Judgement(
            row=2 * i + truth,
            start=0,
            document=2 * i + truth,
            stratum="decile_0" if truth else "random",
            truth=truth,
            prediction=truth if i < right else not truth,
            inclusion_probability=1.0,
        )
        for i in range(n)
        for truth in (True, False)
    ]
    score = Score(
        latent=latent,
        scorer="detection",
        metric=metric,
        value=right / n,
        low=0.0,
        high=1.0,
        method="m",
        n_total=2 * n,
        n_scored=2 * n,
        n_failed=0,
        flags=("plumbing",) if plumbing else (),
    )
    made = Explanation(latent=latent, text="t", status="ok", explainer={"name": "rule"})
    return Scoring(explanation=made, scores=(score,), judgements={"none": tuple(said)})


def store(results: Results, key: str, found: Sequence[Scoring], args: dict[str, float] | None = None) -> None:
    spec = {"explain": "explained", "judge": "rule", "scorer": {"name": "detection", "args": args or {}}}
    results.add_stage(key, "detection", spec)
    for one in found:
        results.add_scoring(one, key, results.add_explanation(one.explanation, "explained"), scorer="detection")


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    with Results.open(tmp_path / "results.db") as made:
        yield made


@pytest.mark.parametrize("correction", ["e-bh", "by", "bh"])
def test_the_good_are_listed_strongest_first_and_the_poor_are_not(results: Results, correction: str) -> None:
    store(results, "k", [scoring(1, 92, 100), scoring(2, 70, 100), scoring(3, 99, 100), scoring(4, 55, 100)])
    found = certify(results, CODER, level=0.7, rate=0.05, correction=correction)  # type: ignore[arg-type]
    assert [index for index, _, _ in found.latents] == [3, 1]
    assert [score for _, score, _ in found.latents] == [0.99, 0.92]
    assert found.n == 4
    text = certified_text([found])
    assert "2 of 4 latents certified above 0.7" in text
    assert ("e-value" if correction == "e-bh" else "p-value") in text


def test_a_plumbing_check_certifies_nothing(results: Results) -> None:
    store(results, "k", [scoring(index, 99, 100, plumbing=True) for index in range(4)])
    with pytest.raises(NotFoundError, match="measured nothing"):
        certify(results, CODER)


def test_only_what_was_scored_last_certifies(results: Results) -> None:
    store(results, "z first", [scoring(1, 99, 100), scoring(2, 99, 100)])
    store(results, "a last", [scoring(1, 50, 100), scoring(2, 99, 100)])
    found = certify(results, CODER)
    assert [index for index, _, _ in found.latents] == [2]
    assert found.n == 2


def test_judging_in_rounds_leaves_e_values_alone(results: Results) -> None:
    store(results, "k", [scoring(1, 99, 100)], {"certify": 0.8})
    assert certify(results, CODER).latents
    with pytest.raises(InputError, match="in rounds"):
        certify(results, CODER, correction="by")
    store(results, "l", [scoring(1, 99, 100)], {})  # judged whole since
    assert certify(results, CODER, correction="by").latents


def test_a_scorer_without_balanced_accuracy_is_refused(results: Results) -> None:
    store(results, "k", [scoring(1, 99, 100, metric="auroc")])
    with pytest.raises(InputError, match="no balanced accuracy"):
        certify(results, CODER)


@pytest.mark.parametrize("wrong", [{"level": 1.0}, {"level": float("nan")}, {"rate": 0.0}, {"correction": "none"}])
def test_values_that_make_no_test_are_refused(results: Results, wrong: dict[str, float]) -> None:
    store(results, "k", [scoring(1, 99, 100)])
    with pytest.raises(InputError):
        certify(results, CODER, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"judge": "rule", "scorer": {"name": "detection", "args": {"judge": "auto"}}}, "executed rule"),
        ({"judge": "http://h/v1#m", "scorer": {"name": "detection", "args": {"judge": "rule"}}}, "executed rule"),
        ({"judge": "http://h/v1#m", "scorer": {"name": "detection", "args": {"judge": "auto"}}}, "m"),
        ({"judge": "hf/o/m", "scorer": {"name": "embedding", "args": {"embedder": "org/mini"}}}, "mini"),
        ({"judge": "rule", "scorer": {"name": "intruder", "args": {"embedder": "org/mini"}}}, "mini"),
        ({"judge": "hf/o/m", "scorer": {"name": "intruder", "args": {"embedder": "org/mini"}}}, "hf/o/m"),
        ({"judge": "rule", "reader": "http://h/v1#m", "scorer": {"name": "surprisal", "args": {}}}, "reader m"),
        ({"judge": "rule", "scorer": {"name": "intervention", "args": {"kind": "tokens"}}}, "the subject itself"),
        ({}, "unknown"),
    ],
)
def test_who_judged_is_named_for_what_it_is(spec: dict[str, object], name: str) -> None:
    assert judge_name(spec) == name
