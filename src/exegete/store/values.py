"""Firing values in 16 bits: positive floats with 6 exponent and 10 mantissa bits.

A firing is positive, so the sign bit of a half float buys one exponent bit more: code ``c`` stands for
``(1 + (c mod 1024) / 1024) · 2^(c div 1024 − 32)``, from 2^−32 to just under 2^32, with the half float's relative
error (at most 2^−11) over all of it. Codes sort as their values do, every code is a positive finite number, and the
code of a value depends on nothing but the value, so that it does not matter how a store is cut into shards.
"""

from __future__ import annotations

import numpy as np

from exegete.errors import InputError
from exegete.types import Array

ENCODING = "e6m10"
MANTISSA_BITS = 10
LOWEST_EXPONENT = -32
SMALLEST = 2.0**LOWEST_EXPONENT
LARGEST = (2.0 - 2.0**-MANTISSA_BITS) * 2.0 ** (LOWEST_EXPONENT + 63)

_DROPPED = 23 - MANTISSA_BITS
_BASE = np.uint32((127 + LOWEST_EXPONENT) << MANTISSA_BITS)


def encode_values(values: Array) -> Array:
    """Return the uint16 codes of positive float32 values, rounded to nearest, ties to even.

    Values below 2^−32 become 2^−32, so that a firing never turns silent. Raises InputError for a value that is not
    positive and finite, or that would round to 2^32 or above.
    """
    exact = np.ascontiguousarray(values, dtype=np.float32)
    if not bool(((exact > 0) & np.isfinite(exact)).all()):
        raise InputError("a firing's value is positive and finite")
    bits = exact.view(np.uint32)
    half = np.uint32((1 << (_DROPPED - 1)) - 1)
    rounded = (bits + half + ((bits >> _DROPPED) & np.uint32(1))) >> _DROPPED
    codes = np.maximum(rounded, _BASE) - _BASE
    if codes.size and int(codes.max()) > 0xFFFF:
        raise InputError(f"an activation of {float(exact.max()):.4g} is too large to store; the limit is {LARGEST:.4g}")
    result: Array = codes.astype(np.uint16)
    return result


def decode_values(codes: Array) -> Array:
    """Return the float32 values of uint16 codes, exactly."""
    result: Array = ((codes.astype(np.uint32) + _BASE) << _DROPPED).view(np.float32)
    return result
