"""One reader per on-disk format of sparse coders."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exegete.coders.formats.format import CoderFormat

_FORMATS: tuple[tuple[str, str], ...] = (
    ("sparsify", "Sparsify"),
    ("saelens", "SAELens"),
    ("gemma_scope", "GemmaScope"),
    ("gemma_scope_2", "GemmaScope2"),
    ("llama_scope", "LlamaScope"),
    ("goodfire", "Goodfire"),
    ("qwen_scope", "QwenScope"),
    ("openai_sae", "OpenAISae"),
    ("circuit_tracer", "CircuitTracer"),
    ("dictionary_learning", "DictionaryLearning"),
    ("native", "Native"),
)
"""Module and class of every reader; where two would take the same files, the first does."""


@cache
def formats() -> tuple[CoderFormat, ...]:
    """Return every reader."""
    return tuple(getattr(importlib.import_module(f"{__name__}.{module}"), reader)() for module, reader in _FORMATS)
