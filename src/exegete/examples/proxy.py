"""Cheap guesses at which silent windows are hard to judge: they divide the test frame into kinds of negatives."""

from __future__ import annotations

from abc import ABC, abstractmethod

from exegete.config import Negative
from exegete.examples.fired import Block
from exegete.types import Array


class Proxy(ABC):
    """One kind of negatives: for every latent, the windows of the test frame that are of this kind."""

    kind: Negative
    """The kind of ``ExampleConfig.negatives`` that it stands for."""

    @abstractmethod
    def windows(self, block: Block) -> tuple[Array, Array]:
        """Return the windows of this kind for every latent of a block.

        Offsets [m + 1] int64 and window numbers of ``block.frame`` [n] int64, all of the test split, ascending and
        distinct within each latent. Whether the latent fires in them does not matter. What is said of a latent depends
        on nothing else in the block.
        """
