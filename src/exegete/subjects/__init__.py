"""What we look inside: models with named hookpoints.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.subjects.load import load_subject, load_tokenizer
    from exegete.subjects.names import Point, expand
    from exegete.subjects.randomise import randomised
    from exegete.subjects.subject import Subject

__all__ = ["Point", "Subject", "expand", "load_subject", "load_tokenizer", "randomised"]

_HOMES = {
    "Point": "names",
    "Subject": "subject",
    "expand": "names",
    "load_subject": "load",
    "load_tokenizer": "load",
    "randomised": "randomise",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
