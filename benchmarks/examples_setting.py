"""What the sides of `benchmarks/examples.py` share. Imported in the peer's environment too: no exegete here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

SETTING = "setting.json"
CODER = "layers.2"
WINDOW = 32
N_TRAIN = 40
N_TEST = 50
N_NEGATIVES = 50
PER_REQUEST = 5
REQUESTS = 1 + 2 * (N_TEST + N_NEGATIVES) // PER_REQUEST
"""Requests a latent: one that asks for an explanation, the others for verdicts by detection and fuzzing."""
EXPLANATION = "the name of a parameter in the signature of a function, mostly right before a default value"
SELECT = "select"
RENDER = "render"
DECODE = "decode"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Which latents are asked for; the run, its export and the model's folder lie beside."""

    folder: Path
    latents: tuple[int, ...]

    @property
    def run(self) -> Path:
        """The run of exegete."""
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        """The same firings in delphi's format."""
        return self.folder / "exported"

    @property
    def model(self) -> Path:
        """The model, with its tokenizer."""
        return self.folder / "model"


def write_setting(folder: Path, latents: Sequence[int]) -> None:
    """Write down which latents are asked for."""
    (folder / SETTING).write_text(json.dumps({"latents": [int(i) for i in latents]}), encoding="utf-8")


def read_setting(folder: Path) -> Setting:
    """Return what ``write_setting`` wrote."""
    data = json.loads((folder / SETTING).read_text(encoding="utf-8"))
    return Setting(folder=folder, latents=tuple(data["latents"]))
