"""How a long stage says how far it is; the command line draws it, the library stays silent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final


class Progress(ABC):
    """Listener of one run. ``start`` opens a stage of ``total`` units, ``advance`` moves it, ``end`` closes it."""

    @abstractmethod
    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage; ``unit`` is what is counted (tokens, latents)."""

    @abstractmethod
    def advance(self, amount: int) -> None:
        """Count ``amount`` more units of the stage as done."""

    @abstractmethod
    def end(self) -> None:
        """Close the stage."""


@final
class Silent(Progress):
    """Says nothing."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, amount: int) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
