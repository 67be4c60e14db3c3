"""The records of OpenAI's neuron explainer (Bills et al. 2023), read and written, and its formulas.

``NeuronRecord`` holds the windows a neuron was shown with, ``SimulationResults`` its explanations with what was
simulated by them. Every object of these JSON files names its class in ``dataclass_name``. Scores that were undefined
stand there as null, NaN or "nan", according to who wrote them; they are read as NaN and written as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np

from exegete.errors import CorruptError, InputError
from exegete.files import canonical_json, read_json, write_text
from exegete.scorers.scorer import Scoring
from exegete.types import Judgement
from exegete.views import LatentView

SIMULATED: Final = "simulated_normalized_activations"
NEURON: Final = "neuron_activations"
Part = Literal["train", "calibration", "valid", "test"]
_PARTS: Final[tuple[Part, ...]] = ("train", "calibration", "valid", "test")
_CLASS: Final = "dataclass_name"
_MOST_BYTES: Final = 1 << 28
_BAD: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, InputError)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScores:
    """The three scores of the neuron explainer; NaN where one is undefined."""

    ev_correlation: float
    rsquared: float
    absolute_dev_explained: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRecord:
    """One window: its tokens, and the activation at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise InputError(f"{len(self.tokens)} tokens have {len(self.activations)} activations")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSimulation:
    """What was simulated at the tokens of a window.

    ``expected`` is the expected value at each token; ``values`` and ``probabilities`` are the distribution behind it.
    ``scale`` is ``simulated_normalized_activations`` (levels) or ``neuron_activations`` (calibrated), and then
    ``uncalibrated`` is what it was made from.
    """

    tokens: tuple[str, ...]
    expected: tuple[float, ...]
    values: tuple[tuple[float, ...], ...] = ()
    probabilities: tuple[tuple[float, ...], ...] = ()
    scale: str = SIMULATED
    uncalibrated: SequenceSimulation | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSequence:
    """A simulated window beside its true activations. ``scores`` are those of this window alone."""

    simulation: SequenceSimulation
    activations: tuple[float, ...]
    scores: ReferenceScores

    @classmethod
    def of(cls, simulation: SequenceSimulation, activations: Sequence[float]) -> ScoredSequence:
        """Score a simulated window. Raises InputError when the lengths differ."""
        scores = reference_scores(activations, simulation.expected)
        return cls(simulation=simulation, activations=tuple(activations), scores=scores)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredExplanation:
    """An explanation, the windows simulated by it, and the scores over all their tokens together."""

    explanation: str
    sequences: tuple[ScoredSequence, ...]
    scores: ReferenceScores

    @classmethod
    def of(cls, explanation: str, sequences: Sequence[ScoredSequence]) -> ScoredExplanation:
        """Score an explanation: over the tokens of all windows at once, not as a mean over windows."""
        true = [a for s in sequences for a in s.activations]
        expected = [e for s in sequences for e in s.simulation.expected]
        return cls(explanation=explanation, sequences=tuple(sequences), scores=reference_scores(true, expected))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResults:
    """All scored explanations of a neuron, or of a latent: ``layer`` is then the name of its coder."""

    layer: int | str
    neuron: int
    explanations: tuple[ScoredExplanation, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronRecord:
    """The windows of a neuron: drawn at random, by quantile of their maximum, and the strongest; with its moments."""

    layer: int | str
    neuron: int
    strongest: tuple[ActivationRecord, ...]
    random: tuple[ActivationRecord, ...] = ()
    by_quantile: tuple[tuple[ActivationRecord, ...], ...] = ()
    boundaries: tuple[float, ...] = ()
    mean: float = math.nan
    variance: float = math.nan
    skewness: float = math.nan
    kurtosis: float = math.nan

    def part(self, name: Part) -> tuple[ActivationRecord, ...]:
        """Return the windows of a split: of the strongest every fourth, and of the random ones every third.

        ``train``, to explain from, has strong windows only. What does not divide evenly is in no split, as in the
        reference. Raises InputError for another split.
        """
        if name not in _PARTS:
            raise InputError(f"a split is one of {', '.join(_PARTS)}, got {name!r}")
        others = _PARTS[1:]
        random = () if name == "train" else _interleaved(self.random, others.index(name), len(others))
        return (*_interleaved(self.strongest, _PARTS.index(name), len(_PARTS)), *random)


def _interleaved(records: Sequence[ActivationRecord], at: int, parts: int) -> Sequence[ActivationRecord]:
    return records[at : len(records) - len(records) % parts : parts]


def reference_scores(true: Sequence[float], expected: Sequence[float]) -> ReferenceScores:
    """Return the scores of predictions, ``expected``, of activations, ``true``, by the neuron explainer's formulas.

    The correlation of the two; 1 − mean (y − x)² / mean y²; 1 − mean |y − x| / mean |y|. NaN where either side of a
    correlation is constant, or no token is active. Raises InputError when the lengths differ.
    """
    y, x = np.asarray(true, np.float64), np.asarray(expected, np.float64)
    if y.shape != x.shape or y.ndim != 1:
        raise InputError(f"{len(y)} activations have {len(x)} predictions")
    if not len(y):
        return ReferenceScores(ev_correlation=math.nan, rsquared=math.nan, absolute_dev_explained=math.nan)
    varies = np.ptp(x) > 0 and np.ptp(y) > 0
    active = bool(np.abs(y).max() > 0)
    return ReferenceScores(
        ev_correlation=float(np.corrcoef(y, x)[0, 1]) if varies else math.nan,
        rsquared=1.0 - float(np.mean((y - x) ** 2) / np.mean(y**2)) if active else math.nan,
        absolute_dev_explained=1.0 - float(np.mean(np.abs(y - x)) / np.mean(np.abs(y))) if active else math.nan,
    )


def results_of(scoring: Scoring, view: LatentView) -> SimulationResults:
    """Return what ``SimulationScorer`` found as results in OpenAI's form.

    A stored prediction is the expected value, so that the distribution at each token is that one value. The form knows
    no missing predictions: windows in which any failed are left out.
    """
    windows = view.examples.part("test")
    length = windows.tokens.shape[1]
    starts = {(row, start): i for i, (row, start) in enumerate(zip(windows.row, windows.start, strict=True))}

    def window(judgement: Judgement) -> int:
        return next(i for o in range(length) if (i := starts.get((judgement.row, judgement.start - o), -1)) >= 0)

    sequences = []
    for at, group in groupby(scoring.judgements["none"], key=window):
        judged = list(group)
        expected = [j.value for j in judged if j.value is not None]
        if len(expected) < len(judged):
            continue
        texts = view.tokens.spans(windows.tokens[at].tolist())
        tokens = tuple(texts[j.start - int(windows.start[at])] for j in judged)
        simulation = SequenceSimulation(
            tokens=tokens,
            expected=tuple(expected),
            values=tuple((x,) for x in expected),
            probabilities=((1.0,),) * len(expected),
        )
        sequences.append(ScoredSequence.of(simulation, [j.activation for j in judged]))
    explained = ScoredExplanation.of(str(scoring.explanation.text), sequences)
    return SimulationResults(layer=view.latent.coder, neuron=view.latent.index, explanations=(explained,))


def rescored(results: SimulationResults) -> SimulationResults:
    """Return simulation results with all scores computed anew from their predictions and activations."""
    explanations = tuple(
        ScoredExplanation.of(
            explained.explanation, [ScoredSequence.of(one.simulation, one.activations) for one in explained.sequences]
        )
        for explained in results.explanations
    )
    return replace(results, explanations=explanations)


def load_results(path: Path) -> SimulationResults:
    """Read simulation results (``LAYER/NEURON.jsonl``, of one line). Raises CorruptError on anything else."""
    return read_results(read_json(path, most_bytes=_MOST_BYTES))


def save_results(path: Path, results: SimulationResults) -> None:
    """Write simulation results, whole or not at all."""
    write_text(path, canonical_json(results_data(results)) + "\n")


def load_neuron(path: Path) -> NeuronRecord:
    """Read a neuron's record (``LAYER/NEURON.json``). Raises CorruptError on anything else."""
    return read_neuron(read_json(path, most_bytes=_MOST_BYTES))


def save_neuron(path: Path, record: NeuronRecord) -> None:
    """Write a neuron's record, whole or not at all."""
    write_text(path, canonical_json(neuron_data(record)) + "\n")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_results(data: Any) -> SimulationResults:
    """Read simulation results from JSON data. Raises CorruptError on anything else."""
    try:
        layer, neuron = _identity(data["neuron_id"])
        explanations = tuple(map(_explanation, data["scored_explanations"]))
    except _BAD as error:
        raise CorruptError(f"these are no simulation results: {error!r}") from error
    return SimulationResults(layer=layer, neuron=neuron, explanations=explanations)


def read_neuron(data: Any) -> NeuronRecord:
    """Read a neuron's record from JSON data. Raises CorruptError on anything else."""
    try:
        layer, neuron = _identity(data["neuron_id"])
        return NeuronRecord(
            layer=layer,
            neuron=neuron,
            strongest=tuple(map(_record, data["most_positive_activation_records"])),
            random=tuple(map(_record, data.get("random_sample") or ())),
            by_quantile=tuple(tuple(map(_record, part)) for part in data.get("random_sample_by_quantile") or ()),
            boundaries=tuple(map(float, data.get("quantile_boundaries") or ())),
            **{name: _number(data.get(name)) for name in ("mean", "variance", "skewness", "kurtosis")},
        )
    except _BAD as error:
        raise CorruptError(f"this is no neuron record: {error!r}") from error


def _identity(data: Mapping[str, Any]) -> tuple[int | str, int]:
    layer = data["layer_index"]
    return (layer if isinstance(layer, str) else int(layer)), int(data["neuron_index"])


def _record(data: Mapping[str, Any]) -> ActivationRecord:
    return ActivationRecord(tokens=tuple(map(str, data["tokens"])), activations=tuple(map(float, data["activations"])))


def _explanation(data: Mapping[str, Any]) -> ScoredExplanation:
    scored = data["scored_simulation"]
    sequences = tuple(
        ScoredSequence(
            simulation=_simulation(one["simulation"]),
            activations=tuple(map(float, one["true_activations"])),
            scores=_scores(one),
        )
        for one in scored["scored_sequence_simulations"]
    )
    for one in sequences:
        if not len(one.simulation.tokens) == len(one.simulation.expected) == len(one.activations):
            raise InputError("tokens, predictions and activations of a window differ in number")
    return ScoredExplanation(explanation=str(data["explanation"]), sequences=sequences, scores=_scores(scored))


def _simulation(data: Mapping[str, Any]) -> SequenceSimulation:
    before = data.get("uncalibrated_simulation")
    return SequenceSimulation(
        tokens=tuple(map(str, data["tokens"])),
        expected=tuple(map(float, data["expected_activations"])),
        values=tuple(tuple(map(float, row)) for row in data.get("distribution_values") or ()),
        probabilities=tuple(tuple(map(float, row)) for row in data.get("distribution_probabilities") or ()),
        scale=str(data.get("activation_scale", SIMULATED)),
        uncalibrated=None if before is None else _simulation(before),
    )


def _scores(data: Mapping[str, Any]) -> ReferenceScores:
    return ReferenceScores(
        ev_correlation=_number(data.get("ev_correlation_score")),
        rsquared=_number(data.get("rsquared_score")),
        absolute_dev_explained=_number(data.get("absolute_dev_explained_score")),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# -- writing ----------------------------------------------------------------------------------------------------------


def results_data(results: SimulationResults) -> dict[str, Any]:
    """Return simulation results as JSON data."""
    scored = [
        {
            _CLASS: "ScoredExplanation",
            "explanation": explained.explanation,
            "scored_simulation": {
                _CLASS: "ScoredSimulation",
                "scored_sequence_simulations": [_sequence_data(one) for one in explained.sequences],
                **_scores_data(explained.scores),
            },
        }
        for explained in results.explanations
    ]
    identity = _identity_data(results.layer, results.neuron)
    return {_CLASS: "NeuronSimulationResults", "neuron_id": identity, "scored_explanations": scored}


def neuron_data(record: NeuronRecord) -> dict[str, Any]:
    """Return a neuron's record as JSON data."""
    return {
        _CLASS: "NeuronRecord",
        "neuron_id": _identity_data(record.layer, record.neuron),
        "random_sample": list(map(_record_data, record.random)),
        "random_sample_by_quantile": [list(map(_record_data, part)) for part in record.by_quantile],
        "quantile_boundaries": list(record.boundaries),
        "mean": _known(record.mean),
        "variance": _known(record.variance),
        "skewness": _known(record.skewness),
        "kurtosis": _known(record.kurtosis),
        "most_positive_activation_records": list(map(_record_data, record.strongest)),
    }


def _identity_data(layer: int | str, neuron: int) -> dict[str, Any]:
    return {_CLASS: "NeuronId", "layer_index": layer, "neuron_index": neuron}


def _record_data(record: ActivationRecord) -> dict[str, Any]:
    return {_CLASS: "ActivationRecord", "tokens": list(record.tokens), "activations": list(record.activations)}


def _sequence_data(one: ScoredSequence) -> dict[str, Any]:
    return {
        _CLASS: "ScoredSequenceSimulation",
        "simulation": _simulation_data(one.simulation),
        "true_activations": list(one.activations),
        **_scores_data(one.scores),
    }


def _simulation_data(simulation: SequenceSimulation) -> dict[str, Any]:
    before = simulation.uncalibrated
    return {
        _CLASS: "SequenceSimulation",
        "tokens": list(simulation.tokens),
        "expected_activations": list(simulation.expected),
        "activation_scale": simulation.scale,
        "distribution_values": [list(row) for row in simulation.values],
        "distribution_probabilities": [list(row) for row in simulation.probabilities],
        "uncalibrated_simulation": None if before is None else _simulation_data(before),
    }


def _scores_data(scores: ReferenceScores) -> dict[str, Any]:
    return {
        "ev_correlation_score": _known(scores.ev_correlation),
        "rsquared_score": _known(scores.rsquared),
        "absolute_dev_explained_score": _known(scores.absolute_dev_explained),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
