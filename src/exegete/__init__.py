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
    from exegete.runs import Run as Run
    from exegete.runs import open_run as open_run
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
    "Run": "exegete.runs",
    "RunConfig": "exegete.config",
    "Score": "exegete.types",
    "Skipped": "exegete.types",
    "certify": "exegete.api",
    "collect": "exegete.api",
    "direction_coder": "exegete.coders",
    "explain": "exegete.api",
    "explain_async": "exegete.api",
    "export_run": "exegete.api",
    "from_json": "exegete.codec",
    "inspect_coders": "exegete.coders",
    "load_coder": "exegete.coders",
    "load_coders": "exegete.coders",
    "load_corpus": "exegete.api",
    "load_directions": "exegete.coders",
    "load_simulations": "exegete.api",
    "load_subject": "exegete.subjects",
    "neuron_coder": "exegete.coders",
    "open_run": "exegete.runs",
    "pca_coder": "exegete.coders",
    "plan": "exegete.api",
    "random_coder": "exegete.coders",
    "run": "exegete.api",
    "save_coder": "exegete.coders",
    "score": "exegete.api",
    "score_async": "exegete.api",
    "select": "exegete.api",
    "stopped": "exegete.api",
    "to_json": "exegete.codec",
    "validate": "exegete.testing",
}

__all__ = [
    "Example",
    "ExampleSet",
    "Explanation",
    "LatentId",
    "Run",
    "RunConfig",
    "Score",
    "Skipped",
    "certify",
    "collect",
    "direction_coder",
    "explain",
    "explain_async",
    "export_run",
    "from_json",
    "inspect_coders",
    "load_coder",
    "load_coders",
    "load_corpus",
    "load_directions",
    "load_simulations",
    "load_subject",
    "neuron_coder",
    "open_run",
    "pca_coder",
    "plan",
    "random_coder",
    "run",
    "save_coder",
    "score",
    "score_async",
    "select",
    "stopped",
    "to_json",
    "validate",
]
__version__ = version("exegete")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'exegete' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
