"""Steering: vectors from contrasts, at work in the residual stream and in the recurrent state.

What ``exegete steer`` does, as functions. Names are loaded on first use, so that reading data imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.steering.application import steered as steered
    from exegete.steering.behaviour_files import Behaviour as Behaviour
    from exegete.steering.behaviour_files import Row as Row
    from exegete.steering.behaviour_files import balanced as balanced
    from exegete.steering.behaviour_files import behaviours as behaviours
    from exegete.steering.behaviour_files import load_behaviour as load_behaviour
    from exegete.steering.behaviour_files import load_questions as load_questions
    from exegete.steering.behaviour_files import load_rows as load_rows
    from exegete.steering.behaviour_files import relabelled as relabelled
    from exegete.steering.behaviour_files import swapped as swapped
    from exegete.steering.control_vectors import export_control_vector as export_control_vector
    from exegete.steering.control_vectors import import_control_vector as import_control_vector
    from exegete.steering.generating import Sample as Sample
    from exegete.steering.generating import generate as generate
    from exegete.steering.latents import Composition as Composition
    from exegete.steering.latents import Piece as Piece
    from exegete.steering.latents import compose as compose
    from exegete.steering.latents import explain_vector as explain_vector
    from exegete.steering.latents import latent_vector as latent_vector
    from exegete.steering.latents import run_latent_vector as run_latent_vector
    from exegete.steering.making import Made as Made
    from exegete.steering.making import VectorOptions as VectorOptions
    from exegete.steering.making import behaviour_vector as behaviour_vector
    from exegete.steering.making import fit_vector as fit_vector
    from exegete.steering.making import pair_vector as pair_vector
    from exegete.steering.open_ended import OpenAnswer as OpenAnswer
    from exegete.steering.open_ended import open_answers as open_answers
    from exegete.steering.pairs import Pair as Pair
    from exegete.steering.pairs import load_pairs as load_pairs
    from exegete.steering.questions import Contrast as Contrast
    from exegete.steering.questions import Question as Question
    from exegete.steering.reference import Published as Published
    from exegete.steering.reference import published as published
    from exegete.steering.stored import load_vector as load_vector
    from exegete.steering.stored import save_vector as save_vector
    from exegete.steering.sweeping import Sweep as Sweep
    from exegete.steering.sweeping import sweep as sweep
    from exegete.steering.tables import write_sweep as write_sweep
    from exegete.steering.vector import SteeringVector as SteeringVector

_HOMES = {
    "Behaviour": "behaviour_files",
    "Composition": "latents",
    "Contrast": "questions",
    "Made": "making",
    "OpenAnswer": "open_ended",
    "Pair": "pairs",
    "Piece": "latents",
    "Published": "reference",
    "Question": "questions",
    "Row": "behaviour_files",
    "Sample": "generating",
    "SteeringVector": "vector",
    "Sweep": "sweeping",
    "VectorOptions": "making",
    "balanced": "behaviour_files",
    "behaviour_vector": "making",
    "behaviours": "behaviour_files",
    "compose": "latents",
    "explain_vector": "latents",
    "export_control_vector": "control_vectors",
    "fit_vector": "making",
    "generate": "generating",
    "import_control_vector": "control_vectors",
    "latent_vector": "latents",
    "load_behaviour": "behaviour_files",
    "load_pairs": "pairs",
    "load_questions": "behaviour_files",
    "load_rows": "behaviour_files",
    "load_vector": "stored",
    "open_answers": "open_ended",
    "pair_vector": "making",
    "published": "reference",
    "relabelled": "behaviour_files",
    "run_latent_vector": "latents",
    "save_vector": "stored",
    "steered": "application",
    "swapped": "behaviour_files",
    "sweep": "sweeping",
    "write_sweep": "tables",
}

__all__ = [
    "Behaviour",
    "Composition",
    "Contrast",
    "Made",
    "OpenAnswer",
    "Pair",
    "Piece",
    "Published",
    "Question",
    "Row",
    "Sample",
    "SteeringVector",
    "Sweep",
    "VectorOptions",
    "balanced",
    "behaviour_vector",
    "behaviours",
    "compose",
    "explain_vector",
    "export_control_vector",
    "fit_vector",
    "generate",
    "import_control_vector",
    "latent_vector",
    "load_behaviour",
    "load_pairs",
    "load_questions",
    "load_rows",
    "load_vector",
    "open_answers",
    "pair_vector",
    "published",
    "relabelled",
    "run_latent_vector",
    "save_vector",
    "steered",
    "swapped",
    "sweep",
    "write_sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"exegete.steering.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'exegete.steering' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
