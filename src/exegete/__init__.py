"""Explain the latents of language models automatically, and measure how good each explanation is.

The same objects as the command line's. Names are loaded on first use, so that importing exegete is quick and imports
no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.api import collect as collect
    from exegete.api import explain as explain
    from exegete.api import explain_async as explain_async
    from exegete.api import load_corpus as load_corpus
    from exegete.api import run as run
    from exegete.api import score as score
    from exegete.api import score_async as score_async
    from exegete.api import select as select
    from exegete.codec import from_json as from_json
    from exegete.codec import to_json as to_json
    from exegete.coders import load_coder as load_coder
    from exegete.config import RunConfig as RunConfig
    from exegete.runs import Run as Run
    from exegete.runs import open_run as open_run
    from exegete.subjects import load_subject as load_subject
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
    "collect": "exegete.api",
    "explain": "exegete.api",
    "explain_async": "exegete.api",
    "from_json": "exegete.codec",
    "load_coder": "exegete.coders",
    "load_corpus": "exegete.api",
    "load_subject": "exegete.subjects",
    "open_run": "exegete.runs",
    "run": "exegete.api",
    "score": "exegete.api",
    "score_async": "exegete.api",
    "select": "exegete.api",
    "to_json": "exegete.codec",
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
    "collect",
    "explain",
    "explain_async",
    "from_json",
    "load_coder",
    "load_corpus",
    "load_subject",
    "open_run",
    "run",
    "score",
    "score_async",
    "select",
    "to_json",
]
__version__ = version("exegete")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'exegete' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
