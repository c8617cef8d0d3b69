"""Runs on shards of a server, killed and resumed, with one process and with two."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import World, compare_killed, compare_pair
from tests.shards import Server, make_shards, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """That of the shards of the world's folder, which a run reads two at a time."""
    folder = tmp_path_factory.mktemp("shards")
    with served(folder / "shards") as server:
        yield server


@pytest.fixture(scope="module")
def world(server: Server) -> World:
    folder = server.folder.parent
    extra = {"train_data_dir": server.url, "shard_cache": folder / "cache", "shard_window": 2}
    world = World(folder / "world", steps=8, extra=extra)
    make_shards(folder / "world/open_images", server.folder)
    return world


def test_a_killed_run_on_shards_ends_as_an_uninterrupted_one(world, server, tmp_path: Path):
    """In mid-window and over the ends of windows: ten pictures in shards of two."""
    killed = compare_killed(world, "stage 2", tmp_path, kills=2, seed=0, timed=False)
    assert killed["kills"] == 2 and server.asked["000000.tar"] >= 1


def test_two_processes_on_shards_resume_after_one_is_killed(world, tmp_path: Path):
    assert len(compare_pair(world, "stage 1", tmp_path, kills=1, seed=1)["kills"]) == 1
