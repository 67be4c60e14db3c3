"""Runs written in the formats of other tools, each folder whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.errors import unknown
from exegete.export.delphi import export_delphi
from exegete.export.openai import export_openai

if TYPE_CHECKING:
    from exegete.runs import Run

__all__ = ["FORMS", "export_delphi", "export_openai", "export_run"]

FORMS = ("delphi", "openai")
"""What a run can be written as."""


def export_run(run: Run, *, to: str, out: str | Path, coders: Sequence[str] | None = None) -> Path:
    """Write a run as a new folder that another tool reads and return it; ``to`` is one of ``FORMS``.

    Raises NotFoundError for another form, and what the form's own function raises.
    """
    if to not in FORMS:
        raise unknown("export", to, FORMS)
    (export_delphi if to == "delphi" else export_openai)(run, out, coders=coders)
    return Path(out)
