"""Explanations and judgements in the files of delphi: what its result tables are computed from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exegete.files import write_text
from exegete.results_packing import JudgementColumns
from exegete.store.store import Store
from exegete.types import Array, Firings

if TYPE_CHECKING:
    from exegete.results import Results

SCORERS = {"detection": "detection", "fuzzing": "fuzz"}
"""Scorers whose judgements delphi knows too, and what it calls them."""
_GROUP = re.compile(r"(?:decile|bin)_(\d)")
_NEGATIVE = -1.0  # the distance that delphi gives to silent windows


def write_findings(results: Results, work: Path, name: str, store: Store, window: int) -> set[str]:
    """Write the explanations of an explainer and their judgements; return delphi's names of the scorers.

    It is the newest whose explanations were judged, or else the newest: near misses are made from rules that nobody
    judged, found after the explanations that were.

    What has no explanation (refused, unparsed, failed) gets no file: delphi would take any text for one. A judgement
    that failed has neither prediction nor correctness, as in delphi's own files. Those of a simulated judge, which are
    no measurements, are left out.
    """
    explainers = results.explainers(store.name)
    if not explainers:
        return set()
    key = next((key for key, _ in reversed(explainers) if _judged(results, store.name, key)), explainers[-1][0])
    explained = set()
    for explanation in results.explanations(store.name, key=key).values():
        if explanation.text is not None:
            explained.add(explanation.latent.index)
            _write(work / "explanations", name, explanation.latent.index, explanation.text)
    found = set()
    for scorer, folder in SCORERS.items():
        for latent, judged in results.judgement_columns(store.name, scorer, explainer=key, plumbing=False):
            if latent.index in explained:
                found.add(folder)
                _write(work / "scores" / folder, name, latent.index, _samples(judged, store, latent.index, window))
    return found


def _judged(results: Results, coder: str, key: str) -> bool:
    found = (results.judgement_columns(coder, scorer, explainer=key, plumbing=False) for scorer in SCORERS)
    return any(next(judged, None) is not None for judged in found)


def _write(folder: Path, name: str, index: int, data: Any) -> None:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    # A language model may write half a surrogate pair; UTF-8 has no bytes for it, and delphi's parser refuses it.
    write_text(folder / f"{name}_latent{index}.txt", text.encode("utf-8", errors="replace").decode("utf-8"))


def _samples(judged: JudgementColumns, store: Store, index: int, window: int) -> list[dict[str, Any]]:
    """Return one entry per judgement, in their order."""
    table = store.corpus.table
    at = judged.row[:, None] * store.row_length + judged.start[:, None] + np.arange(window)
    tokens = store.corpus.tokens.reshape(-1)[at]
    activations = _values(store.firings(index), at, store.row_length)
    samples = []
    for number, (ids, values) in enumerate(zip(tokens.tolist(), activations.tolist(), strict=True)):
        truth, prediction = bool(judged.truth[number]), int(judged.prediction[number])
        probability = float(judged.probability[number])
        samples.append(
            {
                "str_tokens": [table.texts[token] for token in ids],
                "activations": values,
                "distance": _group(judged.strata[judged.stratum[number]]) if truth else _NEGATIVE,
                "activating": truth,
                "prediction": None if prediction < 0 else bool(prediction),
                "probability": None if np.isnan(probability) else probability,
                "correct": None if prediction < 0 else bool(prediction) == truth,
            }
        )
    return samples


def _values(firings: Firings, at: Array, length: int) -> Array:
    """Return a latent's values at flat positions [n, window], 0 where it is silent."""
    if not len(firings):
        return np.zeros(at.shape, np.float32)
    places = firings.rows * length + firings.positions
    found = np.searchsorted(places, at)
    found[found == len(places)] = 0
    values: Array = np.where(places[found] == at, firings.values[found], np.float32(0))
    return values


def _group(stratum: str) -> int:
    """Return the tenth that a firing window was drawn from, 0 the strongest; 0 also where it was drawn otherwise."""
    match = _GROUP.fullmatch(stratum)
    return int(match[1]) if match else 0
