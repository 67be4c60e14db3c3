"""What we look inside: models with named hookpoints, sites of their residual stream, and states that they carry.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.subjects.inspecting import Hookpoints, SubjectInfo, inspect_subject
    from exegete.subjects.load import load_subject, load_tokenizer
    from exegete.subjects.names import Point, expand
    from exegete.subjects.randomise import randomised
    from exegete.subjects.readout import Readout, read_out
    from exegete.subjects.recurrent_state import AddState, ClampState, ReplaceState, State, StateEdit, StateVector
    from exegete.subjects.running import Running
    from exegete.subjects.sites import n_blocks, parse_sites, residuals, site_point
    from exegete.subjects.subject import Subject
    from exegete.subjects.verdicts import Verdict, verdict

__all__ = [
    "AddState",
    "ClampState",
    "Hookpoints",
    "Point",
    "Readout",
    "ReplaceState",
    "Running",
    "State",
    "StateEdit",
    "StateVector",
    "Subject",
    "SubjectInfo",
    "Verdict",
    "expand",
    "inspect_subject",
    "load_subject",
    "load_tokenizer",
    "n_blocks",
    "parse_sites",
    "randomised",
    "read_out",
    "residuals",
    "site_point",
    "verdict",
]

_HOMES = {
    "AddState": "recurrent_state",
    "ClampState": "recurrent_state",
    "Hookpoints": "inspecting",
    "Point": "names",
    "Readout": "readout",
    "ReplaceState": "recurrent_state",
    "Running": "running",
    "State": "recurrent_state",
    "StateEdit": "recurrent_state",
    "StateVector": "recurrent_state",
    "Subject": "subject",
    "SubjectInfo": "inspecting",
    "Verdict": "verdicts",
    "expand": "names",
    "inspect_subject": "inspecting",
    "load_subject": "load",
    "load_tokenizer": "load",
    "n_blocks": "sites",
    "parse_sites": "sites",
    "randomised": "randomise",
    "read_out": "readout",
    "residuals": "sites",
    "site_point": "sites",
    "verdict": "verdicts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
