from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exegete.errors import CorruptError, InputError
from exegete.scorers.simulation import SimulationScorer
from exegete.scorers.simulation_records import (
    ActivationRecord,
    NeuronRecord,
    ScoredExplanation,
    ScoredSequence,
    SequenceSimulation,
    SimulationResults,
    load_neuron,
    load_results,
    neuron_data,
    read_neuron,
    read_results,
    reference_scores,
    results_data,
    results_of,
    save_neuron,
    save_results,
)
from exegete.types import Judgement

# As the neuron explainer publishes it; the scores are worked by hand from its definitions.
SEQUENCES: list[tuple[list[str], list[float], list[float]]] = [
    ([" a", " b", "\n"], [0.0, 2.0, 4.0], [1.0, 2.0, 3.0]),
    (["c", " d"], [0.0, 0.0], [0.0, 1.0]),
]
WINDOW_SCORES: list[tuple[float | None, float | None, float | None]] = [
    (1.0, 1 - 2 / 20, 1 - 2 / 6),
    (None, None, None),
]
WHOLE = (stats.pearsonr([0, 2, 4, 0, 0], [1, 2, 3, 0, 1]).statistic, 1 - 3 / 20, 1 - 3 / 6)


def scores(values: Any) -> dict[str, Any]:
    names = ("ev_correlation_score", "rsquared_score", "absolute_dev_explained_score")
    return dict(zip(names, values, strict=True))


def published(undefined: Any = None) -> dict[str, Any]:
    sequences = [
        {
            "dataclass_name": "ScoredSequenceSimulation",
            "simulation": {
                "dataclass_name": "SequenceSimulation",
                "tokens": tokens,
                "expected_activations": expected,
                "activation_scale": "simulated_normalized_activations",
                "distribution_values": [[x, x + 1.0] for x in expected],
                "distribution_probabilities": [[0.75, 0.25] for _ in expected],
                "uncalibrated_simulation": None,
            },
            "true_activations": true,
            **scores([undefined if v is None else v for v in values]),
        }
        for (tokens, true, expected), values in zip(SEQUENCES, WINDOW_SCORES, strict=True)
    ]
    scored = {
        "dataclass_name": "ScoredSimulation",
        "scored_sequence_simulations": sequences,
        **scores(WHOLE),
    }
    return {
        "dataclass_name": "NeuronSimulationResults",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": 9, "neuron_index": 6236},
        "scored_explanations": [
            {"dataclass_name": "ScoredExplanation", "explanation": "the word café", "scored_simulation": scored}
        ],
    }


def test_scores_of_the_published_form_equal_the_reference_formulas() -> None:
    read = read_results(published())
    (explained,) = read.explanations
    assert (read.layer, read.neuron, explained.explanation) == (9, 6236, "the word café")
    again = ScoredExplanation.of(
        explained.explanation, [ScoredSequence.of(s.simulation, s.activations) for s in explained.sequences]
    )
    for found, stored in [
        (again.scores, explained.scores),
        *((a.scores, b.scores) for a, b in zip(again.sequences, explained.sequences, strict=True)),
    ]:
        for name in ("ev_correlation", "rsquared", "absolute_dev_explained"):
            assert getattr(found, name) == pytest.approx(getattr(stored, name), nan_ok=True)
    # over all tokens at once, which is not the mean over windows
    assert again.scores.ev_correlation == pytest.approx(WHOLE[0])


def test_reference_scores_are_undefined_where_the_formulas_divide_by_nothing() -> None:
    silent = reference_scores([0.0, 0.0], [1.0, 2.0])
    assert all(math.isnan(v) for v in (silent.ev_correlation, silent.rsquared, silent.absolute_dev_explained))
    constant = reference_scores([1.0, 3.0], [2.0, 2.0])
    assert math.isnan(constant.ev_correlation)
    assert (constant.rsquared, constant.absolute_dev_explained) == (1 - 2 / 10, 1 - 2 / 4)
    assert math.isnan(reference_scores([], []).rsquared)
    with pytest.raises(InputError, match="predictions"):
        reference_scores([1.0], [1.0, 2.0])


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    assert results_data(read_results(published())) == published()
    path = tmp_path / "9" / "6236.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(published()) + "\n", encoding="utf-8")
    read = load_results(path)
    save_results(path, read)
    assert json.loads(path.read_text()) == published()
    assert path.read_text().count("\n") == 1
    calibrated = replace(
        read.explanations[0].sequences[0].simulation,
        scale="neuron_activations",
        uncalibrated=read.explanations[0].sequences[0].simulation,
    )
    sequence = ScoredSequence.of(calibrated, [0.0, 2.0, 4.0])
    results = replace(read, explanations=(ScoredExplanation.of("x", [sequence]),))
    assert read_results(results_data(results)) == results


@pytest.mark.parametrize("undefined", [None, "nan", math.nan])
def test_undefined_scores_are_read_in_every_spelling(undefined: Any) -> None:
    read = read_results(json.loads(json.dumps(published(undefined))))
    assert math.isnan(read.explanations[0].sequences[1].scores.rsquared)
    without = published()
    for one in without["scored_explanations"][0]["scored_simulation"]["scored_sequence_simulations"]:
        del one["rsquared_score"]
    assert math.isnan(read_results(without).explanations[0].sequences[0].scores.rsquared)


def neuron() -> NeuronRecord:
    records = tuple(ActivationRecord(tokens=(f"t{i}",), activations=(float(i),)) for i in range(40))
    return NeuronRecord(
        layer=3,
        neuron=5,
        strongest=records[:22],
        random=records[22:],
        by_quantile=(records[:2], records[2:4]),
        boundaries=(0.5,),
        mean=0.1,
        variance=0.2,
    )


def test_a_neuron_record_comes_back(tmp_path: Path) -> None:
    save_neuron(tmp_path / "5.json", neuron())
    read = load_neuron(tmp_path / "5.json")
    assert replace(read, skewness=0.0, kurtosis=0.0) == replace(neuron(), skewness=0.0, kurtosis=0.0)
    assert math.isnan(read.kurtosis)
    data = neuron_data(neuron())
    assert data["dataclass_name"] == "NeuronRecord"
    assert data["most_positive_activation_records"][0] == {
        "dataclass_name": "ActivationRecord",
        "tokens": ["t0"],
        "activations": [0.0],
    }
    data |= {"random_sample_by_quantile": None, "quantile_boundaries": None}
    assert read_neuron(data).by_quantile == ()


def test_the_splits_of_a_neuron_record_are_interleaved() -> None:
    def numbers(name: Any) -> list[int]:
        return [int(r.activations[0]) for r in neuron().part(name)]

    assert numbers("train") == [0, 4, 8, 12, 16]
    assert numbers("calibration") == [1, 5, 9, 13, 17, 22, 25, 28, 31, 34, 37]
    assert numbers("test") == [3, 7, 11, 15, 19, 24, 27, 30, 33, 36, 39]
    assert not {*numbers("valid")} & {*numbers("test"), *numbers("train"), *numbers("calibration")}
    with pytest.raises(InputError, match="split"):
        neuron().part("all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {},
        {"neuron_id": {"layer_index": 1, "neuron_index": 2}},
        {"neuron_id": {"layer_index": 1, "neuron_index": math.inf}, "scored_explanations": []},
        {"neuron_id": {"layer_index": 1, "neuron_index": 2}, "scored_explanations": [3]},
        {"neuron_id": {"layer_index": 1, "neuron_index": 2}, "most_positive_activation_records": [{"tokens": 3}]},
        {
            "neuron_id": {"layer_index": 1, "neuron_index": 2},
            "most_positive_activation_records": [{"tokens": ["a"], "activations": [1.0, 2.0]}],
        },
    ],
)
def test_damaged_records_are_refused(broken: Any) -> None:
    with pytest.raises(CorruptError, match="no neuron record"):
        read_neuron(broken)
    if broken != {"neuron_id": {"layer_index": 1, "neuron_index": 2}, "scored_explanations": []}:
        with pytest.raises(CorruptError, match="no simulation results"):
            read_results(broken)


def test_windows_of_different_lengths_are_refused() -> None:
    data = published()
    data["scored_explanations"][0]["scored_simulation"]["scored_sequence_simulations"][0]["true_activations"].append(1)
    with pytest.raises(CorruptError, match="differ in number"):
        read_results(data)


def test_our_own_scores_written_in_that_form_keep_their_value(world: Any) -> None:
    view = world.view(3)
    (scoring,) = SimulationScorer(controls="none").score([(world.explanation(3), view)])
    results = results_of(scoring, view)
    (explained,) = read_results(json.loads(json.dumps(results_data(results)))).explanations
    value = {s.metric: s.value for s in scoring.scores}["pearson_all"]
    assert explained.scores.ev_correlation == pytest.approx(value)
    assert (results.layer, results.neuron) == ("c", 3)
    windows = view.examples.part("test")
    assert len(explained.sequences) == len(windows)
    for sequence, tokens in zip(explained.sequences, windows.tokens, strict=True):
        assert "".join(sequence.simulation.tokens) == view.tokens.decode(tokens.tolist())
    assert np.sum([s.activations for s in explained.sequences[:1]]) == pytest.approx(windows.activations[0].sum())
    judged = scoring.judgements["none"]
    failed = (Judgement(**{**fields_of(judged[0]), "value": None, "status": "failed"}), *judged[1:])
    fewer = results_of(replace(scoring, judgements={"none": failed}), view)
    assert len(fewer.explanations[0].sequences) == len(windows) - 1  # no prediction is made up


def fields_of(judgement: Judgement) -> dict[str, Any]:
    return {name: getattr(judgement, name) for name in judgement.__dataclass_fields__}


def test_simulations_are_typed() -> None:
    simulation = SequenceSimulation(tokens=("a",), expected=(1.0,))
    assert (simulation.scale, simulation.uncalibrated) == ("simulated_normalized_activations", None)
    with pytest.raises(InputError):
        ScoredSequence.of(simulation, [1.0, 2.0])
    assert SimulationResults(layer="c", neuron=1, explanations=()).explanations == ()
