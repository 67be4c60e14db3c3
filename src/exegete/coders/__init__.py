"""Coders: maps from a hookpoint's activations to sparse latents and back.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.coders.baselines import random_coder
    from exegete.coders.coder import SparseCoder
    from exegete.coders.formats.sparsify import CoderInfo
    from exegete.coders.load import check_fit, inspect_coders, load_coder, load_coders
    from exegete.coders.quality import fvu_and_l0
    from exegete.coders.topk import TopKCoder

__all__ = [
    "CoderInfo",
    "SparseCoder",
    "TopKCoder",
    "check_fit",
    "fvu_and_l0",
    "inspect_coders",
    "load_coder",
    "load_coders",
    "random_coder",
]

_HOMES = {
    "CoderInfo": "formats.sparsify",
    "SparseCoder": "coder",
    "TopKCoder": "topk",
    "check_fit": "load",
    "fvu_and_l0": "quality",
    "inspect_coders": "load",
    "load_coder": "load",
    "load_coders": "load",
    "random_coder": "baselines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
