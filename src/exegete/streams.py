"""Named random streams, and hashes in their place: draws depend on the seed and a name, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

STEP: Final = np.uint64(0x9E3779B97F4A7C15)
"""What numbers one after another are multiplied by before they are mixed (the increment of splitmix64)."""


def stream(seed: int, *names: object) -> np.random.Generator:
    """Return the generator of ``seed`` and ``names`` (say, a latent and a stage), whatever was drawn before."""
    key = "|".join([str(seed), *map(str, names)]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))


def mix(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mix 64-bit numbers well, in place, and return them (the output function of splitmix64: Steele et al. 2014)."""
    bits += STEP
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits
