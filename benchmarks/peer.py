"""delphi imported without vllm, which needs a GPU and serves only its ``Offline`` client."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def delphi(name: str) -> Any:
    """Return a module of delphi, with an empty class in the place of its client for vllm."""
    stand_in = types.ModuleType("delphi.clients.offline")
    stand_in.Offline = type("Offline", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(stand_in.__name__, stand_in)
    return importlib.import_module(f"delphi.{name}")
