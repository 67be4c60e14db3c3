"""Explain the latents of language models automatically, and measure how good each explanation is.

The same objects as the command line's. Names are loaded on first use, so that importing exegete is quick and imports
no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.api import certify as certify
    from exegete.api import collect as collect
    from exegete.api import explain as explain
    from exegete.api import explain_async as explain_async
    from exegete.api import export_run as export_run
    from exegete.api import load_corpus as load_corpus
    from exegete.api import load_simulations as load_simulations
    from exegete.api import plan as plan
    from exegete.api import run as run
    from exegete.api import score as score
    from exegete.api import score_async as score_async
    from exegete.api import select as select
    from exegete.api import stopped as stopped
    from exegete.codec import from_json as from_json
    from exegete.codec import to_json as to_json
    from exegete.coders import direction_coder as direction_coder
    from exegete.coders import inspect_coders as inspect_coders
    from exegete.coders import load_coder as load_coder
    from exegete.coders import load_coders as load_coders
    from exegete.coders import load_directions as load_directions
    from exegete.coders import neuron_coder as neuron_coder
    from exegete.coders import pca_coder as pca_coder
    from exegete.coders import random_coder as random_coder
    from exegete.coders import save_coder as save_coder
    from exegete.config import RunConfig as RunConfig
    from exegete.elk import extract as extract
    from exegete.elk import finetune as finetune
    from exegete.elk import quirky_set as quirky_set
    from exegete.elk import run_transfers as run_transfers
    from exegete.lens import LensConfig as LensConfig
    from exegete.lens import LensText as LensText
    from exegete.lens import LogitLens as LogitLens
    from exegete.lens import evaluate_lenses as evaluate_lenses
    from exegete.lens import export_lens as export_lens
    from exegete.lens import generate_from_site as generate_from_site
    from exegete.lens import latent_tokens as latent_tokens
    from exegete.lens import load_lens as load_lens
    from exegete.lens import prediction_trajectory as prediction_trajectory
    from exegete.lens import save_lens as save_lens
    from exegete.lens import train_lens as train_lens
    from exegete.runs import Run as Run
    from exegete.runs import open_run as open_run
    from exegete.steering import SteeringVector as SteeringVector
    from exegete.steering import behaviour_vector as behaviour_vector
    from exegete.steering import explain_vector as explain_vector
    from exegete.steering import latent_vector as latent_vector
    from exegete.steering import load_vector as load_vector
    from exegete.steering import pair_vector as pair_vector
    from exegete.steering import save_vector as save_vector
    from exegete.steering import steered as steered
    from exegete.subjects import inspect_subject as inspect_subject
    from exegete.subjects import load_subject as load_subject
    from exegete.testing import validate as validate
    from exegete.types import Example as Example
    from exegete.types import ExampleSet as ExampleSet
    from exegete.types import Explanation as Explanation
    from exegete.types import LatentId as LatentId
    from exegete.types import Score as Score
    from exegete.types import Skipped as Skipped

_HOMES = {
    "Example": "exegete.types",
    "ExampleSet": "exegete.types",
    "Explanation": "exegete.types",
    "LatentId": "exegete.types",
    "LensConfig": "exegete.lens",
    "LensText": "exegete.lens",
    "LogitLens": "exegete.lens",
    "Run": "exegete.runs",
    "RunConfig": "exegete.config",
    "Score": "exegete.types",
    "Skipped": "exegete.types",
    "SteeringVector": "exegete.steering",
    "behaviour_vector": "exegete.steering",
    "certify": "exegete.api",
    "collect": "exegete.api",
    "direction_coder": "exegete.coders",
    "evaluate_lenses": "exegete.lens",
    "explain": "exegete.api",
    "explain_async": "exegete.api",
    "explain_vector": "exegete.steering",
    "export_lens": "exegete.lens",
    "export_run": "exegete.api",
    "extract": "exegete.elk",
    "finetune": "exegete.elk",
    "from_json": "exegete.codec",
    "generate_from_site": "exegete.lens",
    "inspect_coders": "exegete.coders",
    "inspect_subject": "exegete.subjects",
    "latent_tokens": "exegete.lens",
    "latent_vector": "exegete.steering",
    "load_coder": "exegete.coders",
    "load_coders": "exegete.coders",
    "load_corpus": "exegete.api",
    "load_directions": "exegete.coders",
    "load_lens": "exegete.lens",
    "load_simulations": "exegete.api",
    "load_subject": "exegete.subjects",
    "load_vector": "exegete.steering",
    "neuron_coder": "exegete.coders",
    "open_run": "exegete.runs",
    "pair_vector": "exegete.steering",
    "pca_coder": "exegete.coders",
    "plan": "exegete.api",
    "prediction_trajectory": "exegete.lens",
    "quirky_set": "exegete.elk",
    "random_coder": "exegete.coders",
    "run": "exegete.api",
    "run_transfers": "exegete.elk",
    "save_coder": "exegete.coders",
    "save_lens": "exegete.lens",
    "save_vector": "exegete.steering",
    "score": "exegete.api",
    "score_async": "exegete.api",
    "select": "exegete.api",
    "steered": "exegete.steering",
    "stopped": "exegete.api",
    "to_json": "exegete.codec",
    "train_lens": "exegete.lens",
    "validate": "exegete.testing",
}

__all__ = [
    "Example",
    "ExampleSet",
    "Explanation",
    "LatentId",
    "LensConfig",
    "LensText",
    "LogitLens",
    "Run",
    "RunConfig",
    "Score",
    "Skipped",
    "SteeringVector",
    "behaviour_vector",
    "certify",
    "collect",
    "direction_coder",
    "evaluate_lenses",
    "explain",
    "explain_async",
    "explain_vector",
    "export_lens",
    "export_run",
    "extract",
    "finetune",
    "from_json",
    "generate_from_site",
    "inspect_coders",
    "inspect_subject",
    "latent_tokens",
    "latent_vector",
    "load_coder",
    "load_coders",
    "load_corpus",
    "load_directions",
    "load_lens",
    "load_simulations",
    "load_subject",
    "load_vector",
    "neuron_coder",
    "open_run",
    "pair_vector",
    "pca_coder",
    "plan",
    "prediction_trajectory",
    "quirky_set",
    "random_coder",
    "run",
    "run_transfers",
    "save_coder",
    "save_lens",
    "save_vector",
    "score",
    "score_async",
    "select",
    "steered",
    "stopped",
    "to_json",
    "train_lens",
    "validate",
]
__version__ = version("exegete")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'exegete' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
