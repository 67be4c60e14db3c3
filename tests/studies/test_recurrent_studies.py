"""The studies of recurrent models: small ones run to the end, criteria on made-up results, pages, and going on."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from studies.recurrent import criteria, registers
from studies.recurrent.conformance import conformance_study
from studies.recurrent.models import IGNORED, Training, new_model, train
from studies.recurrent.page import write_page
from studies.recurrent.quirky import additions, comparison_study, comparisons, rows_of, split
from studies.recurrent.registers import Language, register_study, texts
from studies.recurrent.work import FULL, TINY, Unit, collected, stored, units

from exegete.files import write_json

SITES = (-1, 0, 1, 2)


def lens_result(tuned: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05), **changes: Any) -> dict[str, Any]:
    return {
        "sites": list(SITES),
        "curves": {
            "logit": {"ce": [5.0, 4.0, 3.0, 2.5], "kl": [2.0, 1.0, 0.5, 0.1]},
            "tuned": {"ce": [4.0, 3.0, 2.6, 2.4], "kl": list(tuned)},
        },
        "model": 2.3,
        "readout_error": 0.0,
        "starts_as_logit": True,
        "same_after_loading": True,
        "refused": True,
        "unit_error": 0.0,
        "seconds": 1.0,
        **changes,
    }


def curve(mode: str, components: str, site: int, effect: float, random: float = 0.1) -> dict[str, Any]:
    low, high = 0.5 - effect / 2, 0.5 + effect / 2
    return {
        "mode": mode,
        "components": components,
        "site": site,
        "multipliers": [-3.0, -1.5, -1.0, 0.0, 1.0, 1.5, 3.0],
        "match": [low, low, 0.3, 0.5, 0.7, high, high],
        "nonsense": [0.9, 0.4, 0.2, 0.0, 0.1, 0.4, 0.9],
        "effect": effect,
        "spearman": 1.0,
        "random_mean": random,
        "random_most": 2 * random,
    }


def test_small_studies_make_a_page(tmp_path: Path) -> None:
    swept = {"seconds": 1.0, **register_study("rwkv", 0, training=Training(steps=2), controls=1)}
    quirky = {"seconds": 1.0, **comparison_study("mamba", 0, pairs=300, training=Training(steps=1))}
    families = {"seconds": 1.0, **conformance_study(("llama", "rwkv"))}
    assert swept["untouched"] is True
    assert swept["loss"] > swept["least"] > 1
    assert set(swept["swept"]) == set(registers.CONTRASTS)
    assert families["families"]["rwkv"]["wrong"] == ["batch"]
    assert families["families"]["llama"]["listed"] == "k+1"
    page = tmp_path / "docs" / "recurrent.md"
    found = {
        "registers": {"rwkv": [swept]},
        "comparison": {"mamba": [quirky]},
        "conformance": {"all": [families]},
        "lens": {"llama": [lens_result()]},
    }
    write_page(page, found, TINY)
    text = page.read_text(encoding="utf-8")
    for experiment in ("E1", "E3", "E4", "E5", "E6"):
        assert f"## {experiment}." in text
    assert "## E2." not in text
    assert "nan" not in text
    figures = sorted((tmp_path / "docs" / "recurrent").glob("*.svg"))
    assert [path.stem for path in figures] == ["e1-a-b", "e1-ae-bh", "e3", "e4", "e5"]
    for path in figures:
        assert f"(recurrent/{path.name})" in text
        assert ET.parse(path).getroot().tag.endswith("svg")


def test_lens_criteria() -> None:
    def missed(*results: dict[str, Any]) -> list[str]:
        return [one.criterion for one in criteria.judged({"lens": {"mamba": list(results)}}) if not one.met]

    assert missed(lens_result()) == []
    assert ["every site" in text for text in missed(lens_result(), lens_result((0.5, 0.2, 0.1, 0.11)))] == [True]
    assert ["first half" in text for text in missed(lens_result((0.5, 0.51, 0.1, 0.05)))] == [True]
    assert ["rises" in text for text in missed(lens_result((0.1, 0.2, 0.1, 0.05)))] == [True]
    assert ["another model" in text for text in missed(lens_result(refused=False))] == [True]


def test_steering_criteria_are_of_the_median_seed() -> None:
    def result(state: float, both: float) -> dict[str, Any]:
        rows = [
            curve("residual", "", 0, 0.5),
            curve("residual", "", 1, 0.9),
            curve("state", "conv+ssm", 0, state),
            curve("state", "ssm", 0, 0.99),
            curve("both", "conv+ssm", 0, both),
        ]
        return {"swept": {"answer": rows, "history": rows}, "untouched": True, "seconds": 0.0}

    seeds = [result(0.1, 0.5), result(0.65, 0.86), result(0.7, 0.9)]
    found = {one.criterion: one for one in criteria.judged({"registers": {"mamba": seeds}}) if one.experiment == "E4"}
    assert found["answer: effect of the state ≥ .6"].found == ".650"
    assert found["answer: both ≥ the better one − .050"].met
    assert criteria.best_curve(seeds[0], "answer", "residual") == curve("residual", "", 1, 0.9)
    assert criteria.effect(seeds[0], "answer", "state", "ssm") == 0.99
    assert math.isnan(criteria.effect({"swept": {}}, "answer", "state"))
    e3 = {one.criterion: one for one in criteria.judged({"registers": {"mamba": seeds}}) if one.experiment == "E3"}
    assert e3["answer: effect ≥ 3 × the mean of random ones"].found == "9.0 ×"
    assert e3["answer: nonsense at ±1 ≤ .500"].found == ".200"
    assert e3["history: p(+1.5) ≥ .8 and p(−1.5) ≤ .2"].found == ".950, .050"


def test_numbers() -> None:
    assert [criteria.number(v) for v in (0.5, 1.0, -0.25, math.nan)] == [".500", "1.000", "−.250", "–"]
    assert criteria.number(0.125, signed=True) == "+.125"


def test_languages() -> None:
    claims = comparisons(200, seed=0)
    assert all(
        one.alice == (10 * a + b > 10 * c + d) and one.bob == (b > d) for one in claims for a, b, c, d in [one.tokens]
    )
    parts = split(claims, (0.6, 0.2, 0.2), seed=0)
    assert [len(part) for part in parts] == [120, 40, 40]
    assert len({one.base for part in parts for one in part}) == 200
    rows = rows_of(claims, (10, 11), (12, 13))
    assert len(rows) == 400
    assert rows.facts.label.tolist()[:2] == [claims[0].alice, claims[0].bob]
    sums = additions(seed=0)
    assert len(sums) == 4 * 256
    assert sum(one.alice for one in sums) == sum(one.bob for one in sums) == 256
    assert not any(one.alice and one.bob for one in sums)
    tokens, labels = texts(0, rows=4)(0)
    assert torch.equal(labels[:, :-1], tokens[:, 1:])
    assert bool((labels[:, -1] == IGNORED).all())
    register = (tokens[:, 2::2] - 1) // registers.CONCEPTS
    assert bool((register == register[:, :1]).all())
    assert torch.equal((tokens[:, 2::2] - 1) % registers.CONCEPTS, tokens[:, 1::2] - 1)
    language = Language.drawn(0)
    assert len(set(language.vectors) & set(language.tests)) == 4
    pair = language.histories(0, asked=True)[0]
    assert [a == b for a, b in zip(pair.positive, pair.negative, strict=True)] == [True, True, False, True, False, True]


def test_training_learns_what_is_to_follow() -> None:
    tokens = torch.tensor([[1, 2, 3, 4]] * 8)
    labels = torch.tensor([[IGNORED, IGNORED, 4, IGNORED]] * 8)
    model = new_model("llama", 6, seed=0)
    assert train(model, lambda step: (tokens, labels), Training(steps=40, rate=1e-2)) < 0.05


def test_what_is_stored_goes_on_until_settings_change(tmp_path: Path) -> None:
    unit = units(FULL)[0]
    assert stored(tmp_path, unit) is None
    write_json(tmp_path / f"{unit.name}.json", {"key": unit.key, "result": {"seconds": 1.0}})
    assert stored(tmp_path, unit) == {"seconds": 1.0}
    assert collected(tmp_path, units(FULL)) == {unit.study: {unit.family: [{"seconds": 1.0}]}}
    other = Unit(study=unit.study, family=unit.family, seed=unit.seed, settings={**unit.settings, "steps": 1})
    assert stored(tmp_path, other) is None
    names = [one.name for one in units(FULL)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", ["mamba", "llama", "rwkv"])
def test_models_depend_on_the_seed_alone(family: str) -> None:
    first, second = (new_model(family, 20, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[n], v) for n, v in new_model(family, 20, seed=4).state_dict().items())
