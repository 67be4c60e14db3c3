"""Lenses: what a model would predict from its residual stream at every site, transformer or recurrent.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.lens.evaluating import Evaluation, evaluate_lenses
    from exegete.lens.files import export_lens, load_lens, save_lens
    from exegete.lens.generating import generate_from_site
    from exegete.lens.labels import label_run
    from exegete.lens.latents import LatentTokens, latent_tokens
    from exegete.lens.lens import Lens, LogitLens, TunedLens, new_lens
    from exegete.lens.published import compared, published_tables
    from exegete.lens.schedules import LensConfig
    from exegete.lens.text import LensText
    from exegete.lens.trained import SiteTraining, Trained
    from exegete.lens.training import train_lens
    from exegete.lens.trajectory import Trajectory, prediction_trajectory

_HOMES = {
    "Evaluation": "evaluating",
    "LatentTokens": "latents",
    "Lens": "lens",
    "LensConfig": "schedules",
    "LensText": "text",
    "LogitLens": "lens",
    "SiteTraining": "trained",
    "Trained": "trained",
    "Trajectory": "trajectory",
    "TunedLens": "lens",
    "compared": "published",
    "evaluate_lenses": "evaluating",
    "export_lens": "files",
    "generate_from_site": "generating",
    "label_run": "labels",
    "latent_tokens": "latents",
    "load_lens": "files",
    "new_lens": "lens",
    "prediction_trajectory": "trajectory",
    "published_tables": "published",
    "save_lens": "files",
    "train_lens": "training",
}

__all__ = [
    "Evaluation",
    "LatentTokens",
    "Lens",
    "LensConfig",
    "LensText",
    "LogitLens",
    "SiteTraining",
    "Trained",
    "Trajectory",
    "TunedLens",
    "compared",
    "evaluate_lenses",
    "export_lens",
    "generate_from_site",
    "label_run",
    "latent_tokens",
    "load_lens",
    "new_lens",
    "prediction_trajectory",
    "published_tables",
    "save_lens",
    "train_lens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
