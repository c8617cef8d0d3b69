"""Shards of miniature Open Images folders."""

import numpy as np
import pytest

from tests.open_images import make_open_images
from tests.shards import make_shards


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("elite.shard_cache.PAUSES", (0, 0.01))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose boxes are listed in any order."""
    root = make_open_images(tmp_path_factory.mktemp("data"), n=12)
    path = root / "annotations" / "test-annotations-bbox.csv"
    header, *rows = path.read_text().splitlines()
    mixed = np.random.default_rng(7).permutation([*rows, rows[3], rows[0]])
    path.write_text("\n".join([header, *mixed]))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    return make_shards(folder, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own_shards(folder, tmp_path):
    """To be spoiled."""
    return make_shards(folder, tmp_path / "shards")
