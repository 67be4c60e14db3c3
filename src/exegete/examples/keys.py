"""Hash keys: what is drawn of a latent is a function of the seed and its name, with no generator to keep in step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np

from exegete.types import Array, LatentId

STEP: Final = np.uint64(0x9E3779B97F4A7C15)
"""What numbers one after another are multiplied by before they are mixed (the increment of splitmix64)."""


def mixed(bits: Array) -> Array:
    """Return 64 well-mixed bits for each of these (the output function of splitmix64: Steele, Lea and Flood 2014)."""
    bits = bits + STEP
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def nth(keys: Array, numbers: Array) -> Array:
    """Return 64 bits for each pair of a key (uint64) and a number: independent over keys and over numbers."""
    return mixed(keys + numbers.astype(np.uint64) * STEP)


def latent_keys(seed: int, latents: Iterable[LatentId]) -> Array:
    """Return four keys for every latent [latents, 4] uint64: each a hash of the seed and the latent's name."""
    digests = [hashlib.blake2b(f"{seed}|{latent}|select".encode(), digest_size=32).digest() for latent in latents]
    found: Array = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 4).astype(np.uint64)
    return found
