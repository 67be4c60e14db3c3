"""Which memory a family's models have."""

from __future__ import annotations

import inspect

from exegete.subjects.memories import CACHES, CacheMemory, Memory
from exegete.subjects.memories_modules import ModuleMemory, XLSTMMemory
from exegete.subjects.memories_rwkv import MatrixRwkvMemory, RwkvMemory
from exegete.subjects.subject import Subject


def begin(subject: Subject, rows: int, *, mended: bool = True) -> Memory | None:
    """Return the memory of a model that has read nothing yet; None for a model that keeps none in a known way.

    ``mended`` False leaves known mistakes of the model's own code in place, to measure them.
    """
    family = str(subject.model.config.model_type)
    if family == "recurrent_gemma":
        return ModuleMemory(subject)
    if family == "xlstm":
        return XLSTMMemory(subject)
    known = inspect.signature(subject.model.forward).parameters
    if family == "rwkv":
        return RwkvMemory(subject, rows, mended=mended)
    if "state" in known:
        return MatrixRwkvMemory(subject, mended=mended)
    return CacheMemory(subject, mended=mended) if any(name in known for name in CACHES) else None
