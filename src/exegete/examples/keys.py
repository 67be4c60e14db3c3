"""Hash keys: what is drawn of a latent is a function of the seed and its name, with no generator to keep in step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from exegete.streams import STEP, mix
from exegete.types import Array, LatentId


def mixed(bits: Array) -> Array:
    """Return 64 well-mixed bits for each of these."""
    return mix(bits.copy())


def nth(keys: Array, numbers: Array) -> Array:
    """Return 64 bits for each pair of a key (uint64) and a number: independent over keys and over numbers."""
    return mix(keys + numbers.astype(np.uint64) * STEP)


def latent_keys(seed: int, latents: Iterable[LatentId]) -> Array:
    """Return four keys for every latent [latents, 4] uint64: each a hash of the seed and the latent's name."""
    digests = [hashlib.blake2b(f"{seed}|{latent}|select".encode(), digest_size=32).digest() for latent in latents]
    found: Array = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 4).astype(np.uint64)
    return found
