"""Named random streams: the draws of a (latent, stage) depend on the seed and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: object) -> np.random.Generator:
    """Return the generator of ``seed`` and ``names`` (say, a latent and a stage), whatever was drawn before."""
    key = "|".join([str(seed), *map(str, names)]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))
