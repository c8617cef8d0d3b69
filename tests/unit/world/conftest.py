"""Critters to look at, and a scene that shows them whole."""

import numpy as np
import pytest

from small_world import render
from small_world.world import POOLS, Critter, random_critter


@pytest.fixture(scope="session")
def critters() -> dict[str, list[Critter]]:
    """A thousand of each pool."""
    found = {}
    for number, pool in enumerate(POOLS):
        rng = np.random.default_rng(number)
        found[pool] = [random_critter(rng, pool) for _ in range(1000)]
    return found


@pytest.fixture
def on_magenta(monkeypatch) -> None:
    """Every scene is this colour."""
    magenta = np.array((255, 0, 255), np.uint8)
    monkeypatch.setattr(
        render, "draw_scene", lambda scene, rng, size: np.tile(magenta, (size, size, 1))
    )
