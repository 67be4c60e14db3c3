from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.errors import InputError
from exegete.store.values import LARGEST, SMALLEST, decode_values, encode_values

in_range = st.floats(min_value=2.0**-32, max_value=4290672384.0, width=32)


def test_every_code_is_a_distinct_positive_finite_value_and_encodes_to_itself() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = decode_values(codes)
    assert np.isfinite(values).all()
    assert values[0] == SMALLEST > 0
    assert values[-1] == LARGEST
    assert (np.diff(values.astype(np.float64)) > 0).all()
    assert (encode_values(values) == codes).all()


def test_codes_are_what_the_docstring_says() -> None:
    for code in (0, 1, 1023, 1024, 33_333, 65_535):
        assert decode_values(np.array([code], np.uint16))[0] == (1 + code % 1024 / 1024) * 2.0 ** (code // 1024 - 32)
    assert encode_values(np.array([1.0, 1.5, 2.0], np.float32)).tolist() == [32 * 1024, 32 * 1024 + 512, 33 * 1024]


@given(st.lists(in_range, min_size=1, max_size=50))
def test_relative_error_is_that_of_a_half_float(values: list[float]) -> None:
    exact = np.array(values, np.float64)
    stored = decode_values(encode_values(np.array(values, np.float32))).astype(np.float64)
    assert (np.abs(stored - exact) <= exact * 2.0**-11).all()


@given(st.floats(min_value=2.0**-14, max_value=65504, width=32))
def test_agrees_with_the_half_float_where_both_are_normal(value: float) -> None:
    packed: float = struct.unpack("<e", struct.pack("<e", value))[0]
    assert decode_values(encode_values(np.array([value], np.float32)))[0] == packed


@given(in_range, in_range)
def test_order_is_kept(a: float, b: float) -> None:
    low, high = encode_values(np.array(sorted([a, b]), np.float32))
    assert low <= high


def test_tiny_values_still_fire() -> None:
    tiny = np.array([1e-45, 1e-30, 2.0**-33], np.float32)
    assert (decode_values(encode_values(tiny)) == SMALLEST).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_firing_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="positive and finite"):
        encode_values(np.array([1.0, value], np.float32))


def test_what_would_round_to_infinity_is_refused_rather_than_clamped() -> None:
    assert encode_values(np.array([LARGEST], np.float32)) == 65_535
    for value in (2.0**32, LARGEST + 2.0**21, 3e38):
        with pytest.raises(InputError, match="too large to store"):
            encode_values(np.array([value], np.float32))


def test_nothing_encodes_to_nothing() -> None:
    assert len(encode_values(np.zeros(0, np.float32))) == len(decode_values(np.zeros(0, np.uint16))) == 0
