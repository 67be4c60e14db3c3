"""A small world of planted latents: four kinds, a pair of siblings each."""

from __future__ import annotations

import pytest

from exegete.testing.worlds import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world(8, tokens=250_000)
