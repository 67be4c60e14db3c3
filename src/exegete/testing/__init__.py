"""What checks this package itself: toy models and coders, and latents of known truth that scorers are validated on."""

from exegete.testing.models import (
    BOS,
    FAMILIES,
    TEXTS,
    toy_llama,
    toy_model,
    toy_subject_model,
    toy_tokenizer,
    toy_topk_coder,
    toy_weights,
)
from exegete.testing.page import validation_lines, validation_page
from exegete.testing.validation import Validation, validate
from exegete.testing.worlds import World, make_world

__all__ = [
    "BOS",
    "FAMILIES",
    "TEXTS",
    "Validation",
    "World",
    "make_world",
    "toy_llama",
    "toy_model",
    "toy_subject_model",
    "toy_tokenizer",
    "toy_topk_coder",
    "toy_weights",
    "validate",
    "validation_lines",
    "validation_page",
]
