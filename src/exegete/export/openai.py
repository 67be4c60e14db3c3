"""A run's simulations as OpenAI's neuron explainer keeps them: ``CODER/INDEX.jsonl``, one line of results each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exegete.errors import InputError, unknown
from exegete.export.folders import new_folder
from exegete.files import safe_name
from exegete.scorers.scorer import Scoring
from exegete.scorers.simulation import HEADLINE, NAME
from exegete.scorers.simulation_records import results_of, save_results
from exegete.types import ExampleSet, Explanation
from exegete.views import LatentView

if TYPE_CHECKING:
    from exegete.results import Results
    from exegete.runs import Run

_BLOCK: Final = 256


def export_openai(run: Run, out: str | Path, *, coders: Sequence[str] | None = None) -> None:
    """Write what simulation measured of a run's explanations, one file a latent.

    ``coders`` are by default all but the nulls. Of a latent with several explanations, that of the newest explainer
    with simulations is written. Those of a simulated language model, which are no measurements, are left out. Raises
    InputError when ``out`` is not empty or there is nothing to export; NotFoundError for an unknown coder.
    """
    names = [name for name in run.coders() if "@" not in name] if coders is None else list(dict.fromkeys(coders))
    for name in names:
        if name not in run.coders():
            raise unknown("coder", name, run.coders())
    results = run.results()
    try:
        with new_folder(Path(out)) as work:
            if not sum(_write(run, results, work / safe_name(name), name) for name in names):
                raise InputError(
                    f"{run.folder} has no simulations to export; make them with: exegete score {run.folder} "
                    "--scorers simulation"
                )
    finally:
        results.close()


def _write(run: Run, results: Results, folder: Path, coder: str) -> int:
    """Write the files of a coder and return how many."""
    found = _simulated(results, coder)
    data = run.data(coder)
    written, indices = 0, sorted(found)
    for start in range(0, len(indices), _BLOCK):
        block = indices[start : start + _BLOCK]
        for examples in run.select(coder, block):
            if isinstance(examples, ExampleSet):
                id_, explanation = found[examples.latent.index]
                judged = {"none": results.judgements(id_, NAME)}
                scoring = Scoring(explanation=explanation, scores=(), judgements=judged)
                view = LatentView(latent=examples.latent, tokens=data.tokens, examples=examples)
                save_results(folder / f"{examples.latent.index}.jsonl", results_of(scoring, view))
                written += 1
    return written


def _simulated(results: Results, coder: str) -> dict[int, tuple[int, Explanation]]:
    """Return of each latent with measured simulations the newest explainer's explanation that has them, and its id."""
    found: dict[int, tuple[int, Explanation]] = {}
    for key, _ in reversed(results.explainers(coder)):
        measured = set(results.score_column(coder, NAME, HEADLINE, explainer=key, plumbing=False).index.tolist())
        if measured:
            explained = results.explanations(coder, key=key).items()
            new = {e.latent.index: (id_, e) for id_, e in explained if e.latent.index in measured}
            found = {**new, **found}
    return found
