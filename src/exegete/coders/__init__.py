"""Coders: maps from a hookpoint's activations to sparse latents and back.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.coders.activations import Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
    from exegete.coders.baselines import random_coder, untrained_coder
    from exegete.coders.coder import SparseCoder
    from exegete.coders.directions import direction_coder, load_directions
    from exegete.coders.fit import fit_coder
    from exegete.coders.formats.format import CoderInfo
    from exegete.coders.formats.native import save_coder
    from exegete.coders.linear import LinearCoder
    from exegete.coders.load import inspect_coders, load_coder, load_coders
    from exegete.coders.make import make_coders
    from exegete.coders.neurons import NeuronCoder, neuron_coder
    from exegete.coders.pca import pca_coder
    from exegete.coders.quality import fvu_and_l0

__all__ = [
    "Activation",
    "CoderInfo",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "LinearCoder",
    "NeuronCoder",
    "ReLU",
    "SparseCoder",
    "TopK",
    "direction_coder",
    "fit_coder",
    "fvu_and_l0",
    "inspect_coders",
    "load_coder",
    "load_coders",
    "load_directions",
    "make_coders",
    "neuron_coder",
    "pca_coder",
    "random_coder",
    "save_coder",
    "untrained_coder",
]

_HOMES = {
    "Activation": "activations",
    "CoderInfo": "formats.format",
    "Gated": "activations",
    "GroupMax": "activations",
    "JumpReLU": "activations",
    "LinearCoder": "linear",
    "NeuronCoder": "neurons",
    "ReLU": "activations",
    "SparseCoder": "coder",
    "TopK": "activations",
    "direction_coder": "directions",
    "fit_coder": "fit",
    "fvu_and_l0": "quality",
    "inspect_coders": "load",
    "load_coder": "load",
    "load_coders": "load",
    "load_directions": "directions",
    "make_coders": "make",
    "neuron_coder": "neurons",
    "pca_coder": "pca",
    "random_coder": "baselines",
    "save_coder": "formats.native",
    "untrained_coder": "baselines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
