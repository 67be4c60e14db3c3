"""Random streams depend on seed and names alone."""

from __future__ import annotations

from exegete.streams import stream


def test_streams_are_named_not_ordered() -> None:
    first = stream(0, "c/1", "select").integers(10**9, size=4).tolist()
    stream(0, "c/2", "select").integers(10**9, size=4)
    assert stream(0, "c/1", "select").integers(10**9, size=4).tolist() == first


def test_other_seeds_and_names_give_other_streams() -> None:
    draws = {
        tuple(stream(seed, *names).integers(10**9, size=3).tolist())
        for seed in (0, 1)
        for names in (("a",), ("b",), ("a", "b"), ("ab",))
    }
    assert len(draws) == 8
