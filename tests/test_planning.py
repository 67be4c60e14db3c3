"""Plans: how tokens are estimated, and what judging that stops early is expected to take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from exegete import planner
from exegete.config import RunConfig
from exegete.metrics.sequential import fixed_pairs
from exegete.planning import (
    Asked,
    CountingClient,
    Plan,
    StagePlan,
    count_bytes,
    judged_share,
    plan_dict,
    plan_lines,
)
from exegete.scorers import sequential
from exegete.scorers.scorer import make_scorer
from exegete.scorers.sequential import Stopping
from exegete.types import Example, ExampleSet, LatentId


def windows(n: int, *, latents: int = 1) -> list[sequential.Tested]:
    """Return latents with n firing and n silent windows each."""
    found = []
    for index in range(latents):
        latent = LatentId(coder="c", index=index)
        examples = tuple(
            Example(
                split="test",
                fires=i < n,
                stratum=f"decile_{i % 10}" if i < n else "random",
                row=i,
                start=0,
                tokens=np.zeros(2, np.uint32),
                activations=np.array([1.0, 0.0] if i < n else [0.0, 0.0], np.float32),
                document=i,
                inclusion_probability=1.0,
            )
            for i in range(2 * n)
        )
        made = ExampleSet(latent=latent, examples=examples, maximum=1.0, firing_rate=0.1, frame=2 * n, seed=0)
        found.append(sequential.Tested(seed=0, latent=latent, windows=made.part("test")))
    return found


def test_a_certifying_plan_is_bounded_by_the_fixed_test_and_expects_about_half_of_it() -> None:
    stopping = Stopping(certify=0.8)
    assert stopping.test is not None
    fixed = 2 * fixed_pairs(stopping.test)
    most, expected = judged_share(stopping, windows(100, latents=4), per_request=5)
    assert most == pytest.approx(fixed / 200)
    # benchmarks/results/sequential.md, from exact sums: 49.4 judgements of 98 with requests of five windows
    assert expected * 200 == pytest.approx(49.4, abs=6)


def test_fewer_windows_than_the_fixed_test_are_the_bound() -> None:
    most, expected = judged_share(Stopping(certify=0.8), windows(10), per_request=5)
    assert most == 1.0
    assert 0.9 <= expected <= 1.0
    assert judged_share(Stopping(certify=0.8), [], per_request=5) == (1.0, 1.0)


def test_an_interval_may_take_all_windows() -> None:
    most, expected = judged_share(Stopping(stop_when=0.01), windows(20), per_request=5)
    assert (most, expected) == (1.0, 1.0)
    most, expected = judged_share(Stopping(certify=0.8, stop_when=0.2), windows(100), per_request=5)
    assert most == 1.0
    assert 0.05 < expected < 0.7


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("0", 1), ("[1, 0, 0, 0, 1]", 11), ("x" * 36, 10), ("a b c d", 4)]
)
def test_an_estimate_counts_bytes_but_never_less_than_words_numbers_and_marks(text: str, tokens: int) -> None:
    assert count_bytes(text) == tokens


def stage(name: str, requests: float, *, by: str = "", elsewhere: bool = False, expected: float = 0) -> StagePlan:
    return StagePlan(
        coder="layers.0",
        stage=name,
        latents=10,
        left=5,
        asked=Asked(requests=requests, prompt_tokens=100 * requests, shared_tokens=25 * requests),
        by=by,
        elsewhere=elsewhere,
        expected=Asked(requests=expected, prompt_tokens=100 * expected) if expected else None,
    )


def lines(*stages: StagePlan) -> list[str]:
    return list(plan_lines(Plan(model="openai/gpt-4o-mini", stages=stages, exact=True, price=None)))


def row(found: Sequence[str], name: str) -> list[str]:
    (line,) = [line for line in found if line.split()[:1] == [name] or line.split()[1:2] == [name]]
    return line.split()


def test_figures_are_per_latent_and_say_who_answers() -> None:
    found = lines(stage("detection", 50), stage("surprisal", 0, by="by the subject, in this process"))
    assert row(found, "detection") == ["layers.0", "detection", "5", "of", "10", "10.0", "1,000", "25%", "0"]
    assert "in this process" in " ".join(row(found, "surprisal"))
    assert "0.0" not in row(found, "surprisal")
    assert any(line.startswith("in all: 50 requests, 5,000 prompt tokens (25% shared") for line in found)
    assert not any(line.startswith("expected") for line in found)


def test_what_another_server_is_asked_is_counted_and_not_paid_for() -> None:
    stages = (stage("detection", 50), stage("surprisal", 20, by="by http://x#m", elsewhere=True))
    found = lines(*stages)
    assert row(found, "surprisal")[5:] == ["4.0", "400", "25%", "0", "by", "http://x#m"]
    assert Plan(model="m", stages=stages, exact=True, price=None).total.requests == 50


def test_a_plan_that_stops_early_gives_a_bound_and_an_expectation() -> None:
    stages = (stage("detection", 50, expected=20), stage("intruder", 5))
    found = lines(*stages)
    assert "≤ 10.0" in next(line for line in found if "detection" in line)
    assert "4.0" in next(line for line in found if line.startswith("  expected"))
    assert any(line.startswith("in all: at most 55 requests") for line in found)
    assert any(line.startswith("expected: 25 requests") for line in found)
    data = plan_dict(Plan(model="m", stages=stages, exact=True, price=None))
    assert data["stages"][0]["expected"]["requests"] == 20
    assert "expected" not in data["stages"][1]
    assert (data["total"]["requests"], data["total"]["expected"]["requests"]) == (55, 25)
    assert [one["by"] for one in data["stages"]] == ["m", "m"]


@pytest.mark.parametrize(
    ("llm", "reader", "who"),
    [
        ("openai/gpt-4o-mini", "auto", "by the subject, in this process"),
        ("hf/org/model", "auto", "by the language model, in this process"),
        ("vllm/org/model", "auto", "by the language model, in this process"),
        ("hf/org/model", "subject", "by the subject, in this process"),
        ("hf/org/model", "hf/org/other", "by hf/org/other, in this process"),
    ],
)
def test_a_plan_names_the_reader_that_will_read(llm: str, reader: str, who: str) -> None:
    config = RunConfig.from_dict({"subject": "s", "coder": ["c"], "scoring": {"reader": reader}})
    client = CountingClient(llm, 0.0, count_bytes, lambda request: 0, 60)
    assert planner._answered_by(make_scorer("surprisal", config), config, client, read=False) == who
